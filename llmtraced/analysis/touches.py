"""Was a page used while it was in the page cache? What page faults and operators tell of that, and what they do not.

A page that comes in is not mapped, so its first use is a page fault. But a fault maps more than its own page: what is
in the cache of its 64 KiB, and all of a large folio, which has up to 2 MiB. So a page was mapped if there was a fault
in its 64 KiB; it was not, and so not used, if there was none in its 2 MiB; in between nobody can tell. An operator
that ended while a page of its weight was in the cache has read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Bools, Ints, Words, batches
from llmtraced.analysis.pages import BLOCK, Pages, Steps
from llmtraced.analysis.trace import Trace, collect
from llmtraced.schema import PAGE

__all__ = ["Evidence"]

_HUGE: Final = 32  # blocks in 2 MiB, the largest folio that one fault maps
_ROWS: Final = 4_000_000
_OWNER: Final = ("model", "tensor_name")

_Ended = tuple[int, Ints, Ints]
"""The last beginning in a batch of events, and of each of them when it ended (ns since the trace's first row), and its
key."""


class Evidence:
    """The faults, operators and routing of a trace, followed in order of time beside the rows of the page cache."""

    def __init__(self, trace: Trace, pages: Pages) -> None:
        known = pages.tensors.join(
            trace.tensors, on=_OWNER, how="left", nulls_equal=True, maintain_order="left"
        ).with_columns(pl.col("n_experts", "layer").fill_null(0))
        self._merged = (known["n_experts"] > 0).to_numpy()
        self._layer = known["layer"].to_numpy().clip(0).astype(np.int64)
        experts, layers = int(known["n_experts"].max() or 0), int(self._layer.max(initial=0)) + 1  # type: ignore[arg-type]
        self._experts = experts
        self._faults = _Events(_faults(trace, pages))
        self._blocks, self._huge = _Last(pages.blocks), _Last(pages.blocks // _HUGE + 1)
        self._ops, self._used = _Events(_ops(trace, pages)), _Last(known.height)
        self._choices = _Events(_choices(trace, pages, experts, layers))
        self._chosen = _Last(layers * experts)

    def weigh(self, steps: Steps) -> Iterator[tuple[Steps, Bools, Bools]]:
        """Yield the same bytes as steps again, which of them were used between their past and now, and which may be.

        Args:
            steps: in order of time from call to call.
        """
        past, now = steps.past.time, steps.now.time
        end = int(now.max(initial=-1))
        tensor, expert = steps.tensor, steps.expert
        merged = self._merged[tensor]
        self._used.take(*self._ops.until(end))
        used = self._used.between(np.where(merged, -1, tensor), past, now)
        self._chosen.take(*self._choices.until(end))
        if merged.any():
            chosen = np.where(merged & (expert >= 0), self._layer[tensor] * self._experts + expert, -1)
            used |= self._chosen.between(chosen, past, now)
        yield steps.only(used), np.ones(int(np.count_nonzero(used)), bool), np.zeros(0, bool)

        time, block = self._faults.until(end)
        self._blocks.take(time, block)
        self._huge.take(time, block // _HUGE)
        rest = steps.only(~used).by_block()
        past, now = rest.past.time, rest.now.time
        place = rest.begin // (BLOCK * PAGE)
        used = self._blocks.between(place, past, now)
        yield rest, used, self._huge.between(place // _HUGE, past, now)


class _Events:
    """Takes batches of events that are sorted by their beginning, and gives them out by their end."""

    def __init__(self, batches: Iterator[_Ended]) -> None:
        self._batches = batches
        self._held: list[tuple[Ints, Ints]] = []
        self._began = -1

    def until(self, now: int) -> tuple[Ints, Ints]:
        """Return the end and key of what has ended since the last call and by ``now``, in no order."""
        while self._began <= now:
            more = next(self._batches, None)
            if more is None:
                break
            self._began = max(self._began, more[0])
            self._held.append(more[1:])
        done, held = [], []
        for time, key in self._held:
            ended = time <= now
            some = int(np.count_nonzero(ended))
            if some == time.size:
                done.append((time, key))
            elif some:
                done.append((time[ended], key[ended]))
                held.append((time[~ended], key[~ended]))
            else:
                held.append((time, key))
        self._held = held
        if len(done) == 1:
            return done[0]
        none = np.empty(0, np.int64)
        time, key = (np.concatenate([none, *(one[i] for one in done)]) for i in (0, 1))
        return time, key


class _Last:
    """When something happened last, for each of ``keys`` keys."""

    def __init__(self, keys: int) -> None:
        self._time = np.full(keys + 1, -1, np.int64)  # the last one, which is also -1, is for what has no key
        self._new: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._before = self._time

    def take(self, time: Ints, key: Ints) -> None:
        """Take in events, which are later than those taken in before."""
        self._before = self._time.copy()
        self._new = time, key
        np.maximum.at(self._time, key, time)

    def between(self, of: Ints, since: Ints, now: Ints) -> Bools:
        """Return whether there was an event of the key ``of`` (negative: none) between ``since`` and ``now``.

        Args:
            of: keys.
            since: before now.
            now: not before any event of an earlier call of :meth:`take`.
        """
        last = self._time[of]
        found: Bools = last >= since
        late = np.flatnonzero(found & (last > now))  # the last event is too late, but one before it may do
        if late.size:
            found[late] = self._earlier(of[late], since[late], now[late])
        return found

    def _earlier(self, of: Ints, since: Ints, now: Ints) -> Bools:
        found: Bools = self._before[of] >= since
        asked = np.zeros(self._time.size, bool)
        asked[of[~found]] = True
        some = np.flatnonzero(asked[self._new[1]])
        time, key = self._new[0][some], self._new[1][some]
        order = np.argsort(time, kind="stable")
        time, key = time[order], key[order]
        scale = time.size + 1
        place = np.sort(key * scale + np.arange(1, scale))  # by key, and then by time
        ended = np.searchsorted(time, now, "right")  # so many events by then
        at = np.searchsorted(place, of * scale + ended, "right") - 1
        event = place[np.maximum(at, 0)] if place.size else np.zeros(of.size, np.int64)
        when = time[event % scale - 1] if time.size else event
        found |= (at >= 0) & (event // scale == of) & (when >= since)
        return found


def _faults(trace: Trace, pages: Pages) -> Iterator[_Ended]:
    """Yield the page faults; the key is the block of 64 KiB."""
    columns: dict[str, Words | int] = {"model": pages.models, "shard": -1, "offset_bytes": 0}
    columns |= {"timestamp": 0, "latency_ns": 0}

    def events(rows: Batch) -> _Ended:
        key = (pages.first_page(rows["model"], rows["shard"]) + rows["offset_bytes"] // PAGE) // BLOCK
        return _ended(rows["timestamp"] - pages.start_ns, rows["latency_ns"], key, pages.blocks)

    return batches(trace, "faults", columns, events)


def _ops(trace: Trace, pages: Pages) -> Iterator[_Ended]:
    """Yield the operators that read a whole weight (not those that look up rows); the key is its row in ``pages``."""
    names = Words("get_rows", "mul_mat_id")
    columns: dict[str, Words | int] = {"model": pages.models, "tensor_name": pages.names, "op": names}
    columns |= {"timestamp": 0, "duration_ns": 0}

    def events(rows: Batch) -> _Ended:
        key = pages.tensor_of(rows["model"], rows["tensor_name"])
        key[rows["op"] < 2] = -1
        if None in pages.names.list:
            key[rows["tensor_name"] == pages.names.list.index(None)] = -1
        return _ended(rows["timestamp"] - pages.start_ns, rows["duration_ns"], key, pages.tensors.height)

    return batches(trace, "ops", columns, events)


def _ended(began: Ints, lasted: Ints, key: Ints, keys: int) -> _Ended:
    """Return events whose key is one of ``keys``."""
    known = (key >= 0) & (key < keys)
    last = int(began.max(initial=-1))
    if known.all():
        return last, began + lasted, key
    return last, (began + lasted)[known], key[known]


def _choices(trace: Trace, pages: Pages, experts: int, layers: int) -> Iterator[_Ended]:
    """Yield the experts chosen; the key is layer x experts + expert. A choice ends when the next layer chooses."""
    for piece in trace.slices("routing", rows=_ROWS // 8):
        frame = collect(piece.select("layer", began=pl.col("timestamp") - pages.start_ns, key="experts"))
        times = frame["began"].unique().sort().to_numpy()
        after = np.append(times[1:], times[-1:])[np.searchsorted(times, frame["began"].to_numpy())]
        rows = (
            frame.with_columns(pl.Series("ended", after, pl.Int64))
            .filter(pl.col("layer").is_between(0, layers - 1))
            .explode("key")
            .filter(pl.col("key").is_between(0, experts - 1))
            .select("began", "ended", key=pl.col("layer").cast(pl.Int64) * experts + pl.col("key"))
        )
        began, ended, key = (rows[name].to_numpy() for name in rows.columns)
        yield _ended(began, ended - began, key, layers * experts)
