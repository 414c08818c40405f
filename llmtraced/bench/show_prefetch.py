"""The figures of ``bench prefetch`` as text and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from llmtraced.bench.prefetch_figures import BEST, COMPARATORS, FITS, MOST_BOUND_SHARE, OFF, predictor_rows
from llmtraced.bench.show import machine_lines
from llmtraced.errors import printable
from llmtraced.reporters.plots import AGAIN, ONCE, REST, STALL, canvas, drawn
from llmtraced.reporters.text import Column, Style, duration, size, table, three, wrapped

__all__ = ["plot_prefetch", "render_prefetch"]

_PRESSURE: Final = {"cgroup": "in a memory cgroup", "lock": "the rest of the machine's memory locked"}


def render_prefetch(report: Mapping[str, Any], style: Style) -> str:
    """Return the report as text: a table a condition, the goals, what was left out."""
    settings = report["settings"]
    lines = [
        *machine_lines(report),
        *wrapped(
            f"{printable(settings['model'])} ({size(settings['model_bytes'])}), {settings['threads']} threads, "
            f"{' '.join(settings['server_options'])}; {settings['rounds']} rounds of {settings['tokens']} tokens, "
            f"{settings['prompt_tokens']} of prompt; {_PRESSURE[settings['pressure']]}",
            style,
        ),
        *(line for condition in report["conditions"] for line in _condition(condition, style)),
        "",
        *(
            line
            for name, why in report["skipped"].items()
            for line in wrapped(f"left out: {name}: {printable(why)}", style)
        ),
    ]
    if not report["identical"]:
        lines.append(style.warn("the answers are NOT the same in all strategies"))
    else:
        lines.append("identical: every strategy gave the same text")
    return "\n".join([*lines, *_targets(report["targets"], style), ""])


def _condition(condition: Mapping[str, Any], style: Style) -> list[str]:
    disk, bound = condition["disk_bytes_per_s"], condition["bound_ms"]
    rows = [
        {"name": name, **found} for name, found in condition["strategies"].items() if found["tokens_per_s"] is not None
    ]
    heading = (
        f"memory {printable(condition['memory'])}: limit {size(condition['limit_bytes'])}, of which "
        f"{size(condition['own_bytes'])} the server's own; readahead {condition['read_ahead_kb']} KB"
    )
    about = (
        f"a token uses {size(condition['bytes_per_token'])}, {size(condition['fitting_bytes'])} fit; the disk gives "
        f"{size(disk['median'])}/s ({size(disk['min'])} to {size(disk['max'])}); bound "
        f"{bound['median']:.0f} ms a token (computing alone: {condition['compute_ms']:.0f} ms). Both at once: a token "
        f"takes {condition['busy_ms']:.0f} ms while the disk gives {size(condition['busy_disk_bytes_per_s'])}/s; so "
        f"{condition['together_ms']['median']:.0f} ms"
    )
    failed = [f"{name}: {printable(why)}" for name, found in condition["strategies"].items() for why in found["failed"]]
    unsettled = [
        f"{name}: not settled in round {one['round'] + 1}"
        for name, found in condition["strategies"].items()
        for one in found["rounds"]
        if not one.get("settled", True)
    ]
    doubtful = [
        f"{row['name']}: {row['bound_share']['median']:.0%} of the bound: other processes used the cores, or the disk "
        "was faster than between the rounds; measure again on a quiet machine"
        for row in rows
        if row["bound_share"] and row["bound_share"]["median"] > MOST_BOUND_SHARE
    ]
    return [
        "",
        *(style.bold(line) for line in wrapped(heading, style)),
        *wrapped(about, style),
        *table(rows, _COLUMNS if any(row["mixture_bound_share"] for row in rows) else _DENSE_COLUMNS, style),
        *(["", *table(guesses, _GUESS_COLUMNS, style)] if (guesses := predictor_rows(condition)) else []),
        *(style.warn(line) for text in (*failed, *unsettled, *doubtful) for line in wrapped(text, style)),
    ]


def _median(key: str, show: Callable[[float], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "-" if row[key] is None else show(row[key]["median"])


def _ms(value: float) -> str:
    return duration(value * 1e6)


def _seconds(value: float) -> str:
    return duration(value * 1e9)


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _range(row: Mapping[str, Any]) -> str:
    return "{} to {}".format(*(three(row["tokens_per_s"][end]) for end in ("min", "max")))


_COLUMNS: Final = (
    Column("strategy", lambda row: _label(row["name"]), name=True),
    Column("tokens/s", _median("tokens_per_s", three)),
    Column("min to max", _range, spare=True),
    Column(": off", _median("ratio", _times)),
    Column("of bound", _median("bound_share", _percent)),
    Column("of both", _median("together_share", _percent), spare=True),
    Column("of experts' bound", _median("mixture_bound_share", _percent)),
    Column("missing", _median("missing_bytes_per_token", size)),
    Column("stall", _median("stall_ms_per_token", _ms), spare=True),
    Column("server reads", _median("server_bytes_per_token", size)),
    Column("helper reads", _median("helper_bytes_per_token", size)),
    Column("prompt", _median("prompt_ms", _ms)),
    Column("prompt : off", _median("prompt_ratio", _times), spare=True),
    Column("major", _median("major_faults_per_token", lambda value: f"{value:,.0f}"), spare=True),
    Column("CPU server", _median("server_cpu_s_per_token", _seconds), spare=True),
    Column("helper", _median("helper_cpu_s_per_token", _seconds), spare=True),
    Column("machine", _median("machine_cpu_s_per_token", _seconds), spare=True),
    Column("charged", _median("charged_bytes", size), spare=True),
    Column("peak", _median("peak_bytes", size), spare=True),
)

_DENSE_COLUMNS: Final = tuple(c for c in _COLUMNS if c.title not in ("of experts' bound", "missing"))
_GUESS_COLUMNS: Final = (
    Column("strategy", lambda row: row["strategy"], name=True),
    Column("experts guessed by", lambda row: row["predictor"], name=True),
    *(
        Column(title, lambda row, key=key: "-" if row[key] is None else f"{row[key]:.1%}")  # type: ignore[misc]
        for title, key in (("right", "right"), ("recall", "recall"), ("precision", "precision"))
    ),
    Column("ahead", lambda row: duration(None if row["mean_ahead_s"] is None else row["mean_ahead_s"] * 1e9)),
)


def _label(name: str) -> str:
    """Return what a strategy is called in a table or picture."""
    words = {FITS: "fits (no limit)", "load-none": "--load-mode none", "load-dio": "--load-mode dio"}
    return f"{name} KB" if name.startswith("readahead") else words.get(name, name)


def _targets(found: Mapping[str, Mapping[str, Any]], style: Style) -> list[str]:
    lines = []
    for name, target in found.items():
        cells = [
            f"{condition}: {'failed' if (value := target['measured'][condition]) is None else _times(value)}, "
            f"{'met' if met else 'missed'}"
            for condition, met in target["met"].items()
        ]
        text = f"target {name} {target['limit']}: {'; '.join(cells) or 'not measured'}"
        lines += [line if all(target["met"].values()) else style.warn(line) for line in wrapped(text, style)]
    return lines


def plot_prefetch(report: Mapping[str, Any], picture: str) -> bytes:
    """Draw the speed of each strategy with every round, and the bound, a row a condition."""
    conditions: Sequence[Mapping[str, Any]] = report["conditions"]
    shown = [
        {name: found for name, found in condition["strategies"].items() if name != FITS} for condition in conditions
    ]
    heights = [1.1 + 0.3 * len(found) for found in shown]
    figure = canvas(height=0.4 + sum(heights))
    rows = figure.subplots(len(conditions), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, condition, strategies in zip(rows, conditions, shown, strict=True):
        for i, (name, found) in enumerate(strategies.items()):
            speed = found["tokens_per_s"]
            if speed is None:
                axes.annotate(f" {printable(found['failed'][0])}" if found["failed"] else "", (0, i), va="center")
                continue
            axes.barh(i, speed["median"], color=_colour(name))
            axes.plot(speed["values"], [i] * len(speed["values"]), "|", color="black")
            ratio = "" if name == OFF or found["ratio"] is None else f", {found['ratio']['median']:.1f} x"
            axes.annotate(f"  {three(speed['median'])}{ratio}", (speed["max"], i), va="center", fontsize=9)
        bound = 1e3 / condition["bound_ms"]["median"]
        axes.axvline(bound, color=AGAIN, linewidth=1)
        axes.annotate(" bound", (bound, 1), xycoords=("data", "axes fraction"), va="bottom", color=AGAIN, fontsize=9)
        fastest = max(
            (found["tokens_per_s"]["max"] for found in strategies.values() if found["tokens_per_s"]), default=0
        )
        axes.set_xlim(0, 1.15 * max(bound, fastest))
        axes.set_yticks(range(len(strategies)), [_label(name) for name in strategies])
        axes.set_ylim(max(len(strategies), 1) - 0.4, -0.6)
        axes.set_title(
            f"memory {printable(condition['memory'])}, readahead {condition['read_ahead_kb']} KB",
            loc="left",
            fontsize=10,
            pad=16,  # above the word "bound"
        )
    rows[-1].set_xlabel("tokens per second, median and rounds")
    figure.suptitle(
        f"{printable(report['settings']['model'])}: with the sidecar, and without", x=0.01, ha="left", fontsize=11
    )
    return drawn(figure, picture)


def _colour(name: str) -> str:
    if name == OFF or name.split()[0] in COMPARATORS:
        return REST
    return STALL if name == BEST else ONCE
