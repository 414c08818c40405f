"""Run the matrix: models at several memory limits, the same prompt, recorded and summed up.

  llmtraced experiment -o results
  llmtraced experiment -o results --model my.gguf --level fits,70%,50% --rounds 5

Each cell starts a llama-server of its own in a memory cgroup, asks it, and records the answer; rounds are interleaved.
The folder gets experiment.json, experiment.png and each cell's last trace, for `llmtraced report`.
Needs root, and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from llmtraced.commands._output import write_output
from llmtraced.errors import NO_PERMISSION, USAGE, LlmtracedError, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder for results and traces")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    parser.add_argument(
        "--model",
        metavar="LIST",
        default="gemma,dense,moe",
        help="gemma (real, 253 MB), dense (made up, 1.7 GB), moe (made up, 2.7 GB) or GGUF files (default: those)",
    )
    parser.add_argument(
        "--level",
        metavar="LIST",
        default="fits,85%,70%,50%,35%",
        help="memory for the model: fits, or shares of its size (default fits,85%%,70%%,50%%,35%%)",
    )
    parser.add_argument("--rounds", metavar="N", type=_count, default=3, help="how often each cell runs (default 3)")
    parser.add_argument("--tokens", metavar="N", type=_count, default=16, help="tokens to generate (default 16)")
    parser.add_argument("--prompt-tokens", metavar="N", type=_count, default=32, help="tokens asked (default 32)")
    parser.add_argument("--threads", metavar="N", type=_count, default=2, help="compute threads (default 2)")
    parser.add_argument(
        "--read-ahead-kb", metavar="KB", type=_count, help="the disk's readahead meanwhile (default: as it is)"
    )
    parser.add_argument(
        "--router-scores", action="store_true", help="record what mixtures' routers say, too: for simulate --experts"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run it, write the results, print the table."""
    from llmtraced.bench import experiment, show_experiment
    from llmtraced.reporters import plots
    from llmtraced.reporters.text import Style

    if os.geteuid() != 0:
        raise LlmtracedError("the experiment loads BPF programs: run the same command as root", NO_PERMISSION)
    folder: Path = args.output
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not args.force)):
        what = "is not empty, will not write into it without --force" if folder.is_dir() else "is not a folder"
        raise LlmtracedError(f"{printable(str(folder))} {what}", USAGE)
    picture = plots.require(folder / "experiment.png")  # before the work, not after it
    folder.mkdir(parents=True, exist_ok=True)
    report = experiment.run(
        folder,
        names=args.model.split(","),
        levels=args.level.split(","),
        rounds=args.rounds,
        threads=args.threads,
        read_ahead_kb=args.read_ahead_kb,
        prompt=experiment.Prompt(args.prompt_tokens, args.tokens),
        router_scores=args.router_scores,
    )
    body = json.dumps(report, indent=2) + "\n"
    write_output(body.encode(), folder / "experiment.json")
    write_output(show_experiment.draw(report, picture), folder / "experiment.png")
    if not args.json:
        width = shutil.get_terminal_size((120, 24)).columns
        body = show_experiment.render(report, Style(width, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    write_output(body.encode(), None)
    return 0


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{printable(word)!r} is not a number of 1 or more")
    return int(word)
