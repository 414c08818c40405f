"""The axes of pictures: model files laid end to end and cut into bins, and time cut into bins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llmtraced.analysis.trace import Trace, collect
from llmtraced.schema import PAGE

__all__ = ["Files", "Ints", "pieces", "sizes", "time_bins", "tokens_at"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """The model files laid end to end and cut into stretches (bins) of ``width`` bytes.

    Attributes:
        width: bytes in a bin, a multiple of the page size; the same in every file.
        files: ``(model, shard, first bin, number of bins)``, by model and shard; a bin lies in one file.
    """

    width: int
    files: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, sizes: Mapping[tuple[str, int], int], rows: int) -> Files:
        """Cut files of these sizes, by (model, shard), into about ``rows`` bins, at least one a file."""
        width = max(-(-sum(sizes.values()) // (rows * PAGE)), 1) * PAGE
        files, at = [], 0
        for (model, shard), size in sorted(sizes.items()):
            count = max(-(-size // width), 1)
            files.append((model, shard, at, count))
            at += count
        return cls(width, tuple(files))

    @property
    def count(self) -> int:
        """The number of bins."""
        return sum(count for *_, count in self.files)

    def number(self) -> pl.Expr:
        """Return the number of a row's file in ``files``, int16; null: in none."""
        number: pl.Expr = pl.lit(None, pl.Int16)
        for i, (model, shard, *_) in enumerate(self.files):
            here = (pl.col("model") == model) & (pl.col("shard") == shard)
            number = pl.when(here).then(pl.lit(i, pl.Int16)).otherwise(number)
        return number.alias("file")

    def bins(self, tensors: pl.DataFrame) -> list[dict[str, Any]]:
        """Return each bin: ``model, shard, offset_bytes, size_bytes``, and the tensor and layer at its beginning."""
        found = []
        for model, shard, _, count in self.files:
            inside = tensors.filter((pl.col("model") == model) & (pl.col("shard") == shard)).sort("offset_bytes")
            starts = inside["offset_bytes"].to_numpy()
            ends = starts + inside["size_bytes"].to_numpy()
            at = np.arange(count) * self.width
            near = np.searchsorted(starts, at, side="right") - 1
            for offset, i in zip(at.tolist(), near.tolist(), strict=True):
                hit = i >= 0 and offset < ends[i]
                found.append(
                    {
                        "model": model,
                        "shard": shard,
                        "offset_bytes": offset,
                        "size_bytes": self.width,
                        "tensor_name": inside["tensor_name"][i] if hit else None,
                        "layer": inside["layer"][i] if hit else None,
                    }
                )
        return found


def pieces(offset: Ints, size: Ints, width: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Cut ranges at multiples of ``width``: yield (which ranges, number of the bin, bytes in it) until all is cut."""
    which = np.arange(len(offset))
    while len(which):
        at = offset // width
        part = np.minimum(size, (at + 1) * width - offset)
        yield which, at, part
        more = size > part
        which, offset, size = which[more], offset[more] + part[more], size[more] - part[more]


def tokens_at(trace: Trace, when: Ints) -> tuple[list[int], list[str | None]]:
    """Return the number and phase of the token at each time, ns: the last that began by then; 0 before the first."""
    rows = collect(trace.table("tokens").select("token", "start_ns", pl.col("phase").cast(pl.String))).sort("start_ns")
    at = np.searchsorted(rows["start_ns"].to_numpy(), when, side="right") - 1
    numbers, phases = rows["token"].to_list(), rows["phase"].to_list()
    return [numbers[i] if i >= 0 else 0 for i in at], [phases[i] if i >= 0 else None for i in at]


def sizes(trace: Trace, spans: pl.DataFrame) -> dict[tuple[str, int], int]:
    """Return the size of each model file, by (model, shard): the end of its last tensor or row, ``spans``' ``end``."""
    ends = trace.tensors.select("model", "shard", end=pl.col("offset_bytes") + pl.col("size_bytes"))
    both = pl.concat([ends, spans.select("model", "shard", "end")]).drop_nulls()
    return {(m, s): end for m, s, end in both.group_by("model", "shard").agg(pl.col("end").max()).iter_rows()}


def time_bins(spans: pl.DataFrame, bins: int) -> tuple[int, int, int]:
    """Cut the time from the ``first`` to the ``last`` of ``spans``: return its start, ns in a bin, number of bins."""
    first, last = spans["first"].min(), spans["last"].max()
    if not isinstance(first, int) or not isinstance(last, int):
        return 0, 1, 0
    width = -(-(last - first + 1) // bins)
    return first, width, (last - first) // width + 1
