"""What each token cost: time and where it went, bytes read and why, page faults; and the spread of that per phase."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from llmtraced.analysis.stall import PARTS, WAIT_NS, stalls
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.schema import CAUSES, PHASES

__all__ = ["CAUSE_BYTES", "SPREAD", "pace", "paces", "per_token", "tokens"]

CAUSE_BYTES: Final = tuple(f"{cause}_bytes" for cause in CAUSES)
"""Columns with the bytes read by cause: ``fault_bytes``, ``readahead_bytes``, …"""

SPREAD: Final = ("duration_ns", "stall_ns", "bytes_read", "major_faults", "minor_faults")
"""The columns that percentiles are given for."""


def per_token(trace: Trace, phase: str | None = None, added: pl.DataFrame | None = None) -> pl.DataFrame:
    """Return one row a token (a graph evaluation), in order; token 0, the time before the first graph, is left out.

    Columns: ``token``, ``model`` (that the graph evaluates; null: not known), ``phase``, ``start_ns``, ``duration_ns``
    (null: its end was not seen), ``n_tokens``, ``n_outputs``, ``stall_ns``, ``stall_share`` (of the duration, 0 to 1),
    ``fault_ns``, ``bytes_read``, one of :data:`CAUSE_BYTES` each, ``major_faults``, ``minor_faults``, ``graph_nodes``.
    ``bytes_read`` is the sum over the causes; in a trace without page-cache rows it is what the recorder counted, and
    the causes are 0.

    Args:
        trace: an open trace.
        phase: only tokens of this phase.
        added: what came in, if that is known: ``token``, ``cause`` and ``bytes`` (:func:`_added`).
    """
    by_cause = (_added(trace, phase) if added is None else added).group_by("token").agg(_by_cause())
    read = pl.sum_horizontal(CAUSE_BYTES) if trace.rows["pagecache"] else pl.col("bytes_read").fill_null(0)
    duration = pl.col("end_ns") - pl.col("start_ns")
    return (
        collect(trace.table("tokens", phase).filter(pl.col("token") > 0))
        .join(by_cause, on="token", how="left")
        .with_columns(
            pl.col("phase", "model").cast(pl.String),
            pl.col(CAUSE_BYTES).fill_null(0),
            duration_ns=duration,
            stall_share=pl.when(duration > 0).then(pl.col("stall_ns") / duration),
        )
        .with_columns(bytes_read=read)
        .sort("token")
        .select(
            *("token", "model", "phase", "start_ns", "duration_ns", "n_tokens", "n_outputs"),
            *("stall_ns", "stall_share", "fault_ns", "bytes_read", *CAUSE_BYTES),
            *("major_faults", "minor_faults", "graph_nodes"),
        )
    )


def tokens(trace: Trace, phase: str | None = None, wait_ns: int = WAIT_NS) -> dict[str, Any]:
    """Return the report: ``phases`` (see :func:`pace`), ``tokens``, and more.

    ``tokens`` are the rows of :func:`per_token` with those of :func:`llmtraced.analysis.stall.stalls`.
    ``outside_bytes_read`` is what was read while no token was known: before the first graph, or in a phase without
    graphs. ``tokens_per_second`` counts the time inside graphs, not idle time, sampling or the network. A minor fault
    of ``wait_ns`` or longer is taken to have waited for a read.
    """
    added = _added(trace, phase)
    rows = per_token(trace, phase, added).join(
        stalls(trace, phase, wait_ns), on="token", how="left", maintain_order="left"
    )
    read = int(added["bytes"].sum())
    in_tokens = rows.select(pl.sum_horizontal(CAUSE_BYTES).sum()).item()
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "wait_threshold_ns": wait_ns,
        "phases": paces(rows),
        "outside_bytes_read": read - int(in_tokens),
        "tokens": rows.to_dicts(),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def paces(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return :func:`pace` of each phase in the rows of :func:`per_token`, and of each model where there are several.

    A draft model's graphs are as many as those of the model that it drafts for, and faster: together they mean nothing.
    ``model`` is None where there is one model, and for graphs of which it is not known.
    """
    several = rows["model"].drop_nulls().n_unique() > 1
    found = []
    for phase in PHASES:
        mine = rows.filter(pl.col("phase") == phase)
        models = mine["model"].unique(maintain_order=True).to_list() if several else [None]
        for model in models if mine.height else ():
            of = mine.filter(pl.col("model").eq_missing(model)) if several else mine
            found.append({**pace(phase, of), "model": model})
    return found


def pace(phase: str, rows: pl.DataFrame) -> dict[str, Any]:
    """Return one phase's figures of the rows of :func:`per_token`.

    ``graphs``, ``n_tokens``, ``tokens_per_second``, ``stall_share``, ``total`` (sums), and mean, p50, p90, p99 and max
    of each column of :data:`SPREAD`. With the columns of :func:`llmtraced.analysis.stall.stalls` these too, and
    ``reads_in_flight`` over the whole phase.
    """
    ended = rows.filter(pl.col("duration_ns").is_not_null())
    stalled = ended.filter(pl.col("stall_ns").is_not_null())
    seconds = int(ended["duration_ns"].sum()) / 1e9
    stallable = int(stalled["duration_ns"].sum())
    parts = PARTS if PARTS[0] in rows.columns else ()
    return {
        "phase": phase,
        "graphs": rows.height,
        "n_tokens": int(rows["n_tokens"].sum()),
        "tokens_per_second": int(ended["n_tokens"].sum()) / seconds if seconds else None,
        "stall_share": int(stalled["stall_ns"].sum()) / stallable if stallable else None,
        **({"reads_in_flight": _in_flight(rows)} if parts else {}),
        "total": {column: int(rows[column].sum()) for column in (*SPREAD, *parts, *CAUSE_BYTES)},
        **{column: _percentiles(rows[column]) for column in (*SPREAD, *parts)},
    }


def _in_flight(rows: pl.DataFrame) -> float | None:
    """Return the mean number of threads that waited for a read while there was one, over all of ``rows``."""
    time = rows["wait_ns"] + rows["hard_read_ns"]
    total = int(time.sum())
    return float((rows["reads_in_flight"] * time).sum()) / total if total else None


def _percentiles(values: pl.Series) -> dict[str, float | None]:
    """Return mean, p50, p90, p99 and max; percentiles interpolate linearly, as numpy's do; nulls do not count."""
    points: dict[str, Any] = {"mean": values.mean()}
    points |= {f"p{q}": values.quantile(q / 100, "linear") for q in (50, 90, 99)}
    points["max"] = values.max()
    return {name: None if value is None else float(value) for name, value in points.items()}


def _added(trace: Trace, phase: str | None) -> pl.DataFrame:
    """Return the bytes that came in by ``token`` and ``cause``."""
    adds = trace.table("pagecache", phase).filter(pl.col("action") == "add")
    return collect(adds.group_by("token", "cause").agg(pl.col("bytes").sum()))


def _by_cause() -> list[pl.Expr]:
    read = pl.col("bytes")
    return [read.filter(pl.col("cause") == cause).sum().alias(f"{cause}_bytes") for cause in CAUSES]
