"""Which experts of a mixture to keep in memory: pure decisions, no system calls. Standard library only.

An *expert* here is one of a layer: its slices of that layer's merged matrices, a few megabytes, used together. Which
ones a token uses is known only as it goes; but some are used more often than others, and what was used is used again
soon. So each has a *worth*: its uses, of which one counts half after 2 tokens, and a 64th of its uses, of which one
counts half after 64. The first is what was used lately, the second what is used often; the least worth goes first.
(Counts that decay: LRFU, Lee et al., IEEE Transactions on Computers 50(12), 2001. Why two: docs/experts.md.)

Tokens are counted by layer: an expert that its layer's last evaluation did not use is one token older than one that
it used, whether that evaluation was in this token or, for layers that are still to come, in the last.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

__all__ = ["ABSENT", "COMING", "HERE", "Residency"]

ABSENT, COMING, HERE = 0, 1, 2

_LATELY, _OFTEN = 0.5 ** (1 / 2), 0.5 ** (1 / 64)  # what is left of a use a token later
_SHARE = 1 / 64


class Residency:
    """Which experts are in memory, should come, and should go.

    Args:
        nbytes: of each expert, layer by layer.
        n_experts: of a layer.
        capacity: bytes that may be in memory.

    Attributes:
        state: of each expert: ABSENT, COMING (asked for) or HERE.
        held: bytes of those that are not ABSENT.
        used, late, missed, wasted: bytes that were here when they were used; coming; not even asked for; and those
            that went without having been used since they came.
        token: counts the graphs; what is used or expected may not go before it has changed.
    """

    def __init__(self, nbytes: list[int], n_experts: int, capacity: int) -> None:
        self.nbytes, self.n_experts, self.capacity = nbytes, n_experts, capacity
        self.state = [ABSENT] * len(nbytes)
        self.held = 0
        self.used = self.late = self.missed = self.wasted = 0
        self._lately, self._often = [0.0] * len(nbytes), [0.0] * len(nbytes)
        self._fresh: set[int] = set()  # came, and not used since
        self._kept: dict[int, int] = {}  # may not go before a token
        # By layer, worth and expert, ascending: of those that are not ABSENT, and of some that were gone since.
        self._order: list[list[tuple[float, int]]] = [[] for _ in range(len(nbytes) // n_experts)]
        self.token = 0

    def worth(self, one: int) -> float:
        """Return what keeping an expert is worth: about how often a token will use it."""
        return self._lately[one] + _SHARE * self._often[one]

    def adopt(self, experts: Iterable[int]) -> None:
        """Take in that these are in memory."""
        for one in experts:
            if self.state[one] == ABSENT:
                self._come(one, HERE)

    def use(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Take in what a layer uses; return which to read, at once. They may not go during this token."""
        first, end = layer * self.n_experts, (layer + 1) * self.n_experts
        self._lately[first:end] = [_LATELY * count for count in self._lately[first:end]]
        self._often[first:end] = [_OFTEN * count for count in self._often[first:end]]
        read = []
        for one in experts:
            self._lately[one] += 1
            self._often[one] += 1
            self._kept[one] = self.token
            if self.state[one] == HERE:
                self.used += self.nbytes[one]
            elif self.state[one] == COMING:
                self.late += self.nbytes[one]
            else:
                self.missed += self.nbytes[one]
                self._come(one, COMING)
                read.append(one)
            self._fresh.discard(one)
        self._order[layer] = sorted((self.worth(one), one) for one in range(first, end) if self.state[one] != ABSENT)
        return read

    def expect(self, experts: Iterable[int]) -> list[int]:
        """Take in that these will probably be chosen next; return which to read. They may not go during this token."""
        read = []
        for one in experts:
            self._kept[one] = self.token
            if self.state[one] == ABSENT:
                self._come(one, COMING)
                read.append(one)
        return read

    def arrived(self, one: int) -> None:
        """Take in that an expert has been read."""
        if self.state[one] == COMING:
            self.state[one] = HERE

    def gone(self, one: int) -> None:
        """Take in that an expert is not in memory (any more)."""
        if self.state[one] != ABSENT:
            self.state[one] = ABSENT
            self.held -= self.nbytes[one]
            if one in self._fresh:
                self._fresh.discard(one)
                self.wasted += self.nbytes[one]

    def surplus(self, room: int = 0) -> list[int]:
        """Return which must go so that ``room`` bytes are free: those worth the least; they are gone from now on."""
        go: list[int] = []
        stay: list[tuple[float, int]] = []
        while self.held > self.capacity - room:
            order = min((order for order in self._order if order), key=lambda order: order[0], default=None)
            if order is None:
                break
            entry = order.pop(0)
            one = entry[1]
            if self.state[one] == ABSENT:
                continue
            if self.state[one] == COMING or self._kept.get(one, -1) >= self.token:
                stay.append(entry)
                continue
            self.gone(one)
            go.append(one)
        for entry in stay:
            insort(self._order[entry[1] // self.n_experts], entry)
        return go

    def present(self) -> list[int]:
        """Return the experts that are here."""
        return [one for one, state in enumerate(self.state) if state == HERE]

    def hottest(self) -> list[int]:
        """Return the experts that were ever used, those that are worth the most first."""
        return sorted((one for one, count in enumerate(self._often) if count), key=self.worth, reverse=True)

    def _come(self, one: int, state: int) -> None:
        self.state[one] = state
        self.held += self.nbytes[one]
        self._fresh.add(one)
        insort(self._order[one // self.n_experts], (self.worth(one), one))
