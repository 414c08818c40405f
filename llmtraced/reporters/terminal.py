"""A terminal that is ours for a while: whole screens out, keys in, and everything as it was afterwards."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llmtraced.errors import LlmtracedError
from llmtraced.reporters.live import View, press, screen
from llmtraced.snapshot import History, Snapshot

__all__ = ["Terminal", "keys", "watch"]

_LOOK_SECONDS: Final = 0.25  # until a new size of the window is seen
_SAY_SECONDS: Final = 5.0  # for which a sentence stands where the keys are

_NAMES: Final = {
    b"\t": "tab",
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1b[Z": "backtab",
    b"\x1b[5~": "pageup",
    b"\x1b[6~": "pagedown",
}
_KEY: Final = re.compile(rb"\x1b\[[0-9;]*[@-~]|\x1bO[@-~]|[^\x1b]|\x1b")


def keys(typed: bytes) -> list[str]:
    """Return the keys in what a terminal sent: characters, names for arrows and the like; others are left out."""
    found = []
    for match in _KEY.findall(typed):
        name = _NAMES.get(match.replace(b"\x1bO", b"\x1b["))
        if name or (len(match) == 1 and match.isascii() and match.decode().isprintable()):
            found.append(name or match.decode())
    return found


class _LastLine(logging.Handler):
    """Keeps the last log line: written to the terminal it would be lost in the screen, and spoil it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.line = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.line = record.getMessage()


class Terminal:
    """The terminal at stdin and stdout, for the time of the context.

    Args:
        console: to draw on; that of stdout by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._input = sys.stdin.fileno()
        self._log = _LastLine()

    def __enter__(self) -> Self:
        self._before: list[Any] = termios.tcgetattr(self._input)
        self._handlers = logging.root.handlers[:]
        logging.root.handlers[:] = [self._log]
        try:
            tty.setcbreak(self._input)
            mode = termios.tcgetattr(self._input)
            mode[6][termios.VSUSP] = b"\0"  # stopped in the middle, we could not give the terminal back
            termios.tcsetattr(self._input, termios.TCSANOW, mode)
            self._live.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._live.stop()
        finally:
            logging.root.handlers[:] = self._handlers
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        return self._console.size.width, self._console.size.height

    def take_log(self) -> str:
        """Return the last line that was logged since the last call, or an empty text."""
        line, self._log.line = self._log.line, ""
        return line

    def draw(self, lines: Sequence[Text]) -> None:
        """Show these lines, and nothing else."""
        self._live.update(Group(*lines), refresh=True)

    def keys(self, seconds: float) -> list[str] | None:
        """Wait for keys, at most so long, and return them; None: there will be no more."""
        if not select.select([self._input], [], [], max(seconds, 0))[0]:
            return []
        typed = os.read(self._input, 1024)
        return keys(typed) if typed else None


def watch(
    take: Callable[[], Snapshot], terminal: Terminal, history: History, view: View, interval: float, origin: str
) -> None:
    """Draw, and do what the keys say, until one says to end.

    Args:
        take: returns the next snapshot, or raises LlmtracedError where there is none for now.
        terminal: to draw on.
        history: takes the snapshots in.
        view: to begin with.
        interval: seconds between snapshots.
        origin: where they come from.
    """
    due = said = time.monotonic()
    status, drawn = "", (0, 0)
    while not view.ended:
        now = time.monotonic()
        if now >= due and not view.paused:
            due, drawn = max(due + interval, now), (0, 0)
            status = status if now - said < _SAY_SECONDS else ""
            try:
                history.add(take())
            except LlmtracedError as error:
                history.skip()
                status, said = str(error), now
            if line := terminal.take_log():
                status, said = line, now
        if terminal.size != drawn:
            drawn = terminal.size
            terminal.draw(screen(history, view, *drawn, origin, status))
        wait = _LOOK_SECONDS if view.paused else min(due - time.monotonic(), _LOOK_SECONDS)
        pressed = terminal.keys(wait)
        if pressed is None:
            return
        for key in pressed:
            paused, drawn = view.paused, (0, 0)
            view = press(view, key, history)
            if view.paused != paused:
                history.skip()
                due = time.monotonic()
