"""How much of a file is in the page cache: cachestat(2), or mincore(2) where it is missing. Neither reads the file."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.errors import NO_PERMISSION, LlmtracedError, printable

__all__ = ["resident_bytes", "resident_parts"]


class _CachestatRange(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):  # include/uapi/linux/mman.h
    _fields_ = tuple((n, ctypes.c_uint64) for n in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


_SYS_CACHESTAT: Final = 451  # the same number on every architecture
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_MINCORE_WINDOW: Final = 64 << 20


def resident_bytes(path: Path | str) -> int:
    """Return how many bytes of a file are in the page cache, in whole pages but at most the file's size.

    Raises:
        LlmtracedError: the file is neither ours nor writable for us, so the kernel will not tell (exit code 3).
    """
    size = Path(path).stat().st_size
    return min(size, _PAGE * _pages(path, [(0, -(-size // _PAGE))])[0])


def resident_parts(path: Path | str, parts: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many bytes of each part of a file are in the page cache.

    The kernel tells whole pages, and the ends of a part may share theirs with its neighbours: the answer is the share
    of the part's pages that are there, times its size.

    Args:
        path: the file.
        parts: (offset, size) in bytes.

    Raises:
        LlmtracedError: the file is neither ours nor writable for us, so the kernel will not tell (exit code 3).
    """
    spans = [(offset // _PAGE, -(-(offset + size) // _PAGE)) for offset, size in parts]
    found = _pages(path, spans)
    return [size * n // max(end - start, 1) for n, (start, end), (_, size) in zip(found, spans, parts, strict=True)]


def _pages(path: Path | str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the cached pages of each stretch of pages [start, end)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = _cachestat_pages(fd, spans)
        if pages is None:
            before = np.concatenate([[0], np.cumsum(_mincore_pages(fd, os.fstat(fd).st_size), dtype=np.int64)])
            last = len(before) - 1
            pages = [int(before[min(end, last)] - before[min(start, last)]) for start, end in spans]
        return pages
    except PermissionError as failure:
        raise LlmtracedError(
            f"cannot ask which pages of {printable(str(path))} are cached: {failure.strerror}; run as root or as its "
            "owner",
            NO_PERMISSION,
        ) from failure
    finally:
        os.close(fd)


def _cachestat_pages(fd: int, spans: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return the cached pages of each stretch of pages [start, end), or None where cachestat(2) is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = _Cachestat()
    found = []
    for start, end in spans:
        asked = _CachestatRange(start * _PAGE, (end - start) * _PAGE)
        if start == end:  # a length of 0 would mean the rest of the file
            found.append(0)
            continue
        if libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(answer), 0):
            code = ctypes.get_errno()
            if code in (errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise OSError(code, os.strerror(code))
        found.append(int(answer.cache))
    return found


def _mincore_pages(fd: int, size: int) -> NDArray[np.uint8]:
    """Return 1 for each page of the file that is cached, else 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    pages = np.zeros(-(-size // _PAGE), np.uint8)
    for start in range(0, size, _MINCORE_WINDOW):
        length = min(_MINCORE_WINDOW, size - start)
        address = libc.mmap(None, length, 1, 1, fd, start)  # PROT_READ, MAP_SHARED
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            if libc.mincore(address, length, pages[start // _PAGE :].ctypes.data):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            libc.munmap(address, length)
    return pages & np.uint8(1)
