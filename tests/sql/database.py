"""A trace as tables of DuckDB, and how figures are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Final

from llmtraced.schema import TABLES

__all__ = ["Sql", "agree", "opened", "shares"]

# Bytes of the union of ranges: neighbours and overlaps, in order, form islands; an island's size is its last end less
# its first start.
UNIQUE: Final = """
    WITH ranges AS (
        SELECT DISTINCT model, shard, tensor_name, offset_bytes AS low, offset_bytes + bytes AS high
        FROM pagecache WHERE action = 'add'
    ), reached AS (
        SELECT *, max(high) OVER (PARTITION BY model, shard, tensor_name ORDER BY low, high
                                  ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS so_far
        FROM ranges
    ), numbered AS (
        SELECT *, count(*) FILTER (so_far IS NULL OR low > so_far)
                  OVER (PARTITION BY model, shard, tensor_name ORDER BY low, high ROWS UNBOUNDED PRECEDING) AS island
        FROM reached
    ), islands AS (
        SELECT model, shard, tensor_name, island, max(high) - min(low) AS size FROM numbered GROUP BY ALL
    )
    SELECT model, tensor_name, sum(size)::BIGINT AS unique_bytes FROM islands GROUP BY ALL
"""

PER_TENSOR: Final = """
    WITH read AS (
        SELECT model, tensor_name, sum(bytes)::BIGINT AS bytes_read, count(*) AS read_count
        FROM pagecache WHERE action = 'add' GROUP BY ALL
    ), evicted AS (
        SELECT model, tensor_name, sum(bytes)::BIGINT AS evicted_bytes FROM pagecache WHERE action = 'evict'
        GROUP BY ALL
    ), faulted AS (
        SELECT model, tensor_name, count(*) AS faults, count(*) FILTER (major) AS major_faults,
               count(*) FILTER (NOT major) AS minor_faults, sum(latency_ns)::BIGINT AS stall_ns
        FROM faults GROUP BY ALL
    ), operated AS (
        SELECT model, tensor_name, count(*) AS ops FROM ops WHERE tensor_name IS NOT NULL GROUP BY ALL
    )
    SELECT model, tensor_name, layer, component, size_bytes, backed,
           coalesce(bytes_read, 0) AS bytes_read, coalesce(unique_bytes, 0) AS unique_bytes,
           coalesce(bytes_read, 0) - coalesce(unique_bytes, 0) AS reread_bytes,
           coalesce(read_count, 0) AS read_count, coalesce(evicted_bytes, 0) AS evicted_bytes,
           coalesce(faulted.faults, 0) + coalesce(operated.ops, 0) AS access_count,
           coalesce(major_faults, 0) AS major_faults, coalesce(minor_faults, 0) AS minor_faults,
           coalesce(stall_ns, 0) AS stall_ns
    FROM tensors
    LEFT JOIN read USING (model, tensor_name) LEFT JOIN evicted USING (model, tensor_name)
    LEFT JOIN faulted USING (model, tensor_name) LEFT JOIN operated USING (model, tensor_name)
    LEFT JOIN uniquely USING (model, tensor_name)
"""

MOVES: Final = """
    SELECT model, shard, tensor_name, expert, page, token, phase, action, cause, timestamp, n,
           greatest(page * 4096, offset_bytes) AS low,
           least(page * 4096 + 4096, offset_bytes + bytes) - greatest(page * 4096, offset_bytes) AS size
    FROM pagecache_all, unnest(generate_series(offset_bytes // 4096, (offset_bytes + bytes - 1) // 4096)) AS p(page)
"""
"""Rows of the page cache, cut into pages: where two tensors meet in one, each has its part (``low`` tells which)."""


class Sql:
    """A trace's session in DuckDB.

    For each table two views: ``faults_all`` and, restricted to a phase, ``faults``; ``tensors`` is always whole. ``n``
    numbers the rows as they were recorded. And three tables: ``uniquely`` (of each model and tensor, also of what is in
    none, ``unique_bytes``), ``per_tensor`` (every figure of the tensors in the map), and ``moves`` (MOVES with, for
    each part of a page, what happened to it before and after; not restricted).

    Args:
        trace: the trace's folder.
        session: the session's name.
    """

    def __init__(self, trace: Path, session: str) -> None:
        import duckdb

        self.db = duckdb.connect()
        self.db.execute("SET enable_progress_bar = false")
        self.db.execute(f"SET temp_directory = '{gettempdir()}'")  # else a folder where the tests are run
        for table in TABLES:
            files = [str(path) for path in sorted((trace / table).rglob(f"{session}-*.parquet"))]
            if files:
                source = f"read_parquet({files}, hive_partitioning = false, filename = true, file_row_number = true)"
                order = "row_number() OVER (ORDER BY filename, file_row_number)"
            else:
                self.db.register(f"no_{table}", TABLES[table].empty_table())
                source, order = f"no_{table}", "0"
            self.db.execute(f"CREATE VIEW {table}_all AS SELECT *, {order} AS n FROM {source}")
        self._moved = False

    def restrict(self, phase: str | None) -> None:
        """Restrict the views to a phase; None: to nothing."""
        self.phase = phase
        self.counted = "true" if phase is None else f"phase = '{phase}'"
        for table in TABLES:
            where = "true" if table == "tensors" else self.counted
            self.db.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM {table}_all WHERE {where}")
        self.db.execute(f"CREATE OR REPLACE TABLE uniquely AS {UNIQUE}")
        self.db.execute(f"CREATE OR REPLACE TABLE per_tensor AS {PER_TENSOR}")

    def follow(self) -> None:
        """Make the table ``moves``, which is large."""
        if not self._moved:
            self.db.execute(
                f"""
                CREATE TABLE moves AS SELECT *,
                    lag(action) OVER part AS last_action, lag(timestamp) OVER part AS last_time,
                    lag(token) OVER part AS last_token,
                    lead(action) OVER part AS next_action, lead(timestamp) OVER part AS next_time
                FROM ({MOVES}) WINDOW part AS (PARTITION BY model, shard, low ORDER BY n)
                """
            )
            self._moved = True

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows, each a dict by column."""
        found = self.db.execute(query)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def row(self, query: str) -> dict[str, Any]:
        """Return the only row."""
        (row,) = self.rows(query)
        return row

    def by(self, query: str, *keys: str) -> dict[Any, dict[str, Any]]:
        """Return the rows by their key columns, without these: one value, or a tuple of several."""
        found: dict[Any, dict[str, Any]] = {}
        for row in self.rows(query):
            key = tuple(row.pop(name) for name in keys)
            assert key not in found, f"two rows for {key}"
            found[key if len(keys) > 1 else key[0]] = row
        return found


@cache
def opened(trace: Path, session: str) -> Sql:
    """Return the tables of a session; they are made once."""
    return Sql(trace, session)


def agree(found: Mapping[str, Any], expected: Mapping[str, Any], what: object = "") -> None:
    """Assert that ``found`` has all that is expected; floats may differ in their last digits."""
    for key, value in expected.items():
        got = found[key]
        if isinstance(value, float) and got is not None:
            assert math.isclose(got, value, rel_tol=1e-9, abs_tol=1e-9), (what, key, got, value)
        else:
            assert got == value, (what, key, got, value)


def shares(found: Mapping[str, Any], parts: Mapping[str, tuple[float | None, float | None]]) -> None:
    """Assert that ``found`` has quotients: of nothing, None."""
    agree(found, {name: (part or 0) / whole if whole else None for name, (part, whole) in parts.items()})
