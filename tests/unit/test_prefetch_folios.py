"""Ranges that are read in large folios: what is asked for, against a model of the kernel's readahead.

The model is written after what mm/readahead.c (Linux 6.18) is known to do. That the kernel really does it is in
tests/kernel/test_folios.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from llmtraced.prefetch import folios as module
from llmtraced.prefetch.folios import Folios, Limits, limits_of, plan
from llmtraced.prefetch.pages import PAGE

LAST = 1 << 20  # the file's last page


@dataclass
class State:
    """What a descriptor remembers (struct file_ra_state)."""

    start: int = 0
    size: int = 0
    behind: int = 0  # async_size
    order: int = 0
    before: int = -1 << 40  # the page that was read last


class Kernel:
    """The page cache of one file: calls as those of folios.Calls, that read at once."""

    largest: ClassVar[int] = 9

    def __init__(self, limits: Limits, *, trims: bool = True) -> None:
        self.limits, self.trims = limits, trims
        self.cached: dict[int, tuple[int, int]] = {}  # page: first page and order of its folio
        self.marked: set[int] = set()  # first pages
        self.states: dict[int, State] = {}
        self.by_page = 0  # bytes asked for by the page
        self.fd = 3

    def opened(self) -> int:
        self.states[fd := 10 + len(self.states)] = State()
        return fd

    def close(self, descriptors: list[int]) -> None:
        for fd in descriptors:
            del self.states[fd]

    def there(self, first: int, pages: int) -> int:
        return sum(page in self.cached for page in range(first, first + pages))

    def ahead(self, first: int, pages: int) -> None:
        self.by_page += pages * PAGE
        self._small(first, pages, None)

    def reads(self, fd: int, page: int) -> bool:
        if page not in self.cached:
            return False
        self.states[fd].before = page
        return True

    def comes(self, fd: int, page: int, asked: int) -> None:
        state = self.states[fd]
        if page not in self.cached:
            self._missed(state, page, asked)
        elif (folio := self.cached[page][0]) in self.marked:
            self._marked(state, folio, asked)

    # --- mm/readahead.c --------------------------------------------------------------------------------------------

    def _most(self, asked: int) -> int:
        ahead, request = self.limits
        return min(asked, request) if asked > ahead and request > ahead else ahead

    def _missed(self, state: State, page: int, asked: int) -> None:
        most = self._most(asked)
        assert 0 <= page - state.before <= 1, "only who reads on is asked here"
        size = 1 << (asked - 1).bit_length()
        size = 4 * size if size <= most // 32 else 2 * size if size <= most // 4 else most
        state.start, state.size, state.order = page, size, 0
        state.behind = size - asked if size > asked else size >> 1
        self._window(state)

    def _marked(self, state: State, page: int, asked: int) -> None:
        self.marked.discard(page)
        most = self._most(asked)

        def grown(size: int) -> int:
            return 4 * size if size < most // 16 else 2 * size if size <= most // 2 else most

        nr = 1 << self.cached[page][1]
        if page == (state.start + state.size - state.behind) // nr * nr:
            state.start += state.size
            state.size = max(state.size, grown(state.size))
        else:
            first = page + 1
            while first in self.cached:
                first += 1
            if first - page > most:
                return
            state.start, state.size = first, grown(first - page + asked)
        state.order += 2
        if self.trims:
            align = 1 << min(state.order, (most & -most).bit_length() - 1)
            end = (state.start + state.size) // align * align
            if end > state.start:
                state.size = end - state.start
        state.behind = state.size
        self._window(state)

    def _window(self, state: State) -> None:
        page, last = state.start, min(state.start + state.size - 1, LAST)
        mark = page + state.size - state.behind
        state.order = min(state.order, self.largest, state.size.bit_length() - 1)
        while page <= last:
            order = state.order
            if page & ((1 << order) - 1):
                order = (page & -page).bit_length() - 1
            while page + (1 << order) - 1 > last:
                order -= 1
            if any(one in self.cached for one in range(page, page + (1 << order))):
                self._small(page, state.size - (page - state.start), state.behind)
                return
            if page == mark >> order << order:
                self.marked.add(page)
            self.cached.update(dict.fromkeys(range(page, page + (1 << order)), (page, order)))
            page += 1 << order

    def _small(self, first: int, pages: int, behind: int | None) -> None:
        for i in range(pages):
            if first + i not in self.cached:
                self.cached[first + i] = first + i, 0
                if behind is not None and behind <= pages and i == pages - behind:
                    self.marked.add(first + i)

    def give_back(self, keep: list[tuple[int, int]]) -> None:
        stay = pages_of(keep)
        self.cached = {page: folio for page, folio in self.cached.items() if page in stay}
        self.marked &= stay


def pages_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for at, size in ranges for page in range(at // PAGE, (at + size) // PAGE)}


LIMITS = [Limits(a, r) for a in (32, 64, 128, 256, 512, 1024, 2048, 4096) for r in (320, 1024)]


def whole(offset: int, nbytes: int) -> set[int]:
    return set(range(offset // PAGE, -(-(offset + nbytes) // PAGE)))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("trims", [True, False])
def test_exactly_the_range_comes_and_no_mark_is_left(limits: Limits, *, trims: bool) -> None:
    pick = random.Random(1)
    kernel = Kernel(limits, trims=trims)
    folios = Folios(kernel, limits)  # type: ignore[arg-type]
    for _ in range(150):
        offset, nbytes = pick.randrange(1 << 31), pick.randrange(1, 3 << 20)
        kernel.give_back([])
        folios.keep(offset, nbytes)
        kept = set(kernel.cached)
        assert kept == {
            p for at, size in folios.anchors(offset, nbytes) for p in range(at // PAGE, (at + size) // PAGE)
        }
        assert kept <= whole(offset, nbytes)
        folios.ask(offset, nbytes)
        assert set(kernel.cached) == whole(offset, nbytes)
        assert not kernel.marked


LARGE = [
    (limits, nbytes)
    for nbytes in (1_149_952, 900_000, 2_500_000, 30_000_000)
    for limits in LIMITS
    if not limits.ahead // 2 < nbytes // PAGE <= limits.ahead  # cut where multiples of that lie: half of it comes so
]


@pytest.mark.parametrize(("limits", "nbytes"), LARGE, ids=str)
def test_nearly_all_comes_in_folios_of_many_pages(limits: Limits, nbytes: int) -> None:
    pick = random.Random(2)
    kernel = Kernel(limits)
    folios = Folios(kernel, limits)  # type: ignore[arg-type]
    for round_ in range(60):
        if round_ == 20:  # its descriptors have got going
            kernel.by_page = large = count = 0
        offset = pick.randrange(1 << 31)
        kernel.give_back([])
        folios.keep(offset, nbytes)
        told = folios.ask(offset, nbytes)
        if round_ >= 20:
            large += told
            count += len(set(kernel.cached.values()))
    assert large > 0.8 * 40 * nbytes
    assert kernel.by_page < 0.17 * 40 * nbytes
    assert count < 0.22 * 40 * nbytes / PAGE


@pytest.mark.parametrize("limits", [Limits(2048, 1024), Limits(32, 1024)], ids=str)
def test_again_and_again_with_what_stays(limits: Limits) -> None:
    """Ranges side by side come and go in any order, and what stays of each is enough for the next time."""
    pick = random.Random(3)
    kernel = Kernel(limits)
    folios = Folios(kernel, limits)  # type: ignore[arg-type]
    ranges = [(7 * PAGE + i * 281 * PAGE, 281 * PAGE) for i in range(12)]
    keep = [one for at, size in ranges for one in folios.anchors(at, size)]
    for at, size in ranges:
        folios.keep(at, size)
    here: set[int] = set()
    for step in range(200):
        one = pick.randrange(12)
        if one in here:
            here.discard(one)
        else:
            here.add(one)
            assert folios.ask(*ranges[one]) > 0 or step < 30
        stay = [ranges[i] for i in here]
        kernel.give_back(keep + stay)
        assert pages_of(keep + stay) == set(kernel.cached)
        assert not kernel.marked


@pytest.mark.parametrize("amiss", ["anchors", "inside", "all"])
def test_where_it_is_not_as_it_should_be_it_is_read_by_the_page(amiss: str) -> None:
    limits = Limits(2048, 1024)
    kernel = Kernel(limits)
    folios = Folios(kernel, limits)  # type: ignore[arg-type]
    offset, nbytes = 100 * PAGE, 300 * PAGE
    if amiss != "anchors":
        folios.keep(offset, nbytes)
        kernel.ahead(*{"inside": (250, 1), "all": (100, 300)}[amiss])
    kernel.by_page = 0
    assert folios.ask(offset, nbytes) == 0
    assert set(kernel.cached) == whole(offset, nbytes)
    assert not kernel.marked
    assert (kernel.by_page == 0) == (amiss == "all")


@pytest.mark.parametrize("limits", [Limits(0, 0), Limits(16, 1024), Limits(48, 1024), Limits(0, 1024)], ids=str)
def test_a_device_whose_windows_cannot_be_made(limits: Limits) -> None:
    assert not limits.usable
    assert all(piece.anchors == 0 for piece in plan(0, 10 << 20, limits))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_what_is_asked_for_makes_the_window(limits: Limits) -> None:
    for pages in range(80, 1100):
        asked = limits.asked(8, pages)
        if asked:
            assert limits.window(8, asked) == pages
    assert limits.asked(8, max(limits) + 1) == 0


def test_pieces_cover_the_whole_pages_and_anchors_lie_in_them() -> None:
    pick = random.Random(4)
    for _ in range(500):
        offset, nbytes = pick.randrange(1 << 24), pick.randrange(1 << 23)
        pieces = plan(offset, nbytes, pick.choice(LIMITS))
        assert [p for one in pieces for p in range(one.first, one.first + one.pages)] == list(
            range(-(-offset // PAGE), (offset + nbytes) // PAGE)
        )
        assert all(one.window + 80 <= one.first + one.pages for one in pieces if one.kept)
        assert sum(one.anchors for one in pieces) <= 5 * len(pieces)


def test_the_limits_of_a_files_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb") as stream:
        assert all(value >= 0 for value in limits_of(stream.fileno()))
        monkeypatch.setattr(module.os, "minor", lambda _: 1_048_575)
        assert limits_of(stream.fileno()) == (0, 0), "a file system without a device of its own"
