"""The ring's reader against a ring in ordinary memory, laid out and filled as the kernel does (kernel/bpf/ringbuf.c).

A memfd cannot show the same data twice in a row as the kernel's mapping does, so the producer here writes both copies.
"""

from __future__ import annotations

import mmap
import os
import select
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmtraced.probes import loader
from llmtraced.probes.ringbuf import Ring
from llmtraced.schema import EVENT

SIZE = 4096  # 64 records
BUSY = 1 << 31
PAYLOAD = EVENT.itemsize - 8


class NoEpoll:
    """A memfd cannot be polled, a BPF ring can."""

    polled: float | None = None

    def register(self, _fd: int, _mask: int) -> None:
        pass

    def poll(self, seconds: float) -> list[object]:
        NoEpoll.polled = seconds
        return []

    def close(self) -> None:
        pass


class Producer:
    """The kernel's side."""

    def __init__(self, start: int = 0) -> None:
        self.fd = os.memfd_create("ring")
        page = mmap.PAGESIZE
        os.ftruncate(self.fd, 2 * page + 2 * SIZE)
        memory = mmap.mmap(self.fd, 2 * page + 2 * SIZE)
        self.consumer = np.frombuffer(memory, np.uint64, 1)
        self.producer = np.frombuffer(memory, np.uint64, 1, page)
        self.copies = [np.frombuffer(memory, EVENT, SIZE // 64, 2 * page + n * SIZE) for n in (0, 1)]
        self.consumer[0] = self.producer[0] = start

    @property
    def room(self) -> int:
        return (SIZE - int(self.producer[0]) + int(self.consumer[0])) // 64

    def reserve(self, ts: int) -> int:
        """Return the place of a record that is being written; 0 room is the caller's to see."""
        at = int(self.producer[0]) % SIZE // 64
        for copy in self.copies:
            copy[at] = 0
            copy["header"][at] = PAYLOAD | BUSY
            copy["ts"][at] = ts
        self.producer[0] += 64
        return at

    def submit(self, at: int) -> None:
        for copy in self.copies:
            copy["header"][at] = PAYLOAD


@pytest.fixture(autouse=True)
def _no_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "epoll", NoEpoll)


@pytest.fixture
def kernel() -> Iterator[Producer]:
    producer = Producer()
    yield producer
    os.close(producer.fd)


def put(kernel: Producer, *times: int) -> None:
    for ts in times:
        kernel.submit(kernel.reserve(ts))


def times(batch: NDArray[Any]) -> list[int]:
    return [int(t) for t in batch["ts"]]


def test_what_was_submitted_is_read_once_in_order(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    assert ring.capacity == 64
    assert times(ring.read()) == []
    put(kernel, 1, 2, 3)
    assert ring.waiting == 3
    batch = ring.read()
    assert batch.dtype == EVENT
    assert times(batch) == [1, 2, 3]
    assert (times(ring.read()), ring.waiting, kernel.room) == ([], 0, 64)
    ring.close()
    assert times(batch) == [1, 2, 3], "batches are copies"


def test_batches_are_copies(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    put(kernel, *range(64))
    batch = ring.read()
    put(kernel, *range(100, 164))
    assert times(batch) == list(range(64))
    ring.close()


def test_a_batch_may_wrap_around(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    put(kernel, *range(60))
    assert len(ring.read()) == 60
    put(kernel, *range(100, 164))
    assert kernel.room == 0
    assert times(ring.read()) == list(range(100, 164)), "one batch, though it ends at the ring's beginning"
    ring.close()


def test_the_limit(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    put(kernel, *range(10))
    assert times(ring.read(4)) == [0, 1, 2, 3]
    assert ring.waiting == 6
    assert times(ring.read(4)) == [4, 5, 6, 7]
    assert times(ring.read(4)) == [8, 9]
    ring.close()


def test_a_record_that_is_being_written_holds_back_what_follows(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    put(kernel, 1, 2)
    slow = kernel.reserve(3)
    put(kernel, 4)
    assert times(ring.read()) == [1, 2]
    assert times(ring.read()) == []
    assert ring.waiting == 2
    kernel.submit(slow)
    assert times(ring.read()) == [3, 4]
    ring.close()


def test_positions_only_grow(kernel: Producer) -> None:
    """The kernel's positions are not taken modulo the ring: after 2^40 bytes all is as at the start."""
    kernel.consumer[0] = kernel.producer[0] = (1 << 40) + 64 * 5
    ring = Ring(kernel.fd, SIZE)
    put(kernel, 1, 2)
    assert times(ring.read()) == [1, 2]
    assert int(kernel.consumer[0]) == (1 << 40) + 64 * 7
    ring.close()


def test_wait_sleeps_on_the_ring(kernel: Producer) -> None:
    ring = Ring(kernel.fd, SIZE)
    ring.wait(0.25)
    assert NoEpoll.polled == 0.25
    ring.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 200), st.lists(st.one_of(st.integers(1, 70), st.sampled_from(["read", "slow", "late"])), max_size=40)
)
def test_any_interleaving_loses_and_repeats_nothing(start: int, steps: list[int | str]) -> None:
    kernel = Producer(start * 64)
    ring = Ring(kernel.fd, SIZE)
    waiting: deque[int] = deque()  # reserved, not yet submitted
    expected: deque[int] = deque()  # all reserved and not yet read
    pending: dict[int, int] = {}  # place -> time, of those not submitted
    clock = 0
    for step in [*steps, "late", "read", "read"]:
        if step == "read":
            got = times(ring.read(16))
            for ts in got:
                assert ts == expected.popleft()
            ready = next((i for i, ts in enumerate(expected) if ts in pending.values()), len(expected))
            assert len(got) == 16 or ready == 0, "all that is finished comes, up to the limit"
        elif step == "late":
            while waiting:
                at = waiting.popleft()
                kernel.submit(at)
                del pending[at]
        else:
            for _ in range(1 if step == "slow" else int(step)):
                if not kernel.room:
                    break
                clock += 1
                at = kernel.reserve(clock)
                expected.append(clock)
                if step == "slow":
                    waiting.append(at)
                    pending[at] = clock
                else:
                    kernel.submit(at)
    assert times(np.concatenate([ring.read(), ring.read()])) == list(expected)
    ring.close()
    os.close(kernel.fd)


def test_nobody_discards_records() -> None:
    """The reader does not look at the discard bit: a program that reserves a record submits it."""
    assert "discard" not in loader.source()
