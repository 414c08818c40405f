"""The questions that a trace answers: for each, how it is computed, printed and drawn.

``llmtraced report NAME`` and the page (:mod:`llmtraced.reporters.html`) both go through :data:`QUESTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmtraced.analysis import reread, summary, tokens
from llmtraced.analysis.trace import Trace
from llmtraced.reporters import reread as show_reread
from llmtraced.reporters import summary as show_summary
from llmtraced.reporters import tokens as show_tokens
from llmtraced.reporters.text import Style

__all__ = ["QUESTIONS", "Options", "Question"]


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for.

    Attributes:
        phase: only what happened in this phase; None: all.
        top: how many rows to name.
    """

    phase: str | None = None
    top: int = 10


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        asks: the question, in words.
        analyse: computes the report: a dict of plain values, what ``--json`` prints.
        render: prints it; ``rows`` rows of its tables.
        draw: draws it, as ``png``, ``svg`` or ``web`` (see :func:`llmtraced.reporters.plots.drawn`).
        rows: how many rows are printed and drawn unless told otherwise.
    """

    asks: str
    analyse: Callable[[Trace, Options], Mapping[str, Any]]
    render: Callable[[Mapping[str, Any], int, Style], str]
    draw: Callable[[Mapping[str, Any], str, int], bytes]
    rows: int


QUESTIONS: Final[Mapping[str, Question]] = {
    "summary": Question(
        "what was traced, for how long, how fast, what was read and what was waited for",
        lambda trace, o: summary.summary(trace, o.phase, o.top),
        show_summary.render,
        show_summary.draw,
        10,
    ),
    "reread": Question(
        "how much of each tensor was read from disk, and read again",
        lambda trace, o: reread.reread(trace, o.phase),
        show_reread.render,
        show_reread.draw,
        25,
    ),
    "tokens": Question(
        "time, stall, bytes read and page faults of each token, with percentiles",
        lambda trace, o: tokens.tokens(trace, o.phase),
        show_tokens.render,
        show_tokens.draw,
        20,
    ),
}
