"""Which row moved each page last: a map of the page cache, changed row by row."""

from __future__ import annotations

import numpy as np

from llmtraced.analysis.columns import Ints, Numbers, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.schema import PAGE

__all__ = ["FILE", "Walk"]

FILE = 44
"""Bits of an address that count a file's bytes; those above are the file's number."""

_SHIFT = PAGE.bit_length() - 1
_MASK = (1 << FILE) - 1


class Walk:
    """The number of the row that moved each page last, 0 before any did.

    A page in which two tensors (or experts) meet moves once and is several rows, one a part, and each part has a number
    of its own: that which begins with the page, or before it, the page's; each other one that of its first byte.

    Attributes:
        page: int32, of each file and page; grows.
        inside: int64, ascending: where parts begin inside of pages, addresses.
        part: int32, of each of these.
    """

    def __init__(self) -> None:
        self.page: Numbers = np.zeros((0, 0), np.int32)
        self.inside: Ints = np.zeros(0, np.int64)
        self.part: Numbers = np.zeros(0, np.int32)

    def put(self, begin: Ints, end: Ints, first: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Put each row's number on its pages, row by row; return what was there, as stretches of one row each.

        Args:
            begin: int64, the address of the first byte of each row.
            end: int64, the one after the last; above ``begin``, and in the same file.
            first: the first row's number; the others follow.

        Returns:
            int64, the number of the row, the number that was there, and the stretch's first byte and the one after its
            last; row by row, and from the row's first page to its last.
        """
        self._know(begin[begin & (PAGE - 1) != 0])
        last = end - 1
        files, pages = int(last.max(initial=-1) >> FILE) + 1, (int((last & _MASK).max(initial=-1)) >> _SHIFT) + 1
        if files > self.page.shape[0] or pages > self.page.shape[1]:
            self.page = grown(self.page, (files, pages + pages // 2))
        return _put(begin, end, first, self.page, self.inside, self.part)

    def renumber(self) -> Ints:
        """Number the rows that moved any page last anew, from 1 on in their order; return the numbers of before."""
        used = np.zeros(int(max(self.page.max(initial=0), self.part.max(initial=0))) + 1, bool)
        used[0] = True
        used[self.page] = True
        used[self.part] = True
        number = (np.cumsum(used) - 1).astype(np.int32)
        self.page, self.part = number[self.page], number[self.part]
        return np.flatnonzero(used)

    def stretches(self) -> tuple[Ints, Ints, Ints]:
        """Return the parts inside of pages, and then all pages, by stretches of the same number.

        Returns:
            int64, the number, and the stretch's first byte and the one after its last page.
        """
        found = [(self.part.astype(np.int64), self.inside, ((self.inside >> _SHIFT) + 1) << _SHIFT)]
        for file, page in enumerate(self.page):
            starts = np.flatnonzero(np.append(True, page[1:] != page[:-1]))
            first = file << FILE
            end = np.append(starts[1:], page.size)
            found.append((page[starts].astype(np.int64), first + (starts << _SHIFT), first + (end << _SHIFT)))
        number, begin, end = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return number, begin, end

    def _know(self, inside: Ints) -> None:
        """Take in where parts begin inside of pages."""
        if self.inside.size:
            at = np.minimum(np.searchsorted(self.inside, inside), self.inside.size - 1)
            inside = inside[self.inside[at] != inside]
        if not inside.size:
            return
        known = np.unique(np.append(self.inside, inside))
        part = np.zeros(known.size, np.int32)
        part[np.searchsorted(known, self.inside)] = self.part
        self.inside, self.part = known, part


@compiled
def _put(
    begin: Ints, end: Ints, first: int, page: Numbers, inside: Ints, part: Numbers
) -> tuple[Ints, Ints, Ints, Ints]:
    room = 4 * begin.size + 64
    found = np.empty((4, room), np.int64)
    count = 0
    for i in range(begin.size):
        number = np.int32(first + i)
        at, stop = begin[i], end[i]
        first_byte = at & ~_MASK  # of the file
        pages = page[at >> FILE]
        here, last = (at - first_byte) >> _SHIFT, (stop - 1 - first_byte) >> _SHIFT
        if count + last - here + 1 > room:
            room = 2 * room + last - here
            more = np.empty((4, room), np.int64)
            more[:, :count] = found[:, :count]
            found = more
        if at & (PAGE - 1):
            place = np.searchsorted(inside, at)
            past = part[place]
            part[place] = number
        else:
            past = pages[here]
            pages[here] = number
        for other in range(here + 1, last + 1):
            was = pages[other]
            if was != past:
                border = first_byte + (other << _SHIFT)
                found[0, count], found[1, count] = number, past
                found[2, count], found[3, count] = at, border
                count += 1
                at, past = border, was
            pages[other] = number
        found[0, count], found[1, count] = number, past
        found[2, count], found[3, count] = at, stop
        count += 1
    return found[0, :count], found[1, :count], found[2, :count], found[3, :count]
