"""What a finding of the advise report is made of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

import polars as pl

from llmtraced.analysis.facts import Facts
from llmtraced.errors import printable

__all__ = [
    "OPS",
    "SEVERITIES",
    "Finding",
    "finding",
    "least",
    "merged",
    "names",
    "path",
    "rate",
    "readahead",
    "silent",
    "size",
    "speed",
]

OPS: Final = "llmtraced record --pid PID --detail ops --duration 60s -o TRACE"
"""What records the weights that each token uses."""

SEVERITIES: Final = ("act", "note", "fine")
"""Most urgent first. What the trace cannot tell is a ``note`` with ``unknown``."""


class Finding(TypedDict):
    """One finding. ``evidence`` holds plain figures, units in the names; None: not known."""

    finding: str
    severity: str
    title: str
    evidence: dict[str, Any]
    why: str
    command: str | None
    unknown: str | None  # why it cannot be said from this trace; None: it can


def finding(
    name: str,
    severity: str,
    title: str,
    why: str,
    command: str | None = None,
    unknown: str | None = None,
    *,
    evidence: Mapping[str, Any],
) -> Finding:
    """Return a finding."""
    return {
        "finding": name,
        "severity": severity,
        "title": title,
        "evidence": dict(evidence),
        "why": why,
        "command": command,
        "unknown": unknown,
    }


def silent(name: str, title: str, why: str, *, evidence: Mapping[str, Any]) -> Finding:
    """Return a finding that a trace without tokens does not allow."""
    lack = "no token that ended was recorded: ask the server something while it is recorded"
    return finding(name, "note", title, why, OPS, unknown=lack, evidence=evidence)


def merged(it: Facts) -> bool:
    """Return whether the model has experts."""
    return it.trace.tensors.filter(pl.col("n_experts") > 0).height > 0


def least(it: Facts, share: float) -> int | None:
    """Return the least RAM of the curve with which LRU reads at most this share of what is read and used."""
    now = min(it.read_per_token or 0, it.used_per_token or 0)
    enough = [r["ram_bytes"] for r in it.curve if r["lru_bytes_per_token"] <= share * now]
    return min(enough, default=None)


def names(rows: pl.DataFrame) -> str:
    """Return the three processes with most bytes, by name."""
    ranked = rows.group_by("comm").agg(pl.col("bytes").sum()).sort("bytes", "comm", descending=[True, False])
    return ", ".join(f"{printable(name)} {size(nbytes)}" for name, nbytes in ranked.head(3).iter_rows())


def readahead(kb: int) -> str:
    """Return the commands that set the readahead."""
    return (
        "llmtraced check --pid PID   # tells the MAJOR:MINOR of the model's disk, and its readahead now\n"
        f"echo {kb} | sudo tee /sys/class/bdi/MAJOR:MINOR/read_ahead_kb\n"
        "# restart the server: a file takes its readahead when it is opened"
    )


def path(it: Facts) -> str:
    """Return the trace's path for a shell."""
    return shlex.quote(printable(str(it.trace.path), 4096))


def rate(amount: float, per: float) -> float | None:
    """Return ``amount / per``; None of nothing."""
    return amount / per if per else None


def speed(rate: float | None) -> str:
    """Return tokens per second as text."""
    return "no limit" if rate is None else f"{rate:.3g}"


def size(value: float | None) -> str:
    """Return bytes in decimal units with three digits."""
    if value is None:
        return "?"
    units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")
    at = 0
    while value >= 999.5 and at < len(units) - 1:
        value, at = value / 1000, at + 1
    return f"{value:.3g} {units[at]}"
