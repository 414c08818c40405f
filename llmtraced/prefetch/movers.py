"""Threads that read experts, give them back, and look at what is in memory. Standard library only.

What they take their work from is made of parts that the interpreter keeps whole by itself, see
:mod:`llmtraced.prefetch.readers`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from llmtraced.prefetch.experts import ABSENT, Residency
from llmtraced.prefetch.folios import Folios
from llmtraced.prefetch.slices import Slices
from llmtraced.prefetch.turn import hurry

__all__ = ["Movers"]

_READERS = 2
_One = TypeVar("_One")


class _Line(Generic[_One]):
    """Waiting lines of which the first is served first, by any number of threads."""

    def __init__(self, lines: int) -> None:
        self.lines: tuple[deque[_One], ...] = tuple(deque() for _ in range(lines))
        self._turns: SimpleQueue[bool] = SimpleQueue()  # one for each that waits at least: some may find none any more

    def add(self, ones: Iterable[_One], line: int = 0) -> None:
        for one in ones:
            self.lines[line].append(one)
            self._turns.put(True)

    def next(self) -> _One | None:
        """Wait for one, and take it; None: it is over."""
        while self._turns.get():
            for line in self.lines:
                try:
                    return line.popleft()
                except IndexError:  # another thread has it
                    continue
        return None

    def advance(self, chosen: Callable[[_One], bool]) -> None:
        """Move those that are chosen from the last line to the first."""
        waiting, stay = self.lines[-1], []
        if not any(chosen(one) for one in tuple(waiting)):
            return
        while waiting:
            try:
                one = waiting.popleft()
            except IndexError:
                break
            if chosen(one):
                self.add([one])
            else:
                stay.append(one)
        self.add(stay, len(self.lines) - 1)

    def end(self, threads: int) -> None:
        for _ in range(threads):
            self._turns.put(False)


class Movers:
    """Does what is decided on experts.

    Args:
        slices: of the experts.
        residency: what is held to be in memory; read only.

    Attributes:
        read: (expert, bytes, of these in large folios, whether that failed) of slices that have been asked for.
        seen: (expert, bytes) of those looked at and found to be otherwise than they are held to be.
    """

    def __init__(self, slices: Slices, residency: Residency) -> None:
        self._slices, self._residency = slices, residency
        self.read: deque[tuple[int, int, int, bool]] = deque()
        self.seen: deque[tuple[int, int]] = deque()
        self._wanted: _Line[tuple[int, int]] = _Line(2)
        self._leaving: _Line[tuple[int, bool]] = _Line(1)
        self._doubted: _Line[int] = _Line(1)
        self._closed = False
        self._threads: list[tuple[_Line[Any], threading.Thread]] = []

    def start(self) -> bool:
        """Begin; return whether that is new."""
        if self._threads:
            return False
        work: list[tuple[_Line[Any], Callable[[], None]]] = [(self._wanted, self._reader)] * _READERS
        work += [(self._leaving, self._leaver), (self._doubted, self._looker)]
        self._threads = [(line, threading.Thread(target=one, daemon=True)) for line, one in work]
        for _, thread in self._threads:
            thread.start()
        return True

    @property
    def early(self) -> int:
        """How many slices wait of what is read early."""
        return len(self._wanted.lines[-1])

    @property
    def looking(self) -> bool:
        """Whether something waits to be looked at."""
        return bool(self._doubted.lines[0])

    def fetch(self, experts: list[int], *, early: bool = False) -> None:
        """Ask for experts: all their first slices, then all their second ones, as the server will need them.

        ``early``: nothing else may wait for it. Otherwise the first slices are asked for at once, by this thread.
        """
        slices = max((self._slices.count(one) for one in experts), default=0)
        if not early:
            for one in experts:
                self._ask(one, 0)
        self._wanted.add(((one, at) for at in range(0 if early else 1, slices) for one in experts), 1 if early else 0)

    def hasten(self, experts: list[int]) -> None:
        """Make what was asked for early urgent."""
        self._wanted.advance(lambda wanted: wanted[0] in experts)

    def leave(self, experts: Iterable[int], *, anew: bool = False) -> None:
        """Have experts given back, those that are still to go when it is their turn.

        ``anew``: and what of them stays in memory read, if it is not there.
        """
        self._leaving.add((one, anew) for one in experts)

    def doubt(self, experts: Iterable[int]) -> None:
        """Have experts looked at."""
        self._doubted.add(experts)

    def _ask(self, one: int, at: int, folios: list[Folios] | None = None) -> None:
        try:
            self.read.append((one, *self._slices.ask(one, at, folios), False))
        except OSError:
            self.read.append((one, 0, 0, True))

    def _reader(self) -> None:
        hurry(1)
        folios = self._slices.opened() if self._slices.large else []
        while (wanted := self._wanted.next()) is not None and not self._closed:
            self._ask(*wanted, folios)
        self._slices.close(folios)

    def _leaver(self) -> None:
        hurry(1)
        state, n_experts = self._residency.state, self._residency.n_experts
        while (going := self._leaving.next()) is not None and not self._closed:
            one, anew = going
            if state[one] != ABSENT:
                continue  # it was chosen again meanwhile
            first, last = one % n_experts == 0, one % n_experts == n_experts - 1
            # Else the one beside it needs what is in one block with this one.
            before, after = not first and state[one - 1] == ABSENT, not last and state[one + 1] == ABSENT
            self._slices.give_back(one, before=before, after=after)
            if anew:
                self._slices.keep(one)

    def _looker(self) -> None:
        """A look takes longer than a layer."""
        hurry(1)
        state = self._residency.state
        while (one := self._doubted.next()) is not None and not self._closed:
            if not self._slices.seems(one, held=state[one] != ABSENT):
                self.seen.append((one, self._slices.there(one, wait=False)))

    def close(self) -> None:
        """Stop, at once; what waits is forgotten."""
        self._closed = True
        for line, _ in self._threads:
            line.end(1)
        for _, thread in self._threads:
            thread.join()
        self._slices.close()
