"""When the sidecar works, stands aside and comes back: decided from durations and reads alone."""

from __future__ import annotations

import pytest

from llmtraced.prefetch.governor import ASIDE, BACKED_OFF, ENGAGED, FITS, WATCHING, Governor

MODEL = 1_000_000_000
READS = 500_000_000
MS = 1_000_000
SETTLE, ENOUGH = 3, 8


def feed(governor: Governor, count: int, ms: float, read: int = 0, now: float = 0.0) -> list[bool]:
    return [governor.token(int(ms * MS), 1, read, now) for _ in range(count)]


def engaged(ms: float = 100.0) -> Governor:
    governor = Governor(MODEL)
    assert feed(governor, 3, ms, READS) == [False, False, True]
    assert governor.state == ENGAGED
    return governor


def test_it_watches_first_and_engages_when_tokens_read() -> None:
    governor = Governor(MODEL)
    assert governor.state == WATCHING
    assert WATCHING in ASIDE
    assert ENGAGED not in ASIDE
    assert feed(governor, 2, 100, READS) == [False, False]
    assert governor.state == WATCHING
    assert governor.token(100 * MS, 1, READS, 0.0)
    assert governor.state == ENGAGED
    assert governor.compared() == ([100 * MS] * 3, [])


def test_it_stands_aside_where_the_model_fits() -> None:
    governor = Governor(MODEL)
    assert feed(governor, 3, 50, 0) == [False, False, True]
    assert governor.state == FITS
    assert feed(governor, 50, 50, int(MODEL * 0.005)) == [False] * 50  # what comes and goes all the same
    assert governor.state == FITS


def test_one_token_that_reads_does_not_end_a_fit_but_lasting_reads_do() -> None:
    governor = Governor(MODEL)
    feed(governor, 3, 50, 0)
    feed(governor, 1, 80, READS)
    assert governor.state == FITS
    assert feed(governor, 2, 80, READS) == [False, True]
    assert governor.state == ENGAGED


@pytest.mark.parametrize("trial", [1, 2, 5])
def test_the_trial_is_as_long_as_asked_but_two_at_least(trial: int) -> None:
    governor = Governor(MODEL, trial)
    changes = feed(governor, max(trial, 2), 100, READS)
    assert changes == [*[False] * (max(trial, 2) - 1), True]


def test_prompts_are_not_compared() -> None:
    governor = Governor(MODEL)
    assert not any(governor.token(9000 * MS, 0, READS, 0.0) for _ in range(50))
    assert governor.state == WATCHING
    assert governor.without == []
    governor = engaged()
    assert not any(governor.token(9000 * MS, 0, READS, 0.0) for _ in range(50))
    assert (governor.state, governor.with_) == (ENGAGED, [])


def test_it_stays_engaged_while_it_helps() -> None:
    governor = engaged(100)
    assert not any(feed(governor, 500, 50))
    assert governor.state == ENGAGED
    assert len(governor.with_) <= 64


@pytest.mark.parametrize(("ms", "state"), [(96, ENGAGED), (98, BACKED_OFF), (100, BACKED_OFF), (400, BACKED_OFF)])
def test_it_backs_off_when_tokens_are_not_faster(ms: int, state: str) -> None:
    governor = engaged(100)
    changes = feed(governor, SETTLE + ENOUGH, ms)
    assert governor.state == state
    assert changes[:-1] == [False] * (SETTLE + ENOUGH - 1)  # not before it has seen enough


def test_the_first_tokens_after_engaging_are_not_compared() -> None:
    governor = engaged(100)
    feed(governor, SETTLE, 5000)
    assert governor.with_ == []
    feed(governor, ENOUGH, 50)
    assert governor.state == ENGAGED


def test_a_few_slow_tokens_are_no_reason() -> None:
    governor = engaged(100)
    feed(governor, SETTLE + ENOUGH, 50)
    feed(governor, 3, 900)
    assert governor.state == ENGAGED


def test_tokens_while_it_pins_are_not_compared() -> None:
    governor = engaged(100)
    for _ in range(100):  # as the sidecar calls it, while it pins
        governor.settled()
        feed(governor, 1, 5000)
    assert governor.state == ENGAGED
    assert governor.with_ == []


def test_it_tries_again_after_a_pause_that_doubles() -> None:
    governor = engaged(100)
    now = 1000.0
    for pause in (60.0, 120.0, 240.0):
        feed(governor, SETTLE + ENOUGH, 100, 0, now)
        assert governor.state == BACKED_OFF
        assert feed(governor, 5, 100, READS, now + pause - 0.1) == [False] * 5
        now += pause
        assert feed(governor, 1, 100, READS, now) == [True]
        assert governor.state == WATCHING
        assert feed(governor, 3, 100, READS, now) == [False, False, True]
        assert governor.state == ENGAGED


def test_what_was_measured_before_the_pause_does_not_count_after_it() -> None:
    governor = engaged(100)
    feed(governor, SETTLE + ENOUGH, 100, 0, 0.0)
    feed(governor, 1, 100, READS, 60.0)
    feed(governor, 3, 300, READS, 60.0)  # without it, tokens have become slow
    assert governor.compared()[0] == [300 * MS] * 3
    feed(governor, SETTLE + ENOUGH, 200, 0, 61.0)
    assert governor.state == ENGAGED


