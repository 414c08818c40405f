"""Threads that read chunks, on pages that are made up."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import wait_until

from llmtraced.prefetch.pages import CHUNK
from llmtraced.prefetch.readers import Threads


class FakePages:
    """Reads nothing, and only when it is let: ``allow`` is the number of reads that may go through."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.scratches: list[Any] = []
        self.broken: dict[int, OSError] = {}
        self.lock = threading.Lock()

    def read(self, chunk: int, path: str, scratch: Any = None) -> None:
        with self.lock:
            self.begun.append(chunk)
            self.scratches.append((path, scratch))
        assert self.gate.acquire(timeout=20)
        if chunk in self.broken:
            raise self.broken[chunk]
        with self.lock:
            self.ended.append(chunk)

    def allow(self, count: int = 1) -> None:
        for _ in range(count):
            self.gate.release()


@pytest.fixture
def pages() -> Iterator[FakePages]:
    made = FakePages()
    yield made
    made.allow(1000)


def reader(pages: FakePages, count: int, path: str = "huge") -> Threads:
    return Threads([pages], path, count)  # type: ignore[list-item]


def collect(threads: Threads, count: int) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    wait_until(lambda: found.extend(threads.collect()) or len(found) >= count, 10, f"{count} reads end")
    return found


def test_chunks_are_read_in_the_order_asked_for(pages: FakePages) -> None:
    threads = reader(pages, 1)
    threads.submit((name, 0, 100 + name) for name in (5, 3, 9))
    threads.submit([(1, 0, 101)])
    pages.allow(4)
    assert collect(threads, 4) == [(5, ""), (3, ""), (9, ""), (1, "")]
    assert pages.begun == [105, 103, 109, 101]
    assert threads.collect() == []
    threads.close()


def test_as_many_at_a_time_as_asked(pages: FakePages) -> None:
    threads = reader(pages, 3)
    threads.submit((n, 0, n) for n in range(10))
    wait_until(lambda: len(pages.begun) == 3, 10, "three reads begin")
    pages.allow(1)
    wait_until(lambda: len(pages.begun) == 4, 10, "the next begins")
    assert len(threads.collect()) <= 1
    pages.allow(9)
    threads.close()


def test_what_has_not_begun_can_be_taken_back(pages: FakePages) -> None:
    threads = reader(pages, 1)
    threads.submit((n, 0, n) for n in range(6))
    wait_until(lambda: pages.begun == [0], 10, "the first read begins")
    assert threads.forget({3, 5}) == [1, 2, 4]  # 0 is under way: not among them, though it is not kept
    assert threads.forget({3, 5}) == []
    pages.allow(3)
    assert collect(threads, 3) == [(0, ""), (3, ""), (5, "")]
    assert pages.begun == [0, 3, 5]
    threads.close()


def test_an_error_is_told_and_the_thread_goes_on(pages: FakePages) -> None:
    pages.broken = {1: OSError(errno.EIO, os.strerror(errno.EIO)), 2: OSError("without a number")}
    threads = reader(pages, 1)
    threads.submit((n, 0, n) for n in range(4))
    pages.allow(4)
    assert collect(threads, 4) == [(0, ""), (1, "Input/output error"), (2, "OSError('without a number')"), (3, "")]
    threads.close()


def test_closing_waits_for_what_is_under_way_and_drops_the_rest(pages: FakePages) -> None:
    threads = reader(pages, 2)
    before = threading.active_count()
    threads.submit((n, 0, n) for n in range(6))
    wait_until(lambda: len(pages.begun) == 2, 10, "two reads begin")
    closer = threading.Thread(target=threads.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    pages.allow(2)
    closer.join(10)
    assert not closer.is_alive()
    assert sorted(pages.ended) == [0, 1]
    assert sorted(threads.collect()) == [(0, ""), (1, "")]
    assert threading.active_count() == before - 2


def test_each_thread_has_a_scratch_buffer_of_its_own_if_needed(pages: FakePages) -> None:
    pages.allow(2)
    for path in ("pread", "huge"):
        threads = reader(pages, 2, path)
        pages.begun.clear()
        pages.scratches.clear()
        while pages.gate.acquire(blocking=False):
            pass
        threads.submit([(0, 0, 0), (1, 0, 1)])
        wait_until(lambda: len(pages.begun) == 2, 10, "both begin")
        (_, one), (_, two) = pages.scratches
        if path == "pread":
            assert one is not two
            assert len(one) == len(two) == CHUNK
        else:
            assert one is two is None
        pages.allow(2)
        threads.close()


def test_each_file_has_its_pages() -> None:
    first, second = FakePages(), FakePages()
    for one in (first, second):
        one.allow(1)
    threads = Threads([first, second], "huge", 1)  # type: ignore[list-item]
    threads.submit([(0, 1, 7), (1, 0, 8)])
    collect(threads, 2)
    threads.close()
    assert (first.begun, second.begun) == ([8], [7])
