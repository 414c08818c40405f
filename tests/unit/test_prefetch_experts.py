"""Which experts are kept, fetched and given up: decisions, and the router's arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmtraced.prefetch.experts import ABSENT, COMING, HERE, Residency
from llmtraced.prefetch.router import LANES, Router, machine_code


def kept(capacity: int = 4, count: int = 8, half_life: float = 4.0) -> Residency:
    return Residency([1] * count, capacity, half_life)


def test_what_is_chosen_and_not_here_is_read_once() -> None:
    r = kept()
    assert r.use([2, 5]) == [2, 5]
    assert r.use([2]) == []
    assert (r.state[2], r.state[5], r.state[0]) == (COMING, COMING, ABSENT)
    r.arrived(2)
    assert r.state[2] == HERE
    assert r.use([2]) == []
    assert (r.missed, r.late, r.used, r.held) == (2, 1, 1, 2)


def test_what_is_expected_is_read_and_counts_as_there_once_it_came() -> None:
    r = kept()
    assert r.expect([1, 3]) == [1, 3]
    assert r.expect([1]) == []
    r.arrived(1)
    assert r.use([1, 3]) == []
    assert (r.used, r.late, r.missed) == (1, 1, 0)


def test_the_coldest_goes_first_and_what_is_in_use_stays() -> None:
    r = kept(capacity=3, count=6, half_life=1e9)  # as good as a plain count
    for token, some in enumerate(([0, 1], [0, 2], [0, 1], [3])):
        r.token = token
        for one in r.use(some):
            r.arrived(one)
    assert r.held == 4
    assert r.surplus() == [2]  # used once, and 3 is in use
    assert r.held == 3
    r.token = 4
    assert r.surplus(1) == [3]
    assert r.state == [HERE, HERE, ABSENT, ABSENT, ABSENT, ABSENT]


def test_a_short_half_life_forgets_counts() -> None:
    for half_life, goes in ((1e9, 1), (0.1, 0)):
        r = kept(capacity=1, count=2, half_life=half_life)
        for token, one in enumerate((0, 0, 0, 0, 1)):
            r.token = token
            r.use([one])
            r.arrived(one)
        r.token = 5
        assert r.surplus() == [goes]


def test_what_is_coming_does_not_go() -> None:
    r = kept(capacity=0)
    r.use([0])
    r.token = 9
    assert r.surplus() == []
    r.arrived(0)
    assert r.surplus() == [0]
    assert r.held == 0


def test_what_came_for_nothing_is_told() -> None:
    r = kept(capacity=0)
    for one in r.expect([0, 1]):
        r.arrived(one)
    r.use([0])
    r.token = 1
    assert sorted(r.surplus()) == [0, 1]
    assert r.wasted == 1


def test_what_is_there_from_before_is_taken_over() -> None:
    r = kept()
    r.adopt([3])
    assert r.use([3]) == []
    assert (r.used, r.present(), r.hottest()) == (1, [3], [3])
    r.gone(3)
    assert r.use([3]) == [3]
    assert r.wasted == 0


def test_held_never_differs_from_the_states() -> None:
    random = np.random.default_rng(7)
    sizes = random.integers(1, 9, 40).tolist()
    r = Residency(sizes, 60, 8.0)
    for token in range(300):
        r.token = token
        coming = r.expect(random.choice(40, 3, replace=False).tolist())
        coming += r.use(random.choice(40, 4, replace=False).tolist())
        for one in coming:
            if random.random() < 0.9:
                r.arrived(one)
        gone = r.surplus(5)
        assert all(r.state[one] == ABSENT for one in gone)
        assert r.held == sum(n for n, state in zip(sizes, r.state, strict=True) if state != ABSENT)
        stuck = sum(n for n, s in zip(sizes, r.state, strict=True) if s == COMING)
        assert r.held <= 60 - 5 + stuck + 7 * 8


@pytest.fixture(scope="module")
def code() -> int:
    fd = os.memfd_create("code", 0)
    os.write(fd, machine_code())
    return fd


@pytest.mark.parametrize(("width", "experts"), [(LANES, 1), (96, 8), (1024, 64), (2048, 128)])
def test_the_code_multiplies_as_numpy_does(code: int, width: int, experts: int) -> None:
    random = np.random.default_rng(width)
    router = Router(code, width, experts, min(4, experts))
    for _ in range(5):
        w = random.normal(size=(experts, width)).astype(np.float32)
        x, scale = (random.normal(size=width).astype(np.float32) for _ in range(2))
        expected = w.astype(np.float64) @ (x.astype(np.float64) * scale)
        chosen = router.choose(w.ctypes.data, x.ctypes.data, scale.ctypes.data)
        np.testing.assert_allclose(np.array(router._logits[:]), expected, rtol=1e-4, atol=1e-3)
        assert chosen == sorted(np.argsort(-expected)[: router.n_used].tolist())


@pytest.mark.parametrize("sigmoid", [False, True])
def test_bias_and_correction_are_added_where_they_belong(code: int, sigmoid: bool) -> None:
    random = np.random.default_rng(7)
    router = Router(code, 96, 32, 4, sigmoid=sigmoid)
    differ = 0
    for _ in range(20):
        w = random.normal(size=(32, 96)).astype(np.float32) / 8
        x, scale = random.normal(size=96).astype(np.float32), np.ones(96, np.float32)
        bias, correction = random.normal(size=(2, 32))
        logits = w.astype(np.float64) @ x + bias
        likely = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum()
        at = (w.ctypes.data, x.ctypes.data, scale.ctypes.data)
        assert router.choose(*at, bias.tolist()) == sorted(np.argsort(-logits)[:4].tolist())
        corrected = sorted(np.argsort(-(likely + correction))[:4].tolist())
        assert router.choose(*at, bias.tolist(), correction.tolist()) == corrected
        differ += router.choose(*at) != corrected
    assert differ > 10


@pytest.mark.parametrize("sigmoid", [False, True])
def test_experts_are_chosen_from_the_best_groups(code: int, sigmoid: bool) -> None:
    """The case by hand: group sums of the two best are 5+1, 4+3, 2+2; the best expert is in a group that is out."""
    random = np.random.default_rng(11)
    router, every = (Router(code, 96, 24, 4, sigmoid=sigmoid, groups=groups) for groups in ((6, 2), (1, 1)))
    differ = 0
    for _ in range(20):
        w = random.normal(size=(24, 96)).astype(np.float32) / 8
        x, scale = random.normal(size=96).astype(np.float32), np.ones(96, np.float32)
        correction = random.normal(size=24)
        logits = w.astype(np.float64) @ x
        likely = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum()
        ranked = likely + correction
        worth = {group: sum(sorted(ranked[4 * group : 4 * group + 4])[-2:]) for group in range(6)}
        first, second = sorted(worth, key=lambda group: worth[group])[-2:]
        admitted = [*range(4 * first, 4 * first + 4), *range(4 * second, 4 * second + 4)]
        at = (w.ctypes.data, x.ctypes.data, scale.ctypes.data)
        chosen = router.choose(*at, None, correction.tolist())
        assert chosen == sorted(sorted(admitted, key=lambda expert: ranked[expert])[-4:])
        differ += chosen != every.choose(*at, None, correction.tolist())
    assert differ > 5
    assert Router(code, 96, 6, 2, groups=(3, 1))._admitted([5.0, 1.0, 4.0, 3.0, 2.0, 2.0]) == [2, 3]


def test_the_codes_pages_cannot_be_written_to(code: int) -> None:
    router = Router(code, LANES, 2, 1)
    assert router.n == LANES
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:code" in line]
    assert lines
    assert all(line.split()[1] == "r-xp" for line in lines)
