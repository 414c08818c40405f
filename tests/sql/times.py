"""What each token cost: tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llmtraced.schema import CAUSES
from sql.database import Sql, agree
from sql.reads import phases

__all__ = ["tokens"]

# The faults' intervals are cut at the edges of the tokens, and all beginnings and ends put in order: between two of
# them the number of threads in each kind of fault does not change.
PARTS: Final = """
    WITH spans AS (
        SELECT timestamp AS low, timestamp + latency_ns AS high, coalesce(major, false) AS hard,
               coalesce(major, false) OR latency_ns >= {wait_ns} AS waits
        FROM faults_all WHERE latency_ns > 0
    ), inside AS (
        SELECT t.token, greatest(low, start_ns) AS low, least(high, end_ns) AS high, hard, waits
        FROM spans JOIN tokens t ON low < end_ns AND high > start_ns WHERE t.token > 0
    ), edges AS (
        SELECT token, low AS instant, hard::INT AS hard, waits::INT AS waits, 1 AS one FROM inside
        UNION ALL SELECT token, high, -hard::INT, -waits::INT, -1 FROM inside
    ), points AS (
        SELECT token, instant, sum(hard) AS hard, sum(waits) AS waits, sum(one) AS one FROM edges GROUP BY ALL
    ), steps AS (
        SELECT token, lead(instant) OVER (PARTITION BY token ORDER BY instant) - instant AS ns,
               sum(hard) OVER so_far AS hard,
               sum(waits) OVER so_far AS waits, sum(one) OVER so_far AS one
        FROM points WINDOW so_far AS (PARTITION BY token ORDER BY instant ROWS UNBOUNDED PRECEDING)
    ), summed AS (
        SELECT token, coalesce(sum(ns) FILTER (hard > 0), 0)::BIGINT AS hard_ns,
               coalesce(sum(ns) FILTER (waits > 0), 0)::BIGINT AS read_ns,
               coalesce(sum(ns) FILTER (one > 0), 0)::BIGINT AS fault_ns,
               sum(ns * waits)::DOUBLE AS threads_ns, max(waits)::BIGINT AS most
        FROM steps GROUP BY token
    )
    SELECT token, end_ns - start_ns - coalesce(s.fault_ns, 0) AS compute_ns,
           coalesce(s.fault_ns - read_ns, 0) AS mapping_ns, coalesce(read_ns - hard_ns, 0) AS wait_ns,
           coalesce(hard_ns, 0) AS hard_read_ns, threads_ns / nullif(read_ns, 0) AS reads_in_flight,
           coalesce(most, 0) AS reads_in_flight_max
    FROM tokens LEFT JOIN summed s USING (token) WHERE token > 0 AND end_ns IS NOT NULL
"""


def tokens(sql: Sql, report: Mapping[str, Any]) -> None:
    by_cause = ", ".join(
        f"coalesce(sum(bytes) FILTER (cause = '{cause}'), 0)::BIGINT AS {cause}_bytes" for cause in CAUSES
    )
    read = sql.by(
        f"SELECT token, sum(bytes)::BIGINT AS bytes_read, {by_cause} FROM pagecache "
        "WHERE action = 'add' GROUP BY token",
        "token",
    )
    faults = sql.by(
        "SELECT token, count(*) FILTER (major) AS major_faults, count(*) FILTER (NOT major) AS minor_faults, "
        "coalesce(sum(latency_ns), 0)::BIGINT AS fault_ns FROM faults GROUP BY token",
        "token",
    )
    graphs = sql.by(
        "SELECT token, phase, start_ns, end_ns - start_ns AS duration_ns, n_tokens, n_outputs, stall_ns, "
        "stall_ns / (end_ns - start_ns) AS stall_share, graph_nodes FROM tokens WHERE token > 0",
        "token",
    )
    parts = sql.by(PARTS.format(wait_ns=report["wait_threshold_ns"]), "token")
    assert [token["token"] for token in report["tokens"]] == sorted(graphs)
    no_reads = dict.fromkeys(("bytes_read", *(f"{cause}_bytes" for cause in CAUSES)), 0)
    no_faults = dict.fromkeys(("major_faults", "minor_faults", "fault_ns"), 0)
    for token in report["tokens"]:
        number = token["token"]
        agree(token, graphs[number] | read.get(number, no_reads) | faults.get(number, no_faults), number)
        agree(token, parts.get(number, dict.fromkeys(("compute_ns", "hard_read_ns"))), number)
    assert report["outside_bytes_read"] == sum(row["bytes_read"] for n, row in read.items() if n not in graphs)
    phases(sql, report["phases"])
