"""System calls on pages of a model file, for one server that has it mapped. Standard library only.

The page cache is shared: what is read, locked or given back here is so for the server, which has no part in it. Files
are handled in chunks of 2 MiB, because a chunk that is read by touching a mapping with MADV_HUGEPAGE comes in as *one*
folio of 2 MiB (Linux 5.18 and later, on file systems with large folios: XFS; ext4 from 6.16; Btrfs from 6.17). Such a
folio is one allocation, one entry in the page cache, one fault for the server and one step to give back, where 4 KiB
pages are 512 of each. docs/prefetching.md has what that is worth.

Rules of the kernel that this module keeps (mm/madvise.c): MADV_PAGEOUT gives back only what the *server* has mapped,
and skips what anybody else has mapped as well. So chunks that are streamed are mapped here for a moment only, while
they are read (:meth:`Pages.read`), and those that are pinned stay mapped and locked.

And of reading ahead (mm/filemap.c, do_sync_mmap_readahead; mm/readahead.c): the folio at which the next stretch is to
be read carries a mark. A huge page that is touched in a mapping with MADV_RANDOM comes in alone and is that folio
itself; when the *server* then comes to it, the kernel reads as much as its readahead allows of what follows and is
missing, in small pages. Without MADV_RANDOM two huge pages are read and the second is marked; but where it is there
already, only the first comes in, and no mark. So there are two mappings, and a chunk is touched in that one which
leaves none.

And of when it stops reading ahead: after Linux 6.18 (mm: readahead: make thp readahead conditional to mmap_miss
logic) a file in which faults missed 100 times more often than they hit is read a page at a time, huge pages or not.
That is counted for each file that is *opened*, so chunks are touched in mappings of a file that is opened anew every
now and then (:class:`Touch`). 7.3 without that: 20,480 faults for 40 chunks, 9 s in place of 0.15.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

from llmtraced.prefetch.clock import PageTable
from llmtraced.prefetch.policy import CHUNK

__all__ = ["PAGE", "PATHS", "Iovec", "Pages", "block_of", "checked", "copied", "untouch"]

PATHS = ("huge", "readahead", "willneed", "fadvise", "pread")
"""Ways to bring a chunk in: touching a huge-page mapping; readahead(2); process_madvise(2) MADV_WILLNEED on the
server's mapping; posix_fadvise(2) POSIX_FADV_WILLNEED; reading it into a scratch buffer."""

PAGE = 4096
_BLOCKS = (8192, 16384, 32768, 65536)  # what else f_bsize is, is a network's unit of transfer
_PROT_READ, _MAP_SHARED = 1, 1
_MADV_RANDOM, _MADV_WILLNEED, _MADV_DONTNEED = 1, 3, 4
_MADV_HUGEPAGE, _MADV_PAGEOUT, _MADV_POPULATE_READ = 14, 21, 22
_NR_CACHESTAT, _NR_PROCESS_MADVISE = 451, 440
_TOUCHES = 32  # of 100 misses; a chunk of which parts are there may have many
_PIECE = 512 << 10  # one readahead call reads no more than the device's largest request

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for _name in ("munmap", "mlock", "munlock"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.readahead.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_size_t]
# For calls that take microseconds: to let other threads have the interpreter meanwhile costs more than they do.
_at_once = ctypes.PyDLL(None, use_errno=True)
_at_once.madvise.argtypes = _libc.madvise.argtypes


