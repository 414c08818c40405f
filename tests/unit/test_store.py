"""Trace files: whole or not there, with the footer, the encodings and the names that docs/trace.md promises."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtraced.errors import FAILED, LlmtracedError
from llmtraced.schema import SCHEMA_VERSION, TABLES
from llmtraced.store import METADATA_KEY, ROW_GROUP, TraceWriter, clean_leftovers

ACCOUNT = {"faults": {"counted": 12, "delivered": 10, "dropped": 2}}


def column(kind: pa.DataType, n: int) -> pa.Array:
    numbers = np.arange(n)
    if pa.types.is_dictionary(kind):
        return pa.array([f"name{i % 7}" for i in range(n)]).dictionary_encode().cast(kind)
    if pa.types.is_list(kind):
        return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32)), pa.array(numbers.astype(np.int32)))
    if pa.types.is_boolean(kind):
        return pa.array(numbers % 3 == 0)
    return pa.array([f"s{i}" for i in range(n)]) if pa.types.is_string(kind) else pa.array(numbers % 120).cast(kind)


def table(name: str = "faults", n: int = 5) -> pa.Table:
    schema = TABLES[name]
    return pa.table([column(field.type, n) for field in schema], schema=schema)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def full(*_args: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def writer(tmp_path: Path) -> TraceWriter:
    return TraceWriter(tmp_path / "trace", "0badcafe-1-2", {"pid": 7, "models": [{"path": "ä\x1b"}]})


def test_names_sequence_and_totals(writer: TraceWriter, tmp_path: Path) -> None:
    for n in (5, 0, 7):
        writer.write("faults", table(n=n), "faults", ACCOUNT)
    writer.write("tokens", table("tokens", 1), "tokens", {})
    assert everything(tmp_path) == [
        *(f"trace/faults/0badcafe-1-2-00000{i}.parquet" for i in range(3)),
        "trace/tokens/0badcafe-1-2-000000.parquet",
    ]
    assert writer.rows["faults"] == 12
    assert writer.rows["ops"] == 0
    sizes = [p.stat().st_size for p in (tmp_path / "trace/faults").iterdir()]
    assert writer.bytes["faults"] == sum(sizes)


def test_footer(writer: TraceWriter, tmp_path: Path) -> None:
    writer.write("faults", table(), "faults", ACCOUNT)
    schema = pq.read_schema(tmp_path / "trace/faults/0badcafe-1-2-000000.parquet")
    assert METADATA_KEY == b"llmtraced"
    assert json.loads(schema.metadata[METADATA_KEY]) == {
        "schema_version": SCHEMA_VERSION,
        "session": "0badcafe-1-2",
        "pid": 7,
        "models": [{"path": "ä\x1b"}],
        "table": "faults",
        "probe": "faults",
        "account": ACCOUNT,
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_table_comes_back_as_it_was(writer: TraceWriter, tmp_path: Path, name: str) -> None:
    for n in (0, 100):
        writer.write(name, table(name, n), "", {})
    for file, n in zip(sorted((tmp_path / "trace" / name).iterdir()), (0, 100), strict=True):
        found = pq.ParquetFile(file)
        assert found.schema_arrow.remove_metadata() == TABLES[name]
        assert found.read().replace_schema_metadata().to_pylist() == table(name, n).to_pylist()


def test_hive_folders(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, "s", {}, "host=a/model=b/date=2024-01-01")
    writer.write("ops", table("ops"), "ops", {})
    assert everything(tmp_path) == ["ops/host=a/model=b/date=2024-01-01/s-000000.parquet"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = TraceWriter(None, "s", {})
    writer.write("faults", table(), "faults", ACCOUNT)
    writer.rewrite("tensors", table("tensors"))
    assert list(tmp_path.iterdir()) == []
    assert sum(writer.rows.values()) == sum(writer.bytes.values()) == 0


def test_rewrite_takes_the_place_of_what_was_there(writer: TraceWriter, tmp_path: Path) -> None:
    for n in (3, 4):
        writer.rewrite("tensors", table("tensors", n))
        assert everything(tmp_path) == ["trace/tensors/0badcafe-1-2-000000.parquet"]
        assert pq.read_table(tmp_path / "trace/tensors").num_rows == writer.rows["tensors"] == n
    assert writer.bytes["tensors"] == (tmp_path / "trace/tensors/0badcafe-1-2-000000.parquet").stat().st_size


def test_a_rewrite_that_fails_changes_nothing(writer: TraceWriter, tmp_path: Path) -> None:
    writer.rewrite("tensors", table("tensors", 3))
    before = (
        dict(writer.rows),
        dict(writer.bytes),
        (tmp_path / "trace/tensors/0badcafe-1-2-000000.parquet").read_bytes(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(LlmtracedError):
            writer.rewrite("tensors", table("tensors", 4))
    after = (tmp_path / "trace/tensors/0badcafe-1-2-000000.parquet").read_bytes()
    assert (writer.rows, writer.bytes, after) == before
    writer.rewrite("tensors", table("tensors", 4))
    assert everything(tmp_path) == ["trace/tensors/0badcafe-1-2-000000.parquet"]


def test_rewrite_leaves_other_sessions_alone(tmp_path: Path) -> None:
    for session in ("one", "two"):
        TraceWriter(tmp_path, session, {}).rewrite("tensors", table("tensors", 2))
    assert everything(tmp_path) == ["tensors/one-000000.parquet", "tensors/two-000000.parquet"]


def test_row_groups_and_encodings(writer: TraceWriter, tmp_path: Path) -> None:
    n = 2 * ROW_GROUP + 10
    one = table("faults", 1000)
    writer.write("faults", pa.concat_tables([one] * (n // 1000 + 1)).slice(0, n), "faults", {})
    found = pq.ParquetFile(tmp_path / "trace/faults/0badcafe-1-2-000000.parquet").metadata
    assert ROW_GROUP == 131072
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [ROW_GROUP, ROW_GROUP, 10]
    columns = {c.path_in_schema: c for c in (found.row_group(0).column(i) for i in range(found.num_columns))}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    split = {"address", "offset_bytes", "latency_ns"}
    names = {"phase", "model", "tensor_name", "thread"}
    for name, chunk in columns.items():
        assert ("BYTE_STREAM_SPLIT" in chunk.encodings) == (name in split), name
        assert ("RLE_DICTIONARY" in chunk.encodings) == (name in names), name
        assert ("DELTA_BINARY_PACKED" in chunk.encodings) == (name in {"timestamp", "token", "shard", "expert"}), name
        told = name in {"timestamp", "token", "phase", "model", "shard"}
        assert chunk.is_stats_set == told, "what readers skip row groups by, or need not read"


# --- what fails ---------------------------------------------------------------------------------------------------


def test_a_reader_never_sees_half_a_file(writer: TraceWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    write, close = pq.ParquetWriter.write_table, pq.ParquetWriter.close

    def spy(self: pq.ParquetWriter, *args: Any, **options: Any) -> None:
        write(self, *args, **options)
        seen.append(everything(tmp_path))

    def spy_close(self: pq.ParquetWriter) -> None:
        seen.append(everything(tmp_path))
        close(self)
        seen.append(everything(tmp_path))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", spy)
    monkeypatch.setattr(pq.ParquetWriter, "close", spy_close)
    writer.write("faults", table(), "faults", {})
    assert len(seen) >= 3
    assert all(names == ["trace/faults/.tmp-0badcafe-1-2-000000.parquet"] for names in seen)
    assert everything(tmp_path) == ["trace/faults/0badcafe-1-2-000000.parquet"]


@pytest.mark.parametrize("step", ["write_table", "close", "replace"])
def test_a_full_disk_leaves_nothing(
    writer: TraceWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    writer.write("faults", table(), "faults", {})
    before = everything(tmp_path), dict(writer.rows), dict(writer.bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "replace" else pq.ParquetWriter, step, full)
        with pytest.raises(LlmtracedError) as caught:
            writer.write("faults", table(), "faults", {})
    final = tmp_path / "trace/faults/0badcafe-1-2-000001.parquet"
    assert str(caught.value) == f"cannot write {final}: No space left on device"
    assert caught.value.exit_code == FAILED
    assert (everything(tmp_path), writer.rows, writer.bytes) == before
    writer.write("faults", table(), "faults", {})
    assert final.is_file(), "the number was not used up"


def test_rows_that_do_not_fit_leave_nothing(writer: TraceWriter, tmp_path: Path) -> None:
    """A mistake of ours, not of the disk: no LlmtracedError, but no half file either."""
    with pytest.raises((pa.ArrowException, ValueError)):
        writer.write("faults", table("tokens"), "faults", {})
    assert everything(tmp_path) == []


@pytest.mark.parametrize("taken", ["trace", "trace/faults"])
def test_a_folder_that_cannot_be(writer: TraceWriter, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("a file")
    with pytest.raises(LlmtracedError, match=r"cannot write .*000000\.parquet: (Not a directory|File exists)"):
        writer.write("faults", table(), "faults", {})
    assert everything(tmp_path) == [taken]


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    """The kernel's own refusal, half-way through a file: RLIMIT_FSIZE stands in for a full disk."""
    code = f"""
import resource, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_store import TraceWriter, LlmtracedError, everything, np, pa, table
folder = Path({str(tmp_path)!r})
rows = table("faults", 1000)
noise = pa.array(np.random.default_rng(1).integers(0, 1 << 62, 1000))
rows = pa.concat_tables([rows.set_column(rows.schema.get_field_index("address"), "address", noise)] * 200)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
writer = TraceWriter(folder, "s", {{}})
try:
    writer.write("faults", rows, "faults", {{}})
except LlmtracedError as error:
    print(error)
assert everything(folder) == [], everything(folder)
writer.write("faults", table("faults", 3), "faults", {{}})
assert everything(folder) == ["faults/s-000000.parquet"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.startswith(f"cannot write {tmp_path}/faults/s-000000.parquet: ")
    assert "File too large" in done.stdout


def test_leftovers_of_a_writer_that_died(writer: TraceWriter, tmp_path: Path) -> None:
    writer.write("faults", table(), "faults", {})
    deep = tmp_path / "trace/ops/host=a/model=b"
    deep.mkdir(parents=True)
    for path in (deep / ".tmp-s-000000.parquet", tmp_path / "trace/faults/.tmp-s-000009.parquet"):
        path.write_bytes(b"PAR1")
    (deep / "mine.txt").write_text("kept")
    assert clean_leftovers(tmp_path / "trace") == 2
    assert everything(tmp_path) == ["trace/faults/0badcafe-1-2-000000.parquet", "trace/ops/host=a/model=b/mine.txt"]
    assert clean_leftovers(tmp_path / "trace") == 0
    assert clean_leftovers(tmp_path / "no such folder") == 0
