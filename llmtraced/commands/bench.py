"""Measure this tool.

  events     events a second: the ring read in batches and through BCC, resolved, written to Parquet; bytes a fault
  overhead   tokens a second of a real llama-server with tracing and without it, in interleaved pairs

Both need root. docs/benchmarks.md says how each is measured and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import NO_PERMISSION, LlmtracedError
from llmtraced.reporters import plots
from llmtraced.reporters.text import Style
from llmtraced.values import size


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", metavar="N", type=_count, default=7, help="rounds to time (default 7)")
    parser.add_argument("--ring", metavar="SIZE", type=size, default=64 << 20, help="size of the ring (default 64M)")
    parser.add_argument("--events", metavar="N", type=_count, help="records a round (default: as many as fit)")
    parser.add_argument(
        "--model", metavar="GGUF", type=Path, help="use its tensors (default: a synthetic 1.7 GB model's)"
    )


def _events(args: argparse.Namespace) -> dict[str, Any]:
    from llmtraced.bench import events

    return events.run(rounds=args.rounds, ring_bytes=args.ring, events=args.events, model=args.model)


def _overhead_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", metavar="N", type=_count, default=30, help="pairs a level (default 30)")
    parser.add_argument("--tokens", metavar="N", type=_count, default=64, help="tokens a request (default 64)")
    parser.add_argument(
        "--pressed-tokens", metavar="N", type=_count, default=16, help="tokens a request under pressure (default 16)"
    )
    parser.add_argument(
        "--model", metavar="GGUF", type=Path, help="the model (default: Gemma 3 270M, which is fetched)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=_count, default=2, help="the server's compute threads (default 2)"
    )
    parser.add_argument(
        "--detail", metavar="LIST", default="control,faults,ops,full", help="levels (default control,faults,ops,full)"
    )
    parser.add_argument(
        "--pressure",
        metavar="LIST",
        default="none,70%",
        help="none, a share of the model, or a size (default none,70%%)",
    )


def _overhead(args: argparse.Namespace) -> dict[str, Any]:
    from llmtraced.bench import overhead

    return overhead.run(
        details=args.detail.split(","),
        pressures=args.pressure.split(","),
        pairs=args.pairs,
        tokens=args.tokens,
        pressed_tokens=args.pressed_tokens,
        threads=args.threads,
        model=args.model,
    )


Benchmark = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], dict[str, Any]]]

BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "events": ("events a second, bytes a fault", _events_arguments, _events),
    "overhead": ("tokens a second with tracing and without", _overhead_arguments, _overhead),
}
"""Name → what it measures, its arguments, and how it is run; bench/show.py has render_NAME and plot_NAME."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (summary, declare, _) in BENCHMARKS.items():
        one = names.add_parser(name, help=summary, description=summary)
        declare(one)
        one.add_argument("--json", action="store_true", help="complete figures as JSON instead of a table")
        one.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
        add_output_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Measure, draw, print."""
    from llmtraced.bench import show

    if os.geteuid() != 0:
        raise LlmtracedError(f"bench {args.benchmark} loads BPF programs: run the same command as root", NO_PERMISSION)
    for path in (args.output, args.plot):
        check_output(path, args.force)
    picture = None if args.plot is None else plots.require(args.plot)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is stopped
    report = BENCHMARKS[args.benchmark][2](args)
    if args.json:
        body = json.dumps(report, indent=2) + "\n"
    else:
        to_terminal = args.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size((120, 24)).columns if args.output is None else 120
        style = Style(width, to_terminal and "NO_COLOR" not in os.environ)
        body = getattr(show, f"render_{args.benchmark}")(report, style)
    if picture is not None:
        write_output(getattr(show, f"plot_{args.benchmark}")(report, picture), args.plot)
    write_output(body.encode(), args.output)
    return 0


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of 1 or more")
    return int(word)
