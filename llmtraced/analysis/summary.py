"""The first look at a trace: what was traced, for how long, how fast it was, what it read and what it waited for."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import polars as pl

from llmtraced.analysis.layers import grouped
from llmtraced.analysis.moved import Moved
from llmtraced.analysis.pages import Pages
from llmtraced.analysis.reread import TensorReads, reread
from llmtraced.analysis.tokens import paces, per_token
from llmtraced.analysis.trace import Trace, collect, unmapped
from llmtraced.loading import recorded_mode

__all__ = ["summary"]

_PACE: Final = (
    *("phase", "model", "graphs", "n_tokens"),
    *("tokens_per_second", "stall_share", "duration_ns", "bytes_read"),
)
_GROUPED: Final = ("size_bytes", "bytes_read", "reread_bytes", "major_faults", "minor_faults", "stall_ns")


def summary(trace: Trace, phase: str | None = None, top: int = 10) -> dict[str, Any]:
    """Return the summary; with ``phase``, its figures are of that phase only (the duration is always the trace's).

    Args:
        trace: an open trace.
        phase: one of :data:`llmtraced.schema.PHASES`.
        top: how many tensors to name by bytes read, and by stall.
    """
    moved = Moved(Pages(trace, phase, processes=True))
    reads = reread(trace, phase, follow=False, moved=moved)
    graphs = per_token(trace, phase, moved.by_token())
    tensors = reads["tensors"]
    return {
        "trace": str(trace.path),
        "session": trace.session,
        "sessions": list(trace.sessions),
        "models": list(trace.meta["models"]),
        **{
            key: trace.meta.get(key)
            for key in ("tool_version", "kernel", "pid", "command", "cgroup_limit_bytes", "detail")
        },
        "load_mode": recorded_mode(trace.meta),
        "started": _started(trace),
        "duration_ns": 0 if trace.first_ns is None or trace.last_ns is None else trace.last_ns - trace.first_ns,
        "phase": phase,
        "phases": [{key: one[key] for key in _PACE} for one in paces(graphs)],
        "faults": _faults(trace, phase),
        **_pagecache(moved.by_process()),
        "reread": {key: reads[key] for key in ("total_bytes_read", "unique_bytes", "reread_bytes", "amplification")},
        "top_by_bytes_read": [tensor for tensor in tensors if tensor["bytes_read"]][:top],
        "top_by_stall": sorted((t for t in tensors if t["stall_ns"]), key=lambda t: -t["stall_ns"])[:top],
        "layers": grouped(tensors, ("layer",), _GROUPED).drop("tensors").to_dicts(),
        "components": grouped(tensors, ("component",), _GROUPED).drop("tensors").to_dicts(),
        "unbacked": _unbacked(tensors),
        "unmapped": unmapped(trace),
        "account": trace.account,
        "verdict": reads["verdict"],
        "notes": list(trace.notes),
    }


def _started(trace: Trace) -> str | None:
    """Return the wall-clock time (UTC, ISO 8601) of the first row; None when nothing was recorded."""
    offset = trace.meta.get("realtime_offset_ns")
    if trace.first_ns is None or offset is None:
        return None
    return datetime.fromtimestamp((trace.first_ns + int(offset)) / 1e9, tz=UTC).isoformat(timespec="seconds")


def _faults(trace: Trace, phase: str | None) -> dict[str, int]:
    """Return faults by outcome (``unknown``: completion not seen) and their summed latency over all threads, ns."""
    major = pl.col("major")
    return (
        collect(
            trace.table("faults", phase).select(
                major=major.sum().cast(pl.Int64),
                minor=(~major).sum().cast(pl.Int64),
                unknown=major.is_null().sum().cast(pl.Int64),
                stall_ns=pl.col("latency_ns").sum(),
            )
        )
        .row(0, named=True)
        .copy()
    )


def _pagecache(moved: pl.DataFrame) -> dict[str, Any]:
    """Return bytes in by cause, bytes in by process name, and bytes out."""
    added = moved.filter(pl.col("action") == "add")
    evicted = moved.filter(pl.col("action") == "evict")
    return {
        "bytes_by_cause": _ranked(added, "cause"),
        "bytes_by_process": _ranked(added, "comm"),
        "evicted_bytes": int(evicted["bytes"].sum()),
    }


def _ranked(frame: pl.DataFrame, by: str) -> dict[str, int]:
    ranked = frame.group_by(pl.col(by).fill_null("?")).agg(pl.col("bytes").sum()).sort("bytes", by, descending=True)
    return {str(name): int(size) for name, size in ranked.iter_rows()}


def _unbacked(tensors: Iterable[TensorReads]) -> dict[str, Any]:
    """Return the tensors that the server does not use from the mapped file: their reads cannot be seen here."""
    away = [tensor for tensor in tensors if tensor["backed"] is False]
    return {
        "count": len(away),
        "size_bytes": sum(tensor["size_bytes"] or 0 for tensor in away),
        "tensor_names": sorted(tensor["tensor_name"] for tensor in away),
    }
