"""Which experts are chosen together: in one layer, and by one layer after another.

The second is what a prefetcher may use: given the experts of this layer, which will the next one choose? That is
measured as such a guess would be made, learned from the first half of the trace and tried on the second.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtraced.analysis.routing import Layer, Routing

__all__ = ["COUNTED", "PAIRS", "PRIOR", "coactivation", "guesses"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

PAIRS: Final = 5
"""Pairs that are named for each layer."""

PRIOR: Final = 8.0
"""Selections that a guess is worth before anything is known of an expert: it begins as the plain frequencies."""

COUNTED: Final = 10_000
"""Graph evaluations that are counted, at most; of a longer trace every second, third, … evenly."""

_RECALLS: Final = ("recall", "frequency_recall", "recall_double", "frequency_recall_double")
_TRIED: Final = 2_000  # rows of the second half that guesses are tried on, for each layer, spread evenly
_ROWS: Final = 100_000  # counted at once


def coactivation(routing: Routing) -> dict[str, Any]:
    """Return ``pairs`` (experts of one layer), ``transitions`` (layer to layer) and the mean recalls over them."""
    tokens, rank = routing.ranked()
    if len(tokens) > COUNTED:
        some = np.zeros(len(tokens), np.bool_)
        some[np.linspace(0, len(tokens) - 1, COUNTED).astype(np.int64)] = True
        routing = routing.rows(some[rank])
        tokens, rank = routing.ranked()
    evaluations = len(tokens)
    of = [np.flatnonzero(routing.at == i) for i in range(len(routing.layers))]
    pairs: list[dict[str, Any]] = []
    transitions: list[dict[str, Any]] = []
    for layer, rows in zip(routing.layers, of, strict=True):
        pairs += _pairs(layer, routing.chosen[rows])
    for (here, rows), (there, after) in pairwise(zip(routing.layers, of, strict=True)):
        counts = [np.bincount(rank[some], minlength=evaluations) for some in (rows, after)]
        alike = counts[0] == counts[1]  # the last layer computes only positions with outputs: others have no partner
        first, second = rows[alike[rank[rows]]], after[alike[rank[after]]]
        late = rank[first] >= evaluations / 2
        found = _transition(here, there, routing.chosen[first], routing.chosen[second], late)
        if found:
            transitions.append(found)
    means = {
        name: float(np.mean(values))
        if (values := [one[name] for one in transitions if one[name] is not None])
        else None
        for name in _RECALLS
    }
    return {"evaluations": evaluations, "pairs": pairs, "transitions": transitions, **means}


def _pairs(layer: Layer, chosen: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Return the pairs of a layer's experts that were chosen together most beyond what their frequencies explain."""
    n = layer.n_experts
    alone = _count(chosen, n)
    together = np.triu(_joint(chosen, chosen, n, n), 1)
    return [
        {"layer": layer.number, "expert": a, "other": b} | found
        for a, b, found in _surprises(together, np.outer(alone, alone), len(chosen))
    ]


def _transition(
    here: Layer, there: Layer, first: NDArray[np.int32], second: NDArray[np.int32], late: NDArray[np.bool_]
) -> dict[str, Any] | None:
    """Return how well ``here``'s experts tell those of ``there``; ``late`` rows are those of the second half."""
    if not len(first):
        return None
    n, m = here.n_experts, there.n_experts
    joint = _joint(first[~late], second[~late], n, m)
    recalls: dict[str, float | None] = dict.fromkeys(_RECALLS)
    if 0 < np.count_nonzero(late) < len(late):
        frequency = _count(second[~late], m) / np.count_nonzero(~late)
        guess = _learned(joint, first[~late], frequency)
        tried = np.flatnonzero(late)
        tried = tried[np.unique(np.linspace(0, len(tried) - 1, min(_TRIED, len(tried))).astype(np.int64))]
        score = _applied(guess, first[tried])
        k = second.shape[1]
        for suffix, top in (("", k), ("_double", 2 * k)):
            recalls[f"recall{suffix}"] = _recall(score, second[tried], top)
            recalls[f"frequency_recall{suffix}"] = _recall(frequency[None, :], second[tried], top)
    joint += _joint(first[late], second[late], n, m)
    alone = np.outer(_count(first, n), _count(second, m))
    follows = [
        {"expert": a, "next_expert": b, "probability": found["count"] / np.count_nonzero(first == a)} | found
        for a, b, found in _surprises(joint, alone, len(first))
    ]
    return {"layer": here.number, "next_layer": there.number, **recalls, "follows": follows}


