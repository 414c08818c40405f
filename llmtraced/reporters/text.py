"""Reports as aligned tables for a terminal: human units, fitted to its width, colour only where it is wanted.

Every name that came from a model file or another process passes :func:`llmtraced.errors.printable`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llmtraced.errors import printable

__all__ = [
    "Column",
    "Style",
    "bar",
    "bars",
    "blocks",
    "cut",
    "duration",
    "heading",
    "indented",
    "percent",
    "profile",
    "several",
    "size",
    "table",
    "tensor_names",
    "three",
    "trust",
    "wrapped",
]

_EIGHTHS: Final = "▏▎▍▌▋▊▉█"
_HEIGHTS: Final = " ▁▂▃▄▅▆▇█"
_SIZES: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_TIMES: Final = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0))


@dataclass(frozen=True)
class Style:
    """Where the text goes: ``width`` in columns, and whether that place shows colour."""

    width: int = 120
    colour: bool = False

    def bold(self, text: str) -> str:
        """Return ``text`` as a heading."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text

    def warn(self, text: str) -> str:
        """Return ``text`` as something that needs attention."""
        return f"\x1b[33m{text}\x1b[0m" if self.colour else text


@dataclass(frozen=True)
class Column:
    """A table column: its title and how a row's value becomes text.

    A ``name`` is set to the left and may be cut; a ``spare`` column is left out first where the line gets too wide.
    """

    title: str
    show: Callable[[Mapping[str, Any]], str]
    name: bool = False
    spare: bool = False


def size(value: float | None) -> str:
    """Return bytes in decimal units with three digits: ``1.67 GB``, ``4.10 kB``, ``12 B``; None is ``-``."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f} B"
    unit = 0
    while value >= 999.5 and unit < len(_SIZES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{three(value)} {_SIZES[unit]}"


def duration(ns: float | None) -> str:
    """Return nanoseconds as text: ``345 ms``, ``12.3 µs``, ``2 min 05 s``, ``0 s``; None is ``-``."""
    if ns is None:
        return "-"
    if ns >= 120e9:
        minutes, seconds = divmod(round(ns / 1e9), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
    for unit, scale in _TIMES:
        if ns >= 0.9995 * scale:
            return f"{three(ns / scale)} {unit}" if unit != "ns" else f"{ns:.0f} ns"
    return "0 s"


def bar(share: float, cells: int = 10) -> str:
    """Return a bar of ``cells`` columns filled to ``share`` (0 to 1); anything above zero shows."""
    eighths = min(max(round(share * cells * 8), int(share > 0)), cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest - 1] if rest else "")).ljust(cells)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], style: Style) -> list[str]:
    """Return aligned lines, title first, that fit the width: spare columns go first, then names lose their middle."""
    cells = [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    excess = sum(widths) + 2 * (len(columns) - 1) - style.width
    if excess > 0 and (spare := [column for column in columns if column.spare]):
        return table(rows, [column for column in columns if column is not spare[-1]], style)
    for i in sorted((i for i, column in enumerate(columns) if column.name), key=lambda i: -widths[i]):
        lost = min(max(excess, 0), max(widths[i] - 16, 0))
        widths[i], excess = widths[i] - lost, excess - lost
    lines = [
        "  ".join(
            cut(cell, width).ljust(width) if column.name else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    return [style.bold(lines[0]), *lines[1:]]


def trust(report: Mapping[str, Any], style: Style) -> list[str]:
    """Return what every report begins with: whether the account is complete, and the notes."""
    complete = report["verdict"] == "complete"
    account = "account: " + ("complete, nothing was dropped" if complete else printable(report["verdict"]))
    lines = [line if complete else style.warn(line) for line in wrapped(account, style)]
    notes = [f"note: {printable(note, 2000)}" for note in report["notes"]]
    return lines + [style.warn(line) for note in notes for line in wrapped(note, style)]


def wrapped(words: str, style: Style, first: str = "", rest: str = "  ") -> list[str]:
    """Return ``words`` in lines that fit the width, led by ``first`` and ``rest``: what goes on is set in."""
    width = max(style.width, 40)
    return textwrap.wrap(words, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def heading(words: str, style: Style) -> list[str]:
    """Return the lines of a report's answer, which begins it."""
    return [style.bold(line) for line in wrapped(words, style)]


def indented(lines: Sequence[str]) -> list[str]:
    """Return the lines set in by two columns."""
    return ["  " + line for line in lines]


def profile(title: str, rows: Sequence[Mapping[str, Any]], key: str, show: Callable[[float], str], style: Style) -> str:
    """Return one line: a block as high as each row's share of the largest, and the range.

    Where there are more rows than fit, a block is the largest of several, and the line says of how many.
    """
    values = [row[key] for row in rows]
    most = max(values) or 1
    head, tail = f"  {title:5}  ", f"  {show(min(values))} to {show(max(values))}"
    each = -(-len(values) // max(style.width - len(head) - len(tail), 1))
    if each > 1:
        each = -(-len(values) // max(style.width - len(head) - len(tail) - len(", 99 a block"), 10))
        tail += f", {each} a block"
    return head + blocks([max(values[at : at + each]) for at in range(0, len(values), each)], most) + tail


def blocks(values: Sequence[float], most: float) -> str:
    """Return one block for each value, as high as its share of ``most``; anything above zero shows."""
    return "".join(_HEIGHTS[max(round(value / most * 8), 1) if value > 0 else 0] for value in values)


def tensor_names(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return a tensor table's first columns: the name, and the model's where the rows are of several."""
    several = len({row["model"] for row in rows}) > 1
    model = [Column("model", lambda row: printable(str(row["model"])), name=True)] if several else []
    return [Column("tensor", lambda row: printable(str(row["tensor_name"])), name=True), *model]


def bars(rows: Sequence[Mapping[str, Any]], key: str) -> Column:
    """Return an untitled column of bars, relative to the largest row."""
    most = max((row[key] for row in rows), default=0) or 1
    return Column("", lambda row: bar(row[key] / most), name=True, spare=True)


def percent(part: float, whole: float) -> str:
    """Return ``part`` of ``whole`` as ``12.3%``; ``-`` of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def several(count: int, what: str) -> str:
    """Return ``1 tensor``, ``2,000 tensors``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def three(value: float) -> str:
    """Return a positive number with three significant digits, without an exponent."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def cut(text: str, width: int) -> str:
    """Return ``text`` without its middle where it is longer than ``width`` characters."""
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"
