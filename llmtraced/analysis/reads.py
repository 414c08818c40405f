"""What was read, evicted and faulted, summed by tensor and expert, and how much of what was read was different bytes.

The pages of a piece (an expert's part of a tensor, or all of it) are read again and again in ranges that seldom are
the same. Once all of a piece is known to have been read, a range of it adds nothing to the union: so few are kept.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Batch, Ints, Numbers, Words, batches, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.pages import Pages, Rows
from llmtraced.analysis.trace import Trace

__all__ = ["Reads", "faults", "union"]

_KEPT: Final = 1 << 17  # ranges that wait to be joined
_EXPERT: Final = 32  # bits of a piece's number that say which expert, + 1; those above are the tensor
_MASK: Final = (1 << _EXPERT) - 1

_SUMS: Final = ("bytes_read", "read_count", "ordered_bytes", "evicted_bytes", "evict_count")


class Reads:
    """The sums over the rows of the page cache that are in the phase asked for, by *piece*: tensor and expert.

    Args:
        pages: knows the tensors and which phases are asked for.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._sums = np.zeros((0, 0, len(_SUMS)), np.int64)  # of tensor, and expert + 1
        self._runs = np.zeros((3, 0), np.int64)
        self._new: list[Ints] = []
        self._whole = np.zeros((0, 0, 2), np.int64)  # of each piece the longest range of bytes that was read

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        pieces = self._pages.count, int(rows.expert.max(initial=-1)) + 2
        self._sums, self._whole = grown(self._sums, (*pieces, len(_SUMS))), grown(self._whole, (*pieces, 2))
        fresh = _sum(rows.mark, rows.tensor, rows.expert, rows.begin, rows.end, self._whole, self._sums)
        self._new.append(fresh)
        if sum(one.shape[1] for one in self._new) > _KEPT:
            self._join()

    def _join(self) -> None:
        self._runs = union(np.concatenate([self._runs, *self._new], axis=1))
        self._new = []
        piece, begin, end = self._runs
        order = np.argsort(end - begin, kind="stable")  # of several the longest stays
        self._whole[piece[order] >> _EXPERT, piece[order] & _MASK] = np.stack([begin[order], end[order]], axis=1)

    def by_expert(self) -> pl.DataFrame:
        """Return the sums and ``unique_bytes`` read, one row a model, tensor_name and expert that came or went."""
        self._join()
        piece, begin, end = self._runs
        order = np.argsort(begin, kind="stable")
        order = order[np.argsort(piece[order] >> _EXPERT, kind="stable")]  # by tensor, and then by place
        piece, begin, end = piece[order], begin[order], end[order]
        reached = _reached(piece >> _EXPERT, end)
        unique = np.zeros(self._sums.shape[:2], np.int64)
        np.add.at(unique, (piece >> _EXPERT, piece & _MASK), np.maximum(end - np.maximum(begin, reached), 0))
        tensor, expert = np.nonzero(self._sums[..., 1] + self._sums[..., 4])
        frame = pl.DataFrame(
            {
                "expert": (expert - 1).astype(np.int32),
                **dict(zip(_SUMS, self._sums[tensor, expert].T, strict=True)),
                "unique_bytes": unique[tensor, expert],
            }
        )
        return self._pages.tensors.drop("moved")[tensor].hstack(frame)


@compiled
def _sum(mark: Ints, tensor: Numbers, expert: Numbers, begin: Ints, end: Ints, whole: Ints, sums: Ints) -> Ints:
    """Add rows to the sums of their pieces; return the ranges that may be new: piece, begin and end."""
    fresh = np.empty((3, mark.size), np.int64)
    count = 0
    for i in range(mark.size):
        what = mark[i]
        if not what & 16:
            continue
        of, part = tensor[i], max(expert[i], -1) + 1
        first, after = begin[i], end[i]
        if what & 1:
            sums[of, part, 0] += after - first
            sums[of, part, 1] += 1
            if what & 64:
                sums[of, part, 2] += after - first
            if after > first and (first < whole[of, part, 0] or after > whole[of, part, 1]):
                fresh[0, count], fresh[1, count], fresh[2, count] = of << _EXPERT | part, first, after
                count += 1
        else:
            sums[of, part, 3] += after - first
            sums[of, part, 4] += 1
    return fresh[:, :count].copy()


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

    def wanted(rows: Batch) -> Batch:
        if phase is None:
            return rows
        some = np.array([word == phase for word in (*phases.list, None)])[rows["phase"]]
        return {name: column[some] for name, column in rows.items()}

    sums = np.zeros((0, 0, 0, 4), np.int64)  # of model, name, expert + 1: end not seen, minor, major; ns
    for rows in batches(trace, "faults", columns, wanted, threads=2):
        experts = max(int(rows["expert"].max(initial=-1)) + 2, sums.shape[2])
        sums = grown(sums, (len(models.list), len(names.list), experts, 4))
        _count(rows["model"], rows["tensor_name"], rows["expert"], rows["major"], rows["latency_ns"], sums)
    model, name, expert = np.nonzero(sums[..., :3].any(axis=3))
    unknown, minor, major, stall = sums[model, name, expert].T
    return pl.DataFrame(
        {
            "model": [models.list[number] for number in model.tolist()],
            "tensor_name": [names.list[number] for number in name.tolist()],
            "expert": expert - 1,
            "access_count": unknown + minor + major,
            "major_faults": major,
            "minor_faults": minor,
            "stall_ns": stall,
        },
        schema=_FAULTS,
    )


@compiled
def _count(model: Numbers, name: Numbers, expert: Numbers, major: Ints, latency: Ints, sums: Ints) -> None:
    for i in range(model.size):
        of = sums[model[i], name[i], max(expert[i], -1) + 1]
        of[major[i] + 1] += 1
        of[3] += latency[i]


_FAULTS: Final = {
    "model": pl.String,
    "tensor_name": pl.String,
    "expert": pl.Int32,
    **dict.fromkeys(("access_count", "major_faults", "minor_faults", "stall_ns"), pl.Int64),
}
