"""Answer a question from a trace.

  summary   what was traced, for how long, how fast, what was read and what was waited for
  reread    how much of each tensor was read from disk, and read again
  tokens    time, stall, bytes read and page faults of each token, with percentiles

Needs neither root nor the model. The fields are explained in docs/reports.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from llmtraced.analysis.reread import reread
from llmtraced.analysis.summary import summary
from llmtraced.analysis.tokens import tokens
from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import printable
from llmtraced.reporters import plots, text
from llmtraced.schema import PHASES

__all__ = ["REPORTS", "add_arguments", "run"]

Analyse = Callable[[Trace, str | None, int], Mapping[str, Any]]
Render = Callable[[Mapping[str, Any], int, text.Style], str]
Plot = Callable[[Mapping[str, Any], str, int], bytes]

REPORTS: Final[Mapping[str, tuple[Analyse, Render, Plot, int]]] = {
    "summary": (summary, text.render_summary, plots.plot_summary, 10),
    "reread": (lambda trace, phase, _: reread(trace, phase), text.render_reread, plots.plot_reread, 25),
    "tokens": (lambda trace, phase, _: tokens(trace, phase), text.render_tokens, plots.plot_tokens, 20),
}
"""Name → what it computes, how that is printed, how it is drawn, how many rows are shown by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", choices=REPORTS, help=", ".join(REPORTS))
    parser.add_argument("trace", metavar="TRACE", type=Path, help="trace folder")
    parser.add_argument("--json", action="store_true", help="complete figures as JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
    add_output_arguments(parser)
    parser.add_argument("--session", metavar="S", help="session of the trace (default: the newest)")
    parser.add_argument("--phase", choices=PHASES, help="only what happened in this phase (default: all)")
    parser.add_argument("--top", metavar="N", type=_count, help="rows to show (default: 10 to 25, by report)")


def run(args: argparse.Namespace) -> int:
    """Compute, draw, print."""
    analyse, render, plot, few = REPORTS[args.name]
    top = args.top or few
    for path in (args.output, args.plot):
        check_output(path, args.force)
    picture = None if args.plot is None else plots.require(args.plot)
    result = analyse(open_trace(args.trace, args.session), args.phase, top)
    if args.json:
        body = json.dumps(result, indent=2) + "\n"
    else:
        to_terminal = args.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size((120, 24)).columns if args.output is None else 120
        body = render(result, top, text.Style(width, to_terminal and "NO_COLOR" not in os.environ))
    if picture is not None:
        write_output(plot(result, picture, top), args.plot)
    write_output(body.encode(), args.output)
    return 0


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not a number of rows (1 or more)")
    return int(word)
