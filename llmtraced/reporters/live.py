"""The live view: a history of snapshots in, the lines of a screen out. There is no terminal in here.

What is shown is explained in docs/top.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from rich.cells import set_cell_size
from rich.text import Text

from llmtraced.errors import printable
from llmtraced.reporters import text
from llmtraced.schema import CAUSES, PHASES
from llmtraced.snapshot import COUNTERS, Change, History, Interval, Place, Totals

__all__ = ["GROUPS", "SORTS", "View", "press", "screen", "table_rows"]

Row = Mapping[str, Any]

GROUPS: Final = {"t": "tensors", "l": "layers", "c": "components"}
"""Keys that choose what a row of the table is."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table: its width, what it shows, and by what it sorts (largest first)."""

    title: str
    width: int
    show: Callable[[Row], str]
    order: Callable[[Row], float]


# In the order of the screen; where there is no room, the last ones go, but for the one that it is sorted by.
_COLUMNS: Final = {
    "r": _Column("read/s", 8, lambda r: text.size(r["read_bytes"]), lambda r: r["read_bytes"]),
    "s": _Column("stall/s", 8, lambda r: text.duration(r["fault_seconds"] * 1e9), lambda r: r["fault_seconds"]),
    "f": _Column("faults/s", 9, lambda r: f"{r['faults']:,.0f}", lambda r: r["faults"]),
    "e": _Column("in RAM", 7, lambda r: _share(r["resident"], r["size"]), lambda r: _ratio(r["resident"], r["size"])),
    "a": _Column("again", 6, lambda r: _share(r["reread_bytes"], r["read_bytes"]), lambda r: r["reread_bytes"]),
    "v": _Column("evict/s", 8, lambda r: text.size(r["evicted_bytes"]), lambda r: r["evicted_bytes"]),
    "m": _Column("major/s", 8, lambda r: f"{r['major_faults']:,.0f}", lambda r: r["major_faults"]),
    "z": _Column("size", 8, lambda r: text.size(r["size"]), lambda r: r["size"] or 0),
}
SORTS: Final = {**{key: column.title for key, column in _COLUMNS.items()}, "n": "name"}
"""Keys that choose how the table is sorted: largest first, names in their natural order."""

_LEAST_NAME: Final = 14
_SHADES: Final = " ░▒▓█"
_COLOURS: Final = (
    "",
    "#5a6f9e",
    "#7f8a8a",
    "#b5a55f",
    "#ffd93b",
)  # of cividis: dark is little, for the colour-blind too
_HEAT_LABEL: Final = 6


@dataclass(frozen=True, slots=True)
class View:
    """What the user has chosen.

    Attributes:
        by: a key of :data:`GROUPS`.
        sort: a key of :data:`SORTS`.
        pid: of the process shown; None, or one that is gone: the first.
        first: rows of the table that are above the screen.
        paused: whether the screen stands still.
        ended: whether the user has had enough.
    """

    by: str = "t"
    sort: str = "r"
    pid: int | None = None
    first: int = 0
    paused: bool = False
    ended: bool = False


def press(view: View, key: str, history: History) -> View:
    """Return the view after a key was pressed: a character, or a name that :func:`terminal.keys` gives."""
    if key in GROUPS:
        return replace(view, by=key, first=0)
    if key in SORTS:
        return replace(view, sort=key, first=0)
    if key == "q":
        return replace(view, ended=True)
    if key in ("p", " "):
        return replace(view, paused=not view.paused)
    steps = {"up": -1, "down": 1, "pageup": -10, "pagedown": 10}
    if key in steps and (pid := _shown(view, history)) is not None:
        last = len(table_rows(history.recent(pid), history.latest(pid), view)) - 1
        return replace(view, first=max(min(view.first + steps[key], last), 0))
    turns = {"tab": 1, "right": 1, "left": -1, "backtab": -1}
    if key in turns and (pid := _shown(view, history)) is not None:
        pids = history.pids
        return replace(view, pid=pids[(pids.index(pid) + turns[key]) % len(pids)], first=0)
    return view


def _shown(view: View, history: History) -> int | None:
    pids = history.pids
    return view.pid if view.pid in pids else pids[0] if pids else None


def screen(history: History, view: View, width: int, height: int, origin: str = "", status: str = "") -> list[Text]:
    """Return at most ``height`` lines of at most ``width`` columns.

    Args:
        history: what there is to show.
        view: how to show it.
        width: columns.
        height: lines.
        origin: where the figures come from.
        status: a sentence for the user, shown instead of the keys.
    """
    pid = _shown(view, history)
    if pid is None:
        lines = [Text("no process is traced: none uses a GGUF model"), Text(origin)]
    else:
        totals, recent = history.latest(pid), history.recent(pid)
        lines = _head(totals, recent, view, history.pids, width, origin)
        if recent is None:
            lines.append(Text("measuring …"))
        else:
            lines += _causes(recent, history.intervals(pid), width)
            lines += _body(history, pid, view, width, height - len(lines) - 3)
    foot = Text(printable(status, 500), "yellow") if status else _keys(view, len(history.pids))
    lines = [*lines[: max(height - 1, 0)], *[Text()] * (height - 1 - len(lines)), foot][:height]
    for line in lines:
        line.truncate(width)
    return lines


