"""Is the access sequence the same for each token: the answer, the classes, the sequence; and both as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    blocks,
    duration,
    heading,
    several,
    size,
    table,
    trust,
)

__all__ = ["draw", "render"]

_LETTERS: Final = "·ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OTHER: Final = "?"
_COLOURS: Final = (plots.ONCE, plots.STALL, "#9ecae9", "#a63603", "#785ef0", "#882255")
_REST: Final = plots.REST
_CELLS: Final = 2_000  # columns of the strip: more cannot be told apart


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the pattern report; ``top`` classes and ``top`` positions of the sequence are listed."""
    lines = [*heading(printable(report["answer"], 2000), style), *trust(report, style), ""]
    known = report["source"] == "ops"
    if known:
        lines += _wrapped(_phases(report), style.width)
        lines += _classes(report, top, style)
        lines += _wrapped(_experts(report, style.width), style.width)
    elif report["source"]:
        lines += _missed(report, style.width)
    if report["sequence"]:
        lines += _sequence(report, top, style)
    return "\n".join(lines) + "\n"


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="  ") or [""]]


def _phases(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in report["phases"]:
        same = f"{row['identical']:,} of {several(row['tokens'], 'token')} like the reference"
        others = "" if row["classes"] < 2 else f", {row['classes']:,} different sequences"
        usual = f"median {row['length']:,.0f} weights, {size(row['bytes'])} a token"
        lines.append(f"{row['phase']}: {same}{others}; {usual}")
    if report["unsized_uses"]:
        uses = several(report["unsized_uses"], "use")
        lines.append(
            f"for {uses} of merged experts the choice is not known: the bytes of those tokens are lower bounds"
        )
    return lines


def _classes(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    strip = "".join(_letter(number) for number in _rarest(report["tokens"], style.width - 4))
    cells = len(report["tokens"]) / max(len(strip), 1)
    binned = f"; {cells:,.0f} a cell, the rarest shows" if cells > 1.5 else ""
    lines = ["", f"the sequence of each token ({_LETTERS[0]}: the reference{binned})", f"  {strip}", ""]
    shown = report["classes"][:top]
    lines += table(shown, _CLASS_COLUMNS, style)
    if hidden := report["class_count"] - len(shown):
        lines.append(f"… {several(hidden, 'more sequence')} (--top N for more)")
    for row in shown[1:]:
        why = "; ".join(": ".join(text for text in one.values() if text) for one in row["reasons"])
        named = [f"{one['kind']} {printable(one['tensor_name'])}" for one in row["examples"][:2]]
        if more := row["missing"] + row["extra"] - len(named):
            named.append(f"{more:,} more")
        text = f"{_letter(row['class'])} differs by {', '.join(named)}. Reason: {printable(why, 2000)}"
        lines += textwrap.wrap(text, style.width, subsequent_indent="  ")
    return [*lines, ""]


def _experts(report: Mapping[str, Any], width: int) -> list[str]:
    experts = report["experts"]
    if not experts or experts["overlap"] is None:
        return []
    chance = "" if experts["chance_overlap"] is None else f" (chance: {experts['chance_overlap']:.1%})"
    layers = [layer for layer in experts["layers"] if layer["overlap"] is not None]
    fixed, moving = _split(report["sequence"])
    overlaps = [one["overlap"] for one in layers]
    cells = [overlaps[at] for at in _spread(len(overlaps), width - 40)]
    return [
        f"experts of successive tokens: overlap {experts['overlap']:.1%}{chance}, the same set in "
        f"{experts['identical_share']:.1%} of {experts['pairs']:,} comparisons",
        f"  by layer  {blocks(cells, max(overlaps) or 1)}  {min(overlaps):.1%} to {max(overlaps):.1%}",
        f"  a token needs {size(fixed)} that is the same each time, and {size(moving)} of chosen experts",
        "",
    ]


def _missed(report: Mapping[str, Any], width: int) -> list[str]:
    what = "page faults" if report["source"] == "faults" else "page-cache adds"
    text = (
        f"The order below is learned from {what}: when a weight was first seen in a token. A weight that was in memory "
        "is not seen, so sequences cannot be compared, and bytes are not known. Record with --detail ops to see the "
        "sequence itself."
    )
    return [*textwrap.wrap(text, width), ""]


def _sequence(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    sequence, scan = report["sequence"], report["scan"]
    steps = [f"{count:,} {name.removesuffix('_steps')}" for name, count in scan.items() if count]
    offsets = _offsets(sequence)
    cells = [offsets[at] for at in _spread(len(offsets), style.width - 44)]
    what = "the sequence" if report["source"] == "ops" else "the learned order"
    lines = [
        *_wrapped(
            [f"{what}: {several(len(sequence), 'weight')}; steps in the file: {', '.join(steps) or 'none'}"],
            style.width,
        ),
        f"  offset in the file  {blocks(cells, max(offsets) or 1)}  up to {size(max(offsets))}",
        "",
        *table(sequence[:top], _SEQUENCE_COLUMNS if report["source"] == "ops" else _LEARNED_COLUMNS, style),
    ]
    if len(sequence) > top:
        lines.append(f"… {len(sequence) - top:,} more (--top N for more)")
    return lines


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - everything is drawn
    """Draw each token's class and bytes, the experts that it shares with the one before, and the sequence's offsets."""
    tokens, known = report["tokens"], report["source"] in ("ops", None)
    key, label = ("expert_overlap", "experts shared\nwith the token\nbefore (Jaccard)")
    if not known:
        key, label = ("agreement", "neighbours in the\nlearned order")
    points = [row for row in tokens if row[key] is not None]
    heights = [*([0.25] if known else []), 1.0, *([0.8] if points else []), 2.2]
    figure = plots.canvas(height=1.6 + 1.7 * sum(heights))
    panels = list(figure.subplots(len(heights), 1, height_ratios=heights))
    answer = "\n".join(textwrap.wrap(printable(report["answer"], 2000), 115))
    title = plots.title(report, f"access sequence of {several(len(tokens), 'token')}\n{answer}")
    panels[0].set_title(title, loc="left", fontsize=10)
    at = [row["token"] for row in tokens]
    if known:
        _draw_strip(panels[0], tokens)
    _draw_bytes(panels[int(known)], tokens, known)
    if points:
        _draw_points(panels[-2], points, key, report["experts"])
        panels[-2].set_ylabel(label, fontsize=9)
    for axes in panels[:-1]:
        if at:
            axes.set_xlim(at[0] - 0.5, at[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=axes is panels[-2])
    panels[-2].set_xlabel("token (graph evaluation)")
    _draw_offsets(panels[-1], report["sequence"], known)
    return plots.drawn(figure, picture)


def _draw_bytes(axes: Any, tokens: Sequence[Mapping[str, Any]], known: bool) -> None:
    """Draw what each token uses; of many tokens in a cell the largest, so that a picture of any trace stays small."""

    def amount(row: Mapping[str, Any]) -> float:
        return float((row["bytes"] if known else row["length"]) or 0)

    edges = [round(at) for at in np.linspace(0, len(tokens), min(_CELLS, len(tokens)) + 1)]
    largest = [max(tokens[a:b], key=amount) for a, b in pairwise(edges)]
    values = [amount(row) for row in largest]
    scale, unit = plots.unit(values) if known else (1.0, "")
    scaled = [value / scale for value in values]
    last = [tokens[b - 1]["token"] for b in edges[1:]]
    plots.area(axes, last, [0.0] * len(last), scaled, plots.ONCE, "weights")
    plots.limit(axes, largest, scaled)
    axes.set_ylabel(f"{unit} used\nper token" if known else "weights seen\nper token", fontsize=9)


def _draw_points(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, experts: Mapping[str, Any] | None) -> None:
    """Draw one point a token; of experts also what chance would give."""
    values = [row[key] for row in rows]
    axes.plot([row["token"] for row in rows], values, ".", ms=3, color=plots.STALL, rasterized=True)
    chance = experts["chance_overlap"] if experts and key == "expert_overlap" else None
    if chance is not None:
        axes.axhline(chance, color="black", lw=1, ls="--", zorder=3, label=f"by chance: {chance:.0%}")
        plots.legend(axes)
    axes.set_ylim(0, min(1.03, max(0.2, 1.2 * max(values))))


def _draw_strip(axes: Any, tokens: Sequence[Mapping[str, Any]]) -> None:
    """Draw one cell a token, coloured by its class; of many tokens in a cell the rarest class shows."""
    axes.set_yticks([])
    axes.set_ylabel("sequence", rotation=0, ha="right", va="center")
    if not tokens:
        return
    first, last_token = tokens[0]["token"], tokens[-1]["token"]
    cells = _rarest(tokens, _CELLS)
    last = len(_COLOURS)
    shown = sorted({min(number, last) for number in cells})
    for number in shown:
        mine = np.array([min(cell, last) == number for cell in cells])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mine, [0]])))
        width = (last_token - first + 1) / len(cells)
        runs = [(first - 0.5 + a * width, (b - a) * width) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        label = "the reference" if number == 0 else f"sequence {_letter(number)}" if number < last else "others"
        axes.broken_barh(runs, (0, 1), color=(*_COLOURS, plots.REST)[number], label=label, linewidth=0)
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1.4), frameon=False, fontsize=8, labelspacing=0.2)


