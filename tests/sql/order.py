"""In which order, and which experts: pattern, experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from sql.database import Sql, agree, shares

__all__ = ["experts", "pattern"]

CHOSEN: Final = """
    SELECT DISTINCT token, phase, layer, expert FROM routing, unnest(experts) AS e(expert)
    WHERE token > 0 AND layer >= 0
"""
"""What each graph chose, whatever the position in its batch."""

SEQUENCES: Final = f"""
    WITH chosen AS (SELECT token, layer, count(*) AS different FROM ({CHOSEN}) GROUP BY ALL),
    used AS (
        SELECT o.token, o.tensor_name, o.timestamp, o.n,
               CASE WHEN t.n_experts > 0 AND different > 0 THEN different * t.expert_bytes
                    WHEN o.op <> 'get_rows' THEN o.bytes_accessed END AS size,
               o.op <> 'get_rows' AS sized
        FROM ops o LEFT JOIN tensors t USING (model, tensor_name)
        LEFT JOIN chosen c ON c.token = o.token AND c.layer = t.layer
        WHERE o.tensor_name IS NOT NULL AND o.token > 0
    )
    SELECT token, list(tensor_name ORDER BY timestamp, n) AS sequence, count(*) AS length,
           coalesce(sum(size), 0)::BIGINT AS bytes, count(*) FILTER (sized AND size IS NULL) AS unsized
    FROM used GROUP BY token
"""

OVERLAPS: Final = f"""
    WITH chosen AS ({CHOSEN}), counts AS (SELECT token, phase, layer, count(*) AS many FROM chosen GROUP BY ALL),
    shared AS (
        SELECT a.token, a.layer, count(*) AS many
        FROM chosen a JOIN chosen b ON b.token = a.token - 1 AND b.layer = a.layer AND b.expert = a.expert GROUP BY ALL
    ), pairs AS (
        SELECT a.token, a.layer, coalesce(s.many, 0) / (a.many + b.many - coalesce(s.many, 0)) AS jaccard,
               (a.many = b.many AND a.many = coalesce(s.many, 0))::INT AS same
        FROM counts a JOIN counts b ON b.token = a.token - 1 AND b.layer = a.layer
        LEFT JOIN shared s ON s.token = a.token AND s.layer = a.layer
        WHERE {{both}}
    )
