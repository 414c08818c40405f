"""Watch servers in the terminal: what they wait for, and read, right now.

  llmtraced top                 from the daemon, where one runs;
                                else by tracing by itself (root)
  llmtraced top --pid 1234      that process only
  llmtraced top --once          one screen after one interval, as plain text

  t l c     tensors, layers, components
  r s f e   sort by bytes read, stall, faults, share in RAM; n by name
  a v m z   sort by bytes read again, bytes evicted, major faults, size
  arrows    scroll, and choose the process
  p q       pause, quit

Nothing is recorded. docs/top.md explains every figure.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time

from llmtraced.errors import printable
from llmtraced.values import duration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--pid", type=int, help="show this process only")
    parser.add_argument(
        "--url", help="where a daemon serves its metrics (http://127.0.0.1:9477/metrics, if it answers)"
    )
    parser.add_argument("--interval", type=_interval, default=2.0, metavar="S", help="between two looks (default 2s)")
    parser.add_argument("--once", action="store_true", help="print one screen as plain text after one interval")


def run(args: argparse.Namespace) -> int:
    """Watch until the user has had enough."""
    from llmtraced.reporters.live import View, screen
    from llmtraced.snapshot import History
    from llmtraced.watch import open_source

    once = args.once or not (sys.stdin.isatty() and sys.stdout.isatty())
    history = History(max(5.0, args.interval))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as with Ctrl-C: the terminal as it was
    with open_source(args.url, args.pid) as source:
        if once:
            history.add(source.snapshot())
            time.sleep(args.interval)
            history.add(source.snapshot())
            width, height = shutil.get_terminal_size((80, 24))
            lines = screen(history, View(), width, height, source.origin)
            print("\n".join(line.plain.rstrip() for line in lines[:-1]))
            return 0
        from llmtraced.reporters.terminal import Terminal, watch

        try:
            with Terminal() as terminal:
                watch(source.snapshot, terminal, history, View(pid=args.pid), args.interval, source.origin)
        except KeyboardInterrupt:
            pass  # the usual way to leave
        return 0


def _interval(word: str) -> float:
    seconds = duration(word)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not between 100ms and 1h")
    return seconds
