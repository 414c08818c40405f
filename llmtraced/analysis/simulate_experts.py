"""A mixture of experts with other amounts of RAM: which experts to keep, and which to fetch before they are chosen.

What every token uses is taken to be in memory; the rest of the RAM holds experts. :mod:`llmtraced.analysis.retention`
replays what of them would be missing, :mod:`llmtraced.analysis.predictors` how much of that would be known in time.
docs/reports/simulate.md has every field, docs/experts.md what came out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.experts import expert_layers, numbered
from llmtraced.analysis.predictors import WIDTHS, Choices, judge, predictors
from llmtraced.analysis.ram import LOOKED_UP
from llmtraced.analysis.retention import BELADY, POLICIES, Retention
from llmtraced.analysis.routing import Accesses, Layer, Routing, load
from llmtraced.analysis.simulate import best_rate
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.errors import LlmtracedError, printable

__all__ = ["CELLS", "LEAST", "SHARES", "simulate_experts"]

Ints: TypeAlias = NDArray[np.int64]

SHARES: Final = (0.22, 0.35, 0.5, 0.7, 0.85)
"""RAM sizes, as shares of the model."""

LEAST: Final = 20
"""Text tokens that are needed: half of them are only learned from."""

CELLS: Final = 16_000_000
"""Evaluations times slices that are looked at, at most: the last ones."""


def simulate_experts(trace: Trace, rams: Sequence[int] = (), disk_bandwidth: float | None = None) -> dict[str, Any]:
    """Return the report; docs/reports/simulate.md has every field.

    Args:
        trace: an open trace.
        rams: bytes for the model's pages; none: :data:`SHARES` of the model.
        disk_bandwidth: bytes/s; None: the most that the trace shows.

    Raises:
        LlmtracedError: the model has no experts, or the trace does not tell enough of their choices.
    """
    where, notes = printable(str(trace.path)), list(trace.notes)
    tensors, layers = expert_layers(trace, notes)
    if not layers or not tensors.height:
        raise LlmtracedError(f"{where}: the model has no experts: `llmtraced simulate` without --experts")
    routing, when = _single(trace, layers)
    evaluations = len(routing.ranked()[0])
    if evaluations < LEAST:
        raise LlmtracedError(
            f"{where}: {evaluations} tokens whose experts are all known, {LEAST} are needed: record decoding "
            "of one sequence with --detail ops"
        )
    layers = list(routing.layers)
    accesses, choices = Accesses.of(routing), Choices.of(routing, when)
    sizes = np.repeat([one.slice_bytes for one in layers], [one.n_experts for one in layers]).astype(np.int64)
    dense, total = _dense(trace), int(sizes.sum())
    if not rams:
        rams = [round((dense + total) * share) for share in SHARES]
    rams = sorted({ram for ram in rams if ram > dense})
    if not rams:
        raise LlmtracedError(f"{where}: what every token uses takes {dense} bytes; give more RAM than that")
    disk = disk_bandwidth or best_rate(trace)
    compute = _compute(trace, choices.token[choices.warm :])
    retention = Retention.of(accesses, routing.n, routing.layers)
    rows: list[dict[str, Any]] = []
    states = []
    for ram in rams:
        places = min(max(int((ram - dense) // sizes.mean()), 1), routing.n)
        missed = retention.missed_bytes(sizes, places)
        best = min((policy for policy in POLICIES if policy != BELADY), key=missed.__getitem__)
        lacked, there = retention.states(best, places)
        absent = np.zeros(choices.used.shape, np.bool_)
        absent[accesses.rank[lacked], accesses.slices[lacked]] = True
        states.append((absent, there))
        rows.append(
            {
                "ram_bytes": ram,
                "ram_share": ram / (dense + total),
                "expert_slices": places,
                "missed_bytes_per_token": missed,
                "best_policy": best,
                "ns_per_token": _time(compute, missed[best], 0.0, missed[best], disk),
                "predictors": [],
            }
        )
    found = []
    for guess in predictors(trace, choices):
        for width in WIDTHS:
            one, worth = judge(choices, guess, width, states, sizes, disk)
            found.append(one)
            for row, at in zip(rows, worth, strict=True):
                hidden, lost = at["hidden_share"], at["missed_bytes_per_token"]
                left = None if hidden is None else lost * (1 - hidden)
                ns = _time(compute, left, at["wasted_bytes_per_token"], lost, disk)
                row["predictors"].append({"predictor": guess.name, "width": width, **at, "ns_per_token": ns})
    return {
        "session": trace.session,
        "models": trace.models,
        "tokens": evaluations,
        "counted_tokens": evaluations - choices.warm,
        "n_layers": len(layers),
        "n_experts": max(one.n_experts for one in layers),
        "n_used": choices.chosen.shape[2],
        "dense_bytes": dense,
        "expert_bytes": total,
        "used_expert_bytes_per_token": float((choices.used[choices.warm :] @ sizes).mean()),
        "compute_ns_per_token": compute,
        "disk_bytes_per_second": disk,
        "disk_source": "given" if disk_bandwidth else "trace" if disk else None,
        "router_scores": trace.rows["router_scores"] > 0,
        "predictors": found,
        "curve": rows,
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": notes,
    }


def _single(trace: Trace, layers: Sequence[Layer]) -> tuple[Routing, Ints]:
    """Return the choices of evaluations of one text token that all layers made, and when each had been made, ns."""
    rows = collect(
        trace.table("routing", "decode")
        .filter(pl.col("layer").is_in([layer.number for layer in layers]))
        .select("token", "layer", "timestamp", "position")
    ).sort("token", "layer", "position")
    chose = set(rows["layer"].to_list())
    routing = load(trace, "decode", numbered([layer for layer in layers if layer.number in chose]))
    heard = rows.group_by("token").agg(pl.len(), pl.col("layer").n_unique().alias("layers"))
    whole = heard.filter(pl.col("len") == len(chose), pl.col("layers") == len(chose))["token"].sort()
    kept = whole.tail(max(CELLS // max(routing.n, 1), LEAST)).to_numpy()
    mine = np.isin(routing.token, kept)
    return routing.rows(mine), rows["timestamp"].to_numpy()[mine].astype(np.int64)


def _dense(trace: Trace) -> int:
    """Return the bytes that every token uses: of all that is no expert, and not only looked up."""
    plain = trace.tensors.filter((pl.col("n_experts").fill_null(0) == 0) & pl.col("backed").fill_null(True))
    if "output.weight" in plain["tensor_name"]:
        plain = plain.filter(pl.col("tensor_name") != LOOKED_UP)
    return int(plain["size_bytes"].sum())


def _compute(trace: Trace, tokens: Ints) -> float | None:
    """Return the median of the tokens' durations less their stalls, ns; None: not known."""
    rows = trace.table("tokens").filter(pl.col("token").is_in(tokens.tolist()))
    value = collect(rows.select((pl.col("end_ns") - pl.col("start_ns") - pl.col("stall_ns")).median())).item()
    return None if value is None else float(value)


def _time(compute: float | None, left: float | None, vain: float, missed: float, disk: float | None) -> float | None:
    """Return the time of a token: computing and what is waited for, or all that is read, whichever takes longer."""
    if compute is None or left is None or (not disk and missed):
        return None
    if not disk:
        return compute
    return max(compute + left / disk * 1e9, (missed + vain) / disk * 1e9)
