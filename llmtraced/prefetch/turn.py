"""When a thread of ours gets a processor: before the server's, which occupy all of them, or after. Standard library.

A server's compute threads never sleep. An ordinary thread that wakes beside them waits for milliseconds now and then,
which is longer than the window of the stream lasts; and from a router to its experts it takes 50 us. As a realtime
thread it has its turn at once; the kernel sees to it that a fault of ours cannot keep a processor from the server
(RLIMIT_RTTIME, sched(7)).
"""

from __future__ import annotations

import os
import resource
import signal

__all__ = ["Turn", "hurry"]

_MOST_US, _KILLED_US = 200_000, 2_000_000  # without a pause: to be an ordinary thread again, to be killed


def hurry(priority: int) -> bool:
    """Let this thread go before the server's, if that is allowed, and before ours of a lower ``priority``.

    Threads that it starts are ordinary ones. 0: be an ordinary one again.
    """
    policy = os.SCHED_FIFO if priority else os.SCHED_OTHER
    try:
        if priority:
            resource.setrlimit(resource.RLIMIT_RTTIME, (_MOST_US, _KILLED_US))
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except (OSError, ValueError):  # no right to; a limit below ours
        return False
    return True


class Turn:
    """The scheduling of the thread that makes it, the process's main one; ordinary at first.

    Attributes:
        first: whether it has its turn before ordinary threads.
        demoted: how often it was made an ordinary one again for using a processor without a pause.
    """

    def __init__(self) -> None:
        self.first = False
        self.demoted = 0

    def take(self) -> None:
        """Have its turn first, from now on."""
        signal.signal(signal.SIGXCPU, self._too_long)
        self.first = hurry(2)

    def leave(self) -> None:
        """Be an ordinary thread: for what takes long."""
        if self.first:
            hurry(0)
            self.first = False

    def _too_long(self, *_: object) -> None:
        self.demoted += self.first
        self.leave()
