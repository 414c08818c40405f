"""What reports say, computed a second time in another way: DuckDB SQL over the same Parquet files.

:data:`CHECKS` has one function a report, which takes the trace as tables of SQL and the report, and asserts. To check
another report, write such a function in one of the modules and name it here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from helpers import need

from llmtraced.analysis.trace import open_trace
from llmtraced.reporters.questions import QUESTIONS, Options
from sql import advice, maps, order, reads, residency, times
from sql.database import Sql, opened

__all__ = ["ASKED", "CHECKS", "UNCHECKED", "check"]

CHECKS: Final[Mapping[str, Callable[[Sql, Mapping[str, Any]], None]]] = {
    "summary": reads.summary,
    "advise": advice.advise,
    "reread": reads.reread,
    "tokens": times.tokens,
    "pattern": order.pattern,
    "heatmap": maps.heatmap,
    "timeline": maps.timeline,
    "layers": reads.layers,
    "components": reads.components,
    "experts": order.experts,
    "cache": residency.cache,
}
"""Report → what asserts that its figures are those of SQL."""

_HEATMAPS: Final = [
    {"by": by, "value": value, "bins": bins}
    for by, bins in (("token", 7), ("time", 50))
    for value in ("bytes", "stall", "accesses")
]
ASKED: Final[Mapping[str, list[dict[str, Any]]]] = {
    "heatmap": [{}, *_HEATMAPS],
    "timeline": [{}, {"bins": 11, "small_gap": 65_536}],
}
"""Report → with which of its own options it is checked; by default, without any."""

UNCHECKED: Final[Mapping[str, str]] = {}
"""Report → why it is not checked here."""


def check(name: str, folder: Path, phase: str | None) -> Mapping[str, Any]:
    """Compute the report ``name`` of a trace and check it, with all of ASKED; return the first."""
    need(importlib.util.find_spec("duckdb"), "needs DuckDB (pip install duckdb)", "e2e")
    trace = open_trace(folder)
    sql = opened(folder, trace.session)
    sql.restrict(phase)
    reports = [QUESTIONS[name].ask(trace, Options(phase, 10, more)) for more in ASKED.get(name, [{}])]
    for report in reports:
        CHECKS[name](sql, report)
    return reports[0]
