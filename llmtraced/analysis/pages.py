"""Follow each page of a model through the page cache: what it had been through when it came in or went out.

A page's state is one number, so memory goes with the model's size and not with the trace's length. A page in which
two tensors (or experts) meet moves once and is several rows, one a part; each part has a state of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.trace import Trace, collect
from llmtraced.schema import CAUSES, PAGE

__all__ = ["BLOCK", "Bools", "Ints", "Marks", "Pages", "Steps"]

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

BLOCK: Final = 16
"""Pages that one fault maps if they are in the cache (64 KiB, aligned): Linux's fault-around."""

_CHUNK: Final = 1 << 16  # pages at a time: the arrays stay in the processor's cache, and few pages move twice
_ROWS: Final = 2_000_000
_FILE: Final = ("model", "shard")
_OWNER: Final = ("model", "tensor_name")


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
    def time(self) -> Ints:
        """When, in ns since the trace's first row."""
        return self.packed >> 6


@dataclass(frozen=True, slots=True)
class Steps:
    """Stretches of pages of one row with the same past, in order of time; all arrays are of the same length.

    ``tensor`` is the row of :attr:`Pages.tensors`, ``page`` the number of the first page over all files, ``nbytes``
    the bytes of the tensor in the pages. ``now`` is the row itself, ``past`` what happened to the pages before, then
    at graph ``past_token``.
    """

    tensor: Ints
    expert: Ints
    page: Ints
    nbytes: Ints
    token: Ints
    now: Marks
    past: Marks
    past_token: Ints

    def only(self, some: Bools) -> Steps:
        """Return those of the steps."""
        columns: list[Any] = [getattr(self, field.name) for field in fields(self)]
        picked: list[Any] = [Marks(one.packed[some]) if isinstance(one, Marks) else one[some] for one in columns]
        return Steps(*picked)


