"""Replay other amounts of RAM and other policies: bytes and time per token.

  llmtraced simulate trace/                        10 to 110 % of the model
  llmtraced simulate trace/ --ram 1.2G --ram 4G    these sizes, too
  llmtraced simulate trace/ --disk-bandwidth 2G/s --plot curve.svg
  llmtraced simulate trace/ --bench bench.json     times as this machine has them
  llmtraced simulate trace/ --experts              which experts to keep and to fetch

Policies: lru (the kernel as it is), pin (as much as fits is pinned, the rest
comes by faults), pin+stream (the rest is read just ahead of the computing),
belady (the best possible). RAM is what the model's pages may take; what else
the server needs comes on top. docs/reports/simulate.md tells how well this
agrees with measurements, docs/experts.md what --experts compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from llmtraced import values
from llmtraced.analysis.measured import Measured, measured
from llmtraced.analysis.simulate import simulate
from llmtraced.analysis.simulate_experts import simulate_experts
from llmtraced.analysis.trace import open_trace
from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.reporters import plots, text
from llmtraced.reporters import simulate as show_curve
from llmtraced.reporters import simulate_experts as show_experts
from llmtraced.schema import PHASES

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("trace", metavar="TRACE", type=Path, help="trace folder")
    parser.add_argument("--ram", metavar="SIZE", type=_size, action="append", default=[], help="this size, too")
    parser.add_argument(
        "--disk-bandwidth", metavar="SIZE/s", type=_rate, help="of the disk (default: the best in the trace)"
    )
    parser.add_argument(
        "--experts", action="store_true", help="of a mixture: policies of keeping experts, and predictors of them"
    )
    parser.add_argument(
        "--window",
        metavar="SIZE",
        type=_size,
        help="RAM that policies which pin leave for the rest to pass through (default: what the sidecar leaves)",
    )
    parser.add_argument(
        "--bench",
        metavar="FILE",
        type=Path,
        help="figures of this machine and model, of `bench prefetch --json`, instead of the trace's",
    )
    parser.add_argument("--json", action="store_true", help="complete figures as JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
    add_output_arguments(parser)
    parser.add_argument("--session", metavar="S", help="session of the trace (default: the newest)")
    parser.add_argument("--phase", choices=PHASES, help="tokens of this phase (default: decode)")


def run(args: argparse.Namespace) -> int:
    """Simulate, draw, print."""
    for path in (args.output, args.plot):
        check_output(path, args.force)
    picture = None if args.plot is None else plots.require(args.plot)
    if args.bench is not None and args.experts:
        raise LlmtracedError("--bench tells nothing of experts", USAGE)
    machine = None if args.bench is None else _measured(args.bench)
    trace = open_trace(args.trace, args.session)
    if args.experts:
        report = simulate_experts(trace, args.ram, args.disk_bandwidth)
    else:
        report = simulate(trace, args.ram, args.disk_bandwidth, args.window, args.phase, machine)
    show = show_experts if args.experts else show_curve
    if args.json:
        body = json.dumps(report, indent=2) + "\n"
    else:
        to_terminal = args.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size((120, 24)).columns if args.output is None else 120
        body = show.render(report, text.Style(width, to_terminal and "NO_COLOR" not in os.environ))
    if picture is not None:
        write_output(show.draw(report, picture), args.plot)
    write_output(body.encode(), args.output)
    return 0


def _measured(path: Path) -> Measured:
    try:
        return measured(json.loads(path.read_bytes()))
    except (OSError, ValueError, LlmtracedError) as error:
        raise LlmtracedError(f"{printable(str(path))}: {printable(str(error))}") from None


def _size(word: str) -> int:
    number = values.size(word)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"not a size above 0: {word!r}")
    return number


def _rate(word: str) -> int:
    return _size(word.removesuffix("/s"))
