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

from llmtraced.analysis.pages import BLOCK, Bools, Ints, Pages, Steps
from llmtraced.analysis.trace import Trace, collect

__all__ = ["Evidence"]

_HUGE: Final = 32  # blocks in 2 MiB, the largest folio that one fault maps
_ROWS: Final = 4_000_000
_OWNER: Final = ("model", "tensor_name")

_Rows = Iterator[tuple[Ints, Ints, Ints]]
"""When something began and ended (ns since the trace's first row), and its key; sorted by the beginning."""


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

    def weigh(self, steps: Steps) -> tuple[Bools, Bools]:
        """Return which pages were used between their past and now, and which may have been.

        Args:
            steps: in one block each, and in order of time from call to call.
        """
        since, now = steps.past.time, steps.now.time
        end = int(now.max(initial=-1))
        time, block = self._faults.until(end)
        place = steps.page // BLOCK
        used = self._blocks.between(time, block, place, since, now)
        may = self._huge.between(time, block // _HUGE, place // _HUGE, since, now)
        used |= self._used.between(
            *self._ops.until(end), np.where(self._merged[steps.tensor], -1, steps.tensor), since, now
        )
        chosen = np.where(
            self._merged[steps.tensor] & (steps.expert >= 0),
            self._layer[steps.tensor] * self._experts + steps.expert,
            -1,
        )
        used |= self._chosen.between(*self._choices.until(end), chosen, since, now)
        return used, may


class _Events:
    """Takes rows that are sorted by their beginning, and gives them out by their end."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = _by_end(rows)
        self._time = self._key = np.empty(0, np.int64)

    def until(self, now: int) -> tuple[Ints, Ints]:
        """Return the end and key of what has ended since the last call and by ``now``, in order."""
        while not self._time.size or self._time[-1] <= now:
            more = next(self._rows, None)
            if more is None:
                break
            self._time, self._key = (np.concatenate(pair) for pair in zip((self._time, self._key), more, strict=True))
        upto = int(np.searchsorted(self._time, now, "right"))
        time, key = self._time[:upto], self._key[:upto]
        self._time, self._key = self._time[upto:], self._key[upto:]
        return time, key


class _Last:
    """When something happened last, for each of ``keys`` keys."""

    def __init__(self, keys: int) -> None:
        self._time = np.full(keys + 1, -1, np.int64)  # the last one, which is also -1, is for what has no key

    def between(self, time: Ints, key: Ints, of: Ints, since: Ints, now: Ints) -> Bools:
        """Take in the events ``time``, ``key``; say whether there is one for ``of`` between ``since`` and ``now``."""
        found: Bools = self._time[of] >= since
        if time.size:
            rest = np.flatnonzero(~found & (of >= 0))
            scale = time.size + 1
            place = key * scale + np.arange(1, scale)  # sorted by key, and then by time
            order = np.argsort(place)
            ended = np.searchsorted(time, now[rest], "right")  # so many events by then
            at = np.searchsorted(place, of[rest] * scale + ended, "right", sorter=order) - 1
            event = order[np.maximum(at, 0)]
            found[rest] = (at >= 0) & (key[event] == of[rest]) & (time[event] >= since[rest])
            self._time[key] = time  # the last of several stays
        return found


def _by_end(rows: _Rows) -> Iterator[tuple[Ints, Ints]]:
    late: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))  # began in a piece, ended after it
    for began, ended, key in rows:
        if began.size:
            time, what = np.concatenate([late[0], ended]), np.concatenate([late[1], key])
            order = np.argsort(time, kind="stable")
            time, what = time[order], what[order]
            cut = int(np.searchsorted(time, began[-1], "right"))
            late = time[cut:], what[cut:]
            yield time[:cut], what[:cut]
    yield late


def _faults(trace: Trace, pages: Pages) -> _Rows:
    """Yield the page faults; the key is the block of 64 KiB."""
    began = pl.col("timestamp") - pages.start_ns
    for piece in trace.slices("faults", rows=_ROWS):
        rows = piece.select(
            began=began, ended=began + pl.col("latency_ns").fill_null(0), key=pages.number() // BLOCK
        ).filter(pl.col("key").is_between(0, pages.blocks - 1))
        yield _arrays(rows)


def _ops(trace: Trace, pages: Pages) -> _Rows:
    """Yield the operators that read a whole weight (not those that look up rows); the key is its row in ``pages``."""
    began = pl.col("timestamp") - pages.start_ns
    tensors = pages.owners.with_columns(key=pl.col("tensor").cast(pl.Int64)).lazy()
    for piece in trace.slices("ops", rows=_ROWS):
        rows = (
            piece.filter(pl.col("tensor_name").is_not_null(), pl.col("op") != "get_rows", pl.col("op") != "mul_mat_id")
            .join(tensors, on=_OWNER, nulls_equal=True, maintain_order="left")
            .select(began=began, ended=began + pl.col("duration_ns").fill_null(0), key="key")
        )
        yield _arrays(rows)


def _choices(trace: Trace, pages: Pages, experts: int, layers: int) -> _Rows:
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
        yield _arrays(rows.lazy())


def _arrays(rows: pl.LazyFrame) -> tuple[Ints, Ints, Ints]:
    frame = collect(rows)
    return frame["began"].to_numpy(), frame["ended"].to_numpy(), frame["key"].to_numpy()
