"""Reports on a made-up trace against SQL over the same files; on a real one: tests/e2e/test_reports_duckdb.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from sql import CHECKS, UNCHECKED, check
from sql.database import opened

from llmtraced.analysis.trace import open_trace
from llmtraced.bench.synthetic import write_trace
from llmtraced.reporters.questions import QUESTIONS, Options

pytest.importorskip("duckdb")


@pytest.fixture(scope="module", params=[True, False], ids=["moe", "dense"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sql") / "trace"
    write_trace(folder, 12_000, moe=request.param, n_tensors=33, model_bytes=30_000_000)
    return folder


@pytest.mark.parametrize("phase", [None, "decode"])
@pytest.mark.parametrize("name", CHECKS)
def test_a_report_says_what_sql_says(trace: Path, name: str, phase: str | None) -> None:
    check(name, trace, phase)


def test_every_report_is_checked() -> None:
    assert set(QUESTIONS) == set(CHECKS) | set(UNCHECKED)


TAMPERED: dict[str, list[tuple[Any, ...]]] = {
    "advise": [("bytes_read_per_token",), ("tokens",)],
    "summary": [("faults", "minor"), ("layers", 1, "reread_bytes"), ("phases", 0, "duration_ns", "p90")],
    "reread": [("tensors", 3, "unique_bytes"), ("tensors", 0, "away_ns", "min"), ("layers", 0, "bytes_read")],
    "tokens": [("tokens", 2, "mapping_ns"), ("tokens", 1, "readahead_bytes"), ("outside_bytes_read",)],
    "pattern": [("tokens", 2, "bytes"), ("class_count",), ("classes", 0, "tokens")],
    "heatmap": [("rows", 2, "values", 1), ("total",)],
    "timeline": [("phases", 1, "backward_count"), ("total", "resumed_bytes"), ("map", "cells", "bytes", 5)],
    "layers": [("layers", 1, "op_ns"), ("stall_ns",)],
    "components": [("components", 0, "unique_bytes")],
    "experts": [("hot_cold", 0, "stall_ns"), ("layers", 0, "repeat_8"), ("cache", "curve", 5, "lru")],
    "cache": [("causes", 0, "used_bytes"), ("bins", "resident_bytes", 9), ("tensors", 4, "wasted_bytes")],
}


@pytest.mark.parametrize(
    ("trace", "name"),
    [(moe, name) for moe in (True, False) for name in CHECKS if moe or name != "experts"],
    ids=lambda value: {True: "moe", False: "dense"}.get(value, value),
    indirect=["trace"],
)
def test_a_figure_that_is_wrong_is_found(trace: Path, name: str) -> None:
    found = open_trace(trace)
    sql = opened(trace, found.session)
    sql.restrict(None)
    report = QUESTIONS[name].ask(found, Options())
    CHECKS[name](sql, report)
    for path in TAMPERED[name]:
        wrong: Any = copy.deepcopy(report)
        place = wrong
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] += 1
        with pytest.raises(AssertionError):
            CHECKS[name](sql, wrong)
