"""How often each tensor was read, as a table and as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    bars,
    duration,
    heading,
    percent,
    profile,
    several,
    size,
    table,
    tensor_names,
    trust,
    wrapped,
)

__all__ = ["draw", "headline", "render", "tensor_columns"]


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the re-read report; ``top`` tensors are listed, the rest is summed up in a line."""
    tensors = [tensor for tensor in report["tensors"] if tensor["bytes_read"] or tensor["access_count"]]
    shown, rest = tensors[:top], tensors[top:]
    lines = [*heading(headline(report), style), *trust(report, style)]
    if report["away_ns"]:
        away, tokens = report["away_ns"], report["away_tokens"]
        lines += wrapped(
            f"{size(report['returned_bytes'])} came back after an eviction that was seen: half of it within "
            f"{duration(away['p50'])} ({several(tokens['p50'], 'token')}), 90% within {duration(away['p90'])} "
            f"({several(tokens['p90'], 'token')})",
            style,
        )
    lines.append("")
    if shown:
        lines += table(shown, tensor_columns(shown, report["total_bytes_read"], "bytes_read"), style)
    if rest:
        read = size(sum(tensor["bytes_read"] for tensor in rest))
        lines.append(f"… {several(len(rest), 'more tensor')}, {read} read (--top N for more)")
    if report["other_bytes_read"]:
        lines.append(f"outside tensors (header, padding): {size(report['other_bytes_read'])} read")
    unread = [t for t in report["tensors"] if not t["bytes_read"] and t["backed"] is not False]
    away = [t for t in report["tensors"] if t["backed"] is False]
    if unread:
        lines.append(f"not read from disk: {several(len(unread), 'tensor')}, {_total(unread)}")
    if away:
        lines.append(
            f"not used from the mapped file, so not visible here: {several(len(away), 'tensor')}, {_total(away)}"
        )
    return "\n".join([*lines, *_groups(report, top, style)]) + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 25) -> bytes:
    """Draw the ``top`` most read tensors as bars: bytes read once and bytes read again."""
    tensors = [tensor for tensor in report["tensors"] if tensor["bytes_read"]][:top]
    figure = plots.canvas(height=1.6 + 0.26 * max(len(tensors), 4))
    axes = figure.subplots()
    scale, unit = plots.unit([tensor["bytes_read"] for tensor in tensors])
    names = [printable(str(tensor["tensor_name"]), 48) for tensor in tensors]
    plots.stacked(axes, names, tensors, scale)
    axes.set_xlabel(f"{unit} read from disk")
    what = f"{size(report['total_bytes_read'])} read in all; the {len(tensors)} most read tensors"
    axes.set_title(plots.title(report, what), loc="left", fontsize=10)
    if tensors:
        plots.legend(axes)
    return plots.drawn(figure, picture)


def headline(report: Mapping[str, Any]) -> str:
    """Return one line: what was read, once and again."""
    if not report["total_bytes_read"]:
        return "nothing was read from disk"
    return (
        f"{size(report['total_bytes_read'])} read from disk: {size(report['unique_bytes'])} once, "
        f"{size(report['reread_bytes'])} again; each byte {report['amplification']:.2f} times on average"
    )


def tensor_columns(rows: Sequence[Mapping[str, Any]], total: int, key: str) -> list[Column]:
    """Return a tensor table's columns, with bars for ``key``; ``share`` is the share of the ``total`` bytes read."""
    return [
        *tensor_names(rows),
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("times", lambda row: f"{row['bytes_read'] / row['size_bytes']:.1f}" if row["size_bytes"] else "-"),
        Column("share", lambda row: percent(row["bytes_read"], total), spare=True),
        Column("back after", lambda row: duration(row["away_ns"] and row["away_ns"]["p50"]), spare=True),
        *([bars(rows, key)] if key == "bytes_read" else []),
        Column("major", lambda row: f"{row['major_faults']:,}"),
        Column("minor", lambda row: f"{row['minor_faults']:,}", spare=True),
        Column("stall", lambda row: duration(row["stall_ns"])),
        *([bars(rows, key)] if key == "stall_ns" else []),
    ]


def _groups(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    """Return the components, most read first, and how often layers and experts were read."""
    components = sorted((row for row in report["components"] if row["bytes_read"]), key=lambda row: -row["bytes_read"])
    lines = ["", *table(components[:top], _component_columns(components[:top]), style)] if components else []
    layers = [_per_byte(row) for row in report["layers"] if row["layer"] is not None and row["layer"] >= 0]
    if any(row["times"] for row in layers):
        lines += ["", style.bold("read, times its size, by layer"), profile("layer", layers, "times", _times, style)]
    experts = sorted((_per_byte(row) for row in report["experts"]), key=lambda row: -row["times"])
    if experts and experts[0]["times"]:
        ends = ", ".join(
            f"{_times(row['times'])} times layer {row['layer']} expert {row['expert']}" for row in experts[:3]
        )
        middle = _times(experts[len(experts) // 2]["times"])
        what = f"of {several(len(experts), 'expert')}, the middle one was read {middle} times; most: {ends}"
        lines += wrapped(what, style)
    return lines


def _per_byte(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "times": row["bytes_read"] / row["size_bytes"] if row["size_bytes"] else 0.0}


def _times(value: float) -> str:
    return f"{value:.1f}"


def _component_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    return [
        Column("component", lambda row: printable(str(row["component"])), name=True),
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("times", lambda row: _times(_per_byte(row)["times"])),
        bars(rows, "bytes_read"),
    ]


def _total(tensors: Sequence[Mapping[str, Any]]) -> str:
    return size(sum(tensor["size_bytes"] or 0 for tensor in tensors))
