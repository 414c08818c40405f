"""A matrix as text: densities (or colours) in a terminal, with labels; and what its rows and columns are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from llmtraced.errors import printable
from llmtraced.reporters.text import Style, size

__all__ = ["Floats", "chunks", "grid", "merged", "offsets", "scale", "stripes"]

Floats = npt.NDArray[np.float64]

_SHADES: Final = "░▒▓█"
_VIRIDIS: Final = (53, 54, 60, 24, 30, 29, 35, 71, 112, 184, 226)  # of xterm's 256 colours, dark to light
_LABEL: Final = 30
_LINEAR: Final = 4  # times the median, up to which a scale is linear


def scale(values: Floats) -> tuple[float, float]:
    """Return the ends of a scale for the values above 0: (0, largest) for a linear one, else a logarithmic one.

    A scale is logarithmic where the largest value is more than four times the median, a prompt among decode tokens or
    a hot expert: a linear one would leave the rest in one shade. Its middle is the median, so that a few tiny tensors
    do not stretch it; what is below its beginning is shown as that.
    """
    some = values[values > 0]
    if not some.size:
        return 0, 0
    most, middle = float(some.max()), float(np.median(some))
    return (middle**2 / most if most > _LINEAR * middle else 0), most


def chunks(count: int, most: int) -> list[tuple[int, int]]:
    """Cut ``count`` things into at most ``most`` consecutive chunks, as even as can be: (first, end) of each."""
    parts = min(count, max(most, 1))
    return [(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def stripes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Return consecutive tensors of the same layer as (label, first, end): ``3``, or components outside layers."""
    found, at = [], 0
    for layer, run in groupby(rows, key=lambda row: row["layer"] if (row["layer"] or 0) >= 0 else -1):
        some = list(run)
        outside = dict.fromkeys(str(row["component"] or row["tensor_name"] or "no tensor") for row in some)
        label = printable(", ".join(list(outside)[:9]), _LABEL) if layer in (None, -1) else str(layer)
        found.append((label, at, at + len(some)))
        at += len(some)
    return found


def offsets(rows: Sequence[Mapping[str, Any]], most: int) -> list[tuple[str, int, int]]:
    """Return bins of file offsets, joined into about ``most`` of one file each, as (label, first, end)."""
    several = len({(row["model"], row["shard"]) for row in rows}) > 1
    found, at = [], 0
    for (model, shard), run in groupby(rows, key=lambda row: (row["model"], row["shard"])):
        some = list(run)
        for first, end in chunks(len(some), max(most * len(some) // max(len(rows), 1), 1)):
            where = f"{printable(str(model), 12)}/{shard} " if several else ""
            layer = some[first]["layer"]
            inside = f" layer {layer}" if layer is not None and layer >= 0 else ""
            found.append((f"{where}{size(some[first]['offset_bytes'])}{inside}", at + first, at + end))
        at += len(some)
    return found


def merged(values: Floats, spans: Sequence[tuple[int, int]], axis: int) -> Floats:
    """Return the sums of ``values`` over each of the spans, which follow each other, along ``axis``."""
    if not spans:
        return np.zeros((0, values.shape[1]) if axis == 0 else (values.shape[0], 0))
    return np.asarray(np.add.reduceat(values, [first for first, _ in spans], axis=axis), np.float64)


def grid(
    labels: Sequence[str], values: Floats, below: Sequence[str], show: Callable[[float], str], style: Style
) -> list[str]:
    """Return the matrix as lines of text, a line a row and a column a cell, with axis and legend.

    Args:
        labels: of the rows, at the left.
        values: of the cells, rows by columns; 0 stays blank.
        below: what is written below the first column, the middle and the last.
        show: a value in words, for the legend.
        style: colours, if wanted; else four shades.
    """
    pen: Sequence[Any] = _VIRIDIS if style.colour else _SHADES
    least, most = scale(values)
    shown = np.maximum(values, least)
    level = np.log(shown / least) / np.log(most / least) if least else shown / (most or 1)
    level = np.where(values > 0, np.clip(np.ceil(level * len(pen) - 1e-9), 1, len(pen)), 0).astype(int)
    margin = max(map(len, labels), default=0)
    lines = [
        f"{label.rjust(margin)} {_cells(line, pen)}".rstrip()
        for label, line in zip(labels, level.tolist(), strict=True)
    ]
    lines.append(" " * (margin + 1) + _axis(below, values.shape[1]))
    if most:
        steps = [(i + 1) / len(pen) for i in range(len(pen))]
        tops = [least * (most / least) ** step if least else most * step for step in steps]
        every = range(len(pen)) if len(pen) < 5 else range(1, len(pen), 3)
        key = [f"{_cells([i + 1] * 2, pen)} to {show(tops[i])}" for i in every]
        long = sum(len(show(tops[i])) + 8 for i in every) + (13 if least else 0)
        indent = " " * (margin + 1 if margin + 1 + long <= style.width else 0)
        lines.append(indent + "  ".join(key) + ("  (logarithmic)" if least else ""))
    return lines


def _cells(levels: Sequence[int], pen: Sequence[Any]) -> str:
    if isinstance(pen, str):
        return "".join(pen[level - 1] if level else " " for level in levels)
    runs = [(level, len(list(run))) for level, run in groupby(levels)]
    return "".join(f"\x1b[38;5;{pen[level - 1]}m{'█' * n}\x1b[0m" if level else " " * n for level, n in runs)


def _axis(below: Sequence[str], width: int) -> str:
    """Return the texts at the beginning, in the middle and at the end, those that fit."""
    first, middle, last = (*below, "", "", "")[:3]
    if len(first) + len(last) + 2 > width:
        return f"{first} - {last}" if last else first
    line = first.ljust(width - len(last)) + last
    at = (width - len(middle)) // 2
    free = line[max(at - 2, 0) : at + len(middle) + 2].strip() == ""
    return line[:at] + middle + line[at + len(middle) :] if middle and at > 1 and free else line
