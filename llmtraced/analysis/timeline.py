"""In which order is the file read: where in it over time, and how sequentially.

The order is that of page-cache adds in each model file, whoever causes them: the pagecache table does not know
threads, and the file's readahead state is shared between them, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.axes import Files, Ints, pieces, sizes, time_bins, tokens_at
from llmtraced.analysis.columns import ahead
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.schema import PAGE, PHASES

__all__ = ["CLASSES", "COLUMNS", "RESUMED", "SMALL_GAP", "timeline"]

CLASSES: Final = ("sequential", "small_gap", "large_gap", "backward")
"""What an add is to the add before it in the same file."""

SMALL_GAP: Final = 1 << 20
"""Bytes that may be skipped in a ``small_gap``, unless told otherwise."""

COLUMNS: Final = 3
"""Columns of the map to a bin of time."""

RESUMED: Final = 4
"""An add that goes on where one of so many stretches before the last ended has only been interrupted by them."""

_WEIGHTS: Final = ("bytes", "count")


def timeline(
    trace: Trace, phase: str | None = None, bins: int = 200, small_gap_limit_bytes: int = SMALL_GAP, rows: int = 200
) -> dict[str, Any]:
    """Return how sequentially the model was read, by phase and over time, and what was read when (``map``).

    With gap = offset - (offset + bytes of the add before in the same file), an add is ``sequential`` when
    0 ≤ gap < one page, ``small_gap`` up to ``small_gap_limit_bytes``, ``large_gap`` beyond, ``backward`` below 0. The
    first add of a file is compared with the file's beginning.

    Args:
        trace: the trace.
        phase: only adds of this phase; what came before them is looked for in all phases.
        bins: bins of time at most; the map has :data:`COLUMNS` columns to a bin.
        small_gap_limit_bytes: the largest small gap.
        rows: bins of file offsets in the map, about.
    """
    spans = collect(
        trace.table("pagecache", phase)
        .filter(pl.col("action") == "add")
        .group_by("model", "shard")
        .agg(
            first=pl.col("timestamp").min(),
            last=pl.col("timestamp").max(),
            end=(pl.col("offset_bytes") + pl.col("bytes")).max(),
        )
    ).with_columns(pl.col("model").cast(pl.String))
    files = Files.of(sizes(trace, spans), rows)
    start, width, columns = time_bins(spans, bins * COLUMNS)
    chart = _Map(files, columns)
    reader = _Reader(small_gap_limit_bytes, len(files.files))
    times = -(-columns // COLUMNS)
    by_bin = np.zeros((len(_WEIGHTS), times, len(CLASSES)), np.int64)
    by_phase = np.zeros((len(_WEIGHTS), len(PHASES), len(CLASSES)), np.int64)
    resumed = np.zeros((len(_WEIGHTS), len(PHASES)), np.int64)
    seen: dict[str, list[int]] = {}
    for adds in ahead(_adds(trace, files)):
        kind, again = reader.classify(adds)
        keep = np.ones(len(kind), bool) if phase is None else adds["phase"] == PHASES.index(phase)
        adds, kind, again = {name: column[keep] for name, column in adds.items()}, kind[keep], again[keep]
        column = (adds["timestamp"] - start) // width
        chart.add(adds, column)
        for i, weights in enumerate((adds["bytes"], None)):
            by_bin[i] += _sums(column // COLUMNS * len(CLASSES) + kind, weights, by_bin[i].shape)
            by_phase[i] += _sums(adds["phase"] * len(CLASSES) + kind, weights, by_phase[i].shape)
            of = None if weights is None else weights[again]
            resumed[i] += _sums(adds["phase"][again], of, resumed[i].shape)
        for number in np.unique(adds["phase"]).tolist():
            times_of = adds["timestamp"][adds["phase"] == number]
            first, last = int(times_of.min()), int(times_of.max())
            known = seen.setdefault(PHASES[number], [first, last])
            known[:] = min(known[0], first), max(known[1], last)
    begins = start + np.arange(times) * width * COLUMNS
    tokens, phases = tokens_at(trace, begins)
    every = [min((s[0] for s in seen.values()), default=None), max((s[1] for s in seen.values()), default=None)]
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "small_gap_limit_bytes": small_gap_limit_bytes,
        "total": _shares(by_phase.sum(axis=1), resumed.sum(axis=1), every),
        "phases": [
            {"phase": name, **_shares(by_phase[:, i], resumed[:, i], seen[name])}
            for i, name in enumerate(PHASES)
            if name in seen
        ],
        "bins": [
            {
                "first_ns": begin,
                "last_ns": begin + width * COLUMNS - 1,
                "token": token,
                "phase": name,
                **{f"{c}_{w}": int(by_bin[i, at, j]) for i, w in enumerate(_WEIGHTS) for j, c in enumerate(CLASSES)},
            }
            for at, (begin, token, name) in enumerate(zip(begins.tolist(), tokens, phases, strict=True))
        ],
        "map": {
            "first_ns": start,
            "column_ns": width,
            "columns": columns,
            "rows": files.bins(trace.tensors),
            "cells": chart.cells(),
        },
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


class _Reader:
    """Compares adds with those before them, over slices; times rise."""

    def __init__(self, limit: int, files: int) -> None:
        self.limit = limit
        self.last = [(0, 0)] * files  # end and token of the add before
        none = np.full(RESUMED, -PAGE)  # no add goes on there
        self.stretches: dict[int, tuple[Ints, Ints]] = defaultdict(lambda: (none, none))

    def classify(self, adds: dict[str, Ints]) -> tuple[Ints, Ints]:
        """Return each add's number in :data:`CLASSES`, and whether it is not sequential, but resumes a stretch."""
        kind = np.zeros(len(adds["file"]), np.int64)
        again = np.zeros(len(kind), bool)
        for file in np.unique(adds["file"]).tolist():
            mine = np.flatnonzero(adds["file"] == file)
            offset, token = adds["offset_bytes"][mine], adds["token"][mine]
            ends = np.concatenate([[self.last[file][0]], offset + adds["bytes"][mine]])
            tokens = np.concatenate([[self.last[file][1]], token])
            gap = offset - ends[:-1]
            kind[mine] = np.select([gap < 0, gap < PAGE, gap <= self.limit], [3, 0, 1], 2)
            jumps = np.flatnonzero(kind[mine])
            again[mine[jumps]] = self._resumes(file, offset[jumps], token[jumps], ends[jumps], tokens[jumps])
            self.last[file] = int(ends[-1]), int(tokens[-1])
        return kind, again

    def _resumes(self, file: int, offset: Ints, token: Ints, ended: Ints, left: Ints) -> Ints:
        """Tell of each jump whether it goes on where an earlier stretch ended in the same token.

        ``ended`` and ``left`` are where and in which token the stretch before each jump ended.
        """
        before = self.stretches[file]
        ended, left = np.concatenate([before[0], ended]), np.concatenate([before[1], left])
        found = np.zeros(len(offset), bool)
        for back in range(1, RESUMED + 1):
            at = np.arange(RESUMED, len(ended)) - back
            gap = offset - ended[at]
            found |= (gap >= 0) & (gap < PAGE) & (left[at] == token)
        self.stretches[file] = ended[-RESUMED:], left[-RESUMED:]
        return found


