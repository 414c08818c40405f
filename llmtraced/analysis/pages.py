"""Follow each page of a model through the page cache: what it had been through when it came in or went out.

A row moves a stretch of pages. What moved each page last is kept (:mod:`llmtraced.analysis.walk`), so memory goes with
the model's size, and what a row finds are stretches again: of pages that were moved by the same row before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Bools, Ints, Numbers, Words, batches, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.trace import Trace, collect
from llmtraced.analysis.walk import FILE, Walk
from llmtraced.errors import LlmtracedError
from llmtraced.schema import CAUSES, PAGE

__all__ = ["BLOCK", "CLOCK", "FOLIO", "Pages", "Rows", "Steps"]

BLOCK: Final = 16
"""Pages that one fault maps if they are in the cache (64 KiB, aligned): Linux's fault-around."""

FOLIO: Final = 512
"""Pages of the largest folio that one fault maps (2 MiB)."""

CLOCK: Final = 7
"""Bits below the time in a mark."""

_KEPT: Final = 1 << 20  # rows that are kept before those that no page needs are forgotten, at least
_SHIFT: Final = PAGE.bit_length() - 1
_SPARE: Final = 1 << 30
_PAGES: Final = 1 << FILE - _SHIFT  # of a file, at most


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the page cache by number; number 0 is that nothing happened yet.

    ``mark`` is what happened and when, in one number; negative: nothing, since the recording began. Its lowest bit is
    whether the pages came in (else they went out), the next three are the cause, as the position in CAUSES; 16: it was
    in the phase asked for; 32: while the model was loaded, before the first graph; 64: in the phase whose order is
    looked at; from bit :data:`CLOCK` on: ns since the trace's first row.
    ``tensor`` is the number in :attr:`Pages.tensors`; ``begin`` and ``end`` are addresses: a file's number in the bits
    from :data:`llmtraced.analysis.walk.FILE` on, below it its bytes. ``who`` is the number of its comm (0 unless asked
    for), of its phase, and of its cause, the latter in 8 bits each.
    """

    mark: Ints
    token: Numbers
    tensor: Numbers
    expert: Numbers
    begin: Ints
    end: Ints
    who: Ints

    def only(self, some: Any) -> Rows:
        """Return some of the rows."""
        return Rows(*(getattr(self, field.name)[some] for field in fields(self)))

    def then(self, more: Rows) -> Rows:
        """Return these rows and more."""
        return Rows(*(np.concatenate([getattr(one, field.name) for one in (self, more)]) for field in fields(self)))

    def in_room_for(self, count: int) -> Rows:
        """Return arrays of that length, which begin with these rows; the others are not set."""
        room = Rows(*(np.empty(count, getattr(self, field.name).dtype) for field in fields(self)))
        room.put(0, self)
        return room

    def put(self, first: int, rows: Rows) -> None:
        """Set rows from number ``first`` on."""
        for field in fields(self):
            getattr(self, field.name)[first : first + rows.mark.size] = getattr(rows, field.name)


@dataclass(frozen=True, slots=True)
class Steps:
    """Stretches of one row with the same past; all arrays are of the same length.

    ``row`` and ``before`` are numbers in ``rows``: what happens to the stretch, and what happened to it before.
    ``begin`` and ``end`` are its addresses.
    """

    rows: Rows
    row: Ints
    before: Ints
    begin: Ints
    end: Ints

    def only(self, some: Any) -> Steps:
        """Return those of the steps."""
        return Steps(self.rows, self.row[some], self.before[some], self.begin[some], self.end[some])

    def returned(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Return, of the steps that bring back what was evicted, and are in the phase asked for, what they bring back.

        Returns:
            int64, number in :attr:`Pages.tensors`, ns since the eviction, graphs since the eviction, and bytes.
        """
        rows = self.rows
        return _returned(self.row, self.before, self.begin, self.end, rows.mark, rows.token, rows.tensor)

    def by_block(self, some: Bools) -> Steps:
        """Return the bytes of some of the steps as steps that end where a block of :data:`BLOCK` pages ends."""
        return Steps(self.rows, *_by_block(some, self.row, self.before, self.begin, self.end))


@compiled
def _returned(
    row: Ints, before: Ints, begin: Ints, end: Ints, mark: Ints, token: Numbers, tensor: Numbers
) -> tuple[Ints, Ints, Ints, Ints]:
    found = np.empty((4, row.size), np.int64)
    count = 0
    for i in range(row.size):
        now, past = mark[row[i]], mark[before[i]]
        if now & 17 == 17 and past >= 0 and not past & 1:
            found[0, count], found[1, count] = tensor[row[i]], (now >> CLOCK) - (past >> CLOCK)
            found[2, count], found[3, count] = token[row[i]] - token[before[i]], end[i] - begin[i]
            count += 1
    return found[0, :count], found[1, :count], found[2, :count], found[3, :count]


