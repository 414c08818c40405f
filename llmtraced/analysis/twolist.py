"""What Linux keeps of a mapped file: its two lists of pages, the refault distance and readahead, replayed.

A token uses a model in the same order each time, so a cache that drops what was used least recently would hit nothing
until all of it fits. The kernel does better, by chance rather than by design: whatever gets onto its active list stays
there, as good as pinned, until that list outgrows the inactive one. What is
modelled, from Linux 6.18 (without MGLRU):

- *reclaim* (``mm/vmscan.c``) scans the inactive list from its tail. What was touched since it came, or since it was
  last looked at, goes round once more, the second time onto the active list; the rest is evicted. Each request is for
  32 pages and scans 1/4096 of a list, then 1/2048, … until it has them.
- *deactivation*: the active list is scanned too, and what is at its tail moved to the inactive one, if it is larger
  than allowed (``inactive_is_low``: more than the inactive one, of 1 GiB and more three times as much, …).
- *refaults* (``mm/workingset.c``): what comes back goes straight onto the active list if no more was evicted and
  activated in between than that list holds.
- *stale sizes*: both tests take the lists' sizes from statistics that are up to two seconds old.
- *readahead* (``mm/filemap.c``): a miss reads around it, half before and half behind; the first touch of what was read
  ahead reads the next window. What reclaim meets of that before it was touched is evicted, comes back soon, and so goes
  onto the active list: that is how the list grows.

Not modelled: other users of the memory, the folios' sizes, per-CPU batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isqrt
from typing import Final

from llmtraced.schema import PAGE

__all__ = ["TwoLists"]

_BATCH: Final = 32  # SWAP_CLUSTER_MAX, pages
_PRIORITY: Final = 12  # DEF_PRIORITY
_GIB: Final = (1 << 30) // PAGE
_ABSENT, _INACTIVE, _ACTIVE = 0, 1, 2


class TwoLists:
    """The page cache of one memory cgroup that holds one model's pages.

    Args:
        sizes: pages of each *piece*, a stretch of the file that comes and goes together; pieces are numbered in the
            order of the file, so neighbours are next to each other in it.
        room: pages that fit.
        window: how many pieces readahead brings in at once, at least 1.
        active: pieces that begin on the active list: so many of the first ones. All others begin on the inactive list,
            touched, in file order, as a load leaves them, and what does not fit has been evicted.

    Attributes:
        read: pages read so far; may be set to 0 at any time.
    """

    def __init__(self, sizes: Sequence[int], room: int, window: int, active: int) -> None:
        n = len(sizes)
        self._sizes, self._room, self._window = list(sizes), room, max(window, 1)
        self._where = [_ACTIVE] * min(active, n) + [_INACTIVE] * max(n - active, 0)
        self._touched, self._referenced = [True] * n, [False] * n
        self._shadow = [-1] * n  # the age when it was evicted
        self._marks = [0] * n  # where the next window begins, if touching it is to read that
        self._active = deque(range(min(active, n)))  # the tail, which is scanned, is at the left
        self._inactive = deque(range(min(active, n), n))
        self._pages = [0, sum(sizes[active:]), sum(sizes[:active])]
        self._age = self._activations = self._seen = 0
        self._progress = 0  # pages of the inactive list's tail that were scanned
        self._due = 0  # pages to be taken off the active list
        self.read = 0
        self.refresh()
        self._make_room(0)

    def refresh(self) -> None:
        """Take note of the lists' sizes, as the kernel's statistics do every other second."""
        self._stale = (*self._pages, self._activations)

    def touch(self, piece: int) -> None:
        """Use all of a piece: what is missing is read, and what readahead brings along."""
        window, marks = self._window, self._marks
        if self._where[piece] == _ABSENT:
            first = max(piece - window // 2, 0)
            behind = first + window
            self._read_in(first, behind, behind - max(window // 4, 1), behind)
        elif marks[piece]:
            first, marks[piece] = marks[piece], 0
            self._read_in(first, first + window, first, first + window)
        if self._where[piece] == _ABSENT:  # evicted again by what was read with it
            self._add(piece)
        self._touched[piece] = True

    def _read_in(self, first: int, last: int, mark: int, following: int) -> None:
        """Read what is missing from ``first`` to before ``last``; if ``mark`` is, touching it reads ``following``."""
        for piece in range(first, min(last, len(self._sizes))):
            if self._where[piece] == _ABSENT:
                self._add(piece)
                self._marks[piece] = following if piece == mark else 0

    def _add(self, piece: int) -> None:
        size = self._sizes[piece]
        self._make_room(size)
        self.read += size
        shadow = self._shadow[piece]
        if shadow >= 0 and self._age - shadow <= self._stale[_ACTIVE]:
            self._put(piece, _ACTIVE)
            self._age += size
            self._activations += size
        else:
            self._put(piece, _INACTIVE)
        self._referenced[piece] = self._touched[piece] = False

    def _put(self, piece: int, where: int) -> None:
        (self._active if where == _ACTIVE else self._inactive).append(piece)
        self._where[piece] = where
        self._pages[where] += self._sizes[piece]

    def _make_room(self, pages: int) -> None:
        held = self._pages
        while held[_ACTIVE] + held[_INACTIVE] + pages > self._room and (self._active or self._inactive):
            self._reclaim()

    def _reclaim(self) -> None:
        """Evict about 32 pages (a piece when its last page is due), scanning more and more until they are found."""
        _, inactive, active, activations = self._stale
        room = (inactive + active) // _GIB
        deactivate = activations != self._seen or inactive * (isqrt(10 * room) if room else 1) < active
        got = self._scan(deactivate)
        if not got and not deactivate:
            self._scan(True)  # as a last resort
        self._seen = activations

    def _scan(self, deactivate: bool) -> int:
        got = 0
        most = max(self._pages[_INACTIVE], self._pages[_ACTIVE])
        for priority in range(min(_PRIORITY, most.bit_length()), -1, -1):
            left = max(self._pages[_INACTIVE] >> priority, int(priority == 0))
            active = max(self._pages[_ACTIVE] >> priority, int(priority == 0)) if deactivate else 0
            while left > 0 or active > 0:
                if active > 0:
                    self._deactivate(min(active, _BATCH))
                    active -= _BATCH
                if left > 0:
                    got += self._shrink(min(left, _BATCH))
                    left -= _BATCH
                if got >= _BATCH:
                    return got
        return got

    def _deactivate(self, pages: int) -> None:
        self._due += pages
        while self._active and self._due >= self._sizes[self._active[0]]:
            piece = self._active.popleft()
            self._due -= self._sizes[piece]
            self._pages[_ACTIVE] -= self._sizes[piece]
            self._touched[piece] = False
            self._put(piece, _INACTIVE)
        self._due = self._due if self._active else 0

    def _shrink(self, pages: int) -> int:
        """Scan so many pages of the inactive list; return how many of them are evicted, now or with their piece."""
        got = 0
        while pages > 0 and self._inactive:
            piece = self._inactive[0]
            size, keep = self._sizes[piece], self._touched[piece]
            scanned = min(pages, size - self._progress)
            self._progress += scanned
            pages -= scanned
            got += 0 if keep else scanned
            if self._progress < size:
                continue
            self._progress = 0
            self._inactive.popleft()
            self._pages[_INACTIVE] -= size
            if not keep:
                self._where[piece] = _ABSENT
                self._shadow[piece] = self._age
                self._age += size
            elif self._referenced[piece]:
                self._put(piece, _ACTIVE)
                self._age += size
            else:
                self._put(piece, _INACTIVE)
                self._referenced[piece] = True
            self._touched[piece] = False
        return got
