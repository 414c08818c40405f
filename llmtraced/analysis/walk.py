"""Which pages were moved last by which row: a map of the page cache as stretches, changed by many rows at once.

Pages are numbered (*slots*); a *row* moves all slots of a range at once. What a range had been through is found by
its ends, so time goes with rows and the borders between them, and not with pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmtraced.analysis.columns import Bools, Ints

__all__ = ["Moves", "Stretches"]

_SMALL: Final = 64  # rows that are looked at at once, at least


@dataclass(frozen=True, slots=True)
class Moves:
    """Stretches of slots that one row moved and one row had moved before, row by row.

    Attributes:
        low, high: int64, the first slot and the one after the last.
        number: int64, what was put there.
        past: int64, what was there before.
        begins, ends: int64, which of the stretches are the first, and the last, of their row.
    """

    low: Ints
    high: Ints
    number: Ints
    past: Ints
    begins: Ints
    ends: Ints


class Stretches:
    """A number for each slot, kept as the borders between slots with different numbers.

    Attributes:
        low: int64, ascending: where each stretch begins; one more at the end: how many slots there are.
        number: int64, of each stretch.
    """

    def __init__(self, slots: int) -> None:
        self.low: Ints = np.array([0, slots], np.int64)
        self.number: Ints = np.zeros(1, np.int64)

    def put(self, low: Ints, high: Ints, number: Ints, kind: Bools, chunk: int) -> Iterator[Moves]:
        """Put each row's number on its slots, row by row; yield what was there, in no order.

        Args:
            low: int64, first slot of each row.
            high: int64, the slot after the last; above ``low``.
            number: int64, what the row puts there.
            kind: rows of one kind seldom overlap each other without one of the other kind in between.
            chunk: how many rows to look at at once. Those that overlap earlier ones wait for the next time.
        """
        waiting = np.zeros(0, np.int64)
        done, most = 0, chunk
        while done < low.size or waiting.size:
            more = max(most - waiting.size, 0)
            rows = np.append(waiting, np.arange(done, min(done + more, low.size)))
            done = min(done + more, low.size)
            bits = rows.size.bit_length()
            key = low[rows]
            key <<= bits
            key |= np.arange(rows.size)
            key.sort()
            order = key & ((1 << bits) - 1)
            key >>= bits
            at = rows[order]
            begin, end = key, high[at]
            first = _first(begin, end, order, kind[at])
            if first is None:
                waiting = waiting[:0]
            else:
                late = np.ones(rows.size, bool)
                late[order[first]] = False
                waiting = rows[late]
                begin, end, at = begin[first], end[first], at[first]
            # Where little can be done at once there is no use in looking at much.
            most = max(most // 2, _SMALL) if 2 * waiting.size > rows.size else min(2 * most, chunk)
            yield self._apply(begin, end, number[at])

    def _apply(self, begin: Ints, end: Ints, number: Ints) -> Moves:
        """Put rows that are sorted and have no slot in common."""
        low, old = self.low, self.number
        first_at = low.searchsorted(begin, "right") - 1
        after = low.searchsorted(end, "left")
        count = after - first_at
        done = count.cumsum()
        first = done - count
        at = np.arange(int(done[-1])) + np.repeat(first_at - first, count)
        start, stop, past = low[at], low[at + 1], old[at]
        whole = start[first] == begin
        inner = np.ones(at.size, bool)
        inner[first] = whole
        start[first] = begin
        last = done - 1
        tail = (stop[last] != end) & np.append(begin[1:] != end[:-1], True)
        stop[last] = end
        moves = Moves(start, stop, np.repeat(number, count), past, first, last)

        kept = np.ones(old.size, bool)
        kept[at[inner]] = False
        before = np.append(0, kept.cumsum())[first_at + ~whole]  # borders that stay, below each row
        tails = tail.cumsum()
        here = before + np.arange(begin.size) + tails - tail
        size = int(before[-1] + kept[after[-1] :].sum()) + begin.size + int(tails[-1])
        fresh = np.zeros(size, bool)
        fresh[here] = True
        there = here[tail] + 1
        fresh[there] = True
        stays = ~fresh
        new_low = np.empty(size + 1, np.int64)
        new_low[-1] = low[-1]
        new_number = np.empty(size, np.int64)
        new_low[:-1][stays] = low[:-1][kept]
        new_number[stays] = old[kept]
        new_low[here], new_number[here] = begin, number
        new_low[there], new_number[there] = end[tail], past[last][tail]
        self.low, self.number = new_low, new_number
        return moves


def _first(begin: Ints, end: Ints, order: Ints, kind: Bools) -> Ints | None:
    """Return positions of rows that have no slot in common, and none with an earlier row; None: that is all of them.

    Rows that hang together by overlaps are a *heap*. Of each, those that came before the kind first changed are taken,
    and where they overlap, only the very first.

    Args:
        begin: where each row begins, ascending.
        end: where it ends.
        order: when it came.
        kind: of the row.
    """
    if not (begin[1:] < end[:-1]).any():
        return None
    reach = np.maximum.accumulate(end)
    apart = np.append(True, begin[1:] >= reach[:-1])
    starts = np.flatnonzero(apart)
    never = order.size
    ones = np.minimum.reduceat(np.where(kind, order, never), starts)
    others = np.minimum.reduceat(np.where(kind, never, order), starts)
    heap = np.cumsum(apart) - 1
    first = np.flatnonzero(order < np.maximum(ones, others)[heap])
    wrong = np.flatnonzero(begin[first[1:]] < end[first[:-1]])
    if wrong.size:
        bad = np.zeros(starts.size, bool)
        bad[heap[first[wrong]]] = True
        of = heap[first]
        first = first[~bad[of] | (order[first] == np.minimum(ones, others)[of])]
    return first
