"""Which experts are kept, fetched and given up: decisions, and the router's arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmtraced.prefetch.experts import ABSENT, COMING, HERE, Residency
from llmtraced.prefetch.router import LANES, Router, machine_code


def kept(capacity: int = 4, count: int = 8, layers: int = 1) -> Residency:
    return Residency([1] * (count * layers), count, capacity)


def test_what_is_chosen_and_not_here_is_read_once() -> None:
    r = kept()
    assert r.use(0, [2, 5]) == [2, 5]
    assert r.use(0, [2]) == []
    assert (r.state[2], r.state[5], r.state[0]) == (COMING, COMING, ABSENT)
    r.arrived(2)
    assert r.state[2] == HERE
    assert r.use(0, [2]) == []
    assert (r.missed, r.late, r.used, r.held) == (2, 1, 1, 2)


def test_what_is_expected_is_read_and_counts_as_there_once_it_came() -> None:
    r = kept()
    assert r.expect([1, 3]) == [1, 3]
    assert r.expect([1]) == []
    r.arrived(1)
    assert r.use(0, [1, 3]) == []
    assert (r.used, r.late, r.missed) == (1, 1, 0)


def tokens(r: Residency, *each: list[int]) -> None:
    """Have layer 0 use some experts, token by token; all of them arrive."""
    for some in each:
        r.token += 1
        for one in r.use(0, some):
            r.arrived(one)
    r.token += 1


def test_what_was_used_lately_stays() -> None:
    r = kept(capacity=2)
    tokens(r, [0], [1], [2])
    assert r.surplus() == [0]
    assert r.surplus(1) == [1]


def test_what_is_in_use_stays() -> None:
    r = kept(capacity=2)
    tokens(r, [0, 1, 2])
    r.token -= 1  # that token again
    assert r.surplus() == []
    r.token += 1
    assert len(r.surplus()) == 1


def test_a_use_counts_half_after_two_tokens_and_a_little_for_long() -> None:
    r = kept()
    tokens(r, [0], [], [])
    assert r.worth(0) == pytest.approx(1 / 2 + 1 / 64 * 0.5 ** (2 / 64))
    tokens(r, *[[]] * 62)
    assert r.worth(0) == pytest.approx(1 / 64 / 2, rel=1e-3)


def test_what_is_used_often_outlives_what_was_used_once_since() -> None:
    often, once = [[0]] * 40, [[1]]
    r = kept(capacity=1)
    tokens(r, *often, *[[]] * 8, *once, *[[]] * 4)
    assert r.worth(0) > r.worth(1)
    assert r.surplus() == [1]
    r = kept(capacity=1)
    tokens(r, *often, *[[]] * 8, *once)
    assert r.surplus() == [0], "at once it is the other way round"


def test_layers_that_are_still_to_come_are_no_older_than_those_that_were() -> None:
    """Both used one expert two tokens ago; layer 0 was evaluated since, so layer 1 is as likely to use its own."""
    r = kept(capacity=1, count=4, layers=2)
    for layer, one in ((0, 1), (1, 5)):
        for each in r.use(layer, [one]):
            r.arrived(each)
    r.token = 2
    r.use(0, [])
    assert r.worth(5) > r.worth(1)
    assert r.surplus() == [1]


def test_what_is_coming_does_not_go() -> None:
    r = kept(capacity=0)
    r.use(0, [0])
    r.token = 9
    assert r.surplus() == []
    r.arrived(0)
    assert r.surplus() == [0]
    assert r.held == 0


def test_what_came_for_nothing_is_told() -> None:
    r = kept(capacity=0)
    for one in r.expect([0, 1]):
        r.arrived(one)
    r.use(0, [0])
    r.token = 1
    assert sorted(r.surplus()) == [0, 1]
    assert r.wasted == 1


def test_what_is_there_from_before_is_taken_over() -> None:
    r = kept()
    r.adopt([3])
    assert r.use(0, [3]) == []
    assert (r.used, r.present(), r.hottest()) == (1, [3], [3])
    r.gone(3)
    assert r.use(0, [3]) == [3]
    assert r.wasted == 0


def test_what_nobody_ever_used_goes_first() -> None:
    r = kept(capacity=1)
    tokens(r, [2])
    r.adopt([5])
    assert r.surplus() == [5]


def test_held_never_differs_from_the_states() -> None:
    random = np.random.default_rng(7)
    sizes = random.integers(1, 9, 40).tolist()
    r = Residency(sizes, 10, 60)
    for step in range(1200):
        layer = step % 4
        r.token = step // 4
        mine = np.arange(layer * 10, layer * 10 + 10)
        coming = r.expect(random.choice(40, 3, replace=False).tolist())
        coming += r.use(layer, random.choice(mine, 2, replace=False).tolist())
        for one in coming:
            if random.random() < 0.9:
                r.arrived(one)
        gone = r.surplus(5)
        assert all(r.state[one] == ABSENT for one in gone)
        assert r.held == sum(n for n, state in zip(sizes, r.state, strict=True) if state != ABSENT)
        stuck = sum(n for n, s in zip(sizes, r.state, strict=True) if s == COMING)
        assert r.held <= 60 - 5 + stuck + 4 * 5 * 8, "of what this token uses or expects"
        if step % 50 == 49:
            for one, state in enumerate(r.state):
                if state == COMING:
                    r.arrived(one)


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


def test_only_what_is_clear_is_named(code: int) -> None:
    router = Router(code, LANES, 6, 3)
    w = np.zeros((6, LANES), np.float32)
    w[:, 0] = [1.0, 5.0, 3.5, 2.0, 1.5, 0.0]  # the three best exceed the fourth, 1.5, by 3.5, 2 and 0.5
    x, scale = np.eye(1, LANES, dtype=np.float32), np.ones(LANES, np.float32)
    at = (w.ctypes.data, x.ctypes.data, scale.ctypes.data)
    assert router.choose(*at) == [1, 2, 3]
    assert router.gap == pytest.approx(3.5)
    assert router.choose(*at, least=0.49) == [1, 2, 3]
    assert router.choose(*at, least=0.51) == [1, 2]
    assert router.choose(*at, least=3.6) == []
    assert Router(code, LANES, 6, 6).choose(*at, least=9.0) == list(range(6)), "all are chosen: there is no choice"


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
