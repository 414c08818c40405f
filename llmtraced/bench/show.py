"""Benchmark reports as text and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters.plots import canvas, drawn
from llmtraced.reporters.text import Column, Style, size, table

__all__ = [
    "machine_lines",
    "plot_events",
    "plot_overhead",
    "plot_scrape",
    "render_events",
    "render_overhead",
    "render_scrape",
    "target_lines",
]

_WAYS: Final = {
    "ring": "ring, read in batches",
    "bcc_callback": "BCC, a callback a record",
    "resolved": "read and resolved",
    "end_to_end": "read to Parquet",
}
_COLOURS: Final = ("#4c78a8", "#e45756", "#72b7b2", "#f58518")


def render_events(report: Mapping[str, Any], style: Style) -> str:
    """Return the events report as text."""
    rows = [{"way": label, **report["rounds"][name]} for name, label in _WAYS.items()]
    columns = [Column("events per second", lambda row: row["way"], name=True)]
    columns += [_millions(name) for name in ("median", "min", "max")]
    by_pattern = [{"pattern": p, "bytes": n} for p, n in report["bytes_per_fault_event_by_pattern"].items()]
    ratio, settings = report["rounds"]["ratio_ring_to_bcc"], report["settings"]
    return "\n".join(
        [
            *machine_lines(report),
            f"{settings['rounds']} rounds of {settings['events_per_round']:,} records, all on CPU {settings['cpu']}; "
            f"{report['verified_events']:,} records checked, none lost",
            "",
            *table(rows, columns, style),
            f"ring : BCC = {ratio['median']:.0f} ({ratio['min']:.0f} to {ratio['max']:.0f})",
            "",
            *table(
                by_pattern,
                [
                    Column("fault pattern", lambda row: row["pattern"], name=True),
                    Column("bytes a fault on disk", lambda row: f"{row['bytes']:.2f}"),
                ],
                style,
            ),
            "",
            *target_lines(report["targets"], style),
            "",
        ]
    )


def render_overhead(report: Mapping[str, Any], style: Style) -> str:
    """Return the overhead report as text."""
    settings = report["settings"]
    lines = [
        *machine_lines(report),
        f"{printable(settings['model'])} ({size(settings['model_bytes'])}), {settings['threads']} threads, "
        f"readahead {settings['read_ahead_kb']} KB",
    ]
    columns = [
        Column("detail", lambda row: row["detail"], name=True),
        Column("with : without", lambda row: f"{row['ratio']['median']:.4f}"),
        Column("95 % interval", lambda row: "{:.4f} to {:.4f}".format(*row["ratio"]["median_ci95"])),
        Column("quartiles", lambda row: f"{row['ratio']['p25']:.4f} to {row['ratio']['p75']:.4f}", spare=True),
        Column("range", lambda row: f"{row['ratio']['min']:.4f} to {row['ratio']['max']:.4f}", spare=True),
        Column("tokens/s without", lambda row: f"{row['tokens_per_s_without']['median']:.2f}"),
        Column("recorder CPU", lambda row: f"{row['recorder_cpu']['median']:.2%}" if "recorder_cpu" in row else "-"),
        Column("RSS", lambda row: size(row.get("recorder_rss_bytes"))),
        Column(
            "BPF µs/token", lambda row: f"{row['bpf_ns_per_token'] / 1e3:.0f}" if "bpf_ns_per_token" in row else "-"
        ),
        Column("events/token", lambda row: f"{row.get('events_per_token', 0):,.0f}", spare=True),
        Column("dropped", lambda row: f"{row.get('dropped', 0):,}", spare=True),
    ]
    for condition in report["conditions"]:
        limit = (
            "the model fits in RAM" if condition["limit_bytes"] is None else f"limit {size(condition['limit_bytes'])}"
        )
        idle = condition["idle"]
        rows = [{"detail": name, **found} for name, found in condition["details"].items()]
        lines += ["", style.bold(f"memory pressure {condition['pressure']}: {limit}; {settings['pairs']} pairs")]
        lines += table(rows, columns, style)
        lines.append(
            f"beside an idle server for {idle['seconds']:.0f} s: {idle['recorder_cpu']:.2%} of a core "
            f"({idle['recorder_cpu_before_first_graph']:.2%} before its first graph), {size(idle['rss_bytes'])}"
        )
    return "\n".join([*lines, "", *target_lines(report["targets"], style), ""])


def render_scrape(report: Mapping[str, Any], style: Style) -> str:
    """Return the scrape report as text: a line a number of tensors and load."""
    settings = report["settings"]
    columns = [
        Column("tensors", lambda row: f"{row['tensors']:,}"),
        Column("load", lambda row: row["load"], name=True),
        Column("ms", lambda row: _ms(row["seconds"]["median"])),
        Column("range", lambda row: f"{_ms(row['seconds']['min'])} to {_ms(row['seconds']['max'])}"),
        Column("making series", lambda row: _ms(row["made_seconds"]["median"]), spare=True),
        Column("daemon CPU ms", lambda row: _ms(row["cpu_seconds"]["median"])),
        Column("series", lambda row: f"{row['series']:,}"),
        Column("bytes", lambda row: f"{row['bytes']['median']:,.0f}"),
        Column(
            "faults/s",
            lambda row: f"{row['faults_per_s']['median']:,.0f}" if "faults_per_s" in row else "0",
            spare=True,
        ),
    ]
    return "\n".join(
        [
            *machine_lines(report),
            f"median of {settings['rounds']} scrapes, in turns; for each number of tensors a process with a model of "
            f"{size(settings['model_bytes'])}, and a daemon",
            "",
            *table(list(report["scrapes"].values()), columns, style),
            "",
            *target_lines(report["targets"], style),
            "",
        ]
    )


def plot_events(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw the rates (logarithmic) with every round, and the bytes a fault takes."""
    figure = canvas(height=3.6)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for i, (name, label) in enumerate(_WAYS.items()):
        rates = report["rounds"][name]
        left.barh(i, rates["median"], color=_COLOURS[i])
        left.plot(rates["values"], [i] * len(rates["values"]), "|", color="black")
        left.annotate(f" {label}: {rates['median'] / 1e6:.1f} M/s", (rates["median"], i), va="center", fontsize=9)
    left.set_xscale("log")
    left.set_xlim(1e5, max(report["rounds"][name]["max"] for name in _WAYS) * 30)
    left.set_yticks([])
    left.invert_yaxis()
    left.set_xlabel("events per second, median and rounds")
    by_pattern = report["bytes_per_fault_event_by_pattern"]
    right.bar(list(by_pattern), list(by_pattern.values()), color=_COLOURS[0])
    right.axhline(8, color=_COLOURS[1], linewidth=1)
    right.set_ylabel("bytes a fault on disk")
    return drawn(figure, picture)


