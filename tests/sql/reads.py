"""What was read, and read again: reread, summary, layers, components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest

from sql.database import Sql, agree, shares

__all__ = ["components", "layers", "phases", "reread", "summary"]

TOTALS: Final = """
    SELECT coalesce((SELECT sum(bytes) FROM pagecache WHERE action = 'add'), 0)::BIGINT AS total_bytes_read,
           coalesce((SELECT sum(unique_bytes) FROM uniquely), 0)::BIGINT AS unique_bytes
"""

SUMS: Final = """
    sum(size_bytes)::BIGINT AS size_bytes, sum(bytes_read)::BIGINT AS bytes_read,
    sum(unique_bytes)::BIGINT AS unique_bytes, sum(reread_bytes)::BIGINT AS reread_bytes,
    sum(major_faults)::BIGINT AS major_faults, sum(minor_faults)::BIGINT AS minor_faults,
    sum(stall_ns)::BIGINT AS stall_ns
"""


def totals(sql: Sql, report: Mapping[str, Any]) -> None:
    figures = sql.row(TOTALS)
    agree(report, figures)
    shares(report, {"amplification": (figures["total_bytes_read"], figures["unique_bytes"])})


def reread(sql: Sql, report: Mapping[str, Any]) -> None:
    totals(sql, report)
    assert report["reread_bytes"] == report["total_bytes_read"] - report["unique_bytes"]
    outside = sql.row(
        "SELECT coalesce(sum(bytes), 0)::BIGINT AS other_bytes_read FROM pagecache "
        "WHERE action = 'add' AND tensor_name IS NULL"
    )
    agree(report, outside)
    expected = sql.by("FROM per_tensor", "model", "tensor_name")
    found = {(tensor["model"], tensor["tensor_name"]): tensor for tensor in report["tensors"]}
    assert found.keys() == expected.keys()
    for key, figures in expected.items():
        agree(found[key], figures, key)
    order = [tensor["bytes_read"] for tensor in report["tensors"]]
    assert order == sorted(order, reverse=True)
    for key, by in (("layers", "layer"), ("components", "component")):
        groups = sql.by(f"SELECT model, {by}, {SUMS} FROM per_tensor GROUP BY ALL", "model", by)
        assert {(group["model"], group[by]) for group in report[key]} == groups.keys()
        for group in report[key]:
            figures = groups[group["model"], group[by]]
            agree(group, {name: figures[name] for name in ("size_bytes", "bytes_read", "unique_bytes", "reread_bytes")})
            shares(group, {"amplification": (figures["bytes_read"], figures["unique_bytes"])})
    _experts(sql, report["experts"])
    _returned(sql, report)


def _experts(sql: Sql, experts: Sequence[Mapping[str, Any]]) -> None:
    sql.follow()
    # Parts of pages are disjoint, so what is unique is the sum over the different ones.
    expected = sql.by(
        f"""
        WITH parts AS (
            SELECT model, tensor_name, expert, low, count(*) AS times, any_value(size) AS size
            FROM moves WHERE action = 'add' AND {sql.counted} AND expert >= 0 GROUP BY ALL
        )
        SELECT p.model, t.layer, p.expert, sum(times * size)::BIGINT AS bytes_read, sum(size)::BIGINT AS unique_bytes
        FROM parts p JOIN tensors t USING (model, tensor_name) GROUP BY ALL
        """,
        "model",
        "layer",
        "expert",
    )
    for expert in experts:
        key = expert["model"], expert["layer"], expert["expert"]
        agree(expert, expected.pop(key, {"bytes_read": 0, "unique_bytes": 0}), key)
    assert expected == {}


def _returned(sql: Sql, report: Mapping[str, Any]) -> None:
    """Check what came in after it had gone, and how long it was away: percentiles by bytes, to their 1.6 %."""
    expected = sql.by(
        f"""
        WITH again AS (
            SELECT model, tensor_name, size, timestamp - last_time AS ns, token - last_token AS graphs
            FROM moves WHERE action = 'add' AND {sql.counted} AND last_action = 'evict'
        ), doubled AS (
            FROM again UNION ALL SELECT NULL, '(all)', size, ns, graphs FROM again
        ), ranked AS (
            SELECT *, sum(size) OVER (PARTITION BY model, tensor_name) AS whole,
                   sum(size) OVER (PARTITION BY model, tensor_name ORDER BY ns) AS by_ns,
                   sum(size) OVER (PARTITION BY model, tensor_name ORDER BY graphs) AS by_graphs
            FROM doubled
        )
        SELECT model, tensor_name, any_value(whole)::BIGINT AS returned_bytes, min(ns) AS min_ns,
               min(ns) FILTER (by_ns * 2 >= whole) AS p50_ns, min(ns) FILTER (by_ns * 10 >= whole * 9) AS p90_ns,
               min(graphs) AS min_tokens, min(graphs) FILTER (by_graphs * 2 >= whole) AS p50_tokens,
               min(graphs) FILTER (by_graphs * 10 >= whole * 9) AS p90_tokens
        FROM ranked GROUP BY ALL
        """,
        "model",
        "tensor_name",
    )
    for row in ({**report, "model": None, "tensor_name": "(all)"}, *report["tensors"]):
        figures = expected.pop((row["model"], row["tensor_name"]), None)
        if figures is None:
            assert (row["returned_bytes"], row["away_ns"], row["away_tokens"]) == (0, None, None)
            continue
        assert row["returned_bytes"] == figures["returned_bytes"]
        for unit in ("ns", "tokens"):
            for point in ("min", "p50", "p90"):
                got, value = row[f"away_{unit}"][point], figures[f"{point}_{unit}"]
                assert got == pytest.approx(value, rel=0 if point == "min" else 0.016, abs=0), (
                    row["tensor_name"],
                    point,
                )
    assert all(name is None for _, name in expected)  # what is in no tensor is in the sum only


def summary(sql: Sql, report: Mapping[str, Any]) -> None:
    totals(sql, report["reread"])
    faults = sql.row(
        "SELECT count(*) FILTER (major) AS major, count(*) FILTER (NOT major) AS minor, "
        "count(*) FILTER (major IS NULL) AS unknown, coalesce(sum(latency_ns), 0)::BIGINT AS stall_ns FROM faults"
    )
    agree(report["faults"], faults)
    for key, column in (("bytes_by_cause", "cause"), ("bytes_by_process", "comm")):
        moved = sql.by(
            f"SELECT {column}, sum(bytes)::BIGINT AS n FROM pagecache WHERE action = 'add' GROUP BY ALL", column
        )
        assert report[key] == {name: row["n"] for name, row in moved.items()}, key
    agree(
        report,
        sql.row("SELECT coalesce(sum(bytes), 0)::BIGINT AS evicted_bytes FROM pagecache WHERE action = 'evict'"),
    )
    for key, by in (("layers", "layer"), ("components", "component")):
        groups = sql.by(f"SELECT {by}, {SUMS} FROM per_tensor GROUP BY ALL", by)
        assert {group[by] for group in report[key]} == groups.keys()
        for group in report[key]:
            expected = groups[group[by]]
            del expected["unique_bytes"]
            agree(group, expected, (key, group[by]))
    for key, column in (("top_by_bytes_read", "bytes_read"), ("top_by_stall", "stall_ns")):
        most = [row["n"] for row in sql.rows(f"SELECT {column} AS n FROM per_tensor ORDER BY n DESC LIMIT 10")]
        assert [tensor[column] for tensor in report[key]] == [n for n in most if n], key
    phases(sql, report["phases"])


def phases(sql: Sql, found: Sequence[Mapping[str, Any]]) -> None:
    """Check what summary and tokens both say about each phase."""
    expected = sql.by(
        """
        WITH graphs AS (SELECT *, end_ns - start_ns AS ns FROM tokens WHERE token > 0)
        SELECT phase, count(*) AS graphs, sum(n_tokens)::BIGINT AS n_tokens,
               sum(n_tokens) FILTER (ns IS NOT NULL) / (sum(ns) / 1e9) AS tokens_per_second,
               sum(stall_ns) FILTER (ns IS NOT NULL) / sum(ns) FILTER (stall_ns IS NOT NULL) AS stall_share,
               avg(ns) AS mean, quantile_cont(ns, 0.5) AS p50, quantile_cont(ns, 0.9) AS p90,
               quantile_cont(ns, 0.99) AS p99, max(ns)::DOUBLE AS max
        FROM graphs GROUP BY phase
        """,
        "phase",
    )
    assert {phase["phase"] for phase in found} == expected.keys()
    for phase in found:
        figures = expected[phase["phase"]]
        spread = {name: figures.pop(name) for name in ("mean", "p50", "p90", "p99", "max")}
        agree(phase, figures, phase["phase"])
        agree(phase["duration_ns"], spread, phase["phase"])


def layers(sql: Sql, report: Mapping[str, Any]) -> None:
    _groups(sql, report, "layer")


def components(sql: Sql, report: Mapping[str, Any]) -> None:
    _groups(sql, report, "component")


def _groups(sql: Sql, report: Mapping[str, Any], by: str) -> None:
    totals(sql, report)
    expected = sql.by(
        f"""
        WITH operated AS (
            SELECT model, tensor_name, count(*) AS op_count, count(*) FILTER (bytes_accessed IS NULL) AS unsized_ops,
                   sum(bytes_accessed) AS bytes_accessed, sum(duration_ns) AS op_ns
            FROM ops WHERE tensor_name IS NOT NULL GROUP BY ALL
        )
        SELECT model, {by}, count(*) AS tensors, {SUMS}, sum(access_count)::BIGINT AS access_count,
               sum(read_count)::BIGINT AS read_count, sum(evicted_bytes)::BIGINT AS evicted_bytes,
               coalesce(sum(op_count), 0)::BIGINT AS op_count, coalesce(sum(unsized_ops), 0)::BIGINT AS unsized_ops,
               coalesce(sum(bytes_accessed), 0)::BIGINT AS bytes_accessed, coalesce(sum(op_ns), 0)::BIGINT AS op_ns,
               coalesce(sum(size_bytes) FILTER (NOT backed), 0)::BIGINT AS unbacked_bytes
        FROM per_tensor LEFT JOIN operated USING (model, tensor_name) GROUP BY ALL
        """,
        "model",
        by,
    )
    rows = report[f"{by}s"]
    assert {(row["model"], row[by]) for row in rows} == expected.keys()
    for row in rows:
        agree(row, expected[row["model"], row[by]], row[by])
    read, stall = sql.row("SELECT sum(bytes_read) AS a, sum(stall_ns) AS b FROM per_tensor").values()
    assert report["stall_ns"] == stall
    assert read + report["other_bytes_read"] == report["total_bytes_read"]
    for row in rows:
        parts = {"share_of_bytes_read": (row["bytes_read"], report["total_bytes_read"])}
        shares(row, parts | {"share_of_stall": (row["stall_ns"], stall)})
