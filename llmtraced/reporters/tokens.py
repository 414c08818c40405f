"""What each token cost and where its time went: by phase, the slowest tokens, and all of them as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import polars as pl

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
    three,
    trust,
)
from llmtraced.schema import CAUSES

__all__ = ["draw", "pace", "render"]

_STEPS: Final = 1500
_PARTS: Final = {
    "compute_ns": (plots.REST, "computing"),
    "mapping_ns": ("#9ecae1", "mapping"),
    "wait_ns": (plots.STALL, "waiting"),
    "hard_read_ns": ("#a63603", "hard reads"),
    "unknown_ns": ("#e5e5e5", "not known"),
}
_WORDS: Final = {
    "compute_ns": "with no thread in a page fault on the model: computing",
    "mapping_ns": "mapping pages that were in memory",
    "wait_ns": "waiting for a read already under way",
    "hard_read_ns": "in major faults: reading from disk",
}
_CAUSES: Final = dict(zip(CAUSES, ("#a63603", plots.ONCE, "#009e73", "#e69f00", "#d0d0d0"), strict=True))
_COUNT: Final = "{:,.0f}".format
_SPREAD: Final = (
    ("duration", "duration_ns", duration),
    ("stall", "stall_ns", duration),
    ("compute", "compute_ns", duration),
    ("mapping", "mapping_ns", duration),
    ("waiting", "wait_ns", duration),
    ("hard read", "hard_read_ns", duration),
    ("read", "bytes_read", size),
    ("major faults", "major_faults", _COUNT),
    ("minor faults", "minor_faults", _COUNT),
)


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the tokens report: the spread per phase, then the ``top`` slowest tokens in order of time."""
    lines = [*heading(_headline(report), style), *trust(report, style), ""]
    for phase in report["phases"]:
        lines.append(style.bold(pace(phase)))
        if went := _went(phase):
            lines += went
        causes = {cause: phase["total"][f"{cause}_bytes"] for cause in CAUSES}
        if any(causes.values()):
            lines.append("  read for: " + ", ".join(f"{cause} {size(n)}" for cause, n in causes.items() if n))
        spread = [
            {"what": what, "show": show, **phase[key]} for what, key, show in _SPREAD if phase[key]["mean"] is not None
        ]
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
    """Draw where each token's time went, above the bytes that were read during it, by cause."""
    rows, each = _binned([row for row in report["tokens"] if row["duration_ns"] is not None])
    figure = plots.canvas(height=6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [row["token"] for row in rows]
    scale, unit = plots.unit([row["duration_ns"] for row in rows], plots.TIMES)
    whole = _stack(upper, rows, [(key, colour, what) for key, (colour, what) in _PARTS.items()], scale)
    upper.set_ylabel(f"{unit} per token")
    many = f", each step the mean of {each}" if each > 1 else ""
    what = f"{several(len(report['tokens']), 'token')}, one graph evaluation each{many}"
    upper.set_title(plots.title(report, what), loc="left", fontsize=10)
    scale, unit = plots.unit([row["bytes_read"] for row in rows])
    read = [(f"{cause}_bytes", colour, cause) for cause, colour in _CAUSES.items()]
    read = [one for one in read if any(row[one[0]] for row in rows)] or [("bytes_read", plots.ONCE, "read from disk")]
    bytes_read = _stack(lower, rows, read, scale)
    lower.set_ylabel(f"{unit} read per token")
    lower.set_xlabel("token (graph evaluation)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes, values in ((upper, whole), (lower, bytes_read)):
        plots.limit(axes, rows, values)
        plots.prompts(axes, rows)
        if rows:
            plots.legend(axes)
    if at:
        lower.set_xlim(report["tokens"][0]["token"] - 0.5, at[-1] + 0.5)
    return plots.drawn(figure, picture)


def _binned(rows: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return at most ``_STEPS`` rows, each the mean of so many tokens; the token is the last of them."""
    each = max(-(-len(rows) // _STEPS), 1)
    keys = ("duration_ns", "bytes_read", *_PARTS, *(f"{cause}_bytes" for cause in _CAUSES))
    values = {key: pl.Series([row.get(key) for row in rows], dtype=pl.Float64) for key in keys}
    frame = pl.DataFrame({"token": [row["token"] for row in rows], "phase": [row["phase"] for row in rows], **values})
    known = pl.sum_horizontal(key for key in _PARTS if key != "unknown_ns")
    prompts = (pl.col("phase") == "prompt").all()
    steps = (
        frame.with_columns(unknown_ns=pl.col("duration_ns") - known)
        .group_by(pl.int_range(pl.len()) // each, maintain_order=True)
        .agg(
            pl.col("token").last(),
            pl.when(prompts).then(pl.lit("prompt")).otherwise(pl.col("phase").last()).first().alias("phase"),
            pl.col(keys).fill_null(0).mean(),
        )
    )
    return steps.to_dicts(), each


def _stack(
    axes: Any, rows: Sequence[Mapping[str, Any]], parts: Sequence[tuple[str, str, str]], scale: float
) -> list[float]:
    """Draw the columns on top of each other; return the heights that they reach."""
    at, low = [row["token"] for row in rows], [0.0] * len(rows)
    for key, colour, label in parts:
        high = [below + row[key] / scale for below, row in zip(low, rows, strict=True)]
        if any(row[key] for row in rows):
            plots.area(axes, at, low, high, colour, label)
        low = high
    return low


def _headline(report: Mapping[str, Any]) -> str:
    """Return what the time of a token goes to: of decoding, or of the phase with the most graphs."""
    phases = report["phases"]
    if not phases:
        return "no token was seen"
    decoding = [one for one in phases if one["phase"] == "decode"]  # several models: the one that takes the time
    phase = max(
        decoding, key=lambda one: one["total"]["duration_ns"], default=max(phases, key=lambda one: one["graphs"])
    )
    parts = _parts(phase)
    if not parts:
        return f"{phase['phase']}: where the time of a token went is not known"
    most = max(parts, key=lambda key: parts[key])
    share = percent(parts[most], sum(parts.values()))
    return f"{phase['phase']}: a token takes {duration(phase['duration_ns']['mean'])}, {share} of it {_WORDS[most]}"


def _went(phase: Mapping[str, Any]) -> list[str]:
    parts = _parts(phase)
    if not parts:
        return []
    whole = sum(parts.values())
    lines = ["  went to: " + ", ".join(f"{_PARTS[key][1]} {percent(ns, whole)}" for key, ns in parts.items())]
    if phase["reads_in_flight"]:
        lines.append(f"  while reading, {phase['reads_in_flight']:.1f} threads at once waited for a read on average")
    return lines


def _parts(phase: Mapping[str, Any]) -> dict[str, int]:
    """Return where the time went; empty if it is not known of any token."""
    parts = {key: phase["total"][key] for key in _WORDS}
    return parts if any(parts.values()) else {}


def pace(phase: Mapping[str, Any]) -> str:
    """Return one line: how fast a phase was."""
    stall = "" if phase["stall_share"] is None else f", {phase['stall_share']:.0%} of the time stalled"
    rate = "" if phase["tokens_per_second"] is None else f", {three(phase['tokens_per_second'])} tokens/s"
    of = f" of {printable(phase['model'])}" if phase["model"] else ""
    counts = f"{several(phase['n_tokens'], 'token')} in {several(phase['graphs'], 'graph')}"
    return f"{phase['phase']}{of}: {counts}{rate}{stall}"


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
