"""Keep a model as a server has it in memory, from the first look at it until its sidecar works.

A process of its own, for a moment: a bare interpreter like the sidecar, in the server's cgroup like it, and the
first to go should memory run out. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Sequence

from llmtraced.prefetch.clock import PageTable
from llmtraced.prefetch.memory import Memory
from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import LEAST_WINDOW, Chunk, lay_out, window_for

__all__ = ["Hold", "let_go", "main"]

_LEAST_SHARE = 0.25  # of the model that is mapped by huge pages: else there is little to lose
_GUARD_SECONDS = 0.005
_GONE_SECONDS = 1.0


class Hold:
    """Locks what a server has mapped by huge pages, where the memory is too small for all of its model.

    A server that has just loaded its model has most of it mapped so. Each token that does not find all of it in memory
    costs some of that, for good (:meth:`Pages.mapped_huge`), and after a few tokens nothing is left. But the sequence
    of the weights is not known before the first graph. So as much as may be is locked until the sidecar has locked what
    it wants to keep of it. A window more than the sidecar's own is left free.

    Args:
        pid: of the server.
        pages: of each file of the model.
        entries: (step, file, offset, size) of what each token is expected to use whole.
        memory: that bounds the server.
        slack: bytes to leave free.
        budget: bytes for the model's pages at most; None: what the memory allows.

    Raises:
        OSError: the server has ended; or some of it cannot be locked.
    """

    def __init__(
        self,
        pid: int,
        pages: list[Pages],
        entries: Sequence[tuple[int, int, int, int]],
        memory: Memory,
        slack: int,
        budget: int | None = None,
    ) -> None:
        self._pages, self._memory, self._slack = pages, memory, slack
        self._held: list[Chunk] = []
        chunks = lay_out(list(entries), [p.size for p in pages])
        if all(p.counted and p.huge for p in pages):
            self._take(pid, chunks, budget)

    @property
    def nbytes(self) -> int:
        """Bytes that are locked."""
        return sum(c.nbytes for c in self._held)

    def _take(self, pid: int, chunks: list[Chunk], budget: int | None) -> None:
        total = sum(c.nbytes for c in chunks)
        room = self._memory.room(sum(p.resident(0, p.chunks) for p in self._pages), 0) - self._slack
        room = room if budget is None else min(room, budget)
        table = PageTable(pid)
        huge = [p.mapped_huge(table) for p in self._pages]
        table.close()
        able = [c for c in chunks if c.number in huge[c.file]]
        if room >= total or sum(c.nbytes for c in able) < _LEAST_SHARE * total:
            return
        room -= window_for(total, room) + LEAST_WINDOW
        for chunk in able:
            if (room := room - chunk.nbytes) < 0:
                break
            self._pages[chunk.file].pin(chunk.number)
            self._held.append(chunk)

    def affordable(self) -> bool:
        """Tell whether the server can do without the memory: ask again and again."""
        return self._memory.short(LEAST_WINDOW + self._slack) <= 0


def main(fd: int) -> int:
    """Hold what the configuration in the file ``fd`` says, tell how much, until standard input ends.

    How much is written to standard output, in bytes: 0, where nothing is held.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who has started it gets it, too, and ends
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who has started it has ended: so do we
    with os.fdopen(fd) as stream:
        config = json.load(stream)
    try:
        with open("/proc/self/oom_score_adj", "w") as knob:
            knob.write("1000")
        if config["procs"]:  # charged where the server is: else it would be the server who is killed for our locks
            with open(config["procs"], "w") as group:
                group.write("0")
        pages = [Pages(f["fd"], config["pidfd"], [tuple(m) for m in f["maps"]]) for f in config["files"]]
        memory = Memory(config["cgroup"]["folder"], config["cgroup"]["version"])
        entries = [tuple(e) for e in config["entries"]]
        hold = Hold(config["pid"], pages, entries, memory, config["slack"], config["budget"])
    except OSError:
        print(0, flush=True)
        return 1
    print(hold.nbytes, flush=True)
    if not hold.nbytes:
        return 0
    sys.stdout.close()
    ended = select.poll()
    ended.register(0, select.POLLIN)
    ended.register(config["pidfd"], select.POLLIN)
    while hold.affordable():
        if ended.poll(_GUARD_SECONDS * 1000):
            break
    return 0  # and the kernel lets go of everything


def let_go(pipe: int, pidfd: int) -> None:
    """Have the process end that holds pages, and wait until it has.

    Args:
        pipe: the other end of its standard input.
        pidfd: of the process.
    """
    os.close(pipe)
    gone = select.poll()
    gone.register(pidfd, select.POLLIN)
    gone.poll(_GONE_SECONDS * 1000)
    with contextlib.suppress(ChildProcessError):  # it is a child only of who has launched it
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)
