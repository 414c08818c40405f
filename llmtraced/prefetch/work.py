"""The work itself: pins, the stream, and whatever else of the model is in memory. Standard library only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from llmtraced.prefetch.clock import PageTable, next_step
from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import CHUNK, HELD, READY, Chunk, Stream, divide, window_for
from llmtraced.prefetch.readers import Threads, Uring

__all__ = ["Work", "calibrate"]

_SAMPLE = 24  # chunks that ways of reading are tried with
_ROUNDS = 3
_SWEEPS = 4  # after so many all has been looked at


class Work:
    """Holds a share of the model in memory and moves the rest through a window.

    Args:
        pages: of each file of the model.
        table: the server's page table.
        chunks: that a token uses, in order.
        strategy: ``pin``, ``stream``, ``evict``.
        path: how chunks are read (pages.PATHS or ``uring``).
        window: bytes of memory for the stream; 0: what is good for the budget.
        depth: chunks that are read at the same time; 0: half the window, 8 to 16.
        say: where to tell what is done.
        kept: called, with each division, as soon as what is there to be pinned is.

    Attributes:
        pinned: chunks that are locked.
        stream: the chunks of a token, where some move through the window; None: nothing does.
        changed: whether other chunks move than when this was last made false.
        totals: chunks ``used``, ``late``, ``missed``, ``wasted``, ``failed``; ``read_bytes``; ``ahead_ns``.
        reading_ns: time in which the stream had something to read, about.
    """

    def __init__(
        self,
        pages: list[Pages],
        table: PageTable,
        chunks: list[Chunk],
        strategy: dict[str, Any],
        path: str,
        window: int,
        depth: int,
        say: Callable[[str], None],
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        self.pages, self.table, self.chunks = pages, table, chunks
        self.strategy, self.path = strategy, path
        self.fixed_window, self.window, self.depth, self.say, self.kept = window, window, depth, say, kept
        self.pinned: dict[tuple[int, int], Chunk] = {}
        self.stream: Stream | None = None
        self.changed = False
        self.totals = dict.fromkeys(("used", "late", "missed", "wasted", "ahead_ns", "failed", "read_bytes"), 0)
        self.reading_ns = 0
        self._moved, self._asked = 0, 0  # when the stream was moved last; chunks that were under way then
        self._reader: Threads | Uring | None = None
        self._lingering: list[Chunk] = []  # given back, and still in memory
        self._pinner: threading.Thread | None = None
        self._stop = threading.Event()
        self._swept = 0
        self._refused = False  # whether it was said that no more can be locked

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are locked."""
        return sum(c.nbytes for c in list(self.pinned.values()))

    @property
    def pinning(self) -> bool:
        """Whether chunks are still being locked."""
        return self._pinner is not None and self._pinner.is_alive()

    def resident(self) -> int | None:
        """Return the bytes of the model in the page cache; None: to count them would take too long here."""
        if not all(p.counted for p in self.pages):
            return None
        return sum(p.resident(0, p.chunks) for p in self.pages)

    def divide(self, budget: int, step: int) -> None:
        """Pin and stream so that ``budget`` bytes are enough, from now on, with the server at ``step``.

        Where something is streamed already it changes sides as the server passes it (policy.Stream): no byte is read
        for that. A prompt, which has the server touch more memory of its own, has no time to spare.
        """
        self._end_pinning()
        self._refused = False
        self.window = self.fixed_window or window_for(sum(c.nbytes for c in self.chunks), budget)
        pin: list[Chunk] = []
        stream = list(self.chunks)
        if self.strategy["pin"]:
            pin, stream = divide(self.chunks, budget, self.window if self.strategy["stream"] else 0)
        if self.stream is not None:
            self.stream.window = max(self.window // CHUNK, 2)
            self.stream.hold(pin)
        else:
            todo = self._pin_anew(pin) if self.strategy["pin"] else []
            if self.strategy["stream"] and stream:
                self._begin_stream(pin, stream, step)
            if todo:
                self._pinner = threading.Thread(target=self._pin, args=(todo,), daemon=True)
                self._pinner.start()
        self.changed = True
        self.say(
            f"pinning {sum(c.nbytes for c in pin) >> 20} MB, "
            + (
                f"streaming {sum(c.nbytes for c in stream) >> 20} MB a token through {self.window >> 20} MB "
                f"by {self.path}"
                if self.stream is not None
                else f"leaving {sum(c.nbytes for c in stream) >> 20} MB to the kernel"
            )
        )

    def _pin_anew(self, pin: list[Chunk]) -> list[Chunk]:
        """Unpin all others; pin what can be in no time, and return the rest."""
        keep = {(c.file, c.number) for c in pin}
        for key in [key for key in self.pinned if key not in keep]:
            self._unpin(self.pinned.pop(key))
        todo = self._pin_huge([c for c in pin if (c.file, c.number) not in self.pinned])
        self.kept()
        return todo

    def _unpin(self, chunk: Chunk) -> None:
        self.pages[chunk.file].unpin(chunk.number)
        self._give_back(chunk)

    def _begin_stream(self, pin: list[Chunk], stream: list[Chunk], step: int) -> None:
        if self.strategy["evict"]:
            for chunk in stream:
                self._give_back(chunk)
        self.stream = Stream(self.chunks, max(self.window // CHUNK, 2), step, pin)
        depth = min(self.depth or min(max(self.stream.window // 2, 8), 16), self.stream.window)
        self._reader = Uring(self.pages, depth) if self.path == "uring" else Threads(self.pages, self.path, depth)

    def _pin_huge(self, todo: list[Chunk]) -> list[Chunk]:
        """Pin, in no time, what the server has mapped by huge pages, before anything drives it out; return the rest."""
        if self.path != "huge":
            return todo
        huge = [pages.mapped_huge(self.table) for pages in self.pages]
        there = [c for c in todo if c.number in huge[c.file]]
        self._lock(there)
        return [c for c in todo if (c.file, c.number) not in self.pinned]

    def _pin(self, todo: list[Chunk]) -> None:
        """Pin, in a thread of its own, until told to stop. What is there in small pages is read anew as a whole."""
        for chunk in todo:
            if self._stop.is_set():
                return
            if self.path == "huge":
                self._give_back(chunk)
            if not self._lock([chunk]):
                return

    def _lock(self, chunks: list[Chunk]) -> int:
        """Pin chunks until one cannot be; return how many were."""
        for done, chunk in enumerate(chunks):
            try:
                self.pages[chunk.file].pin(chunk.number)
            except OSError as error:
                if not self._refused:
                    self._refused = True
                    self.say(f"cannot lock more than {self.pinned_bytes >> 20} MB: {error.strerror}")
                return done
            self.pinned[chunk.file, chunk.number] = chunk
        return len(chunks)

    def relieve(self, nbytes: int) -> int:
        """Give up pins of that many bytes at once, the last ones first; return how many bytes were."""
        given, gone = 0, []
        while given < nbytes and self.pinned:
            _, chunk = self.pinned.popitem()
            self._unpin(chunk)
            gone.append(chunk)
            given += chunk.nbytes
        self._free(gone)
        return given

    def _free(self, chunks: list[Chunk]) -> None:
        """Have chunks streamed that are not pinned any more, or could not be."""
        if self.stream is not None and chunks:
            self.stream.free(chunks)
            self.changed = True

    def _end_pinning(self) -> None:
        if self._pinner is not None:
            self._stop.set()
            self._pinner.join()
            self._stop.clear()
            self._pinned_all()

    def _pinned_all(self) -> None:
        """Take in that the thread has ended. What it has not pinned flows: it was told to stop, or could not."""
        self._pinner = None
        if self.stream is not None:
            held = (c for c, state in zip(self.stream.chunks, self.stream.state, strict=True) if state == HELD)
            self._free([c for c in held if (c.file, c.number) not in self.pinned])

    def _give_back(self, chunk: Chunk) -> None:
        pages = self.pages[chunk.file]
        with contextlib.suppress(ProcessLookupError):  # the server has ended: the loop will see that, too
            pages.give_back(chunk.number)
        if pages.resident(chunk.number) > 0:
            pages.drop(chunk.number)  # the server had not mapped it
            if pages.resident(chunk.number) > 0:
                self._lingering.append(chunk)

    def wakes(self, marks: list[list[int]]) -> list[int]:
        """Return the marks at which a streamed chunk comes into use, or is done with.

        Args:
            marks: steps at which each mark's weight is used.
        """
        wanted: set[int] = set()
        if self.stream is not None:
            at = {step: mark for mark, steps in enumerate(marks) for step in steps}
            known = sorted(at)
            for chunk in self.stream.moving():
                wanted |= {at[next_step(known, step - 1)] for step in (chunk.first, chunk.last + 1)}
        return sorted(wanted)

    def move(self, step: int, now_ns: int) -> None:
        """Take in where the server is: give back behind it, read ahead of it."""
        stream, reader = self.stream, self._reader
        if stream is None or reader is None:
            return
        if self._asked:
            self.reading_ns += max(now_ns - self._moved, 0)
        self._moved = now_ns
        for i, error in reader.collect():
            self._asked -= 1
            if error:
                self.totals["failed"] += 1
                stream.gone(i)
            else:
                self.totals["read_bytes"] += stream.chunks[i].nbytes
                stream.arrived(i, time.monotonic_ns())
        back, read = stream.move(step, now_ns)
        for i in back:
            if chunk := self.pinned.pop((stream.chunks[i].file, stream.chunks[i].number), None):
                self.pages[chunk.file].unpin(chunk.number)
        if held := [stream.chunks[i] for i in stream.turned()]:
            self._free(held[self._lock(held) :])
            self.changed = True
        if not (back or read or self._lingering):
            return  # as most times: the server comes to more operators than chunks
        wanted = stream.wanted()
        for i in reader.forget(set(wanted)):
            self._asked -= 1
            stream.gone(i)
        if self.strategy["evict"]:
            again, self._lingering = self._lingering, []
            busy = {(stream.chunks[i].file, stream.chunks[i].number) for i in wanted}
            for chunk in again:
                if (chunk.file, chunk.number) not in busy and (chunk.file, chunk.number) not in self.pinned:
                    self._give_back(chunk)
            for i in back:
                self._give_back(stream.chunks[i])
        self._asked += len(read)
        reader.submit((i, stream.chunks[i].file, stream.chunks[i].number) for i in read)

    def furthest(self) -> int | None:
        """Return the furthest chunk of those wanted that the server has touched, by its page table; None: none."""
        stream = self.stream
        for i in reversed(stream.wanted() if stream else []):
            assert stream is not None
            chunk = stream.chunks[i]
            where = self.pages[chunk.file].server_ranges(chunk.number)
            if stream.state[i] == READY and where and self.table.mapped(where[0][0]):
                return i
        return None

    def sweep(self) -> None:
        """Give back what of the stream is in memory though it should not be: the server read it by itself.

        A part of the stream each time: the kernel walks a chunk's pages to tell what is there.
        """
        if self._pinner is not None and not self._pinner.is_alive():
            self._pinned_all()
        stream = self.stream
        if stream is None or not self.strategy["evict"]:
            return
        wanted = set(stream.wanted())
        self._swept = (self._swept + 1) % _SWEEPS
        for i in stream.flow[self._swept :: _SWEEPS]:
            chunk = stream.chunks[i]
            if i not in wanted and self.pages[chunk.file].resident(chunk.number) > 0:
                self._give_back(chunk)

    def _end_stream(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader, self._asked = None, 0
        if self.stream is not None:
            self.count()
            there = [self.stream.chunks[i] for i in self.stream.clear()]
            self.count()
            self.stream = None
            if self.strategy["evict"]:
                for chunk in there:
                    self._give_back(chunk)

    def count(self) -> None:
        """Add what the stream has counted to the totals."""
        if self.stream is not None:
            for name in ("used", "late", "missed", "wasted", "ahead_ns"):
                self.totals[name] += getattr(self.stream, name)
                setattr(self.stream, name, 0)

    def release(self) -> None:
        """Let go of everything; the kernel manages the model's pages again."""
        self._end_pinning()
        self._end_stream()
        for chunk in self.pinned.values():
            self.pages[chunk.file].unpin(chunk.number)
        self.pinned.clear()


def calibrate(pages: list[Pages], chunks: list[Chunk], depth: int) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the way of reading to take on this disk and kernel, and what was measured of others.

    Where one chunk comes as a huge page that is the way: nothing else is near it (docs/prefetching.md). It is tried and
    not timed, since the server is short of memory just now, and what a read costs then is mostly what it drives out.
    For the same reason others may come in pieces: the kernel does not try hard to find 2 MiB.
    Otherwise two ways are timed on some chunks, in turns: bytes_per_s, cpu_s_per_gb.
    """
    sample = chunks[:: max(len(chunks) // _SAMPLE, 1)][:_SAMPLE]
    for chunk in sample:
        with contextlib.suppress(ProcessLookupError):
            pages[chunk.file].give_back(chunk.number)
        pages[chunk.file].drop(chunk.number)
    huge = any(pages[c.file].comes_huge(c.number) for c in sample if c.nbytes == CHUNK)
    for chunk in sample:
        pages[chunk.file].drop(chunk.number)
    if huge:
        return "huge", {}
    taken = {path: [0.0, 0.0, 0.0] for path in ("readahead", "fadvise")}
    for number in range(_ROUNDS):
        part = sample[number::_ROUNDS]
        for path, sums in taken.items():
            reader = Threads(pages, path, depth)
            start, cpu = time.monotonic(), time.process_time()
            reader.submit((i, c.file, c.number) for i, c in enumerate(part))
            done = 0
            while done < len(part):
                time.sleep(0.0005)
                done += len(reader.collect())
            for at, value in enumerate((time.monotonic() - start, time.process_time() - cpu)):
                sums[at] += value
            sums[2] += sum(c.nbytes for c in part)
            reader.close()
            for chunk in part:
                pages[chunk.file].drop(chunk.number)
    speeds = {
        path: {"bytes_per_s": nbytes / seconds, "cpu_s_per_gb": cpu / nbytes * 1e9}
        for path, (seconds, cpu, nbytes) in taken.items()
    }
    # Processor time counts as much as waiting: the server computes on the same cores.
    return min(speeds, key=lambda p: 1e9 / speeds[p]["bytes_per_s"] + speeds[p]["cpu_s_per_gb"]), speeds
