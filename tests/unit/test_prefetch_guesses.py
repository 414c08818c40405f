"""What the past says of a mixture's next experts, and how guesses are counted."""

from __future__ import annotations

import math
import random

import pytest

from llmtraced.analysis.predictors import DECAY
from llmtraced.prefetch.guesses import SURE, CoActivation, LastTokens, Margin, Tally


def test_the_last_tokens() -> None:
    last = LastTokens(8, 2)
    assert last.after({1, 2}) == {1, 2}
    assert last.after({3, 4}) == {3, 4}, "the newest weigh the most"
    assert last.after({1, 5}) == {1, 5}
    assert last.after({1}) == {1, 5}, "1: 1 + 0.8 + 0.8^3; 5: 0.8"


def test_live_and_offline_the_past_weighs_the_same() -> None:
    """A use counts ``DECAY`` of one a token later: three of the other then outweigh one now only if their sum does."""
    last, scores = LastTokens(3, 1), [0.0, 0.0]
    for one in (0, 0, 0, 1, 1, 0, 1, 1, 1, 0):
        scores = [DECAY * score + (one == n) for n, score in enumerate(scores)]
        assert last.after({one}) == {max((0, 1), key=scores.__getitem__)}


def test_nothing_is_guessed_of_nothing() -> None:
    assert LastTokens(8, 2).after(()) == set()
    assert CoActivation(8, 2).after({1}) == set()
    both = CoActivation(8, 2)
    both.learn({1}, {3})
    assert both.after({2}) == set(), "2 was never used"
    assert both.after({1}) == {3}, "and nothing is guessed that never followed"


def test_what_goes_together() -> None:
    both = CoActivation(8, 2)
    for _ in range(3):
        both.learn({0, 1}, {4, 5})
    both.learn({0}, {6, 7})
    assert both.after({1}) == {4, 5}
    assert both.after({0}) == {4, 5}
    for _ in range(9):
        both.learn({0}, {6, 7})
    assert both.after({0}) == {6, 7}
    assert both.after({0, 1}) == {4, 5}, "P(4 | 0) + P(4 | 1) = 3/13 + 1, P(6 | 0) = 10/13"


def test_a_tally() -> None:
    tally = Tally()
    assert set(tally.summary(0).values()) == {None, 0}
    tally.made(0, {1, 2}, {1: 100, 2: 100}, 5)
    tally.made(1, {3, 4}, {4: 50}, 10)
    assert tally.judge(0, {2, 9}, 15) == (1, 1)
    tally.judge(1, {3, 4}, 40)
    assert tally.judge(2, {3, 4}, 50) == (0, 0)  # no guess was made
    tally.judge(0, {1, 2}, 60)  # it was compared already
    assert tally.summary(400) == {
        "layers": 2,
        "right": 3 / 4,
        "read_bytes": 250,
        "precision": 150 / 250,
        "recall": 150 / 400,
        "mean_ahead_s": 20e-9,
    }
    tally.made(0, {1}, {}, 70)
    tally.forget()
    tally.judge(0, {1}, 80)
    assert tally.guessed == 4


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("share", sorted({*SURE.values()}))
def test_a_margin_is_found_that_enough_guesses_are_right_with(scale: float, share: float) -> None:
    """A guess with the margin m is right with the probability 1 - exp(-m) / 2, whatever the scale of scores is."""
    random_ = random.Random(5)
    margin = Margin(share)
    margin.begin(2 * scale)
    right = wrong = 0
    for number in range(60_000):
        m = random_.expovariate(1.0)
        if m * scale < margin.least:
            continue
        good = random_.random() < 1 - math.exp(-m) / 2
        margin.learn(good, not good)
        if number > 20_000:
            right, wrong = right + good, wrong + (not good)
    assert right / (right + wrong) == pytest.approx(share, abs=0.006)
    assert 0.05 < margin.least / scale < 5


def test_a_margin_that_is_not_needed_stays_small_and_recovers() -> None:
    margin = Margin(0.95)
    assert margin.least == 0
    margin.begin(4.0)
    assert margin.least == 2
    margin.begin(100.0)
    assert margin.least == 2, "it begins once"
    margin.learn(10_000, 0)
    assert margin.least == pytest.approx(0.04)
    for _ in range(40):
        margin.learn(0, 1)
    assert margin.least > 1
