"""What to pin, what to stream, and when: pure decisions, no system calls. Standard library only.

A token uses the model's chunks (2 MiB of a file) in an order that is the same each time. A cache that is smaller than
such a cycle and drops what was used least recently hits nothing. So as much as fits is pinned, spread evenly over the
token; the rest, the *stream*, goes through a small window: a chunk is read just before it is used and given back right
after. Then each token reads what does not fit and no byte more: bytes per token - pinned.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection

__all__ = [
    "ABSENT",
    "CHUNK",
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

ABSENT, READING, READY = 0, 1, 2

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


def divide(
    chunks: list[Chunk], budget: int, window: int, before: Collection[Chunk] = ()
) -> tuple[list[Chunk], list[Chunk]]:
    """Return which chunks to pin and which to stream, both in the order of use.

    Chunks that a token uses more than once, and those of tensors that are larger than the window, are pinned first: it
    is known when an operator begins, but only about how far it is. Of the others every n-th is streamed, so that each
    layer reads the same share and the disk works evenly.

    Args:
        chunks: in order of use.
        budget: bytes of memory for them, the window included.
        window: bytes of memory for what is streamed.
        before: what has been streamed so far. Where it can be, only the difference changes sides, since that has to
            be read or given back; and what is streamed in addition has no neighbour that is, for which the kernel would
            read ahead (pages.py). Where there are not enough of those all is spread anew.
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
    able = [i for i, n in enumerate(weight) if n <= most]
    known = set(before)
    streamed = [i for i in able if chunks[i] in known]
    if (missing := wanted - sum(chunks[i].nbytes for i in streamed)) <= 0:
        gone = set(_spread(chunks, streamed, -missing, at_most=True))
        streamed = [i for i in streamed if i not in gone]
    else:
        near = {(chunks[i].file, chunks[i].number + n) for i in streamed for n in (-1, 0, 1)}
        alone = [i for i in able if (chunks[i].file, chunks[i].number) not in near]
        enough = streamed and sum(chunks[i].nbytes for i in alone) >= 2 * missing
        streamed = streamed + _spread(chunks, alone, missing) if enough else _spread(chunks, able, wanted)
    taken = set(streamed)
    return (
        [c for i, c in enumerate(chunks) if i not in taken],
        [c for i, c in enumerate(chunks) if i in taken],
    )


def _spread(chunks: list[Chunk], able: list[int], wanted: int, *, at_most: bool = False) -> list[int]:
    """Return every n-th of some chunks: ``wanted`` bytes or, unless ``at_most``, up to a chunk more."""
    found: list[int] = []
    share, due, taken = wanted / max(sum(chunks[i].nbytes for i in able), 1), 0.0, 0

    def fits(i: int) -> bool:
        return taken + chunks[i].nbytes <= wanted if at_most else taken < wanted

    for i in able:
        due += chunks[i].nbytes * share
        if due >= chunks[i].nbytes / 2 and fits(i):
            found.append(i)
            due -= chunks[i].nbytes
            taken += chunks[i].nbytes
    chosen = set(found)
    for i in reversed(able):  # what rounding has left out
        if i not in chosen and fits(i):
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
    """Which streamed chunks should be in memory now, and what became of those that were.

    Args:
        chunks: that are streamed.
        window: how many may be in memory.
        step: where the server is; what it came to before is not counted.

    Attributes:
        chunks: in the order in which they are done with.
        state: of each, ABSENT, READING or READY.
        used, late, missed, wasted: chunks that were there in time; under way when the server came; not even asked
            for then; there, and given back unused.
        ahead_ns: time from being ready to being used, summed over ``used``.
    """

    def __init__(self, chunks: list[Chunk], window: int, step: int = IDLE) -> None:
        self.chunks = sorted(chunks, key=lambda c: (c.last, c.first, c.file, c.number))
        self.window = window
        self._lasts = [c.last for c in self.chunks]
        self._by_first = sorted(range(len(chunks)), key=lambda i: self.chunks[i].first)
        self._firsts = [self.chunks[i].first for i in self._by_first]
        self.state = [ABSENT] * len(self.chunks)
        self._ready: dict[int, int] = {}  # chunk in memory: since when, ns
        self._coming: set[int] = set()  # chunks of the operator at hand that are not due yet
        self._met: set[int] = set()  # chunks in memory, or under way, that the server has come to
        self.used = self.late = self.missed = self.wasted = 0
        self.ahead_ns = 0
        self._at = 0  # the first chunk that is not done with
        self._step = step
        self._reached = -1  # the furthest chunk of the operator at hand that was touched
        self._settled = False  # whether what should be in memory is there, or under way

    def wanted(self) -> list[int]:
        """Return the chunks that should be in memory, soonest first."""
        count = len(self.chunks)
        return [(self._at + i) % count for i in range(min(self.window, count))]

    def move(self, step: int, now_ns: int) -> tuple[list[int], list[int]]:
        """Take in that the server is at ``step`` of its token (IDLE: between two).

        Returns:
            Chunks to give back, and chunks to read, soonest first; the latter are READING from now on.
        """
        if not self.chunks:
            return [], []
        count, before, at = len(self.chunks), self._step, self._at
        done = bisect_left(self._lasts, step)
        # Within an operator the chunks before the one that was reached are done with, too.
        within = self._reached - _BEHIND if step == before else -1
        self._at = max(done, within) % count
        if step != before:
            self._reached = -1
        if step < before:  # the token has ended, or was broken off
            for i in self._coming:
                self._meet(i, now_ns)
            self._coming.clear()
            before = IDLE
        self._coming.update(self._by_first[bisect_right(self._firsts, before) : bisect_right(self._firsts, step)])
        begins = step != self._step  # what should be there when an operator begins
        self._step = step
        if self._coming:
            for i in list(self._coming):
                if (begins and self._is_wanted(i)) or self.chunks[i].last < step or i <= self._reached:
                    self._coming.discard(i)
                    self._meet(i, now_ns)
        if self._settled and self._at == at:
            return [], []
        back = [i for i in self._ready if not self._is_wanted(i)]
        for i in back:
            self.gone(i)
        read = [i for i in self.wanted() if self.state[i] == ABSENT]
        for i in read:
            self.state[i] = READING
        self._settled = True
        return back, read

    def _is_wanted(self, i: int) -> bool:
        return (i - self._at) % len(self.chunks) < self.window

    def reach(self, i: int) -> None:
        """Take in that the server has touched a chunk of the operator that it is at; effective with the next move."""
        if self.chunks[i].first <= self._step <= self.chunks[i].last:
            self._reached = max(self._reached, i)

    def crowded(self) -> bool:
        """Tell whether the operator at hand uses so many streamed chunks that it matters how far it is."""
        low, high = bisect_left(self._lasts, self._step), bisect_right(self._lasts, self._step)
        return high - low > self.window // 2

    def _meet(self, i: int, now_ns: int) -> None:
        """Note how a chunk that the server comes to was found."""
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
        return there
