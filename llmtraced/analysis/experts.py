"""Mixture-of-Experts: which experts are chosen, how soon again, what a cache of them would hit, what they cost.

Choices come from the ``routing`` table (``--detail ops``), reads and stalls of each expert from ``pagecache`` and
``faults``, which every trace has. All that depends on order (repeats, reuse, prediction, caches) looks at one phase:
the one asked for, else decoding, because a prompt's batch needs nearly every expert at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis import replay
from llmtraced.analysis.coactivation import coactivation
from llmtraced.analysis.pages import Pages
from llmtraced.analysis.reads import Reads, faults
from llmtraced.analysis.routing import Accesses, Gaps, Layer, Routing, chance, load, spread, use
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.errors import USAGE, LlmtracedError

__all__ = ["BLOCKS", "CELLS", "REPLAYED", "SHARES", "expert_layers", "experts", "hot_cold", "numbered"]

Ints: TypeAlias = NDArray[np.int64]

SHARES: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
"""Cache sizes of the hit-rate curves, as shares of all slices."""

REPLAYED: Final = 150_000
"""Accesses that caches are replayed for, at most."""

BLOCKS: Final = 4
"""A longer sequence is replayed in this many stretches, evenly spread over it."""

CELLS: Final = 200_000
"""Cells of all selection matrices together, at most; but never fewer than 8 columns."""

_COLUMNS: Final = 100
_POINTS: Final = 256  # of the LRU curve
_REPEATS: Final = {"repeat_next": 1, "repeat_8": 8}
_COSTS: Final = ("bytes_read", "reread_bytes", "major_faults", "minor_faults", "stall_ns")
_NAMED: Final = ("layer", "expert", "selections", "share", "bytes", "rank")


def experts(trace: Trace, phase: str | None = None, layer: int | None = None) -> dict[str, Any]:
    """Return the report; its fields are in docs/reports/experts.md.

    Args:
        trace: an open trace.
        phase: one of :data:`llmtraced.schema.PHASES`.
        layer: only this layer, also in the caches; default: all layers together.

    Raises:
        LlmtracedError: the model has experts, but none in ``layer``.
    """
    notes = list(trace.notes)
    tensors, layers = expert_layers(trace, notes)
    if layer is not None and layers:
        if layer not in (one.number for one in layers):
            raise LlmtracedError(
                f"layer {layer} has no experts; these have: {', '.join(str(one.number) for one in layers)}", USAGE
            )
        layers = numbered([one for one in layers if one.number == layer])
        tensors = tensors.filter(pl.col("layer") == layer)
    routing = load(trace, phase, layers)
    if routing.strays:
        notes.append(f"left out {routing.strays} choices of experts that the model's tensors do not have")
    order = phase or ("decode" if routing.decode.any() else None)
    sequence = routing.rows(routing.decode) if order == "decode" else routing
    with ThreadPoolExecutor(1) as pool:  # polars reads one half of the report while numpy computes the other
        costing = pool.submit(_costs, trace, phase, order, tensors, routing)
        accesses = Accesses.of(sequence)
        together = coactivation(sequence)
        cache = _cache(accesses, routing.n, sum(one.n_experts * one.slice_bytes for one in layers))
        costs, sequence_bytes = costing.result()
    matrix, bins = _matrix(routing)
    selections = matrix.sum(axis=1)
    sizes = np.repeat([one.slice_bytes for one in layers], [one.n_experts for one in layers]).astype(np.int64)
    used = int(sizes[accesses.slices].sum())
    gaps = Gaps.of(accesses)
    repeats = {name: (within, *gaps.repeats(routing.n, within)) for name, within in _REPEATS.items()}
    rows = _by_layer(routing, accesses, gaps, repeats, selections, costs, matrix)
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "layer": layer,
        "detail": trace.meta.get("detail"),
        "state": "routed" if len(routing.token) else "unrouted" if layers else "dense",
        "routing_recorded": trace.rows["routing"],
        "routing_rows": len(routing.token),
        "evaluations": len(routing.ranked()[0]),
        "selections": int(selections.sum()),
        "n_layers": len(layers),
        "n_experts": max((one.n_experts for one in layers), default=0),
        "n_slices": routing.n,
        "n_slices_used": int(np.count_nonzero(selections)),
        "size_bytes": int(sizes.sum()),
        "unbacked_bytes": int(tensors.filter(~pl.col("backed"))["size_bytes"].sum()),
        **{name: int(costs[name].sum()) for name in _COSTS},
        "sequence": {
            "phase": order,
            "evaluations": accesses.evaluations,
            "accesses": len(accesses.slices),
            "used_bytes": used,
            "bytes_read": sequence_bytes,
            "read_per_used": sequence_bytes / used if used else None,
        },
        **_repetition(repeats, rows),
        "reuse": _reuse(gaps.gap),
        "layers": rows,
        "matrix_bins": bins,
        "coactivation": together,
        "cache": cache,
        "hot_cold": _ranked(routing, selections, sizes, costs),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": notes,
    }


def hot_cold(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every slice, hottest first, as a list to be written to a file.

    Keys: ``layer, expert, selections, share`` (of its layer's selections), ``bytes`` (its size), ``rank`` (from 1), and
    ``heat``: ``hot`` (chosen more often than if its layer's experts were all alike), ``cold``, ``unused``.
    """
    even = {one["layer"]: 1 / one["n_experts"] for one in report["layers"]}
    return [
        {name: row[name] for name in _NAMED}
        | {"heat": "unused" if not row["selections"] else "hot" if row["share"] > even[row["layer"]] else "cold"}
        for row in report["hot_cold"]
    ]


