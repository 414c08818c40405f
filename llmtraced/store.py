"""Trace folders: Parquet files that are complete the moment they have their name.

A file is written under a temporary name and renamed, so that a reader, at any moment, sees whole files only, and a
process that dies loses what it had not yet flushed and nothing more. docs/trace.md describes the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from llmtraced.errors import LlmtracedError
from llmtraced.schema import SCHEMA_VERSION, TABLES

__all__ = ["METADATA_KEY", "ROOM", "ROW_GROUP", "TraceWriter", "clean_leftovers"]

METADATA_KEY: Final = b"llmtraced"
"""Key of the footer's metadata: one JSON object."""

ROW_GROUP: Final = 128 * 1024
"""Rows in a row group."""

ROOM: Final = 16 << 20
"""Bytes that must be free before recording goes on where a disk has been full: a busy interval's files."""

# Encodings by what the values are like (docs/benchmarks.md has what each saved): numbers whose bytes are alike by
# position; a handful of values that return in no order; and, all other integers, values that rise in small steps.
_SPLIT: Final = {"address", "offset_bytes", "latency_ns", "bytes", "duration_ns", "data_ptr", "bytes_accessed"}
_FEW: Final = {"thread", "pid"}

# Columns whose least and greatest value the footer tells: times to find rows by, and what is mostly the same in a whole
# file, which then need not be read.
_TOLD: Final = {"timestamp", "token", "start_ns", "phase", "model", "shard"}

# A row group is one page: compressors find more in 1 MB than in the 160 KB of pyarrow's 20,000 rows.
_ONE_PAGE: Final[Mapping[str, int]] = {"data_page_size": 2 * ROW_GROUP * 8} | (
    {"max_rows_per_page": ROW_GROUP} if "max_rows_per_page" in signature(pq.ParquetWriter.__init__).parameters else {}
)
_LEVEL: Final = 3  # of zstd; higher ones take twice the time for 1 % less


def _dictionaries(schema: pa.Schema) -> list[str]:
    return [n for n in schema.names if n in _FEW or pa.types.is_dictionary(schema.field(n).type)]


def _encodings(schema: pa.Schema) -> dict[str, str]:
    found = {}
    for name in schema.names:
        if name not in _FEW and pa.types.is_integer(schema.field(name).type):
            found[name] = "BYTE_STREAM_SPLIT" if name in _SPLIT else "DELTA_BINARY_PACKED"
        elif pa.types.is_list(kind := schema.field(name).type) and pa.types.is_floating(kind.value_type):
            found[f"{name}.list.element"] = "BYTE_STREAM_SPLIT"
    return found


class TraceWriter:
    """Writes the tables of one session into a trace folder.

    Args:
        folder: the trace, made if it is not there; None: nothing is written.
        session: names the traced process for good; file names begin with it.
        metadata: of the session, for every file's footer.
        partition: hive folders below each table, such as ``host=a/model=b/date=c``; none by default.

    Attributes:
        rows, bytes: written so far, by table.
    """

    def __init__(self, folder: Path | None, session: str, metadata: Mapping[str, Any], partition: str = "") -> None:
        self.folder = folder
        self.session = session
        self.partition = partition
        self.rows: dict[str, int] = dict.fromkeys(TABLES, 0)
        self.bytes: dict[str, int] = dict.fromkeys(TABLES, 0)
        self._metadata = {"schema_version": SCHEMA_VERSION, "session": session, **metadata}
        self._sequence: dict[str, int] = dict.fromkeys(TABLES, 0)

    def obstacle(self) -> str:
        """Return why a file would not be written now; empty: nothing is in the way that can be seen without trying."""
        if self.folder is None:
            return ""
        trial = self.folder / f".tmp-{self.session}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = os.statvfs(self.folder)
            if free.f_bavail * free.f_frsize < ROOM:
                return f"cannot write below {self.folder}: {free.f_bavail * free.f_frsize} bytes are free of {ROOM}"
            trial.touch()
            trial.unlink()
        except OSError as error:
            return f"cannot write below {self.folder}: {error.strerror or error}"
        return ""

    def describe(self, metadata: Mapping[str, Any]) -> None:
        """Have the files from now on say this about the session."""
        self._metadata |= metadata

    def write(self, name: str, table: pa.Table, probe: str, account: Mapping[str, Mapping[str, int]]) -> None:
        """Write one file of table ``name``.

        Args:
            name: of the table, a key of schema.TABLES; ``table`` has that schema.
            table: the rows, sorted by time.
            probe: whose account the file carries (empty: none).
            account: by probe: counted, delivered, dropped.

        Raises:
            LlmtracedError: it cannot be written (disk full, read-only); nothing of it is left.
        """
        if self.folder is None:
            return
        folder = self.folder / name / self.partition
        final = folder / f"{self.session}-{self._sequence[name]:06d}.parquet"
        temporary = folder / f".tmp-{final.name}"
        metadata = json.dumps({**self._metadata, "table": name, "probe": probe, "account": account})
        schema = TABLES[name].with_metadata({METADATA_KEY: metadata.encode()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(
                temporary,
                schema,
                compression="zstd",
                compression_level=_LEVEL,
                use_dictionary=_dictionaries(schema),
                column_encoding=_encodings(schema),
                write_statistics=[name for name in schema.names if name in _TOLD],
                store_schema=True,
                **_ONE_PAGE,
            ) as writer:
                writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
            size = temporary.stat().st_size
            temporary.replace(final)
        except BaseException as error:
            with suppress(OSError):  # the folder itself may be what cannot be had
                temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise LlmtracedError(f"cannot write {final}: {error.strerror or error}") from error
        self._sequence[name] += 1
        self.rows[name] += table.num_rows
        self.bytes[name] += size

    def rewrite(self, name: str, table: pa.Table) -> None:
        """Write the table ``name`` as one file in the place of what was written of it before."""
        before = self._sequence[name], self.rows[name], self.bytes[name]
        self._sequence[name] = self.rows[name] = self.bytes[name] = 0
        try:
            self.write(name, table, "", {})
        except BaseException:
            self._sequence[name], self.rows[name], self.bytes[name] = before
            raise


def clean_leftovers(folder: Path) -> int:
    """Delete temporary files that a writer which died has left in a trace; return how many."""
    leftovers = list(folder.glob("**/.tmp-*.parquet")) if folder.is_dir() else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
