"""Which experts each token chose, layer by layer: how many different ones, and how many of the token before's again."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any, Final, TypedDict

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.trace import Trace, collect

__all__ = ["Choices", "LayerChoices", "chance_overlap", "choices"]

Ints = NDArray[np.int64]

_ROWS: Final = 400_000
_LOW: Final = (1 << 32) - 1


class LayerChoices(TypedDict):
    """One layer's choices, compared between each token and the one before it.

    ``overlap`` is the mean Jaccard index: experts in both over experts in either. None: there was nothing to compare.
    """

    layer: int
    n_experts: int | None  # in the model; None: the tensor map has no merged experts in this layer
    chosen: float  # different experts a token, mean
    pairs: int  # tokens that could be compared with the one before
    overlap: float | None
    identical_share: float | None  # pairs whose choices are the same set
    chance_overlap: float | None  # what equally likely, independent choices of that many would give


@dataclass(frozen=True)
class Choices:
    """What the table ``routing`` says.

    Attributes:
        keys: ``token << 16 | layer`` of each choice, ascending.
        distinct: how many different experts each of them names, over all positions of the batch.
        overlaps: ``token``, and ``expert_overlap``: its layers' mean overlap with the token before.
        layers: per layer, of the tokens that were compared.
    """

    keys: Ints
    distinct: Ints
    overlaps: pl.DataFrame
    layers: list[LayerChoices]

    def count(self, token: Ints, layer: Ints) -> Ints:
        """Return how many different experts each token chose in that layer; 0 where the trace does not say."""
        if not len(self.keys):
            return np.zeros(len(token), np.int64)
        wanted = token << 16 | (layer & 0xFFFF)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.distinct[at], 0)


def chance_overlap(chosen: int, n_experts: int) -> float:
    """Return the mean Jaccard index of two independent, equally likely choices of ``chosen`` from ``n_experts``."""
    ways = comb(n_experts, chosen)
    return sum(
        comb(chosen, both) * comb(n_experts - chosen, chosen - both) / ways * both / (2 * chosen - both)
        for both in range(1, chosen + 1)
    )


def choices(trace: Trace, phase: str | None, compared: str | None) -> Choices:
    """Return the choices of ``phase`` (None: all); successive tokens are compared within ``compared`` (None: all).

    Two tokens are successive when their numbers are and the trace has both choices in that layer.
    """
    tally = _Tally()
    keys: list[Ints] = []
    distinct: list[Ints] = []
    overlaps: list[pl.DataFrame] = []
    held: pl.DataFrame | None = None
    before = 0  # the last token that was counted; its choices are kept for the next one's comparison
    for piece in trace.slices("routing", phase, rows=_ROWS):
        wanted = piece.filter(pl.col("token") > 0, pl.col("layer") >= 0)
        rows = collect(wanted.select("token", "phase", "layer", "experts"))
        held = rows if held is None else pl.concat([held, rows])
        newest = held["token"].max() if held.height else None
        if isinstance(newest, int):  # records of the newest tokens may be in the next piece
            before = tally.add(held.filter(pl.col("token") < newest - 1), compared, before, keys, distinct, overlaps)
            held = held.filter(pl.col("token") >= min(before, newest - 1))
    if held is not None and held.height:
        tally.add(held, compared, before, keys, distinct, overlaps)
    joined = np.concatenate(keys) if keys else np.zeros(0, np.int64)
    order = np.argsort(joined, kind="stable")
    shared = pl.concat([_OVERLAPS, *overlaps])
    return Choices(
        joined[order],
        np.concatenate(distinct)[order] if distinct else joined,
        shared,
        tally.layers(_experts_by_layer(trace)),
    )


_OVERLAPS: Final = pl.DataFrame(schema={"token": pl.Int32, "expert_overlap": pl.Float64})


class _Tally:
    """Sums per layer over all pieces: tokens, experts chosen, pairs, overlap, identical pairs."""

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}

    def add(
        self,
        rows: pl.DataFrame,
        compared: str | None,
        before: int,
        keys: list[Ints],
        distinct: list[Ints],
        overlaps: list[pl.DataFrame],
    ) -> int:
        """Count the tokens after ``before``, append what they chose, and return the last token that was counted."""
        if not rows.height or int(rows["token"].max()) <= before:  # type: ignore[arg-type]
            return before
        phases = rows.group_by("token").agg(pl.col("phase").first().cast(pl.String)).sort("token")
        tokens = phases["token"].to_numpy().astype(np.int64)
        counted = tokens > before
        comparable = np.full(len(tokens), True) if compared is None else (phases["phase"] == compared).to_numpy()
        follows = np.zeros(len(tokens), bool)
        follows[1:] = (np.diff(tokens) == 1) & comparable[1:] & comparable[:-1] & counted[1:]
        layers, now, shared = _matrices(rows, tokens)

        last = np.zeros_like(now)
        last[:, 1:] = now[:, :-1]
        paired = follows & (now > 0) & (last > 0)
        overlap = np.where(paired, shared / np.maximum(now + last - shared, 1), 0.0)
        same = paired & (shared == now) & (shared == last)
        used = (now > 0) & comparable & counted
        sums = [used.sum(1), np.where(used, now, 0).sum(1), paired.sum(1), overlap.sum(1), same.sum(1)]
        for layer, row in zip(layers.tolist(), np.stack(sums, axis=1).astype(np.float64), strict=True):
            self._sums[layer] = self._sums.get(layer, np.zeros(len(sums))) + row

        pairs = paired.sum(0)
        some = pairs > 0
        mean = overlap.sum(0)[some] / pairs[some]
        overlaps.append(pl.DataFrame({"token": tokens[some].astype(np.int32), "expert_overlap": mean}))
        where = np.nonzero((now > 0) & counted)
        keys.append(tokens[where[1]] << 16 | layers[where[0]])
        distinct.append(now[where])
        return int(tokens[-1])

    def layers(self, n_experts: dict[int, int]) -> list[LayerChoices]:
        found: list[LayerChoices] = []
        for layer, (tokens, chosen, pairs, overlap, same) in sorted(self._sums.items()):
            if not tokens:
                continue
            mean, of = float(chosen / tokens), n_experts.get(layer)
            found.append(
                {
                    "layer": layer,
                    "n_experts": of,
                    "chosen": mean,
                    "pairs": int(pairs),
                    "overlap": float(overlap / pairs) if pairs else None,
                    "identical_share": float(same / pairs) if pairs else None,
                    "chance_overlap": chance_overlap(round(mean), of) if of and 0 < round(mean) <= of else None,
                }
            )
        return found


def _matrices(rows: pl.DataFrame, tokens: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the layers, and by layer and token: different experts chosen, and how many the token before chose too."""
    flat = rows.select("token", "layer", "experts").explode("experts").drop_nulls()
    token, layer, expert = (flat[name].to_numpy().astype(np.int64) for name in ("token", "layer", "experts"))
    layers = np.unique(layer)
    # One number for layer, expert and token in this order: the same expert at the next token is the next number.
    numbers = np.sort(np.searchsorted(layers, layer) << 48 | expert << 32 | np.searchsorted(tokens, token))
    step = np.diff(numbers, prepend=-2)  # 0: the same choice at another position of the batch
    again = step[step > 0] == 1
    numbers = numbers[step > 0]  # np.unique is eight times slower here: it hashes
    cell = (numbers >> 48) * len(tokens) + (numbers & _LOW)
    shape = (len(layers), len(tokens))
    now = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    shared = np.bincount(cell[again], minlength=shape[0] * shape[1]).reshape(shape)
    return layers, now, shared


def _experts_by_layer(trace: Trace) -> dict[int, int]:
    merged = trace.tensors.filter(pl.col("n_experts") > 0).group_by("layer").agg(pl.col("n_experts").max())
    rows: list[Any] = merged.rows()
    return {int(layer): int(count) for layer, count in rows}
