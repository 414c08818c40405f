"""The experts that were chosen, as arrays: how often, how evenly, how soon again.

A *slice* is one expert of one layer: its part of each merged tensor of the layer. Slices are numbered layer by layer,
in the order of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.trace import Trace, collect

__all__ = ["Accesses", "Gaps", "Layer", "Routing", "chance", "load", "spread", "use"]

Ints: TypeAlias = NDArray[np.int64]

POINTS: Final = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with experts: ``slice_bytes`` is the size of one expert over all merged tensors; ``base`` its slice 0."""

    number: int
    n_experts: int
    slice_bytes: int
    base: int


@dataclass(frozen=True)
class Routing:
    """The ``routing`` table: a row a layer and position, sorted by graph evaluation, layer and position.

    Attributes:
        layers: the layers with experts, in order.
        n: slices in all.
        token: int64, number of the graph evaluation.
        at: int64, index into ``layers``.
        decode: bool, whether the row is of phase decode.
        chosen: int32, rows by the most experts that any row has, ascending; -1 fills rows that have fewer.
        strays: ids that the model's tensors do not have; they are left out.
    """

    layers: tuple[Layer, ...]
    n: int
    token: Ints
    at: Ints
    decode: NDArray[np.bool_]
    chosen: NDArray[np.int32]
    strays: int

    @property
    def base(self) -> NDArray[np.int32]:
        """The first slice of each layer."""
        return np.array([layer.base for layer in self.layers], np.int32)

    def rows(self, which: NDArray[np.bool_]) -> Routing:
        """Return only some rows; itself when these are all."""
        if which.all():
            return self
        return replace(
            self, token=self.token[which], at=self.at[which], decode=self.decode[which], chosen=self.chosen[which]
        )

    def ranked(self) -> tuple[Ints, Ints]:
        """Return the graph evaluations in order, and for each row which of them it is of."""
        new = _new(self.token)
        return self.token[new], np.cumsum(new) - 1

    @cached_property
    def selections(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """For every selection, its row and its slice."""
        chosen = self.chosen >= 0
        slices = (self.chosen + self.base[self.at][:, None])[chosen]
        return np.repeat(np.arange(len(self.token), dtype=np.int32), np.count_nonzero(chosen, axis=1)), slices


@dataclass(frozen=True)
class Accesses:
    """One access for each slice that a graph evaluation needs, in order: by evaluation, layer and expert.

    However many positions of a batch choose an expert, its matrices are gone through once. ggml does that in order of
    the experts' numbers.

    Attributes:
        evaluations: how many there are.
        heard: int64, in how many of them each layer chose.
        rank: int32, the evaluation, from 0.
        slices: int32.
    """

    evaluations: int
    heard: Ints
    rank: NDArray[np.int32]
    slices: NDArray[np.int32]

    @classmethod
    def of(cls, routing: Routing) -> Accesses:
        """Return what the rows of ``routing`` access."""
        tokens, rank = routing.ranked()
        row, slices = routing.selections
        at = rank.astype(np.int32)[row]
        first = _new(rank * len(routing.layers) + routing.at)
        twice = (routing.chosen[:, 1:] == routing.chosen[:, :-1]) & (routing.chosen[:, 1:] >= 0)
        if not first.all() or twice.any():  # a batch: its positions have experts in common
            keys = at * np.int64(routing.n) + slices
            keys.sort()
            keys = keys[_new(keys)]
            at = (keys // routing.n).astype(np.int32)
            slices = (keys - at * np.int64(routing.n)).astype(np.int32)
        return cls(len(tokens), np.bincount(routing.at[first], minlength=len(routing.layers)), at, slices)


def load(trace: Trace, phase: str | None, layers: Sequence[Layer]) -> Routing:
    """Read the routing of ``phase``, only of ``layers``; these have to be numbered from slice 0 without gaps."""
    table = collect(
        trace.table("routing", phase)
        .filter(pl.col("layer").is_in([layer.number for layer in layers]))
        .select("token", "layer", "position", pl.col("experts").list.drop_nulls(), decode=pl.col("phase") == "decode")
    ).sort("token", "layer", "position")
    many = table["experts"].list.len().fill_null(0).to_numpy()
    chosen = np.full((table.height, int(many.max()) if len(many) else 0), -1, np.int32)
    chosen[np.arange(chosen.shape[1]) < many[:, None]] = table["experts"].explode().drop_nulls().to_numpy()
    numbers = np.array([layer.number for layer in layers], np.int64)
    at = np.searchsorted(numbers, table["layer"].to_numpy()).astype(np.int64)
    limit = np.array([layer.n_experts for layer in layers], np.int32)[at][:, None]
    stray = (chosen >= limit) | (chosen < -1)
    chosen[stray] = -1
    chosen.sort(axis=1)
    return Routing(
        layers=tuple(layers),
        n=sum(layer.n_experts for layer in layers),
        token=table["token"].to_numpy().astype(np.int64),
        at=at,
        decode=table["decode"].fill_null(False).to_numpy(),
        chosen=chosen,
        strays=int(np.count_nonzero(stray)),
    )


def _new(ordered: Ints) -> NDArray[np.bool_]:
    """Return where a value of an ordered array is not the one before it."""
    return np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]


def use(selections: Ints, rows: int) -> dict[str, Any]:
    """Return how evenly a layer's experts were used.

    ``variation`` is the coefficient of variation of the experts' probabilities: the variance of their selections less
    the binomial one that equally likely experts would have in so few tokens, 0 where that explains it.

    Args:
        selections: of each expert.
        rows: text tokens that chose.
    """
    n, total = len(selections), int(selections.sum())
    ranked = np.sort(selections)
    used = selections[selections > 0] / max(total, 1)
    share = total / (rows * n) if total else 0.0  # of the text tokens that choose a given expert, if all are equal
    by_chance = rows * share * (1 - share)
    excess = ((selections - total / max(n, 1)) ** 2).sum() / max(n - 1, 1) - by_chance
    tenth = max(round(n / 10), 1)
    return {
        "used": len(used),
        "never_used": n - len(used),
        "used_share": len(used) / n if n else None,
        "hottest_share": float(ranked[-1] / total) if total else None,
        "top_tenth_share": float(ranked[-tenth:].sum() / total) if total else None,
        "entropy": float(-(used * np.log(used)).sum() / np.log(n)) if total and n > 1 else None,
        "gini": float(2 * (np.arange(1, n + 1) * ranked).sum() / (n * total) - (n + 1) / n) if total else None,
        "variation": math.sqrt(max(excess, 0)) * n / total if total and n > 1 else None,
    }


@dataclass(frozen=True)
class Gaps:
    """Every access with its reuse distance in graph evaluations, sorted by slice and evaluation.

    Attributes:
        slices: int32.
        rank: int32, the evaluation.
        gap: int32, 1: chosen in the evaluation before as well, 2: in the one before that; 0: for the first time.
    """

    slices: NDArray[np.int32]
    rank: NDArray[np.int32]
    gap: NDArray[np.int32]

    @classmethod
    def of(cls, accesses: Accesses) -> Gaps:
        """Return the reuse distances of ``accesses``."""
        span = max(accesses.evaluations, 1)
        keys = accesses.slices.astype(np.int64) * span + accesses.rank
        keys.sort()
        slices = (keys // span).astype(np.int32)
        rank = (keys - slices.astype(np.int64) * span).astype(np.int32)
        gap = np.zeros(len(keys), np.int32)
        gap[1:] = (rank[1:] - rank[:-1]) * (slices[1:] == slices[:-1])
        return cls(slices, rank, gap)

    def repeats(self, n: int, within: int) -> tuple[Ints, Ints]:
        """Return, by slice, the accesses that repeat one of the ``within`` evaluations before, and those that could.

        Those that could: of evaluations that have so many before them.
        """
        could = self.rank >= within
        did = could & (self.gap > 0) & (self.gap <= within)
        return np.bincount(self.slices[did], minlength=n), np.bincount(self.slices[could], minlength=n)


def chance(accesses: Ints, evaluations: int, within: int) -> float | None:
    """Return the share of repeats within so many evaluations if each chose independently of the ones before.

    Args:
        accesses: of each expert of a layer.
        evaluations: in which the layer chose. Of the others, ``(accesses - 1) / (evaluations - 1)`` chose the expert:
            leaving out the one that is looked at keeps a short trace from flattering the guess.
        within: the evaluations before that count as a repeat.
    """
    total = int(accesses.sum())
    if evaluations < 2 or not total:
        return None
    other = np.clip((accesses - 1) / (evaluations - 1), 0, 1)
    return float((accesses * (1 - (1 - other) ** within)).sum() / total)


def spread(values: NDArray[Any]) -> dict[str, float | None]:
    """Return mean, p50, p90, p99 (interpolated linearly) and max; None of nothing."""
    if not len(values):
        return {"mean": None, **{f"p{point}": None for point in POINTS}, "max": None}
    points = np.percentile(values, POINTS)
    return {
        "mean": float(values.mean()),
        **{f"p{point}": float(value) for point, value in zip(POINTS, points, strict=True)},
        "max": float(values.max()),
    }
