"""How often was the model read: bytes read, bytes read again, per tensor.

The truth is what entered the page cache (rows of ``pagecache`` with action ``add``), not page faults: with a large
readahead a dozen major faults hide a gigabyte of reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypedDict, cast

import polars as pl

from llmtraced.analysis.columns import ahead
from llmtraced.analysis.moved import Moved
from llmtraced.analysis.pages import Pages, Rows
from llmtraced.analysis.reads import Reads, faults
from llmtraced.analysis.spread import Spread
from llmtraced.analysis.trace import Trace, collect, verdict

__all__ = ["Reread", "TensorReads", "reread"]

_TENSOR: Final = ("model", "tensor_name")
_READS: Final = ("bytes_read", "unique_bytes", "reread_bytes")
_COUNTS: Final = (
    "bytes_read",
    "unique_bytes",
    "reread_bytes",
    "read_count",
    "evicted_bytes",
    "access_count",
    "major_faults",
    "minor_faults",
    "stall_ns",
)


class TensorReads(TypedDict):
    """One tensor; all counts are of the phase asked for.

    ``size_bytes``, ``layer``, ``component`` and ``backed`` come from the tensor map and are None for a name that the
    map does not hold. ``backed`` is False for weights that the server copied out of the file: never read, but used.
    """

    model: str | None
    tensor_name: str
    layer: int | None
    component: str | None
    size_bytes: int | None
    backed: bool | None
    bytes_read: int  # sum of all its adds
    unique_bytes: int  # size of the union of its added ranges
    reread_bytes: int  # bytes_read - unique_bytes
    read_count: int  # add rows: pieces that came in
    evicted_bytes: int
    access_count: int  # fault rows + op rows
    major_faults: int
    minor_faults: int
    stall_ns: int  # sum of its faults' latencies over all threads
    returned_bytes: int  # came in after their eviction had been seen
    away_ns: dict[str, int] | None  # from that eviction to the add, by bytes: min, p50, p90; None: nothing returned
    away_tokens: dict[str, int] | None


class Reread(TypedDict):
    """The report; every total is the sum over ``tensors`` plus the ``other_`` figure beside it."""

    session: str
    models: list[str]
    phase: str | None
    total_bytes_read: int
    unique_bytes: int
    reread_bytes: int
    amplification: float | None  # total / unique; None when nothing was read
    other_bytes_read: int  # header and padding
    other_reread_bytes: int
    returned_bytes: int
    away_ns: dict[str, int] | None
    away_tokens: dict[str, int] | None
    tensors: list[TensorReads]  # most bytes read first
    layers: list[dict[str, Any]]  # model, layer, size_bytes, bytes_read, unique_bytes, reread_bytes, amplification
    components: list[dict[str, Any]]  # the same by component
    experts: list[dict[str, Any]]  # the same by layer and expert, over the merged tensors
    account: dict[str, dict[str, int]]
    verdict: str
    notes: list[str]


def reread(trace: Trace, phase: str | None = None, follow: bool = True, moved: Moved | None = None) -> Reread:
    """Return how much of each tensor was read, and read again, in ``phase`` (default: all of the trace).

    What is unique is unique within the phase: a byte read once while loading and once while decoding is a re-read in
    the whole trace, and not in either phase.

    Args:
        trace: an open trace.
        phase: one of :data:`llmtraced.schema.PHASES`.
        follow: follow every page from its eviction to its return. That is most of the work; without it
            ``returned_bytes``, ``away_ns`` and ``away_tokens`` are 0 and None.
        moved: takes in the rows, too, so that they are read once; its pages are used, which are of this phase.
    """
    pages = Pages(trace, phase) if moved is None else moved.pages
    reads = Reads(pages)
    take = (reads.add,) if moved is None else (reads.add, moved.add)
    with ThreadPoolExecutor(1) as pool:
        touching = pool.submit(_touches, trace, phase)
        away, returned = _away(pages, take, follow)
        touches = touching.result()
    pieces = reads.by_expert().with_columns(reread_bytes=pl.col("bytes_read") - pl.col("unique_bytes"))
    counts = _counts(pieces, touches)
    named, other = counts.filter(pl.col("tensor_name").is_not_null()), counts.filter(pl.col("tensor_name").is_null())
    tensors = (
        trace.tensors.lazy()
        .select(*_TENSOR, "layer", "component", "size_bytes", "backed", order=pl.int_range(pl.len()))
        .join(named.lazy(), on=_TENSOR, how="full", coalesce=True, nulls_equal=True)
        .with_columns(pl.col(_COUNTS).fill_null(0))
        .join(returned.lazy(), on=_TENSOR, how="left", nulls_equal=True)
        .with_columns(pl.col("returned_bytes").fill_null(0))
        .sort("bytes_read", "stall_ns", "order", descending=[True, True, False], nulls_last=True)
        .drop("order")
        .collect()
    )
    total, unique = int(counts["bytes_read"].sum()), int(counts["unique_bytes"].sum())
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "total_bytes_read": total,
        "unique_bytes": unique,
        "reread_bytes": total - unique,
        "amplification": total / unique if unique else None,
        "other_bytes_read": int(other["bytes_read"].sum()),
        "other_reread_bytes": int(other["reread_bytes"].sum()),
        "returned_bytes": away["returned_bytes"],
        "away_ns": away["away_ns"],
        "away_tokens": away["away_tokens"],
        "tensors": cast("list[TensorReads]", tensors.to_dicts()),
        "layers": _grouped(tensors, "layer"),
        "components": _grouped(tensors, "component"),
        "experts": _grouped(_experts(trace, pieces), "layer", "expert"),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def _away(pages: Pages, take: Sequence[Callable[[Rows], None]], follow: bool) -> tuple[dict[str, Any], pl.DataFrame]:
    """Give each batch to all of ``take``; return how much was read again after its eviction, and how long after.

    Of all, and one row a tensor.
    """
    times, tokens = Spread(pages.count), Spread(pages.count)
    if follow:
        for batch, steps in ahead(pages.steps()):
            for add in take:
                add(batch)
            tensor, time, later, nbytes = steps.returned()
            for spread in (times, tokens):
                spread.fit(pages.count)
            times.add(tensor, time, nbytes)
            tokens.add(tensor, later, nbytes)
    else:
        for batch in pages.rows():
            for add in take:
                add(batch)
    tensors = pages.tensors.drop("moved")
    for spread in (times, tokens):
        spread.fit(tensors.height)
    rows = [
        {"returned_bytes": times.total(at), "away_ns": times.points(at), "away_tokens": tokens.points(at)}
        for at in (None, *range(tensors.height))
    ]
    point = pl.Struct(dict.fromkeys(("min", "p50", "p90"), pl.Int64))
    schema: dict[str, Any] = {"returned_bytes": pl.Int64, "away_ns": point, "away_tokens": point}
    return rows[0], tensors.hstack(pl.DataFrame(rows[1:], schema=schema))


def _experts(trace: Trace, pieces: pl.DataFrame) -> pl.DataFrame:
    """Return one row a merged tensor and expert, of all experts that the map knows."""
    sized = trace.tensors.filter(pl.col("n_experts") > 0).select(
        *_TENSOR, "layer", size_bytes="expert_bytes", expert=pl.int_ranges("n_experts", dtype=pl.Int32)
    )
    read = pieces.select(*_TENSOR, "expert", *_READS)
    found = sized.explode("expert").join(read, on=[*_TENSOR, "expert"], how="left", nulls_equal=True)
    return found.with_columns(pl.col(_READS).fill_null(0))


def _grouped(tensors: pl.DataFrame, *keys: str) -> list[dict[str, Any]]:
    """Return sums over the tensors (or their experts) by model and ``keys``, in that order."""
    unique = pl.col("unique_bytes")
    return (
        tensors.group_by("model", *keys)
        .agg(pl.col("size_bytes", *_READS).sum())
        .with_columns(amplification=pl.when(unique > 0).then(pl.col("bytes_read") / unique))
        .sort("model", *keys, nulls_last=True)
        .to_dicts()
    )


def _touches(trace: Trace, phase: str | None) -> list[pl.DataFrame]:
    """Return what faults and operators say, by tensor."""
    ops = trace.table("ops", phase).group_by(_TENSOR).agg(access_count=pl.len().cast(pl.Int64))
    return [faults(trace, phase).drop("expert"), collect(ops.with_columns(pl.col(_TENSOR).cast(pl.String)))]


def _counts(pieces: pl.DataFrame, touches: list[pl.DataFrame]) -> pl.DataFrame:
    """Return one row a tensor (tensor_name null: bytes outside tensors), with every column of ``_COUNTS``."""
    parts = [pieces.select(*_TENSOR, *_READS, "read_count", "evicted_bytes"), *touches]
    empty = pl.DataFrame(schema={**dict.fromkeys(_TENSOR, pl.String), **dict.fromkeys(_COUNTS, pl.Int64)})
    return pl.concat([empty, *parts], how="diagonal").group_by(_TENSOR).agg(pl.col(_COUNTS).sum())
