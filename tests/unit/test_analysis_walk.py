"""Stretches that rows are put on, against one number for each slot."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced.analysis.walk import Stretches

SLOTS = 40
rows = st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(1, 12), st.booleans()), max_size=60)


@given(rows, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_each_slot_is_followed_in_order(moves: list[Any], chunk: int) -> None:
    low = np.array([first for first, _, _ in moves], np.int64)
    high = np.array([min(first + count, SLOTS) for first, count, _ in moves], np.int64)
    kind = np.array([which for _, _, which in moves], bool)
    number = np.arange(1, len(moves) + 1)
    stretches = Stretches(SLOTS)
    found: dict[tuple[int, int], int] = {}
    for moved in stretches.put(low, high, number, kind, chunk):
        assert (moved.number[moved.begins] == moved.number[moved.ends]).all()
        for first, after, now, past in zip(
            moved.low.tolist(), moved.high.tolist(), moved.number.tolist(), moved.past.tolist(), strict=True
        ):
            for slot in range(first, after):
                assert (now, slot) not in found
                found[now, slot] = past
    state = [0] * SLOTS
    expected = {}
    for now, (first, after) in enumerate(zip(low.tolist(), high.tolist(), strict=True), start=1):
        for slot in range(first, after):
            expected[now, slot] = state[slot]
            state[slot] = now
    assert found == expected
    assert np.repeat(stretches.number, np.diff(stretches.low)).tolist() == state
