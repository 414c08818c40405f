"""The BPF ring buffer, read in batches.

The kernel lets a ring be mapped: a page with the consumer's position, which we write; a page with the producer's,
which it writes; then the data twice over, so that what wraps around is still contiguous
(kernel/bpf/ringbuf.c, ringbuf_map_mmap_user). Our records are all 64 bytes with the ring's own header, so a batch is a
numpy array and no Python runs for a single record.
"""

from __future__ import annotations

import mmap
import select
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtraced.schema import EVENT

__all__ = ["Ring"]

_BUSY = np.uint32(1 << 31)


class Ring:
    """A ring of :data:`schema.EVENT` records.

    Args:
        fd: the BPF_MAP_TYPE_RINGBUF map.
        size: of its data, bytes: a power of two.
    """

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._consumer_memory = mmap.mmap(fd, page, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory = mmap.mmap(fd, page + 2 * size, prot=mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_memory, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(self._memory, dtype=np.uint64, count=1)
        self._records = np.frombuffer(self._memory, dtype=EVENT, offset=page)
        self._headers = self._records["header"]
        self._opaque = self._records.view(f"V{EVENT.itemsize}")  # numpy copies these 8 times faster than records
        self._mask = size - 1
        self.capacity = size // EVENT.itemsize
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)

    @property
    def waiting(self) -> int:
        """Records that have been reserved and not been read."""
        return (int(self._producer[0]) - int(self._consumer[0])) // EVENT.itemsize

    def wait(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until a probe says that much has come."""
        self._epoll.poll(seconds)

    def read(self, limit: int = 1 << 14) -> NDArray[Any]:
        """Return a copy of up to ``limit`` finished records, in the ring's order, and free their room.

        The default keeps a batch (1 MB) in the processor's cache between looking at the headers and the copy.
        """
        consumed = int(self._consumer[0])
        n = min((int(self._producer[0]) - consumed) // EVENT.itemsize, limit)
        first = (consumed & self._mask) // EVENT.itemsize
        # The producer's position covers records still being written; they and all after them wait.
        busy = self._headers[first : first + n] >= _BUSY
        if busy.any():
            n = int(busy.argmax())
        batch: NDArray[Any] = self._opaque[first : first + n].copy().view(EVENT)
        self._consumer[0] = consumed + n * EVENT.itemsize
        return batch

    def close(self) -> None:
        """Let go of the mappings (arrays that were returned are copies and stay valid)."""
        self._epoll.close()
        del self._consumer, self._producer, self._records, self._headers, self._opaque
        self._consumer_memory.close()
        self._memory.close()
