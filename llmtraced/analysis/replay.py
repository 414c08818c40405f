"""Replay a sequence of accesses through a cache: what would LRU, LFU, pinning and Belady's optimum have hit?

Pure functions over numpy arrays. An access is the number of a *slice*, 0 to ``n - 1``; all slices count as equally
large, a cache holds ``size`` of them, begins empty, and has to take in what is missed (an expert cannot be used without
being in memory). So no policy here beats :func:`belady_order`, and the first access of each slice is a miss for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtraced.analysis.compiled import compiled

__all__ = [
    "belady_order",
    "by_frequency",
    "kept",
    "kept_states",
    "lfu_order",
    "lrfu_order",
    "lru_hits",
    "lru_order",
    "pinned_hits",
    "pinned_order",
    "previous_access",
    "stack_distances",
]

Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

_CHUNK: Final = 256  # accesses compared with each other at once: 64 Ki comparisons


def previous_access(slices: Ints) -> Ints:
    """Return for each access the index of the one before it to the same slice, -1 for the first."""
    order = np.argsort(slices, kind="stable")
    again = slices[order][1:] == slices[order][:-1]
    before = np.full(len(slices), -1, np.int64)
    before[order[1:][again]] = order[:-1][again]
    return before


def stack_distances(slices: Ints, n: int) -> Ints:
    """Return how many other slices were accessed since the last access to the same one; -1 where it is the first.

    An LRU cache of ``size`` slices hits exactly where 0 <= distance < ``size`` (Mattson et al., *Evaluation techniques
    for storage hierarchies*, 1970), so one pass tells every size.

    Were each slice accessed once before index 0, the distance of access ``i`` with previous access ``v[i]`` would be
    ``i - v[i] - 1`` less the accesses in between that are not their slice's first there, that is ``v[j] > v[i]``. As
    ``v`` has no duplicates, that is ``(number of j < i with v[j] < v[i]) - v[i] - 1``. The sequence is taken in chunks,
    and what was before a chunk is replaced by its LRU stack, the last accessed slice at -1, the next at -2, …
    """
    before = previous_access(slices)
    distances = np.empty(len(slices), np.int64)
    stack = np.arange(n)  # the last accessed first
    depth = np.arange(n)  # of each slice in the stack
    touched = np.zeros(n, np.bool_)
    earlier = np.tri(_CHUNK, k=-1, dtype=np.bool_)
    for start in range(0, len(slices), _CHUNK):
        chunk = slices[start : start + _CHUNK]
        local = before[start : start + _CHUNK] - start
        at = np.where(local >= 0, local, -1 - depth[chunk])
        less = (at[None, :] < at[:, None]) & earlier[: len(chunk), : len(chunk)]
        distances[start : start + _CHUNK] = np.count_nonzero(less, axis=1) - at - 1
        backwards = chunk[::-1]
        last = backwards[np.sort(np.unique(backwards, return_index=True)[1])]
        touched[last] = True
        stack = np.concatenate([last, stack[~touched[stack]]])
        touched[last] = False
        depth[stack] = np.arange(n)
    distances[before < 0] = -1
    return distances


def lru_hits(distances: Ints, sizes: Sequence[int]) -> list[int]:
    """Return the hits of LRU caches of each of ``sizes`` from the :func:`stack_distances`."""
    reused = np.sort(distances[distances >= 0])
    return [int(hits) for hits in np.searchsorted(reused, sizes)]


def kept(slices: Ints, order: Ints, n: int, size: int) -> Bools:
    """Return which accesses hit a cache of ``size`` slices that evicts the one whose last access is of least worth.

    Args:
        slices: accessed one after the other.
        order: the accesses, from the least worth to be kept to the most: :func:`lru_order` and those below it.
        n: slices there are.
        size: slices that the cache holds.
    """
    return kept_states(slices, order, n, size, np.zeros(0, np.int64))[0]


def kept_states(slices: Ints, order: Ints, n: int, size: int, starts: Ints) -> tuple[Bools, Bools]:
    """Return what :func:`kept` does, and what is in the cache before each access of ``starts`` (ascending)."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    hits, states = np.zeros(len(slices), np.bool_), np.zeros((len(starts), n), np.bool_)
    _kept(slices, order, place, size, starts, hits, states)
    return hits, states


