"""Trace a process, or all that a command starts, into a folder of Parquet.

  llmtraced record --pid 1234 --duration 60s -o trace
  llmtraced record --detail ops -o trace -- llama-server -m model.gguf -c 4096
  llmtraced record -o trace -- llama-server --models-dir models

With a command, tracing begins before the model is loaded and ends with the command; each process that it starts and
that uses a model is traced. Otherwise it ends after --duration, with the process, or at Ctrl-C. What is recorded is
complete on disk every few seconds, and `llmtraced report summary TRACE` reads it at any moment. The process is never
stopped or changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import subprocess
import time
from pathlib import Path

from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.schema import Detail
from llmtraced.values import duration, size

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--pid", type=int, help="the process to trace")
    parser.add_argument("command", nargs="*", metavar="-- CMD …", help="start this and trace it, and what it starts")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="TRACE", help="folder for the trace")
    parser.add_argument("--force", action="store_true", help="write into a folder that has a trace already")
    parser.add_argument(
        "--detail",
        choices=[d.name.lower() for d in Detail if d >= Detail.FAULTS],
        default="faults",
        help="faults: faults, page cache and tokens (default); ops: and matrix multiplications and the experts "
        "chosen; full: and every operator",
    )
    parser.add_argument(
        "--router-scores",
        action="store_true",
        help="of a mixture of experts, also what its routers say, of their own input and of earlier ones (needs "
        "--detail ops): for simulate --experts",
    )
    parser.add_argument("--duration", type=duration, metavar="S", help="stop after this long, such as 30s or 10m")
    parser.add_argument("--flush", type=duration, default=5.0, metavar="S", help="seconds between files (default 5)")
    parser.add_argument("--ring", type=size, default=16 << 20, metavar="SIZE", help="event buffer (default 16M)")
    parser.add_argument("--json", action="store_true", help="print the account and totals as JSON at the end")


def run(args: argparse.Namespace) -> int:
    """Record until something ends it; return 0, or the command's own exit code."""
    from llmtraced.capture import Capture

    if (args.pid is None) == (not args.command):
        raise LlmtracedError("say which process: either --pid PID or -- COMMAND", USAGE)
    if args.output.exists() and not args.output.is_dir():
        raise LlmtracedError(f"{args.output} is not a folder", USAGE)
    if args.output.exists() and any(args.output.iterdir()) and not args.force:
        raise LlmtracedError(f"{args.output} is not empty, will not write into it without --force", USAGE)
    if args.router_scores and args.detail == "faults":
        raise LlmtracedError("--router-scores needs --detail ops", USAGE)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stop.append(received))
    capture = Capture(
        args.output,
        Detail[args.detail.upper()],
        flush_seconds=args.flush,
        ring_bytes=args.ring,
        router_scores=args.router_scores,
    )
    child: subprocess.Popen[bytes] | None = None
    try:
        if args.command:
            child = capture.start(args.command)
        else:
            capture.attach(args.pid)
        ends = time.monotonic() + args.duration if args.duration is not None else None
        while not stop and capture.alive and (ends is None or time.monotonic() < ends):
            capture.step()
    finally:
        totals = capture.close()
    for line in capture.summary():
        log.info("%s", line)
    if args.json:
        print(json.dumps(totals, indent=2))
    if child is None:
        return 0
    if child.poll() is None:
        child.send_signal(stop[0] if stop else signal.SIGTERM)
    code = child.wait()
    return 0 if stop or args.duration is not None else code if code >= 0 else 128 - code
