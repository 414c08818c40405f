"""Which experts are chosen and what a cache of them would hit: as tables, and as four pictures on one sheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Final

import numpy as np

from llmtraced.analysis.experts import hot_cold
from llmtraced.errors import LlmtracedError, printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import Column, Style, bars, duration, percent, several, size, table, trust

__all__ = ["draw", "headline", "hot_list", "render"]

_POLICIES: Final = (
    ("belady", "Belady (the optimum)", "#000000", "--"),
    ("pinned", "pinned by frequency, in hindsight", "#b8892f", "-."),
    ("lfu", "LFU", "#e45756", ":"),
    ("lru", "LRU", "#4c78a8", "-"),
)
_LEARNED: Final = (
    ("second_half_pinned", "pinned by frequency in the first half", "#b8892f", "-."),
    ("second_half_lru", "LRU", "#4c78a8", "-"),
)


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the experts report; ``top`` layers and slices are listed."""
    lines = [*(style.bold(line) for line in _wrapped([headline(report)], style)), *trust(report, style)]
    if report["state"] == "dense":
        return "\n".join(lines) + "\n"
    if report["unbacked_bytes"]:
        lines.append(f"not used from the mapped file, so reads are not visible: {size(report['unbacked_bytes'])}")
    if report["state"] == "routed":
        lines += ["", *_wrapped(_habits(report), style), "", *_caches(report, style), "", *_layers(report, top, style)]
        lines += ["", *_hottest(report, top, style)]
    else:
        lines += ["", *_wrapped([f"to see the choices: {_remedy(report)}"], style), "", *_most_read(report, top, style)]
    return "\n".join(lines) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """Return one line: how many experts there are, how many are used, and how unevenly."""
    if report["state"] == "dense":
        return "the model has no experts: it is dense, every token needs all of it"
    what = f"{report['n_experts']} experts in {several(report['n_layers'], 'layer')}, {size(report['size_bytes'])}"
    if report["state"] == "unrouted":
        of = f" in phase {report['phase']}" if report["phase"] else ""
        return f"{what}; the trace does not say which were chosen{of}; {size(report['bytes_read'])} were read"
    never = report["n_slices"] - report["n_slices_used"]
    hottest = f"the hottest tenth gets {_hottest_tenth(report):.0%} of the choices"
    each = report["selections"] / report["routing_rows"]
    cold = f", {never:,} of {report['n_slices']:,} slices get none" if never else ""
    return f"{what}; {each:.3g} chosen for each token; {hottest}{cold}"


def hot_list(report: Mapping[str, Any]) -> str:
    """Return every slice, hottest first, as CSV; the columns are those of :func:`llmtraced.analysis.experts.hot_cold`.

    Raises:
        LlmtracedError: the trace does not tell which experts were chosen.
    """
    if report["state"] != "routed":
        raise LlmtracedError(f"no list of hot experts: {headline(report)}")
    out = io.StringIO()
    rows = hot_cold(report)
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - all is drawn
    """Draw expert use over layers (over tokens, of a single layer), hit rates, repeats by layer and reuse distances."""
    routed = report["state"] == "routed"
    sheet = [["heat", "heat"], ["whole", "later"], ["repeats" if report["layer"] is None else "reuse", "reuse"]]
    figure = plots.canvas(height=9 if routed else 1 if report["state"] == "dense" else 4)
    panels = figure.subplot_mosaic(sheet if routed else sheet[:1])
    lines = plots.title(report, headline(report)).split("\n")
    title = "\n".join(part for line in lines for part in wrap(line, 130))
    panels["heat"].set_title(title, loc="left", fontsize=10)
    if report["state"] == "dense":
        panels["heat"].set_axis_off()
    elif routed and report["layer"] is not None:
        _draw_matrix(figure, panels["heat"], report)
    else:
        _draw_heat(figure, panels["heat"], report)
    if routed:
        _draw_curves(panels["whole"], report, _POLICIES, "from an empty cache")
        _draw_curves(panels["later"], report, _LEARNED, "second half of the tokens")
        if "repeats" in panels:
            _draw_repeats(panels["repeats"], report)
        _draw_reuse(panels["reuse"], report)
    return plots.drawn(figure, picture)


def _wrapped(sentences: Sequence[str], style: Style) -> list[str]:
    return [line for one in sentences for line in wrap(one, style.width, subsequent_indent="  ")]


