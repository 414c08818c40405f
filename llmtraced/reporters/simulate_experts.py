"""A mixture with other amounts of RAM: which experts to keep, which to fetch before they are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmtraced.analysis.retention import BELADY, POLICIES
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    duration,
    heading,
    several,
    size,
    table,
    trust,
    wrapped,
)

__all__ = ["draw", "render"]

_SPARE: Final = ("lfu", "lrfu-64", "lrfu-512", "pinned")  # mostly no better than their neighbours
_SHOWN: Final = 2  # RAM sizes whose predictors are printed: the least, and the middle one


def render(report: Mapping[str, Any], style: Style) -> str:
    """Return what would be missing by RAM size and policy, and what each predictor would find of it."""
    lines = [*heading(_headline(report), style), *trust(report, style)]
    for words in _basis(report):
        lines += wrapped(words, style)
    lines += ["", *wrapped("bytes of experts missing per token, by what is kept", style)]
    lines += table(report["curve"], _RETENTION, style)
    for row in _some(report["curve"]):
        ram = f"{size(row['ram_bytes'])} ({row['ram_share']:.0%})"
        without = f"{duration(row['ns_per_token'])} a token without a guess"
        what = f"with {ram}, {row['best_policy']}: {size(row['missed_bytes_per_token'][row['best_policy']])} missing"
        lines += ["", *wrapped(f"{what}, {without}", style)]
        lines += table([_joined(report, one) for one in row["predictors"]], _PREDICTORS, style)
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw the missing bytes over RAM by policy, and what predictors find with the least RAM."""
    figure = plots.canvas(height=8)
    above, below = figure.subplots(2, 1)
    curve = report["curve"]
    across, width = plots.unit([row["ram_bytes"] for row in curve])
    shown = [policy for policy in POLICIES if policy not in _SPARE]
    up, unit = plots.unit([row["missed_bytes_per_token"][policy] for row in curve for policy in shown])
    for policy, colour in zip(shown, (*plots.SERIES[: len(shown) - 1], "#000000"), strict=True):
        values = [row["missed_bytes_per_token"][policy] / up for row in curve]
        line = "--" if policy == BELADY else "-"
        above.plot([row["ram_bytes"] / across for row in curve], values, line, color=colour, label=policy, marker=".")
    above.set_ylim(bottom=0)
    above.set_xlabel(f"{width} of RAM for the model's pages")
    above.set_ylabel(f"{unit} of experts missing per token")
    above.set_title(plots.title({**report, "phase": None}, _headline(report)), loc="left", fontsize=10)
    above.legend(frameon=False, fontsize=9, ncols=2)
    rows = [_joined(report, one) for one in curve[0]["predictors"] if one["width"] == 1]
    at = range(len(rows))
    for key, label, colour, shift in (
        ("recall", "of what is missing, guessed", plots.ONCE, -0.2),
        ("hidden_share", "and read in time", plots.SERIES[2], 0.2),
    ):
        below.barh([y + shift for y in at], [100 * (row[key] or 0) for row in rows], 0.38, color=colour, label=label)
    below.set_yticks(list(at), [f"{row['predictor']} ({duration(row['lead_ns'])})" for row in rows], fontsize=8)
    below.set_ylim(len(rows) - 0.4, -0.6)
    below.set_xlim(0, 100)
    below.set_xlabel(f"% with {curve[0]['ram_share']:.0%} of the model in RAM; in brackets how long before its use")
    below.legend(frameon=False, fontsize=9, loc="upper right")
    return plots.drawn(figure, picture)


def _some(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    lacking = [row for row in curve if row["missed_bytes_per_token"][row["best_policy"]]]
    return lacking if len(lacking) <= _SHOWN else [lacking[0], lacking[len(lacking) // 2]]


def _joined(report: Mapping[str, Any], worth: Mapping[str, Any]) -> dict[str, Any]:
    """Return one predictor's figures with those that do not depend on RAM."""
    alike = (worth["predictor"], worth["width"])
    found = next(one for one in report["predictors"] if (one["predictor"], one["width"]) == alike)
    return {**found, **worth}


def _headline(report: Mapping[str, Any]) -> str:
    used = size(report["used_expert_bytes_per_token"])
    return (
        f"{report['n_experts']} experts in {several(report['n_layers'], 'layer')}; a token uses {report['n_used']} of "
        f"each, {used} of {size(report['expert_bytes'])}"
    )


def _basis(report: Mapping[str, Any]) -> list[str]:
    disk, compute = report["disk_bytes_per_second"], report["compute_ns_per_token"]
    source = {"given": "as given", "trace": "the most in 100 ms of the trace", None: ""}[report["disk_source"]]
    counted = several(report["counted_tokens"], "token")
    learned = report["tokens"] - report["counted_tokens"]
    lines = [
        f"{counted} count, the {learned:,} before them are learned from; what every token uses, "
        f"{size(report['dense_bytes'])}, is taken to be in RAM",
        f"computing takes {duration(compute)} per token; "
        + ("the disk's speed is not known: --disk-bandwidth" if disk is None else f"disk: {size(disk)}/s, {source}"),
    ]
    if not report["router_scores"]:
        lines.append("routers as predictors: not in the trace; record with --router-scores")
    return lines


def _share(title: str, key: str, spare: bool = False) -> Column:
    return Column(title, lambda row: "-" if row[key] is None else f"{row[key]:.1%}", spare=spare)


def _missed(policy: str) -> Column:
    spare = policy in _SPARE
    return Column(policy, lambda row: size(row["missed_bytes_per_token"][policy]), spare=spare)


_RETENTION: Final = (
    Column("RAM", lambda row: size(row["ram_bytes"])),
    Column("of all", lambda row: f"{row['ram_share']:.0%}"),
    Column("experts", lambda row: f"{row['expert_slices']:,}"),
    *(_missed(policy) for policy in POLICIES),
)
_PREDICTORS: Final = (
    Column("predictor", lambda row: row["predictor"], name=True),
    Column("guesses", lambda row: f"{row['width']}x"),
    _share("right", "right_share", spare=True),
    Column("ahead", lambda row: duration(row["lead_ns"])),
    _share("recall", "recall"),
    _share("precision", "precision"),
    _share("in time", "hidden_share"),
    Column("in vain", lambda row: size(row["wasted_bytes_per_token"]), spare=True),
    Column("per token", lambda row: duration(row["ns_per_token"])),
)
