"""What each token cost: time, stall, bytes read and why, page faults; and the spread of that per phase."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.schema import CAUSES, PHASES

__all__ = ["CAUSE_BYTES", "SPREAD", "per_token", "tokens"]

CAUSE_BYTES: Final = tuple(f"{cause}_bytes" for cause in CAUSES)
"""Columns with the bytes read by cause: ``fault_bytes``, ``readahead_bytes``, …"""

SPREAD: Final = ("duration_ns", "stall_ns", "bytes_read", "major_faults", "minor_faults")
"""The columns that percentiles are given for."""


def per_token(trace: Trace, phase: str | None = None) -> pl.DataFrame:
    """Return one row a token (a graph evaluation), in order; token 0, the time before the first graph, is left out.

    Columns: ``token``, ``phase``, ``start_ns``, ``duration_ns`` (null: its end was not seen), ``n_tokens``,
    ``n_outputs``, ``stall_ns``, ``stall_share`` (of the duration, 0 to 1), ``fault_ns``, ``bytes_read``, one of
    :data:`CAUSE_BYTES` each, ``major_faults``, ``minor_faults``, ``graph_nodes``. ``bytes_read`` is the sum over the
    causes; in a trace without page-cache rows it is what the recorder counted, and the causes are 0.
    """
    by_cause = collect(_adds(trace, phase).group_by("token").agg(_by_cause()))
    read = pl.sum_horizontal(CAUSE_BYTES) if trace.rows["pagecache"] else pl.col("bytes_read").fill_null(0)
    duration = pl.col("end_ns") - pl.col("start_ns")
    return (
        collect(trace.table("tokens", phase).filter(pl.col("token") > 0))
        .join(by_cause, on="token", how="left")
        .with_columns(
            pl.col("phase").cast(pl.String),
            pl.col(CAUSE_BYTES).fill_null(0),
            duration_ns=duration,
            stall_share=pl.when(duration > 0).then(pl.col("stall_ns") / duration),
        )
        .with_columns(bytes_read=read)
        .sort("token")
        .select(
            *("token", "phase", "start_ns", "duration_ns", "n_tokens", "n_outputs"),
            *("stall_ns", "stall_share", "fault_ns", "bytes_read", *CAUSE_BYTES),
            *("major_faults", "minor_faults", "graph_nodes"),
        )
    )


def tokens(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return the report: ``phases`` (see :func:`_spread`), ``tokens`` (the rows of :func:`per_token`), and more.

    ``outside_bytes_read`` is what was read while no token was known: before the first graph, or in a phase without
    graphs. ``tokens_per_second`` counts the time inside graphs, not idle time, sampling or the network.
    """
    rows = per_token(trace, phase)
    numbers = rows.lazy().select("token").unique()
    outside = collect(_adds(trace, phase).join(numbers, on="token", how="anti").select(pl.col("bytes").sum())).item()
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "phases": [_spread(name, rows.filter(pl.col("phase") == name)) for name in PHASES if name in rows["phase"]],
        "outside_bytes_read": int(outside),
        "tokens": rows.to_dicts(),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def _spread(phase: str, rows: pl.DataFrame) -> dict[str, Any]:
    """Return one phase's figures: graphs, n_tokens, tokens_per_second, totals, and mean, p50, p90, p99, max of each."""
    ended = rows.filter(pl.col("duration_ns").is_not_null())
    stalls = ended.filter(pl.col("stall_ns").is_not_null())
    seconds = int(ended["duration_ns"].sum()) / 1e9
    stallable = int(stalls["duration_ns"].sum())
    return {
        "phase": phase,
        "graphs": rows.height,
        "n_tokens": int(rows["n_tokens"].sum()),
        "tokens_per_second": int(ended["n_tokens"].sum()) / seconds if seconds else None,
        "stall_share": int(stalls["stall_ns"].sum()) / stallable if stallable else None,
        "total": {column: int(rows[column].sum()) for column in (*SPREAD, *CAUSE_BYTES)},
        **{column: _percentiles(rows[column]) for column in SPREAD},
    }


def _percentiles(values: pl.Series) -> dict[str, float | None]:
    """Return mean, p50, p90, p99 and max; percentiles interpolate linearly, as numpy's do; nulls do not count."""
    points: dict[str, Any] = {"mean": values.mean()}
    points |= {f"p{q}": values.quantile(q / 100, "linear") for q in (50, 90, 99)}
    points["max"] = values.max()
    return {name: None if value is None else float(value) for name, value in points.items()}


def _adds(trace: Trace, phase: str | None) -> pl.LazyFrame:
    return trace.table("pagecache", phase).filter(pl.col("action") == "add")


def _by_cause() -> list[pl.Expr]:
    read = pl.col("bytes")
    return [read.filter(pl.col("cause") == cause).sum().alias(f"{cause}_bytes") for cause in CAUSES]