def _habits(report: Mapping[str, Any]) -> list[str]:
    """Return what a prefetcher wants to know, in sentences."""
    order, reuse, guess = report["sequence"], report["reuse"]["tokens"], report["coactivation"]
    of = f" of {order['phase']}" if order["phase"] else ""
    lines = []
    if report["repeat_next"] is not None:
        again = _against(report["repeat_next"], report["repeat_next_by_chance"], "by chance")
        lines.append(f"chosen by the token before as well: {again} of a token's experts")
    if report["repeat_8"] is not None:
        lines[-1] += (
            f"; by one of the 8 before: {_against(report['repeat_8'], report['repeat_8_by_chance'], 'by chance')}"
        )
    if reuse["p50"] is not None:
        apart = report["cache"]["stack_distance"]["p50"]
        lines.append(
            f"needed again after {reuse['p50']:,.0f} tokens (median; 90% within {reuse['p90']:,.0f}, "
            f"99% within {reuse['p99']:,.0f}), with {apart or 0:,.0f} other slices in between (median)"
        )
    if guess["recall"] is not None:
        first, second = (
            _against(guess[f"recall{wide}"], guess[f"frequency_recall{wide}"], "from frequencies alone")
            for wide in ("", "_double")
        )
        lines.append(f"the next layer's experts, guessed from this layer's: {first}; guessing twice as many: {second}")
    if order["read_per_used"] is not None:
        lines.append(
            f"{several(order['evaluations'], 'token')}{of} used {size(order['used_bytes'])} of experts and "
            f"{size(order['bytes_read'])} were read: {order['read_per_used']:.2f} bytes for each byte used"
        )
    return lines


def _against(share: float, other: float | None, what: str) -> str:
    return f"{share:.1%}" + ("" if other is None else f" ({other:.1%} {what})")


def _caches(report: Mapping[str, Any], style: Style) -> list[str]:
    cache, order = report["cache"], report["sequence"]
    over = several(cache["evaluations"], "token")
    if not cache["complete"]:
        over += f" of {order['evaluations']:,} (stretches, evenly spread)"
    phase = f", {order['phase']}" if order["phase"] else ""
    first = percent(cache["first_accesses"], cache["accesses"])
    what = f"hit rates of a cache of experts, replayed over {over}{phase}; {first} are first uses"
    pinned = "pinned: what these tokens use most, known in hindsight; 2nd half: pinned by what the first half uses most"
    return [
        *(style.bold(line) for line in _wrapped([what], style)),
        *table(cache["curve"], _CURVE, style),
        *_wrapped([pinned], style),
    ]


