"""A ring of io_uring for one kind of request, madvise(2), from a bare interpreter: system calls and memory, no library.

Numbers and layouts are the kernel's (``include/uapi/linux/io_uring.h``; ``struct io_uring_params``, ``io_uring_sqe`` of
64 bytes, ``io_uring_cqe`` of 16). Requests are taken in a system call that this thread makes, so what it wrote before
is seen. That an answer is complete once the ring's tail has passed it relies on x86-64, which does not reorder loads;
it is the only processor that llmtraced runs on.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from collections.abc import Iterable
from typing import Final

from llmtraced.prefetch.pages import checked

__all__ = ["MadviseRing"]

_SETUP, _ENTER = 425, 426  # system calls
_OP_MADVISE = 25
_OFF_RINGS, _OFF_SQES = 0, 0x10000000
_FEAT_SINGLE_MMAP = 1
_PAUSE_SECONDS = 0.001  # before asking again, where the kernel has no memory for a request

_PARAMS: Final = struct.Struct("10I 7I4xQ 7I4xQ")  # 7 of the submissions' and 7 of the answers' offsets, from 10 and 18
_SQE: Final = struct.Struct("BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, off, addr, len, advice, user_data
_CQE: Final = struct.Struct("QiI")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: ctypes.c_uint | ctypes.c_void_p | ctypes.Array[ctypes.c_char]) -> int:
    return checked(_libc.syscall(ctypes.c_long(number), *arguments))


class MadviseRing:
    """Requests to the kernel's own workers, and their answers.

    Args:
        depth: requests that are under way at the same time, at most.

    Raises:
        OSError: the kernel has no io_uring, or not of this form (before 5.4), or it is switched off
            (kernel.io_uring_disabled).
    """

    def __init__(self, depth: int) -> None:
        params = ctypes.create_string_buffer(_PARAMS.size)
        self._fd = _call(_SETUP, ctypes.c_uint(depth), params)
        told = _PARAMS.unpack(params.raw)
        sq_entries, cq_entries, features = told[0], told[1], told[5]
        sq, cq = told[10:17], told[18:25]  # head, tail, ring_mask, ring_entries, flags, dropped, array; 5 is cqes there
        try:
            if not features & _FEAT_SINGLE_MMAP:
                raise OSError(errno.ENOSYS, "io_uring of before Linux 5.4")
            size = max(sq[6] + 4 * sq_entries, cq[5] + _CQE.size * cq_entries)
            self._rings = mmap.mmap(self._fd, size, offset=_OFF_RINGS)
            self._requests = mmap.mmap(self._fd, _SQE.size * sq_entries, offset=_OFF_SQES)
        except BaseException:
            os.close(self._fd)
            raise
        self._words = memoryview(self._rings)[: size & ~3].cast("I")
        self._sq_tail, self._sq_mask, self._sq_array = sq[1] // 4, self._words[sq[2] // 4], sq[6] // 4
        self._cq_head, self._cq_tail = cq[0] // 4, cq[1] // 4
        self._cq_mask, self._cqes = self._words[cq[2] // 4], cq[5]

    def submit(self, requests: Iterable[tuple[int, int, int, int]]) -> None:
        """Begin requests: (name, address, bytes, advice). With those under way they must not be more than ``depth``."""
        count, tail = 0, self._words[self._sq_tail]
        for name, address, length, advice in requests:
            slot = tail & self._sq_mask
            _SQE.pack_into(self._requests, slot * _SQE.size, _OP_MADVISE, 0, 0, -1, 0, address, length, advice, name)
            self._words[self._sq_array + slot] = slot
            tail = tail + 1 & 0xFFFFFFFF
            count += 1
        self._words[self._sq_tail] = tail
        while count:
            count -= self._enter(count)

    def _enter(self, count: int) -> int:
        while True:
            try:
                return _call(
                    _ENTER, *(ctypes.c_uint(n) for n in (self._fd, count, 0, 0)), ctypes.c_void_p(), ctypes.c_void_p()
                )
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise
                time.sleep(_PAUSE_SECONDS)

    def answers(self) -> list[tuple[int, int]]:
        """Return what has ended since the last call: (name, 0 or the number of the error)."""
        head, tail = self._words[self._cq_head], self._words[self._cq_tail]
        found = []
        while head != tail:
            name, result, _ = _CQE.unpack_from(self._rings, self._cqes + (head & self._cq_mask) * _CQE.size)
            found.append((name, max(-result, 0)))
            head = head + 1 & 0xFFFFFFFF
        self._words[self._cq_head] = head
        return found

    def close(self) -> None:
        """Give the ring back; the kernel waits for what is under way, or cancels it."""
        self._words.release()
        self._rings.close()
        self._requests.close()
        os.close(self._fd)
