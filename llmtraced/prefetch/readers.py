"""Read chunks in the background: threads that block in the kernel, or io_uring (which needs the package liburing)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import CHUNK

__all__ = ["Threads", "Uring"]


class Threads:
    """Threads that read chunks, soonest needed first. Python's lock is released while they are in the kernel.

    Args:
        files: pages of each file.
        path: how (pages.PATHS).
        count: of threads: chunks that are read at the same time.
    """

    def __init__(self, files: list[Pages], path: str, count: int) -> None:
        self._files, self.path = files, path
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._done: deque[tuple[int, str]] = deque()
        self._turn = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"read-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, reads: Iterable[tuple[int, int, int]]) -> None:
        """Ask for chunks: (name of the request, file, number of the chunk)."""
        with self._turn:
            before = len(self._waiting)
            self._waiting.extend(reads)
            self._turn.notify(len(self._waiting) - before)

    def forget(self, keep: set[int]) -> list[int]:
        """Take back requests that have not begun and are not in ``keep``; return their names."""
        with self._turn:
            gone = [name for name, _, _ in self._waiting if name not in keep]
            if gone:
                self._waiting = deque(one for one in self._waiting if one[0] in keep)
        return gone

    def collect(self) -> list[tuple[int, str]]:
        """Return (name, error or "") of the requests that have ended since the last call."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def _work(self) -> None:
        scratch = bytearray(CHUNK) if self.path == "pread" else None
        while True:
            with self._turn:
                while not self._waiting and not self._closed:
                    self._turn.wait()
                if self._closed:
                    return
                name, file, number = self._waiting.popleft()
            try:
                self._files[file].read(number, self.path, scratch)
            except Exception as error:  # whatever it is: who asked must hear that this one has ended
                self._done.append((name, getattr(error, "strerror", None) or repr(error)))
            else:
                self._done.append((name, ""))

    def close(self) -> None:
        """Stop; reads under way are waited for, requests that have not begun are dropped."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()


class Uring:
    """io_uring: the kernel's own workers touch the huge-page mapping (IORING_OP_MADVISE, MADV_POPULATE_READ).

    Args:
        files: pages of each file.
        depth: chunks that are read at the same time.

    Raises:
        ImportError: the ``liburing`` package is not there.
        OSError: the kernel has no io_uring, or it is switched off (kernel.io_uring_disabled).
    """

    path = "uring"

    def __init__(self, files: list[Pages], depth: int) -> None:
        import liburing  # only this way of reading needs it

        self._api, self._files, self._depth = liburing, files, depth
        self._ring, self._entry = liburing.Ring(), liburing.Cqe()
        liburing.io_uring_queue_init(depth, self._ring)
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._flying: dict[int, tuple[int, int]] = {}

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
        count = 0
        while self._waiting and len(self._flying) < self._depth:
            name, file, number = self._waiting.popleft()
            address, length, advice = self._files[file].touching(number)
            request = self._api.io_uring_get_sqe(self._ring)
            self._api.io_uring_prep_madvise(request, address, length, advice)
            request.user_data = name + 1
            self._flying[name] = file, number
            count += 1
        if count:
            self._api.io_uring_submit(self._ring)

    def collect(self) -> list[tuple[int, str]]:
        """Return (name, error or "") of the requests that have ended since the last call, and begin others."""
        found = []
        while self._flying:
            try:
                self._api.io_uring_peek_cqe(self._ring, self._entry)
            except BlockingIOError:
                break
            entry = self._entry[0]
            name, error = entry.user_data - 1, ""
            try:
                _ = entry.res  # the binding raises what failed
            except OSError as failure:
                error = failure.strerror or "error"
            self._api.io_uring_cqe_seen(self._ring, entry)
            file, number = self._flying.pop(name)
            self._files[file].untouch(number)
            found.append((name, error))
        self._fill()
        return found

    def close(self) -> None:
        """Stop; reads under way are waited for, requests that have not begun are dropped."""
        self._waiting.clear()
        while self._flying:
            self.collect()
            time.sleep(0.0005)
        self._api.io_uring_queue_exit(self._ring)