@compiled
def _kept(slices: Ints, order: Ints, place: Ints, size: int, starts: Ints, hits: Bools, states: Bools) -> None:
    n = states.shape[1]
    resident, last = np.zeros(n, np.bool_), np.zeros(n, np.int64)
    heap = [np.int64(0) for _ in range(0)]  # of places in the order; those of earlier accesses are stale
    free, told = size, 0
    for now in range(slices.size):
        while told < starts.size and starts[told] == now:
            states[told] = resident
            told += 1
        mine = slices[now]
        if resident[mine]:
            hits[now] = True
        elif free:
            free -= 1
        else:
            then = order[heappop(heap)]
            while last[slices[then]] != then:
                then = order[heappop(heap)]
            resident[slices[then]] = False
        resident[mine] = True
        last[mine] = now
        heappush(heap, place[now])


def lru_order(slices: Ints) -> Ints:
    """Return the order by which what was accessed longest ago goes first."""
    return np.arange(len(slices))


def lfu_order(slices: Ints) -> Ints:
    """Return the order by which what was accessed least often so far goes first, of equals the least recent.

    Accesses are counted for what is not in the cache, too ("perfect LFU").
    """
    by_slice = np.argsort(slices, kind="stable")
    ranked = slices[by_slice]
    first = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(ranked)])
    count = np.empty(len(slices), np.int64)
    count[by_slice] = np.arange(len(slices)) - np.repeat(first, np.diff(np.append(first, len(slices))))
    return np.argsort(count, kind="stable")


def lrfu_order(slices: Ints, when: Ints, n: int, half_life: float) -> Ints:
    """Return the order by which the coldest goes first: heat is a count in which an access counts half after a time.

    Between LFU (a long half-life) and LRU (a short one): Lee et al., IEEE Transactions on Computers 50(12), 2001.

    Args:
        slices: accessed.
        when: time of each access, such as the number of its token.
        n: slices there are.
        half_life: in the same unit.
    """
    heat = np.empty(len(slices))
    _heats(slices, when / half_life, np.full(n, -np.inf), heat)
    return np.argsort(heat, kind="stable")


@compiled
def _heats(slices: Ints, when: Floats, last: Floats, heat: Floats) -> None:
    for now in range(slices.size):  # heat is kept as log2 of the count as of time 0, so that it need not decay
        mine = slices[now]
        before = last[mine]
        last[mine] = when[now] if before == -np.inf else when[now] + np.log2(1 + 2 ** (before - when[now]))
        heat[now] = last[mine]


def pinned_order(slices: Ints, pinned: Bools) -> Ints:
    """Return the order by which only what is not ``pinned`` (by slice) goes, the least recent first."""
    return np.argsort(pinned[slices], kind="stable")


def belady_order(slices: Ints) -> Ints:
    """Return the order by which what is needed again last goes first: no other has more hits (Belady, 1966)."""
    total = len(slices)
    following = np.arange(total, 2 * total)  # never again: later than everything, and each its own number
    before = previous_access(slices)
    following[before[before >= 0]] = np.flatnonzero(before >= 0)
    return np.argsort(-following, kind="stable")


def by_frequency(slices: Ints, n: int) -> Ints:
    """Return all slices, the most often accessed first; equals in order of their numbers."""
    return np.argsort(-np.bincount(slices, minlength=n), kind="stable")


def pinned_hits(slices: Ints, ranking: Ints, size: int) -> Bools:
    """Return which accesses hit a cache that keeps the first ``size - 1`` slices of ``ranking`` once they were read.

    The last place is for the slice that passes through; so the cache is no larger than the others.
    """
    kept = np.zeros(len(ranking), np.bool_)
    kept[ranking[: size - 1]] = True
    pinned = kept[slices]
    hits = pinned & (previous_access(slices) >= 0)
    passing = np.flatnonzero(~pinned)
    hits[passing[1:]] = slices[passing[1:]] == slices[passing[:-1]]
    return hits