@compiled
def _by_block(some: Bools, row: Ints, before: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    size = BLOCK * PAGE
    count = 0
    for i in range(row.size):
        if some[i]:
            count += (end[i] - 1) // size - begin[i] // size + 1
    found = np.empty((4, count), np.int64)
    at = 0
    for i in range(row.size):
        low = begin[i] if some[i] else end[i]
        while low < end[i]:
            high = min((low // size + 1) * size, end[i])
            found[0, at], found[1, at], found[2, at], found[3, at] = row[i], before[i], low, high
            low = high
            at += 1
    return found[0], found[1], found[2], found[3]


def _limit(trace: Trace) -> int:
    """Return the bytes of a file beyond which a row is damaged, for the memory to follow pages goes with the highest.

    A file that was replaced may be longer than map and footers say, but not a great many times.
    """
    sizes = [int(model.get("size_bytes") or 0) for model in trace.meta["models"]]
    sizes += (trace.tensors["offset_bytes"] + trace.tensors["size_bytes"]).drop_nulls().to_list()
    return min(_SPARE + 16 * max(sizes, default=0), 1 << FILE - 2)


class Pages:
    """The state of all pages of a trace's models.

    Attributes:
        models, names, phases, causes, comms: the words of the columns ``model``, ``tensor_name``, ``phase``, ``cause``
            (first those of CAUSES) and ``comm``.
        start_ns: what times count from.
        limit: no row begins at a file's byte from here on, for then it is damaged.
    """

    def __init__(
        self, trace: Trace, phase: str | None = None, order: str | None = None, processes: bool = False
    ) -> None:
        self._trace = trace
        self._processes = processes
        self.start_ns = trace.first_ns or 0
        known = [trace.tensors[name].to_list() for name in ("model", "tensor_name")]
        self.models, self.names = (Words(*dict.fromkeys(words)) for words in known)
        self.phases, self.comms = Words(), Words()
        self.causes, self._actions = Words(*CAUSES), Words("evict", "add")
        self._wanted = phase, order
        self.limit = _limit(trace)
        self._lock = Lock()  # files and tensors are found by several threads
        self._file: dict[tuple[int, int], int] = {}  # first page, of model and shard
        self._shifts = self._mapped()
        self._owners: list[tuple[int, int]] = []  # of each tensor
        self._number = np.zeros((0, 0), np.int32)  # of each model and name: tensor + 1
        self._moved: Bools = np.zeros(0, bool)  # of each tensor: it has rows of the page cache
        numbers = ({word: number for number, word in enumerate(words.list)} for words in (self.models, self.names))
        model, name = (
            np.array([number[word] for word in words], np.int32) for number, words in zip(numbers, known, strict=True)
        )
        self.tensor_of(model, name)
        self._last = Walk()
        none, number = np.zeros(1, np.int64), np.zeros(1, np.int32)
        self._rows, self._known = Rows(none - 1, number, number, number - 1, none, none, none), 1

    @property
    def tensors(self) -> pl.DataFrame:
        """The tensors by number, first those of the map: ``model``, ``tensor_name`` (null: outside tensors).

        ``moved`` is whether there were rows of the page cache. More may come while rows are read.
        """
        names = [(self.models.list[model], self.names.list[name]) for model, name in self._owners[: self.count]]
        frame = pl.DataFrame(names, schema={"model": pl.String, "tensor_name": pl.String}, orient="row")
        return frame.with_columns(moved=pl.Series(grown(self._moved, (frame.height,))[: frame.height]))

    @property
    def count(self) -> int:
        """How many tensors there are by now: above the number of each that was yielded."""
        return len(self._owners)

    def _mapped(self) -> dict[tuple[str | None, int], int]:
        """Return by how many pages each file is moved, so that blocks of 16 are those of the address space."""
        faults = self._trace.table("faults").head(1_000_000).filter(pl.col("address") > 0)
        shift = (pl.col("address") - pl.col("offset_bytes")) // PAGE % BLOCK
        seen = collect(faults.group_by(pl.col("model").cast(pl.String), "shard").agg(shift=shift.first()))
        return {(model, shard): int(pages or 0) for model, shard, pages in seen.iter_rows()}

    def first_page(self, model: Numbers, shard: Numbers) -> Ints:
        """Return the first page of each row's file.

        Args:
            model: numbers of :attr:`models`.
            shard: of the row.
        """
        if (model == model[:1]).all() and (shard == shard[:1]).all():
            one = self._first_page(int(model[0]), int(shard[0])) if model.size else 0
            return np.full(model.size, one, np.int64)
        found = np.empty(model.size, np.int64)
        for number in np.unique(model).tolist():
            for part in np.unique(shard[model == number]).tolist():
                found[(model == number) & (shard == part)] = self._first_page(number, part)
        return found

    def _first_page(self, model: int, shard: int) -> int:
        with self._lock:
            new = len(self._file) * _PAGES + self._shifts.get((self.models.list[model], shard), 0)
            return self._file.setdefault((model, shard), new)

    @property
    def starts(self) -> Ints:
        """By how many pages each file is moved, so that blocks of 16 are those of the address space: see first_page."""
        with self._lock:
            return np.array([first & _PAGES - 1 for first in self._file.values()], np.int64)

    def tensor_of(self, model: Numbers, name: Numbers) -> Numbers:
        """Return the number in :attr:`tensors`, which may be a new one.

        Args:
            model: numbers of :attr:`models`.
            name: numbers of :attr:`names`.
        """
        with self._lock:
            self._number = grown(self._number, (len(self.models.list), len(self.names.list)))
            numbers, names = self._number.reshape(-1), self._number.shape[1]
            at = model * names + name
            found: Numbers = numbers[at]
            if not found.all():
                for one in np.unique(at[found == 0]).tolist():
                    self._owners.append(divmod(one, names))
                    numbers[one] = len(self._owners)
                found = numbers[at]
        return found - 1

    def rows(self) -> Iterator[Rows]:
        """Yield the rows of each batch, in order; other threads read ahead."""
        for rows in batches(self._trace, "pagecache", self._columns(), self._numbered):
            self._moved = grown(self._moved, (self.count,))
            self._moved[rows.tensor] = True
            yield rows

    def steps(self) -> Iterator[tuple[Rows, Steps]]:
        """Walk through all adds and evictions; the walk can be made once.

        Yields:
            Of each batch, in order of time, its rows and their steps, in the rows' order.
        """
        for rows in self.rows():
            some = rows.end > rows.begin
            yield rows, self._walk(rows if some.all() else rows.only(some))

    def _columns(self) -> dict[str, Words | int]:
        return {
            "model": self.models,
            "tensor_name": self.names,
            "phase": self.phases,
            "cause": self.causes,
            "action": self._actions,
            **dict.fromkeys(("timestamp", "token", "offset_bytes", "bytes"), 0),
            **dict.fromkeys(("shard", "expert"), -1),
            **({"comm": self.comms} if self._processes else {}),
        }

    def _numbered(self, batch: Batch) -> Rows:
        """Return the rows of a batch."""
        phase, order = self._wanted
        flags = [
            16 * (phase in (None, word)) + 32 * (word == "load") + 64 * (order in (None, word))
            for word in self.phases.list
        ]
        mark_flags = np.array(flags or [0], np.int64)[batch["phase"]]
        mark_flags[batch["token"] != 0] &= ~32
        causes = [CAUSES.index(word) if word in CAUSES else len(CAUSES) - 1 for word in self.causes.list]
        mark = batch["timestamp"] - self.start_ns << CLOCK
        mark += mark_flags
        mark += np.array(causes or [0], np.int64)[batch["cause"]] << 1
        mark += batch["action"] == 1
        offset = batch["offset_bytes"]
        if offset.size and (offset.min() < 0 or offset.max() >= self.limit or batch["bytes"].max() > self.limit):
            raise LlmtracedError(
                "cannot read the trace's data (pages that no file has): move the damaged file out of it"
            )
        begin = offset + (self.first_page(batch["model"], batch["shard"]) << _SHIFT)
        tensor = self.tensor_of(batch["model"], batch["tensor_name"])
        who = batch["phase"].astype(np.int64) << 8 | batch["cause"]
        if self._processes:
            who |= batch["comm"].astype(np.int64) << 16
        return Rows(mark, batch["token"], tensor, batch["expert"], begin, begin + batch["bytes"], who)

    def _walk(self, rows: Rows) -> Steps:
        first, count = self._known, rows.mark.size
        if first + count > self._rows.mark.size:
            kept = self._rows.only(self._last.renumber())
            first = kept.mark.size
            self._rows = kept.in_room_for(max(2 * (first + count), _KEPT))
        self._known = first + count
        self._rows.put(first, rows)
        return Steps(self._rows, *self._last.put(rows.begin, rows.end, first))

    def resident(self) -> Steps:
        """Return what is in the cache after the walk, as steps that leave now."""
        number, begin, end = self._last.stretches()
        mark = self._rows.mark[number]
        at = np.flatnonzero((mark >= 0) & (mark & 1 == 1))
        rows = self._rows.only(number[at])
        begin, end = np.maximum(begin[at], rows.begin), np.minimum(end[at], rows.end)
        now = np.full(at.size, ((self._trace.last_ns or 0) - self.start_ns) << CLOCK, np.int64)
        leaving = Rows(now, rows.token, rows.tensor, rows.expert, begin, end, rows.who)
        number = np.arange(at.size)
        return Steps(leaving.then(rows), number, number + at.size, begin, end)
