"""Opening trace folders: sessions, accounts, damage; and the builder of small traces that the other tests use."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtraced.analysis.trace import collect, open_trace, verdict
from llmtraced.errors import LlmtracedError
from llmtraced.schema import SCHEMA_VERSION, TABLES

SESSION = "0badcafe-100-5000"
ROW: dict[str, dict[str, Any]] = {
    "tensors": {
        "type": "F16",
        "layer": -1,
        "component": "c",
        "shard": 0,
        "n_experts": 0,
        "expert_bytes": 0,
        "backed": True,
    },
    "tokens": {
        "n_tokens": 1,
        "n_outputs": 1,
        "phase": "decode",
        "stall_ns": 0,
        "fault_ns": 0,
        "major_faults": 0,
        "minor_faults": 0,
    }
    | {"bytes_read": 0, "graph_nodes": 1},
    "ops": {"phase": "decode", "data_ptr": 0, "bytes_accessed": 0, "op": "MUL_MAT", "thread": 1, "duration_ns": 0},
    "faults": {"phase": "decode", "thread": 1, "address": 0, "offset_bytes": 0, "shard": 0, "expert": -1},
    "pagecache": {
        "phase": "decode",
        "shard": 0,
        "expert": -1,
        "cause": "fault",
        "pid": 1,
        "comm": "llama-server",
        "action": "add",
    },
}


class Builder:
    """Writes one Parquet file a call into ``path``, with the footer of docs/trace.md."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sequence: dict[tuple[str, str], int] = defaultdict(int)

    def write(
        self,
        table: str,
        rows: list[dict[str, Any]],
        session: str = SESSION,
        account: dict[str, Any] | None = None,
        folder: str = "",
        name: str | None = None,
        **meta: Any,
    ) -> Path:
        number = self.sequence[table, session]
        self.sequence[table, session] += 1
        path = self.path / table / folder / (name or f"{session}-{number:06}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        footer = {
            "schema_version": SCHEMA_VERSION,
            "tool_version": "0.1.0",
            "session": session,
            "boot_id": session[:8],
            "kernel": "6.1.0",
            "clock": "CLOCK_MONOTONIC",
            "realtime_offset_ns": 1_700_000_000_000_000_000,
            "pid": 100,
            "command": "llama-server",
            "models": [{"model": "m.gguf", "path": "/m.gguf", "fingerprint": "f", "size_bytes": 100_000}],
            "detail": "faults",
            "probe": table,
            "account": account or {},
        } | meta
        common = {"model": "m.gguf", "token": 1, "timestamp": 1000, **ROW.get(table, {})}
        schema = TABLES[table]
        known = [{key: value for key, value in (common | row).items() if key in schema.names} for row in rows]
        data = pa.Table.from_pylist(known, schema=schema.with_metadata({b"llmtraced": json.dumps(footer).encode()}))
        pq.write_table(data, path, compression="zstd")
        return path

    def tensor(self, *tensors: tuple[str, int, int], **more: Any) -> None:
        """Write the tensor map: name, offset, size."""
        self.write("tensors", [dict(tensor_name=n, offset_bytes=o, size_bytes=s, **more) for n, o, s in tensors])

    def adds(self, *ranges: tuple[str | None, int, int], **more: Any) -> None:
        """Write one page-cache file of adds: tensor name, offset, bytes."""
        self.write("pagecache", [dict(tensor_name=n, offset_bytes=o, bytes=b, **more) for n, o, b in ranges])


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def account(**figures: int) -> dict[str, dict[str, int]]:
    return {"faults": {"counted": 0, "delivered": 0, "dropped": 0, "missed": 0} | figures}


def test_missing_tables_are_empty_and_typed(trace: Builder) -> None:
    trace.tensor(("t", 0, 10))
    opened = open_trace(trace.path)
    for name, schema in TABLES.items():
        expected = pl.from_arrow(schema.empty_table()).schema  # type: ignore[union-attr]
        assert opened.tables[name].collect_schema() == expected
    assert collect(opened.table("faults", "decode")).height == 0
    assert opened.first_ns is None


def test_files_of_a_table_are_read_together_also_below_hive_folders(trace: Builder) -> None:
    trace.adds(("a", 0, 1))
    trace.write(
        "pagecache", [{"tensor_name": "b", "offset_bytes": 0, "bytes": 2}], folder="host=h/model=x/date=2026-01-01"
    )
    trace.write("pagecache", [])
    opened = open_trace(trace.path)
    rows = collect(opened.table("pagecache"))
    assert sorted(rows["bytes"]) == [1, 2]
    assert rows.columns == TABLES["pagecache"].names
    assert set(rows["model"]) == {"m.gguf"}
    assert opened.rows["pagecache"] == 2


def test_files_in_progress_are_ignored_without_a_word(trace: Builder) -> None:
    trace.adds(("a", 0, 1))
    (trace.path / "pagecache" / ".tmp-1.parquet").write_bytes(b"half a file")
    trace.write("pagecache", [{"tensor_name": "b", "offset_bytes": 0, "bytes": 2}], name=".tmp-whole.parquet")
    opened = open_trace(trace.path)
    assert opened.rows["pagecache"] == 1
    assert opened.notes == ()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PAR1"])
