"""Threads that do what is decided on experts, on slices that remember what was asked of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from helpers import wait_until

from llmtraced.prefetch.experts import ABSENT, COMING, HERE, Residency
from llmtraced.prefetch.movers import Movers

N_EXPERTS, SLICES = 8, 3


class FakeSlices:
    """Three slices an expert; a thread that is to read waits until it may."""

    def __init__(self) -> None:
        self.large = True
        self.may = threading.Event()
        self.asked: list[tuple[int, int]] = []
        self.back: list[tuple[int, bool, bool]] = []
        self.kept: list[int] = []
        self.here: set[int] = set()
        self.open = 0
        self.fails = False

    def count(self, one: int) -> int:
        return SLICES

    def opened(self) -> list[str]:
        self.open += 1
        return ["folios"]

    def close(self, folios: list[str] | None = None) -> None:
        self.open -= folios is not None

    def ask(self, one: int, at: int, folios: list[str] | None = None) -> tuple[int, int]:
        if threading.current_thread() is not threading.main_thread():
            assert folios == ["folios"], "each thread has its own"
            assert self.may.wait(10)
        self.asked.append((one, at))
        if self.fails:
            raise OSError(5, "Input/output error")
        return 100, 90

    def give_back(self, one: int, *, before: bool, after: bool) -> None:
        self.back.append((one, before, after))

    def keep(self, one: int) -> None:
        self.kept.append(one)

    def seems(self, one: int, *, held: bool) -> bool:
        return (one in self.here) == held

    def there(self, one: int, *, wait: bool) -> int:
        assert not wait, "what was driven out takes long to look at"
        return 1000 + one


@pytest.fixture
def slices() -> FakeSlices:
    return FakeSlices()


@pytest.fixture
def residency() -> Residency:
    return Residency([300] * 2 * N_EXPERTS, N_EXPERTS, 10_000)


@pytest.fixture
def movers(slices: FakeSlices, residency: Residency) -> Iterator[Movers]:
    one = Movers(slices, residency)  # type: ignore[arg-type]
    assert one.start()
    assert not one.start(), "it has begun"
    yield one
    slices.may.set()
    one.close()
    assert slices.open == 0


def test_first_slices_are_asked_for_at_once_and_the_others_in_the_order_of_use(
    movers: Movers, slices: FakeSlices
) -> None:
    movers.fetch([3, 5])
    assert slices.asked == [(3, 0), (5, 0)], "by this thread: the readers are not allowed to yet"
    slices.may.set()
    wait_until(lambda: len(movers.read) == 6, 10, "all slices to be read")
    assert set(slices.asked[2:4]) == {(3, 1), (5, 1)}
    assert set(slices.asked[4:]) == {(3, 2), (5, 2)}
    assert set(movers.read) == {(3, 100, 90, False), (5, 100, 90, False)}


def test_what_is_early_waits_for_what_is_urgent_until_it_is_urgent(movers: Movers, slices: FakeSlices) -> None:
    movers.fetch([1, 2, 6, 7], early=True)
    wait_until(lambda: movers.early == 4 * SLICES - 2, 10, "each reader to have one in hand")
    movers.fetch([4])
    movers.hasten([7])
    assert movers.early == 3 * SLICES - 2
    slices.may.set()
    wait_until(lambda: len(movers.read) == 5 * SLICES, 10, "all to be read")
    order = [one for one, _ in slices.asked]
    assert order[0] == 4, "its first slice, by this thread"
    assert 6 not in [one for one in order if one in (4, 6, 7)][:5], "what is urgent first, by one thread or by both"
    assert len(set(slices.asked)) == 5 * SLICES, "each once"


def test_what_was_chosen_again_is_not_given_back(movers: Movers, slices: FakeSlices, residency: Residency) -> None:
    residency.state[2:5] = [HERE, ABSENT, COMING]
    movers.leave([2, 3, 4])
    wait_until(lambda: slices.back == [(3, False, False)], 10, "one to be given back")
    assert slices.kept == []
    movers.leave([0, N_EXPERTS - 1, N_EXPERTS], anew=True)
    wait_until(lambda: len(slices.kept) == 3, 10, "three to be given back, and what stays of them to be read")
    assert slices.back[1:] == [(0, False, True), (7, True, False), (8, False, True)], "layers have nothing in common"
    assert slices.kept == [0, 7, 8]


def test_only_what_seems_otherwise_is_counted(movers: Movers, slices: FakeSlices, residency: Residency) -> None:
    residency.state[1] = HERE
    slices.here = {1, 6}
    movers.doubt(range(N_EXPERTS))
    wait_until(lambda: not movers.looking, 10, "all to be looked at")
    wait_until(lambda: list(movers.seen) == [(6, 1006)], 10, "the one that is there though it should not be")


def test_a_read_that_fails_is_told(movers: Movers, slices: FakeSlices) -> None:
    slices.fails = True
    slices.may.set()
    movers.fetch([3])
    wait_until(lambda: list(movers.read) == [(3, 0, 0, True)] * SLICES, 10, "three failures")


def test_what_waits_at_the_end_is_forgotten(slices: FakeSlices, residency: Residency) -> None:
    one = Movers(slices, residency)  # type: ignore[arg-type]
    one.start()
    one.fetch(list(range(N_EXPERTS)), early=True)
    threading.Timer(0.2, slices.may.set).start()
    one.close()
    assert len(slices.asked) < N_EXPERTS * SLICES / 2
    assert slices.open == 0