"""
"""Of a token and the one before it, layer by layer: experts in both over experts in either."""


def pattern(sql: Sql, report: Mapping[str, Any]) -> None:
    if report["source"] != "ops":
        assert sql.row("SELECT count(*) AS n FROM ops WHERE tensor_name IS NOT NULL AND token > 0")["n"] == 0
        return
    expected = sql.by(SEQUENCES, "token")
    assert [row["token"] for row in report["tokens"]] == sorted(expected)
    of_class: dict[Any, tuple[str, ...]] = {}
    sequences = {token: tuple(row["sequence"]) for token, row in expected.items()}
    for row in report["tokens"]:
        token = row["token"]
        assert (row["length"], row["bytes"]) == (expected[token]["length"], expected[token]["bytes"])
        # Two tokens are in one class if and only if they have the same sequence.
        assert of_class.setdefault(row["fingerprint"], sequences[token]) == sequences[token]
    assert len(set(of_class.values())) == len(of_class) == report["class_count"]
    sizes = Counter(sequences.values())
    for one in report["classes"]:
        assert one["tokens"] == sizes[of_class[one["fingerprint"]]]
    compared = [sequences[row["token"]] for row in report["tokens"] if report["compared_phase"] in (None, row["phase"])]
    reference = of_class[report["classes"][0]["fingerprint"]]
    if compared:
        assert compared.count(reference) == max(Counter(compared).values())
    assert tuple(row["tensor_name"] for row in report["sequence"]) == reference
    assert report["unsized_uses"] == sum(row["unsized"] for row in expected.values())
    _overlaps(sql, report)


def _overlaps(sql: Sql, report: Mapping[str, Any]) -> None:
    phase = report["compared_phase"]
    both = "true" if phase is None else f"a.phase = '{phase}' AND b.phase = '{phase}'"
    pairs = OVERLAPS.format(both=both)
    by_token = sql.by(f"{pairs} SELECT token, avg(jaccard) AS expert_overlap FROM pairs GROUP BY token", "token")
    for row in report["tokens"]:
        agree(row, by_token.get(row["token"], {"expert_overlap": None}), row["token"])
    if report["experts"] is None:
        assert by_token == {}
        return
    figures = "count(*) AS pairs, avg(jaccard) AS overlap, avg(same) AS identical_share"
    agree(report["experts"], sql.row(f"{pairs} SELECT {figures} FROM pairs"))
    layers = sql.by(f"{pairs} SELECT layer, {figures} FROM pairs GROUP BY layer", "layer")
    for layer in report["experts"]["layers"]:
        none = {"pairs": 0, "overlap": None, "identical_share": None}
        agree(layer, layers.get(layer["layer"], none), layer["layer"])


def experts(sql: Sql, report: Mapping[str, Any]) -> None:
    layers = [row["layer"] for row in sql.rows("SELECT DISTINCT layer FROM tensors WHERE n_experts > 0 ORDER BY layer")]
    assert [one["layer"] for one in report["layers"]] == layers
    if not layers:
        assert report["state"] == "dense"
        return
    rows, evaluations = sql.row("SELECT count(*) AS a, count(DISTINCT token) AS b FROM routing").values()
    assert (report["routing_rows"], report["evaluations"]) == (rows, evaluations)
    _slices(sql, report)
    _sequence(sql, report)


def _slices(sql: Sql, report: Mapping[str, Any]) -> None:
    """Check what each expert of each layer was chosen and cost."""
    sql.follow()
    costs = sql.by(
        f"""
        WITH slices AS (
            SELECT DISTINCT layer, expert FROM tensors, unnest(generate_series(0, n_experts - 1)) AS e(expert)
            WHERE n_experts > 0
        ), chosen AS (
            SELECT layer, expert, count(*) AS selections FROM routing, unnest(experts) AS e(expert) GROUP BY ALL
        ), parts AS (
            SELECT t.layer, m.expert, low, count(*) AS times, any_value(m.size) AS size
            FROM moves m JOIN tensors t USING (model, tensor_name)
            WHERE action = 'add' AND m.expert >= 0 AND {sql.counted} GROUP BY ALL
        ), read AS (
            SELECT layer, expert, sum(times * size) AS bytes_read, sum((times - 1) * size) AS reread_bytes
            FROM parts GROUP BY ALL
        ), waited AS (
            SELECT layer, expert, count(*) FILTER (major) AS major_faults, count(*) FILTER (NOT major) AS minor_faults,
                   sum(latency_ns) AS stall_ns
            FROM faults JOIN tensors USING (model, tensor_name) WHERE expert >= 0 GROUP BY ALL
        )
        SELECT layer, expert, coalesce(selections, 0) AS selections,
               {", ".join(f"coalesce({name}, 0)::BIGINT AS {name}" for name in COSTS)}
        FROM slices LEFT JOIN chosen USING (layer, expert) LEFT JOIN read USING (layer, expert)
        LEFT JOIN waited USING (layer, expert)
        """,
        *("layer", "expert"),
    )
    found = {(row["layer"], row["expert"]): row for row in report["hot_cold"]}
    assert found.keys() == costs.keys()
    for key, figures in costs.items():
        agree(found[key], figures, key)
    for name in ("selections", *COSTS):
        assert report[name] == sum(row[name] for row in costs.values())
        for one in report["layers"]:
            assert one[name] == sum(row[name] for (layer, _), row in costs.items() if layer == one["layer"])
    ranks = [row["selections"] for row in report["hot_cold"]]
    assert ranks == sorted(ranks, reverse=True)


COSTS: Final = ("bytes_read", "reread_bytes", "major_faults", "minor_faults", "stall_ns")

# Each use of an expert by a graph, in order; ``rank`` counts the graphs, ``place`` the uses; when it was used before.
USES: Final = f"""
    CREATE OR REPLACE TABLE uses AS
    WITH graphs AS (SELECT token, row_number() OVER (ORDER BY token) - 1 AS rank
                    FROM (SELECT DISTINCT token FROM routing WHERE {{which}}))
    SELECT *, lag(rank) OVER slice AS last_rank, lag(place) OVER slice AS last_place,
           lead(place) OVER slice AS next_place
    FROM (SELECT layer, expert, rank, row_number() OVER (ORDER BY rank, layer, expert) AS place
          FROM ({CHOSEN} AND {{which}}) JOIN graphs USING (token))
    WINDOW slice AS (PARTITION BY layer, expert ORDER BY rank)
"""


def _sequence(sql: Sql, report: Mapping[str, Any]) -> None:
    """Check what depends on the order: how soon experts are used again, and what an LRU cache would hit."""
    phase = report["sequence"]["phase"]
    sql.db.execute(USES.format(which="true" if phase is None else f"phase = '{phase}'"))
    count = sql.row("SELECT count(*) AS n FROM uses")["n"]
    assert report["sequence"]["accesses"] == count
    for where, found in (("true", report), *((f"layer = {one['layer']}", one) for one in report["layers"])):
        for name, within in (("repeat_next", 1), ("repeat_8", 8)):
            did, could = sql.row(
                f"SELECT count(*) FILTER (rank - last_rank <= {within}) AS a, count(*) AS b "
                f"FROM uses WHERE rank >= {within} AND {where}"
            ).values()
            shares(found, {name: (did, could)})
    reuse = report["reuse"]
    gaps = sql.by("SELECT rank - last_rank AS gap, count(*) AS n FROM uses GROUP BY gap", "gap")
    assert reuse["first_accesses"] == gaps.pop(None, {"n": 0})["n"]
    assert reuse["again_accesses"] == sum(row["n"] for row in gaps.values())
    for one in reuse["histogram"]:
        inside = [row["n"] for gap, row in gaps.items() if one["from_tokens"] <= gap <= one["to_tokens"]]
        assert one["accesses"] == sum(inside)
    if report["cache"]["complete"] and count:
        # A use hits if fewer different experts than fit were used since the last time. Of those in between, each is
        # counted where it is used for the last time before.
        sql.db.execute(
            """
            CREATE OR REPLACE TABLE distances AS
            SELECT u.place, count(v.place) AS distance
            FROM uses u LEFT JOIN uses v
            ON v.place > u.last_place AND v.place < u.place AND (v.next_place IS NULL OR v.next_place > u.place)
            WHERE u.last_place IS NOT NULL GROUP BY u.place
            """
        )
        for point in report["cache"]["curve"]:
            hits = sql.row(f"SELECT count(*) AS n FROM distances WHERE distance < {point['slices']}")["n"]
            shares(point, {"lru": (hits, count)})
            assert point["lru"] <= point["belady"] + 1e-12
