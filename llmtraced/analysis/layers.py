"""What each layer, and each component (attn_q, ffn_up, …), was asked for, read and waited for.

One grouping of the tensors' figures (:mod:`llmtraced.analysis.reread`), with what the operators say beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import polars as pl

from llmtraced.analysis.reread import reread
from llmtraced.analysis.trace import Trace, collect

__all__ = ["components", "grouped", "layers"]

_READS: Final = (
    *("size_bytes", "access_count", "bytes_read", "unique_bytes", "reread_bytes", "read_count", "evicted_bytes"),
    *("major_faults", "minor_faults", "stall_ns"),
)
_OPS: Final = ("op_count", "unsized_ops", "bytes_accessed", "op_ns")
_TENSOR: Final = ("model", "tensor_name")


def layers(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return the report by layer: ``layers``, one entry a model and layer, in order (-1: outside the layers)."""
    return _report(trace, phase, "layer")


def components(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return the report by component: ``components``, one entry a model and component, most bytes read first."""
    return _report(trace, phase, "component")


def grouped(tensors: Iterable[Mapping[str, Any]], by: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """Return the sums of integer ``columns`` of ``tensors``, and how many they are, by ``by``, in the order of ``by``.

    Null ``layer`` or ``component``: tensors that the tensor map does not hold.
    """
    schema = {
        **{key: pl.Int32 if key == "layer" else pl.String for key in by},
        **dict.fromkeys(columns, pl.Int64),
    }
    frame = pl.DataFrame([{column: tensor[column] for column in schema} for tensor in tensors], schema=schema)
    sums = frame.group_by(by).agg(pl.len().cast(pl.Int64).alias("tensors"), pl.col(columns).sum())
    return sums.sort(by, nulls_last=True)


def _report(trace: Trace, phase: str | None, by: str) -> dict[str, Any]:
    """Return the report; every sum over the groups, plus the ``other_`` figure beside it, is the total.

    What comes from operators (:data:`_OPS`) is None in a trace without any. ``unsized_ops`` of them are on experts
    that are not known, and ``bytes_accessed`` lacks those.
    """
    reads = reread(trace, phase, follow=False)
    ops = _ops(trace, phase)
    none = dict.fromkeys(_OPS, 0)
    tensors = [
        {
            **tensor,
            **ops.get((tensor["model"], tensor["tensor_name"]), none),
            "unbacked_bytes": tensor["size_bytes"] or 0 if tensor["backed"] is False else 0,
        }
        for tensor in reads["tensors"]
    ]
    rows = grouped(tensors, ("model", by), (*_READS, "unbacked_bytes", *_OPS))
    total, stalled = int(reads["total_bytes_read"]), int(rows["stall_ns"].sum())
    rows = rows.with_columns(
        share_of_bytes_read=_share("bytes_read", total), share_of_stall=_share("stall_ns", stalled)
    )
    if not trace.rows["ops"]:
        rows = rows.with_columns(pl.lit(None, pl.Int64).alias(name) for name in _OPS)
    if by == "component":
        rows = rows.sort("bytes_read", "stall_ns", "size_bytes", descending=True, maintain_order=True)
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "by": by,
        **{key: reads[key] for key in ("total_bytes_read", "unique_bytes", "reread_bytes", "amplification")},
        **{key: reads[key] for key in ("other_bytes_read", "other_reread_bytes")},
        "stall_ns": stalled,
        f"{by}s": rows.to_dicts(),
        "account": trace.account,
        "verdict": reads["verdict"],
        "notes": list(trace.notes),
    }


def _share(column: str, total: int) -> pl.Expr:
    return pl.col(column) / total if total else pl.lit(None, pl.Float64)


def _ops(trace: Trace, phase: str | None) -> dict[tuple[str | None, str], dict[str, int]]:
    """Return :data:`_OPS` by model and tensor."""
    found = collect(
        trace.table("ops", phase)
        .filter(pl.col("tensor_name").is_not_null())
        .group_by(_TENSOR)
        .agg(
            op_count=pl.len().cast(pl.Int64),
            unsized_ops=pl.col("bytes_accessed").null_count().cast(pl.Int64),
            bytes_accessed=pl.col("bytes_accessed").sum(),
            op_ns=pl.col("duration_ns").sum(),
        )
        .with_columns(pl.col(_TENSOR).cast(pl.String))
    )
    return {(row["model"], row["tensor_name"]): row for row in found.to_dicts()}