def expert_layers(trace: Trace, notes: list[str]) -> tuple[pl.DataFrame, list[Layer]]:
    """Return the merged expert tensors, and the layers that they are in; what is to be known is added to ``notes``."""
    tensors = trace.tensors.filter((pl.col("n_experts") > 0) & (pl.col("layer") >= 0))
    owners = tensors.group_by("model").agg(pl.col("size_bytes").sum()).sort("size_bytes", "model", descending=True)
    if owners.height > 1:
        tensors = tensors.filter(pl.col("model") == owners["model"][0])
        notes.append("several models have experts, and routing does not say whose it is: taken as the largest's")
    most = pl.col("n_experts").max().over("layer")  # a layer may hold tensors for groups of experts, too
    tensors = tensors.filter(pl.col("n_experts") == most)
    sizes = tensors.group_by("layer").agg(pl.col("n_experts").first(), pl.col("expert_bytes").sum()).sort("layer")
    if not sizes.height and trace.rows["routing"]:
        notes.append("the tensor map has no experts, so the sizes of those that were chosen are not known")
        ids = pl.col("experts").list.max().max()
        seen = trace.table("routing").group_by("layer").agg(n_experts=ids + 1, expert_bytes=pl.lit(0, pl.Int64))
        sizes = collect(seen.sort("layer")).drop_nulls()
    return tensors, numbered([Layer(number, n, size, 0) for number, n, size in sizes.iter_rows()])


