"""Cache policies against answers worked out by hand and against caches that are simulated naively, step by step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmtraced.analysis import replay
from llmtraced.analysis.replay import (
    belady_order,
    by_frequency,
    kept,
    kept_states,
    lfu_order,
    lrfu_order,
    lru_hits,
    lru_order,
    pinned_hits,
    pinned_order,
    previous_access,
    stack_distances,
)

N = 9
SEQUENCES = st.lists(st.integers(0, N - 1), max_size=60)
SIZES = st.integers(1, N)


def array(sequence: list[int]) -> np.ndarray:
    return np.array(sequence, np.int64)


def lfu_hits(slices: np.ndarray, n: int, size: int) -> int:
    return int(kept(slices, lfu_order(slices), n, size).sum())


def belady_hits(slices: np.ndarray, n: int, size: int) -> int:
    return int(kept(slices, belady_order(slices), n, size).sum())


def naive_lru(sequence: list[int], size: int) -> int:
    cache: list[int] = []
    hits = 0
    for one in sequence:
        if one in cache:
            hits += 1
            cache.remove(one)
        elif len(cache) == size:
            cache.pop(0)
        cache.append(one)
    return hits


def naive_lfu(sequence: list[int], size: int) -> int:
    cache: set[int] = set()
    count: Counter[int] = Counter()
    last: dict[int, int] = {}
    hits = 0
    for now, one in enumerate(sequence):
        if one in cache:
            hits += 1
        elif len(cache) == size:
            cache.remove(min(cache, key=lambda other: (count[other], last[other])))
        cache.add(one)
        count[one] += 1
        last[one] = now
    return hits


def naive_belady(sequence: list[int], size: int) -> int:
    cache: set[int] = set()
    hits = 0
    for now, one in enumerate(sequence):
        rest = sequence[now + 1 :]
        if one in cache:
            hits += 1
        elif len(cache) == size:
            cache.remove(max(cache, key=lambda other: rest.index(other) if other in rest else len(sequence)))
        cache.add(one)
    return hits


def naive_pinned(sequence: list[int], ranking: list[int], size: int) -> list[bool]:
    pinned, cache, passing = set(ranking[: size - 1]), set(), None
    hits = []
    for one in sequence:
        hits.append(one in cache or one == passing)
        if one in pinned:
            cache.add(one)
        else:
            passing = one
    return hits


def naive_lrfu(sequence: list[int], when: list[int], size: int, half_life: float) -> list[bool]:
    cache: set[int] = set()
    uses: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    hits = []
    for now, one in enumerate(sequence):
        hits.append(one in cache)
        if one not in cache and len(cache) == size:
            # all heats at the same time rank like heats as of any other time
            heat = {other: sum(2 ** ((t - when[now]) / half_life) for t in uses[other]) for other in cache}
            coldest = min(heat.values())
            cache.remove(min((o for o in cache if heat[o] <= coldest * (1 + 1e-9)), key=lambda o: last[o]))
        cache.add(one)
        uses.setdefault(one, []).append(when[now])
        last[one] = now
    return hits


def best(sequence: list[int], size: int) -> int:
    """The most hits that any policy can have, found by trying every eviction."""
    states = {frozenset[int](): 0}
    for one in sequence:
        after: dict[frozenset[int], int] = {}
        for cache, hits in states.items():
            if one in cache:
                options = [(cache, hits + 1)]
            elif len(cache) < size:
                options = [(cache | {one}, hits)]
            else:
                options = [(cache - {out} | {one}, hits) for out in cache]
            for state, score in options:
                after[state] = max(after.get(state, 0), score)
        states = after
    return max(states.values())


def test_the_classic_example_by_hand() -> None:
    # Belady's own reference string: with 3 places FIFO, LRU and MIN have 9, 10 and 7 misses of 12
    sequence = array([1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5])
    assert stack_distances(sequence, 6).tolist() == [-1, -1, -1, -1, 3, 3, -1, 2, 2, 4, 4, 4]
    assert lru_hits(stack_distances(sequence, 6), [1, 2, 3, 4, 5]) == [0, 0, 2, 4, 7]
    assert belady_hits(sequence, 6, 3) == 5
    assert previous_access(sequence).tolist() == [-1, -1, -1, -1, 0, 1, -1, 4, 5, 2, 3, 6]


def test_a_cyclic_scan_defeats_lru_and_not_pinning() -> None:
    scan = array([0, 1, 2, 3] * 10)
    assert lru_hits(stack_distances(scan, 4), [3, 4]) == [0, 36]
    assert pinned_hits(scan, by_frequency(scan, 4), 3).sum() == 18  # 0 and 1 stay
    assert belady_hits(scan, 4, 3) == 24  # two of three: keeps all but the one that is needed last


def test_lfu_by_hand() -> None:
    # 0 0 1: full with 2; 2 evicts 1 (once), then 1 evicts 2 (once); 0 stays and hits
    assert lfu_hits(array([0, 0, 1, 2, 1, 0]), 3, 2) == 2
    # of equals the least recent goes: 0 1 2 evicts 0; 0 evicts 1; 2 is still there
    assert lfu_hits(array([0, 1, 2, 0, 2]), 3, 2) == 1


def test_frequency_ranks_equals_by_number() -> None:
    assert by_frequency(array([2, 2, 1, 3]), 5).tolist() == [2, 1, 3, 0, 4]


def test_nothing_is_accessed() -> None:
    none = array([])
    assert stack_distances(none, 3).tolist() == []
    assert (lru_hits(none, [1, 2]), lfu_hits(none, 3, 1), belady_hits(none, 3, 1)) == ([0, 0], 0, 0)
    assert pinned_hits(none, by_frequency(none, 3), 1).tolist() == []


@given(SEQUENCES, SIZES)
def test_each_policy_does_what_a_naive_simulation_does(sequence: list[int], size: int) -> None:
    slices = array(sequence)
    assert lru_hits(stack_distances(slices, N), [size]) == [naive_lru(sequence, size)]
    assert lfu_hits(slices, N, size) == naive_lfu(sequence, size)
    assert belady_hits(slices, N, size) == naive_belady(sequence, size)
    ranking = by_frequency(slices, N)
    assert pinned_hits(slices, ranking, size).tolist() == naive_pinned(sequence, ranking.tolist(), size)


@given(SEQUENCES, SIZES, st.permutations(range(N)))
def test_nothing_beats_belady_and_all_are_equal_when_everything_fits(
    sequence: list[int], size: int, ranking: list[int]
) -> None:
    slices = array(sequence)
    optimum = belady_hits(slices, N, size)
    rivals = [*lru_hits(stack_distances(slices, N), [size]), lfu_hits(slices, N, size)]
    rivals.append(int(pinned_hits(slices, array(ranking), size).sum()))
    assert max(rivals) <= optimum
    if size == N:
        assert set(rivals) == {optimum} == {len(sequence) - len(set(sequence))}


@given(st.lists(st.integers(0, 4), max_size=14), st.integers(1, 4))
def test_belady_is_the_optimum(sequence: list[int], size: int) -> None:
    assert belady_hits(array(sequence), 5, size) == best(sequence, size)


@given(SEQUENCES)
def test_more_memory_never_hurts_lru_or_belady(sequence: list[int]) -> None:
    slices = array(sequence)
    lru = lru_hits(stack_distances(slices, N), range(1, N + 1))
    belady = [belady_hits(slices, N, size) for size in range(1, N + 1)]
    assert lru == sorted(lru)
    assert belady == sorted(belady)


@given(SEQUENCES, st.integers(1, 7))
@example([0, 1, 2, 0, 1, 2, 3, 3, 0], 1)
def test_chunks_do_not_show(sequence: list[int], chunk: int) -> None:
    whole = stack_distances(array(sequence), N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_CHUNK", chunk)
        assert stack_distances(array(sequence), N).tolist() == whole.tolist()
    between = [
        -1 if one not in sequence[:i] else len(set(sequence[i - sequence[:i][::-1].index(one) : i]))
        for i, one in enumerate(sequence)
    ]
    assert whole.tolist() == between


@given(SEQUENCES, SIZES)
def test_the_least_recent_goes_first(sequence: list[int], size: int) -> None:
    slices = array(sequence)
    assert kept(slices, lru_order(slices), N, size).sum() == naive_lru(sequence, size)


def test_lrfu_by_hand() -> None:
    # 0 is used at 0, 1 and 2; 1 at 9. As of 9, with a half-life of 2: 0 has 2^-4.5 + 2^-4 + 2^-3.5 = 0.195, 1 has 1
    sequence, when = array([0, 0, 0, 1, 2, 0, 1]), array([0, 1, 2, 9, 9, 9, 9])
    recent = kept(sequence, lrfu_order(sequence, when, 3, 2.0), 3, 2)
    assert recent.tolist() == [False, True, True, False, False, False, False]  # 2 drives out 0, 0 then 1 or 2
    often = kept(sequence, lrfu_order(sequence, when, 3, 1e6), 3, 2)
    assert often.tolist() == [False, True, True, False, False, True, False]  # 2 drives out 1


@given(SEQUENCES, SIZES, st.sampled_from([0.5, 3.0, 40.0]))
def test_lrfu_does_what_a_naive_simulation_does(sequence: list[int], size: int, half_life: float) -> None:
    when = [i // 4 for i in range(len(sequence))]
    slices = array(sequence)
    order = lrfu_order(slices, array(when), N, half_life)
    assert kept(slices, order, N, size).tolist() == naive_lrfu(sequence, when, size, half_life)


@given(SEQUENCES, SIZES, st.sets(st.integers(0, N - 1)))
def test_what_is_pinned_stays(sequence: list[int], size: int, pinned: set[int]) -> None:
    slices, keep = array(sequence), np.isin(np.arange(N), sorted(pinned)[: size - 1])
    starts = np.arange(len(sequence))
    hits, states = kept_states(slices, pinned_order(slices, keep), N, size, starts)
    seen: set[int] = set()
    for one, hit, state in zip(sequence, hits, states, strict=True):
        assert set(np.flatnonzero(state)) >= {other for other in seen if keep[other]}
        assert state.sum() <= size
        assert hit == state[one]
        seen.add(one)
    if not keep.any():
        assert hits.tolist() == kept(slices, lru_order(slices), N, size).tolist()
