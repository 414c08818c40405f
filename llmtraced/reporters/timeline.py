"""In which order the file was read: shares by phase, over time, and a map of what was read when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np

from llmtraced.analysis.timeline import CLASSES, COLUMNS, RESUMED
from llmtraced.reporters import plots
from llmtraced.reporters.grid import Floats, chunks, grid, merged, offsets
from llmtraced.reporters.heatmap import offset_ticks
from llmtraced.reporters.text import Column, Style, duration, heading, percent, several, size, table, trust, wrapped

__all__ = ["draw", "render"]

_HEIGHTS: Final = " ▁▂▃▄▅▆▇█"
_COLOURS: Final = (plots.ONCE, "#9ecae9", plots.STALL, "#9b3f87")
_SHADED: Final = {"prompt": plots.PROMPT, "load": "#c98a2b30"}


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the timeline; the map of what was read when takes about ``top`` lines."""
    lines = [*heading(_headline(report), style), *trust(report, style), ""]
    if not report["total"]["count"]:
        return "\n".join(lines).rstrip() + "\n"
    rows = [
        {"phase": phase["phase"] if weight == "byte" else "", "weight": weight, **phase}
        for phase in report["phases"]
        for weight in ("byte", "count")
    ]
    lines += [*table(rows, _COLUMNS, style), ""]
    if report["total"]["resumed_count"]:
        lines += [*wrapped(_resumed(report["total"]), style), ""]
    spans = offsets(report["map"]["rows"], top)[::-1]
    margin = max(len("sequential"), *(len(label) for label, *_ in spans))
    room = max(style.width - margin - 1, 10)
    sums = _sums(report["bins"], "bytes")
    cuts = chunks(len(sums), room)
    whole = merged(sums, cuts, 0)
    shares = whole / np.maximum(whole.sum(axis=1, keepdims=True), 1)
    for i, name in enumerate(CLASSES):
        blocks = "".join(_HEIGHTS[int(np.ceil(share * 8 - 1e-9))] for share in shares[:, i])
        lines.append(f"{name.replace('_', ' ').rjust(margin)} {blocks}".rstrip())
    matrix = _cells(report, "bytes")
    padded = np.zeros((matrix.shape[0], len(sums) * COLUMNS))
    padded[:, : matrix.shape[1]] = matrix
    cells = merged(merged(padded, [(a * COLUMNS, b * COLUMNS) for a, b in cuts], 1), _ordered(spans), 0)[::-1]
    long = report["map"]["column_ns"] * COLUMNS / 1e9
    rate = cells / (np.array([b - a for a, b in cuts]) * long)
    ends = report["bins"][-1]["last_ns"] + 1 - report["bins"][0]["first_ns"]
    lines += grid([label.rjust(margin) for label, *_ in spans], rate, ["0 s", "", duration(ends)], _rate, style)
    caption = "above: share of the bytes in each class; below: bytes read per second, by offset in the file"
    lines += wrapped(caption, style)
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - all of it is drawn
    """Draw what was read when, in the colour of its token, above the share of each class, by bytes."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure = plots.canvas(height=7.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lower.set_xlabel("seconds since the first read")
    lower.set_ylabel("share of the bytes")
    lower.set_ylim(0, 1)
    bins, chart = report["bins"], report["map"]
    if bins:
        start = bins[0]["first_ns"]
        end = (bins[-1]["last_ns"] + 1 - start) / 1e9
        _shade(upper, bins)
        token = np.ma.masked_less(_cells(report, "token", -1), 0)
        width = chart["columns"] * chart["column_ns"] / 1e9
        image = upper.imshow(
            token,
            aspect="auto",
            cmap=ListedColormap(colormaps["viridis"](np.linspace(0.2, 0.92, 256))),  # its ends vanish in the page
            interpolation="nearest",
            origin="lower",
            extent=(0, width, -0.5, len(chart["rows"]) - 0.5),
        )
        figure.colorbar(image, ax=upper, pad=0.01, fraction=0.03, aspect=50).set_label("token (graph evaluation)")
        offset_ticks(upper, chart["rows"])
        sums = _sums(bins, "bytes")
        shares = np.cumsum(sums, axis=1) / np.maximum(sums.sum(axis=1, keepdims=True), 1)
        edges = [*((row["first_ns"] - start) / 1e9 for row in bins), end]
        low = np.zeros(len(bins))
        for i, name in enumerate(CLASSES):
            lower.fill_between(
                edges,
                [*low, low[-1]],
                [*shares[:, i], shares[-1, i]],
                step="post",
                color=_COLOURS[i],
                label=name.replace("_", " "),
                linewidth=0,
            )
            low = shares[:, i]
        lower.set_xlim(0, end)
        lower.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)
        if upper.get_legend_handles_labels()[0]:
            plots.legend(upper)
    else:
        upper.set_yticks([])
        upper.set_ylabel("offset in the file")
    upper.set_title(plots.title(report, f"{size(report['total']['bytes'])} read"), loc="left", fontsize=10)
    return plots.drawn(figure, picture)


def _headline(report: Mapping[str, Any]) -> str:
    """Return the answer: how much follows on, and how long a stretch is."""
    if not report["total"]["count"]:
        return "nothing was read from disk"
    main = max(report["phases"], key=lambda phase: phase["bytes"])
    return (
        f"{main['phase']}: {size(main['stretch_bytes'])} at a stretch on average, {several(main['jumps'], 'jump')}; "
        f"{main['sequential_byte_share']:.1%} of the bytes come right behind those before"
    )


def _resumed(total: Mapping[str, Any]) -> str:
    """Say how much only looks like a jump because several readers take turns."""
    jumps, read = (percent(total[f"resumed_{a}"], total[b]) for a, b in (("count", "jumps"), ("bytes", "bytes")))
    return (
        f"{jumps} of the jumps ({read} of the bytes) go on where one of the {RESUMED} stretches before ended, "
        "as they do when several readers take turns"
    )


def _shade(axes: Any, bins: Sequence[Mapping[str, Any]]) -> None:
    """Shade the bins that begin in a prompt, or while loading."""
    start, named = bins[0]["first_ns"], set()
    for phase, run in groupby(bins, key=lambda row: row["phase"]):
        some = list(run)
        if phase in _SHADED:
            first, last = (some[0]["first_ns"] - start) / 1e9, (some[-1]["last_ns"] + 1 - start) / 1e9
            label = None if phase in named else phase
            axes.axvspan(first, last, color=_SHADED[phase], zorder=-1, linewidth=0, label=label)
            named.add(phase)


def _sums(bins: Sequence[Mapping[str, Any]], weight: str) -> Floats:
    return np.array([[row[f"{name}_{weight}"] for name in CLASSES] for row in bins], np.float64)


def _cells(report: Mapping[str, Any], what: str, empty: float = 0) -> Floats:
    """Return the map as a matrix, file offsets by time."""
    chart = report["map"]
    matrix = np.full((len(chart["rows"]), chart["columns"]), empty, np.float64)
    matrix[chart["cells"]["row"], chart["cells"]["column"]] = chart["cells"][what]
    return matrix


def _ordered(spans: Sequence[tuple[str, int, int]]) -> list[tuple[int, int]]:
    return sorted((first, end) for _, first, end in spans)


def _rate(value: float) -> str:
    return f"{size(value)}/s"


def _share(name: str) -> Column:
    return Column(name.replace("_", " "), lambda row: f"{row[name + '_' + row['weight'] + '_share']:.2%}")


_COLUMNS: Final = (
    Column("phase", lambda row: row["phase"], name=True),
    Column("", lambda row: f"{size(row['bytes'])} read" if row["weight"] == "byte" else several(row["count"], "add")),
    *(_share(name) for name in CLASSES),
    Column("jumps", lambda row: f"{row['jumps']:,}" if row["weight"] == "byte" else "", spare=True),
    Column("stretch", lambda row: size(row["stretch_bytes"]) if row["weight"] == "byte" else "", spare=True),
)
