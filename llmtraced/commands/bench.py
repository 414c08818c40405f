"""Measure this tool.

  events     events a second: the ring read in batches and through BCC, resolved, written to Parquet; bytes a fault
  overhead   tokens a second of a real llama-server with tracing and without it, in interleaved pairs
  scrape     milliseconds and processor time of a scrape of the daemon's metrics, at rest and while faults come in
  query      seconds and memory of each report on a made-up trace of 100 million rows
  prefetch   tokens a second of a server whose model does not fit, with the sidecar and with what else one could do

All but `query` need root. docs/benchmarks.md says how each is measured and what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        "--detail",
        metavar="LIST",
        default="control,faults,ops,full",
        help="levels (default control,faults,ops,full); bare-ops: its probes with programs that do nothing",
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


def _scrape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensors", metavar="LIST", type=_counts, default=(2000, 100), help="of the models (default 2000,100)"
    )
    parser.add_argument("--rounds", metavar="N", type=_count, default=30, help="scrapes of each (default 30)")


def _scrape(args: argparse.Namespace) -> dict[str, Any]:
    from llmtraced.bench import scrape

    return scrape.run(tensors=args.tensors, rounds=args.rounds)


def _query_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", metavar="N", type=_rows, default=100_000_000, help="of the trace (default 100M)")
    parser.add_argument("--rounds", metavar="N", type=_count, default=3, help="how often each report runs (default 3)")
    parser.add_argument(
        "--report", metavar="NAME", action="append", help="only this report; may be given several times (default: all)"
    )
    parser.add_argument(
        "--trace", metavar="FOLDER", type=Path, help="keep the trace here, and use it again (default: it is deleted)"
    )
    parser.add_argument(
        "--tensors", metavar="N", type=_count, default=1000, help="of the model; fewer make more tokens (default 1000)"
    )
    parser.add_argument("--dense", action="store_true", help="a dense model (default: a mixture of experts)")


def _query(args: argparse.Namespace) -> dict[str, Any]:
    from llmtraced.bench import query

    return query.run(
        rows=args.rows,
        reports=args.report,
        rounds=args.rounds,
        trace=args.trace,
        n_tensors=args.tensors,
        moe=not args.dense,
    )


def _prefetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        metavar="LIST",
        default="85%",
        help="shares of the model, beside the server's own memory, or sizes for all (default 85%%)",
    )
    parser.add_argument(
        "--read-ahead-kb", metavar="LIST", type=_counts, default=(), help="such as 128,8192 (default: as it is)"
    )
    parser.add_argument(
        "--strategies",
        metavar="LIST",
        default="",
        help="of off,auto,pin,pattern,uring,moe,readahead,vmtouch,load-none,load-dio (default: all); moe:none, "
        "moe:attention+router and so on choose what experts are guessed by, see `llmtraced prefetch --help`",
    )
    parser.add_argument(
        "--model", metavar="MODEL", default="dense", help="dense, moe, gemma, or a GGUF file (default dense: 1.7 GB)"
    )
    parser.add_argument("--rounds", metavar="N", type=_count, default=5, help="of each strategy (default 5)")
    parser.add_argument("--tokens", metavar="N", type=_count, default=16, help="tokens a request (default 16)")
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=256, help="of the prompt; 0: none is measured (default 256)"
    )
    parser.add_argument(
        "--threads", metavar="N", type=_count, default=2, help="the server's compute threads (default 2)"
    )
    parser.add_argument(
        "--pressure",
        choices=("cgroup", "lock"),
        default="cgroup",
        help="limit the server's cgroup, or lock the machine's memory but for 2 GB or more (default cgroup)",
    )


def _prefetch(args: argparse.Namespace) -> dict[str, Any]:
    from llmtraced.bench import prefetch

    return prefetch.run(
        strategies=args.strategies.split(",") if args.strategies else prefetch.STRATEGIES,
        memory=args.memory.split(","),
        read_ahead_kb=args.read_ahead_kb,
        model=args.model,
        rounds=args.rounds,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        threads=args.threads,
        pressure=args.pressure,
    )


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        summary: what it measures.
        declare: adds its arguments.
        measure: runs it.
        shown: the module of llmtraced.bench with its render_NAME and plot_NAME.
        root: whether it loads BPF programs.
    """

    summary: str
    declare: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    shown: str = "show"
    root: bool = True


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "events": Benchmark("events a second, bytes a fault", _events_arguments, _events),
    "overhead": Benchmark("tokens a second with tracing and without", _overhead_arguments, _overhead),
    "scrape": Benchmark("milliseconds of a scrape of /metrics", _scrape_arguments, _scrape),
    "query": Benchmark("seconds and memory of each report", _query_arguments, _query, "show_query", root=False),
    "prefetch": Benchmark("tokens a second with the sidecar", _prefetch_arguments, _prefetch, "show_prefetch"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    names = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, benchmark in BENCHMARKS.items():
        one = names.add_parser(name, help=benchmark.summary, description=benchmark.summary)
        benchmark.declare(one)
        one.add_argument("--json", action="store_true", help="complete figures as JSON instead of a table")
        one.add_argument("--plot", metavar="FILE", type=Path, help="draw it too, as .png or .svg (needs matplotlib)")
        add_output_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Measure, draw, print."""
    benchmark = BENCHMARKS[args.benchmark]
    if benchmark.root and os.geteuid() != 0:
        raise LlmtracedError(f"bench {args.benchmark} loads BPF programs: run the same command as root", NO_PERMISSION)
    for path in (args.output, args.plot):
        check_output(path, args.force)
    picture = None if args.plot is None else plots.require(args.plot)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is stopped
    report = benchmark.measure(args)
    show = importlib.import_module(f"llmtraced.bench.{benchmark.shown}")
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


def _counts(word: str) -> tuple[int, ...]:
    return tuple(_count(one) for one in word.split(","))


def _rows(word: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([kmg]?)", word.strip().lower())
    rows = round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[match[2]]) if match else 0
    if rows < 1:
        raise argparse.ArgumentTypeError(f"not a number of rows: {word!r}; write it like 500000, 20M or 1.5G")
    return rows