# --- the top


def _head(
    totals: Totals, recent: Change | None, view: View, pids: Sequence[int], width: int, origin: str
) -> list[Text]:
    right = f"process {pids.index(totals.pid) + 1} of {len(pids)}" if len(pids) > 1 else origin
    if view.paused:
        right = "paused"
    models = list(totals.models) or ["(no model)"]
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    tail = f"{more}  pid {totals.pid}  {_doing(totals, recent)}"
    name = text.cut(printable(models[0]), max(width - len(tail) - len(right) - 3, 12))
    gap = max(width - len(name) - len(tail) - len(right), 2)
    first = Text.assemble((name, "bold"), tail, " " * gap, (right, "bold yellow" if view.paused else "dim"))
    if recent is None:
        return [first, Text()]
    sums = recent.counters.sum(axis=0) / recent.seconds
    read, again, evicted, major, minor = (sums[COUNTERS.index(c)] for c in COUNTERS[:5])
    per = {phase: recent.tokens[PHASES.index(phase)] / recent.seconds for phase in ("decode", "prompt")}
    stall = recent.stall_share
    pace, prompt = f"{_few(per['decode'])} tokens/s", f" (prompt {_few(per['prompt'])}/s)  stalled "
    share, faults = f"{stall:4.0%} ", f"  {major + minor:,.0f} faults/s ({major:,.0f} major)"
    cells = min(max(width - len(pace + prompt + share + faults), 0), 10)  # figures come before the bar
    second = Text.assemble((pace, "bold"), prompt, (share, "bold"), (text.bar(stall, cells), "red"), faults)
    third = f"read {text.size(read)}/s, {_share(again, read)} of it again  evicted {text.size(evicted)}/s"
    if totals.resident:
        here, size = np.array(list(totals.resident.values())).sum(axis=0)
        third += f"  in RAM {_share(here, size)} of {text.size(size)}"
    else:
        third += f"  model {text.size(sum(totals.models.values()))}"
    warning = f"  {text.several(int(totals.problems), 'problem')}: see the log" if totals.problems else ""
    return [first, second, Text.assemble(third, (warning, "yellow")), Text()]


def _doing(totals: Totals, recent: Change | None) -> str:
    """Return what the server is doing, in a word or two."""
    if recent is None:
        return ""
    phases = [phase for phase, n in zip(PHASES, recent.tokens, strict=True) if n > 0 and phase != "unknown"]
    if phases:
        return "+".join(phases)
    if recent.graphs:
        return "computing"
    if recent.causes.sum() or recent.stall_seconds:
        return "reading" if totals.graphs else "reading, no token yet"
    return "idle"


def _causes(recent: Change, intervals: Sequence[Interval], width: int) -> list[Text]:
    """Return bytes/s by cause: figure, share, and history; of those causes that there have been of late."""
    past = np.array([i.causes / i.seconds for i in intervals]).reshape(-1, len(CAUSES))
    been = past.sum(axis=0) > 0
    past = past[max(len(past) - max(width - 36, 0), 0) :]
    most = max(float(past.max(initial=0)), 1.0)
    lines = []
    for code, cause in enumerate(CAUSES):
        if been[code] or cause in ("fault", "readahead"):
            value = recent.causes[code] / recent.seconds
            share = value / (recent.causes.sum() / recent.seconds or 1.0)
            line = Text(f"{cause:10} {text.size(value):>9}/s ")
            line.append(text.bar(share, 10), "cyan")
            line.append("  " + text.blocks(past[:, code].tolist(), most), "blue")
            lines.append(line)
    return [*lines, Text()]


def _keys(view: View, processes: int) -> Text:
    """Return words whose marked letter is the key, the chosen ones reversed."""
    line = Text()

    def add(key: str, word: str, *, chosen: bool = False) -> None:
        start = len(line) + word.index(key)
        line.append(word, "reverse" if chosen else "").stylize("bold underline cyan", start, start + 1)
        line.append(" ")

    for key, word in GROUPS.items():
        add(key, word, chosen=key == view.by)
    line.append(" ")
    for key, word in (("r", "read"), ("s", "stall"), ("f", "faults"), ("e", "resident"), ("n", "name")):
        add(key, word, chosen=key == view.sort)
    line.append(" ")
    add("p", "pause", chosen=view.paused)
    if processes > 1:
        line.append("tab ", "bold cyan")
    add("q", "quit")
    return line


# --- table and heatmap


