"""What other amounts of RAM and other policies would do: a table, and curves of bytes and time per token over RAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.reporters import plots
from llmtraced.reporters.text import Column, Style, duration, heading, several, size, table, three, trust, wrapped

__all__ = ["draw", "render"]

_LABELS: Final = (
    ("lru", plots.SERIES[0], "-", "the kernel as it is"),
    ("pin", plots.SERIES[1], "--", "pinned, the rest by faults"),
    ("pin+stream", plots.SERIES[2], "-.", "pinned, the rest read ahead"),
    ("belady", plots.SERIES[3], ":", "the best possible"),
)


def render(report: Mapping[str, Any], style: Style) -> str:
    """Return the figures that predictions are made from, what the trace had, and a row for each RAM size."""
    lines = [*heading(_headline(report), style), *trust(report, style)]
    for words in _basis(report):
        lines += wrapped(words, style)
    rows = [{**row, **{one["policy"]: one for one in row["policies"]}} for row in report["curve"]]
    lines += ["", "bytes read per token", *table(rows, _BYTES, style)]
    lines += ["", "predicted time per token and tokens/s", *table(rows, _TIMES, style)]
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw bytes read and time per token over RAM, with what the trace had as a point."""
    figure = plots.canvas(height=7)
    above, below = figure.subplots(2, 1, sharex=True)
    curve, measured = report["curve"], report["measured"]
    across, width = plots.unit([row["ram_bytes"] for row in curve])
    at = [row["ram_bytes"] / across for row in curve]
    by = [{one["policy"]: one for one in row["policies"]} for row in curve]
    up, unit = plots.unit([measured["bytes_per_token"], *(row["lru"]["bytes_high"] for row in by)])
    known = [row["ns_per_token"] for one in by for row in one.values() if row["ns_per_token"] is not None]
    ns, time = plots.unit([measured["ns_per_token"], *known], plots.TIMES)
    low, high = ([row["lru"][key] / up for row in by] for key in ("bytes_low", "bytes_high"))
    above.fill_between(at, low, high, color=plots.SERIES[0], alpha=0.2, linewidth=0)
    for policy, colour, line, label in _LABELS:
        above.plot(at, [row[policy]["bytes_per_token"] / up for row in by], color=colour, linestyle=line, label=label)
        times = [row[policy]["ns_per_token"] for row in by]
        if None not in times:
            below.plot(at, [value / ns for value in times], color=colour, linestyle=line)
    bounds = [row["bound_ns_per_token"] for row in curve]
    if None not in bounds:
        below.plot(at, [value / ns for value in bounds], color=plots.REST, label="the bound: no window")
    if measured["ram_bytes"] is not None:
        x = measured["ram_bytes"] / across
        above.plot(x, measured["bytes_per_token"] / up, "o", color="#000000", label="measured in the trace")
        below.plot(x, measured["ns_per_token"] / ns, "o", color="#000000")
    above.set_ylabel(f"{unit} read per token")
    below.set_ylabel(f"{time} per token")
    below.set_xlabel(f"{width} of RAM for the model's pages; what else the server needs comes on top")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
    above.set_title(plots.title(report, "simulated, over RAM"), loc="left", fontsize=10)
    handles, labels = above.get_legend_handles_labels()
    more = below.get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return plots.drawn(figure, picture)


def _headline(report: Mapping[str, Any]) -> str:
    used, total = report["bytes_used_per_token"], report["usable_bytes"]
    return f"each token uses {size(used)} of {size(total)}; simulated with {several(len(report['curve']), 'RAM size')}"


def _basis(report: Mapping[str, Any]) -> list[str]:
    measured, disk, cost = report["measured"], report["disk_bytes_per_second"], report["stall_ns_per_byte"]
    of = several(measured["tokens"], f"{report['judged_phase'] or ''} token".strip())
    source = {"given": "as given", "trace": "the most in 100 ms of the trace", "bench": "as measured", None: ""}[
        report["disk_source"]
    ]
    had = f" with {size(measured['ram_bytes'])} of RAM at least" if measured["ram_bytes"] is not None else ""
    lines = [
        f"measured: {size(measured['bytes_per_token'])} read and {duration(measured['ns_per_token'])} per token{had} "
        f"({of})",
        f"computing takes {duration(report['compute_ns_per_token'])} per token; "
        + ("no stall to learn from" if cost is None else f"{duration(cost * 1e6)} of stall per MB read"),
        "the disk's speed is not known: --disk-bandwidth" if disk is None else f"disk: {size(disk)}/s, {source}",
    ]
    if report["exposed_share"]:
        lines.append(f"reading ahead leaves {report['exposed_share']:.0%} of the computing exposed, as measured")
    if report["uses_source"] != "ops":
        lines.append("assumed: each token uses all weights once, in file order (the trace has no operators)")
    return lines


def _spread(row: Mapping[str, Any]) -> str:
    one = row["lru"]
    return f"{size(one['bytes_low'])} to {size(one['bytes_high'])}" if one["bytes_high"] else "-"


def _bytes(policy: str) -> Column:
    return Column(policy, lambda row: size(row[policy]["bytes_per_token"]))


def _pace(policy: str) -> Column:
    def show(row: Mapping[str, Any]) -> str:
        one = row[policy]
        rate = one["tokens_per_second"]
        return "-" if rate is None else f"{duration(one['ns_per_token'])} {three(rate):>5}"

    return Column(policy, show)


_RAM: Final = (
    Column("RAM", lambda row: size(row["ram_bytes"])),
    Column("of all", lambda row: f"{row['ram_share']:.0%}"),
)
_BYTES: Final = (
    *_RAM,
    *(_bytes(policy) for policy in ("lru", "pin", "pin+stream", "belady")),
    Column("lru's range", _spread, spare=True),
)
_TIMES: Final = (
    *_RAM,
    *(_pace(policy) for policy in ("lru", "pin", "pin+stream", "belady")),
    Column("bound", lambda row: duration(row["bound_ns_per_token"]), spare=True),
)
