"""Read a range that lies anywhere in a file as folios larger than a page. Standard library only.

readahead(2) and its like make pages of 4 KiB, each of which is allocated, sent to the disk, mapped and given back by
itself. A huge page is 2 MiB and begins where 2 MiB do: experts are smaller and begin anywhere. In between is what the
kernel does for a file that is read from front to back (mm/readahead.c: page_cache_async_ra, page_cache_ra_order;
Linux 6.16 and later): who reads on, and comes to the page that carries the *mark*, has the next window read in
naturally aligned folios of up to 2 MiB, each the largest that fits, and the first of them is marked in turn. How large
the window is follows from how much the read asks for. So a read that asks for the right number of pages at a marked
page brings in exactly what is wanted. It need not wait (RWF_NOWAIT), and it need not copy: into memory that cannot be
written it fails with EFAULT, after the window was asked for.

Two things are missing then. There must be a mark to come to; and the new window's own must go, or the *server* has
megabytes read when it comes there. A descriptor that has just read one page and misses the next is taken for one that
reads on: four pages come in, the second of them marked. So two pages of each range, the *anchors*, stay in memory
(some more where the numbers must come out even), and of ``first``, ``second`` and ``third``, descriptors of their own:

    page      s        s+1 s+2 s+3 s+4    s+5 ..           w-4 w-3 w-2 w-1    w ........ e
    before    anchor                      anchors
    first     reads s, misses s+1: four pages, marked at s+2
    second                                reads the last, misses w-4: four pages, marked at w-3
    third              comes to s+2 and asks for as much as makes a window of w to e; marked at w
    second                                                 comes to w-3: goes on at w, where all is there: nothing
    second                                                                    comes to w: likewise. No mark is left

Nothing of that waits, so the server can come at any time: what it wants is in the page cache, and locked until it has
come from the disk. Where anything is not as it should be (an anchor is gone, something is there already) the range is
read by readahead(2), as what is still missing afterwards is in any case. What the kernel really does is tried when the
sidecar begins (:func:`works`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

from llmtraced.prefetch.pages import PAGE, Iovec, Pages

__all__ = ["Calls", "Folios", "Limits", "Piece", "limits_of", "plan", "works"]

_ORDER = 9  # a folio is 2 MiB at most
_LEAST, _MOST = 96, 1024  # pages of a piece
_BEHIND = 80  # pages of a window at least: the second descriptor's empty steps are over 16 and 64
_AHEAD = 32  # pages of readahead at least, for first windows of four
_NOWAIT = 8  # RWF_NOWAIT
_GAP = 1 << 20  # bytes behind a range, of which a mark that was left would have some read

_libc = ctypes.CDLL(None, use_errno=True)
_at_once = ctypes.PyDLL(None, use_errno=True)  # for calls of a few microseconds
for _lib in (_libc, _at_once):
    _lib.preadv2.restype = ctypes.c_ssize_t
    _lib.preadv2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Limits(NamedTuple):
    """What the kernel's windows follow, pages: a descriptor's readahead, and the device's largest request."""

    ahead: int
    request: int

    @property
    def usable(self) -> bool:
        """Whether windows can be made as large as is wanted."""
        return self.ahead >= _AHEAD and self.ahead & (self.ahead - 1) == 0

    def window(self, seen: int, asked: int) -> int:
        """Return how large a window becomes: ``seen`` from the mark to its beginning, ``asked`` by the read."""
        most = self.ahead
        if asked > most and self.request > most:
            most = min(asked, self.request)
        now = seen + asked
        return 4 * now if now < most // 16 else 2 * now if now <= most // 2 else most

    def asked(self, seen: int, pages: int) -> int:
        """Return how much to ask for to have a window of so many pages; 0: there is no such number."""
        if pages > self.ahead:
            return pages if pages <= self.request else 0
        for factor in (2, 4):
            asked = pages // factor - seen
            if asked > 0 and self.window(seen, asked) == pages:
                return asked
        return 0

    def cut(self, order: int, first: int, pages: int) -> int:
        """Return how many pages are left of a window that the kernel has end where its largest folios do (6.16)."""
        if pages > self.ahead:  # the limit is what was asked for then, and odd
            return pages
        end = (first + pages) >> order << order if 1 << order <= self.ahead else (first + pages) & -self.ahead
        return end - first if end > first else pages


