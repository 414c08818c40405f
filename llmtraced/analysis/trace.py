"""Open a trace folder: lazy frames per table, the session they belong to, the account of what was lost.

The footers decide what is read: each Parquet file names its session, its format version and its own account. A file
that cannot be read, or that llmtraced did not write, is left out with a warning and the rest is still analysed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llmtraced import __version__
from llmtraced.errors import LlmtracedError, printable
from llmtraced.schema import LATER, SCHEMA_VERSION, TABLES

__all__ = ["ACCOUNT", "Stored", "Trace", "collect", "damaged", "open_trace", "unmapped", "verdict"]

ACCOUNT: Final = ("counted", "delivered", "dropped", "missed")
"""The figures kept for each probe; the units are the probe's own (events, pages, records)."""

_METADATA: Final = b"llmtraced"
_CLOCKS: Final = ("timestamp", "start_ns")
_TICK_NS: Final = 10_000_000  # USER_HZ is 100 on every Linux that we run on
_EXPECTED: Final = (
    "a trace is the folder that `llmtraced record -o TRACE` or the daemon wrote, with sub-folders such as "
    "tokens/, faults/ and pagecache/ of Parquet files"
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of a table, and the rows of each of its row groups."""

    path: Path
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """One session of a trace folder.

    Attributes:
        path: the trace folder.
        session: the session that the tables are restricted to.
        sessions: every session in the folder, oldest first.
        meta: the newest footer of this session (``boot_id``, ``kernel``, ``pid``, ``command``, ``detail``, …), with
            ``models`` merged over all its files, and ``realtime_offset_ns`` as it was when the session began.
        tables: a lazy frame per table of :data:`llmtraced.schema.TABLES`; empty but typed where nothing was recorded.
        files: the files behind each table, in the order of its rows.
        rows: rows per table, from the footers.
        tensors: the tensor map, one row a tensor, in file order.
        account: per probe, the sum over the session's files of :data:`ACCOUNT`.
        first_ns: the first time recorded, CLOCK_MONOTONIC ns (token 0 begins with the recording); None: no rows.
        last_ns: the last time recorded, CLOCK_MONOTONIC ns.
        notes: what the reader of a report has to know: files left out, sessions not shown.
    """

    path: Path
    session: str
    sessions: tuple[str, ...]
    meta: Mapping[str, Any]
    tables: Mapping[str, pl.LazyFrame]
    files: Mapping[str, tuple[Stored, ...]]
    rows: Mapping[str, int]
    tensors: pl.DataFrame
    account: dict[str, dict[str, int]]
    first_ns: int | None
    last_ns: int | None
    notes: tuple[str, ...]

    def table(self, name: str, phase: str | None = None) -> pl.LazyFrame:
        """Return the table ``name``, restricted to the rows of ``phase`` when one is given."""
        frame = self.tables[name]
        return frame if phase is None else frame.filter(pl.col("phase") == phase)

    @property
    def models(self) -> list[str]:
        """The names of the models that were traced."""
        return [str(model.get("model")) for model in self.meta["models"]]

    def slices(self, name: str, phase: str | None = None, rows: int = 8_000_000) -> Iterator[pl.LazyFrame]:
        """Yield the table ``name`` in consecutive pieces of up to ``rows`` recorded rows (at least one piece).

        For aggregations with as many groups as the model has pages: polars' streaming ``group_by`` keeps every row
        of those in memory (about 35 bytes a row, measured), so they are folded piece by piece instead.
        """
        for start in range(0, max(self.rows[name], 1), rows):
            piece = self.tables[name].slice(start, rows)
            yield piece if phase is None else piece.filter(pl.col("phase") == phase)


@dataclass(frozen=True)
class _File:
    path: Path
    table: str
    meta: dict[str, Any]
    groups: tuple[int, ...]
    first_ns: int | None
    last_ns: int | None

    @property
    def rows(self) -> int:
        return sum(self.groups)

    @property
    def session(self) -> str:
        return str(self.meta["session"])

    @property
    def version(self) -> int:
        return int(self.meta["schema_version"])

    @property
    def boot(self) -> str:
        return str(self.meta.get("boot_id"))

    @property
    def offset_ns(self) -> int:
        return int(self.meta.get("realtime_offset_ns") or 0)

    @property
    def began(self) -> tuple[bool, int]:
        """When it began, ns of its boot's clock: by its first row (False), else by its session's name (True).

        That tells the recording's beginning in ms or, in older traces, the process's in ticks.
        """
        if self.first_ns is not None:
            return False, self.first_ns
        told = re.search(r"-(\d+)(?:\.(\d+))?$", self.session)
        if told is None:
            return True, 0
        return True, int(told[1]) * _TICK_NS if told[2] is None else int(told[2]) * 1_000_000


def open_trace(path: str | Path, session: str | None = None) -> Trace:
    """Open the trace folder ``path``, restricted to one session.

    Args:
        path: the folder, see docs/trace.md. Files whose name starts with ``.tmp-`` are still being written: ignored.
        session: a session's name or the unique beginning of one; by default the one that began last.

    Raises:
        LlmtracedError: not a trace, no such session, or written by a newer llmtraced.
    """
    folder = Path(path)
    notes: list[str] = []
    files = _footers(folder, notes)
    sessions = _in_order(files)
    chosen = _choose(sessions, session, folder)
    if session is None and len(sessions) > 1:
        others = ", ".join(printable(name) for name in sessions[:-1][-5:])
        notes.append(
            f"the trace holds {len(sessions)} sessions and this is the newest, {printable(chosen)}; "
            f"see another with --session (the ones before: {others})"
        )
    files = sorted((file for file in files if file.session == chosen), key=lambda file: (file.first_ns or 0, file.path))
    for file in files:
        if file.version > SCHEMA_VERSION:
            raise LlmtracedError(
                f"{printable(str(file.path))} has trace format {file.version}, written by llmtraced "
                f"{printable(str(file.meta.get('tool_version', '?')))}; this is llmtraced {__version__}, which reads "
                f"formats up to {SCHEMA_VERSION}: upgrade it with `pip install --upgrade llmtraced`"
            )
    seconds = files[-1].meta.get("flush_seconds")
    if seconds is not None and not any(file.meta.get("ended_ns") for file in files):
        notes.append(
            f"the recording has not been ended: it still runs, or was killed, and then up to {seconds:g} s are missing "
            "at its end"
        )
    by_table: dict[str, list[_File]] = {name: [] for name in TABLES}
    for file in files:
        by_table[file.table].append(file)
    tables = {name: _scan(name, [file.path for file in by_table[name]]) for name in TABLES}
    ended = collect(tables["tokens"].select(pl.col("end_ns").max())).item()
    return Trace(
        path=folder,
        session=chosen,
        sessions=sessions,
        meta={**files[-1].meta, "models": _models(files), **_first_offset(files)},
        tables=tables,
        files={name: tuple(Stored(file.path, file.groups) for file in some) for name, some in by_table.items()},
        rows={name: sum(file.rows for file in some) for name, some in by_table.items()},
        tensors=_tensors(tables["tensors"]),
        account=_account(files),
        first_ns=min((file.first_ns for file in files if file.first_ns is not None), default=None),
        last_ns=max((ns for ns in (*(file.last_ns for file in files), ended) if ns is not None), default=None),
        notes=tuple(notes),
    )


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """Run a query over a trace with polars' streaming engine, so that the trace may be larger than memory.

    Raises:
        LlmtracedError: a file's data (not its footer) is damaged.
    """
    with damaged():
        return frame.collect(engine="streaming")


@contextmanager
def damaged() -> Iterator[None]:
    """Say of errors in here that a file's data is damaged."""
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        reason = printable(str(error).strip().split("\n")[0])
        raise LlmtracedError(f"cannot read the trace's data ({reason}): move the damaged file out of it") from error


def verdict(account: Mapping[str, Mapping[str, int]]) -> str:
    """Return ``complete`` when everything that the kernel counted was recorded, else what is missing, by probe."""
    if not account:
        return "unknown: the trace has no account"
    faults = []
    for probe, figures in account.items():
        faults += [f"{figures[kind]} {kind} ({probe})" for kind in ("dropped", "missed") if figures[kind]]
        astray = figures["counted"] - figures["delivered"] - figures["dropped"]
        if astray:
            faults.append(f"{abs(astray)} {'unaccounted for' if astray > 0 else 'more than counted'} ({probe})")
    return ", ".join(faults) or "complete"


def _footers(folder: Path, notes: list[str]) -> list[_File]:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise LlmtracedError(f"{printable(str(folder))} {what}; {_EXPECTED}")
    paths = [
        (table, path)
        for table in TABLES
        for path in sorted((folder / table).rglob("*.parquet"))
        if not path.name.startswith(".tmp-")
    ]
    files = []
    for table, path in paths:  # by one thread: two take half as long again, they wait for each other
        try:
            files.append(_footer(table, path))
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = printable(str(error).strip().split("\n")[0])
            notes.append(f"left out {printable(str(path.relative_to(folder)))}: {reason}")
    if not files:
        unread = f" ({len(notes)} files in it cannot be read; the first: {notes[0]})" if notes else ""
        raise LlmtracedError(f"{printable(str(folder))} holds no trace{unread}; {_EXPECTED}")
    return files


def _footer(table: str, path: Path) -> _File:
    """Read one file's footer; ValueError says what is wrong with it."""
    with pa.OSFile(str(path)) as file, pq.ParquetFile(file) as parquet:
        schema, footer = parquet.schema_arrow, parquet.metadata
    try:
        meta = json.loads((schema.metadata or {})[_METADATA])
        known = isinstance(meta["session"], str) and isinstance(meta["schema_version"], int)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError("not written by llmtraced (its footer does not say so)")
    if meta["schema_version"] <= SCHEMA_VERSION and not schema.equals(TABLES[table]):
        names = set(schema.names)
        for field in TABLES[table]:
            if field.name in LATER.get(table, ()) and field.name not in names:
                continue
            if field.name not in names or _kind(schema.field(field.name).type) != _kind(field.type):
                raise ValueError(f"column {field.name} of the table {table} is missing or of another type")
    clocks = [at for at, name in enumerate(footer.schema.names) if name in _CLOCKS]
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    spans = [
        (statistics.min, statistics.max)
        for group in groups
        for clock in clocks
        if (statistics := group.column(clock).statistics) is not None and statistics.has_min_max
    ]
    first, last = min((low for low, _ in spans), default=None), max((high for _, high in spans), default=None)
    return _File(path, table, meta, tuple(group.num_rows for group in groups), first, last)


def _kind(of: pa.DataType) -> tuple[bool, pa.DataType]:
    """Return what has to agree: the width of a dictionary's index does not matter."""
    return (True, of.value_type) if pa.types.is_dictionary(of) else (False, of)


def unmapped(trace: Trace) -> list[str]:
    """Return the models of which the process had nothing mapped when it was last looked at: it has read them.

    Traces of earlier versions do not say.
    """
    return [str(model.get("model")) for model in trace.meta["models"] if model.get("mapped_bytes") == 0]


def _in_order(files: Iterable[_File]) -> tuple[str, ...]:
    """Return the sessions, oldest first: of one boot by its clock, boots by the wall clock as it was last set."""
    began: dict[str, tuple[bool, int]] = {}  # the smaller one counts, so a row goes before a name
    boots: dict[str, tuple[int, int]] = {}
    of: dict[str, str] = {}
    for file in files:
        began[file.session] = min(file.began, began.get(file.session, file.began))
        boots[file.boot] = max((file.last_ns or 0, file.offset_ns), boots.get(file.boot, (-1, 0)))
        of[file.session] = file.boot
    return tuple(sorted(began, key=lambda name: (began[name][1] + boots[of[name]][1], name)))


def _first_offset(files: Iterable[_File]) -> dict[str, int]:
    """Return ``realtime_offset_ns`` of the file that was written first: later ones tell of a clock set meanwhile.

    A token's row is written when it ends, which may be long after the start that it has: other tables say it better.
    """
    known = [
        (file.table == "tokens", file.last_ns, file.offset_ns)
        for file in files
        if file.last_ns is not None and file.meta.get("realtime_offset_ns") is not None
    ]
    return {"realtime_offset_ns": min(known)[-1]} if known else {}


def _choose(sessions: tuple[str, ...], wanted: str | None, folder: Path) -> str:
    if wanted is None:
        return sessions[-1]
    found = [name for name in sessions if name == wanted] or [name for name in sessions if name.startswith(wanted)]
    if len(found) != 1:
        problem = "matches several sessions" if found else "is no session"
        raise LlmtracedError(
            f"{printable(wanted)} {problem} of {printable(str(folder))}; it holds: "
            + ", ".join(printable(name) for name in (found or sessions))
        )
    return found[0]


def _scan(table: str, paths: list[Path]) -> pl.LazyFrame:
    typed = pl.from_arrow(TABLES[table].empty_table())
    assert isinstance(typed, pl.DataFrame)
    if not paths:
        return typed.lazy()
    return pl.scan_parquet(
        paths,
        schema=typed.schema,
        hive_partitioning=False,
        extra_columns="ignore",
        missing_columns="insert",
        glob=False,
        low_memory=True,
    )


def _tensors(table: pl.LazyFrame) -> pl.DataFrame:
    return collect(
        table.with_columns(pl.col("model").cast(pl.String))
        .unique(["model", "shard", "tensor_name"], keep="last", maintain_order=True)
        .sort("model", "shard", "offset_bytes")
    )


def _models(files: Iterable[_File]) -> list[dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for file in files:
        for model in file.meta.get("models") or ():
            models[str(model.get("model"))] = dict(model)
    return list(models.values())


def _account(files: Iterable[_File]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(ACCOUNT, 0))
    for file in files:
        for probe, figures in (file.meta.get("account") or {}).items():
            for kind in ACCOUNT:
                total[str(probe)][kind] += int(figures.get(kind, 0))
    return dict(sorted(total.items()))
