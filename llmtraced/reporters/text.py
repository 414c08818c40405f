"""Reports as aligned tables for a terminal: human units, fitted to its width, colour only where it is wanted.

Every name that came from a model file or another process passes :func:`llmtraced.errors.printable`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from llmtraced.errors import printable

__all__ = ["Column", "Style", "bar", "duration", "render_reread", "render_summary", "render_tokens", "size", "table"]

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
    return f"{_three(value)} {_SIZES[unit]}"


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
            return f"{_three(ns / scale)} {unit}" if unit != "ns" else f"{ns:.0f} ns"
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
        cut = min(max(excess, 0), max(widths[i] - 16, 0))
        widths[i], excess = widths[i] - cut, excess - cut
    lines = [
        "  ".join(
            _cut(cell, width).ljust(width) if column.name else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    return [style.bold(lines[0]), *lines[1:]]


def render_reread(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the re-read report; ``top`` tensors are listed, the rest is summed up in a line."""
    tensors = [tensor for tensor in report["tensors"] if tensor["bytes_read"] or tensor["access_count"]]
    shown, rest = tensors[:top], tensors[top:]
    lines = [style.bold(_headline(report)), *_trust(report, style), ""]
    if shown:
        lines += table(shown, _tensor_columns(shown, report["total_bytes_read"], "bytes_read"), style)
    if rest:
        read = size(sum(tensor["bytes_read"] for tensor in rest))
        lines.append(f"… {_several(len(rest), 'more tensor')}, {read} read (--top N for more)")
    if report["other_bytes_read"]:
        lines.append(f"outside tensors (header, padding): {size(report['other_bytes_read'])} read")
    unread = [t for t in report["tensors"] if not t["bytes_read"] and t["backed"] is not False]
    away = [t for t in report["tensors"] if t["backed"] is False]
    if unread:
        lines.append(f"not read from disk: {_several(len(unread), 'tensor')}, {_total(unread)}")
    if away:
        lines.append(
            f"not used from the mapped file, so not visible here: {_several(len(away), 'tensor')}, {_total(away)}"
        )
    return "\n".join(lines) + "\n"


def render_tokens(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the tokens report: the spread per phase, then the ``top`` slowest tokens in order of time."""
    lines = [*_trust(report, style), ""]
    for phase in report["phases"]:
        lines.append(style.bold(_pace(phase)))
        causes = {name.removesuffix("_bytes"): n for name, n in phase["total"].items() if name.endswith("_bytes") and n}
        if causes:
            lines.append("  read for: " + ", ".join(f"{cause} {size(n)}" for cause, n in causes.items()))
        spread = [{"what": what, "show": show, **phase[key]} for what, key, show in _SPREAD]
        lines += ["  " + line for line in table(spread, _SPREAD_COLUMNS, style)] + [""]
    if report["outside_bytes_read"]:
        lines += [f"outside tokens (loading, or before the first graph): {size(report['outside_bytes_read'])} read", ""]
    slowest = sorted(report["tokens"], key=lambda row: -(row["duration_ns"] or 0))[:top]
    if slowest:
        of = _several(len(report["tokens"]), "token")
        lines.append(f"the slowest {len(slowest)} of {of} (one token = one graph evaluation)")
        lines += table(sorted(slowest, key=lambda row: int(row["token"])), _TOKEN_COLUMNS, style)
    else:
        lines.append("no token was seen: was the server asked anything while it was recorded?")
    return "\n".join(lines) + "\n"


def render_summary(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the summary; ``top`` tensors are listed by bytes read and by stall."""
    pairs = [(key, value) for key, value in _facts(report) if value]
    wide = max(len(key) for key, _ in pairs)
    lines = [f"{style.bold(key.ljust(wide))}  {value}" for key, value in pairs] + [*_trust(report, style), ""]
    lines += [style.bold(_headline(report["reread"]))]
    lines += [_pace(phase) for phase in report["phases"]] + [""]
    total = report["reread"]["total_bytes_read"]
    narrow = replace(style, width=style.width - 2)
    stalled = sorted(report["top_by_stall"][:top], key=lambda t: -int(t["stall_ns"]))
    read = report["top_by_bytes_read"][:top]
    for title, rows, key in (("most read", read, "bytes_read"), ("most waited for", stalled, "stall_ns")):
        if rows:
            lines += [f"{title}:", *_indented(table(rows, _tensor_columns(rows, total, key), narrow)), ""]
    components = [row for row in report["components"] if row["bytes_read"] or row["stall_ns"]]
    if components:
        lines += ["by component:", *_indented(table(components, _component_columns(components, total), narrow)), ""]
    layers = [row for row in report["layers"] if row["layer"] not in (None, -1)]
    if any(row["bytes_read"] or row["stall_ns"] for row in layers):
        lines.append(f"by layer, {layers[0]['layer']} to {layers[-1]['layer']}:")
        lines += [_profile("read", layers, "bytes_read", size)] if any(row["bytes_read"] for row in layers) else []
        lines += [_profile("stall", layers, "stall_ns", duration)] if any(row["stall_ns"] for row in layers) else []
    return "\n".join(lines).rstrip() + "\n"


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
        ("not mapped", f"{_several(away['count'], 'tensor')}, {size(away['size_bytes'])}" if away["count"] else ""),
    ]