_Range, _Cached = ctypes.c_uint64 * 2, ctypes.c_uint64 * 5  # struct cachestat_range, cachestat


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def checked(result: int) -> int:
    """Return what a call of the C library returned.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def copied(pid: int, address: int, buffer: ctypes.Array[Any], nbytes: int) -> bool:
    """Copy memory of a process into the beginning of a buffer; return whether all of it could be read."""
    here, there = Iovec(ctypes.addressof(buffer), nbytes), Iovec(address, nbytes)
    done: int = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return done == nbytes


def block_of(fd: int) -> int:
    """Return how many bytes of a file come and go together: a page, or its file system's block where that is larger.

    (XFS with blocks of up to 64 KiB, Linux 6.12.)
    """
    block = os.fstatvfs(fd).f_bsize
    return block if block in _BLOCKS else PAGE


def _mapped(fd: int, size: int, offset: int = 0) -> int:
    address: int = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address


def _mapped_huge(fd: int, size: int, *, alone: bool) -> tuple[int, bool]:
    """Map a file for huge pages, ``alone``: of what is asked for only; return its address, and if there may be any."""
    # The kernel aligns a mapping of 2 MiB and more so that its huge pages fit (thp_get_unmapped_area).
    address, whole = _mapped(fd, size), size // PAGE * PAGE
    huge = _libc.madvise(address, whole, _MADV_HUGEPAGE) == 0
    if alone:
        _libc.madvise(address, whole, _MADV_RANDOM)
    return address, huge


class Touch:
    """A model file opened and mapped once more, for some chunks to be read by touching them. Unmapped when not used."""

    def __init__(self, fd: int, size: int) -> None:
        self._size, self._left = size, _TOUCHES
        self._alone, _ = _mapped_huge(fd, size, alone=True)
        self._followed, _ = _mapped_huge(fd, size, alone=False)

    def __del__(self, munmap: Any = _libc.munmap) -> None:
        for name in ("_alone", "_followed"):
            if address := self.__dict__.get(name):
                munmap(address, self._size)

    @property
    def spent(self) -> bool:
        """Whether it was enough: another one is to be made."""
        return self._left <= 0

    def address(self, offset: int, *, followed: bool) -> int:
        """Return where to touch what begins at an offset; ``followed``: all of the next chunk is there."""
        self._left -= 1
        return (self._followed if followed else self._alone) + offset


def untouch(address: int, length: int) -> None:
    """Take what was touched out of our page tables again; it stays in the page cache."""
    _at_once.madvise(address, length, _MADV_DONTNEED)


class Pages:
    """A model file, mapped here and in the server.

    Args:
        fd: the file, open for reading.
        pidfd: of the server.
        maps: where the server has it: (start, end, offset in the file), any order.

    Attributes:
        size: of the file, bytes.
        huge: whether the mapping takes huge pages.
        counted: whether the kernel counts what is cached of a whole file in no time (cachestat(2), 6.5).
        block: bytes that come and go together (:func:`block_of`).
    """

    def __init__(self, fd: int, pidfd: int, maps: Sequence[tuple[int, int, int]]) -> None:
        self.fd, self.pidfd, self.maps = fd, pidfd, sorted(maps)
        self.size = os.fstat(fd).st_size
        self.block = block_of(fd)
        self._base, self.huge = _mapped_huge(fd, self.size, alone=True)
        self._own = threading.local()
        self.counted = self._cachestat(0, PAGE) is not None

    def close(self) -> None:
        """Unmap the file here; what was locked is no longer."""
        self._own.__dict__.clear()
        _libc.munmap(self._base, self.size)

    @property
    def chunks(self) -> int:
        """Chunks in the file."""
        return -(-self.size // CHUNK)

    def length(self, chunk: int) -> int:
        """Return the bytes of a chunk."""
        return min(CHUNK, self.size - chunk * CHUNK)

    def server_ranges(self, chunk: int) -> list[tuple[int, int]]:
        """Return (address, length) of the parts of a chunk that the server has mapped."""
        first, last = chunk * CHUNK, chunk * CHUNK + self.length(chunk)
        found = []
        for start, end, offset in self.maps:
            low, high = max(first, offset), min(last, offset + end - start)
            if low < high:
                found.append((start + low - offset, high - low))
        return found

    def mapped_huge(self, table: PageTable) -> set[int]:
        """Return the chunks that the server has mapped by a huge page each; empty where the kernel cannot tell.

        A page table of small pages stays when what it mapped is given back (nobody but the server could take it away),
        and then whatever comes later is mapped in small pages as well. So these are worth keeping.
        """
        found: set[int] = set()
        for start, end, offset in self.maps:
            try:
                regions = table.huge(start, end)
            except OSError:
                return set()
            for low, high in regions:
                found.update(range(-(-(offset + low - start) // CHUNK), (offset + high - start) // CHUNK))
        return found

    def read(self, chunk: int, path: str, scratch: object = None) -> None:
        """Bring a chunk into the page cache by one of :data:`PATHS`, and wait until it is there.

        Afterwards it is mapped by nobody here. ``scratch``: a writable buffer of :data:`CHUNK` bytes, for ``pread``.

        Raises:
            OSError: it cannot be read (the file is gone, or was cut).
        """
        length = self.length(chunk)
        if path == "pread":
            view = memoryview(scratch)[:length]  # type: ignore[arg-type]
            if os.preadv(self.fd, [view], chunk * CHUNK) < length:
                raise OSError(errno.EIO, "the file has become shorter")
            return
        if path == "readahead":
            for at in range(0, length, _PIECE):
                checked(_libc.readahead(self.fd, chunk * CHUNK + at, min(_PIECE, length - at)))
        elif path == "fadvise":
            for at in range(0, length, _PIECE):
                os.posix_fadvise(self.fd, chunk * CHUNK + at, min(_PIECE, length - at), os.POSIX_FADV_WILLNEED)
        elif path == "willneed":
            for start, n in self.server_ranges(chunk):
                for at in range(0, n, _PIECE):
                    self._advise_server([(start + at, min(_PIECE, n - at))], _MADV_WILLNEED)
        _touch, address, length, advice = self.touching(chunk)
        try:
            checked(_libc.madvise(address, length, advice))
        finally:
            untouch(address, length)

    def comes_huge(self, chunk: int) -> bool:
        """Read a chunk by touching it, and tell whether it is one huge page in our page table (FilePmdMapped, 5.4)."""
        try:
            os.close(self.reopened())
        except OSError:
            return False  # soon they would come by the page
        _touch, address, length, advice = self.touching(chunk)
        try:
            checked(_libc.madvise(address, length, advice))
            with open("/proc/self/smaps") as stream:
                here = False
                for line in stream:
                    first = line.split(maxsplit=1)[0]
                    if "-" in first and not first.endswith(":"):
                        start, end = (int(part, 16) for part in first.split("-"))
                        here = start <= address < end
                    elif here and first == "FilePmdMapped:":
                        return int(line.split()[1]) > 0
        finally:
            untouch(address, length)
        return False

    def touching(self, chunk: int) -> tuple[Touch, int, int, int]:
        """Return what is to be kept until :func:`untouch`, and (address, length, advice).

        These are of the madvise(2) call that reads a chunk by touching it.
        """
        touch: Touch | None = getattr(self._own, "touch", None)
        if touch is None or touch.spent:
            try:
                fd = self.reopened()
            except OSError:
                fd = os.dup(self.fd)
            try:
                touch = self._own.touch = Touch(fd, self.size)
            finally:
                os.close(fd)  # a mapping keeps what was opened
        at = touch.address(chunk * CHUNK, followed=self._is_followed(chunk))
        return touch, at, self.length(chunk), _MADV_POPULATE_READ

    def reopened(self) -> int:
        """Return a new descriptor of the file, which has a readahead state of its own, whatever its path has become.

        Raises:
            OSError: who opened it for us could, and we may not.
        """
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)

    def _is_followed(self, chunk: int) -> bool:
        """Tell whether nothing of the next chunk is missing: it is there, is being read, or the file ends before it."""
        following = chunk + 1
        length = min(CHUNK, self.size - following * CHUNK)
        return length <= 0 or self._cachestat(following * CHUNK, length) == -(-length // PAGE)

    def pin(self, chunk: int) -> None:
        """Bring a chunk in, and keep it in memory for as long as this process lives.

        Raises:
            OSError: EAGAIN or ENOMEM: it cannot be locked (RLIMIT_MEMLOCK, or no memory); nothing stays locked.
        """
        address, length = self._base + chunk * CHUNK, self.length(chunk)
        try:
            if self.resident(chunk) < length:
                self.read(chunk, "huge")  # else it would be touched here, in a file that is opened once
            checked(_libc.mlock(address, length))
        except OSError:
            self.unpin(chunk)
            raise

    def unpin(self, chunk: int) -> None:
        """Let go of a pinned chunk; it stays in the page cache for the time being."""
        address, length = self._base + chunk * CHUNK, self.length(chunk)
        _libc.munlock(address, length)
        _libc.madvise(address, length, _MADV_DONTNEED)

    def give_back(self, chunk: int) -> None:
        """Have the kernel take a chunk out of the server's page table and out of memory.

        What cannot be (its pages are in use at this moment, or another process maps them) stays: ask
        :meth:`resident`.
        """
        for start, length in self.server_ranges(chunk):
            self._advise_server([(start, length)], _MADV_PAGEOUT)

    def address(self, offset: int) -> int:
        """Return where a byte of the file is mapped here."""
        return self._base + offset

    def ask(self, offset: int, length: int) -> None:
        """Have any range read, without waiting for it: its pages are in the cache, locked until they have come.

        Raises:
            OSError: it cannot be read.
        """
        for at in range(offset, offset + length, _PIECE):
            checked(_libc.readahead(self.fd, at, min(_PIECE, offset + length - at)))

    def touch(self, offset: int, length: int) -> None:
        """Touch any range as a program does that just maps the file, and wait until it is there; nothing stays mapped.

        Raises:
            OSError: it cannot be read.
        """
        first = offset // PAGE * PAGE
        size = offset + length - first
        at = _mapped(self.fd, size, first)
        try:
            checked(_libc.madvise(at, size, _MADV_POPULATE_READ))
        finally:
            _libc.munmap(at, size)

    def give_back_range(
        self,
        offset: int,
        length: int,
        *,
        before: bool = False,
        after: bool = False,
        keep: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Do as :meth:`give_back` and :meth:`drop` with the whole blocks of any range.

        Args:
            offset: of the range.
            length: of it.
            before: with its first block, of which what is before it in the file has a part.
            after: with its last block, likewise.
            keep: (offset, bytes) of whole blocks in it that stay, in order.

        Raises:
            OSError: the server has ended.
        """
        block, last = self.block, offset + length
        first = (offset if before else offset + block - 1) // block * block
        last = (last + block - 1 if after else last) // block * block
        edges = [first, *(edge for at, size in keep for edge in (at, at + size)), last]
        gone = [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high]
        there = [
            (start + low - at, high - low)
            for start, end, at in self.maps
            for low, high in ((max(low, at), min(high, at + end - start)) for low, high in gone)
            if low < high
        ]
        if there:
            self._advise_server(there, _MADV_PAGEOUT)
        for low, high in gone:
            os.posix_fadvise(self.fd, low, high - low, os.POSIX_FADV_DONTNEED)

    def drop(self, chunk: int) -> None:
        """Drop a chunk that nobody has mapped from the page cache."""
        os.posix_fadvise(self.fd, chunk * CHUNK, self.length(chunk), os.POSIX_FADV_DONTNEED)

    def resident(self, chunk: int, count: int = 1) -> int:
        """Return how many bytes of ``count`` chunks are in the page cache; slow where they are not ``counted``."""
        return self.resident_range(chunk * CHUNK, min(count * CHUNK, self.size - chunk * CHUNK))

    def resident_range(self, offset: int, length: int, *, wait: bool = True) -> int:
        """Return how many bytes of the pages of any range are in the page cache; slow where not ``counted``.

        ``wait``: whether other threads wait meanwhile. What was driven out takes the kernel up to 50 us a megabyte.
        """
        found = self._cachestat(offset, length, wait=wait)
        if found is None:  # mincore(2) looks at each page: some 0.1 us
            first = offset // PAGE * PAGE
            there = ctypes.create_string_buffer(-(-(offset + length - first) // PAGE))
            checked(_libc.mincore(self._base + first, offset + length - first, there))
            found = there.raw.count(b"\1")
        return found * PAGE

    def _cachestat(self, offset: int, length: int, *, wait: bool = True) -> int | None:
        """Return the cached pages of a part of the file; None: this kernel has no such call."""
        wanted, answer = _Range(offset, length), _Cached()
        call = (_at_once if wait and length <= CHUNK else _libc).syscall
        return None if call(_NR_CACHESTAT, self.fd, wanted, answer, 0) < 0 else int(answer[0])

    def _advise_server(self, ranges: Sequence[tuple[int, int]], advice: int) -> None:
        vectors = (ctypes.c_uint64 * (2 * len(ranges)))(*(value for one in ranges for value in one))  # struct iovec
        done = _libc.syscall(
            _NR_PROCESS_MADVISE, self.pidfd, vectors, ctypes.c_size_t(len(ranges)), advice, ctypes.c_uint(0)
        )
        if done < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):
            code = ctypes.get_errno()  # ENOMEM: the server unmapped it meanwhile
            raise OSError(code, os.strerror(code))