def plot_overhead(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw each pair's ratio, by condition and level of detail."""
    conditions: Sequence[Mapping[str, Any]] = report["conditions"]
    figure = canvas(height=4)
    for axes, condition in zip(figure.subplots(1, len(conditions), squeeze=False)[0], conditions, strict=True):
        for i, found in enumerate(condition["details"].values()):
            values = found["ratio"]["values"]
            axes.plot([i] * len(values), values, "o", color=_COLOURS[0], alpha=0.5)
            axes.plot([i - 0.3, i + 0.3], [found["median_ratio"]] * 2, color=_COLOURS[1])
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_xticks(range(len(condition["details"])), list(condition["details"]))
        axes.set_title(f"memory pressure {condition['pressure']}", loc="left", fontsize=10)
        axes.set_ylabel("tokens/s with tracing : without")
    return drawn(figure, picture)


def plot_scrape(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw how long each scrape took, by number of tensors and load."""
    scrapes = report["scrapes"]
    figure = canvas(height=1.4 + 0.45 * len(scrapes))
    axes = figure.subplots()
    for i, found in enumerate(scrapes.values()):
        values = [value * 1e3 for value in found["seconds"]["values"]]
        axes.barh(i, found["seconds"]["median"] * 1e3, color=_COLOURS[0])
        axes.plot(values, [i] * len(values), "|", color="black")
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(scrapes)), [f"{one['tensors']:,} tensors, {one['load']}" for one in scrapes.values()])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a scrape, median and all")
    return drawn(figure, picture)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _millions(name: str) -> Column:
    return Column(name, lambda row: f"{row[name] / 1e6:.2f} M")


def machine_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what the figures were measured on."""
    m = report["machine"]
    return [f"{printable(m['cpu'])}, {m['cores']} cores, kernel {m['kernel']}, Python {m['python']}"]


def target_lines(targets: Mapping[str, Mapping[str, Any]], style: Style) -> list[str]:
    """Return a line for each target: what it is, and where it is met."""
    lines = []
    for name, target in targets.items():
        met = target["met"]
        if isinstance(met, Mapping):
            missed = [condition for condition, good in met.items() if not good]
            verdict = "met" if not missed else f"missed ({', '.join(missed)})"
        else:
            missed, verdict = [] if met else [name], "met" if met else "missed"
        line = f"target {name} {target['limit']}: {verdict}"
        lines.append(style.warn(line) if missed else line)
    return lines
