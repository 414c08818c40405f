"""Reports as pictures (PNG, SVG), drawn with matplotlib, which is optional and imported only here.

``picture`` is ``png`` or ``svg``. Names are drawn as they are (never as math text) with control characters escaped.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.reporters.text import size

__all__ = ["plot_reread", "plot_summary", "plot_tokens", "require"]

_ONCE: Final = "#4c78a8"
_AGAIN: Final = "#e45756"
_STALL: Final = "#f58518"
_REST: Final = "#bab0ac"
_PROMPT: Final = "#e9edf2"
_KINDS: Final = ("png", "svg")
_BYTES: Final = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_TIMES: Final = (("seconds", 1e9), ("milliseconds", 1e6), ("microseconds", 1e3))


def plot_reread(report: Mapping[str, Any], picture: str, top: int = 25) -> bytes:
    """Draw the ``top`` most read tensors as bars: bytes read once and bytes read again."""
    tensors = [tensor for tensor in report["tensors"] if tensor["bytes_read"]][:top]
    figure = _figure(height=1.6 + 0.26 * max(len(tensors), 4))
    axes = figure.subplots()
    scale, unit = _unit([tensor["bytes_read"] for tensor in tensors])
    names = [printable(str(tensor["tensor_name"]), 48) for tensor in tensors]
    _stacked(axes, names, tensors, scale)
    axes.set_xlabel(f"{unit} read from disk")
    what = f"{size(report['total_bytes_read'])} read in all; the {len(tensors)} most read tensors"
    axes.set_title(_title(report, what), loc="left", fontsize=10)
    if tensors:
        _legend(axes)
    return _drawn(figure, picture)


def plot_tokens(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every token is drawn
    """Draw each token's duration (stall and the rest) above the bytes that were read during it."""
    rows = [row for row in report["tokens"] if row["duration_ns"] is not None]
    figure = _figure(height=5.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [row["token"] for row in rows]
    scale, unit = _unit([row["duration_ns"] for row in rows], _TIMES)
    stall = [min(row["stall_ns"] or 0, row["duration_ns"]) / scale for row in rows]
    whole = [row["duration_ns"] / scale for row in rows]
    _area(upper, at, [0.0] * len(at), stall, _STALL, "stalled on page faults")
    _area(upper, at, stall, whole, _REST, "the rest")
    upper.set_ylabel(f"{unit} per token")
    upper.set_title(_title(report, f"{len(rows)} tokens, one graph evaluation each"), loc="left", fontsize=10)
    scale, unit = _unit([row["bytes_read"] for row in rows])
    _area(lower, at, [0.0] * len(at), [row["bytes_read"] / scale for row in rows], _ONCE, "read from disk")
    lower.set_ylabel(f"{unit} read per token")
    lower.set_xlabel("token (graph evaluation)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes, values in ((upper, whole), (lower, [row["bytes_read"] / scale for row in rows])):
        _limit(axes, rows, values)
        _prompts(axes, rows)
    if at:
        lower.set_xlim(at[0] - 0.5, at[-1] + 0.5)
    if rows:
        _legend(upper)
    return _drawn(figure, picture)


def plot_summary(report: Mapping[str, Any], picture: str, top: int = 0) -> bytes:  # noqa: ARG001 - every layer is drawn
    """Draw, per layer, the bytes read once and again, and beside them the time that threads waited for it."""
    layers = [row for row in report["layers"] if row["bytes_read"] or row["stall_ns"]]
    names = ["outside layers" if row["layer"] in (None, -1) else str(row["layer"]) for row in layers]
    figure = _figure(height=1.8 + 0.2 * max(len(layers), 8))
    left, right = figure.subplots(1, 2, sharey=True)
    scale, unit = _unit([row["bytes_read"] for row in layers])
    _stacked(left, names, layers, scale)
    left.set_xlabel(f"{unit} read from disk")
    left.set_ylabel("layer")
    left.set_title(_title(report, "by layer"), loc="left", fontsize=10)
    scale, unit = _unit([row["stall_ns"] for row in layers], _TIMES)
    right.barh(range(len(layers)), [row["stall_ns"] / scale for row in layers], color=_STALL)
    right.set_xlabel(f"{unit} waited in page faults, all threads")
    if layers:
        _legend(right, left)
    return _drawn(figure, picture)


def require(path: Path) -> str:
    """Return the kind of picture that ``path`` names, ``png`` or ``svg``; nothing is drawn yet.

    Raises:
        LlmtracedError: another kind of file, or matplotlib is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _KINDS:
        raise LlmtracedError(f"--plot {printable(str(path))}: the name has to end in .png or .svg", USAGE)
    if importlib.util.find_spec("matplotlib") is None:
        raise LlmtracedError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    return kind


def _figure(height: float) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache
    mpl.rcParams.update({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(11, height), layout="constrained")


def _drawn(figure: Any, picture: str) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format=picture, dpi=120)
    return out.getvalue()


def _stacked(axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, Any]], scale: float) -> None:
    """Draw bars of bytes read once and again; rows of the same name stay separate."""
    at = range(len(rows))
    again = [row["reread_bytes"] / scale for row in rows]
    once = [(row["bytes_read"] - row["reread_bytes"]) / scale for row in rows]
    axes.barh(at, once, color=_ONCE, label="read once")
    axes.barh(at, again, left=once, color=_AGAIN, label="read again")
    axes.set_xlim(0, None if any(row["bytes_read"] for row in rows) else 1)
    axes.set_yticks(list(at), names, fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)  # the first row on top


def _area(axes: Any, at: Sequence[int], low: Sequence[float], high: Sequence[float], colour: str, label: str) -> None:
    """Fill one step a token from ``low`` to ``high``; many tokens cost no more to draw than few."""
    if at:
        edges = [at[0] - 0.5, *(token + 0.5 for token in at)]
        axes.fill_between(
            edges, [*low, low[-1]], [*high, high[-1]], step="post", color=colour, label=label, linewidth=0
        )


def _prompts(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shade the graphs that evaluated a prompt."""
    prompts = [(row["token"] - 0.5, 1) for row in rows if row["phase"] == "prompt"]
    if prompts:
        axes.broken_barh(
            prompts, (0, 1), transform=axes.get_xaxis_transform(), color=_PROMPT, zorder=-1, label="prompt"
        )


def _limit(axes: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> None:
    """Keep a few long prompts from flattening the decode tokens: cut the axis above them and say so."""
    decode = [value for row, value in zip(rows, values, strict=True) if row["phase"] == "decode"]
    if not decode or max(values, default=0) <= 3 * max(decode) or not max(decode):
        axes.set_ylim(bottom=0)
        return
    ceiling = 1.25 * max(decode)
    axes.set_ylim(0, ceiling)
    cut = [(row["token"], value) for row, value in zip(rows, values, strict=True) if value > ceiling]
    for token, value in cut[:5]:
        axes.annotate(f" ↑ {value:.3g}", (token, ceiling), va="top", fontsize=8)


def _legend(axes: Any, of: Any = None) -> None:
    """Put the legend above ``axes``, at the right; of other axes when given."""
    handles, labels = (of or axes).get_legend_handles_labels()
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)


def _title(report: Mapping[str, Any], what: str) -> str:
    models = ", ".join(
        printable(model if isinstance(model, str) else str(model.get("model"))) for model in report["models"]
    )
    phase = f", phase {report['phase']}" if report["phase"] else ""
    lost = "" if report["verdict"] == "complete" else f"\naccount: {printable(report['verdict'])}"
    return f"{models}: {what}{phase}{lost}"


def _unit(values: Sequence[float], units: Sequence[tuple[str, float]] = _BYTES) -> tuple[float, str]:
    """Return the scale and name of the largest unit that the largest value reaches."""
    most = max(values, default=0)
    name, scale = next((unit for unit in units if most >= unit[1]), units[-1])
    return scale, name