def _body(history: History, pid: int, view: View, width: int, height: int) -> list[Text]:
    """Return the table, title first, with the heatmap to its right where there is room."""
    totals, recent = history.latest(pid), history.recent(pid)
    assert recent is not None
    heat_width = min(max(width * 3 // 10, 22), 90) if width >= 70 and height >= 5 else 0
    left = _table(table_rows(recent, totals, view), view, width - heat_width - 2 * bool(heat_width), height + 1)
    if not heat_width:
        return left
    right = _heatmap(history.intervals(pid), heat_width, height + 1)
    blank = Text(" " * (width - heat_width - 2))
    for i, part in enumerate(right):
        if i >= len(left):
            left.append(blank.copy())
        left[i].append("  ").append_text(part)
    return left


def table_rows(recent: Change | None, totals: Totals, view: View) -> list[dict[str, Any]]:
    """Return the table's rows, sorted.

    Fields: ``name``; every one of COUNTERS, and ``faults``, a second; ``resident`` and ``size``, bytes or None.
    """
    if recent is None:
        return []
    numbers: dict[tuple[int, str], list[int]] = {}
    several = len({place.model for place in recent.places}) > 1
    for i, place in enumerate(recent.places):
        numbers.setdefault(_group(place, view.by, several), []).append(i)
    rows = []
    for (layer, name), members in numbers.items():
        sums = recent.counters[members].sum(axis=0) / recent.seconds
        row: dict[str, Any] = {"name": name, "layer": layer, **dict(zip(COUNTERS, sums.tolist(), strict=True))}
        row["faults"] = row["major_faults"] + row["minor_faults"]
        known = (
            [totals.resident[p] for i in members if (p := recent.places[i]) in totals.resident]
            if totals.resident
            else []
        )
        row["resident"], row["size"] = (sum(r for r, _ in known), sum(s for _, s in known)) if known else (None, None)
        rows.append(row)
    rows.sort(key=_natural)
    if view.sort != "n":
        rows.sort(key=_COLUMNS[view.sort].order, reverse=True)
    return rows


def _group(place: Place, by: str, several: bool) -> tuple[int, str]:
    """Return (layer, name) of the row that a place belongs to."""
    model = f" ({printable(place.model)})" if several else ""
    component = printable(place.component) or "(no name)"
    if by == "c":
        return -1, component
    if by == "l":
        return place.layer, (f"layer {place.layer}" if place.layer >= 0 else "(outside layers)") + model
    if place.tensor:
        return place.layer, printable(place.tensor).removesuffix(".weight") + model
    return place.layer, (f"layer {place.layer} {component}" if place.layer >= 0 else component) + model


def _natural(row: Row) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", row["name"])]


def _table(rows: Sequence[Row], view: View, width: int, height: int) -> list[Text]:
    columns = list(_COLUMNS.items())
    while columns and width - sum(c.width + 1 for _, c in columns) < min(_LEAST_NAME + 8 * (len(columns) > 4), width):
        columns.pop(-2 if columns[-1][0] == view.sort and len(columns) > 1 else -1)  # what it is sorted by stays
    room = max(width - sum(c.width + 1 for _, c in columns), 0)

    def line(name: str, cells: Sequence[str]) -> str:
        shown = set_cell_size(text.cut(name, room), room) if room else ""
        return shown + "".join(" " + cell.rjust(c.width) for cell, (_, c) in zip(cells, columns, strict=True))

    title = GROUPS[view.by] + ("▲" if view.sort == "n" else "")
    heading = Text(line(title, [c.title + ("▼" if key == view.sort else "") for key, c in columns]), "bold")
    first = min(view.first, max(len(rows) - 1, 0))
    shown = rows[first : first + max(height - 1, 0)]
    return [heading, *(Text(line(row["name"], [c.show(row) for _, c in columns])) for row in shown)][:height]


def _heatmap(intervals: Sequence[Interval], width: int, height: int) -> list[Text]:
    """Return layers downwards, intervals to the right, the newest last; a cell's shade is bytes/s read into a layer."""
    shown = intervals[-max(width - _HEAT_LABEL, 1) :]
    keys = {layer for interval in shown for layer in interval.layers}
    layers = sorted(keys - {-1})
    rows = max(min(len(layers), height - 2 - (-1 in keys)), 1)
    edges = [i * len(layers) // rows for i in range(rows + 1)]
    groups = [layers[a:b] for a, b in pairwise(edges) if b > a] + [[-1]] * (-1 in keys)
    values = np.array(
        [[sum(i.layers.get(layer, 0.0) for layer in group) / len(group) / i.seconds for i in shown] for group in groups]
    ).reshape(len(groups), len(shown))
    most = float(values[: len(groups) - (-1 in keys)].max(initial=0)) or float(values.max(initial=0))
    lines = [Text(f"layers, {sum(i.seconds for i in shown):.0f} s", "bold")]
    for group, series in zip(groups, values, strict=True):
        lo, hi = group[0], group[-1]
        line = Text(("other" if lo < 0 else str(lo) if len(group) == 1 else f"{lo}-{hi}").ljust(_HEAT_LABEL))
        line.append(" " * (width - _HEAT_LABEL - len(shown)))
        for value in series:
            level = min(int(np.ceil(value / most * 4)), 4) if value > 0 else 0
            line.append(_SHADES[level], _COLOURS[level])
        lines.append(line)
    lines.append(Text(f"█ {text.size(most)}/s a layer" if most else "nothing was read", "dim"))
    return lines[:height]


def _few(value: float) -> str:
    return text.three(value) if value else "0"


def _ratio(part: float | None, whole: float | None) -> float:
    return -1.0 if part is None or not whole else part / whole


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.0%}"