def test_a_corrupt_file_is_named_and_the_rest_is_read(trace: Builder, content: bytes) -> None:
    trace.adds(("a", 0, 1))
    (trace.path / "pagecache" / f"{SESSION}-000009.parquet").write_bytes(content)
    opened = open_trace(trace.path)
    assert opened.rows["pagecache"] == 1
    assert len(opened.notes) == 1
    assert f"pagecache/{SESSION}-000009.parquet" in opened.notes[0]


def test_a_truncated_file_is_left_out(trace: Builder) -> None:
    trace.adds(("a", 0, 1))
    cut = trace.write("pagecache", [{"tensor_name": "b", "offset_bytes": 0, "bytes": 2}])
    cut.write_bytes(cut.read_bytes()[:-100])
    opened = open_trace(trace.path)
    assert opened.rows["pagecache"] == 1
    assert len(opened.notes) == 1


def test_a_foreign_file_is_left_out(trace: Builder) -> None:
    trace.adds(("a", 0, 1))
    pq.write_table(pa.table({"x": [1]}), trace.path / "pagecache" / "other.parquet")
    footer = {b"llmtraced": json.dumps({"schema_version": 1, "session": SESSION}).encode()}
    wrong = pa.table({"timestamp": ["noon"]}).replace_schema_metadata(footer)
    pq.write_table(wrong, trace.path / "pagecache" / "wrong.parquet")
    opened = open_trace(trace.path)
    assert opened.rows["pagecache"] == 1
    assert any("not written by llmtraced" in note for note in opened.notes)
    assert any("column timestamp" in note for note in opened.notes)


def test_the_width_of_a_dictionary_index_does_not_matter(trace: Builder) -> None:
    trace.adds(("a", 0, 1), ("b", 1, 2))
    path = trace.path / "pagecache" / f"{SESSION}-000000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("tensor_name")
    narrow = table.set_column(
        at,
        pa.field("tensor_name", pa.dictionary(pa.int8(), pa.string())),
        table[at].cast("string").dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
    )
    pq.write_table(narrow, path)
    trace.adds(("a", 0, 4))
    opened = open_trace(trace.path)
    assert opened.notes == ()
    rows = collect(opened.table("pagecache").group_by("tensor_name").agg(pl.col("bytes").sum()))
    assert dict(rows.iter_rows()) == {"a": 5, "b": 2}


def test_damage_inside_a_file_is_an_error_and_not_a_wrong_answer(trace: Builder) -> None:
    path = trace.write("pagecache", [{"tensor_name": "b", "offset_bytes": i * 7, "bytes": i} for i in range(1000)])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(LlmtracedError, match="cannot read the trace"):
        collect(open_trace(trace.path).table("pagecache"))


def test_not_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "faults").mkdir(parents=True)
    (tmp_path / "damaged" / "faults" / "a.parquet").write_text("x")
    for name, why in (
        ("none", "does not exist"),
        ("file", "is not a folder"),
        ("empty", "holds no trace"),
        ("damaged", "cannot be read"),
    ):
        with pytest.raises(LlmtracedError, match=rf"{why}.*a trace is the folder that") as caught:
            open_trace(tmp_path / name)
        assert caught.value.exit_code == 1


def test_a_newer_format_is_refused(trace: Builder) -> None:
    trace.adds(("a", 0, 1))
    trace.write("faults", [], schema_version=SCHEMA_VERSION + 1, tool_version="9.9")
    with pytest.raises(LlmtracedError, match=r"format 2, written by llmtraced 9\.9.*upgrade"):
        open_trace(trace.path)


def test_the_newest_session_is_the_one_that_began_last(trace: Builder) -> None:
    second = 10**9
    early, late = "0badcafe-100-5000", "0badcafe-200-4000"  # started after 50 s and 40 s: the older was traced later
    trace.write("tokens", [{"start_ns": 90 * second, "end_ns": 99 * second}], session=late)
    trace.write("tokens", [{"start_ns": 60 * second, "end_ns": 95 * second}], session=early)
    trace.write("tensors", [], session=early)
    trace.write("tensors", [], session=late)
    opened = open_trace(trace.path)
    assert opened.sessions == (early, late)
    assert opened.session == late
    assert early in opened.notes[0]
    assert (opened.first_ns, opened.last_ns) == (90 * second, 99 * second)
    chosen = open_trace(trace.path, "0badcafe-1")
    assert chosen.session == early
    assert chosen.notes == ()
    assert collect(chosen.table("tokens"))["start_ns"].to_list() == [60 * second]


def test_a_later_boot_is_newer_although_its_clock_began_again(trace: Builder) -> None:
    day = 86_400 * 10**9
    trace.write("tokens", [{"start_ns": 50 * day, "end_ns": 51 * day}], session="aaaaaaaa-1-1", realtime_offset_ns=0)
    trace.write("tokens", [{"start_ns": 1, "end_ns": 2}], session="bbbbbbbb-1-1", realtime_offset_ns=60 * day)
    assert open_trace(trace.path).session == "bbbbbbbb-1-1"