class _Map:
    """Bytes and the last token by file offset and time."""

    def __init__(self, files: Files, columns: int) -> None:
        self.files, self.columns = files, columns
        self.bases = np.array([base for _, _, base, _ in files.files] or [0])
        self.bytes = np.zeros(files.count * columns, np.int64)
        self.token = np.zeros(files.count * columns, np.int64)

    def add(self, adds: dict[str, Ints], column: Ints) -> None:
        """Add what was read."""
        base = self.bases[adds["file"]]
        for index, at, part in pieces(adds["offset_bytes"], adds["bytes"], self.files.width):
            cell = (base[index] + at) * self.columns + column[index]
            self.bytes += _sums(cell, part, self.bytes.shape)
            np.maximum.at(self.token, cell, adds["token"][index])

    def cells(self) -> dict[str, list[int]]:
        """Return the cells that are not empty, by row and column."""
        full = np.flatnonzero(self.bytes)
        return {
            "row": (full // max(self.columns, 1)).tolist(),
            "column": (full % max(self.columns, 1)).tolist(),
            "bytes": self.bytes[full].tolist(),
            "token": self.token[full].tolist(),
        }


def _adds(trace: Trace, files: Files) -> Iterator[dict[str, Ints]]:
    """Yield the adds of model files in order of time: ``file, phase`` (numbers), ``timestamp, token, …``."""
    phase: pl.Expr = pl.lit(PHASES.index("unknown"), pl.Int8)
    for i, name in enumerate(PHASES):
        phase = pl.when(pl.col("phase") == name).then(pl.lit(i, pl.Int8)).otherwise(phase)
    for piece in trace.slices("pagecache", rows=4_000_000):
        adds = collect(
            piece.filter(pl.col("action") == "add")
            .select(files.number(), phase.alias("phase"), "timestamp", "token", "offset_bytes", "bytes")
            .filter(pl.col("file").is_not_null())
        )
        if not adds["timestamp"].is_sorted():
            adds = adds.sort("timestamp", maintain_order=True)  # pieces of one run have one time: keep their order
        yield {name: adds[name].to_numpy() for name in adds.columns}


def _sums(at: Ints, weights: Ints | None, shape: Sequence[int]) -> Ints:
    """Return sums (None: counts) by place; exact: a slice holds less than 2^53 bytes."""
    return np.bincount(at, weights, minlength=int(np.prod(shape))).astype(np.int64).reshape(shape)


def _shares(sums: Ints, resumed: Ints, seen: Sequence[int | None]) -> dict[str, Any]:
    """Return one phase's figures: sums and shares by class; the mean stretch between two jumps."""
    total, count = (int(n) for n in sums.sum(axis=1))
    jumps = count - int(sums[1, 0])
    found: dict[str, Any] = {"first_ns": seen[0], "last_ns": seen[1], "bytes": total, "count": count}
    for i, name in enumerate(CLASSES):
        b, n = int(sums[0, i]), int(sums[1, i])
        found |= {
            f"{name}_bytes": b,
            f"{name}_count": n,
            f"{name}_byte_share": b / total if total else None,
            f"{name}_count_share": n / count if count else None,
        }
    return found | {
        "resumed_bytes": int(resumed[0]),
        "resumed_count": int(resumed[1]),
        "jumps": jumps,
        "stretch_bytes": total / max(jumps, 1) if count else None,
    }
