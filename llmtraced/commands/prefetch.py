"""Make a running server faster when its model is larger than its memory: pin, read ahead, give back behind.

  sudo llmtraced prefetch --pid $(pgrep -n llama-server)
  sudo llmtraced prefetch --unit llama-server.service --strategy pin --budget 8G

Needs nothing from the server. It watches three tokens, learns the order in which they use the model from the server's
own compute graph, and works if they read from disk. Ctrl-C ends it, and the kernel has its way again.
  auto     pin what fits, stream the rest through a small window just ahead of the server, give back behind it;
           of a mixture fetch the experts as they are chosen, keep those that were used most of late
  pin      only pin what fits
  pattern  only read ahead, by readahead(2)
  uring    only read ahead, by io_uring
  moe      as auto, of a mixture only
  off      do nothing, and say what would be managed
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

from llmtraced.errors import printable
from llmtraced.prefetch.guesses import DEFAULT, SOURCES
from llmtraced.prefetch.pages import PATHS
from llmtraced.values import size

WAYS = (*PATHS, "uring")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--pid", metavar="PID", type=int, help="the server")
    server.add_argument("--unit", metavar="UNIT", help="the server, by its systemd unit; waits until it has its model")
    steps = ("hand-over", "take-over", "join")
    parser.add_argument("--step", choices=steps, help="with --unit: what llmtraced-prefetch@.service does in turn")
    parser.add_argument(
        "--strategy",
        choices=("auto", "pin", "pattern", "uring", "moe", "off"),
        default="auto",
        help="what to do (default auto)",
    )
    parser.add_argument(
        "--plan", metavar="FILE", type=Path, help="a plan of `llmtraced plan` (default: from the graph)"
    )
    parser.add_argument(
        "--budget", metavar="SIZE", type=_budget, help="memory for the model's pages: auto, or a size (default auto)"
    )
    parser.add_argument(
        "--window", metavar="SIZE", type=size, default=0, help="memory for the stream (default: a twelfth of it)"
    )
    parser.add_argument("--slack", metavar="SIZE", type=size, help="memory to leave free (default 0.5 %%, at least 8M)")
    parser.add_argument(
        "--depth", metavar="N", type=int, default=0, help="pieces of 2 MB read at a time (default 8 to 16)"
    )
    parser.add_argument("--path", choices=WAYS, default="", help="how to read (default: what a calibration finds best)")
    parser.add_argument(
        "--trial",
        metavar="N",
        type=int,
        default=3,
        help="tokens to watch first (3); none of a server that has huge pages to lose; 0: work at once, never compare",
    )
    parser.add_argument(
        "--clock",
        choices=("auto", "ticks", "pagetable"),
        default="auto",
        help="how to follow the server (default auto)",
    )
    parser.add_argument(
        "--predict",
        metavar="WHAT,...",
        type=_sources,
        default=DEFAULT,
        help=f"what a mixture's experts are guessed by: none, or of {', '.join(SOURCES)} (default {','.join(DEFAULT)})",
    )
    parser.add_argument("--no-join", dest="join", action="store_false", help="stay out of the server's memory cgroup")
    parser.add_argument(
        "--metrics",
        metavar="FILE",
        help="write Prometheus metrics here, once a second; '' for nowhere (default: where the daemon looks)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary at the end as JSON")


def run(args: argparse.Namespace) -> int:
    """Prepare, and become the sidecar."""
    from llmtraced.prefetch import unit

    if args.step == "take-over":
        unit.take_over()
    pid = unit.server_of(args.unit) if args.unit else args.pid
    if args.step == "join":
        if args.join:
            unit.join(pid, int(os.environ["MAINPID"]))
        return 0
    from llmtraced.prefetch import launch

    chosen = {f.name: getattr(args, f.name) for f in fields(launch.Options) if f.name != "hand_over"}
    launch.run(pid, launch.Options(**chosen, hand_over=args.step == "hand-over"))
    return 0


def _sources(words: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(words.split(","))) if words != "none" else ()
    for word in found:
        if word not in SOURCES:
            raise argparse.ArgumentTypeError(f"{printable(word)}: choose none, or of {', '.join(SOURCES)}")
    return found


def _budget(word: str) -> int | None:
    return None if word == "auto" else size(word)