class Pages:
    """The state of all pages of a trace's models.

    Attributes:
        tensors: one row a tensor with page-cache rows: ``model``, ``tensor_name`` (null: outside tensors).
        owners: the same, categorical, with their number as ``tensor``.
        start_ns: what times count from.
    """

    def __init__(self, trace: Trace, phase: str | None = None) -> None:
        self._trace = trace
        self._phase = phase
        self.start_ns = trace.first_ns or 0
        moves = trace.table("pagecache").filter(pl.col("bytes") > 0)
        end = pl.col("offset_bytes") + pl.col("bytes")
        found = collect(moves.group_by(*_FILE, "tensor_name").agg(end=end.max()))
        self.owners = found.select(_OWNER).unique(maintain_order=True).with_row_index("tensor")
        self.tensors = self.owners.select(pl.col(_OWNER).cast(pl.String))
        self._place(found.group_by(_FILE).agg(pl.col("end").max()))
        number = self.number()
        cut = moves.filter(pl.col("offset_bytes") % PAGE != 0).select(
            inside=number * PAGE + pl.col("offset_bytes") % PAGE
        )
        self._inside = collect(cut.unique())["inside"].sort().to_numpy()
        slots = self._pages + self._inside.size
        self._state = np.full(slots, -1, np.int64)
        self._token = np.zeros(slots, np.int64)
        self._again = np.zeros(slots, bool)
        self._owner = np.zeros(slots, np.int32)
        self._expert = np.full(slots, -1, np.int32)
        self._size = np.zeros(slots, np.int32)

    def _place(self, files: pl.DataFrame) -> None:
        """Number the pages of all files through, such that blocks of 16 are those of the address space."""
        faults = self._trace.table("faults").head(1_000_000).filter(pl.col("address") > 0)
        shift = (pl.col("address") - pl.col("offset_bytes")) // PAGE % BLOCK
        mapped = collect(faults.group_by(_FILE).agg(shift=shift.first()))
        self._files, base = [], 0
        placed = files.join(mapped, on=_FILE, how="left", nulls_equal=True)
        for model, shard, end, shift_pages in placed.select(*_FILE, "end", "shift").iter_rows():
            self._files.append((model, shard, base + (shift_pages or 0)))
            base += -(-end // PAGE) + 2 * BLOCK
            base -= base % BLOCK
        self._pages = base

    def number(self) -> pl.Expr:
        """Return the number over all files of the page that a row's ``offset_bytes`` lies in; null: none of them."""
        base: pl.Expr = pl.lit(None, pl.Int64)
        for model, shard, first in self._files:
            here = (pl.col("model").eq_missing(model)) & (pl.col("shard").eq_missing(shard))
            base = pl.when(here).then(pl.lit(first, pl.Int64)).otherwise(base)
        return base + pl.col("offset_bytes") // PAGE

    @property
    def blocks(self) -> int:
        """How many blocks of :data:`BLOCK` pages there are."""
        return self._pages // BLOCK

    def steps(self, blocks: bool = False) -> Iterator[Steps]:
        """Walk through all adds and evictions in order of time; the walk can be made once.

        Args:
            blocks: end the stretches of evictions where a block of :data:`BLOCK` pages ends.
        """
        with ThreadPoolExecutor(1) as ahead:  # reads the next rows while these are walked through
            coming: Future[dict[str, np.ndarray[Any, Any]]] | None = None
            for piece in chain(self._trace.slices("pagecache", rows=_ROWS), [None]):
                rows = coming.result() if coming else None
                coming = None if piece is None else ahead.submit(self._rows, piece)
                if rows is not None:
                    yield from self._chunks(rows, blocks)

    def _chunks(self, rows: dict[str, np.ndarray[Any, Any]], blocks: bool) -> Iterator[Steps]:
        count = rows["count"]
        done = np.cumsum(count)
        cuts = np.searchsorted(done, np.arange(_CHUNK, int(done[-1]) if done.size else 0, _CHUNK)) + 1
        for low, high in zip([0, *cuts], [*cuts, count.size], strict=True):
            if low < high:
                yield self._walk({name: column[low:high] for name, column in rows.items()}, blocks)

    def resident(self) -> Steps:
        """Return what is in the cache after the walk, as stretches of one page each that leave now."""
        slot = np.flatnonzero((self._state & 1 == 1) & (self._state >= 0))
        page = (
            np.where(slot < self._pages, slot, self._inside[np.maximum(slot - self._pages, 0)] // PAGE)
            if self._inside.size
            else slot
        )
        now = np.full(slot.size, ((self._trace.last_ns or 0) - self.start_ns) << 6, np.int64)
        return Steps(
            self._owner[slot].astype(np.int64),
            self._expert[slot].astype(np.int64),
            page,
            self._size[slot].astype(np.int64),
            self._token[slot],
            Marks(now),
            Marks(self._state[slot]),
            self._token[slot],
        )

    def _rows(self, piece: pl.LazyFrame) -> dict[str, np.ndarray[Any, Any]]:
        """Return what is needed of the rows, as arrays: ``count`` pages from ``first``, ``mark`` their state."""
        number, last = self.number(), (pl.col("offset_bytes") + pl.col("bytes") - 1) // PAGE
        cause = pl.col("cause").cast(pl.Enum(CAUSES)).to_physical().cast(pl.Int64).fill_null(len(CAUSES) - 1)
        phase = pl.lit(True) if self._phase is None else (pl.col("phase") == self._phase).fill_null(False)
        loading = ((pl.col("phase") == "load") & (pl.col("token") == 0)).fill_null(False)
        mark = (
            (pl.col("timestamp") - self.start_ns) * 64
            + loading.cast(pl.Int64) * 32
            + phase.cast(pl.Int64) * 16
            + cause * 2
            + (pl.col("action") == "add").cast(pl.Int64)
        )
        frame = collect(
            piece.filter(pl.col("bytes") > 0)
            .join(self.owners.lazy(), on=_OWNER, how="left", nulls_equal=True, maintain_order="left")
            .select(
                pl.col("tensor", "expert", "token").cast(pl.Int64),
                mark=mark,
                first=number,
                count=last - pl.col("offset_bytes") // PAGE + 1,
                skip=pl.col("offset_bytes") % PAGE,
                size="bytes",
            )
        )
        return {name: frame[name].to_numpy() for name in frame.columns}

    def _walk(self, rows: dict[str, np.ndarray[Any, Any]], blocks: bool) -> Steps:
        first, count, mark, skip = rows["first"], rows["count"], rows["mark"], rows["skip"]
        starts = np.cumsum(count) - count
        row = np.repeat(np.arange(count.size), count)
        page = np.arange(row.size)
        page += np.repeat(first - starts, count)
        cut = np.flatnonzero(skip)
        slot = page.copy() if cut.size else page
        slot[starts[cut]] = self._pages + np.searchsorted(self._inside, first[cut] * PAGE + skip[cut])
        token = rows["token"][row]
        past, past_token = self._follow(slot, mark[row], token)

        edge = np.empty(row.size, bool)
        np.not_equal(past[1:], past[:-1], out=edge[1:])
        edge[starts] = True
        if blocks:
            edge |= (page & (BLOCK - 1) == 0) & (mark & 1 == 0)[row]
        at = np.flatnonzero(edge)
        of = row[at]
        begin = np.maximum(page[at] * PAGE, first[of] * PAGE + skip[of])
        last = page[np.append(at[1:], row.size) - 1]
        end = np.minimum((last + 1) * PAGE, first[of] * PAGE + skip[of] + rows["size"][of])
        new = np.flatnonzero(past < 0)
        if new.size:  # a page's first move tells what is in it
            of_new, low = row[new], page[new] * PAGE
            span = first[of_new] * PAGE + skip[of_new]
            self._owner[slot[new]] = rows["tensor"][of_new]
            self._expert[slot[new]] = rows["expert"][of_new]
            self._size[slot[new]] = np.minimum(low + PAGE, span + rows["size"][of_new]) - np.maximum(low, span)
        return Steps(
            rows["tensor"][of],
            rows["expert"][of],
            page[at],
            end - begin,
            rows["token"][of],
            Marks(mark[of]),
            Marks(past[at]),
            past_token[at],
        )

    def _follow(self, slot: Ints, mark: Ints, token: Ints) -> tuple[Ints, Ints]:
        """Return each page's last mark and token before this one, and leave these as the new ones."""
        past, past_token = self._state[slot], self._token[slot]
        self._state[slot] = mark  # of several the last one stays
        self._token[slot] = token
        early = slot[self._state[slot] != mark]
        if early.size:  # pages that move more than once here: all but their first move have their past here
            self._again[early] = True
            some = np.flatnonzero(self._again[slot])
            self._again[early] = False
            some = some[np.argsort(slot[some], kind="stable")]
            same = slot[some[1:]] == slot[some[:-1]]
            later, before = some[1:][same], some[:-1][same]
            past[later], past_token[later] = mark[before], token[before]
        return past, past_token
