"""Read chunks in the background: threads that block in the kernel, or workers of io_uring."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue

from llmtraced.prefetch.iouring import MadviseRing
from llmtraced.prefetch.pages import Pages, untouch
from llmtraced.prefetch.policy import CHUNK
from llmtraced.prefetch.turn import hurry

__all__ = ["Threads", "Uring"]


class Threads:
    """Threads that read chunks, soonest needed first. Python's lock is released while they are in the kernel.

    What they take requests from is made of parts that the interpreter keeps whole by itself (a deque, a SimpleQueue):
    a threading.Condition costs a chunk as much processor time as its read, beside a server that computes.

    Args:
        files: pages of each file.
        path: how (pages.PATHS).
        count: of threads: chunks that are read at the same time.
    """

    def __init__(self, files: list[Pages], path: str, count: int) -> None:
        self._files, self.path = files, path
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._done: deque[tuple[int, str]] = deque()
        self._turns: SimpleQueue[None] = SimpleQueue()  # one for each request at least: some may find none any more
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"read-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, reads: Iterable[tuple[int, int, int]]) -> None:
        """Ask for chunks: (name of the request, file, number of the chunk)."""
        for one in reads:
            self._waiting.append(one)
            self._turns.put(None)

    def forget(self, keep: set[int]) -> list[int]:
        """Take back requests that have not begun and are not in ``keep``; return their names."""
        if all(name in keep for name, _, _ in tuple(self._waiting)):
            return []
        gone: list[tuple[int, int, int]] = []
        kept: list[tuple[int, int, int]] = []
        while self._waiting:
            with contextlib.suppress(IndexError):  # a thread has just taken the last one
                one = self._waiting.popleft()
                (kept if one[0] in keep else gone).append(one)
        self.submit(kept)
        return [name for name, _, _ in gone]

    def collect(self) -> list[tuple[int, str]]:
        """Return (name, error or "") of the requests that have ended since the last call."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def _work(self) -> None:
        scratch = bytearray(CHUNK) if self.path == "pread" else None
        hurry(1)
        while True:
            self._turns.get()
            if self._closed:
                return
            try:
                name, file, number = self._waiting.popleft()
            except IndexError:  # it was taken back
                continue
            try:
                self._files[file].read(number, self.path, scratch)
            except Exception as error:  # whatever it is: who asked must hear that this one has ended
                self._done.append((name, getattr(error, "strerror", None) or repr(error)))
            else:
                self._done.append((name, ""))

    def close(self) -> None:
        """Stop; reads under way are waited for, requests that have not begun are dropped."""
        self._closed = True
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            thread.join()


class Uring:
    """io_uring: the kernel's own workers touch the huge-page mapping (IORING_OP_MADVISE, MADV_POPULATE_READ).

    Args:
        files: pages of each file.
        depth: chunks that are read at the same time.

    Raises:
        OSError: the kernel has no io_uring, or it is switched off (kernel.io_uring_disabled).
    """

    path = "uring"

    def __init__(self, files: list[Pages], depth: int) -> None:
        self._files, self._depth = files, depth
        self._ring = MadviseRing(depth)
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._flying: dict[int, tuple[object, int, int]] = {}

    def submit(self, reads: Iterable[tuple[int, int, int]]) -> None:
        """Ask for chunks: (name of the request, file, number of the chunk)."""
        self._waiting.extend(reads)
        self._fill()

    def forget(self, keep: set[int]) -> list[int]:
        """Take back requests that have not begun and are not in ``keep``; return their names."""
        gone = [name for name, _, _ in self._waiting if name not in keep]
        self._waiting = deque(one for one in self._waiting if one[0] in keep)
        return gone

    def _fill(self) -> None:
        requests = []
        while self._waiting and len(self._flying) < self._depth:
            name, file, number = self._waiting.popleft()
            touch, address, length, advice = self._files[file].touching(number)
            requests.append((name, address, length, advice))
            self._flying[name] = touch, address, length
        if requests:
            self._ring.submit(requests)

    def collect(self) -> list[tuple[int, str]]:
        """Return (name, error or "") of the requests that have ended since the last call, and begin others."""
        found = []
        for name, error in self._ring.answers():
            _, address, length = self._flying.pop(name)
            untouch(address, length)
            found.append((name, os.strerror(error) if error else ""))
        self._fill()
        return found

    def close(self) -> None:
        """Stop; reads under way are waited for, requests that have not begun are dropped."""
        self._waiting.clear()
        while self._flying:
            self.collect()
            time.sleep(0.0005)
        self._ring.close()
