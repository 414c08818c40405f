"""Which experts to keep in memory: policies replayed over the choices of a trace, all with the same memory.

The first half of the evaluations warms the caches up, and is what pinning learns from; the second half counts. So the
policies can be compared with each other, and none but the last knows the future.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtraced.analysis import replay
from llmtraced.analysis.routing import Accesses, Layer
from llmtraced.prefetch.experts import HERE, Residency

__all__ = ["BELADY", "HALF_LIVES", "POLICIES", "SIDECAR", "Retention"]

Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]

HALF_LIVES: Final = (8, 64, 512)
"""Tokens after which an access counts half, of the LRFU policies."""

BELADY: Final = "belady"
"""The policy that needs the future."""

SIDECAR: Final = "sidecar"
"""The policy of ``llmtraced prefetch``, its own decisions: :class:`llmtraced.prefetch.experts.Residency`."""

POLICIES: Final = (
    *("lru", "lfu", *(f"lrfu-{life}" for life in HALF_LIVES), "pinned", "half-pinned"),
    *(SIDECAR, BELADY),
)
"""What was used longest ago goes first; what was used least often; what is coldest (a use counts half after so many
tokens); what the first half used most stays and the rest passes through one place; the same with half of the memory and
LRU in the other half; what is worth least by late and by frequent uses; what is needed again last."""


@dataclass(frozen=True)
class Retention:
    """The choices of a trace, ready to be replayed.

    Attributes:
        accesses: one text token an evaluation.
        n: slices there are.
        layers: of which they are.
        warm: the first evaluation that counts.
        orders: by policy, of what :func:`llmtraced.analysis.replay.kept` takes; what depends on the memory is missing.
        ranking: slices, those that the first half used most first.
    """

    accesses: Accesses
    n: int
    layers: Sequence[Layer]
    warm: int
    orders: Mapping[str, Ints]
    ranking: Ints

    @classmethod
    def of(cls, accesses: Accesses, n: int, layers: Sequence[Layer]) -> Retention:
        """Prepare the replays of ``accesses`` to the ``n`` slices of ``layers``."""
        slices, warm = accesses.slices.astype(np.int64), accesses.evaluations // 2
        orders = {"lru": replay.lru_order(slices), "lfu": replay.lfu_order(slices), BELADY: replay.belady_order(slices)}
        when = accesses.rank.astype(np.int64)
        orders |= {f"lrfu-{life}": replay.lrfu_order(slices, when, n, life) for life in HALF_LIVES}
        return cls(accesses, n, layers, warm, orders, replay.by_frequency(slices[accesses.rank < warm], n))

    @property
    def counted(self) -> Bools:
        """Which accesses count."""
        return self.accesses.rank >= self.warm

    def order(self, policy: str, size: int) -> Ints:
        """Return the order of a policy's accesses, in a cache of ``size`` slices."""
        if policy in self.orders:
            return self.orders[policy]
        pinned = np.zeros(self.n, np.bool_)
        pinned[self.ranking[: size - 1 if policy == "pinned" else size // 2]] = True
        return replay.pinned_order(self.accesses.slices.astype(np.int64), pinned)

    def misses(self, policy: str, size: int) -> Bools:
        """Return which accesses miss."""
        if policy == SIDECAR:
            return self._replayed(size)[0]
        return ~replay.kept(self.accesses.slices.astype(np.int64), self.order(policy, size), self.n, size)

    def states(self, policy: str, size: int) -> tuple[Bools, Bools]:
        """Return which accesses miss, and which slices are there as each evaluation begins, ``(evaluations, n)``."""
        if policy == SIDECAR:
            return self._replayed(size)
        starts = np.searchsorted(self.accesses.rank, np.arange(self.accesses.evaluations)).astype(np.int64)
        slices = self.accesses.slices.astype(np.int64)
        hits, states = replay.kept_states(slices, self.order(policy, size), self.n, size, starts)
        return ~hits, states

    def _replayed(self, size: int) -> tuple[Bools, Bools]:
        """Do what :meth:`states` does, by the sidecar's own decisions; each expert it asks for is there at once."""
        width = max(layer.n_experts for layer in self.layers)
        residency = Residency([1] * (width * len(self.layers)), width, size)
        base = np.array([layer.base for layer in self.layers])
        at = np.searchsorted(base, self.accesses.slices, side="right") - 1
        numbers = at * width + self.accesses.slices - base[at]
        missed = np.zeros(len(numbers), np.bool_)
        states = np.zeros((self.accesses.evaluations, self.n), np.bool_)
        place = np.concatenate([i * width + np.arange(layer.n_experts) for i, layer in enumerate(self.layers)])
        cuts = np.flatnonzero(np.diff(self.accesses.rank.astype(np.int64) * len(self.layers) + at)) + 1
        begun = 0
        for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True):
            while begun <= self.accesses.rank[first]:
                states[begun] = np.array(residency.state, np.int8)[place] == HERE
                begun += 1
            residency.token += 1  # so that what this layer uses stays, and nothing else must
            read = set(residency.use(int(at[first]), numbers[first:end].tolist()))
            for one in read:
                residency.arrived(one)
            missed[first:end] = [one in read for one in numbers[first:end].tolist()]
            residency.surplus()
        return missed, states

    def missed_bytes(self, sizes: Ints, size: int) -> dict[str, float]:
        """Return bytes missed per evaluation that counts, by policy; ``sizes`` are those of the slices."""
        slices, counted = self.accesses.slices, self.counted
        each = {policy: sizes[slices[self.misses(policy, size) & counted]].sum() for policy in POLICIES}
        return {policy: float(total) / max(self.accesses.evaluations - self.warm, 1) for policy, total in each.items()}
