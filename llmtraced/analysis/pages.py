"""Follow each page of a model through the page cache: what it had been through when it came in or went out.

Rows move stretches of pages, and stretches are what is followed (:mod:`llmtraced.analysis.walk`): memory goes with the
model's size, time with the rows. A page in which two tensors (or experts) meet moves once and is several rows, one a
part; each part has a state of its own. So there is a *slot* for each page, and one for each part that begins inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Bools, Ints, Words, batches
from llmtraced.analysis.trace import Trace, collect
from llmtraced.analysis.walk import Stretches
from llmtraced.schema import CAUSES, PAGE

__all__ = ["BLOCK", "Marks", "Pages", "Rows", "Steps"]

BLOCK: Final = 16
"""Pages that one fault maps if they are in the cache (64 KiB, aligned): Linux's fault-around."""

_CHUNK: Final = 8192  # rows put at once: more would move pages more than once, fewer cost more calls
_FILE: Final = ("model", "shard")
_SHIFT: Final = PAGE.bit_length() - 1
_ABSENT: Final = -(1 << 40)
_CLOCK: Final = 7  # bits below the time in a mark

_Seen = TypeVar("_Seen")


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
        return self.packed >> _CLOCK


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the page cache by number; number 0 is that nothing happened yet.

    ``tensor`` is the row of :attr:`Pages.tensors`; ``begin`` and ``end`` are bytes, counted over all files.
    """

    mark: Ints
    token: Ints
    tensor: Ints
    expert: Ints
    begin: Ints
    end: Ints

    def only(self, some: Any) -> Rows:
        """Return some of the rows."""
        return Rows(*(getattr(self, field.name)[some] for field in fields(self)))

    def then(self, more: Rows) -> Rows:
        """Return these rows and more."""
        return Rows(*(np.concatenate([getattr(one, field.name) for one in (self, more)]) for field in fields(self)))


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

    def by_block(self) -> Steps:
        """Return the same bytes as steps that end where a block of :data:`BLOCK` pages ends."""
        size = BLOCK * PAGE
        block = self.begin // size
        count = (self.end - 1) // size - block + 1
        if (count == 1).all():
            return self
        of = np.repeat(np.arange(count.size), count)
        low = (np.arange(of.size) + np.repeat(block - (np.cumsum(count) - count), count)) * size
        return Steps(
            self.rows,
            self.row[of],
            self.before[of],
            np.maximum(low, self.begin[of]),
            np.minimum(low + size, self.end[of]),
        )


class Pages:
    """The state of all pages of a trace's models.

    Attributes:
        tensors: one row a tensor with page-cache rows: ``model``, ``tensor_name`` (null: outside tensors).
        experts: one more than the highest expert's number.
        models, names: the words of the columns ``model`` and ``tensor_name``.
        start_ns: what times count from.
    """

    def __init__(self, trace: Trace, phase: str | None = None, order: str | None = None) -> None:
        self._trace = trace
        self.start_ns = trace.first_ns or 0
        self.models, self.names, self._phases = Words(), Words(), Words()
        self._causes, self._actions = Words(*CAUSES), Words("evict", "add")
        self._wanted = phase, order
        self._survey()
        self._stretches = Stretches(self._pages + self._inside.size)
        none = np.zeros(1, np.int64)
        self._rows = Rows(none - 1, none, none, none - 1, none, none)

    def _survey(self) -> None:
        """Find the tensors, number the pages of all files through, and find the parts that begin inside of pages."""
        columns: dict[str, Words | int] = {"model": self.models, "tensor_name": self.names, "shard": -1}
        columns |= {"offset_bytes": 0, "bytes": 0, "expert": -1}
        self.experts = 0
        owners: dict[tuple[int, int], None] = {}
        ends: dict[tuple[int, int], int] = {}
        inside: dict[tuple[int, int], Ints] = {}

        def look(rows: Batch) -> list[tuple[tuple[int, int], int, int, Ints, Ints]]:
            found = []
            model, shard = rows["model"], rows["shard"].astype(np.int64)
            file = model << 16 | (shard & 0xFFFF)
            one = (file == file[:1]).all()
            for number in file[:1].tolist() if one else np.unique(file).tolist():
                mine = slice(None) if one else file == number
                offset = rows["offset_bytes"][mine]
                names = np.flatnonzero(np.bincount(rows["tensor_name"][mine]))
                end = int((offset + rows["bytes"][mine]).max())
                cut = offset[(offset & (PAGE - 1) != 0) & (rows["bytes"][mine] > 0)]
                key = (number >> 16, int(shard[mine][0]))
                found.append((key, end, int(rows["expert"][mine].max()), names, _unique(cut)))
            return found

        for part in batches(self._trace, "pagecache", columns, look):
            for key, end, expert, names, cut in part:
                self.experts = max(self.experts, expert + 1)
                owners |= dict.fromkeys((key[0], name) for name in names.tolist())
                ends[key] = max(ends.get(key, 0), end)
                known = inside.get(key)
                inside[key] = cut if known is None else _unique(np.append(known, cut))
        self._owners = sorted(owners, key=lambda one: tuple(str(word) for word in self._words(one)))
        self.tensors = pl.DataFrame(
            [self._words(one) for one in self._owners],
            schema={"model": pl.String, "tensor_name": pl.String},
            orient="row",
        )
        self._place(ends)
        keys = [inside[file] + (self._base[file] << _SHIFT) for file in ends]
        self._inside = np.sort(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
        counts = np.bincount(self._inside >> _SHIFT, minlength=self._pages + 1)
        self._earlier = np.cumsum(counts) - counts  # parts that begin inside of earlier pages
        self._page = np.repeat(np.arange(self._pages + 1), counts + 1)  # of each slot

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

    def rows(self, look: Callable[[Rows], _Seen]) -> Iterator[_Seen]:
        """Yield what ``look`` makes of the rows of each batch, in order; it runs in other threads."""
        return batches(self._trace, "pagecache", self._columns(), lambda batch: look(self._numbered(batch)))

    def steps(self, look: Callable[[Rows], _Seen]) -> Iterator[tuple[_Seen, Steps]]:
        """Walk through all adds and evictions; the walk can be made once.

        Yields:
            Of each batch, in order of time, what ``look`` makes of its rows in another thread, and its steps, which
            are in no order.
        """

        def prepare(batch: Batch) -> tuple[_Seen, Rows, Ints, Ints]:
            rows = self._numbered(batch)
            return look(rows), *self._slots(rows)

        for seen, rows, low, high in batches(self._trace, "pagecache", self._columns(), prepare):
            yield seen, self._walk(rows, low, high)

    def _columns(self) -> dict[str, Words | int]:
        return {
            "model": self.models,
            "tensor_name": self.names,
            "phase": self._phases,
            "cause": self._causes,
            "action": self._actions,
            **dict.fromkeys(("timestamp", "token", "offset_bytes", "bytes"), 0),
            **dict.fromkeys(("shard", "expert"), -1),
        }

    def _numbered(self, batch: Batch) -> Rows:
        """Return the rows of a batch."""
        phase, order = self._wanted
        flags = [
            16 * (phase in (None, word)) + 32 * (word == "load") + 64 * (order in (None, word))
            for word in self._phases.list
        ]
        mark_flags = np.array(flags or [0], np.int64)[batch["phase"]]
        mark_flags[batch["token"] != 0] &= ~32
        causes = [CAUSES.index(word) if word in CAUSES else len(CAUSES) - 1 for word in self._causes.list]
        mark = batch["timestamp"] - self.start_ns << _CLOCK
        mark += mark_flags
        mark += np.array(causes or [0], np.int64)[batch["cause"]] << 1
        mark += batch["action"] == 1
        begin = batch["offset_bytes"] + (self.first_page(batch["model"], batch["shard"]) << _SHIFT)
        tensor = self.tensor_of(batch["model"], batch["tensor_name"])
        columns = (mark, batch["token"].astype(np.int64), tensor, batch["expert"].astype(np.int64))
        return Rows(*columns, begin, begin + batch["bytes"])

    def _slots(self, rows: Rows) -> tuple[Rows, Ints, Ints]:
        """Return the rows, and the slots that each begins with and ends before."""
        if not (rows.end > rows.begin).all():
            rows = rows.only(rows.end > rows.begin)
        begin = rows.begin
        page, last = begin >> _SHIFT, rows.end - 1 >> _SHIFT
        low = page + self._earlier[page]
        cut = np.flatnonzero(begin & (PAGE - 1))
        low[cut] = page[cut] + np.searchsorted(self._inside, begin[cut]) + 1
        high = np.where(last > page, last + self._earlier[last], low) + 1
        return self._apart(rows, low, high, last - page + 1)

    def _apart(self, rows: Rows, low: Ints, high: Ints, count: Ints) -> tuple[Rows, Ints, Ints]:
        """Take rows apart that have other parts between their pages: what a tensor's rows are not, but might be."""
        wrong = high - low != count
        if not wrong.any():
            return rows, low, high
        count = np.where(wrong, count, 1)
        of = np.repeat(np.arange(count.size), count)
        number = np.arange(of.size) - np.repeat(np.cumsum(count) - count, count)
        wrong = wrong[of]
        low, high, rows = low[of], high[of], rows.only(of)
        page = (rows.begin >> _SHIFT) + number
        low = np.where(wrong & (number > 0), page + self._earlier[page], low)
        high = np.where(wrong, low + 1, high)
        begin = np.where(wrong, np.maximum(rows.begin, page << _SHIFT), rows.begin)
        end = np.where(wrong, np.minimum(rows.end, page + 1 << _SHIFT), rows.end)
        return Rows(rows.mark, rows.token, rows.tensor, rows.expert, begin, end), low, high

    def _walk(self, rows: Rows, low: Ints, high: Ints) -> Steps:
        stretches = self._stretches
        known = np.zeros(self._rows.mark.size, bool)
        known[0] = True
        known[stretches.number] = True
        used = np.flatnonzero(known)
        stretches.number = (np.cumsum(known) - 1)[stretches.number]
        self._rows = self._rows.only(used).then(rows)
        number = np.arange(used.size, used.size + low.size)
        added = (rows.mark & 1).astype(bool)
        moved = list(stretches.put(low, high, number, added, _CHUNK))
        if not moved:
            none = np.zeros(0, np.int64)
            return Steps(self._rows, none, none, none, none)
        low, high, row, past = (
            np.concatenate([getattr(one, name) for one in moved]) for name in ("low", "high", "number", "past")
        )
        sizes = np.cumsum([0, *(one.low.size for one in moved)])
        first, last = (
            np.concatenate([getattr(one, name) + at for one, at in zip(moved, sizes, strict=False)])
            for name in ("begins", "ends")
        )
        begin, end = self._page[low] << _SHIFT, self._page[high] << _SHIFT
        begin[first] = self._rows.begin[row[first]]
        end[last] = self._rows.end[row[last]]
        return Steps(self._rows, row, past, begin, end)

    def resident(self) -> Steps:
        """Return what is in the cache after the walk, as steps that leave now."""
        low, number = self._stretches.low, self._stretches.number
        mark = self._rows.mark[number]
        at = np.flatnonzero((mark >= 0) & (mark & 1 == 1))
        past = number[at]
        rows = self._rows.only(past)
        begin = np.maximum(self._page[low[at]] << _SHIFT, rows.begin)
        end = np.minimum(self._page[low[at + 1] - 1] + 1 << _SHIFT, rows.end)
        now = np.full(at.size, ((self._trace.last_ns or 0) - self.start_ns) << _CLOCK, np.int64)
        leaving = Rows(now, rows.token, rows.tensor, rows.expert, begin, end)
        number = np.arange(at.size)
        return Steps(leaving.then(rows), number, number + at.size, begin, end)


def _unique(values: Ints) -> Ints:
    """Return the different values, sorted; unlike numpy's, which hashes, this is fast."""
    ordered = np.sort(values)
    different: Ints = ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]]
    return different
