"""Answer a question from a trace folder.

Needs neither root nor the model; it reads Parquet only, also while the trace is still being written.
The fields are explained in docs/reports.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from llmtraced.analysis.trace import open_trace
from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import printable
from llmtraced.reporters import plots, text
from llmtraced.reporters.questions import QUESTIONS, Options
from llmtraced.schema import PHASES

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    asks = "\n".join(f"  {name:11}{question.asks}" for name, question in QUESTIONS.items())
    parser.description = (__doc__ or "").replace("\n\n", f"\n\n{asks}\n\n", 1)
    parser.add_argument("name", metavar="NAME", choices=QUESTIONS, help="one of those above")
    parser.add_argument("trace", metavar="TRACE", type=Path, help="trace folder")
    parser.add_argument("--json", action="store_true", help="complete figures as JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
    add_output_arguments(parser)
    parser.add_argument("--session", metavar="S", help="session of the trace (default: the newest)")
    parser.add_argument("--phase", choices=PHASES, help="only what happened in this phase (default: all)")
    parser.add_argument("--top", metavar="N", type=_count, help="rows to show (default: 10 to 25, by report)")


def run(args: argparse.Namespace) -> int:
    """Compute, draw, print."""
    question = QUESTIONS[args.name]
    top = args.top or question.rows
    for path in (args.output, args.plot):
        check_output(path, args.force)
    picture = None if args.plot is None else plots.require(args.plot)
    result = question.analyse(open_trace(args.trace, args.session), Options(args.phase, top))
    if args.json:
        body = json.dumps(result, indent=2) + "\n"
    else:
        to_terminal = args.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size((120, 24)).columns if args.output is None else 120
        body = question.render(result, top, text.Style(width, to_terminal and "NO_COLOR" not in os.environ))
    if picture is not None:
        write_output(question.draw(result, picture, top), args.plot)
    write_output(body.encode(), args.output)
    return 0


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not a number of rows (1 or more)")
    return int(word)
