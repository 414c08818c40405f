"""What to pin, what to stream, and when: pure decisions, no system calls. Standard library only.

A token uses the model's chunks (2 MiB of a file) in an order that is the same each time. A cache that is smaller than
such a cycle and drops what was used least recently hits nothing. So as much as fits is pinned, spread evenly over the
token; the rest, the *stream*, goes through a small window: a chunk is read just before it is used and given back right
after. Then each token reads what does not fit and no byte more: bytes per token - pinned.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

__all__ = [
    "ABSENT",
    "CHUNK",
    "HELD",
    "IDLE",
    "READING",
    "READY",
    "Chunk",
    "Stream",
    "divide",
    "lay_out",
    "slack_for",
    "window_for",
]

_BEHIND = 2  # streamed chunks of one operator that several threads may be at, behind the furthest one touched

CHUNK = 2 << 20
"""Bytes of a chunk: a huge page of x86-64. The last one of a file may be shorter."""

ABSENT, READING, READY, HELD = 0, 1, 2, 3

LEAST_WINDOW, MOST_WINDOW = 24 << 20, 256 << 20

IDLE = -1
"""The step of a server between two tokens."""


class Chunk:
    """A chunk of a model file and when a token uses it.

    Attributes:
        file: number of the file.
        number: of the chunk in its file.
        nbytes: its size.
        first, last: the first and last step of a token that uses it.
    """

    __slots__ = ("file", "first", "last", "nbytes", "number")

    def __init__(self, file: int, number: int, nbytes: int, first: int, last: int) -> None:
        self.file, self.number, self.nbytes, self.first, self.last = file, number, nbytes, first, last

    def __repr__(self) -> str:
        return f"Chunk({self.file}, {self.number}, {self.nbytes}, {self.first}, {self.last})"


def lay_out(entries: list[tuple[int, int, int, int]], sizes: list[int], chunk: int = CHUNK) -> list[Chunk]:
    """Return the chunks that a token uses, in order of their first use.

    Args:
        entries: (step, file, offset, size) of each use of a tensor, whole.
        sizes: of the files, bytes.
        chunk: bytes of a chunk.
    """
    found: dict[tuple[int, int], Chunk] = {}
    for step, file, offset, size in entries:
        for number in range(offset // chunk, -(-(offset + size) // chunk)):
            one = found.get((file, number))
            if one is None:
                nbytes = min(chunk, sizes[file] - number * chunk)
                found[file, number] = Chunk(file, number, nbytes, step, step)
            else:
                one.first, one.last = min(one.first, step), max(one.last, step)
    return sorted(found.values(), key=lambda c: (c.first, c.last, c.file, c.number))


def divide(chunks: list[Chunk], budget: int, window: int) -> tuple[list[Chunk], list[Chunk]]:
    """Return which chunks to pin and which to stream, both in the order of use.

    Chunks that a token uses more than once, and those of tensors that are larger than the window, are pinned first: it
    is known when an operator begins, but only about how far it is. Of the others every n-th is streamed, so that each
    layer reads the same share and the disk works evenly.

    Args:
        chunks: in order of use.
        budget: bytes of memory for them, the window included.
        window: bytes of memory for what is streamed.
    """
    total = sum(c.nbytes for c in chunks)
    if total <= budget:
        return list(chunks), []
    wanted = total - max(budget - window, 0)  # bytes to stream
    begins = [c.first for c in chunks]

    def company(c: Chunk) -> int:
        """Return how many chunks come into use while ``c`` is in use."""
        return bisect_right(begins, c.last) - bisect_left(begins, c.first)

    weight = [company(c) for c in chunks]
    nbytes, most = 0, window // CHUNK
    for n, i in sorted((n, i) for i, n in enumerate(weight)):
        if nbytes >= wanted:
            break
        nbytes += chunks[i].nbytes
        most = max(most, n)
    taken = set(_spread(chunks, [i for i, n in enumerate(weight) if n <= most], wanted))
    return (
        [c for i, c in enumerate(chunks) if i not in taken],
        [c for i, c in enumerate(chunks) if i in taken],
    )


def _spread(chunks: list[Chunk], able: list[int], wanted: int) -> list[int]:
    """Return every n-th of some chunks, ``wanted`` bytes or up to a chunk more."""
    found: list[int] = []
    share, due, taken = wanted / max(sum(chunks[i].nbytes for i in able), 1), 0.0, 0
    for i in able:
        due += chunks[i].nbytes * share
        if due >= chunks[i].nbytes / 2 and taken < wanted:
            found.append(i)
            due -= chunks[i].nbytes
            taken += chunks[i].nbytes
    chosen = set(found)
    for i in reversed(able):  # what rounding has left out
        if i not in chosen and taken < wanted:
            found.append(i)
            taken += chunks[i].nbytes
    return found


def window_for(total: int, budget: int) -> int:
    """Return the bytes of the window that is good for a budget: a twelfth of what is then streamed in a token.

    That much time is ahead when the disk is slow for a moment; within bounds, since it is not pinned.

    Args:
        total: bytes that a token uses.
        budget: bytes of memory for them.
    """
    streamed = max(total - budget, 0)
    return min(max(streamed // 12, LEAST_WINDOW), max(min(budget // 8, MOST_WINDOW), LEAST_WINDOW)) // CHUNK * CHUNK


def slack_for(limit: int) -> int:
    """Return the bytes of a memory limit that are left free: half a per cent, at least 8 MiB."""
    return max(limit // 200, 8 << 20)


class Stream:
    """Which chunks should be in memory now, and what became of those that were.

    Some are *held*: in memory whatever the server does. The others flow through the window. Which are held changes as
    the server passes them, and so at no cost: one that flows is there just then, and stays; one that was held is given
    back when it would have been, had it been read for this token.

    Args:
        chunks: that a token uses.
        window: how many that flow may be in memory.
        step: where the server is; what it came to before is not counted.
        held: those of ``chunks`` that are held from the beginning.

    Attributes:
        chunks: in the order in which they are done with.
        state: of each, ABSENT, READING, READY or HELD.
        flow: the chunks that are not held, in order.
        used, late, missed, wasted: chunks that flow and were there in time; under way when the server came; not even
            asked for then; there, and given back unused.
        ahead_ns: time from being ready to being used, summed over ``used``.
    """

    def __init__(self, chunks: list[Chunk], window: int, step: int = IDLE, held: Iterable[Chunk] = ()) -> None:
        self.chunks = sorted(chunks, key=lambda c: (c.last, c.first, c.file, c.number))
        self.window = window
        self._index = {(c.file, c.number): i for i, c in enumerate(self.chunks)}
        self._lasts = [c.last for c in self.chunks]
        self._by_first = sorted(range(len(chunks)), key=lambda i: self.chunks[i].first)
        self._firsts = [self.chunks[i].first for i in self._by_first]
        self.state = [ABSENT] * len(self.chunks)
        for chunk in held:
            self.state[self._index[chunk.file, chunk.number]] = HELD
        self._turning: set[int] = set()  # chunks that are to be held and are not, or the other way round
        self._ready: dict[int, int] = {}  # chunk in memory: since when, ns
        self._coming: set[int] = set()  # chunks of the operator at hand that are not due yet
        self._met: set[int] = set()  # chunks in memory, or under way, that the server has come to
        self.used = self.late = self.missed = self.wasted = 0
        self.ahead_ns = 0
        self._at = 0  # the first chunk that is not done with
        self._step = step
        self._reached = -1  # the furthest chunk of the operator at hand that was touched
        self._held: list[int] = []  # chunks that are held from now on
        self._settled = False  # whether what should be in memory is there, or under way
        self._reflow()

    def _reflow(self) -> None:
        self.flow = [i for i, state in enumerate(self.state) if state != HELD]
        self._place = {i: place for place, i in enumerate(self.flow)}
        self._from = bisect_left(self.flow, self._at)
        self._settled = False

    def hold(self, chunks: Iterable[Chunk]) -> None:
        """Have these held, and no others, each from when the server has passed it."""
        held = {self._index[c.file, c.number] for c in chunks}
        self._turning = {i for i, state in enumerate(self.state) if (state == HELD) != (i in held)}

    def free(self, chunks: Iterable[Chunk]) -> None:
        """Take in that these are not held any more, and not in memory."""
        for chunk in chunks:
            i = self._index[chunk.file, chunk.number]
            self._turning.discard(i)
            if self.state[i] == HELD:
                self.state[i] = ABSENT
        self._reflow()

    def moving(self) -> list[Chunk]:
        """Return the chunks for which it matters when the server comes to them, or is done with them."""
        return [self.chunks[i] for i in sorted({*self.flow, *self._turning})]

    def wanted(self) -> list[int]:
        """Return the chunks that should be in memory, soonest first."""
        count = len(self.flow)
        return [self.flow[(self._from + i) % count] for i in range(min(self.window, count))]

    def move(self, step: int, now_ns: int) -> tuple[list[int], list[int]]:
        """Take in that the server is at ``step`` of its token (IDLE: between two).

        Returns:
            Chunks to give back, and then chunks to read, soonest first; the latter are READING from now on. Look at
            :meth:`turned`, too.
        """
        if not self.chunks:
            return [], []
        count, before, at, place = len(self.chunks), self._step, self._at, self._from
        done = bisect_left(self._lasts, step)
        # Within an operator the chunks before the one that was reached are done with, too.
        within = self._reached if step == before and self.flow else -1
        if within >= 0:
            within = self.flow[max(bisect_left(self.flow, within) - _BEHIND, 0)]
        self._at = max(done, within) % count
        self._from = bisect_left(self.flow, self._at)
        if step != before:
            self._reached = -1
        ended = step < before or done == count
        if step < before:  # the token has ended, or was broken off
            for i in self._coming:
                self._meet(i, now_ns)
            self._coming.clear()
            before = IDLE
        come = self._by_first[bisect_right(self._firsts, before) : bisect_right(self._firsts, step)]
        self._coming.update(i for i in come if self.state[i] != HELD)
        begins = step != self._step  # what should be there when an operator begins
        self._step = step
        if self._coming:
            for i in list(self._coming):
                if (begins and self._is_wanted(i)) or self.chunks[i].last < step or i <= self._reached:
                    self._coming.discard(i)
                    self._meet(i, now_ns)
        freed = self._turn(at, count if ended else self._at) if self._turning else []
        if self._settled and self._from == place:
            return [], []
        back = [i for i in self._ready if not self._is_wanted(i)]
        for i in back:
            self.gone(i)
        read = [i for i in self.wanted() if self.state[i] == ABSENT]
        for i in read:
            self.state[i] = READING
        self._settled = True
        return freed + back, read

    def _turn(self, start: int, end: int) -> list[int]:
        """Hold, or hold no more, the chunks from ``start`` to ``end``; return what is to be given back."""
        passed = [i for i in self._turning if start <= i < end]
        freed = [i for i in passed if self.state[i] == HELD]
        held = [i for i in passed if self.state[i] == READY]
        for i in held:
            del self._ready[i]
            self._met.discard(i)
            self.state[i] = HELD
        for i in freed:
            self.state[i] = ABSENT
        if freed or held:
            self._turning.difference_update(freed, held)
            self._held += held
            self._reflow()
        return freed

    def turned(self) -> list[int]:
        """Return the chunks in memory that are held since the last call: lock them."""
        held, self._held = self._held, []
        return held

    def _is_wanted(self, i: int) -> bool:
        place = self._place.get(i)
        return place is not None and (place - self._from) % len(self.flow) < self.window

    def reach(self, i: int) -> None:
        """Take in that the server has touched a chunk of the operator that it is at; effective with the next move."""
        if self.chunks[i].first <= self._step <= self.chunks[i].last:
            self._reached = max(self._reached, i)

    def crowded(self) -> bool:
        """Tell whether the operator at hand uses so many chunks that flow that it matters how far it is."""
        low, high = bisect_left(self._lasts, self._step), bisect_right(self._lasts, self._step)
        return bisect_left(self.flow, high) - bisect_left(self.flow, low) > self.window // 2

    def _meet(self, i: int, now_ns: int) -> None:
        """Note how a chunk that the server comes to was found."""
        if self.state[i] == HELD:
            return
        if self.state[i] == READY:
            self.used += 1
            self.ahead_ns += max(now_ns - self._ready[i], 0)
        elif self.state[i] == READING:
            self.late += 1
        else:
            self.missed += 1
            return
        self._met.add(i)

    def arrived(self, i: int, now_ns: int) -> None:
        """Take in that a chunk has been read."""
        self.state[i] = READY
        self._ready[i] = now_ns
        self._settled = self._settled and self._is_wanted(i)

    def gone(self, i: int) -> None:
        """Take in that a chunk is not in memory (any more)."""
        self.wasted += i in self._ready and i not in self._met
        self._ready.pop(i, None)
        self._met.discard(i)
        self.state[i] = ABSENT
        self._settled = False

    def clear(self) -> list[int]:
        """Forget all, and return what was in memory."""
        there = list(self._ready)
        for i in there:
            self.gone(i)
        self._step, self._reached, self._at = IDLE, -1, 0
        self._coming.clear()
        self._reflow()
        return there