def _draw_offsets(axes: Any, sequence: Sequence[Mapping[str, Any]], known: bool) -> None:
    """Draw each weight of the sequence as the stretch of the file that it takes: a scan is a line upwards."""
    offsets = _offsets(sequence)
    scale, unit = plots.unit(offsets)
    kinds: tuple[tuple[str, str, bool | None], ...] = (
        ("the same bytes each time", plots.ONCE, False),
        ("some of its experts, others each time", plots.AGAIN, True),
        ("some of its experts", plots.STALL, None),
    )
    axes.plot([offset / scale for offset in offsets], color=plots.REST, lw=0.7, zorder=1)
    for label, colour, vary in kinds:
        some = [at for at, row in enumerate(sequence) if row["experts_vary"] is vary]
        low = [offsets[at] / scale for at in some]
        high = [(offsets[at] + (sequence[at]["size_bytes"] or 0)) / scale for at in some]
        if some:
            axes.vlines(some, low, high, color=colour, lw=max(0.8, min(4.0, 500 / len(sequence))), label=label)
            axes.plot(some, low, ".", ms=2.5, color=colour)
    axes.set_ylabel(f"offset in the file, {unit}")
    axes.set_xlabel(
        "position in the token's sequence of weights" if known else "position in the learned order of weights"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(-0.5, max(len(sequence), 1) - 0.5)
    axes.set_ylim(bottom=0)
    if sequence:
        plots.legend(axes)


def _rarest(tokens: Sequence[Mapping[str, Any]], cells: int) -> list[int]:
    """Return up to ``cells`` class numbers for the tokens in order; where several share a cell, the largest."""
    numbers = np.array([len(_LETTERS) if row["class"] is None else row["class"] for row in tokens], np.int64)
    return [int(some.max()) for some in np.array_split(numbers, min(cells, len(numbers)))] if len(numbers) else []


def _letter(number: int) -> str:
    return _LETTERS[number] if number < len(_LETTERS) else _OTHER


def _spread(count: int, cells: int) -> list[int]:
    """Return up to ``cells`` positions of ``count``, evenly spread."""
    return [round(at) for at in np.linspace(0, max(count - 1, 0), min(count, cells))]


def _offsets(sequence: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the weights' offsets as if the files of the models lay one behind the other."""
    ends: dict[tuple[str, int], int] = {}
    for row in sequence:
        file = (str(row["model"]), row["shard"] or 0)
        ends[file] = max(ends.get(file, 0), (row["offset_bytes"] or 0) + (row["size_bytes"] or 0))
    begins, total = {}, 0
    for file in sorted(ends):
        begins[file], total = total, total + ends[file]
    return [begins[str(row["model"]), row["shard"] or 0] + (row["offset_bytes"] or 0) for row in sequence]


def _split(sequence: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the bytes of weights that are the same for each token, and of merged experts, of which some are chosen."""
    fixed = sum(row["bytes"] or 0 for row in sequence if row["experts_vary"] is False)
    return fixed, sum(row["bytes"] or 0 for row in sequence) - fixed


def _range(of: Sequence[float | None], show: Any = "{:,}".format) -> str:
    low, high = of
    return "-" if low is None or high is None else show(low) if low == high else f"{show(low)} to {show(high)}"


_CLASS_COLUMNS: Final = (
    Column("", lambda row: _letter(row["class"]), name=True),
    Column("tokens", lambda row: f"{row['tokens']:,}"),
    Column("phases", lambda row: ", ".join(f"{count:,} {name}" for name, count in row["phases"].items()), name=True),
    Column("weights", lambda row: f"{row['length']:,}"),
    Column("bytes", lambda row: _range(row["bytes"], size)),
    Column("missing", lambda row: f"{row['missing']:,}", spare=True),
    Column("extra", lambda row: f"{row['extra']:,}", spare=True),
    Column("text tokens", lambda row: _range(row["n_tokens"]), spare=True),
    Column("graph nodes", lambda row: _range(row["graph_nodes"]), spare=True),
    Column("fingerprint", lambda row: row["fingerprint"], spare=True),
)
_PLACE: Final = (
    Column("", lambda row: str(row["position"])),
    Column("weight", lambda row: printable(str(row["tensor_name"])), name=True),
    Column("offset", lambda row: "-" if row["offset_bytes"] is None else f"{row['offset_bytes']:,}"),
)
_TIME: Final = (
    Column("begins after", lambda row: duration(row["at_ns"])),
    Column("of the token", lambda row: "-" if row["at_share"] is None else f"{row['at_share']:.1%}", spare=True),
)
_SEQUENCE_COLUMNS: Final = (
    *_PLACE,
    Column("bytes", lambda row: size(row["bytes"])),
    Column("operator", lambda row: printable(str(row["op"])), spare=True),
    *_TIME,
)
_LEARNED_COLUMNS: Final = (*_PLACE, *_TIME, Column("seen in", lambda row: f"{row['seen_share']:.0%} of tokens"))
