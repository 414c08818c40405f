"""The heatmap in a terminal, in shades or colours, and as a picture."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.grid import Floats, chunks, grid, merged, offsets, scale, stripes
from llmtraced.reporters.text import Style, duration, heading, several, size, three, trust, wrapped

__all__ = ["draw", "offset_ticks", "render"]

_WHAT: Final = {"bytes": "read from disk", "stall": "waited in page faults, all threads", "accesses": "accesses"}
_STRETCH: Final = 6  # columns of the terminal to a column of the matrix, at most
_NAMED: Final = 60  # tensors that can each be named beside a picture
_TICKS: Final = 45
_ROWS: Final = 480  # of a picture: more cannot be told apart, and would be drawn by chance or not at all


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the heatmap in at most about ``top`` lines: tensors, layers or stretches of the file are joined to fit."""
    lines = [*heading(_headline(report), style), *trust(report, style), ""]
    rows, columns = report["rows"], report["columns"]
    if not rows or not columns:
        return "\n".join(lines).rstrip() + "\n"
    by_token = report["by"] == "token"
    spans = _lines(rows, top) if by_token else offsets(rows, top)[::-1]
    labels = [label for label, *_ in spans]
    values = merged(_matrix(report), [(first, end) for _, first, end in sorted(spans, key=lambda s: s[1])], 0)
    values = values if by_token else values[::-1]
    room = max(style.width - max(map(len, labels)) - 1, 10)
    cuts = chunks(len(columns), room)
    if by_token and columns[0]["last_token"] == 0 and len(columns) > room:  # what is before the tokens stays apart
        cuts = [(0, 1), *((first + 1, end + 1) for first, end in chunks(len(columns) - 1, room - 1))]
    span = _spans(report)
    cells = merged(values, cuts, 1) / merged(span[None, :], cuts, 1)
    cells = np.repeat(cells, min(max(room // len(cuts), 1), _STRETCH), axis=1)
    lines += grid(labels, cells, _below(report), _show(report), style)
    joined = "" if not by_token or len(spans) == len(rows) else "layers at the left; "
    lines += wrapped(f"{joined}a cell: {_cell(report)}; blank: nothing", style)
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every row is drawn
    """Draw every row and column, on a colour scale linear or logarithmic (:func:`llmtraced.reporters.grid.scale`)."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, NullLocator

    rows, columns = report["rows"], report["columns"]
    by_token = report["by"] == "token"
    figure = plots.canvas(height=min(max(2.2 + 0.13 * len(rows), 4), 10) if by_token else 6)
    axes = figure.subplots()
    cuts = _together(rows) if by_token else [(row, row + 1) for row in range(len(rows))]
    values = merged(_matrix(report) / _spans(report), cuts, 0) if columns else np.zeros((len(cuts), 0))
    per, unit = _unit(report, values)
    values = values / per
    least, most = scale(values)
    if least:  # colours are for what there is: with a few huge values, the median is not kept in the middle
        least = max(least, float(values[values > 0].min()))
    if most:
        image = axes.imshow(
            np.ma.masked_equal(values, 0),
            aspect="auto",
            cmap="viridis",
            norm=LogNorm(least, most) if least else Normalize(0, most),
            interpolation="auto",  # smooths where cells are no whole number of pixels: no row is wider than others
            interpolation_stage="rgba",
            origin="upper" if by_token else "lower",
            extent=None if by_token else (0, float(_spans(report).sum()), -0.5, len(rows) - 0.5),
        )
        colours = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=50)
        colours.set_label(unit + (", logarithmic" if least else "") + "; blank: nothing")
        if least:
            colours.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            colours.ax.yaxis.set_major_formatter("{x:g}")
            colours.ax.yaxis.set_minor_locator(NullLocator())
        if by_token:
            _token_ticks(axes, columns)
        _tensor_ticks(axes, rows, cuts) if by_token else offset_ticks(axes, rows)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_xlabel(_across(report))
    axes.set_title(plots.title(report, _headline(report, short=True)), loc="left", fontsize=10)
    return plots.drawn(figure, picture)


def offset_ticks(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Label an axis of file offsets."""
    spans = offsets(rows, 12)
    axes.set_yticks([first - 0.5 for _, first, _ in spans], [label for label, *_ in spans], fontsize=8)
    axes.set_ylabel("offset in the file")


def _token_ticks(axes: Any, columns: Sequence[Mapping[str, Any]]) -> None:
    """Label round tokens, where their columns are."""
    first = [column["first_token"] for column in columns]
    rough = max((columns[-1]["last_token"] - first[0]) / 10, 1)
    ten = 10 ** int(np.log10(rough))
    step = next(step for step in (ten, 2 * ten, 5 * ten, 10 * ten) if step >= rough)
    tokens = range(-(-first[0] // step) * step, columns[-1]["last_token"] + 1, step)
    axes.set_xticks(np.searchsorted(first, list(tokens), side="right") - 1, [f"{token:,}" for token in tokens])


def _together(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return which tensors share a row of the picture: each has its own, or as few of a layer as are needed."""
    most = -(-len(rows) // _ROWS) or 1
    return [
        (first + low, first + high)
        for _, first, end in stripes(rows)
        for low, high in chunks(end - first, -(-(end - first) // most))
    ]


def _tensor_ticks(axes: Any, rows: Sequence[Mapping[str, Any]], cuts: Sequence[tuple[int, int]]) -> None:
    """Name each tensor, or where they are too many, each layer, or where those are too many, every second, …."""
    if len(rows) <= _NAMED:
        axes.set_yticks(range(len(rows)), [_name(row, 40) for row in rows], fontsize=7)
        return
    kept: list[tuple[str, float]] = []
    starts = [first for first, _ in cuts]
    for label, first, end in stripes(rows):
        middle = (bisect_left(starts, first) + bisect_left(starts, end) - 1) / 2
        if not kept or middle - kept[-1][1] >= len(cuts) / _TICKS:
            kept.append((label, middle))
    axes.set_yticks([at for _, at in kept], [label for label, _ in kept], fontsize=8)
    most = max(end - first for first, end in cuts)
    axes.set_ylabel("layer" if most == 1 else f"layer; up to {most} tensors in a row")


def _lines(rows: Sequence[Mapping[str, Any]], top: int) -> list[tuple[str, int, int]]:
    """Return what each line stands for: tensors, or where they are too many, layers, or where those are, several."""
    if len(rows) <= top:
        return [(_name(row, 30), i, i + 1) for i, row in enumerate(rows)]
    found = stripes(rows)
    if len(found) > top:
        each = -(-len(found) // top)  # as many to a line: a line with more of them would look hotter
        joined = [(found[at], found[min(at + each, len(found)) - 1]) for at in range(0, len(found), each)]
        found = [
            (one[0] if one is other else printable(f"{one[0]}-{other[0]}", 30), one[1], other[2])
            for one, other in joined
        ]
    return found


def _name(row: Mapping[str, Any], limit: int) -> str:
    return printable(str(row["tensor_name"]), limit) if row["tensor_name"] is not None else "no tensor"


def _matrix(report: Mapping[str, Any]) -> Floats:
    return np.array([row["values"] for row in report["rows"]], np.float64).reshape(len(report["rows"]), -1)


def _spans(report: Mapping[str, Any]) -> Floats:
    """Return how many tokens, or seconds, each column is."""
    if report["by"] == "token":
        return np.array([column["last_token"] - column["first_token"] + 1 for column in report["columns"]], np.float64)
    return np.array([(column["last_ns"] - column["first_ns"] + 1) / 1e9 for column in report["columns"]])


def _headline(report: Mapping[str, Any], short: bool = False) -> str:
    value, rows, columns = report["value"], report["rows"], report["columns"]
    show = {"bytes": size, "stall": duration, "accesses": "{:,}".format}[value]
    if not report["total"]:
        return f"nothing: no {'faults' if value == 'stall' else 'reads' if value == 'bytes' else value} in the trace"
    what = "page faults" if value == "accesses" and report["by"] == "time" else _WHAT[value]
    whole = f"{show(report['total'])} {what}"
    if short or not rows or not columns:
        return f"{whole}, by {'tensor and token' if report['by'] == 'token' else 'file offset and time'}"
    row = max(rows, key=lambda row: row["total"])
    sums = np.array([row["values"] for row in rows]).sum(axis=0)
    column = int((sums / _spans(report)).argmax())
    if report["by"] == "token":
        one, last = columns[column]["first_token"], columns[column]["last_token"]
        where, when = _name(row, 60), f"token {one}" if one == last else f"tokens {one} to {last}"
    else:
        where = f"the {size(row['size_bytes'])} at {size(row['offset_bytes'])}"
        long = columns[column]["last_ns"] - columns[column]["first_ns"] + 1
        when = f"the {duration(long)} after {_when(report, column)} s"
    return f"{whole}; most by {where} ({show(row['total'])}), and in {when} ({show(int(sums[column]))})"


def _show(report: Mapping[str, Any]) -> Callable[[float], str]:
    """Return how a cell's value, per token or second, is written."""
    by_token = report["by"] == "token"
    if report["value"] == "bytes":
        return size if by_token else lambda value: f"{size(value)}/s"
    if report["value"] == "stall":
        return duration if by_token else lambda value: _number(value / 1e9)
    return _number if by_token else lambda value: f"{_number(value)}/s"


def _number(value: float) -> str:
    return three(value) if value >= 1 else f"{value:.2g}"


def _cell(report: Mapping[str, Any]) -> str:
    """Say what a cell of the text is."""
    if report["by"] == "token":
        return {"bytes": "read per token", "stall": "waited per token, all threads", "accesses": "accesses per token"}[
            report["value"]
        ]
    return {"bytes": "read per second", "stall": "threads that wait, on average", "accesses": "page faults per second"}[
        report["value"]
    ]


def _unit(report: Mapping[str, Any], values: Floats) -> tuple[float, str]:
    """Return scale and label of the colours."""
    by_token = report["by"] == "token"
    most = [float(values.max(initial=0))]
    if report["value"] == "bytes":
        per, unit = plots.unit(most)
        return per, f"{unit} read {'per token' if by_token else 'per second'}"
    if report["value"] == "stall":
        if not by_token:
            return 1e9, "threads that wait in page faults"
        per, unit = plots.unit(most, plots.TIMES)
        return per, f"{unit} waited per token, all threads"
    return 1, "accesses per token" if by_token else "page faults per second"


def _when(report: Mapping[str, Any], column: int) -> str:
    """Return the token, or the seconds since the first column, at which a column begins."""
    columns = report["columns"]
    if report["by"] == "token":
        return str(columns[column]["first_token"])
    seconds = (columns[column]["first_ns"] - columns[0]["first_ns"]) / 1e9
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"


def _below(report: Mapping[str, Any]) -> list[str]:
    columns = report["columns"]
    middle, last = len(columns) // 2, len(columns) - 1
    if report["by"] == "token":
        first = _when(report, 0)
        return [f"token {first}", _when(report, middle) if last > 1 else "", str(columns[last]["last_token"])]
    return ["0 s", f"{_when(report, middle)} s", duration(columns[last]["last_ns"] + 1 - columns[0]["first_ns"])]


def _across(report: Mapping[str, Any]) -> str:
    if report["by"] == "time":
        return f"seconds since the first {'read' if report['value'] == 'bytes' else 'page fault'}"
    most = max((column["last_token"] - column["first_token"] + 1 for column in report["columns"]), default=1)
    return "token (graph evaluation)" + (f", {several(most, 'token')} in a column" if most > 1 else "")
