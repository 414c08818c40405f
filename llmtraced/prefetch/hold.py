"""Keep a model as a server has it in memory, from the first look at it until its sidecar works."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from llmtraced.prefetch.clock import PageTable
from llmtraced.prefetch.memory import Memory
from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import LEAST_WINDOW, Chunk, lay_out, window_for

__all__ = ["Hold"]

_LEAST_SHARE = 0.25  # of the model that is mapped by huge pages: else there is little to lose
_GUARD_SECONDS = 0.005


class Hold:
    """Locks what a server has mapped by huge pages, where the memory is too small for all of its model.

    A server that has just loaded its model has most of it mapped so. Each token that does not find all of it in memory
    costs some of that, for good (:meth:`Pages.mapped_huge`), and after a few tokens nothing is left. But the sequence
    of the weights is not known before the first graph. So as much as may be is locked until then. It is let go when
    this process becomes the sidecar, which locks in milliseconds what it wants to keep of it; when it ends, however it
    does; and at once where the server needs the memory itself.

    Args:
        pid: of the server.
        pidfd: of the server.
        files: of the model: ``fd``, and ``maps`` as :class:`Pages` takes them.
        entries: (step, file, offset, size) of what each token is expected to use whole.
        memory: that bounds the server.
        slack: bytes to leave free.
        budget: bytes for the model's pages at most; None: what the memory allows.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        files: Sequence[dict[str, Any]],
        entries: Sequence[tuple[int, int, int, int]],
        memory: Memory,
        slack: int,
        budget: int | None = None,
    ) -> None:
        self._pages = [Pages(f["fd"], pidfd, [tuple(m) for m in f["maps"]]) for f in files]
        self._memory, self._slack = memory, slack
        self._chunks = lay_out(list(entries), [p.size for p in self._pages])
        self._held: list[Chunk] = []
        self._turn = threading.Lock()
        self._ended = threading.Event()
        try:
            self._take(pid, budget)
        except OSError:  # it has ended; or some of it cannot be locked
            self.let_go()
        if self._held:
            threading.Thread(target=self._guard, name="hold", daemon=True).start()

    @property
    def nbytes(self) -> int:
        """Bytes that are locked."""
        return sum(c.nbytes for c in self._held)

    def _take(self, pid: int, budget: int | None) -> None:
        total = sum(c.nbytes for c in self._chunks)
        if not all(p.counted and p.huge for p in self._pages):
            return
        room = self._memory.room(sum(p.resident(0, p.chunks) for p in self._pages), 0) - self._slack
        room = room if budget is None else min(room, budget)
        table = PageTable(pid)
        huge = [p.mapped_huge(table) for p in self._pages]
        table.close()
        able = [c for c in self._chunks if c.number in huge[c.file]]
        if room >= total or sum(c.nbytes for c in able) < _LEAST_SHARE * total:
            return
        # More is left free than the sidecar will: who runs out of memory here is the server.
        room -= window_for(total, room) + LEAST_WINDOW
        for chunk in able:
            if (room := room - chunk.nbytes) < 0:
                break
            self._pages[chunk.file].pin(chunk.number)
            self._held.append(chunk)

    def _guard(self) -> None:
        while not self._ended.wait(_GUARD_SECONDS):
            if self._memory.short(LEAST_WINDOW + self._slack) > 0:
                self.let_go()

    def let_go(self) -> None:
        """Let go of everything; the kernel manages the model's pages again."""
        with self._turn:
            self._ended.set()
            held, self._held = self._held, []
            for chunk in held:
                self._pages[chunk.file].unpin(chunk.number)

    def close(self) -> None:
        """Let go of everything, and of the files' mappings."""
        self.let_go()
        for pages in self._pages:
            pages.close()