def _headline(report: Mapping[str, Any]) -> str:
    if not report["total_bytes_read"]:
        return "nothing was read from disk"
    return (
        f"{size(report['total_bytes_read'])} read from disk: {size(report['unique_bytes'])} once, "
        f"{size(report['reread_bytes'])} again; each byte {report['amplification']:.2f} times on average"
    )


def _pace(phase: Mapping[str, Any]) -> str:
    stall = "" if phase["stall_share"] is None else f", {phase['stall_share']:.0%} of the time stalled"
    rate = "" if phase["tokens_per_second"] is None else f", {_three(phase['tokens_per_second'])} tokens/s"
    return (
        f"{phase['phase']}: {_several(phase['n_tokens'], 'token')} in {_several(phase['graphs'], 'graph')}{rate}{stall}"
    )


def _trust(report: Mapping[str, Any], style: Style) -> list[str]:
    complete = report["verdict"] == "complete"
    account = "account: " + ("complete, nothing was dropped" if complete else printable(report["verdict"]))
    lines = [account if complete else style.warn(account)]
    return lines + [style.warn(f"note: {printable(note, 2000)}") for note in report["notes"]]


def _indented(lines: Sequence[str]) -> list[str]:
    return ["  " + line for line in lines]


def _profile(title: str, rows: Sequence[Mapping[str, Any]], key: str, show: Callable[[float], str]) -> str:
    """Return one line: a block as high as each row's share of the largest, and the range."""
    values = [row[key] for row in rows]
    most = max(values) or 1
    blocks = "".join(_HEIGHTS[round(value / most * 8)] for value in values)
    return f"  {title:5}  {blocks}  {show(min(values))} to {show(max(values))}"


def _bars(rows: Sequence[Mapping[str, Any]], key: str) -> Column:
    """Return an untitled column of bars, relative to the largest row."""
    most = max((row[key] for row in rows), default=0) or 1
    return Column("", lambda row: bar(row[key] / most), name=True, spare=True)


def _tensor_columns(rows: Sequence[Mapping[str, Any]], total: int, key: str) -> list[Column]:
    """Return a tensor table's columns, with bars for ``key``; ``share`` is the share of the ``total`` bytes read."""
    several = len({row["model"] for row in rows}) > 1
    model = [Column("model", lambda row: printable(str(row["model"])), name=True)] if several else []
    return [
        Column("tensor", lambda row: printable(str(row["tensor_name"])), name=True),
        *model,
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("times", lambda row: f"{row['bytes_read'] / row['size_bytes']:.1f}" if row["size_bytes"] else "-"),
        Column("share", lambda row: _percent(row["bytes_read"], total), spare=True),
        *([_bars(rows, key)] if key == "bytes_read" else []),
        Column("major", lambda row: f"{row['major_faults']:,}"),
        Column("minor", lambda row: f"{row['minor_faults']:,}", spare=True),
        Column("stall", lambda row: duration(row["stall_ns"])),
        *([_bars(rows, key)] if key == "stall_ns" else []),
    ]


def _component_columns(rows: Sequence[Mapping[str, Any]], total: int) -> list[Column]:
    return [
        Column("component", lambda row: printable(str(row["component"] or "?")), name=True),
        Column("size", lambda row: size(row["size_bytes"])),
        Column("read", lambda row: size(row["bytes_read"])),
        Column("again", lambda row: size(row["reread_bytes"])),
        Column("share", lambda row: _percent(row["bytes_read"], total), spare=True),
        _bars(rows, "bytes_read"),
        Column("major", lambda row: f"{row['major_faults']:,}"),
        Column("stall", lambda row: duration(row["stall_ns"])),
    ]


_COUNT: Final = "{:,.0f}".format
_SPREAD: Final = (
    ("duration", "duration_ns", duration),
    ("stall", "stall_ns", duration),
    ("read", "bytes_read", size),
    ("major faults", "major_faults", _COUNT),
    ("minor faults", "minor_faults", _COUNT),
)


def _point(name: str) -> Column:
    return Column(name, lambda row: "-" if row[name] is None else row["show"](row[name]))


_SPREAD_COLUMNS: Final = (
    Column("per token", lambda row: row["what"], name=True),
    *(_point(name) for name in ("mean", "p50", "p90", "p99", "max")),
)
_TOKEN_COLUMNS: Final = (
    Column("token", lambda row: str(row["token"])),
    Column("phase", lambda row: printable(str(row["phase"])), name=True),
    Column("tokens in it", lambda row: str(row["n_tokens"])),
    Column("duration", lambda row: duration(row["duration_ns"])),
    Column("stall", lambda row: duration(row["stall_ns"])),
    Column("stall share", lambda row: bar(row["stall_share"] or 0, 11), name=True, spare=True),
    Column("read", lambda row: size(row["bytes_read"])),
    Column("major", lambda row: f"{row['major_faults'] or 0:,}"),
    Column("minor", lambda row: f"{row['minor_faults'] or 0:,}"),
)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _total(tensors: Sequence[Mapping[str, Any]]) -> str:
    return size(sum(tensor["size_bytes"] or 0 for tensor in tensors))


def _three(value: float) -> str:
    """Return a positive number with three significant digits, without an exponent."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"
