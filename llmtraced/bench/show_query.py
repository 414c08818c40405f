"""The figures of ``bench query`` as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtraced.bench.query import GOAL_ROWS, GOALS
from llmtraced.bench.show import machine_lines, target_lines
from llmtraced.errors import printable
from llmtraced.reporters.plots import AGAIN, ONCE, canvas, drawn
from llmtraced.reporters.text import Column, Style, indented, size, table

__all__ = ["plot_query", "render_query"]


def render_query(report: Mapping[str, Any], style: Style) -> str:
    """Return the report as text: one line a report, the goals, what failed."""
    trace, settings = report["trace"], report["settings"]
    kind = "mixture of experts" if settings["moe"] else "dense"
    by_table = ", ".join(f"{rows:,} {name}" for name, rows in trace["rows_by_table"].items() if rows)
    written = "" if trace["write_seconds"] is None else f", written in {trace['write_seconds']:.0f} s"
    rows = [{"name": name, **figures} for name, figures in report["reports"].items() if "failed" not in figures]
    columns = [
        Column("report", lambda row: row["name"], name=True),
        Column("seconds", lambda row: f"{row['seconds']['median']:.2f}"),
        Column("range", lambda row: f"{row['seconds']['min']:.2f} to {row['seconds']['max']:.2f}", spare=True),
        Column("CPU seconds", lambda row: f"{row['cpu_seconds']['median']:.2f}", spare=True),
        Column("peak RSS", lambda row: size(row["peak_rss_bytes"]["median"])),
        Column("highest", lambda row: size(row["peak_rss_bytes"]["max"]), spare=True),
        Column("empty trace", lambda row: size(row["empty"]["peak_rss_bytes"]["median"]), spare=True),
        Column("state bytes a row", lambda row: f"{row['state_bytes_per_row']:.2f}"),
        Column("JSON", lambda row: size(row["json_bytes"])),
    ]
    failed = [f"{name}: {printable(r['failed'])}" for name, r in report["reports"].items() if "failed" in r]
    return "\n".join(
        [
            *machine_lines(report),
            f"a made-up trace of {trace['rows']:,} rows: {trace['tokens']:,} graphs of a {kind} model with "
            f"{trace['tensors']:,} tensors, {size(settings['model_bytes'])}",
            *indented([by_table, f"{size(trace['disk_bytes'])} in {trace['files']:,} files{written}"]),
            f"median of {settings['rounds']}, one process a report, files in the page cache; checked against what is "
            f"known: {', '.join(report['verified']) or 'none'}",
            "",
            *table(rows, columns, style),
            *(style.warn(line) for line in failed),
            "",
            *target_lines(report["targets"], style),
            *([] if trace["rows"] >= 0.99 * GOAL_ROWS else [f"the targets are for {GOAL_ROWS:,} rows"]),
            "",
        ]
    )


def plot_query(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw seconds and peak memory of each report, every round, and the goals."""
    rows = {name: figures for name, figures in report["reports"].items() if "failed" not in figures}
    figure = canvas(height=1.4 + 0.35 * max(len(rows), 3))
    left, right = figure.subplots(1, 2, sharey=True)
    shown = (
        (left, "seconds", 1.0, "seconds, median and rounds"),
        (right, "peak_rss_bytes", 1e9, "peak memory, GB, median and rounds"),
    )
    for axes, key, scale, label in shown:
        for i, figures in enumerate(rows.values()):
            values = [value / scale for value in figures[key]["values"]]
            axes.barh(i, figures[key]["median"] / scale, color=ONCE)
            axes.plot(values, [i] * len(values), "|", color="black")
        axes.axvline(GOALS[key] / scale, color=AGAIN, linewidth=1)
        axes.annotate(
            " goal", (GOALS[key] / scale, 1), xycoords=("data", "axes fraction"), va="top", color=AGAIN, fontsize=9
        )
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
    left.set_yticks(range(len(rows)), list(rows))
    left.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    figure.suptitle(f"reports on {report['trace']['rows']:,} rows", x=0.01, ha="left", fontsize=11)
    return drawn(figure, picture)
