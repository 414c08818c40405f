"""Answer a question from a trace folder.

Needs neither root nor the model: it reads Parquet only, also while the trace
is still being written. What begins with `account` says whether the trace is
complete; figures of a lossy one are lower bounds.

  llmtraced report summary trace                  the first look
  llmtraced report advise trace                   what to do about it
  llmtraced report tokens trace --phase decode --plot tokens.png
  llmtraced report heatmap trace --value stall --order layer
  llmtraced report reread trace --json -o reread.json
  llmtraced report html trace -o trace.html
  llmtraced report trace-events trace --token 20:30 -o tokens.json

docs/reports.md explains every figure, how it is computed, and what it cannot
say.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from llmtraced.analysis.trace import Trace, open_trace, verdict
from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.reporters import html, plots, text, trace_events
from llmtraced.reporters.experts import hot_list
from llmtraced.reporters.questions import QUESTIONS, Option, Options
from llmtraced.schema import PHASES

__all__ = ["FORMS", "add_arguments", "run"]

log = logging.getLogger(__name__)

FORMS: Final = {
    "html": "all of these on one page that needs no network; with -o FILE",
    "trace-events": "tokens, layers, operators and faults for Perfetto or Chrome (JSON); with -o FILE",
}
"""The whole trace in another form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    asks = {name: question.asks for name, question in QUESTIONS.items()} | FORMS
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    listed = "\n".join(
        textwrap.fill(f"  {name:13}{what}", width, subsequent_indent=" " * 15, break_on_hyphens=False)
        for name, what in asks.items()
    )
    parser.description = (__doc__ or "").replace("\n\n", f"\n\n{listed}\n\n", 1)
    parser.add_argument("name", metavar="NAME", choices=asks, help="one of those above")
    parser.add_argument("trace", metavar="TRACE", type=Path, help="trace folder")
    parser.add_argument("--json", action="store_true", help="complete figures as JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
    add_output_arguments(parser)
    parser.add_argument("--session", metavar="S", help="session of the trace (default: the newest)")
    parser.add_argument("--phase", choices=PHASES, help="only what happened in this phase (default: all)")
    parser.add_argument("--top", metavar="N", type=_count, help="rows to show (default: 10 to 100, by report)")
    for name, (option, owners) in _options().items():
        with_default = [name if default is None else f"{name}: default {default}" for name, default in owners.items()]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            choices=option.choices or None,
            type=_parser(option),
            metavar=None if option.choices else "N" if option.parse is int else "SIZE",
            help=f"{option.help} ({', '.join(with_default)})",
        )
    parser.add_argument("--hot-list", metavar="FILE", type=Path, help="all experts, hottest first, as CSV (experts)")
    parser.add_argument("--token", metavar="A:B", type=_range, help="only these tokens (trace-events)")
    parser.add_argument(
        "--limit", metavar="N", type=_count, help="more events than this are refused (trace-events; default 2000000)"
    )


def run(args: argparse.Namespace) -> int:
    """Compute, draw, print."""
    for path in (args.output, args.plot, args.hot_list):
        check_output(path, args.force)
    if args.hot_list is not None and args.name != "experts":
        raise LlmtracedError(f"report {args.name} has no option --hot-list", USAGE)
    if args.name in FORMS:
        return _whole(args)
    question = QUESTIONS[args.name]
    top = args.top or question.rows
    picture = None if args.plot is None else plots.require(args.plot)
    more = {name: getattr(args, name) for name in _options()}
    astray = [name for name, value in more.items() if value is not None and name not in question.options]
    if astray:
        raise LlmtracedError(f"report {args.name} has no option --{astray[0].replace('_', '-')}", USAGE)
    result = question.ask(open_trace(args.trace, args.session), Options(args.phase, top, more))
    if args.json:
        body = json.dumps(result, indent=2) + "\n"
    else:
        to_terminal = args.output is None and sys.stdout.isatty()
        width = shutil.get_terminal_size((120, 24)).columns if args.output is None else 120
        body = question.render(result, top, text.Style(width, to_terminal and "NO_COLOR" not in os.environ))
    if picture is not None:
        write_output(question.draw(result, picture, top), args.plot)
    if args.hot_list is not None:
        write_output(hot_list(result).encode(), args.hot_list)
    write_output(body.encode(), args.output)
    return 0


def _whole(args: argparse.Namespace) -> int:
    if args.json or args.plot is not None:
        raise LlmtracedError(f"report {args.name} takes neither --json nor --plot", USAGE)
    if args.output is None and sys.stdout.isatty():
        raise LlmtracedError(f"report {args.name} is not for a terminal: name a file with -o", USAGE)
    trace = open_trace(args.trace, args.session)
    for note in (*trace.notes, *_short(trace)):
        log.warning("%s", printable(note, 2000))
    if args.name == "html":
        plots.require(Path("page.svg"))
        pieces: Iterator[bytes] = (
            piece.encode() for piece in html.page(trace, args.phase, lambda name: log.info("%s: done", name))
        )
    else:
        limits = {} if args.limit is None else {"limit": args.limit}
        pieces = trace_events.trace_events(trace, tokens=args.token, phase=args.phase, **limits)
    write_output(pieces, args.output)
    return 0


def _short(trace: Trace) -> list[str]:
    """Return what is to be known of a trace that is not complete; every report says it, these forms can be missed."""
    told = verdict(trace.account)
    return [] if told == "complete" else [f"account: {told}"]


def _options() -> dict[str, tuple[Option, dict[str, Any]]]:
    """Return the questions' own options, and the defaults of each question that has them."""
    found: dict[str, tuple[Option, dict[str, Any]]] = {}
    for name, question in QUESTIONS.items():
        for key, option in question.options.items():
            found.setdefault(key, (option, {}))[1][name] = option.default
    return found


def _parser(option: Option) -> type[str]:
    def parse(word: str) -> object:
        if option.parse is int:
            return _number(word)
        return option.parse(word)

    return parse  # type: ignore[return-value]


def _number(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not a number")
    return int(word)


def _count(word: str) -> int:
    if _number(word) < 1:
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not 1 or more")
    return int(word)


def _range(word: str) -> tuple[int, int]:
    first, colon, last = word.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or int(first) > int(last):
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not a range of tokens such as 10:20")
    return int(first), int(last)
