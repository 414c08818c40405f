"""A dashboard as a picture, from a live Prometheus: the same panels and queries as Grafana's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from llmtraced.errors import LlmtracedError, printable
from llmtraced.monitoring.panels import Dashboard, Panel, concrete
from llmtraced.monitoring.prometheus import Prometheus, Series
from llmtraced.reporters import plots

__all__ = ["Drawn", "draw", "fetch"]

_POINTS: Final = 240  # of a line
_LEAST_STEP: Final = 1.0
_COLUMNS: Final = 2
_ROW_INCHES: Final = 2.6
_NAME_LETTERS: Final = 50
_BAR: Final = "#a6cee3"  # names are written on it
_COUNTS: Final = (("thousand", 1e3), ("", 1.0))
_UNITS: Final = {
    "bytes": ((*plots.BYTES, ("bytes", 1.0)), "{}"),
    "Bps": ((*plots.BYTES, ("bytes", 1.0)), "{} per second"),
    "cps": (_COUNTS, "{} per second"),
    "tokens": (_COUNTS, "{} tokens per second"),
    "percentunit": ((("%", 0.01),), "{}"),
    "s": ((("seconds", 1.0), ("milliseconds", 1e-3)), "{}"),
    "short": (_COUNTS, "{}"),
}
"""Grafana's unit → scales of it, and the axis's label around a scale's name."""

Drawn = list[tuple[Panel, list[tuple[str, Series]]]]
"""Panels with the series of their queries, named."""


def fetch(
    dashboard: Dashboard, prometheus: Prometheus, start: float, end: float, window: str, model: str = ".*"
) -> Drawn:
    """Return what a dashboard shows from ``start`` to ``end`` (seconds since 1970).

    Args:
        dashboard: which.
        prometheus: whom to ask.
        start: of the lines.
        end: of the lines; bars are as of then.
        window: over which rates are taken, as PromQL writes it: ``30s``.
        model: regular expression of the models to show.

    Raises:
        LlmtracedError: no answer, an error, or it knows nothing at all of llmtraced.
    """
    step = max((end - start) / _POINTS, _LEAST_STEP)
    drawn: Drawn = []
    for panel in dashboard.panels:
        named: list[tuple[str, Series]] = []
        for query in panel.queries:
            expr = concrete(query.expr, window, model)
            bars = panel.kind == "bargauge"
            found = prometheus.instant(expr, end) if bars else prometheus.range(expr, start, end, step)
            named += [(_legend(query.legend, series), series) for series in found]
        drawn.append((panel, named))
    if not any(named for _, named in drawn):
        raise LlmtracedError("Prometheus has no data of llmtraced in that time: does it scrape a daemon?")
    return drawn


def _legend(legend: str, series: Series) -> str:
    filled = re.sub(r"\{\{(\w+)\}\}", lambda found: series.labels.get(found[1], ""), legend)
    return printable(" ".join(filled.split())) or "all"


def draw(dashboard: Dashboard, drawn: Drawn, start: float, end: float, picture: str) -> bytes:
    """Return the picture of a dashboard.

    Args:
        dashboard: whose title it is.
        drawn: of :func:`fetch`.
        start: seconds since 1970, as fetched.
        end: likewise.
        picture: ``png`` or ``svg``.
    """
    rows = -(-len(drawn) // _COLUMNS)
    figure = plots.canvas(_ROW_INCHES * rows)
    at = datetime.fromtimestamp(end).astimezone()
    figure.suptitle(f"{dashboard.title}, {(end - start) / 60:.3g} minutes to {at:%Y-%m-%d %H:%M %Z}", fontsize=12)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes, (panel, named) in zip(grid, drawn, strict=False):
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        units, label = _UNITS[panel.unit]
        scale, name = plots.unit([value for _, one in named for value in one.values], units)
        label = " ".join(label.format(name).split()) or "count"
        if not named:
            axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="#555555")
            axes.set_xticks([])
            axes.set_yticks([])
        elif panel.kind == "bargauge":
            _bars(axes, named, scale, label)
        else:
            _lines(axes, panel, named, scale, start)
            axes.set_xlim(0, (end - start) / 60)
            axes.set_xlabel("minutes", fontsize=8)
            axes.set_ylabel(label, fontsize=8)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return plots.drawn(figure, picture)


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"


def _bars(axes: Any, named: Sequence[tuple[str, Series]], scale: float, label: str) -> None:
    axes.barh(range(len(named)), [one.values[0] / scale for _, one in named], color=_BAR)
    axes.set_yticks(range(len(named)), [_short(name) for name, _ in named], fontsize=7, ha="left", x=0.02)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label, fontsize=8)


def _lines(axes: Any, panel: Panel, named: Sequence[tuple[str, Series]], scale: float, start: float) -> None:
    colours = plots.SERIES
    if panel.stacked:
        # Series begin and end at different times: those without a value add nothing.
        times = sorted({at for _, one in named for at in one.times})
        known = [dict(zip(one.times, one.values, strict=True)) for _, one in named]
        heights = [[values.get(at, 0.0) / scale for at in times] for values in known]
        order = sorted((i for i, row in enumerate(heights) if any(row)), key=lambda i: -sum(heights[i]))
        stack = [(_short(named[i][0]), heights[i]) for i in order[: len(colours)]]
        rest = [heights[i] for i in order[len(colours) :]]
        shades = colours[: len(stack)]
        if rest:
            stack.append((f"{len(rest)} more", [sum(values) for values in zip(*rest, strict=True)]))
            shades = (*shades, plots.REST)
        if stack:
            minutes = [(at - start) / 60 for at in times]
            names, rows = [name for name, _ in stack], [row for _, row in stack]
            axes.stackplot(minutes, rows, labels=names, colors=shades, linewidth=0)
    else:
        for i, (name, one) in enumerate(named):
            style = ("-", "--", ":")[i // len(colours) % 3]
            minutes = [(at - start) / 60 for at in one.times]
            values = [value / scale for value in one.values]
            axes.plot(minutes, values, style, color=colours[i % len(colours)], label=_short(name), linewidth=1.3)
    top = 100 if panel.unit == "percentunit" else None
    axes.set_ylim(0, top * 1.02 if top else max(axes.get_ylim()[1], 1e-9))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none", ncols=2 if len(named) > 4 else 1)
