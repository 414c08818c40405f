"""What the page cache did: cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.schema import CAUSES, PHASES
from sql.database import Sql, agree, shares

__all__ = ["cache"]

FATES: Final = ("used", "wasted", "unknown", "pending")
SPLIT: Final = ", ".join(f"coalesce(sum(size) FILTER (fate = '{fate}'), 0)::BIGINT AS {fate}_bytes" for fate in FATES)

# A stay: a part of a page, from its add to whatever happened to it next. When was there last, by then, a fault in its
# 64 KiB of the address space, or in its 2 MiB; an operator that read all of its tensor; a choice of its expert? If that
# was since the add, it tells of a use.
STAYS: Final = """
    CREATE OR REPLACE TABLE stays AS
    WITH shifts AS (
        SELECT model, shard, (arg_min(address, n) - arg_min(offset_bytes, n)) // 4096 % 16 AS shift
        FROM faults_all WHERE address > 0 GROUP BY ALL
    ), shifted AS (
        SELECT m.*, (m.page + coalesce(shift, 0)) // 16 AS block, (m.page + coalesce(shift, 0)) // 512 AS huge,
               coalesce(next_time, {last_ns}) AS until, coalesce(t.n_experts, 0) > 0 AS merged, t.layer
        FROM moves m LEFT JOIN shifts USING (model, shard) LEFT JOIN tensors t USING (model, tensor_name)
        WHERE m.action = 'add' AND m.{counted}
    ), touched AS (
        SELECT model, shard, (offset_bytes // 4096 + shift) // 16 AS block,
               (offset_bytes // 4096 + shift) // 512 AS huge, timestamp + coalesce(latency_ns, 0) AS ended
        FROM faults_all JOIN shifts USING (model, shard)
    ), operated AS (
        SELECT model, tensor_name, timestamp + coalesce(duration_ns, 0) AS ended FROM ops_all
        WHERE tensor_name IS NOT NULL AND op NOT IN ('get_rows', 'mul_mat_id')
    ), times AS (
        SELECT timestamp, coalesce(lead(timestamp) OVER (ORDER BY timestamp), timestamp) AS ended
        FROM (SELECT DISTINCT timestamp FROM routing_all)
    ), chosen AS (
        SELECT layer, expert, ended FROM routing_all JOIN times USING (timestamp), unnest(experts) AS e(expert)
    ), blocks AS (
        SELECT s.*, f.ended AS in_block FROM shifted s ASOF LEFT JOIN touched f
        ON f.model = s.model AND f.shard = s.shard AND f.block = s.block AND s.until >= f.ended
    ), huges AS (
        SELECT s.*, f.ended AS in_huge FROM blocks s ASOF LEFT JOIN touched f
        ON f.model = s.model AND f.shard = s.shard AND f.huge = s.huge AND s.until >= f.ended
    ), ran AS (
        SELECT s.*, o.ended AS in_op FROM huges s ASOF LEFT JOIN operated o
        ON o.model = s.model AND o.tensor_name = s.tensor_name AND s.until >= o.ended
    ), seen AS (
        SELECT s.*, c.ended AS in_choice FROM ran s ASOF LEFT JOIN chosen c
        ON c.layer = s.layer AND c.expert = s.expert AND s.until >= c.ended
    ), judged AS (
        SELECT *, coalesce(in_block >= timestamp, false)
                  OR (NOT merged AND coalesce(in_op >= timestamp, false))
                  OR (merged AND expert >= 0 AND coalesce(in_choice >= timestamp, false)) AS used,
               coalesce(in_huge >= timestamp, false) OR (phase = 'load' AND token = 0)
                  OR cause NOT IN ('fault', 'readahead', 'prefetcher')
                  OR (SELECT count(*) FROM faults_all) = 0 AS hidden
        FROM seen
    )
    SELECT *, CASE WHEN next_action = 'add' THEN 'unknown' WHEN used THEN 'used'
                   WHEN next_action IS NULL THEN 'pending' WHEN hidden THEN 'unknown' ELSE 'wasted' END AS fate
    FROM judged
"""


def cache(sql: Sql, report: Mapping[str, Any]) -> None:
    sql.follow()
    last = max(
        sql.row(f"SELECT max({column}) AS t FROM {table}_all")["t"] or 0
        for table, column in (
            *(("faults", "timestamp"), ("pagecache", "timestamp"), ("ops", "timestamp"), ("reads", "timestamp")),
            *(("routing", "timestamp"), ("tokens", "start_ns"), ("tokens", "end_ns")),
        )
    )
    sql.db.execute(STAYS.format(last_ns=last, counted=sql.counted).replace("m.true", "true"))
    total = sql.row(f"SELECT coalesce(sum(size), 0)::BIGINT AS added_bytes, {SPLIT} FROM stays")
    agree(report, total)
    _share(report, total)
    causes = sql.by(f"SELECT cause, sum(size)::BIGINT AS added_bytes, {SPLIT} FROM stays GROUP BY cause", "cause")
    assert {row["cause"] for row in report["causes"]} == causes.keys()
    for row in report["causes"]:
        agree(row, causes[row["cause"]], row["cause"])
        _share(row, causes[row["cause"]])
    _tensors(sql, report)
    _moved(sql, report)
    _resident(sql, report)


def _share(found: Mapping[str, Any], figures: Mapping[str, int]) -> None:
    shares(found, {"wasted_share": (figures["wasted_bytes"], figures["added_bytes"] - figures["pending_bytes"])})


def _tensors(sql: Sql, report: Mapping[str, Any]) -> None:
    evicted = sql.by(
        f"""
        SELECT model, tensor_name, coalesce(sum(size) FILTER ({sql.counted}), 0)::BIGINT AS evicted_bytes,
               coalesce(sum(size) FILTER (last_action IS NULL), 0)::BIGINT AS resident_before_bytes
        FROM moves WHERE action = 'evict' GROUP BY ALL
        """,
        *("model", "tensor_name"),
    )
    stays = sql.by(
        f"SELECT model, tensor_name, sum(size)::BIGINT AS added_bytes, {SPLIT} FROM stays GROUP BY ALL",
        *("model", "tensor_name"),
    )
    none = dict.fromkeys(("added_bytes", *(f"{fate}_bytes" for fate in FATES)), 0)
    for row in (*report["tensors"], *report["other"]):
        key = row["model"], row["tensor_name"]
        agree(row, stays.pop(key, none), key)
        agree(row, evicted.pop(key, dict.fromkeys(("evicted_bytes", "resident_before_bytes"), 0)), key)
    assert not stays
    assert not evicted


def _moved(sql: Sql, report: Mapping[str, Any]) -> None:
    by_cause = ", ".join(
        f"coalesce(sum(bytes) FILTER (action = 'add' AND cause = '{cause}'), 0)::BIGINT AS {cause}_bytes"
        for cause in CAUSES
    )
    sums = (
        f"coalesce(sum(bytes) FILTER (action = 'add'), 0)::BIGINT AS added_bytes, {by_cause}, "
        "coalesce(sum(bytes) FILTER (action = 'evict'), 0)::BIGINT AS evicted_bytes"
    )
    for key, column in (("processes", "comm"), ("phases", "phase")):
        expected = sql.by(f"SELECT {column}, {sums} FROM pagecache GROUP BY ALL", column)
        assert {row[column] for row in report[key]} == expected.keys()
        for row in report[key]:
            agree(row, expected[row[column]], (key, row[column]))
    order = [PHASES.index(row["phase"]) for row in report["phases"]]
    assert order == sorted(order)


def _resident(sql: Sql, report: Mapping[str, Any]) -> None:
    """Check what was in the cache at the end of each bin of time: what had come, or had been there, and not gone."""
    changes = sql.rows(
        """
        SELECT timestamp AS t,
               sum(CASE WHEN last_action IS NOT DISTINCT FROM action THEN 0 WHEN action = 'add' THEN size
                        ELSE -size END)::BIGINT AS n
        FROM moves GROUP BY timestamp ORDER BY timestamp
        """
    )
    before = sql.row(
        "SELECT coalesce(sum(size), 0)::BIGINT AS n FROM moves WHERE action = 'evict' AND last_action IS NULL"
    )["n"]
    astray = sql.row("SELECT coalesce(sum(size), 0)::BIGINT AS n FROM moves WHERE action = last_action")["n"]
    assert (report["resident_before_bytes"], report["out_of_order_bytes"]) == (before, astray)
    if not changes:
        return
    starts = report["bins"]["start_ns"]
    span = sql.row("SELECT max(timestamp) AS t FROM pagecache")["t"] if sql.phase else changes[-1]["t"]
    now, at, found = before, 0, []
    for end in (*starts[1:], (span or 0) + 1):
        while at < len(changes) and changes[at]["t"] < end:
            now, at = now + changes[at]["n"], at + 1
        found.append(now)
    assert report["bins"]["resident_bytes"] == found
    assert report["resident_bytes"] == found[-1]
    assert report["peak_resident_bytes"] == max(found)
