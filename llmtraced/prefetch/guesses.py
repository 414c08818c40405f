"""Which experts will be chosen: where guesses come from, and how good each source's are. Pure. Standard library only.

The router itself, and what is put through it, are in :mod:`llmtraced.prefetch.router`; here is what the past says. The
same predictors are measured offline by :mod:`llmtraced.analysis.predictors`.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["DEFAULT", "SOURCES", "SURE", "CoActivation", "LastTokens", "Margin", "Tally"]

SOURCES = ("last", "coactivation", "router-2", "router-1", "attention", "router")
"""Experts of the last tokens; what the layer before has chosen; the layer's router, given the router's input of the
layer two or one before, the input of the layer's attention, or its own input."""

DEFAULT = ("router",)
"""It is certain, and early enough: no other was faster, alone or added (docs/prefetching.md)."""

SURE = {"router-2": 0.95, "router-1": 0.95, "attention": 0.99}
"""Share of a source's guesses that should be right; what it is less sure of is left to others (:class:`Margin`)."""

_WEIGHT = 0.8  # of a use, each token later
_STEP, _DOUBT = 0.1, 1.001


class LastTokens:
    """Of one layer: the experts with the highest sum of uses, one weighing 0.8 of that a token later.

    Args:
        n_experts: of the layer.
        n_used: experts that a token uses.
    """

    def __init__(self, n_experts: int, n_used: int) -> None:
        self._n_used = n_used
        self._scores = [0.0] * n_experts

    def after(self, used: Collection[int]) -> set[int]:
        """Take in what a token uses; return what the next one will probably use."""
        self._scores = [score * _WEIGHT for score in self._scores]
        for one in used:
            self._scores[one] += 1.0
        return _best(self._scores, self._n_used)


class CoActivation:
    """Of two layers, one after the other: how often experts of the later were used with those of the earlier.

    Args:
        n_experts: of each layer.
        n_used: experts that a token uses.
    """

    def __init__(self, n_experts: int, n_used: int) -> None:
        self._n_used = n_used
        self._counts = [array("L", bytes(8 * n_experts)) for _ in range(n_experts)]
        self._uses = [0] * n_experts

    def learn(self, before: Collection[int], then: Collection[int]) -> None:
        """Take in what a token used in both layers."""
        for one in before:
            self._uses[one] += 1
            counts = self._counts[one]
            for other in then:
                counts[other] += 1

    def after(self, before: Collection[int]) -> set[int]:
        """Return what the later layer will probably use: the highest sums of P(it | one that the earlier used)."""
        known = [one for one in before if self._uses[one]]
        if not known:
            return set()
        weights = [1.0 / self._uses[one] for one in known]
        rows = [self._counts[one] for one in known]
        scores = [sum(w * n for w, n in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
        return _best(scores, self._n_used)


def _best(scores: list[float], count: int) -> set[int]:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return {one for one in order[:count] if scores[one] > 0}


class Margin:
    """How much more than the best expert that is not guessed one must score, so that enough of the guesses are right.

    A guess that was wrong raises it, one that was right lowers it, by as much less as it should be less rare: where the
    share of the right ones is ``share`` both are in balance (Robbins and Monro 1951). No scale of scores is assumed.

    Args:
        share: of the guesses that should be right.

    Attributes:
        least: the margin.
    """

    def __init__(self, share: float) -> None:
        self.least = self._floor = 0.0
        self._down = 1 + _STEP * (1 - share) / share

    def begin(self, gap: float) -> None:
        """Take in by how much the best of a layer's experts exceeds the best that is not guessed, the first time."""
        if not self._floor:
            self.least, self._floor = gap / 2, gap / 100

    def learn(self, right: int, wrong: int) -> None:
        """Take in how many of a layer's guesses were right and wrong; if there was none, the margin may be too high."""
        up, down = (1 + _STEP) ** wrong, self._down**right if right or wrong else _DOUBT
        self.least = max(self.least * up / down, self._floor)


class Tally:
    """How good the guesses of one source are.

    Attributes:
        guessed, right: experts that were guessed; those of them that were then chosen.
        read, useful: bytes that were read for a guess; those of them whose expert was then chosen.
        layers, ahead_ns: guesses that were compared, a layer each; sum of the times from guess to use.
    """

    def __init__(self) -> None:
        self.guessed = self.right = self.read = self.useful = self.layers = self.ahead_ns = 0
        self._open: dict[int, tuple[Collection[int], Mapping[int, int], int]] = {}

    def made(self, layer: int, experts: Collection[int], read: Mapping[int, int], ts: int) -> None:
        """Take in a guess: the experts, the bytes of those that are read for it, and when (ns)."""
        self._open[layer] = experts, read, ts

    def judge(self, layer: int, used: Collection[int], ts: int) -> tuple[int, int]:
        """Take in what the layer uses, as of ``ts`` (ns); return how many guesses were right and wrong."""
        found = self._open.pop(layer, None)
        if found is None:
            return 0, 0
        experts, read, made = found
        right = sum(one in used for one in experts)
        self.layers += 1
        self.guessed += len(experts)
        self.right += right
        self.read += sum(read.values())
        self.useful += sum(nbytes for one, nbytes in read.items() if one in used)
        self.ahead_ns += ts - made
        return right, len(experts) - right

    def forget(self) -> None:
        """Forget guesses that were not compared: the graph is over."""
        self._open.clear()

    def summary(self, missing: int) -> dict[str, Any]:
        """Return the figures; ``missing``: bytes that were chosen and not in memory, whoever guessed them or nobody."""
        return {
            "layers": self.layers,
            "right": self.right / self.guessed if self.guessed else None,
            "read_bytes": self.read,
            "precision": self.useful / self.read if self.read else None,
            "recall": self.useful / missing if missing else None,
            "mean_ahead_s": self.ahead_ns / self.layers / 1e9 if self.layers else None,
        }
