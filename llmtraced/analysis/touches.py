"""Was a page used while it was in the page cache? What page faults and operators tell of that, and what they do not.

A page that comes in is not mapped, so its first use is a page fault. But a fault maps more than its own page: what is
in the cache of its 64 KiB, and all of a large folio, which has up to 2 MiB. So a page was mapped if there was a fault
in its 64 KiB; it was not, and so not used, if there was none in its 2 MiB of the file; else nobody can tell. An
operator that ended while a page of its weight was in the cache has read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Bools, Ints, Numbers, Words, batches, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.pages import BLOCK, CLOCK, FOLIO, Pages, Steps
from llmtraced.analysis.trace import Trace, collect
from llmtraced.analysis.walk import FILE
from llmtraced.schema import PAGE

__all__ = ["Evidence"]

_ROWS: Final = 500_000
_PART: Final = 1 << 16
_OWNER: Final = ("model", "tensor_name")
_SHIFT: Final = PAGE.bit_length() - 1
_BITS: Final = FILE - _SHIFT  # of a page's number that count it within its file; those above are the file

_Ended = tuple[int, Ints, Ints]
"""The last beginning in a batch of events, and of each of them when it ended (ns since the trace's first row), and its
key."""


class Evidence:
    """The faults, operators and routing of a trace, followed in order of time beside the rows of the page cache."""

    def __init__(self, trace: Trace, pages: Pages) -> None:
        self._pages = pages
        known = pages.tensors.join(
            trace.tensors.unique(_OWNER, keep="last"), on=_OWNER, how="left", nulls_equal=True, maintain_order="left"
        ).with_columns(pl.col("n_experts", "layer").fill_null(0))
        self._merged: Bools = (known["n_experts"] > 0).to_numpy()
        self._layer = known["layer"].to_numpy().clip(0).astype(np.int64)
        experts, layers = int(known["n_experts"].max() or 0), int(self._layer.max(initial=0)) + 1  # type: ignore[arg-type]
        self._experts = experts
        self._faults = _Events(_faults(trace, pages))
        self._blocks, self._folios = (_Last(_BITS - (size.bit_length() - 1)) for size in (BLOCK, FOLIO))
        self._ops, self._used = _Events(_ops(trace, pages)), _Last()
        self._choices = _Events(_choices(trace, pages, experts, layers))
        self._chosen = _Last()

    def weigh(self, steps: Steps) -> Iterator[tuple[Steps, Bools, Bools]]:
        """Yield the same bytes as steps again, which of them were used between their past and now, and which may be.

        Args:
            steps: in order of time from call to call.
        """
        end = int((steps.rows.mark[steps.row] >> CLOCK).max(initial=-1))
        tensors = (self._pages.count,)
        self._merged, self._layer = grown(self._merged, tensors), grown(self._layer, tensors)
        tensor, chosen = _owners(
            steps.row, steps.rows.tensor, steps.rows.expert, self._merged, self._layer, self._experts
        )
        self._used.take(*self._ops.until(end))
        used = self._used.between(tensor, steps)
        self._chosen.take(*self._choices.until(end))
        if self._merged.any():
            used |= self._chosen.between(chosen, steps)
        whole = steps.only(np.flatnonzero(used))
        yield whole, np.ones(whole.row.size, bool), np.zeros(whole.row.size, bool)

        time, page = self._faults.until(end)
        starts = self._pages.starts
        block, folio = _places(page, starts)
        self._blocks.take(time, block)
        self._folios.take(time, folio)
        rest = steps.by_block(~used)
        block, folio = _places(rest.begin >> _SHIFT, starts)
        used, may = self._blocks.between(block, rest), self._folios.between(folio, rest)
        _, also = _places(rest.end - 1 >> _SHIFT, starts)
        if (folio != also).any():  # the block is in two
            may |= self._folios.between(also, rest)
        yield rest, used, may


@compiled
def _owners(row: Ints, tensor: Numbers, expert: Numbers, merged: Bools, layer: Ints, experts: int) -> tuple[Ints, Ints]:
    """Return the tensor of each step if operators read it whole, and else which expert of which layer it is; or -1."""
    whole, part = np.empty(row.size, np.int64), np.empty(row.size, np.int64)
    for i in range(row.size):
        of, one = tensor[row[i]], expert[row[i]]
        whole[i] = -1 if merged[of] else of
        part[i] = layer[of] * experts + one if merged[of] and one >= 0 else -1
    return whole, part


@compiled
def _places(page: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """Return which block of the address space each page is in, and which 2 MiB of its file: so large folios lie.

    Args:
        page: counted as :meth:`Pages.first_page` does.
        starts: of each file, by how many pages it is moved so that blocks are those of the address space.
    """
    block, folio = np.empty(page.size, np.int64), np.empty(page.size, np.int64)
    for i in range(page.size):
        block[i] = page[i] // BLOCK
        folio[i] = (page[i] - starts[page[i] >> _BITS]) // FOLIO
    return block, folio


class _Events:
    """Takes batches of events that are sorted by their beginning, and gives them out by their end."""

    def __init__(self, batches: Iterator[_Ended]) -> None:
        self._batches = batches
        self._held = np.empty(0, np.int64), np.empty(0, np.int64)
        self._began = -1

    def until(self, now: int) -> tuple[Ints, Ints]:
        """Return the end and key of what has ended since the last call and by ``now``, in no order."""
        parts = [self._held]
        while self._began <= now:
            more = next(self._batches, None)
            if more is None:
                break
            self._began = max(self._began, more[0])
            parts.append(more[1:])
        ended, held = np.empty((2, 2, sum(time.size for time, _ in parts)), np.int64)
        count = others = 0
        for time, key in parts:
            count, others = _parted(time, key, now, ended, count, held, others)
        self._held = held[0, :others].copy(), held[1, :others].copy()
        return ended[0, :count], ended[1, :count]


@compiled
def _parted(time: Ints, key: Ints, now: int, by: Ints, count: int, after: Ints, others: int) -> tuple[int, int]:
    """Add time and key of the events by ``now`` to ``by``, and of the others to ``after``; return their new lengths."""
    for i in range(time.size):
        if time[i] <= now:
            by[0, count], by[1, count] = time[i], key[i]
            count += 1
        else:
            after[0, others], after[1, others] = time[i], key[i]
            others += 1
    return count, others


class _Last:
    """When something happened last, for each key, and when before that since the last call of ``take``.

    Args:
        bits: of a key, that count within a file (or whatever there are few of); those above are the file.
    """

    def __init__(self, bits: int = _BITS) -> None:
        self._bits = bits
        self._time = np.zeros((0, 0), np.int64)  # of each file and key; -1: never
        self._newest = np.zeros((0, 0), np.int64)  # the event taken in last
        none = np.empty(0, np.int64)
        self._new: tuple[Ints, Ints] = none, none
        self._links: tuple[Ints, Ints] = none, none

    def take(self, time: Ints, key: Ints) -> None:
        """Take in events, which are later than those taken in before; keys are not negative."""
        files, keys = _room(key, self._bits)
        if files > self._time.shape[0] or keys > self._time.shape[1]:
            room = files, keys + keys // 2
            self._time, self._newest = grown(self._time + 1, room) - 1, grown(self._newest + 1, room) - 1
        self._links = _linked(time, key, self._bits, self._time, self._newest, self._new[1])
        self._new = time, key

    def between(self, of: Ints, steps: Steps) -> Bools:
        """Return whether there was an event of the key ``of`` (negative: none) between each step's past and now.

        Args:
            of: keys.
            steps: none is before an event of an earlier call of :meth:`take`.
        """
        where = steps.row, steps.before, steps.rows.mark
        return _between(of, *where, self._bits, self._time, self._newest, self._new[0], *self._links)


@compiled
def _room(key: Ints, bits: int) -> tuple[int, int]:
    """Return how many files there are at least, and keys in one."""
    files = keys = 0
    for one in key:
        files, keys = max(files, (one >> bits) + 1), max(keys, (one & (1 << bits) - 1) + 1)
    return files, keys


@compiled
def _linked(time: Ints, key: Ints, bits: int, last: Ints, newest: Ints, old: Ints) -> tuple[Ints, Ints]:
    """Return, of each event, the one of its key before it (-1: none here), and the last time before both.

    Those of the keys ``old`` are forgotten first.
    """
    for one in old:
        newest[one >> bits, one & (1 << bits) - 1] = -1
    link, before = np.empty(time.size, np.int64), np.empty(time.size, np.int64)
    for i in range(time.size):
        file, of = key[i] >> bits, key[i] & (1 << bits) - 1
        link[i], before[i] = newest[file, of], last[file, of]
        newest[file, of] = i
        last[file, of] = max(last[file, of], time[i])
    return link, before


@compiled
def _between(
    of: Ints,
    row: Ints,
    past: Ints,
    mark: Ints,
    bits: int,
    last: Ints,
    newest: Ints,
    time: Ints,
    link: Ints,
    before: Ints,
) -> Bools:
    found = np.zeros(of.size, np.bool_)
    for i in range(of.size):
        file, key = of[i] >> bits, of[i] & (1 << bits) - 1
        if of[i] < 0 or file >= last.shape[0] or key >= last.shape[1]:
            continue
        since, now, event, when = mark[past[i]] >> CLOCK, mark[row[i]] >> CLOCK, newest[file, key], last[file, key]
        if when < since or when <= now:
            found[i] = when >= since
            continue
        while event >= 0 and not since <= time[event] <= now:  # the last one is too late, but one before it may do
            event, when = link[event], before[event]
        found[i] = event >= 0 or when >= since
    return found


def _faults(trace: Trace, pages: Pages) -> Iterator[_Ended]:
    """Yield the page faults; the key is the page."""
    columns: dict[str, Words | int] = {"model": pages.models, "shard": -1, "offset_bytes": 0}
    columns |= {"timestamp": 0, "latency_ns": 0}

    def events(rows: Batch) -> _Ended:
        key = pages.first_page(rows["model"], rows["shard"])
        _add_pages(key, rows["offset_bytes"], pages.limit)
        return _ended(rows["timestamp"], pages.start_ns, rows["latency_ns"], key)

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
        return _ended(rows["timestamp"], pages.start_ns, rows["duration_ns"], key)

    return batches(trace, "ops", columns, events)


@compiled
def _add_pages(first: Ints, offset: Ints, limit: int) -> None:
    """Add to each file's first page that of the offset; -1 where no file is so long."""
    for i in range(offset.size):
        first[i] = first[i] + (offset[i] >> _SHIFT) if 0 <= offset[i] < limit else -1


@compiled
def _ended(began: Ints, start: int, lasted: Ints, key: Ints | Numbers) -> _Ended:
    """Return the events that have a key: those with a negative one have none. Times count from ``start``."""
    time, kept = np.empty(key.size, np.int64), np.empty(key.size, np.int64)
    count, last = 0, -1
    for i in range(key.size):
        last = max(last, began[i] - start)
        if key[i] >= 0:
            time[count], kept[count] = began[i] - start + lasted[i], key[i]
            count += 1
    return last, time[:count], kept[:count]


def _choices(trace: Trace, pages: Pages, experts: int, layers: int) -> Iterator[_Ended]:
    """Yield the experts chosen; the key is layer x experts + expert. A choice ends when the next layer chooses."""
    for piece in trace.slices("routing", rows=_ROWS):
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
        rows = rows.sort("began", maintain_order=True)
        for start in range(0, rows.height, _PART):  # what has not ended is looked at again and again: few at a time
            began, ended, key = (rows[name][start : start + _PART].to_numpy() for name in rows.columns)
            yield _ended(began, 0, ended - began, key)
