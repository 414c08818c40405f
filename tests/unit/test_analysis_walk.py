"""Rows that are put on pages, against one number for each part of a page."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced.analysis.walk import Walk
from llmtraced.schema import PAGE

PAGES = 40
rows = st.lists(
    st.tuples(
        st.integers(0, PAGES - 1),
        st.sampled_from([0, 0, 100, 700]),  # where in its page a row begins
        st.integers(1, 12),
        st.sampled_from([0, 0, 50]),  # how much of its last page it leaves
    ),
    max_size=60,
)


@given(rows, st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_each_page_is_followed_in_order(moves: list[Any], batch: int) -> None:
    begin = np.array([page * PAGE + inside for page, inside, _, _ in moves], np.int64)
    end = np.array([min(page + count, PAGES) * PAGE - short for page, _, count, short in moves], np.int64)
    walk = Walk()
    state: dict[int, int] = {}  # of each part, by its first byte
    number = 1
    kept = [0]  # which row has which number
    for start in range(0, len(moves), batch):
        some = slice(start, start + batch)
        stretches = [one.tolist() for one in walk.put(begin[some], end[some], number)]
        kept += range(start + 1, start + 1 + len(begin[some]))
        number = len(kept)
        found: dict[int, list[Any]] = {}
        for row, past, low, high in zip(*stretches, strict=True):
            found.setdefault(kept[row], []).append((kept[past], low, high))
        for row in range(start + 1, start + 1 + len(begin[some])):
            expected: list[Any] = []
            low = int(begin[row - 1])
            while low < end[row - 1]:
                high = min((low // PAGE + 1) * PAGE, int(end[row - 1]))
                past = state.get(low, 0)
                state[low] = row
                if expected and expected[-1][0] == past:
                    expected[-1] = (past, expected[-1][1], high)
                else:
                    expected.append((past, low, high))
                low = high
            assert found[row] == expected
        kept = [kept[one] for one in walk.renumber().tolist()]
        number = len(kept)
    last = {
        part: kept[row]
        for row, low, high in zip(*(one.tolist() for one in walk.stretches()), strict=True)
        for part in ([low] if low % PAGE else range(low, high, PAGE))
        if kept[row]
    }
    assert last == state