def guesses(first: NDArray[np.int32], second: NDArray[np.int32], n: int, m: int, learn: NDArray[np.bool_]) -> Floats:
    """Return how likely each of one layer's ``m`` experts is by what an earlier one of ``n`` chose, ``(rows, m)``.

    Args:
        first: experts of the earlier layer, a row a text token; -1: none.
        second: of the later one.
        n: experts of the earlier layer.
        m: experts of the later layer.
        learn: the rows that this is learned from.
    """
    frequency = _count(second[learn], m) / max(int(np.count_nonzero(learn)), 1)
    joint = _joint(first[learn], second[learn], n, m)
    return _applied(_learned(joint, first[learn], frequency), first)


def _learned(joint: Ints, first: NDArray[np.int32], frequency: Floats) -> Floats:
    """Return P(expert of the later layer | expert of the earlier one), begun with the plain frequencies."""
    learned: Floats = (joint + PRIOR * frequency) / (_count(first, len(joint)) + PRIOR)[:, None]
    return learned


def _applied(learned: Floats, first: NDArray[np.int32]) -> Floats:
    """Return the sum of the rows of ``learned`` for each row of experts."""
    return np.vstack([learned, np.zeros(learned.shape[1])])[first].sum(axis=1)  # type: ignore[no-any-return]


def _surprises(together: Ints, product: Ints, rows: int) -> list[tuple[int, int, dict[str, Any]]]:
    """Return the :data:`PAIRS` pairs with most rows beyond expectation (``product`` of their counts / ``rows``)."""
    if not rows:
        return []
    expected = product / rows
    excess = np.where(together > 0, together - expected, 0)
    best = np.argsort(-excess, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(a), int(b)) for a, b in zip(*np.unravel_index(best, excess.shape), strict=True)]
    return [
        (a, b, {"count": int(together[a, b]), "expected": mean, "lift": float(together[a, b] / mean)})
        for a, b in pairs
        if excess[a, b] > 0 and (mean := float(expected[a, b]))
    ]


def _recall(score: Floats, actual: NDArray[np.int32], top: int) -> float | None:
    """Return the share of ``actual`` (rows of experts) in the ``top`` of its row of ``score``, or of the only row."""
    wanted = int(np.count_nonzero(actual >= 0))
    if not wanted:
        return None
    if top >= score.shape[1]:
        return 1.0
    untied = np.arange(score.shape[1]) * 1e-12 - score  # of equals the first
    ranked = np.argpartition(untied, top - 1, axis=1)[:, :top]
    guessed = np.zeros((len(score), score.shape[1] + 1), np.bool_)
    np.put_along_axis(guessed, ranked, True, axis=1)  # the last column, which is -1's, stays False
    guessed = np.broadcast_to(guessed, (len(actual), guessed.shape[1]))
    return int(np.take_along_axis(guessed, actual.astype(np.int64), axis=1).sum()) / wanted


def _count(chosen: NDArray[np.int32], n: int) -> Ints:
    return np.bincount(chosen[chosen >= 0], minlength=n)


def _joint(first: NDArray[np.int32], second: NDArray[np.int32], n: int, m: int) -> Ints:
    """Return in how many rows each expert of ``first`` was chosen with each of ``second``: ``n`` by ``m``."""
    total = np.zeros((n + 1) * (m + 1), np.int64)
    for start in range(0, len(first), _ROWS):
        a, b = first[start : start + _ROWS] + 1, second[start : start + _ROWS] + 1  # 0: no expert
        total += np.bincount((a[:, :, None] * (m + 1) + b[:, None, :]).ravel(), minlength=len(total))
    return total.reshape(n + 1, m + 1)[1:, 1:]
