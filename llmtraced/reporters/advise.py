"""What to do about it, most urgent first, and how much would be read with how much RAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import Column, Style, duration, heading, several, size, table, three, trust, wrapped

__all__ = ["draw", "evidence", "headline", "render"]

_MARKS: Final = {"act": "!", "note": "·", "fine": "✓"}
_CURVES: Final = (
    ("lru_bytes_per_token", plots.SERIES[0], "-", "least recently used goes first (as the kernel, nearly)"),
    ("pinned_bytes_per_token", plots.SERIES[1], "--", "as much as fits is pinned"),
    ("belady_bytes_per_token", plots.SERIES[2], ":", "the best possible"),
)


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the findings in order, each with its evidence and command; then ``top`` rows of the RAM curve."""
    lines = [*heading(headline(report), style), *trust(report, style)]
    for one in report["findings"]:
        lines += ["", *_finding(one, style)]
    rows = _rows(report, top)
    if rows:
        of = several(report["replayed_tokens"], f"{report['judged_phase'] or ''} token".strip())
        told = f"of {of}" if report["uses_source"] == "ops" else "if each token uses all weights once, in file order"
        lines += ["", *wrapped(f"read per token with so much RAM for the model's pages ({told})", style)]
        lines += table(rows, _COLUMNS, style)
    return "\n".join(lines) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """Return one line: what is most urgent."""
    urgent = [one for one in report["findings"] if one["severity"] == "act"]
    if urgent:
        more = f" (and {several(len(urgent) - 1, 'more thing')} to act on)" if len(urgent) > 1 else ""
        return f"{printable(urgent[0]['title'], 2000)}{more}"
    unknown = sum(one["unknown"] is not None for one in report["findings"])
    return "nothing to act on" + (f"; {several(unknown, 'question')} that this trace cannot answer" if unknown else "")


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - the whole curve is drawn
    """Draw bytes read per token over RAM, with the server's limit and what was measured."""
    figure = plots.canvas(height=5)
    axes = figure.subplots()
    curve, read, peak = report["curve"], report["bytes_read_per_token"], report["peak_resident_bytes"]
    limit = report["cgroup_limit_bytes"]
    known = [value for value in (peak, limit) if value is not None]
    across, width = plots.unit([*known, *(row["ram_bytes"] for row in curve)])
    up, height = plots.unit([read or 0, *(row["lru_bytes_per_token"] for row in curve)])
    at = [row["ram_bytes"] / across for row in curve]
    for key, colour, line, label in _CURVES if curve else ():
        axes.plot(at, [row[key] / up for row in curve], color=colour, linestyle=line, label=label)
    if limit is not None:
        axes.axvline(limit / across, color=plots.REST, linewidth=1.5, label=f"the server's memory limit, {size(limit)}")
    if read is not None and peak is not None:
        axes.plot(peak / across, read / up, "o", color="#000000", label=f"measured: {size(read)} per token")
    axes.set_xlabel(f"{width} of RAM for the model's pages; what else the server needs comes on top")
    axes.set_ylabel(f"{height} read per token")
    axes.set_xlim(0, None if curve or known else 1)
    axes.set_ylim(0, None if read or any(row["lru_bytes_per_token"] for row in curve) else 1)
    axes.set_title(plots.title(report, "read per token, over RAM"), loc="left", fontsize=10)
    if not curve:
        why = next((one["unknown"] for one in report["findings"] if one["finding"] == "ram" and one["unknown"]), None)
        words = f"no curve: {printable(why or 'what tokens use is not known')}"
        axes.text(0.5, 0.6, words, transform=axes.transAxes, ha="center", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize=9)
    return plots.drawn(figure, picture)


def _finding(one: Mapping[str, Any], style: Style) -> list[str]:
    mark = "?" if one["unknown"] else _MARKS[one["severity"]]
    title = wrapped(printable(one["title"], 2000), style, f"{mark} ", "  ")
    paint = style.warn if one["severity"] == "act" else str
    lines = [paint(line) for line in title]
    if one["severity"] == "fine":
        return lines
    if one["unknown"]:
        lines += wrapped(f"cannot be said from this trace: {one['unknown']}", style, "    ", "    ")
    lines += wrapped(evidence(one), style, "    ", "    ")
    lines += wrapped(one["why"], style, "    ", "    ")
    return lines + [line for command in (one["command"] or "").splitlines() for line in _command(command, style)]


def evidence(one: Mapping[str, Any]) -> str:
    """Return the figures that a finding stands on, those that are known."""
    known = {key: value for key, value in one["evidence"].items() if value not in (None, "")}
    return ", ".join(f"{_name(key)} {_value(key, value)}" for key, value in known.items())


def _command(command: str, style: Style) -> list[str]:
    """Return what to run, in one line however long, for it is to be copied; a comment that does not fit goes above."""
    line = f"    $ {printable(command, 4096)}"
    bare, _, comment = line.partition("   # ")
    if comment and len(line) > style.width:
        return [*wrapped(comment, style, "    # ", "    # "), bare]
    return [line]


def _name(key: str) -> str:
    """Return ``bytes_read_per_token`` as ``read per token``: units are beside the figures."""
    words = key.split("_")
    bare = [
        word for at, word in enumerate(words) if word not in ("bytes", "seconds") or (at and words[at - 1] == "per")
    ]
    return " ".join(bare)


def _value(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return printable(value)
    if "bytes" in key.split("_"):
        return size(value)
    if "seconds" in key.split("_"):
        return duration(value * 1e9)
    if key.endswith("share"):
        return f"{value:.0%}"
    return f"{value:,}" if isinstance(value, int) else three(value)


def _rows(report: Mapping[str, Any], top: int) -> list[Mapping[str, Any]]:
    """Return at most ``top`` rows of the curve, evenly spread, the first and the last among them."""
    curve = report["curve"]
    if len(curve) <= top:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / max(top - 1, 1))] for i in range(top)]


_COLUMNS: Final = (
    Column("RAM", lambda row: size(row["ram_bytes"])),
    Column("LRU", lambda row: size(row["lru_bytes_per_token"])),
    Column("pinned", lambda row: size(row["pinned_bytes_per_token"])),
    Column("best possible", lambda row: size(row["belady_bytes_per_token"])),
)
