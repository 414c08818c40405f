"""How often was the model read: bytes read, bytes read again, per tensor.

The truth is what entered the page cache (rows of ``pagecache`` with action ``add``), not page faults: with a large
readahead a dozen major faults hide a gigabyte of reads.
"""

from __future__ import annotations

from typing import Any, Final, TypedDict, cast

import polars as pl

from llmtraced.analysis.pages import Pages
from llmtraced.analysis.spread import Spread
from llmtraced.analysis.trace import Trace, collect, verdict

__all__ = ["Reread", "TensorReads", "fresh_bytes", "reread"]

_TENSOR: Final = ("model", "tensor_name")
_RANGE: Final = ("model", "shard", "tensor_name", "expert", "offset_bytes", "bytes")
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


def fresh_bytes(ranges: pl.LazyFrame) -> pl.LazyFrame:
    """Add ``fresh``: the bytes of each range that no earlier range in the same tensor covers (earlier by offset).

    Args:
        ranges: columns ``model, shard, tensor_name, offset_bytes, bytes``, in any order, overlaps welcome. The sum of
            ``fresh`` over a tensor is the size of the union of its ranges.
    """
    start, end = pl.col("offset_bytes"), pl.col("offset_bytes") + pl.col("bytes")
    reached = end.cum_max().shift(1).over("model", "shard", "tensor_name")
    return ranges.sort("offset_bytes").with_columns(fresh=(end - pl.max_horizontal(start, reached)).clip(lower_bound=0))


def reread(trace: Trace, phase: str | None = None, follow: bool = True) -> Reread:
    """Return how much of each tensor was read, and read again, in ``phase`` (default: all of the trace).

    What is unique is unique within the phase: a byte read once while loading and once while decoding is a re-read in
    the whole trace, and not in either phase.

    Args:
        trace: an open trace.
        phase: one of :data:`llmtraced.schema.PHASES`.
        follow: follow every page from its eviction to its return. That is most of the work; without it
            ``returned_bytes``, ``away_ns`` and ``away_tokens`` are 0 and None.
    """
    ranges = fresh_bytes(_ranges(trace, phase).lazy()).collect()
    counts = _counts(trace, phase, ranges)
    away, returned = _away(trace, phase, follow)
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
        "experts": _grouped(_experts(trace, ranges), "layer", "expert"),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def _ranges(trace: Trace, phase: str | None) -> pl.DataFrame:
    """Return the distinct ranges that were added and ``reads``, how often each was.

    A page that is read 200 times is one range read 200 times: memory goes with the model, not with the trace.
    """
    found: list[pl.LazyFrame] = []
    for piece in trace.slices("pagecache", phase):
        adds = piece.filter(pl.col("action") == "add").select(*_RANGE, reads=pl.lit(1, pl.Int64))
        found = [collect(pl.concat([*found, adds]).group_by(_RANGE).agg(pl.col("reads").sum())).lazy()]
    return found[0].collect()


def _away(trace: Trace, phase: str | None, follow: bool) -> tuple[dict[str, Any], pl.DataFrame]:
    """Return how much was read again after its eviction, and how long after: of all, and one row a tensor."""
    pages = Pages(trace, phase)
    count = pages.tensors.height
    times, tokens = Spread(count), Spread(count)
    for steps in pages.steps() if follow else ():
        again = steps.only(steps.now.added & steps.now.counted & steps.past.known & ~steps.past.added)
        times.add(again.tensor, again.now.time - again.past.time, again.nbytes)
        tokens.add(again.tensor, again.token - again.past_token, again.nbytes)
    rows = [
        {"returned_bytes": times.total(at), "away_ns": times.points(at), "away_tokens": tokens.points(at)}
        for at in (None, *range(count))
    ]
    point = pl.Struct(dict.fromkeys(("min", "p50", "p90"), pl.Int64))
    schema: dict[str, Any] = {"returned_bytes": pl.Int64, "away_ns": point, "away_tokens": point}
    return rows[0], pages.tensors.hstack(pl.DataFrame(rows[1:], schema=schema))


def _experts(trace: Trace, ranges: pl.DataFrame) -> pl.DataFrame:
    """Return one row a merged tensor and expert, of all experts that the map knows."""
    sized = trace.tensors.filter(pl.col("n_experts") > 0).select(
        *_TENSOR, "layer", size_bytes="expert_bytes", expert=pl.int_ranges("n_experts", dtype=pl.Int32)
    )
    read = (
        ranges.group_by(*_TENSOR, "expert")
        .agg(bytes_read=(pl.col("bytes") * pl.col("reads")).sum(), unique_bytes=pl.col("fresh").sum())
        .with_columns(pl.col(_TENSOR).cast(pl.String), reread_bytes=pl.col("bytes_read") - pl.col("unique_bytes"))
    )
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


def _counts(trace: Trace, phase: str | None, ranges: pl.DataFrame) -> pl.DataFrame:
    """Return one row a tensor (tensor_name null: bytes outside tensors), with every column of ``_COUNTS``."""
    pagecache, faults, ops = (trace.table(name, phase) for name in ("pagecache", "faults", "ops"))
    parts = [
        ranges.lazy()
        .group_by(_TENSOR)
        .agg(
            bytes_read=(pl.col("bytes") * pl.col("reads")).sum(),
            unique_bytes=pl.col("fresh").sum(),
            read_count=pl.col("reads").sum(),
        )
        .with_columns(reread_bytes=pl.col("bytes_read") - pl.col("unique_bytes")),
        pagecache.filter(pl.col("action") == "evict").group_by(_TENSOR).agg(evicted_bytes=pl.col("bytes").sum()),
        faults.group_by(_TENSOR).agg(
            access_count=pl.len().cast(pl.Int64),
            major_faults=pl.col("major").sum().cast(pl.Int64),
            minor_faults=(~pl.col("major")).sum().cast(pl.Int64),
            stall_ns=pl.col("latency_ns").sum(),
        ),
        ops.group_by(_TENSOR).agg(access_count=pl.len().cast(pl.Int64)),
    ]
    names = [pl.col(name).cast(pl.String) for name in _TENSOR]
    empty = pl.DataFrame(schema={**dict.fromkeys(_TENSOR, pl.String), **dict.fromkeys(_COUNTS, pl.Int64)})
    rows = pl.concat([empty, *(collect(part.with_columns(names)) for part in parts)], how="diagonal")
    return rows.group_by(_TENSOR).agg(pl.col(_COUNTS).sum())
