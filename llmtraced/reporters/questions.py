"""The questions that a trace answers: for each, how it is computed, printed and drawn.

``llmtraced report NAME`` and the page (:mod:`llmtraced.reporters.html`) both go through :data:`QUESTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llmtraced.analysis import advise, cache, experts, heatmap, layers, pattern, reread, summary, timeline, tokens
from llmtraced.analysis.trace import Trace
from llmtraced.reporters import advise as show_advise
from llmtraced.reporters import cache as show_cache
from llmtraced.reporters import experts as show_experts
from llmtraced.reporters import heatmap as show_heatmap
from llmtraced.reporters import layers as show_layers
from llmtraced.reporters import pattern as show_pattern
from llmtraced.reporters import reread as show_reread
from llmtraced.reporters import summary as show_summary
from llmtraced.reporters import timeline as show_timeline
from llmtraced.reporters import tokens as show_tokens
from llmtraced.reporters.text import Style
from llmtraced.values import size

__all__ = ["QUESTIONS", "Option", "Options", "Question"]


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for.

    Attributes:
        phase: only what happened in this phase; None: all.
        top: how many rows to name.
        more: the question's own options, by name; those that are missing have their defaults.
    """

    phase: str | None = None
    top: int = 10
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Option:
    """An option of one question.

    Attributes:
        default: its value unless told otherwise.
        help: what it does.
        choices: what it may be; empty: whatever ``parse`` takes.
        parse: turns a word into a value.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] = str


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        asks: the question, in words.
        analyse: computes the report: a dict of plain values, what ``--json`` prints.
        render: prints it; ``rows`` rows of its tables.
        draw: draws it, as ``png``, ``svg`` or ``web`` (see :func:`llmtraced.reporters.plots.drawn`).
        rows: how many rows are printed and drawn unless told otherwise.
        tables: keys of the report that are lists of like rows, to be shown as tables.
        options: its own options, by name (``small_gap`` is ``--small-gap``).
    """

    asks: str
    analyse: Callable[[Trace, Options], Mapping[str, Any]]
    render: Callable[[Mapping[str, Any], int, Style], str]
    draw: Callable[[Mapping[str, Any], str, int], bytes]
    rows: int
    tables: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)

    def ask(self, trace: Trace, asked: Options) -> Mapping[str, Any]:
        """Return the report, with defaults for options that were not given."""
        more = {name: option.default for name, option in self.options.items()}
        more |= {name: value for name, value in asked.more.items() if value is not None}
        return self.analyse(trace, Options(asked.phase, asked.top, more))


QUESTIONS: Final[Mapping[str, Question]] = {
    "summary": Question(
        "what was traced, for how long, how fast, what was read and what was waited for",
        lambda trace, o: summary.summary(trace, o.phase, o.top),
        show_summary.render,
        show_summary.draw,
        10,
    ),
    "advise": Question(
        "what to do about it: does the model fit, how much memory would help, is the disk the limit",
        lambda trace, o: advise.advise(trace, o.phase),
        show_advise.render,
        show_advise.draw,
        8,
        ("curve",),
    ),
    "reread": Question(
        "how much of each tensor was read from disk, and read again, and how soon after it had gone",
        lambda trace, o: reread.reread(trace, o.phase),
        show_reread.render,
        show_reread.draw,
        25,
        ("tensors", "layers", "components", "experts"),
    ),
    "tokens": Question(
        "time and where it went, bytes read and page faults of each token, with percentiles",
        lambda trace, o: tokens.tokens(trace, o.phase),
        show_tokens.render,
        show_tokens.draw,
        20,
        ("tokens",),
    ),
    "pattern": Question(
        "is the access sequence the same for each token, and what is it",
        lambda trace, o: pattern.pattern(trace, o.phase),
        show_pattern.render,
        show_pattern.draw,
        12,
        ("classes", "sequence"),
    ),
    "heatmap": Question(
        "which tensor, or which part of the file, was read, waited for or accessed, token by token",
        lambda trace, o: heatmap.heatmap(
            trace, o.phase, value=o.more["value"], by=o.more["by"], order=o.more["order"], bins=o.more["bins"]
        ),
        show_heatmap.render,
        show_heatmap.draw,
        32,
        options={
            "value": Option("bytes", "what is counted", heatmap.VALUES),
            "by": Option("token", "tensor by token, or place in the file by time", heatmap.AXES),
            "order": Option("file", "tensors as they lie in the file, or by layer and component", heatmap.ORDERS),
            "bins": Option(400, "columns at most", parse=int),
        },
    ),
    "timeline": Question(
        "in which order is the file read, and how sequentially",
        lambda trace, o: timeline.timeline(
            trace, o.phase, bins=o.more["bins"], small_gap_limit_bytes=o.more["small_gap"]
        ),
        show_timeline.render,
        show_timeline.draw,
        16,
        ("phases",),
        options={
            "bins": Option(200, "bins of time", parse=int),
            "small_gap": Option(timeline.SMALL_GAP, "the largest small gap, in bytes or such as 64K", parse=size),
        },
    ),
    "layers": Question(
        "what each layer was asked for, read and waited for",
        lambda trace, o: layers.layers(trace, o.phase),
        show_layers.render,
        show_layers.draw,
        100,
        ("layers",),
    ),
    "components": Question(
        "what each component (attn_q, ffn_up, …) was asked for, read and waited for",
        lambda trace, o: layers.components(trace, o.phase),
        show_layers.render,
        show_layers.draw,
        25,
        ("components",),
    ),
    "experts": Question(
        "which experts are chosen, how soon again, and what a cache of them would hit",
        lambda trace, o: experts.experts(trace, o.phase, o.more["layer"]),
        show_experts.render,
        show_experts.draw,
        10,
        ("layers", "hot_cold"),
        options={"layer": Option(None, "only this layer (default: all)", parse=int)},
    ),
    "cache": Question(
        "what the page cache did: what came in and why, what of it was of use, what stayed, what went",
        lambda trace, o: cache.cache(trace, o.phase),
        show_cache.render,
        show_cache.draw,
        20,
        ("causes", "tensors"),
    ),
}
"""In the order in which a page shows them."""
