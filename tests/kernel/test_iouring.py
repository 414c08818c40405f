"""The ring that asks the kernel's workers for madvise(2), on the running kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from pathlib import Path

import pytest
from helpers import wait_until

from llmtraced.errors import LlmtracedError
from llmtraced.prefetch.iouring import MadviseRing
from llmtraced.prefetch.launch import Options, run

pytestmark = pytest.mark.kernel("root")

PAGE = mmap.PAGESIZE
MADV_DONTNEED, MADV_POPULATE_READ = 4, 22


def arrive(ring: MadviseRing, answered: list[tuple[int, int]], count: int) -> None:
    """Wait until so many requests have been answered."""

    def all_there() -> bool:
        answered.extend(ring.answers())
        return len(answered) >= count

    wait_until(all_there, 5, f"{count} answers")


def test_each_request_is_carried_out_and_answered_once() -> None:
    """Many times as many as the ring has places, so that head, tail and slots go round."""
    memory = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    address = ctypes.addressof(view)
    ring = MadviseRing(3)
    answered: list[tuple[int, int]] = []
    for turn in range(100):
        memory[:] = b"x" * len(memory)
        ring.submit((turn * 3 + n, address + 8 * n * PAGE, 8 * PAGE, MADV_DONTNEED) for n in range(3))
        arrive(ring, answered, 3 * (turn + 1))
        assert memory[: 24 * PAGE] == bytes(24 * PAGE), "given back"
        assert memory[24 * PAGE :] == b"x" * 40 * PAGE, "and nothing else"
    time.sleep(0.01)
    assert ring.answers() == []
    assert sorted(answered) == [(n, 0) for n in range(300)]
    ring.close()
    del view


def test_what_fails_is_told_by_its_number() -> None:
    memory = mmap.mmap(-1, PAGE)
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    ring = MadviseRing(2)
    ring.submit([(7, address, PAGE, MADV_POPULATE_READ), (8, address, PAGE, 12345)])
    answered: list[tuple[int, int]] = []
    arrive(ring, answered, 2)
    assert sorted(answered) == [(7, 0), (8, errno.EINVAL)]
    ours = Path("/proc/self/fd")
    open_before = set(ours.iterdir())
    ring.close()
    assert set(ours.iterdir()) < open_before
    del view


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernel.io_uring_disabled is 2, which a test does not set for the whole machine."""

    def refused(depth: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("llmtraced.prefetch.launch.MadviseRing", refused)
    with pytest.raises(LlmtracedError, match=r"no io_uring here \(Operation not permitted\)"):
        run(os.getpid(), Options(strategy="uring"))
    with pytest.raises(LlmtracedError, match="no io_uring here"):
        run(os.getpid(), Options(path="uring"))
