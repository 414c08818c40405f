"""The experiment's matrix as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.errors import printable
from llmtraced.reporters import plots
from llmtraced.reporters.text import Column, Style, percent, size, table, three

__all__ = ["draw", "render"]


def render(report: Mapping[str, Any], style: Style) -> str:
    """Return the matrix, a line a cell, and what it was measured on."""
    machine, settings = report["machine"], report["settings"]
    return (
        "\n".join(
            [
                *table(report["cells"], _COLUMNS, style),
                "",
                f"medians of {settings['rounds']} rounds; readahead {settings['read_ahead_kb']} KB, "
                f"{settings['threads']} threads; {printable(machine['cpu'])}, {machine['cores']} cores, "
                f"kernel {machine['kernel']}",
            ]
        )
        + "\n"
    )


def _in_order(cell: Mapping[str, Any], phase: str) -> str:
    shares = [run["phases"][phase].get("sequential_byte_share") for run in cell["rounds"]]
    known = sorted(share for share in shares if share is not None)
    return percent(known[len(known) // 2], 1) if known else "-"


_COLUMNS: Final = (
    Column("model", lambda cell: printable(cell["model"]), name=True),
    Column("size", lambda cell: size(cell["model_bytes"]), spare=True),
    Column("memory", lambda cell: cell["level"]),
    Column("tokens/s", lambda cell: three(cell["tokens_per_second"]["median"]) if cell["tokens_per_second"] else "-"),
    Column(
        "min to max",
        lambda cell: (
            "{} to {}".format(*(three(cell["tokens_per_second"][end]) for end in ("min", "max")))
            if cell["tokens_per_second"]
            else "-"
        ),
        spare=True,
    ),
    Column("read a token", lambda cell: size(cell["bytes_per_token"])),
    Column("unique", lambda cell: size(cell["unique_bytes"])),
    Column("amplification", lambda cell: f"{cell['amplification']:.2f}" if cell["amplification"] else "-"),
    Column("stalled", lambda cell: percent(cell["stall_share"], 1)),
    Column("sequential prompt", lambda cell: _in_order(cell, "prompt"), spare=True),
    Column("decode", lambda cell: _in_order(cell, "decode"), spare=True),
)


def draw(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw speed, bytes read a token and amplification over the memory level, a line a model."""
    figure = plots.canvas(height=4)
    levels = list(dict.fromkeys(cell["level"] for cell in report["cells"]))
    names = list(dict.fromkeys(cell["model"] for cell in report["cells"]))
    parts = figure.subplots(1, 3)
    for name, colour, mark in zip(names, plots.SERIES * len(names), "osD^v<>" * len(names), strict=False):
        cells = {cell["level"]: cell for cell in report["cells"] if cell["model"] == name}
        at = [levels.index(level) for level in cells]
        speed = [cell["tokens_per_second"] or {"median": 0, "min": 0, "max": 0} for cell in cells.values()]
        middle = [one["median"] for one in speed]
        spans = [[one["median"] - one["min"] for one in speed], [one["max"] - one["median"] for one in speed]]
        look = {"color": colour, "marker": mark, "label": printable(name)}
        parts[0].errorbar(at, middle, spans, capsize=3, **look)
        parts[1].plot(at, [cell["bytes_per_token"] / 1e9 for cell in cells.values()], **look)
        parts[2].plot(at, [cell["amplification"] or float("nan") for cell in cells.values()], **look)
    parts[0].set_yscale("log")
    parts[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # not in TeX: names are shown as they are
    for axes, label in zip(parts, ("tokens/s", "GB read per token", "amplification (total / unique)"), strict=True):
        axes.set_ylabel(label)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_xlabel("memory for the model")
    for axes in parts[1:]:
        axes.set_ylim(bottom=0)
    parts[0].legend(frameon=False)
    return plots.drawn(figure, picture)
