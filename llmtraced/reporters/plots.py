"""Reports as pictures (PNG, SVG), drawn with matplotlib, which is optional and imported only here.

``picture`` is ``png`` or ``svg``. Names are drawn as they are (never as math text) with control characters escaped.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmtraced.errors import USAGE, LlmtracedError, printable

__all__ = [
    "AGAIN",
    "BYTES",
    "ONCE",
    "PROMPT",
    "REST",
    "SERIES",
    "STALL",
    "TIMES",
    "area",
    "canvas",
    "drawn",
    "legend",
    "limit",
    "prompts",
    "require",
    "stacked",
    "title",
    "unit",
]

ONCE: Final = "#4c78a8"
AGAIN: Final = "#e45756"
STALL: Final = "#f58518"
REST: Final = "#bab0ac"
SERIES: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by everyone
PROMPT: Final = "#8a94a030"  # a tint that reads on white and on black
_KINDS: Final = ("png", "svg")
BYTES: Final = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
TIMES: Final = (("seconds", 1e9), ("milliseconds", 1e6), ("microseconds", 1e3))


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


def canvas(height: float) -> Any:
    """Return an empty matplotlib figure, 11 inches wide and ``height`` high."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache
    mpl.rcParams.update({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(11, height), layout="constrained")


def drawn(figure: Any, picture: str) -> bytes:
    """Return the finished picture: ``png``, ``svg``, or ``web``, an SVG to be part of a page.

    A ``web`` picture has no background, keeps text as text, and takes the page's own colour for all that is black, so
    that it reads on a light and on a dark page.
    """
    import matplotlib as mpl

    out = io.BytesIO()
    if picture != "web":
        figure.savefig(out, format=picture, dpi=120)
        return out.getvalue()
    for axes in figure.axes:
        axes.set_facecolor("none")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmtraced"}):
        figure.savefig(out, format="svg", dpi=120, transparent=True, metadata={"Date": None})
    svg = out.getvalue().decode()
    svg = svg[svg.index("<svg") :]  # without the XML and document type declarations
    for black in ("#000000", "#000"):
        svg = re.sub(rf"((?:stroke|fill): ?){black}\b", r"\1currentColor", svg)
    return svg.encode()


def stacked(axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, Any]], scale: float) -> None:
    """Draw bars of bytes read once and again; rows of the same name stay separate."""
    at = range(len(rows))
    again = [row["reread_bytes"] / scale for row in rows]
    once = [(row["bytes_read"] - row["reread_bytes"]) / scale for row in rows]
    axes.barh(at, once, color=ONCE, label="read once")
    axes.barh(at, again, left=once, color=AGAIN, label="read again")
    axes.set_xlim(0, None if any(row["bytes_read"] for row in rows) else 1)
    axes.set_yticks(list(at), names, fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)  # the first row on top


def area(axes: Any, at: Sequence[int], low: Sequence[float], high: Sequence[float], colour: str, label: str) -> None:
    """Fill one step a token from ``low`` to ``high``; many tokens cost no more to draw than few."""
    if at:
        edges = [at[0] - 0.5, *(token + 0.5 for token in at)]
        axes.fill_between(
            edges, [*low, low[-1]], [*high, high[-1]], step="post", color=colour, label=label, linewidth=0
        )


def prompts(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Shade the graphs that evaluated a prompt."""
    prompts = [(row["token"] - 0.5, 1) for row in rows if row["phase"] == "prompt"]
    if prompts:
        axes.broken_barh(prompts, (0, 1), transform=axes.get_xaxis_transform(), color=PROMPT, zorder=-1, label="prompt")


def limit(axes: Any, rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> None:
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


def legend(axes: Any, of: Any = None) -> None:
    """Put the legend above ``axes``, at the right; of other axes when given."""
    handles, labels = (of or axes).get_legend_handles_labels()
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)


def title(report: Mapping[str, Any], what: str) -> str:
    """Return a picture's title: the models, ``what``, the phase asked for, and what is missing if anything is."""
    models = ", ".join(
        printable(model if isinstance(model, str) else str(model.get("model"))) for model in report["models"]
    )
    phase = f", phase {report['phase']}" if report["phase"] else ""
    lost = "" if report["verdict"] == "complete" else f"\naccount: {printable(report['verdict'])}"
    return f"{models}: {what}{phase}{lost}"


def unit(values: Sequence[float], units: Sequence[tuple[str, float]] = BYTES) -> tuple[float, str]:
    """Return the scale and name of the largest unit that the largest value reaches."""
    most = max(values, default=0)
    name, scale = next((unit for unit in units if most >= unit[1]), units[-1])
    return scale, name
