"""Follow each page of a model through the page cache: what it had been through when it came in or went out.

A row moves a stretch of pages. What moved each page last is kept (:mod:`llmtraced.analysis.walk`), so memory goes with
the model's size, and what a row finds are stretches again: of pages that were moved by the same row before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Bools, Ints, Words, batches
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.trace import Trace, collect
from llmtraced.analysis.walk import Walk
from llmtraced.schema import CAUSES, PAGE

__all__ = ["BLOCK", "CLOCK", "Marks", "Pages", "Rows", "Steps"]

BLOCK: Final = 16
"""Pages that one fault maps if they are in the cache (64 KiB, aligned): Linux's fault-around."""

CLOCK: Final = 7
"""Bits below the time in a mark."""

_KEPT: Final = 1 << 20  # rows that are kept before those that no page needs are forgotten, at least
_SHIFT: Final = PAGE.bit_length() - 1
_ABSENT: Final = -(1 << 40)


@dataclass(frozen=True, slots=True)
class Marks:
    """What happened to some pages at some time, each in one number; negative: nothing, since the recording began."""

    packed: Ints

    @property
    def known(self) -> Bools:
        """Whether anything happened."""
        return self.packed >= 0

    @property
    def added(self) -> Bools:
        """Whether the page came in (else it went out)."""
        return (self.packed & 1).astype(bool)

    @property
    def cause(self) -> Ints:
        """Why, as the position in CAUSES."""
        return self.packed >> 1 & 7

    @property
    def counted(self) -> Bools:
        """Whether it was in the phase asked for."""
        return (self.packed & 16).astype(bool)

    @property
    def loading(self) -> Bools:
        """Whether it was while the model was loaded, before the first graph."""
        return (self.packed & 32).astype(bool)

    @property
    def ordered(self) -> Bools:
        """Whether it was in the phase whose order is looked at."""
        return (self.packed & 64).astype(bool)

    @property
    def time(self) -> Ints:
        """When, in ns since the trace's first row."""
        return self.packed >> CLOCK


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the page cache by number; number 0 is that nothing happened yet.

    ``tensor`` is the row of :attr:`Pages.tensors`; ``begin`` and ``end`` are bytes, counted over all files. ``who`` is
    the number of its comm (0 unless asked for), of its phase, and of its cause, the latter in 8 bits each.
    """

    mark: Ints
    token: Ints
    tensor: Ints
    expert: Ints
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
        room = Rows(*(np.empty(count, np.int64) for _ in fields(self)))
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
    ``begin`` and ``end`` are its bytes, counted over all files.
    """

    rows: Rows
    row: Ints
    before: Ints
    begin: Ints
    end: Ints

    @property
    def now(self) -> Marks:
        """What happens."""
        return Marks(self.rows.mark[self.row])

    @property
    def past(self) -> Marks:
        """What happened before."""
        return Marks(self.rows.mark[self.before])

    @property
    def tensor(self) -> Ints:
        """The row of :attr:`Pages.tensors`."""
        return self.rows.tensor[self.row]

    @property
    def expert(self) -> Ints:
        """The number of the expert; negative: none."""
        return self.rows.expert[self.row]

    @property
    def tokens(self) -> Ints:
        """How many graphs later this is than what was before."""
        return self.rows.token[self.row] - self.rows.token[self.before]

    @property
    def nbytes(self) -> Ints:
        """Their bytes."""
        return self.end - self.begin

    def only(self, some: Any) -> Steps:
        """Return those of the steps."""
        return Steps(self.rows, self.row[some], self.before[some], self.begin[some], self.end[some])

    def returned(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Return, of the steps that bring back what was evicted, and are in the phase asked for, what they bring back.

        Returns:
            int64, row of :attr:`Pages.tensors`, ns since the eviction, graphs since the eviction, and bytes.
        """
        rows = self.rows
        return _returned(self.row, self.before, self.begin, self.end, rows.mark, rows.token, rows.tensor)

    def by_block(self) -> Steps:
        """Return the same bytes as steps that end where a block of :data:`BLOCK` pages ends."""
        return Steps(self.rows, *_by_block(self.row, self.before, self.begin, self.end))


@compiled
def _returned(
    row: Ints, before: Ints, begin: Ints, end: Ints, mark: Ints, token: Ints, tensor: Ints
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
def _by_block(row: Ints, before: Ints, begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    size = BLOCK * PAGE
    count = 0
    for i in range(row.size):
        count += (end[i] - 1) // size - begin[i] // size + 1
    found = np.empty((4, count), np.int64)
    at = 0
    for i in range(row.size):
        low = begin[i]
        while low < end[i]:
            high = min((low // size + 1) * size, end[i])
            found[0, at], found[1, at], found[2, at], found[3, at] = row[i], before[i], low, high
            low = high
            at += 1
    return found[0], found[1], found[2], found[3]


class Pages:
    """The state of all pages of a trace's models.

    Attributes:
        tensors: one row a tensor with page-cache rows: ``model``, ``tensor_name`` (null: outside tensors).
        experts: one more than the highest expert's number.
        models, names, phases, causes, comms: the words of the columns ``model``, ``tensor_name``, ``phase``, ``cause``
            (first those of CAUSES) and ``comm``.
        start_ns: what times count from.
    """

    def __init__(
        self, trace: Trace, phase: str | None = None, order: str | None = None, processes: bool = False
    ) -> None:
        self._trace = trace
        self._processes = processes
        self.start_ns = trace.first_ns or 0
        self.models, self.names, self.phases, self.comms = Words(), Words(), Words(), Words()
        self.causes, self._actions = Words(*CAUSES), Words("evict", "add")
        self._wanted = phase, order
        self._survey()
        self._last = Walk(self._pages)
        none = np.zeros(1, np.int64)
        self._rows, self._known = Rows(none - 1, none, none, none - 1, none, none, none), 1

    def _survey(self) -> None:
        """Find the tensors, and number the pages of all files through."""
        columns: dict[str, Words | int] = {"model": self.models, "tensor_name": self.names, "shard": -1}
        columns |= {"offset_bytes": 0, "bytes": 0, "expert": -1}
        self.experts = 0
        owners: dict[tuple[int, int], None] = {}
        ends: dict[tuple[int, int], int] = {}

        def look(rows: Batch) -> list[tuple[tuple[int, int], int, int, Ints]]:
            found = []
            model, shard, end = rows["model"], rows["shard"], rows["offset_bytes"] + rows["bytes"]
            one = (model == model[:1]).all() and (shard == shard[:1]).all()
            file = model[:1] if one else model << 16 | (shard.astype(np.int64) & 0xFFFF)
            for number in file[:1].tolist() if one else np.unique(file).tolist():
                mine = slice(None) if one else file == number
                names = np.flatnonzero(np.bincount(rows["tensor_name"][mine]))
                key = (int(model[mine][0]), int(shard[mine][0]))
                found.append((key, int(end[mine].max()), int(rows["expert"][mine].max()), names))
            return found

        for part in batches(self._trace, "pagecache", columns, look):
            for key, end, expert, names in part:
                self.experts = max(self.experts, expert + 1)
                owners |= dict.fromkeys((key[0], name) for name in names.tolist())
                ends[key] = max(ends.get(key, 0), end)
        self._owners = sorted(owners, key=lambda one: tuple(str(word) for word in self._words(one)))
        self.tensors = pl.DataFrame(
            [self._words(one) for one in self._owners],
            schema={"model": pl.String, "tensor_name": pl.String},
            orient="row",
        )
        self._place(ends)

    def _words(self, owner: tuple[int, int]) -> tuple[str | None, str | None]:
        return self.models.list[owner[0]], self.names.list[owner[1]]

    def _place(self, ends: dict[tuple[int, int], int]) -> None:
        """Number the pages of all files through, such that blocks of 16 are those of the address space."""
        faults = self._trace.table("faults").head(1_000_000).filter(pl.col("address") > 0)
        shift = (pl.col("address") - pl.col("offset_bytes")) // PAGE % BLOCK
        seen = collect(faults.group_by(pl.col("model").cast(pl.String), "shard").agg(shift=shift.first()))
        mapped = {(model, shard): pages for model, shard, pages in seen.iter_rows()}
        self._base: dict[tuple[int, int], int] = {}
        base = 0
        for file in sorted(ends):
            self._base[file] = base + int(mapped.get((self.models.list[file[0]], file[1]), 0))
            base += -(-ends[file] // PAGE) + 2 * BLOCK
            base -= base % BLOCK
        self._pages = base

    def first_page(self, model: Ints, shard: Ints) -> Ints:
        """Return the first page, counted over all files, of each row's file; far below 0: none of them.

        Args:
            model: numbers of :attr:`models`.
            shard: of the row.
        """
        found = np.full(model.size, _ABSENT, np.int64)
        for (number, part), base in self._base.items():
            mine = model == number
            mine &= shard == part
            if mine.all():
                found.fill(base)
                break
            found[mine] = base
        return found

    def tensor_of(self, model: Ints, name: Ints) -> Ints:
        """Return the row in :attr:`tensors`; -1: it has no rows of the page cache.

        Args:
            model: numbers of :attr:`models`.
            name: numbers of :attr:`names`.
        """
        names = len(self.names.list)
        rows = np.full((len(self.models.list), names), -1, np.int64)
        known = np.array(self._owners, np.int64).reshape(-1, 2)
        rows[known[:, 0], known[:, 1]] = np.arange(len(known))
        found: Ints = rows.reshape(-1)[model * names + name]
        return found

    @property
    def blocks(self) -> int:
        """How many blocks of :data:`BLOCK` pages there are."""
        return self._pages // BLOCK

    def rows(self) -> Iterator[Rows]:
        """Yield the rows of each batch, in order; other threads read ahead."""
        return batches(self._trace, "pagecache", self._columns(), self._numbered)

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
        begin = batch["offset_bytes"] + (self.first_page(batch["model"], batch["shard"]) << _SHIFT)
        tensor = self.tensor_of(batch["model"], batch["tensor_name"])
        columns = (mark, batch["token"].astype(np.int64), tensor, batch["expert"].astype(np.int64))
        who = batch["phase"] << 8 | batch["cause"]
        if self._processes:
            who |= batch["comm"] << 16
        return Rows(*columns, begin, begin + batch["bytes"], who)

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
