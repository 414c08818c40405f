"""What the page cache did, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import (
    Column,
    Style,
    bar,
    heading,
    percent,
    several,
    size,
    table,
    tensor_names,
    trust,
    wrapped,
)
from llmtraced.schema import CAUSES

__all__ = ["draw", "headline", "render"]

_COLOURS: Final = dict(zip(CAUSES, (plots.STALL, plots.ONCE, *plots.SERIES[2:4], plots.REST), strict=True))
_FATES: Final = (
    ("used", "used_bytes", plots.ONCE),
    ("not used", "wasted_bytes", plots.AGAIN),
    ("not known", "unknown_bytes", plots.REST),
    ("still there, not used yet", "pending_bytes", "#e6e1da"),
)
_LABELS: Final = 36  # names beside the picture, at most


def render(report: Mapping[str, Any], top: int, style: Style) -> str:
    """Return the cache report: by cause, by phase and process, then the ``top`` tensors that came in most."""
    lines = [*heading(headline(report), style), *trust(report, style), ""]
    if report["causes"]:
        lines += [*table(report["causes"], _BY_CAUSE, style), ""]
    for key, name in (("phases", "phase"), ("processes", "comm")):
        rows = report[key][:top]
        if rows:
            lines += [*table(rows, _moves(name), style)]
            if len(report[key]) > top:
                lines.append(f"… {several(len(report[key]) - top, f'more {name}')} (--top N for more)")
            lines.append("")
    lines += _memory(report, style)
    if report["out_of_order_bytes"]:
        lines += wrapped(
            f"came in twice or went out twice in a row: {size(report['out_of_order_bytes'])} (moves closer in time "
            "than their order is known)",
            style,
        )
    tensors = sorted((row for row in report["tensors"] if row["added_bytes"]), key=lambda row: -int(row["added_bytes"]))
    if tensors:
        lines += ["", *table(tensors[:top], _tensor_columns(tensors[:top]), style)]
    if len(tensors) > top:
        rest = sum(row["added_bytes"] for row in tensors[top:])
        lines.append(f"… {several(len(tensors) - top, 'more tensor')}, {size(rest)} came in (--top N for more)")
    outside = sum(row["added_bytes"] for row in report["other"])
    if outside:
        lines.append(f"outside tensors (header, padding): {size(outside)} came in")
    return "\n".join(lines) + "\n"


def headline(report: Mapping[str, Any]) -> str:
    """Return one line: what came in, what of it was of no use, what is in the cache."""
    came, went = report["added_bytes"], report["evicted_bytes"]
    if not came and not went:
        return "the page cache did nothing: nothing of the model came in or went out"
    moved = f"{size(came)} came into the page cache, {size(went)} went out"
    if report["wasted_share"] is None:
        return moved
    left = report["used_bytes"] + report["wasted_bytes"] + report["unknown_bytes"]
    unknown = f", {percent(report['unknown_bytes'], left)} perhaps" if report["unknown_bytes"] else ""
    return f"{moved}; {percent(report['wasted_bytes'], left)} of it left without having been used{unknown}"


def draw(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every tensor is drawn
    """Draw what came in by cause over time, the resident share of each tensor, and what became of it by cause."""
    figure = plots.canvas(height=9)
    upper, middle, lower = figure.subplots(3, 1, height_ratios=(2, 4, max(len(report["causes"]), 1) * 0.35))
    middle.sharex(upper)
    what = f"{size(report['added_bytes'])} came into the page cache, {size(report['evicted_bytes'])} went out"
    figure.suptitle(plots.title(report, what), x=0.01, ha="left", fontsize=10)  # apart from the legend
    _over_time(upper, report)
    _resident(figure, middle, report)
    _fates(lower, report["causes"])
    return plots.drawn(figure, picture)


def _over_time(axes: Any, report: Mapping[str, Any]) -> None:
    bins = report["bins"]
    edges = _edges(bins)
    seconds = edges[1] - edges[0]
    scale, unit = plots.unit(
        [sum(bins[f"{cause}_bytes"][i] for cause in CAUSES) / seconds for i in range(len(edges) - 1)]
    )
    low = [0.0] * (len(edges) - 1)
    for cause in CAUSES:
        high = [below + n / seconds / scale for below, n in zip(low, bins[f"{cause}_bytes"], strict=True)]
        if any(bins[f"{cause}_bytes"]):
            steps = {"step": "post", "linewidth": 0, "color": _COLOURS[cause], "label": f"in: {cause}"}
            axes.fill_between(edges, [*low, low[-1]], [*high, high[-1]], **steps)
        low = high
    out = [n / seconds / scale for n in bins["evicted_bytes"]]
    axes.step(edges, [*out, out[-1]], where="post", color="#000000", linewidth=0.8, label="out")
    axes.set_ylabel(f"{unit}/s")
    axes.set_ylim(0, None if any(low) or any(out) else 1)
    axes.set_xlim(edges[0], edges[-1])
    axes.tick_params(labelbottom=False)
    plots.legend(axes)


def _resident(figure: Any, axes: Any, report: Mapping[str, Any]) -> None:
    """Draw tensors as high as they are large, in the order of the file."""
    rows = [row for row in report["tensors"] if row["size_bytes"]]
    bottoms = [0.0]
    for row in rows:
        bottoms.append(bottoms[-1] + row["size_bytes"])
    edges = _edges(report["bins"])
    share = [row["resident_share"] for row in rows] or [[0.0] * (len(edges) - 1)]
    ends = bottoms if rows else [0.0, 1.0]
    mesh = axes.pcolormesh(edges, ends, share, cmap="cividis", vmin=0, vmax=1, rasterized=True)
    figure.colorbar(mesh, ax=axes, label="share in the cache", pad=0.01)
    axes.set_ylim(ends[-1], 0)  # the beginning of the file on top
    axes.set_ylabel(f"{size(bottoms[-1])} of tensors, in file order")
    axes.set_xlabel("seconds since the recording began" if report["phase"] is None else "seconds since the phase began")
    ticks = _places(rows, ends)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)


def _places(rows: Sequence[Mapping[str, Any]], ends: Sequence[float]) -> list[tuple[float, str]]:
    """Return where layers, and large tensors outside them, lie: the middle and the name, as many as can be read."""
    found: list[tuple[float, str]] = []
    for name, run in groupby(zip(rows, ends, ends[1:], strict=False), lambda one: _place(one[0])):
        spans = list(run)
        low, high = spans[0][1], spans[-1][2]
        at, apart = (low + high) / 2, ends[-1] / _LABELS
        seen = name.startswith("layer ") or high - low >= apart
        if seen and (not found or at - found[-1][0] >= apart):
            found.append((at, name))
    return found


def _place(row: Mapping[str, Any]) -> str:
    inside = row["layer"] is not None and row["layer"] >= 0
    return f"layer {row['layer']}" if inside else printable(str(row["component"]), 20)


def _fates(axes: Any, causes: Sequence[Mapping[str, Any]]) -> None:
    scale, unit = plots.unit([row["added_bytes"] for row in causes])
    at = range(len(causes))
    left = [0.0] * len(causes)
    for name, key, colour in _FATES:
        width = [row[key] / scale for row in causes]
        if any(width):
            axes.barh(at, width, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set_yticks(list(at), [row["cause"] for row in causes])
    axes.set_ylim(max(len(causes), 1) - 0.4, -0.6)
    axes.set_xlim(0, None if any(left) else 1)
    axes.set_xlabel(f"{unit} that came in, by cause")
    if causes:
        plots.legend(axes)


def _edges(bins: Mapping[str, Sequence[int]]) -> list[float]:
    """Return the edges of the bins in seconds since the first."""
    starts = bins["start_ns"]
    width = starts[1] - starts[0] if len(starts) > 1 else 1
    return [(start - starts[0]) / 1e9 for start in [*starts, starts[-1] + width]]


def _memory(report: Mapping[str, Any], style: Style) -> list[str]:
    limit = report["cgroup_limit_bytes"]
    of = f" of {size(report['model_bytes'])}" if report["model_bytes"] else ""
    before = report["resident_before_bytes"]
    kept = f"plus what was there when the recording began ({size(before)} at least) and never left"
    return [
        *wrapped(
            f"in the cache: {size(report['mean_resident_bytes'])}{of} on average, "
            f"{size(report['peak_resident_bytes'])} at most; memory limit: "
            f"{'none known' if limit is None else size(limit)}",
            style,
        ),
        *(wrapped(kept, style, "  ", "  ") if before else []),
    ]


def _moves(name: str) -> list[Column]:
    return [
        Column(name if name == "phase" else "process", lambda row: printable(str(row[name])), name=True),
        Column("in", lambda row: size(row["added_bytes"])),
        *(_by(cause) for cause in CAUSES),
        Column("out", lambda row: size(row["evicted_bytes"])),
    ]


def _by(cause: str) -> Column:
    return Column(cause, lambda row: size(row[f"{cause}_bytes"]), spare=True)


_BY_CAUSE: Final = (
    Column("cause", lambda row: row["cause"], name=True),
    Column("in", lambda row: size(row["added_bytes"])),
    Column("used", lambda row: size(row["used_bytes"])),
    Column("not used", lambda row: size(row["wasted_bytes"])),
    Column("share", lambda row: "-" if row["wasted_share"] is None else f"{row['wasted_share']:.1%}"),
    Column("", lambda row: bar(row["wasted_share"] or 0), name=True, spare=True),
    Column("not known", lambda row: size(row["unknown_bytes"])),
    Column("still there", lambda row: size(row["pending_bytes"])),
)


def _tensor_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    return [
        *tensor_names(rows),
        Column("size", lambda row: size(row["size_bytes"])),
        Column("in", lambda row: size(row["added_bytes"])),
        Column("out", lambda row: size(row["evicted_bytes"]), spare=True),
        Column("used", lambda row: size(row["used_bytes"])),
        Column("not used", lambda row: size(row["wasted_bytes"])),
        Column("not known", lambda row: size(row["unknown_bytes"]), spare=True),
        Column("in cache", lambda row: _share(row["mean_resident_share"])),
        Column("", lambda row: bar(row["mean_resident_share"] or 0), name=True, spare=True),
    ]


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
