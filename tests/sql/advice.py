"""What the findings stand on: advise. Its replays (how much memory would help) are not repeated here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sql.database import Sql, agree, shares

__all__ = ["advise"]

_KERNEL: Final = "'^(kswapd|kdamond|kcompactd|khugepaged|kworker)'"


def advise(sql: Sql, report: Mapping[str, Any]) -> None:
    phase = report["judged_phase"]
    sql.db.execute(
        f"""
        CREATE OR REPLACE TABLE judged AS
        WITH read AS (SELECT token, sum(bytes) AS bytes FROM pagecache_all WHERE action = 'add' GROUP BY token)
        SELECT token, end_ns - start_ns AS ns, stall_ns, coalesce(bytes, 0) AS bytes, n_tokens,
               row_number() OVER (ORDER BY token) AS number, count(*) OVER () AS many
        FROM tokens_all LEFT JOIN read USING (token)
        WHERE token > 0 AND end_ns IS NOT NULL AND phase = '{phase}'
        """
    )
    assert report["tokens"] == sql.row("SELECT count(*) AS n FROM judged")["n"]
    warm = "number > many - greatest(many // 2, 1)"
    agree(report, sql.row(f"SELECT avg(bytes) AS bytes_read_per_token FROM judged WHERE {warm}"))
    evidence = {one["finding"]: one["evidence"] for one in report["findings"]}
    stall, time = sql.row("SELECT sum(stall_ns) AS a, sum(ns) AS b FROM judged WHERE stall_ns IS NOT NULL").values()
    shares(evidence["limit"], {"stall_share": (stall, time)})
    loading = sql.row(
        """
        SELECT coalesce(sum(bytes) FILTER (action = 'add' AND phase = 'load'), 0)::BIGINT AS loaded_bytes,
               coalesce(sum(bytes) FILTER (action = 'evict'), 0)::BIGINT AS evicted_while_loading_bytes
        FROM pagecache_all WHERE token = 0
        """
    )
    agree(evidence["populate"], loading)
    backed = sql.row(
        """
        SELECT coalesce(sum(size_bytes) FILTER (NOT backed), 0)::BIGINT AS repacked_bytes,
               count(*) FILTER (NOT backed) AS repacked_tensors,
               coalesce(sum(size_bytes) FILTER (backed), 0)::BIGINT AS file_weights_bytes
        FROM tensors
        """
    )
    agree(evidence["repacked"], backed)
    _others(sql, evidence)


def _others(sql: Sql, evidence: Mapping[str, Mapping[str, Any]]) -> None:
    sql.db.execute(
        """
        CREATE OR REPLACE TABLE others AS
        SELECT p.*, coalesce(timestamp > end_ns AND token > 0, false) AS idle
        FROM pagecache_all p LEFT JOIN (SELECT token, end_ns FROM tokens_all) t USING (token)
        WHERE pid <> (SELECT mode(pid) FROM pagecache_all WHERE phase <> 'load')
        """
    )
    idle = sql.row(
        """
        SELECT (SELECT coalesce(sum(bytes), 0)::BIGINT FROM pagecache_all WHERE action = 'evict' AND token > 0)
                   AS evicted_bytes,
               (SELECT coalesce(sum(bytes), 0)::BIGINT FROM others WHERE action = 'evict' AND idle)
                   AS evicted_idle_bytes
        """
    )
    agree(evidence["idle"], idle)
    foreign = sql.row(
        f"""
        SELECT coalesce(sum(bytes) FILTER (action = 'add'), 0)::BIGINT AS added_bytes,
               coalesce(sum(bytes) FILTER (action = 'evict'), 0)::BIGINT AS evicted_bytes
        FROM others WHERE NOT regexp_matches(comm, {_KERNEL})
        """
    )
    agree(evidence["foreign"], foreign)
