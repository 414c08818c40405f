"""Dashboards for Grafana, rules for Prometheus, and a dashboard as a picture.

  llmtraced monitoring servers -o servers.json       what servers wait for; import it into Grafana
  llmtraced monitoring tracer -o tracer.json         whether llmtraced keeps up, and what it costs
  llmtraced monitoring rules -o llmtraced.yml        recording and alerting rules
  llmtraced monitoring servers --prometheus http://127.0.0.1:9090 --since 30m --plot servers.png

docs/prometheus.md says how to scrape the daemon, over TLS and with a password where that is wanted.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files
from pathlib import Path

from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.values import duration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("what", choices=("servers", "tracer", "rules"), help="what is wanted")
    parser.add_argument("--prometheus", metavar="URL", help="where to ask for a picture's data")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the dashboard into a .png or .svg")
    parser.add_argument("--since", metavar="S", type=duration, default=3600.0, help="how far a picture goes back (1h)")
    parser.add_argument("--window", metavar="S", type=duration, default=60.0, help="over which rates are taken (1m)")
    parser.add_argument("--model", metavar="REGEX", default=".*", help="which models a picture shows (all)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write what is wanted."""
    if bool(args.plot) != bool(args.prometheus):
        raise LlmtracedError("--plot needs --prometheus, and the other way round", USAGE)
    if args.plot:
        return _plot(args)
    check_output(args.output, args.force)
    if args.what == "rules":
        write_output((files("llmtraced.monitoring") / "rules.yml").read_bytes(), args.output)
        return 0
    from llmtraced.monitoring.grafana import grafana
    from llmtraced.monitoring.panels import DASHBOARDS

    write_output((json.dumps(grafana(DASHBOARDS[args.what]), indent=2) + "\n").encode(), args.output)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from llmtraced.monitoring.panels import DASHBOARDS
    from llmtraced.monitoring.picture import draw, fetch
    from llmtraced.monitoring.prometheus import Prometheus
    from llmtraced.reporters import plots

    if args.what == "rules":
        raise LlmtracedError("rules cannot be drawn: servers or tracer", USAGE)
    kind = plots.require(args.plot)
    check_output(args.plot, args.force)
    dashboard, end = DASHBOARDS[args.what], time.time()
    start = end - args.since
    # The expression is quoted once more in PromQL.
    model = args.model.replace("\\", "\\\\").replace('"', '\\"')
    drawn = fetch(dashboard, Prometheus(args.prometheus), start, end, f"{max(round(args.window), 1)}s", model)
    write_output(draw(dashboard, drawn, start, end, kind), args.plot)
    return 0
