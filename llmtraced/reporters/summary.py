"""The first look at a trace, on one screen."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.loading import why_unmapped
from llmtraced.reporters import plots
from llmtraced.reporters.reread import headline, tensor_columns
from llmtraced.reporters.text import (
    Column,
    Style,
    bars,
    duration,
    heading,
    indented,
    percent,
    profile,
    several,
    size,
    table,
    trust,
    wrapped,
)
from llmtraced.reporters.tokens import pace

__all__ = ["draw", "render"]

_NAMED: Final = 40  # layers that can each be named beside the picture


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the summary; ``top`` tensors are listed by bytes read and by stall."""
    pairs = [(key, value) for key, value in _facts(report) if value]
    wide = max(len(key) for key, _ in pairs)
    lines = [line for key, value in pairs for line in _fact(key.ljust(wide), value, style)]
    lines += [*trust(report, style), "", *heading(headline(report["reread"]), style)]
    lines += [pace(phase) for phase in report["phases"]] + [""]
    total = report["reread"]["total_bytes_read"]
    narrow = replace(style, width=style.width - 2)
    stalled = sorted(report["top_by_stall"][:top], key=lambda t: -int(t["stall_ns"]))
    read = report["top_by_bytes_read"][:top]
    for title, rows, key in (("most read", read, "bytes_read"), ("most waited for", stalled, "stall_ns")):
        if rows:
            lines += [f"{title}:", *indented(table(rows, tensor_columns(rows, total, key), narrow)), ""]
    components = [row for row in report["components"] if row["bytes_read"] or row["stall_ns"]]
    if components:
        lines += ["by component:", *indented(table(components, _component_columns(components, total), narrow)), ""]
    layers = [row for row in report["layers"] if row["layer"] not in (None, -1)]
    if any(row["bytes_read"] or row["stall_ns"] for row in layers):
        lines.append(f"by layer, {layers[0]['layer']} to {layers[-1]['layer']}:")
        shown: Sequence[tuple[str, str, Callable[[float], str]]] = (
            ("read", "bytes_read", size),
            ("stall", "stall_ns", duration),
        )
        lines += [
            profile(name, layers, key, show, style) for name, key, show in shown if any(row[key] for row in layers)
        ]
    return "\n".join(lines).rstrip() + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every layer is drawn
    """Draw, per layer, the bytes read once and again, and beside them the time that threads waited for it."""
    layers = [row for row in report["layers"] if row["bytes_read"] or row["stall_ns"]]
    step = -(-len(layers) // _NAMED) or 1
    outside = [row["layer"] in (None, -1) for row in layers]
    names = [
        "outside layers" if out else "" if row["layer"] % step or (step > 1 and not row["layer"]) else str(row["layer"])
        for row, out in zip(layers, outside, strict=True)
    ]
    figure = plots.canvas(height=1.8 + 0.2 * min(max(len(layers), 8), _NAMED))
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = plots.unit([row["bytes_read"] for row in layers])
    plots.stacked(left, names, layers, scale)
    left.set_xlabel(f"{unit} read from disk")
    left.set_ylabel("layer")
    left.set_title(plots.title(report, "by layer"), loc="left", fontsize=10)
    scale, unit = plots.unit([row["stall_ns"] for row in layers], plots.TIMES)
    right.barh(range(len(layers)), [row["stall_ns"] / scale for row in layers], color=plots.STALL)
    right.set_xlabel(f"{unit} waited in page faults, all threads")
    if layers:
        plots.legend(right, left)
    return plots.drawn(figure, picture)


def _fact(key: str, value: str, style: Style) -> list[str]:
    """Return a key and its value, which goes on below itself."""
    margin = " " * (len(key) + 2)
    first, *others = wrapped(value, style, margin, margin)
    return [f"{style.bold(key)}{first[len(key) :]}", *others]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    faults, away = report["faults"], report["unbacked"]
    moved = {
        key: ", ".join(f"{printable(name)} {size(n)}" for name, n in report[f"bytes_by_{key}"].items())
        for key in ("cause", "process")
    }
    command = report["command"] or "?"
    command = command if isinstance(command, str) else shlex.join(str(word) for word in command)
    models = [f"{printable(str(model.get('model')))} ({size(model.get('size_bytes'))})" for model in report["models"]]
    recorded = f"{report['started'] or '?'}, {duration(report['duration_ns'])}, detail {report['detail']}"
    return [
        ("model", ", ".join(models)),
        ("process", f"{printable(command)} (pid {report['pid']}), session {printable(report['session'])}"),
        ("memory limit", size(report["cgroup_limit_bytes"]) if report["cgroup_limit_bytes"] else ""),
        ("kernel", printable(str(report["kernel"] or ""))),
        ("recorded", printable(recorded)),
        ("phase", report["phase"] or ""),
        (
            "page faults",
            f"{faults['major']:,} major, {faults['minor']:,} minor"
            + (f", {faults['unknown']:,} of unknown outcome" if faults["unknown"] else "")
            + f"; threads waited {duration(faults['stall_ns'])} in them",
        ),
        ("read for", moved["cause"]),
        ("read by", moved["process"]),
        ("evicted", size(report["evicted_bytes"])),
        ("not mapped", f"{several(away['count'], 'tensor')}, {size(away['size_bytes'])}" if away["count"] else ""),
        ("not traced", "; ".join(why_unmapped(model, report["load_mode"]) for model in report["unmapped"])),
    ]


def _component_columns(rows: Sequence[Mapping[str, Any]], total: int) -> list[Column]:
    return [
        Column("component", lambda row: printable(str(row["component"] or "?")), name=True),
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("share", lambda row: percent(row["bytes_read"], total), spare=True),
        bars(rows, "bytes_read"),
        Column("major", lambda row: f"{row['major_faults']:,}"),
        Column("stall", lambda row: duration(row["stall_ns"])),
    ]
