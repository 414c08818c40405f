"""Which way of reading the sidecar takes, on pages that are made up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llmtraced.prefetch.policy import CHUNK, Chunk
from llmtraced.prefetch.work import calibrate

CHUNKS = [Chunk(0, number, CHUNK, number, number) for number in range(100)]


class FakePages:
    """Some chunks come as huge pages; a way of reading takes the time that it is given.

    Attributes:
        there: chunks in memory.
        read_by: the ways that were tried.
    """

    def __init__(self, huge: set[int], seconds: dict[str, float] | None = None) -> None:
        self.huge, self.seconds = huge, seconds or {}
        self.there: set[int] = set()
        self.read_by: list[str] = []

    def comes_huge(self, chunk: int) -> bool:
        self.there.add(chunk)
        return chunk in self.huge

    def read(self, chunk: int, path: str, scratch: Any = None) -> None:
        self.read_by.append(path)
        self.there.add(chunk)
        time.sleep(self.seconds[path])

    def give_back(self, chunk: int) -> None:
        raise ProcessLookupError  # as of a server that has ended: no reason to fail

    def drop(self, chunk: int) -> None:
        self.there.discard(chunk)


def test_one_huge_page_is_proof_enough() -> None:
    pages = FakePages({CHUNKS[::4][5].number})
    assert calibrate([pages], CHUNKS, 8) == ("huge", {})  # type: ignore[list-item]
    assert pages.read_by == []
    assert not pages.there


@pytest.mark.parametrize("faster", ["readahead", "fadvise"])
def test_without_huge_pages_the_faster_way_is_taken(faster: str) -> None:
    pages = FakePages(set(), {"readahead": 0.01, "fadvise": 0.01} | {faster: 0.001})
    path, speeds = calibrate([pages], CHUNKS, 2)  # type: ignore[list-item]
    assert path == faster
    assert set(speeds) == {"readahead", "fadvise"}
    assert all(figures["bytes_per_s"] > 0 for figures in speeds.values())
    assert not pages.there


def test_a_chunk_that_is_short_proves_nothing() -> None:
    chunks = [Chunk(0, 0, CHUNK // 2, 0, 0)]
    pages = FakePages({0}, {"readahead": 0.001, "fadvise": 0.001})
    assert calibrate([pages], chunks * 24, 2)[0] != "huge"  # type: ignore[list-item]