def test_a_clock_that_is_set_back_makes_no_session_older(trace: Builder) -> None:
    hour = 3600 * 10**9
    for number, offset in ((1, 100 * hour), (2, 76 * hour), (3, 52 * hour)):
        start = number * hour
        trace.write(
            "tokens",
            [{"start_ns": start, "end_ns": start}],
            session=f"aaaaaaaa-{number}-1.1",
            realtime_offset_ns=offset,
        )
    trace.write("tokens", [{"start_ns": hour, "end_ns": hour}], session="bbbbbbbb-1-1.1", realtime_offset_ns=56 * hour)
    trace.write("tensors", [], session="aaaaaaaa-9-1.4000000", realtime_offset_ns=52 * hour)  # 4000 s: no rows
    assert [name[:10] for name in open_trace(trace.path).sessions] == [
        "aaaaaaaa-1",
        "aaaaaaaa-9",
        "aaaaaaaa-2",
        "aaaaaaaa-3",
        "bbbbbbbb-1",
    ]


def test_a_session_began_by_the_clock_of_its_beginning(trace: Builder) -> None:
    trace.write("faults", [{"timestamp": 2000}], realtime_offset_ns=10**18)
    trace.write("faults", [{"timestamp": 5000}], realtime_offset_ns=2 * 10**18)
    trace.write("tokens", [{"start_ns": 1000, "end_ns": 6000}], realtime_offset_ns=2 * 10**18)  # written at its end
    trace.write("tensors", [], realtime_offset_ns=2 * 10**18)
    opened = open_trace(trace.path)
    assert opened.first_ns == 1000
    assert opened.meta["realtime_offset_ns"] == 10**18
    trace.write("faults", [{"timestamp": 100}], session="aaaaaaaa-1-1", realtime_offset_ns=None)
    assert open_trace(trace.path, "aaaaaaaa").meta["realtime_offset_ns"] is None


@pytest.mark.parametrize(("wanted", "why"), [("nope", "is no session"), ("0badcafe", "matches several")])
def test_a_session_that_is_not_there(trace: Builder, wanted: str, why: str) -> None:
    trace.write("tokens", [], session="0badcafe-1-1")
    trace.write("tokens", [], session="0badcafe-2-2")
    with pytest.raises(LlmtracedError, match=f"{why}.*0badcafe-1-1, 0badcafe-2-2"):
        open_trace(trace.path, wanted)


def test_accounts_are_summed_over_the_files_of_the_session(trace: Builder) -> None:
    trace.write("faults", [], account=account(counted=10, delivered=7, dropped=3))
    trace.write("faults", [], account=account(counted=5, delivered=5))
    trace.write("pagecache", [], account={"pagecache": {"counted": 2, "delivered": 2, "dropped": 0, "missed": 1}})
    trace.write("faults", [], session="aaaaaaaa-1-1", account=account(counted=100, dropped=100))
    opened = open_trace(trace.path, SESSION)
    assert opened.account == {
        "faults": {"counted": 15, "delivered": 12, "dropped": 3, "missed": 0},
        "pagecache": {"counted": 2, "delivered": 2, "dropped": 0, "missed": 1},
    }
    assert verdict(opened.account) == "3 dropped (faults), 1 missed (pagecache)"


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"counted": 4, "delivered": 4}, "complete"),
        ({"counted": 4, "delivered": 3, "dropped": 1}, "1 dropped (faults)"),
        ({"counted": 4, "delivered": 3}, "1 unaccounted for (faults)"),
        ({"counted": 4, "delivered": 6}, "2 more than counted (faults)"),
    ],
)
def test_verdict(figures: dict[str, int], expected: str) -> None:
    assert verdict(account(**figures)) == expected


def test_no_account_is_not_called_complete() -> None:
    assert verdict({}).startswith("unknown")


def test_models_are_merged_and_tensors_not_repeated(trace: Builder) -> None:
    trace.write("tensors", [{"tensor_name": "t", "offset_bytes": 0, "size_bytes": 1}], models=[{"model": "a"}])
    trace.write("tensors", [{"tensor_name": "t", "offset_bytes": 0, "size_bytes": 1}], models=[{"model": "b"}])
    opened = open_trace(trace.path)
    assert opened.models == ["a", "b"]
    assert opened.tensors.height == 1


def test_slices_cover_every_row_once(trace: Builder) -> None:
    for file in range(3):
        trace.adds(*((None, 10 * file + i, 1) for i in range(5)))
    opened = open_trace(trace.path)
    pieces = [collect(piece)["offset_bytes"].to_list() for piece in opened.slices("pagecache", rows=4)]
    assert [len(piece) for piece in pieces] == [4, 4, 4, 3]
    assert sorted(row for piece in pieces for row in piece) == [10 * file + i for file in range(3) for i in range(5)]
    assert len(list(opened.slices("faults"))) == 1
