"""Learn which bytes of the model each token uses, in order: from a trace, or from a running server's graph.

  llmtraced plan trace/ -o plan.json                   the plan as JSON
  llmtraced plan trace/ --format c-header -o plan.h    name, offset, size in C
  llmtraced plan trace/ --model draft.gguf             of several models, this
  sudo llmtraced plan --pid PID -o plan.json           no trace: from the compute graph of the next token

A trace recorded with --detail ops has the sequence itself. Without operators
the order is learned from page faults, or from what came into the page cache;
`source` in the plan says which. See docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from llmtraced.analysis.plan import learn
from llmtraced.analysis.trace import open_trace, verdict
from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.prefetch.plan import Plan, c_header

__all__ = ["add_arguments", "run"]

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("trace", metavar="TRACE", type=Path, nargs="?", help="trace folder")
    parser.add_argument("--pid", metavar="PID", type=int, help="a running server, instead of a trace (needs root)")
    parser.add_argument("--format", choices=_RENDERERS, default="json", help="json (the default) or c-header")
    parser.add_argument("--model", metavar="LABEL", help="the model's file name, where the trace is of several models")
    parser.add_argument("--session", metavar="S", help="session of the trace (default: the newest)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Learn and write."""
    check_output(args.output, args.force)
    if (args.trace is None) == (args.pid is None):
        raise LlmtracedError("name a trace folder or a --pid, one of them", USAGE)
    if args.pid is not None:
        from llmtraced.prefetch import launch

        plan = launch.live_plan(args.pid)
        log.info("%d uses of weights, %.2f GB a token", len(plan.entries), plan.bytes_per_token / 1e9)
        write_output(_RENDERERS[args.format](plan).encode(), args.output)
        return 0
    trace = open_trace(args.trace, args.session)
    plan, answer = learn(trace, args.model)
    told = verdict(trace.account)
    for note in (*trace.notes, *([] if told == "complete" else [f"account: {told}"])):
        log.warning("%s", printable(note, 2000))
    log.info("%s", printable(answer, 2000))
    write_output(_RENDERERS[args.format](plan).encode(), args.output)
    return 0


def _json(plan: Plan) -> str:
    return json.dumps(plan.to_json(), indent=1) + "\n"


_RENDERERS: Final[Mapping[str, Callable[[Plan], str]]] = {"json": _json, "c-header": c_header}
