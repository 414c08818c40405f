"""Replay a sequence of accesses through a cache: what would LRU, LFU, pinning and Belady's optimum have hit?

Pure functions over numpy arrays. An access is the number of a *slice*, 0 to ``n - 1``; all slices count as equally
large, a cache holds ``size`` of them, begins empty, and has to take in what is missed (an expert cannot be used without
being in memory). So no policy here beats :func:`belady_hits`, and the first access of each slice is a miss for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtraced.analysis.compiled import compiled

__all__ = ["belady_hits", "by_frequency", "lfu_hits", "lru_hits", "pinned_hits", "previous_access", "stack_distances"]

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


def lfu_hits(slices: Ints, n: int, size: int) -> int:
    """Return the hits of a cache that evicts what was accessed least often so far, of equals the least recent.

    Accesses are counted for what is not in the cache, too ("perfect LFU").
    """
    return _lfu(slices, n, size)


@compiled
def _lfu(slices: Ints, n: int, size: int) -> int:
    total = slices.size
    resident, count, last = np.zeros(n, np.bool_), np.zeros(n, np.int64), np.zeros(n, np.int64)
    order = [
        np.int64(0) for _ in range(0)
    ]  # a heap of count and time in one number; entries of earlier times are stale
    hits, free = 0, size
    for now in range(total):
        mine = slices[now]
        if resident[mine]:
            hits += 1
        else:
            if free:
                free -= 1
            else:
                then = heappop(order) % total
                while last[slices[then]] != then:
                    then = heappop(order) % total
                resident[slices[then]] = False
            resident[mine] = True
        count[mine] += 1
        last[mine] = now
        heappush(order, count[mine] * total + now)
    return hits


def belady_hits(slices: Ints, n: int, size: int) -> int:
    """Return the hits of a cache that evicts what is needed again last: no policy has more (Belady, 1966)."""
    total = len(slices)
    following = np.arange(total, 2 * total)  # never again: later than everything, and each its own number
    before = previous_access(slices)
    following[before[before >= 0]] = np.flatnonzero(before >= 0)
    return _belady(slices, following, n, size)


@compiled
def _belady(slices: Ints, following: Ints, n: int, size: int) -> int:
    total = slices.size  # a next use from here on: never, by the access that was the last
    resident = np.zeros(n, np.bool_)
    furthest = [np.int64(0) for _ in range(0)]  # a heap of -next use; stale entries lie in the past, so never on top
    hits, free = 0, size
    for now in range(total):
        mine = slices[now]
        if resident[mine]:
            hits += 1
        else:
            if free:
                free -= 1
            else:
                use = -heappop(furthest)
                resident[slices[use - total if use >= total else use]] = False
            resident[mine] = True
        heappush(furthest, -following[now])
    return hits


def by_frequency(slices: Ints, n: int) -> Ints:
    """Return all slices, the most often accessed first; equals in order of their numbers."""
    return np.argsort(-np.bincount(slices, minlength=n), kind="stable")


def pinned_hits(slices: Ints, ranking: Ints, size: int) -> NDArray[np.bool_]:
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
