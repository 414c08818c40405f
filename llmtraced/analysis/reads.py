"""What was read, evicted and faulted, summed by tensor and expert, and how much of what was read was different bytes.

The pages of a piece (an expert's part of a tensor, or all of it) are read again and again in ranges that seldom are
the same. Once all of a piece is known to have been read, a range of it adds nothing to the union: so few are kept.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Ints, Words, batches
from llmtraced.analysis.pages import Pages, Rows
from llmtraced.analysis.trace import Trace

__all__ = ["Reads", "Tallied", "faults", "union"]

_KEPT: Final = 1 << 17  # ranges that wait to be joined

Tallied = tuple[Ints, Ints]
"""Sums of one batch, and the ranges in it that may be new: their piece, begin and end."""

_SUMS: Final = ("bytes_read", "read_count", "ordered_bytes", "evicted_bytes", "evict_count")


class Reads:
    """The sums over the rows of the page cache that are in the phase asked for, by *piece*: tensor and expert.

    Args:
        pages: knows the tensors and which phases are asked for.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._each = pages.experts + 1  # of each tensor: those without an expert, then the experts
        self._count = pages.tensors.height * self._each
        self._sums = np.zeros((len(_SUMS), self._count), np.int64)
        self._runs = np.zeros((3, 0), np.int64)
        self._new: list[Ints] = []
        none = np.zeros(self._count, np.int64)
        self._whole = none, none  # of each piece the longest range of bytes that was read

    def look(self, rows: Rows) -> Tallied:
        """Sum up a batch; may run in several threads."""
        low, high = self._whole
        counted = rows.mark & 16 != 0
        some = np.flatnonzero(counted & (rows.mark & 1 != 0))
        gone = np.flatnonzero(counted & (rows.mark & 1 == 0))
        piece = rows.tensor * self._each + np.maximum(rows.expert, -1) + 1
        size = rows.end - rows.begin
        came, nbytes = piece[some], size[some]
        ordered = nbytes * (rows.mark[some] >> 6 & 1)
        sums = (
            self._sum(came, nbytes),
            np.bincount(came, minlength=self._count),
            self._sum(came, ordered),
            self._sum(piece[gone], size[gone]),
            np.bincount(piece[gone], minlength=self._count),
        )
        begin, end = rows.begin[some], rows.end[some]
        fresh = np.flatnonzero(((begin < low[came]) | (end > high[came])) & (nbytes > 0))
        return np.stack(sums), np.stack([came[fresh], begin[fresh], end[fresh]])

    def _sum(self, piece: Ints, nbytes: Ints) -> Ints:
        return np.bincount(piece, nbytes, self._count).astype(np.int64)  # exact: a batch has less than 2^53 bytes

    def add(self, tallied: Tallied) -> None:
        """Take in what :meth:`look` found."""
        sums, fresh = tallied
        self._sums += sums
        self._new.append(fresh)
        if sum(one.shape[1] for one in self._new) > _KEPT:
            self._join()

    def _join(self) -> None:
        self._runs = union(np.concatenate([self._runs, *self._new], axis=1))
        self._new = []
        piece, begin, end = self._runs
        order = np.argsort(end - begin, kind="stable")  # of several the longest stays
        low, high = np.zeros(self._count, np.int64), np.zeros(self._count, np.int64)
        low[piece[order]], high[piece[order]] = begin[order], end[order]
        self._whole = low, high

    def by_expert(self) -> pl.DataFrame:
        """Return the sums and ``unique_bytes`` read, one row a model, tensor_name and expert that came or went."""
        self._join()
        piece, begin, end = self._runs
        order = np.argsort(begin, kind="stable")
        order = order[np.argsort(piece[order] // self._each, kind="stable")]  # by tensor, and then by place
        piece, begin, end = piece[order], begin[order], end[order]
        reached = _reached(piece // self._each, end)
        unique = np.zeros(self._count, np.int64)
        np.add.at(unique, piece, np.maximum(end - np.maximum(begin, reached), 0))
        number = np.flatnonzero(self._sums[1] + self._sums[4])
        frame = pl.DataFrame(
            {
                "expert": (number % self._each - 1).astype(np.int32),
                **dict(zip(_SUMS, self._sums[:, number], strict=True)),
                "unique_bytes": unique[number],
            }
        )
        return self._pages.tensors[number // self._each].hstack(frame)


def union(ranges: Ints) -> Ints:
    """Join ranges that overlap or touch: piece, begin and end (3 by any number), sorted by piece and begin."""
    piece, begin, end = ranges[:, np.lexsort((ranges[1], ranges[0]))]
    reached = _reached(piece, end)
    starts = np.flatnonzero(begin > reached)
    if not starts.size:
        return np.zeros((3, 0), np.int64)
    return np.stack([piece[starts], begin[starts], np.maximum.reduceat(end, starts)])


def _reached(group: Ints, end: Ints) -> Ints:
    """Return of each range the farthest end of those before it in its group, -1 for the first; groups are sorted."""
    if not group.size:
        return end
    span = int(end.max()) + 2
    number = np.cumsum(np.append(False, group[1:] != group[:-1]))
    farthest = np.maximum.accumulate(number * span + end + 1)
    before: Ints = np.append(0, farthest[:-1]) - number * span - 1
    return before.clip(-1)


def faults(trace: Trace, phase: str | None = None) -> pl.DataFrame:
    """Return page faults by model, tensor_name and expert: access_count, major_faults, minor_faults, stall_ns."""
    models, names, phases = Words(), Words(), Words()
    columns: dict[str, Words | int] = {
        "model": models,
        "tensor_name": names,
        "expert": -1,
        "major": -1,
        "latency_ns": 0,
    }
    if phase is not None:
        columns["phase"] = phases

    def count(rows: Batch) -> list[tuple[int, int, Ints]]:
        if phase is not None:
            wanted = np.array([word == phase for word in (*phases.list, None)])[rows["phase"]]
            rows = {name: column[wanted] for name, column in rows.items()}
        found = []
        for model in np.flatnonzero(np.bincount(rows["model"])).tolist():
            mine = rows["model"] == model
            some = rows if mine.all() else {name: column[mine] for name, column in rows.items()}
            each = max(int(some["expert"].max()), -1) + 2
            key = some["tensor_name"] * each
            key += np.maximum(some["expert"], -1)
            key += 1
            place = key * 3
            place += some["major"]
            place += 1
            outcome = np.bincount(place)
            outcome = np.append(outcome, np.zeros(-outcome.size % 3, np.int64)).reshape(-1, 3)
            stall = np.bincount(key, some["latency_ns"], outcome.shape[0]).astype(np.int64)
            found.append((model, each, np.column_stack([outcome, stall])))
        return found

    sums: dict[tuple[int, int], Ints] = {}
    for part in batches(trace, "faults", columns, count):
        for model, each, more in part:
            known = sums.get((model, each))
            if known is not None:
                more, known = (more, known) if len(more) >= len(known) else (known, more)
                more[: len(known)] += known
            sums[model, each] = more
    frames = [pl.DataFrame(schema=_FAULTS)]
    for (model, each), rows in sums.items():
        at = np.flatnonzero(rows[:, :3].any(axis=1))
        unknown, minor, major, stall = rows[at].T
        data: dict[str, Any] = {
            "model": [models.list[model]] * at.size,
            "tensor_name": [names.list[name] for name in (at // each).tolist()],
            "expert": at % each - 1,
            "access_count": unknown + minor + major,
            "major_faults": major,
            "minor_faults": minor,
            "stall_ns": stall,
        }
        frames.append(pl.DataFrame(data, schema=_FAULTS))
    return pl.concat(frames)


_FAULTS: Final = {
    "model": pl.String,
    "tensor_name": pl.String,
    "expert": pl.Int32,
    **dict.fromkeys(("access_count", "major_faults", "minor_faults", "stall_ns"), pl.Int64),
}