def _layers(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    rows = report["layers"]
    rest = f"… {several(len(rows) - top, 'more layer')} (--top N for more)"
    return [*table(rows[:top], _LAYER, style), *([rest] if len(rows) > top else [])]


def _hottest(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    rows = [row for row in report["hot_cold"] if row["selections"]]
    never = [row for row in report["hot_cold"] if not row["selections"]]
    lines = table(rows[:top], [*_SLICE, bars(rows[:top], "selections")], style)
    if len(rows) > top:
        lines.append(f"… {several(len(rows) - top, 'more slice')} (--top N for more; --json has all)")
    if never:
        lines.append(
            f"never chosen: {several(len(never), 'slice')}, {size(sum(row['bytes'] for row in never))}; "
            f"{size(sum(row['bytes_read'] for row in never))} of them were read all the same"
        )
    return lines


def _most_read(report: Mapping[str, Any], top: int, style: Style) -> list[str]:
    rows = sorted((row for row in report["hot_cold"] if row["bytes_read"]), key=lambda row: -row["bytes_read"])
    if not rows:
        return ["no expert was read from disk"]
    rest = f"… {several(len(rows) - top, 'more slice')} (--top N for more; --json has all)"
    shown = table(rows[:top], [*_SLICE[:2], *_SLICE[4:], bars(rows[:top], "bytes_read")], style)
    return [*shown, *([rest] if len(rows) > top else [])]


def _remedy(report: Mapping[str, Any]) -> str:
    if report["routing_recorded"]:
        return "look at another phase, or at all of them"
    if report["detail"] in (None, "faults"):
        return "record with --detail ops"
    return (
        f"it was recorded with --detail {printable(str(report['detail']))}, so either nothing was asked of the server, "
        "or its graphs were not understood (`llmtraced check --pid`)"
    )


def _hottest_tenth(report: Mapping[str, Any]) -> float:
    """Return the share of all choices that the hottest tenth of the slices gets."""
    tenth = max(round(report["n_slices"] / 10), 1)
    return float(sum(row["selections"] for row in report["hot_cold"][:tenth]) / max(report["selections"], 1))


def _draw_heat(figure: Any, axes: Any, report: Mapping[str, Any]) -> None:
    layers = report["layers"]
    routed = report["state"] == "routed"
    at = {one["layer"]: row for row, one in enumerate(layers)}
    values = np.full((len(layers), report["n_experts"]), np.nan)
    for row in report["hot_cold"]:
        even = layers[at[row["layer"]]]["n_experts"]
        values[at[row["layer"]], row["expert"]] = row["share"] * even if routed else row["bytes_read"]
    scale, unit = (1.0, "") if routed else plots.unit([float(np.nanmax(values))])
    _image(figure, axes, values / scale, "choices, 1: its even share" if routed else f"{unit} read")
    step = max(len(layers) // 12, 1)
    axes.set_yticks(range(0, len(layers), step), [str(one["layer"]) for one in layers[::step]])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")


def _draw_matrix(figure: Any, axes: Any, report: Mapping[str, Any]) -> None:
    """Draw one layer's experts over tokens."""
    (layer,) = report["layers"]
    bins = report["matrix_bins"]
    _image(figure, axes, np.array(layer["matrix"], float), "times chosen")
    step = max(len(bins) // 12, 1)
    axes.set_xticks(range(0, len(bins), step), [str(one["first_token"]) for one in bins[::step]])
    axes.set_xlabel(f"token (graph evaluation); layer {layer['layer']}")
    axes.set_ylabel("expert")


def _image(figure: Any, axes: Any, values: Any, label: str) -> None:
    most = float(np.nanpercentile(values, 99.5))  # one very hot expert does not make all others dark
    extend = "max" if np.nanmax(values) > most else "neither"
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=most or 1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label, pad=0.01, extend=extend)


def _draw_curves(axes: Any, report: Mapping[str, Any], policies: Sequence[tuple[str, ...]], what: str) -> None:
    curve = report["cache"]["curve"]
    for key, label, colour, line in policies:
        axes.plot(
            [100 * row["share"] for row in curve], [100 * row[key] for row in curve], line, color=colour, label=label
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"cache, % of {size(report['size_bytes'])} of experts; {what}")
    axes.set_ylabel("hits, %")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _draw_repeats(axes: Any, report: Mapping[str, Any]) -> None:
    rows = [row for row in report["layers"] if row["repeat_next"] is not None]
    at = [row["layer"] for row in rows]
    for name, label, colour in (
        ("repeat_8", "in the last 8 tokens", "#4c78a8"),
        ("repeat_next", "in the last token", "#b8892f"),
    ):
        chance = f"{name}_by_chance"
        for key, line, shade, what in ((name, "-o", colour, label), (chance, ":", colour, f"{label}, by chance")):
            known = [(x, 100 * row[key]) for x, row in zip(at, rows, strict=True) if row[key] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), line, color=shade, label=what, markersize=3, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("experts chosen again, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    if rows:
        axes.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)


def _draw_reuse(axes: Any, report: Mapping[str, Any]) -> None:
    bins = report["reuse"]["histogram"]
    total = report["reuse"]["again_accesses"]
    names = [("" if one["from_tokens"] == one["to_tokens"] else "≤") + str(one["to_tokens"]) for one in bins]
    axes.bar(range(len(bins)), [100 * one["accesses"] / total for one in bins], color=plots.ONCE)
    step = len(bins) // 9 + 1
    axes.set_xticks(range(0, len(bins), step), names[::step], fontsize=8)
    axes.set_xlabel("tokens since the expert was used last")
    axes.set_ylabel("share of later uses, %")


def _rate(title: str, key: str, spare: bool = False) -> Column:
    return Column(title, lambda row: "-" if row[key] is None else f"{row[key]:.1%}", spare=spare)


_CURVE: Final[Sequence[Column]] = (
    Column("cache", lambda row: size(row["bytes"])),
    Column("of all", lambda row: f"{row['share']:.0%}"),
    Column("slices", lambda row: f"{row['slices']:,}"),
    _rate("LRU", "lru"),
    _rate("LFU", "lfu"),
    _rate("pinned", "pinned"),
    _rate("Belady", "belady"),
    _rate("2nd half: LRU", "second_half_lru", spare=True),
    _rate("pinned", "second_half_pinned", spare=True),
)
_LAYER: Final[Sequence[Column]] = (
    Column("layer", lambda row: str(row["layer"])),
    Column("experts", lambda row: str(row["n_experts"])),
    Column("active", lambda row: "-" if row["active_share"] is None else f"{row['active_share']:.1%}"),
    Column("never", lambda row: str(row["never_used"])),
    _rate("top 10%", "top_tenth_share"),
    Column("uneven", lambda row: "-" if row["variation"] is None else f"±{row['variation']:.0%}"),
    Column("Gini", lambda row: "-" if row["gini"] is None else f"{row['gini']:.2f}", spare=True),
    _rate("next", "repeat_next"),
    _rate("(chance)", "repeat_next_by_chance", spare=True),
    _rate("in 8", "repeat_8"),
    _rate("(chance)", "repeat_8_by_chance", spare=True),
    Column("read", lambda row: size(row["bytes_read"])),
    Column("again", lambda row: size(row["reread_bytes"]), spare=True),
    Column("stall", lambda row: duration(row["stall_ns"])),
)
_SLICE: Final[Sequence[Column]] = (
    Column("layer", lambda row: str(row["layer"])),
    Column("expert", lambda row: str(row["expert"])),
    Column("chosen", lambda row: f"{row['selections']:,}"),
    Column("of layer", lambda row: f"{row['share']:.1%}"),
    Column("size", lambda row: size(row["bytes"])),
    Column("read", lambda row: size(row["bytes_read"])),
    Column("again", lambda row: size(row["reread_bytes"])),
    Column("major", lambda row: f"{row['major_faults']:,}"),
    Column("minor", lambda row: f"{row['minor_faults']:,}", spare=True),
    Column("stall", lambda row: duration(row["stall_ns"])),
)