def test_only_equal_batches_are_compared() -> None:
    """Four slots take longer than one: no reason to back off. Four slots that take as long as before are one."""
    governor = Governor(MODEL)
    for batch, ms in ((1, 100), (4, 180), (4, 180)):
        governor.token(ms * MS, batch, READS, 0.0)
    assert governor.state == ENGAGED
    feed(governor, SETTLE, 50)
    for _ in range(3 * ENOUGH):
        assert not governor.token(150 * MS, 4, 0, 0.0)
    assert not any(governor.token(500 * MS, 3, 0, 0.0) for _ in range(3 * ENOUGH))  # nothing to compare it with
    assert governor.compared()[0] == [180 * MS] * 2
    assert any(governor.token(180 * MS, 4, 0, 0.0) for _ in range(ENOUGH))
    assert governor.state == BACKED_OFF


def test_engaged_at_once_never_compares() -> None:
    governor = Governor(MODEL, 0)
    assert governor.state == ENGAGED
    feed(governor, 100, 9000, READS)
    assert governor.state == ENGAGED


def test_memory_for_all_of_it() -> None:
    governor = engaged()
    assert governor.fits()
    assert governor.state == FITS
    assert not governor.fits()
    # The first token reads what the window had not: no reason to engage again.
    feed(governor, 1, 100, READS)
    feed(governor, 10, 50, 0)
    assert governor.state == FITS


@pytest.mark.parametrize("state", [WATCHING, FITS, ENGAGED, BACKED_OFF])
def test_a_reason_is_there_in_each_state(state: str) -> None:
    governor = Governor(MODEL)
    if state != WATCHING:
        feed(governor, 3, 100, 0 if state == FITS else READS)
    if state == BACKED_OFF:
        feed(governor, SETTLE + ENOUGH, 120)
        assert "120 ms with it and 100 ms without it" in governor.why
    assert governor.state == state
    assert governor.why


def test_a_model_that_no_longer_fits_is_compared_with_tokens_that_read() -> None:
    """The limit was lowered: the fast tokens from when all of it fitted are no measure of what is possible now."""
    governor = Governor(1_000_000_000)
    for _ in range(20):
        governor.token(50_000_000, 1, 0, 0.0)
    assert governor.state == FITS
    for _ in range(3):
        governor.token(900_000_000, 1, 500_000_000, 0.0)
    assert governor.state == ENGAGED
    for _ in range(30):
        governor.token(300_000_000, 1, 0, 0.0)
    assert governor.state == ENGAGED, governor.why


def test_without_tokens_reads_tell() -> None:
    governor = Governor(1_000_000_000, trial=0)
    assert not governor.reading(500_000_000), "it is engaged already"
    assert governor.fits()
    assert not governor.reading(1_000_000)
    assert governor.state == FITS
    assert governor.reading(500_000_000)
    assert governor.state == ENGAGED


def test_tokens_that_vary_are_watched_and_compared_for_longer() -> None:
    governor = Governor(1000, 3, varied=True)
    for i in range(15):
        assert not governor.token(100 + i % 2 * 50, 1, 900, float(i))
    assert governor.token(100, 1, 900, 15.0)
    assert governor.state == ENGAGED
    for i in range(16, 200):
        governor.token(400 if i < 30 else 90, 1, 0, float(i))  # a few slow ones at first are no reason to give up
    assert governor.state == ENGAGED


def held(read_through_ms: float) -> Governor:
    governor = Governor(MODEL, held=True)
    assert governor.state == ENGAGED
    governor.read_through_ns = read_through_ms * MS
    return governor


def test_huge_pages_are_not_given_up_for_a_comparison_where_there_is_no_doubt() -> None:
    governor = held(800)
    assert "huge pages" in governor.why
    assert feed(governor, 200, 300) == [False] * 200
    assert governor.state == ENGAGED
    assert governor.compared() == ([], [300 * MS] * 64)


def test_where_it_is_not_clearly_faster_it_compares_after_all() -> None:
    governor = held(800)
    changes = feed(governor, SETTLE + ENOUGH, 790)  # more than 97 %
    assert changes == [*[False] * (SETTLE + ENOUGH - 1), True]
    assert governor.state == WATCHING
    assert feed(governor, 3, 1000, READS) == [False, False, True]
    assert governor.state == ENGAGED
    assert feed(governor, 100, 790) == [False] * 100  # slower than the disk, and faster than without: no doubt again
    assert governor.compared()[0] == [1000 * MS] * 3


def test_what_is_in_doubt_and_does_not_help_is_left_alone() -> None:
    governor = held(800)
    feed(governor, SETTLE + ENOUGH, 1000)
    feed(governor, 3, 900, READS)
    assert governor.state == ENGAGED
    feed(governor, SETTLE + ENOUGH, 1000)
    assert governor.state == BACKED_OFF
    assert "1000 ms with it and 900 ms without it" in governor.why


def test_there_is_no_doubt_while_the_disk_is_not_known() -> None:
    governor = Governor(MODEL, held=True)
    assert feed(governor, 100, 5000) == [False] * 100
    assert governor.state == ENGAGED


def test_who_never_wants_to_compare_is_not_compared_in_doubt_either() -> None:
    governor = Governor(MODEL, 0, held=True)
    governor.read_through_ns = 1.0
    assert feed(governor, 100, 5000) == [False] * 100
    assert "as asked" in governor.why
