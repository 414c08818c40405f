"""What each token cost: the spread by phase, the slowest tokens, and all of them as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    bar,
    duration,
    several,
    size,
    table,
    three,
    trust,
)

__all__ = ["draw", "pace", "render"]

_COUNT: Final = "{:,.0f}".format
_SPREAD: Final = (
    ("duration", "duration_ns", duration),
    ("stall", "stall_ns", duration),
    ("read", "bytes_read", size),
    ("major faults", "major_faults", _COUNT),
    ("minor faults", "minor_faults", _COUNT),
)


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the tokens report: the spread per phase, then the ``top`` slowest tokens in order of time."""
    lines = [*trust(report, style), ""]
    for phase in report["phases"]:
        lines.append(style.bold(pace(phase)))
        causes = {name.removesuffix("_bytes"): n for name, n in phase["total"].items() if name.endswith("_bytes") and n}
        if causes:
            lines.append("  read for: " + ", ".join(f"{cause} {size(n)}" for cause, n in causes.items()))
        spread = [{"what": what, "show": show, **phase[key]} for what, key, show in _SPREAD]
        lines += ["  " + line for line in table(spread, _SPREAD_COLUMNS, style)] + [""]
    if report["outside_bytes_read"]:
        lines += [f"outside tokens (loading, or before the first graph): {size(report['outside_bytes_read'])} read", ""]
    slowest = sorted(report["tokens"], key=lambda row: -(row["duration_ns"] or 0))[:top]
    if slowest:
        of = several(len(report["tokens"]), "token")
        lines.append(f"the slowest {len(slowest)} of {of} (one token = one graph evaluation)")
        lines += table(sorted(slowest, key=lambda row: int(row["token"])), _TOKEN_COLUMNS, style)
    else:
        lines.append("no token was seen: was the server asked anything while it was recorded?")
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every token is drawn
    """Draw each token's duration (stall and the rest) above the bytes that were read during it."""
    rows = [row for row in report["tokens"] if row["duration_ns"] is not None]
    figure = plots.canvas(height=5.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [row["token"] for row in rows]
    scale, unit = plots.unit([row["duration_ns"] for row in rows], plots.TIMES)
    stall = [min(row["stall_ns"] or 0, row["duration_ns"]) / scale for row in rows]
    whole = [row["duration_ns"] / scale for row in rows]
    plots.area(upper, at, [0.0] * len(at), stall, plots.STALL, "stalled on page faults")
    plots.area(upper, at, stall, whole, plots.REST, "the rest")
    upper.set_ylabel(f"{unit} per token")
    upper.set_title(plots.title(report, f"{len(rows)} tokens, one graph evaluation each"), loc="left", fontsize=10)
    scale, unit = plots.unit([row["bytes_read"] for row in rows])
    plots.area(lower, at, [0.0] * len(at), [row["bytes_read"] / scale for row in rows], plots.ONCE, "read from disk")
    lower.set_ylabel(f"{unit} read per token")
    lower.set_xlabel("token (graph evaluation)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes, values in ((upper, whole), (lower, [row["bytes_read"] / scale for row in rows])):
        plots.limit(axes, rows, values)
        plots.prompts(axes, rows)
    if at:
        lower.set_xlim(at[0] - 0.5, at[-1] + 0.5)
    if rows:
        plots.legend(upper)
    return plots.drawn(figure, picture)


def pace(phase: Mapping[str, Any]) -> str:
    """Return one line: how fast a phase was."""
    stall = "" if phase["stall_share"] is None else f", {phase['stall_share']:.0%} of the time stalled"
    rate = "" if phase["tokens_per_second"] is None else f", {three(phase['tokens_per_second'])} tokens/s"
    return (
        f"{phase['phase']}: {several(phase['n_tokens'], 'token')} in {several(phase['graphs'], 'graph')}{rate}{stall}"
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