def numbered(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with their slices numbered from 0."""
    starts = np.cumsum([0, *(layer.n_experts for layer in layers)])
    return [
        Layer(layer.number, layer.n_experts, layer.slice_bytes, int(base))
        for layer, base in zip(layers, starts, strict=False)
    ]


def _costs(
    trace: Trace, phase: str | None, order: str | None, tensors: pl.DataFrame, routing: Routing
) -> tuple[dict[str, Ints], int]:
    """Return :data:`_COSTS` by slice, and the bytes that were read in phase ``order``."""
    if not routing.n:
        return {name: np.zeros(0, np.int64) for name in _COSTS}, 0
    pages = Pages(trace, phase, order)
    summed = Reads(pages)
    for batch in pages.rows():
        summed.add(batch)
    reads = summed.by_expert().with_columns(reread_bytes=pl.col("bytes_read") - pl.col("unique_bytes"))
    bases = pl.DataFrame(
        {"layer": [one.number for one in routing.layers], "base": routing.base},
        schema={"layer": pl.Int32, "base": pl.Int64},
    )
    owned = tensors.select("model", "tensor_name", "layer", "n_experts").join(bases, on="layer")
    costs = {name: np.zeros(routing.n, np.int64) for name in (*_COSTS, "ordered_bytes")}
    for found in (reads, faults(trace, phase)):
        rows = found.join(owned, on=("model", "tensor_name"))
        rows = rows.filter((pl.col("expert") >= 0) & (pl.col("expert") < pl.col("n_experts")))
        slices = (rows["base"] + rows["expert"]).to_numpy()
        for name in set(costs) & set(rows.columns):
            np.add.at(costs[name], slices, rows[name].fill_null(0).to_numpy())
    return costs, int(costs.pop("ordered_bytes").sum())


def _matrix(routing: Routing) -> tuple[Ints, list[dict[str, int]]]:
    """Return selections by slice and bin of consecutive evaluations, and the bins' first and last evaluation."""
    tokens, rank = routing.ranked()
    room = max(CELLS // max(routing.n, 1), 8)
    columns = min(len(tokens), room, _COLUMNS)
    if not columns:
        return np.zeros((routing.n, 0), np.int64), []
    edges = np.linspace(0, len(tokens), columns + 1).astype(np.int64)
    column = np.repeat(np.arange(columns, dtype=np.int32), np.diff(edges))[rank]
    row, slices = routing.selections
    cells = np.bincount(slices * np.int32(columns) + column[row], minlength=routing.n * columns)
    ends = zip(tokens[edges[:-1]].tolist(), tokens[edges[1:] - 1].tolist(), strict=True)
    return cells.reshape(routing.n, columns), [{"first_token": first, "last_token": last} for first, last in ends]


def _repetition(
    repeats: Mapping[str, tuple[int, Ints, Ints]], layers: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Return how often all layers together repeat, and would by chance."""
    found: dict[str, float | None] = {}
    for name, (_, did, could) in repeats.items():
        guesses = [(one["accesses"], one[f"{name}_by_chance"]) for one in layers]
        known = sum(weight for weight, guess in guesses if guess is not None)
        found[name] = _share(int(did.sum()), int(could.sum()))
        found[f"{name}_by_chance"] = (
            sum(weight * guess for weight, guess in guesses if guess) / known if known else None
        )
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _reuse(gap: NDArray[np.int32]) -> dict[str, Any]:
    """Return how many graph evaluations later a slice is needed again."""
    again = gap[gap > 0]
    by_gap = np.bincount(again)[1:]
    steps = np.ceil(np.log2(np.arange(1, len(by_gap) + 1))).astype(np.int64)  # 1, 2, 3-4, 5-8, …
    counts = np.bincount(steps, by_gap).astype(np.int64).tolist()
    return {
        "first_accesses": len(gap) - len(again),
        "again_accesses": len(again),
        "tokens": spread(again),
        "histogram": [
            {"from_tokens": 2 ** (step - 1) + 1 if step else 1, "to_tokens": 2**step, "accesses": count}
            for step, count in enumerate(counts)
        ],
    }


def _by_layer(
    routing: Routing,
    accesses: Accesses,
    gaps: Gaps,
    repeats: Mapping[str, tuple[int, Ints, Ints]],
    selections: Ints,
    costs: Mapping[str, Ints],
    matrix: Ints,
) -> list[dict[str, Any]]:
    rows = np.bincount(routing.at, minlength=len(routing.layers))
    counts = np.bincount(accesses.slices, minlength=routing.n)
    ends = np.append(0, np.cumsum(counts))
    layers = []
    for one, chose, evaluations in zip(routing.layers, rows.tolist(), accesses.heard.tolist(), strict=True):
        mine = slice(one.base, one.base + one.n_experts)
        selected, needed = int(selections[mine].sum()), int(counts[mine].sum())
        apart = gaps.gap[ends[mine.start] : ends[mine.stop]]
        entry: dict[str, Any] = {
            "layer": one.number,
            "n_experts": one.n_experts,
            "slice_bytes": one.slice_bytes,
            "text_tokens": chose,
            "selections": selected,
            "experts_per_text_token": _share(selected, chose),
            **use(selections[mine], chose),
            "accesses": needed,
            "experts_per_evaluation": _share(needed, evaluations),
            "active_share": _share(needed, evaluations * one.n_experts),
        }
        for name, (within, did, could) in repeats.items():
            entry[name] = _share(int(did[mine].sum()), int(could[mine].sum()))
            entry[f"{name}_by_chance"] = chance(counts[mine], evaluations, within)
        entry["reuse_tokens"] = spread(apart[apart > 0])
        entry |= {name: int(costs[name][mine].sum()) for name in _COSTS}
        entry["matrix"] = matrix[mine].tolist()
        layers.append(entry)
    return layers


def _cache(accesses: Accesses, n: int, size_bytes: int) -> dict[str, Any]:
    """Return what caches of several sizes would have hit, replayed over the access sequence or stretches of it."""
    evaluations, total = accesses.evaluations, len(accesses.slices)
    kept = evaluations if total <= REPLAYED else max(evaluations * REPLAYED // total // BLOCKS, 1) * BLOCKS
    chosen = np.ones(evaluations, np.bool_)
    if kept < evaluations:
        each = kept // BLOCKS
        chosen[:] = False
        for start in np.linspace(0, evaluations - each, BLOCKS).astype(int):
            chosen[start : start + each] = True
    slices = accesses.slices[chosen[accesses.rank]].astype(np.int64)
    distances = replay.stack_distances(slices, n)
    sizes = sorted({max(round(share * n), 1) for share in SHARES}) if total else []
    half = len(slices) // 2
    lfu, belady = replay.lfu_order(slices), replay.belady_order(slices)
    ranking, learned = replay.by_frequency(slices, n), replay.by_frequency(slices[:half], n)
    curve = [
        {
            "slices": size,
            "share": size / n,
            "bytes": round(size * size_bytes / n),
            "lru": lru / len(slices),
            "lfu": int(replay.kept(slices, lfu, n, size).sum()) / len(slices),
            "pinned": int(replay.pinned_hits(slices, ranking, size).sum()) / len(slices),
            "belady": int(replay.kept(slices, belady, n, size).sum()) / len(slices),
            "second_half_lru": late / (len(slices) - half),
            "second_half_pinned": int(replay.pinned_hits(slices, learned, size)[half:].sum()) / (len(slices) - half),
        }
        for size, lru, late in zip(
            sizes, replay.lru_hits(distances, sizes), replay.lru_hits(distances[half:], sizes), strict=True
        )
    ]
    points = np.unique(np.linspace(1, n, min(n, _POINTS)).astype(int)).tolist() if total else []
    return {
        "evaluations": int(np.count_nonzero(chosen)),
        "accesses": len(slices),
        "complete": len(slices) == total,
        "first_accesses": int(np.count_nonzero(distances < 0)),
        "stack_distance": spread(distances[distances >= 0]),
        "curve": curve,
        "lru_curve": {
            "slices": points,
            "hit_rate": [hits / len(slices) for hits in replay.lru_hits(distances, points)],
        },
    }


def _ranked(routing: Routing, selections: Ints, sizes: Ints, costs: Mapping[str, Ints]) -> list[dict[str, Any]]:
    """Return every slice, the most often selected first, equals in order of layer and expert."""
    order = np.argsort(-selections, kind="stable")
    at = np.searchsorted(routing.base, order, side="right") - 1
    totals = np.array([selections[one.base : one.base + one.n_experts].sum() for one in routing.layers], np.int64)
    columns = {
        "rank": np.arange(1, len(order) + 1),
        "layer": np.array([one.number for one in routing.layers], np.int64)[at],
        "expert": order - routing.base[at],
        "selections": selections[order],
        "share": selections[order] / np.maximum(totals[at], 1),
        "bytes": sizes[order],
        **{name: costs[name][order] for name in _COSTS},
    }
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
