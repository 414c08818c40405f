"""Where in its token the server is: from the ring of ticks, or from its page table. Standard library only."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
from bisect import bisect_right
from collections.abc import Mapping, Sequence

__all__ = ["BEGIN", "END", "EXPERTS", "INPUT", "PageTable", "Tick", "TickRing", "choices", "decoded", "next_step"]

BEGIN, END = 0xFFFFFFFF, 0xFFFFFFFE  # llmtraced/probes/ticks.py, bpf/ticks.bpf.c; so are the next two lines
INPUT, EXPERTS = 2, 3  # wakes: what is to be told besides that an operator begins
_EXPERTS = 16  # room for a token of a batch
_PAGE = 4096
_BUSY, _DISCARD = 1 << 31, 1 << 30  # BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT: include/uapi/linux/bpf.h
_RECORD = struct.Struct("<QIIQ")
_PAGEMAP_SCAN, _PAGE_IS_HUGE = 0xC0606610, 1 << 6  # include/uapi/linux/fs.h, 6.7
_SCAN = struct.Struct("<12Q")  # struct pm_scan_arg
_REGIONS = 256  # struct page_region, 24 bytes each, for one call

Tick = tuple[int, int, int, int, bytes]
"""(time in ns, CLOCK_MONOTONIC; graphs so far; BEGIN, END or the number of a mark; of a BEGIN what :func:`decoded`
takes, of an END how many operators had one of the weights, or what bpf/ticks.bpf.c says of the mark; the input,
float32, or which experts were chosen, for :func:`choices`)"""


class TickRing:
    """The ring and the arrays of bpf/ticks.bpf.c, by their descriptors.

    Args:
        ring, clocks, wakes: descriptors of the maps.
        ring_bytes: size of the ring.
        marks: entries of the arrays.
    """

    def __init__(self, ring: int, clocks: int, wakes: int, ring_bytes: int, marks: int) -> None:
        self.fd, self._mask = ring, ring_bytes - 1
        self._consumer = mmap.mmap(ring, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The producer's position, then the data, twice in a row: kernel/bpf/ringbuf.c
        self._data = mmap.mmap(ring, _PAGE + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        self._clock = mmap.mmap(clocks, _PAGE)
        self._wakes = mmap.mmap(wakes, -(-marks * 8 // _PAGE) * _PAGE)
        self._poll = select.epoll()
        self._poll.register(ring, select.EPOLLIN)

    def wake_at(self, marks: Mapping[int, int]) -> None:
        """Be told of these marks, and no others; the values are 1, :data:`INPUT` or :data:`EXPERTS`."""
        self._wakes[:] = bytes(len(self._wakes))
        for mark, what in marks.items():
            struct.pack_into("<Q", self._wakes, mark * 8, what)

    @property
    def lost(self) -> int:
        """Ticks for which there was no room."""
        return int(struct.unpack_from("<Q", self._clock, 40)[0])

    def wait(self, seconds: float) -> list[Tick]:
        """Return the ticks that have come; wait for the first, ``seconds`` at most."""
        found = self._take()
        if not found and self._poll.poll(seconds):
            found = self._take()
        return found

    def _take(self) -> list[Tick]:
        at = struct.unpack_from("<Q", self._consumer)[0]
        end = struct.unpack_from("<Q", self._data)[0]
        found: list[Tick] = []
        while at < end:
            place = _PAGE + (at & self._mask)
            (length,) = struct.unpack_from("<I", self._data, place)
            if length & _BUSY:
                break
            if not length & _DISCARD:
                more = self._data[place + 8 + _RECORD.size : place + 8 + length]
                found.append((*_RECORD.unpack_from(self._data, place + 8), more))
            at += (length & ~_DISCARD) + 15 & ~7
        struct.pack_into("<Q", self._consumer, 0, at)
        return found


def decoded(value: int) -> int:
    """Return the tokens in the batch of a BEGIN; 0: it is a prompt, of which not every token wants its outputs."""
    tokens, outputs = value & 0xFFFFFFFF, value >> 32
    return tokens if tokens == outputs else 0


def choices(value: int, experts: bytes) -> list[tuple[int, ...]]:
    """Return the experts chosen, one tuple a token of the batch; empty: there are too many tokens to tell."""
    count, rows = value & 0xFFFFFFFF, value >> 32
    if not experts:
        return []
    return [struct.unpack_from(f"<{count}i", experts, 4 * _EXPERTS * row) for row in range(rows)]


class PageTable:
    """Which of some addresses a process has mapped, from its page table: a clock that needs no probes.

    A chunk that has been read and is not mapped yet has not been used; the kernel maps it at the first touch. So the
    furthest chunk that is mapped is where the server is. Coarser than ticks, and blind to the end of a token.

    Raises:
        OSError: the process is not ours to look at.
    """

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def mapped(self, address: int) -> bool:
        """Tell whether the page at ``address`` is in the page table: bit 63, Documentation/admin-guide/mm/pagemap."""
        try:
            entry = os.pread(self._fd, 8, address // _PAGE * 8)
        except OSError:
            return False
        return len(entry) == 8 and bool(entry[7] & 0x80)

    def huge(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the (start, end) of addresses that are mapped by huge pages.

        Raises:
            OSError: the kernel cannot tell (PAGEMAP_SCAN, Linux 6.7).
        """
        found: list[tuple[int, int]] = []
        regions = (ctypes.c_uint64 * (3 * _REGIONS))()
        while start < end:
            asked = (_SCAN.size, 0, start, end, 0, ctypes.addressof(regions), _REGIONS, 0, 0, _PAGE_IS_HUGE, 0)
            answer = bytearray(_SCAN.pack(*asked, _PAGE_IS_HUGE))
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, answer)
            found += [(regions[3 * n], regions[3 * n + 1]) for n in range(count)]
            start = _SCAN.unpack(answer)[4]  # how far it came
        return found

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._fd)


def next_step(steps: Sequence[int], before: int) -> int:
    """Return where the server is when it comes to a weight that is used at ``steps`` (sorted), from where it was."""
    at = bisect_right(steps, before)
    return steps[at] if at < len(steps) else steps[0]
