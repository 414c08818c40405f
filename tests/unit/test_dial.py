"""The dial goes down where recording costs too much, and up when that is over, more and more patiently."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtraced.dial import Change, Governor, Load
from llmtraced.schema import Detail

ONE, TWO = (1, 10), (2, 20)


class Run:
    """Time that passes in steps of a second."""

    def __init__(self, wanted: Detail = Detail.FULL, limit: float = 0.5) -> None:
        self.governor = Governor(wanted, limit)
        self.now = self.cpu = 0.0
        self.loads = {ONE: Load(0, 0), TWO: Load(0, 0)}

    def run(
        self, seconds: int, share: float, records: tuple[int, int] = (1, 0), dropped: int = 0, behind: bool = False
    ) -> list[tuple[float, Change]]:
        found = []
        for _ in range(seconds):
            self.now += 1
            self.cpu += share
            for key, n in zip((ONE, TWO), records, strict=True):
                lost = self.loads[key].dropped + (dropped if key == ONE else 0)
                self.loads[key] = Load(self.loads[key].records + n, lost)
            change = self.governor.look(self.now, self.cpu, self.loads, behind=behind)
            if change:
                found.append((self.now, change))
        return found


def details(changes: list[tuple[float, Change]]) -> list[tuple[tuple[int, int], Detail]]:
    return [(change.key, change.detail) for _, change in changes]


def test_what_may_be_used_changes_nothing() -> None:
    assert Run().run(1000, 0.5) == []


def test_no_limit() -> None:
    assert Run(limit=0).run(1000, 5, dropped=9) == []


def test_a_peak_changes_nothing() -> None:
    run = Run()
    run.run(1, 0)
    assert run.run(2, 0.1) + run.run(2, 3) + run.run(2, 0.1) + run.run(2, 3) + run.run(2, 0.1) == []


def test_down_to_the_bottom_the_busiest_first() -> None:
    run = Run(Detail.OPS)
    changes = run.run(60, 0.9, (1, 5))
    expected = [(TWO, Detail.FAULTS), (TWO, Detail.TOTALS), (ONE, Detail.FAULTS), (ONE, Detail.TOTALS)]
    assert details(changes) == expected
    assert changes[0][0] <= 8
    assert changes[0][1].why == "recording takes 90% of a processor"
    assert changes[-1][0] <= 24


@pytest.mark.parametrize(
    ("dropped", "behind", "why"), [(1, False, "records are lost"), (0, True, "the disk does not keep up")]
)
def test_what_else_is_too_much(dropped: int, behind: bool, why: str) -> None:
    changes = Run(Detail.FAULTS).run(60, 0.1, dropped=dropped, behind=behind)
    assert (changes[0][1].key, changes[0][1].detail, changes[0][1].why) == (ONE, Detail.TOTALS, why)


def test_what_is_only_counted_is_no_loss() -> None:
    run = Run(Detail.FAULTS)
    assert details(run.run(10, 0.1, dropped=9)) == [(ONE, Detail.TOTALS)]
    assert details(run.run(15, 0.1, dropped=9)) == [], "the other one is left alone"


def test_up_again_when_all_is_well() -> None:
    run = Run(Detail.OPS)
    run.run(10, 0.9)
    assert details(run.run(100, 0.1)) == [(ONE, Detail.FAULTS), (ONE, Detail.OPS)]


def test_each_try_that_was_too_early_doubles_the_wait() -> None:
    run = Run(Detail.FAULTS)
    ups = []
    for _ in range(4000):  # a flood that never ends: it costs nothing while it is only counted
        low = run.governor._dials.get(ONE)
        ups += [t for t, c in run.run(1, 0.1 if low and low.detail == Detail.TOTALS else 0.9) if c.detail > 0]
    waits = [b - a for a, b in pairwise(ups)]
    assert len(waits) >= 5
    assert all(later > 1.5 * earlier for earlier, later in pairwise(waits) if later < 900)
    assert max(waits) < 1000


def test_long_peace_is_forgiven() -> None:
    run = Run(Detail.FAULTS)
    run.run(8, 0.9)
    run.run(40, 0.1)
    run.run(8, 0.9)  # too early: a minute now
    assert run.governor._dials[ONE].calm == 60
    assert details(run.run(300, 0.1)) == [(ONE, Detail.FAULTS)]
    run.run(8, 0.9)
    assert run.governor._dials[ONE].calm == 30


def test_who_has_gone_is_forgotten() -> None:
    run = Run(Detail.FAULTS)
    run.run(8, 0.9)
    del run.loads[ONE]
    run.loads[ONE] = Load(0, 0)
    governor = run.governor
    governor.look(run.now + 3, run.cpu, {TWO: Load(0, 0)}, behind=False)
    assert set(governor._dials) == {TWO}


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans(), st.booleans()), max_size=200), st.sampled_from(Detail))
def test_never_above_what_is_wanted(steps: list[tuple[float, bool, bool]], wanted: Detail) -> None:
    run = Run(wanted)
    level = {ONE: wanted, TWO: wanted}
    for share, loses, behind in steps:
        for _, change in run.run(10, share, (3, 2), int(loses), behind):
            assert abs(change.detail - level[change.key]) == 1
            assert change.detail <= wanted
            level[change.key] = change.detail
