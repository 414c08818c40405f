"""What each layer, and each component, was read and waited for: tables, and bars in the order of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    bar,
    duration,
    heading,
    percent,
    several,
    size,
    table,
    trust,
)

__all__ = ["draw", "render"]

_TICKS: Final = 26
_STEPS: Final = (1, 2, 5, 10, 20, 50, 100)  # layers from one number below the bars to the next


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the report by layer or component: the ``top`` most read, layers in the order of the model."""
    by = report["by"]
    rows = [row for row in report[f"{by}s"] if row["bytes_read"] or row["access_count"]]
    ranked = sorted(rows, key=lambda row: (-row["bytes_read"], -row["stall_ns"]))
    listed = {_key(row, by) for row in ranked[:top]}
    shown, rest = [row for row in rows if _key(row, by) in listed], ranked[top:]
    lines = [*heading(_headline(report, rows), style), *trust(report, style), ""]
    if shown:
        lines += table(shown, _columns(shown, report), style)
    if rest:
        read, stall = (sum(row[key] for row in rest) for key in ("bytes_read", "stall_ns"))
        lines.append(f"… {several(len(rest), f'more {by}')}, {size(read)} read, {duration(stall)} (--top N for more)")
    if report["other_bytes_read"]:
        lines.append(f"outside tensors (header, padding): {size(report['other_bytes_read'])} read")
    away = sum(row["unbacked_bytes"] for row in report[f"{by}s"])
    if away:
        lines.append(f"not used from the mapped file, so its use is not visible here: {size(away)}")
    unsized = sum(row["unsized_ops"] or 0 for row in rows)
    if unsized:
        lines.append(f"accessed is without {several(unsized, 'operator')} whose experts are not known")
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 25) -> bytes:
    """Draw bytes read (once and again), time waited, and time in operators: every layer, or the ``top`` components."""
    by = report["by"]
    rows = report[f"{by}s"][:top] if by == "component" else report[f"{by}s"]
    timed = any(row["op_ns"] for row in rows)
    across = by == "component"  # long names: bars to the right; layers are many: bars upwards
    figure = plots.canvas(height=1.6 + 0.26 * max(len(rows), 4) if across else 6 + 1.5 * timed)
    shape = (1, 2 + timed) if across else (2 + timed, 1)
    panels = list(figure.subplots(*shape, sharex=not across, sharey=across))
    scale, unit = plots.unit([row["bytes_read"] for row in rows])
    once = [(row["bytes_read"] - row["reread_bytes"]) / scale for row in rows]
    again = [row["reread_bytes"] / scale for row in rows]
    _bars(panels[0], once, None, plots.ONCE, across, "read once")
    _bars(panels[0], again, once, plots.AGAIN, across, "read again")
    _say(panels[0], across, f"{unit} read from disk")
    times = [("stall_ns", plots.STALL, "waited in page faults, all threads")]
    times += [("op_ns", plots.REST, "in operators, one thread")] if timed else []
    for panel, (key, colour, what) in zip(panels[1:], times, strict=True):
        scale, unit = plots.unit([row[key] for row in rows], plots.TIMES)
        _bars(panel, [row[key] / scale for row in rows], None, colour, across, what)
        _say(panel, across, f"{unit} {what}")
    if across:
        panels[0].set_yticks(range(len(rows)), [_name(row, report, by) for row in rows], fontsize=8)
        panels[0].set_ylim(max(len(rows), 1) - 0.4, -0.6)
    else:
        _layer_axis(panels, rows)
    plots.legend(panels[0])
    what = f"{size(report['total_bytes_read'])} read in all, by {by}"
    figure.suptitle(plots.title(report, what), x=0.01, ha="left", fontsize=10)
    return plots.drawn(figure, picture)