class Piece(NamedTuple):
    """Pages that are read by one window: ``kept`` anchors more than one; 0: they are read by the page."""

    first: int
    pages: int
    kept: int

    @property
    def window(self) -> int:
        """The window's first page."""
        return self.first + 9 + self.kept

    @property
    def anchors(self) -> int:
        """Pages that stay in memory."""
        return 1 + self.kept if self.kept else 0


def plan(offset: int, nbytes: int, limits: Limits) -> tuple[Piece, ...]:
    """Return the whole pages of a range as pieces, of which none ends beyond where its window would be cut."""
    first, last = -(-offset // PAGE), (offset + nbytes) // PAGE
    if not limits.usable:
        return (Piece(first, last - first, 0),) if first < last else ()
    pieces = []
    while first < last:
        pages = min(last - first, _MOST, max(limits))
        if pages - 13 <= limits.ahead:
            border = min(1 << ((pages - 13).bit_length() + 1), limits.ahead)
            pages = min(pages, border - first % border)
        pieces.append(Piece(first, pages, _kept(pages, limits)))
        first += pages
    return tuple(pieces)


def _kept(pages: int, limits: Limits) -> int:
    if pages >= _LEAST:
        for kept in range(1, 5):
            window = pages - 9 - kept
            # A window that is larger than the readahead ends anywhere if its size is odd.
            if limits.asked(7 + kept, window) and (window <= limits.ahead or window % 2):
                return kept
    return 0


def limits_of(fd: int) -> Limits:
    """Return the limits of a file's device; none are usable where it does not say (network, overlay)."""
    number = os.fstat(fd).st_dev
    device = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    folder = device if os.path.isdir(f"{device}/queue") else f"{device}/.."
    found = []
    for name in ("read_ahead_kb", "max_sectors_kb"):
        try:
            with open(f"{folder}/queue/{name}") as stream:
                found.append(int(stream.read()) * 1024 // PAGE)
        except (OSError, ValueError):
            found.append(0)
    return Limits(*found)


class Calls:
    """The system calls: page numbers in, of one file."""

    def __init__(self, pages: Pages) -> None:
        self._pages, self.fd = pages, pages.fd
        self._byte = ctypes.create_string_buffer(1)
        self._one = Iovec(ctypes.addressof(self._byte), 1)
        nowhere = _libc.mmap(None, 2 * _MOST * PAGE, 0, 0x22, -1, 0)  # PROT_NONE, private and anonymous
        self._none = Iovec(nowhere, 0)
        self._one_at, self._none_at = ctypes.addressof(self._one), ctypes.addressof(self._none)

    def opened(self) -> int:
        """Return a new descriptor, which has a readahead state of its own."""
        return self._pages.reopened()

    def ahead(self, first: int, pages: int) -> None:
        """Have pages read by the page (readahead(2))."""
        self._pages.ask(first * PAGE, pages * PAGE)

    def reads(self, fd: int, page: int) -> bool:
        """Read of a page, if it is there; return whether it was."""
        return bool(_at_once.preadv2(fd, self._one_at, 1, page * PAGE, _NOWAIT) == 1)

    def comes(self, fd: int, page: int, asked: int) -> None:
        """Read pages to nowhere, without waiting."""
        self._none.length = asked * PAGE
        (_at_once if asked == 1 else _libc).preadv2(fd, self._none_at, 1, page * PAGE, _NOWAIT)

    def there(self, first: int, pages: int) -> int:
        """Return how many of the pages are in the page cache."""
        return self._pages.resident_range(first * PAGE, pages * PAGE) // PAGE

    def close(self, descriptors: list[int]) -> None:
        """Close what was opened."""
        for fd in descriptors:
            os.close(fd)
        _libc.munmap(ctypes.c_void_p(self._none.base), ctypes.c_size_t(2 * _MOST * PAGE))


class _Third:
    """A descriptor for windows of about one size, and the order of folios that its last one has left there."""

    def __init__(self, fd: int) -> None:
        self.fd, self.order = fd, 0


class Folios:
    """Reads ranges of one file, for one thread: its descriptors remember what they read last.

    Args:
        calls: on the file.
        limits: of its device.
        like: another thread's, on the same file, whose plans will do.
    """

    def __init__(self, calls: Calls, limits: Limits, like: Folios | None = None) -> None:
        self._calls, self._limits = calls, limits
        self._first, self._second = calls.opened(), calls.opened()
        self._thirds: dict[int, _Third] = {}
        self._plans: dict[tuple[int, int], tuple[Piece, ...]] = {} if like is None else like._plans

    def close(self) -> None:
        """Close its descriptors."""
        self._calls.close([self._first, self._second, *(third.fd for third in self._thirds.values())])

    def _plan(self, offset: int, nbytes: int) -> tuple[Piece, ...]:
        found = self._plans.get((offset, nbytes))
        if found is None:
            found = self._plans[offset, nbytes] = plan(offset, nbytes, self._limits)
        return found

    def anchors(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Return what of a range stays in memory: (offset, bytes), in order."""
        return [
            (page * PAGE, count * PAGE)
            for piece in self._plan(offset, nbytes)
            if piece.kept
            for page, count in ((piece.first, 1), (piece.first + 5, piece.kept))
        ]

    def keep(self, offset: int, nbytes: int) -> None:
        """Have what of a range stays in memory read, if it is not there.

        Raises:
            OSError: it cannot be read.
        """
        for at, size in self.anchors(offset, nbytes):
            if self._calls.there(at // PAGE, size // PAGE) < size // PAGE:
                self._calls.ahead(at // PAGE, size // PAGE)

    def settle(self, offset: int, nbytes: int) -> None:
        """Wait until the anchors of a range have come.

        Raises:
            OSError: they cannot be read.
        """
        for at, size in self.anchors(offset, nbytes):
            os.pread(self._calls.fd, size, at)

    def ask(self, offset: int, nbytes: int) -> int:
        """Have a range read, without waiting for it; return how many bytes of it a window brings in.

        Raises:
            OSError: it cannot be read.
        """
        large = 0
        for piece in self._plan(offset, nbytes):
            by_window = bool(piece.kept) and self._window(piece)
            there = self._calls.there(piece.first, piece.pages) if piece.kept else 0
            if by_window:
                large += max(piece.first + there - piece.window, 0)
            if there < piece.pages:
                self._calls.ahead(piece.first, piece.pages)
        first, last = offset // PAGE, (offset + nbytes) // PAGE
        if offset % PAGE:
            self._calls.ahead(first, 1)
        if (offset + nbytes) % PAGE and (last > first or not offset % PAGE):
            self._calls.ahead(last, 1)
        return large * PAGE

    def _window(self, piece: Piece) -> bool:
        """Have a piece's window read, if all is as it should be; return whether it was."""
        calls, first, kept, window = self._calls, piece.first, piece.kept, piece.window
        if calls.there(first, piece.pages) != piece.anchors:
            return False
        if not (calls.reads(self._first, first) and calls.reads(self._second, first + 4 + kept)):
            return False
        pages = first + piece.pages - window
        size = pages.bit_length()
        third = self._thirds.get(size)
        if third is None:
            third = self._thirds[size] = _Third(calls.opened())
        cut = self._limits.cut(third.order + 2, window, pages)  # of a descriptor's first few windows, while orders grow
        if cut < _BEHIND:
            return False
        third.order = min(third.order + 2, _ORDER, cut.bit_length() - 1)
        calls.comes(self._first, first + 1, 1)
        calls.comes(self._second, window - 4, 1)
        calls.comes(third.fd, first + 2, self._limits.asked(window - first - 2, pages))
        calls.comes(self._second, window - 3, 1)
        calls.comes(self._second, window, 1)
        return True


def works(pages: Pages, folios: Folios, ranges: Iterable[tuple[int, int]]) -> bool:
    """Tell whether one of some ranges comes in as it should: all of it, nothing behind it, and no mark is left.

    They are given back first, and a megabyte behind each. The server reads what it wants meanwhile, so not each of them
    need come out right.

    Args:
        pages: the file.
        folios: to read with.
        ranges: offset and bytes, of the file.

    Raises:
        OSError: the server has ended, or the file cannot be read.
    """
    return any(_exactly(pages, folios, offset, nbytes) for offset, nbytes in ranges)


def _exactly(pages: Pages, folios: Folios, offset: int, nbytes: int) -> bool:
    end = -(-(offset + nbytes) // PAGE) * PAGE
    gap = min(_GAP, pages.size - end)  # where the kernel would read on, if it did

    def beyond() -> int:
        return pages.resident_range(end, gap)

    if gap < _GAP // 2:
        return False
    pages.give_back_range(offset, end + gap - offset)
    folios.keep(offset, nbytes)
    folios.settle(offset, nbytes)
    before = beyond()
    if before > gap // 2:
        return False  # it does not go, so that nothing would be seen
    if not folios.ask(offset, nbytes) or pages.resident_range(offset, nbytes) < end - offset // PAGE * PAGE:
        return False
    pages.touch(offset, nbytes)
    return beyond() == before
