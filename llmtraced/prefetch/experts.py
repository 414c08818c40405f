"""Which experts of a mixture to keep in memory: pure decisions, no system calls. Standard library only.

An *expert* here is one of a layer: its slices of that layer's merged matrices, a few megabytes, used together. Which
ones a token uses is known only as it goes; but some are used more often than others, and what was used is used again
soon. So each has a *heat*: a count of its uses in which one counts half after some tokens (LRFU: Lee et al., IEEE
Transactions on Computers 50(12), 2001; between LFU, a long half-life, and LRU, a short one). The coldest goes first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

__all__ = ["ABSENT", "COMING", "HALF_LIFE", "HERE", "Residency"]

ABSENT, COMING, HERE = 0, 1, 2

HALF_LIFE = 8.0
"""Tokens after which a use counts half."""

_COLD = -math.inf


class Residency:
    """Which experts are in memory, should come, and should go.

    Args:
        nbytes: of each expert.
        capacity: bytes that may be in memory.
        half_life: tokens after which a use counts half.

    Attributes:
        state: of each expert: ABSENT, COMING (asked for) or HERE.
        held: bytes of those that are not ABSENT.
        used, late, missed, wasted: bytes that were here when they were chosen; coming; not even asked for; and those
            that went without having been used since they came.
    """

    def __init__(self, nbytes: list[int], capacity: int, half_life: float = HALF_LIFE) -> None:
        self.nbytes, self.capacity, self._half = nbytes, capacity, half_life
        self.state = [ABSENT] * len(nbytes)
        self.held = 0
        self.used = self.late = self.missed = self.wasted = 0
        self._heat = [_COLD] * len(nbytes)  # log2 of the count, as of token 0: so it need not be touched to decay
        self._fresh: set[int] = set()  # came, and not used since
        self._kept: dict[int, int] = {}  # may not go before a token
        self._order: list[tuple[float, int]] = []  # a heap of heat and expert; entries whose heat is old are skipped
        self.token = 0

    def adopt(self, experts: Iterable[int]) -> None:
        """Take in that these are in memory."""
        for one in experts:
            if self.state[one] == ABSENT:
                self._come(one, HERE)

    def use(self, experts: Iterable[int]) -> list[int]:
        """Take in that these have been chosen; return which to read, at once. They may not go during this token."""
        read = []
        for one in experts:
            heat, now = self._heat[one], self.token / self._half
            self._heat[one] = now if heat == _COLD else now + math.log2(1 + 2 ** (heat - now))
            self._kept[one] = self.token
            self._fresh.discard(one)
            if self.state[one] == HERE:
                self.used += self.nbytes[one]
            elif self.state[one] == COMING:
                self.late += self.nbytes[one]
            else:
                self.missed += self.nbytes[one]
                self._come(one, COMING)
                self._fresh.discard(one)
                read.append(one)
                continue
            heapq.heappush(self._order, (self._heat[one], one))
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
        """Return the experts that must go so that ``room`` bytes are free: the coldest; they are gone from now on."""
        go: list[int] = []
        kept: list[tuple[float, int]] = []
        while self.held > self.capacity - room and self._order:
            entry = heapq.heappop(self._order)
            heat, one = entry
            if self.state[one] != HERE or heat != self._heat[one]:
                if self.state[one] == COMING and heat == self._heat[one]:
                    kept.append(entry)
                continue
            if self._kept.get(one, -1) >= self.token:
                kept.append(entry)
                continue
            self.gone(one)
            go.append(one)
        for entry in kept:
            heapq.heappush(self._order, entry)
        return go

    def present(self) -> list[int]:
        """Return the experts that are here."""
        return [one for one, state in enumerate(self.state) if state == HERE]

    def hottest(self) -> list[int]:
        """Return the experts that were ever used, hottest first."""
        return sorted((i for i, h in enumerate(self._heat) if h != _COLD), key=lambda i: -self._heat[i])

    def _come(self, one: int, state: int) -> None:
        self.state[one] = state
        self.held += self.nbytes[one]
        self._fresh.add(one)
        heapq.heappush(self._order, (self._heat[one], one))
