"""Where and when: heatmap, timeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from llmtraced.schema import PHASES
from sql.database import Sql, agree, shares

__all__ = ["heatmap", "timeline"]

# Of each kind of value: by token, and by file offset and time.
OPERATORS: Final = "UNION ALL SELECT model, tensor_name, token, 1 FROM ops WHERE tensor_name IS NOT NULL"
AMOUNTS: Final = {
    "bytes": "SELECT model, tensor_name, token, bytes AS amount FROM pagecache WHERE action = 'add'",
    "stall": "SELECT model, tensor_name, token, latency_ns AS amount FROM faults WHERE latency_ns IS NOT NULL",
    "accesses": f"SELECT model, tensor_name, token, 1 AS amount FROM faults {OPERATORS}",
}
PLACES: Final = {
    "bytes": """
        SELECT model, shard, place, timestamp, least((place + 1) * {width}, offset_bytes + bytes)
               - greatest(place * {width}, offset_bytes) AS amount
        FROM pagecache, unnest(generate_series(offset_bytes // {width}, (offset_bytes + bytes - 1) // {width})) s(place)
        WHERE action = 'add'
    """,
    "stall": """
        SELECT model, shard, offset_bytes // {width} AS place, timestamp, latency_ns AS amount FROM faults
        WHERE latency_ns IS NOT NULL
    """,
    "accesses": "SELECT model, shard, offset_bytes // {width} AS place, timestamp, 1 AS amount FROM faults",
}


def heatmap(sql: Sql, report: Mapping[str, Any]) -> None:
    (by_token if report["by"] == "token" else by_time)(sql, report)
    for row in report["rows"]:
        assert sum(row["values"]) == row["total"]
        assert len(row["values"]) == len(report["columns"])
    assert report["total"] == sum(row["total"] for row in report["rows"]) + report["unplaced"]


def by_token(sql: Sql, report: Mapping[str, Any]) -> None:
    amounts = sql.by(
        f"SELECT model, tensor_name, token, sum(amount)::BIGINT AS n FROM ({AMOUNTS[report['value']]}) GROUP BY ALL",
        *("model", "tensor_name", "token"),
    )
    column = {
        token: number
        for number, one in enumerate(report["columns"])
        for token in range(one["first_token"], one["last_token"] + 1)
    }
    expected: Counter[tuple[Any, ...]] = Counter()
    for (model, name, token), row in amounts.items():
        expected[model, name, column[token]] += row["n"]
    found = {
        (row["model"], row["tensor_name"], number): value
        for row in report["rows"]
        for number, value in enumerate(row["values"])
        if value
    }
    assert found == {key: n for key, n in expected.items() if n}
    names = sql.by("SELECT model, tensor_name, 1 AS there FROM tensors", "model", "tensor_name")
    assert {(row["model"], row["tensor_name"]) for row in report["rows"]} >= names.keys()


def by_time(sql: Sql, report: Mapping[str, Any]) -> None:
    if not report["columns"]:
        assert report["total"] == sql.row(f"SELECT count(*) AS n FROM ({AMOUNTS[report['value']]})")["n"] == 0
        return
    first = report["columns"][0]["first_ns"]
    length = report["columns"][0]["last_ns"] + 1 - first
    width = report["rows"][0]["size_bytes"]
    assert [one["first_ns"] for one in report["columns"]] == [first + i * length for i in range(len(report["columns"]))]
    expected = sql.by(
        f"""
        SELECT model, shard, place * {width} AS low, (timestamp - {first}) // {length} AS number,
               sum(amount)::BIGINT AS n
        FROM ({PLACES[report["value"]].format(width=width)}) GROUP BY ALL HAVING sum(amount) > 0
        """,
        *("model", "shard", "low", "number"),
    )
    found = {
        (row["model"], row["shard"], row["offset_bytes"], number): {"n": value}
        for row in report["rows"]
        for number, value in enumerate(row["values"])
        if value
    }
    assert found == expected
    for low, phase in ((one["first_ns"], one["phase"]) for one in report["columns"]):
        assert _token_at(sql, low)[1] == phase


def _token_at(sql: Sql, when: int) -> tuple[int, str | None]:
    rows = sql.rows(
        f"SELECT token, phase FROM tokens_all WHERE start_ns <= {when} ORDER BY start_ns DESC, token DESC LIMIT 1"
    )
    return (rows[0]["token"], rows[0]["phase"]) if rows else (0, None)


# Each add with what it is to the one before in its file; jumps with where the four stretches before theirs ended.
STEPS: Final = """
    CREATE OR REPLACE TABLE steps AS
    WITH compared AS (
        SELECT *, offset_bytes - coalesce(lag(offset_bytes + bytes) OVER file, 0) AS gap,
               coalesce(lag(offset_bytes + bytes) OVER file, 0) AS ended, coalesce(lag(token) OVER file, 0) AS left_in
        FROM pagecache_all WHERE action = 'add' AND model IS NOT NULL
        WINDOW file AS (PARTITION BY model, shard ORDER BY timestamp, n)
    ), named AS (
        SELECT *, CASE WHEN gap < 0 THEN 'backward' WHEN gap < 4096 THEN 'sequential'
                       WHEN gap <= {limit} THEN 'small_gap' ELSE 'large_gap' END AS class
        FROM compared
    ), jumps AS (
        SELECT n, {resumed} AS resumed FROM named WHERE class <> 'sequential'
        WINDOW jump AS (PARTITION BY model, shard ORDER BY timestamp, n)
    )
    SELECT named.*, coalesce(resumed, false) AS resumed FROM named LEFT JOIN jumps USING (n)
"""
RESUMED: Final = " OR ".join(
    f"coalesce(offset_bytes - lag(ended, {back}) OVER jump BETWEEN 0 AND 4095"
    f" AND lag(left_in, {back}) OVER jump = token, false)"
    for back in range(1, 5)
)
CLASSES: Final = ("sequential", "small_gap", "large_gap", "backward")
SUMS: Final = ", ".join(
    f"coalesce(sum(bytes) FILTER (class = '{name}'), 0)::BIGINT AS {name}_bytes, "
    f"count(*) FILTER (class = '{name}') AS {name}_count"
    for name in CLASSES
)


def timeline(sql: Sql, report: Mapping[str, Any]) -> None:
    sql.db.execute(STEPS.format(limit=report["small_gap_limit_bytes"], resumed=f"({RESUMED})"))
    where = "" if sql.phase is None else f"WHERE phase = '{sql.phase}'"
    figures = (
        f"{SUMS}, coalesce(sum(bytes), 0)::BIGINT AS bytes, count(*) AS count, min(timestamp) AS first_ns, "
        "max(timestamp) AS last_ns, count(*) FILTER (class <> 'sequential') AS jumps, "
        "count(*) FILTER (resumed) AS resumed_count, coalesce(sum(bytes) FILTER (resumed), 0)::BIGINT AS resumed_bytes"
    )
    total = sql.row(f"SELECT {figures} FROM steps {where}")
    by_phase = sql.by(f"SELECT phase, {figures} FROM steps {where} GROUP BY phase", "phase")
    assert [row["phase"] for row in report["phases"]] == [name for name in PHASES if name in by_phase]
    for found, expected in ((report["total"], total), *((row, by_phase[row["phase"]]) for row in report["phases"])):
        agree(found, expected)
        parts = {f"{name}_byte_share": (expected[f"{name}_bytes"], expected["bytes"]) for name in CLASSES}
        parts |= {f"{name}_count_share": (expected[f"{name}_count"], expected["count"]) for name in CLASSES}
        shares(found, parts)
        if expected["count"]:
            shares(found, {"stretch_bytes": (expected["bytes"], max(expected["jumps"], 1))})
    if not report["bins"]:
        assert total["count"] == 0
        return
    first = report["bins"][0]["first_ns"]
    length = report["bins"][0]["last_ns"] + 1 - first
    bins = sql.by(
        f"SELECT (timestamp - {first}) // {length} AS number, {SUMS} FROM steps {where} GROUP BY ALL", "number"
    )
    none = {f"{name}_{weight}": 0 for name in CLASSES for weight in ("bytes", "count")}
    for number, one in enumerate(report["bins"]):
        agree(one, bins.get(number, none), number)
        assert (one["token"], one["phase"]) == _token_at(sql, one["first_ns"])
    _map(sql, report["map"])


def _map(sql: Sql, chart: Mapping[str, Any]) -> None:
    width = chart["rows"][0]["size_bytes"]
    read = PLACES["bytes"].format(width=width).replace("timestamp,", "timestamp, token,", 1)
    expected = sql.by(
        f"""
        SELECT model, shard, place * {width} AS low,
               (timestamp - {chart["first_ns"]}) // {chart["column_ns"]} AS number,
               sum(amount)::BIGINT AS b, max(token) AS t
        FROM ({read}) GROUP BY ALL
        """,
        *("model", "shard", "low", "number"),
    )
    cells = zip(*(chart["cells"][name] for name in ("row", "column", "bytes", "token")), strict=True)
    found = {}
    for row, column, nbytes, token in cells:
        place = chart["rows"][row]
        found[place["model"], place["shard"], place["offset_bytes"], column] = {"b": nbytes, "t": token}
    assert found == expected