def _layer_axis(panels: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Number the layers below the last panel; where there are several models, one follows the other."""
    every = next(step for step in _STEPS if step * _TICKS >= len(rows) or step == _STEPS[-1])
    at = [i for i, row in enumerate(rows) if row["layer"] in (None, -1) or row["layer"] % every == 0]
    panels[-1].set_xticks(at, ["-" if rows[i]["layer"] in (None, -1) else str(rows[i]["layer"]) for i in at])
    panels[-1].set_xlim(-0.6, max(len(rows), 1) - 0.4)
    starts = [i for i in range(len(rows)) if i == 0 or rows[i]["model"] != rows[i - 1]["model"]]
    models = "".join(f"  |  {printable(str(rows[i]['model']), 30)}" for i in starts) if len(starts) > 1 else ""
    outside = " (-: outside the layers)" if any(row["layer"] in (None, -1) for row in rows) else ""
    panels[-1].set_xlabel(f"layer{outside}{models}")
    for panel in panels:
        for start in starts[1:]:
            panel.axvline(start - 0.5, color="#000000", linewidth=0.8)


def _headline(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "nothing was read from disk, and no access was seen"
    by, parts = report["by"], []
    for key, what, total, show in (
        ("bytes_read", "read most", report["total_bytes_read"], size),
        ("stall_ns", "waited for most", report["stall_ns"], duration),
    ):
        if total:
            most = max(rows, key=lambda row: row[key])
            name = _name(most, report, by)
            name = ("what is outside the layers" if name == "-" else f"layer {name}") if by == "layer" else name
            parts.append(f"{what}: {name}, {show(most[key])} ({percent(most[key], total)})")
    return "; ".join(parts) or f"nothing was read from disk; {several(len(rows), by)} with accesses"


def _columns(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[Column]:
    by, total, stall = report["by"], report["total_bytes_read"], report["stall_ns"]
    name = Column(by, lambda row: _name(row, report, by), name=True)
    most = max((row["bytes_read"] for row in rows), default=0) or 1
    longest = max((row["stall_ns"] for row in rows), default=0) or 1
    ops = [
        Column("accessed", lambda row: size(row["bytes_accessed"]), spare=True),
        Column("op time", lambda row: duration(row["op_ns"])),
    ]
    return [
        name,
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("share", lambda row: percent(row["bytes_read"], total)),
        Column("", lambda row: bar(row["bytes_read"] / most, 8), name=True, spare=True),
        Column("evicted", lambda row: size(row["evicted_bytes"]), spare=True),
        Column("accesses", lambda row: f"{row['access_count']:,}", spare=True),
        Column("major", lambda row: f"{row['major_faults']:,}"),
        Column("minor", lambda row: f"{row['minor_faults']:,}", spare=True),
        Column("stall", lambda row: duration(row["stall_ns"])),
        Column("share", lambda row: percent(row["stall_ns"], stall), spare=True),
        Column("", lambda row: bar(row["stall_ns"] / longest, 8), name=True, spare=True),
        *(ops if any(row["op_ns"] is not None for row in rows) else []),
    ]


def _key(row: Mapping[str, Any], by: str) -> tuple[Any, Any]:
    return row["model"], row[by]


def _name(row: Mapping[str, Any], report: Mapping[str, Any], by: str) -> str:
    """Return the layer or component; with its model where there are several."""
    value = row[by]
    name = "?" if value is None else "-" if value == -1 else printable(str(value), 40)
    return name if len(report["models"]) < 2 else f"{name} of {printable(str(row['model']), 24)}"


def _bars(
    axes: Any, values: Sequence[float], after: Sequence[float] | None, colour: str, across: bool, label: str
) -> None:
    at = range(len(values))
    if across:
        axes.barh(at, values, left=after, color=colour, label=label)
    else:
        axes.bar(at, values, bottom=after, color=colour, label=label, width=0.85)


def _say(axes: Any, across: bool, what: str) -> None:
    if across:
        axes.set_xlabel(what, fontsize=9)
        axes.set_xlim(left=0)
    else:
        axes.set_ylabel(what.replace(" ", "\n", 1).replace(", ", ",\n"), fontsize=9)
        axes.set_ylim(bottom=0)
