"""Try every requirement and say how to get what is missing.

  llmtraced check
  llmtraced check --pid 1234      and what can be traced of that process

Programs are really compiled, loaded and attached, and detached again; page faults of this command's own are counted.
A line is "ok", "missing", "degraded" (tracing works, something is lost) or "unknown" (could not be tried). An arrow
leads to what to do. Exit code: 0 if nothing required is missing, 3 if not root, 4 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Final

from llmtraced.errors import NO_PERMISSION, UNSUPPORTED

__all__ = ["add_arguments", "run"]

_COLOURS: Final = {"ok": "32", "missing": "31", "degraded": "33", "unknown": "35"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--pid", type=int, help="look at this process too")
    parser.add_argument("--json", action="store_true", help='print {"checks": [...], "ok": true or false}')


def run(args: argparse.Namespace) -> int:
    """Print every check as it is made; return the exit code."""
    from llmtraced import checks  # numpy and ELF readers: only when they are needed

    found: list[checks.Check] = []
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for check in checks.run(args.pid):
        found.append(check)
        if args.json:
            continue
        status = f"{check.status:8}"
        print(
            f"\x1b[{_COLOURS[check.status]}m{status}\x1b[0m" if colour else status, f" {check.name:22}  {check.detail}"
        )
        if check.remedy and check.status != "ok":
            print(f"{'':10}→ {check.remedy}")
        sys.stdout.flush()
    fine = checks.all_fine(found)
    lacking = [c.name for c in found if c.required and c.status == "missing"]
    if args.json:
        print(json.dumps({"checks": [asdict(c) for c in found], "ok": fine}, indent=2))
    else:
        print("everything that is needed is there" if fine else f"missing: {', '.join(lacking)}")
    if fine:
        return 0
    return NO_PERMISSION if os.geteuid() != 0 else UNSUPPORTED
