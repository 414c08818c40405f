"""The command line: ``llmtraced COMMAND``.

A command is a module here with a docstring (its help), ``add_arguments(parser)`` and ``run(args) -> int``. It is
imported only when it is asked for. Data goes to stdout, logs to stderr; only :func:`main` prints an error.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

from llmtraced import __version__
from llmtraced.errors import FAILED, NO_PERMISSION, LlmtracedError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS: Final = {
    "map": "the tensor map of a GGUF model",
    "check": "every requirement, one line each, with the remedy",
    "record": "trace a process into a folder of Parquet",
    "daemon": "find servers as they come and go, trace them, export metrics",
    "top": "the live view: what servers wait for, now",
    "report": "answers from a trace",
    "plan": "which bytes each token uses, in order, from a trace",
    "simulate": "other RAM sizes and policies: bytes and time per token",
    "prefetch": "the sidecar: make a server faster that is short of memory",
    "monitoring": "Grafana dashboards, Prometheus rules, pictures",
    "experiment": "models at several memory limits, recorded and compared",
    "bench": "measure this tool: events, overhead, reports",
    "demo": "the whole story on a small real model, end to end",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; with ``only``, other commands are listed but their modules are not imported."""
    parser = argparse.ArgumentParser(
        prog="llmtraced",
        description=(__import__("llmtraced").__doc__ or "").strip(),
        epilog="exit codes: 0 fine, 1 failed, 2 usage, 3 no permission, 4 kernel or target unsupported",
    )
    parser.add_argument("--version", action="version", version=f"llmtraced {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if only is not None and name != only:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = importlib.import_module(f"llmtraced.commands.{name}")
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's own by default) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((w for w in words if not w.startswith("-")), "")
    args = build_parser(only=chosen).parse_args(words)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="llmtraced: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(args.run(args))
    except LlmtracedError as error:
        print(f"llmtraced: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"llmtraced: {error}; run the same command as root", file=sys.stderr)
        return NO_PERMISSION
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing to complain about
        return FAILED
    except KeyboardInterrupt:
        return 130
