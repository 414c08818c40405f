"""Re-read counts against answers worked out by hand, and against a brute-force set of bytes."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis import columns, reads
from llmtraced.analysis.reads import union
from llmtraced.analysis.reread import Reread, TensorReads, reread
from llmtraced.analysis.trace import Trace, open_trace

CONTRACT = {
    *("tensor_name", "layer", "component", "size_bytes", "bytes_read", "reread_bytes", "read_count"),
    *("access_count", "major_faults", "minor_faults", "stall_ns"),
}


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def of(report: Reread, name: str) -> TensorReads:
    (found,) = (tensor for tensor in report["tensors"] if tensor["tensor_name"] == name)
    return found


def test_the_contract_field_names(trace: Builder) -> None:
    trace.tensor(("t", 0, 10))
    report = reread(open_trace(trace.path))
    assert set(report) == {
        *("total_bytes_read", "unique_bytes", "reread_bytes", "amplification", "tensors", "account"),
        *("session", "models", "phase", "other_bytes_read", "other_reread_bytes", "verdict", "notes"),
        *("returned_bytes", "away_ns", "away_tokens", "layers", "components", "experts"),
    }
    more = {"model", "unique_bytes", "evicted_bytes", "backed", "returned_bytes", "away_ns", "away_tokens"}
    assert set(report["tensors"][0]) == CONTRACT | more


def test_partial_overlaps_over_several_files(trace: Builder) -> None:
    trace.tensor(("t", 1000, 100), ("u", 1100, 50), layer=3, component="attn_q")
    trace.adds(("t", 1000, 40), ("t", 1030, 40))  # 0-40, 30-70: 70 unique of 80
    trace.adds(("t", 1000, 100), ("u", 1100, 50))  # all of it again: 100 unique of 180
    trace.adds(("t", 1010, 10))  # inside what was read
    report = reread(open_trace(trace.path))
    assert (report["total_bytes_read"], report["unique_bytes"], report["reread_bytes"]) == (240, 150, 90)
    assert report["amplification"] == 240 / 150
    t, u = of(report, "t"), of(report, "u")
    assert (t["bytes_read"], t["unique_bytes"], t["reread_bytes"], t["read_count"]) == (190, 100, 90, 4)
    assert (u["bytes_read"], u["unique_bytes"], u["reread_bytes"], u["read_count"]) == (50, 50, 0, 1)
    assert (t["layer"], t["component"], t["size_bytes"], t["backed"]) == (3, "attn_q", 100, True)
    assert [tensor["tensor_name"] for tensor in report["tensors"]] == ["t", "u"]


def test_a_page_that_straddles_two_tensors_counts_for_each_its_part(trace: Builder) -> None:
    trace.tensor(("t", 0, 5000), ("u", 5000, 3192))
    for _ in range(3):
        trace.adds(("t", 4096, 904), ("u", 5000, 3192))  # one page of 4096 bytes, split by the recorder
    report = reread(open_trace(trace.path))
    assert (report["total_bytes_read"], report["unique_bytes"]) == (3 * 4096, 4096)
    assert of(report, "t")["reread_bytes"] == 2 * 904
    assert of(report, "u")["reread_bytes"] == 2 * 3192


def test_bytes_outside_tensors_are_other_and_in_the_totals(trace: Builder) -> None:
    trace.tensor(("t", 4096, 4096))
    trace.adds((None, 0, 4096), (None, 0, 4096), ("t", 4096, 4096))
    report = reread(open_trace(trace.path))
    assert (report["other_bytes_read"], report["other_reread_bytes"]) == (8192, 4096)
    assert report["total_bytes_read"] == 12288
    assert report["reread_bytes"] == 4096
    assert len(report["tensors"]) == 1


def test_page_faults_and_evictions_are_not_reads(trace: Builder) -> None:
    trace.tensor(("t", 0, 100), ("never", 100, 100))
    trace.write("faults", [{"tensor_name": "t", "major": True, "latency_ns": 5}])
    trace.adds(("t", 0, 100), action="evict")
    report = reread(open_trace(trace.path))
    assert (report["total_bytes_read"], report["unique_bytes"], report["amplification"]) == (0, 0, None)
    t = of(report, "t")
    assert (t["bytes_read"], t["read_count"], t["evicted_bytes"], t["access_count"]) == (0, 0, 100, 1)
    assert of(report, "never")["access_count"] == 0


def test_faults_and_ops_by_tensor(trace: Builder) -> None:
    trace.tensor(("t", 0, 100))
    faults = [(True, 100), (True, 50), (False, 7), (None, None)]
    trace.write("faults", [{"tensor_name": "t", "major": major, "latency_ns": ns} for major, ns in faults])
    trace.write("ops", [{"tensor_name": "t"}, {"tensor_name": "t"}, {"tensor_name": "elsewhere"}])
    report = reread(open_trace(trace.path))
    t = of(report, "t")
    assert (t["major_faults"], t["minor_faults"], t["stall_ns"], t["access_count"]) == (2, 1, 157, 6)
    elsewhere = of(report, "elsewhere")  # not in the map: kept, and said so
    assert (elsewhere["access_count"], elsewhere["size_bytes"], elsewhere["backed"]) == (1, None, None)


def test_a_phase_is_counted_by_itself(trace: Builder) -> None:
    trace.tensor(("t", 0, 100))
    trace.adds(("t", 0, 100), phase="load")
    trace.adds(("t", 0, 60), ("t", 0, 60), phase="decode")
    trace.adds(("t", 0, 100), phase="decode", action="evict")
    trace.write("faults", [{"tensor_name": "t", "major": True, "latency_ns": 5, "phase": "load"}])
    opened = open_trace(trace.path)
    whole, decode = reread(opened), reread(opened, "decode")
    assert (whole["total_bytes_read"], whole["unique_bytes"]) == (220, 100)
    assert (decode["total_bytes_read"], decode["unique_bytes"], decode["phase"]) == (120, 60, "decode")
    assert of(decode, "t")["major_faults"] == 0
    assert of(decode, "t")["evicted_bytes"] == 100
    assert reread(opened, "prompt")["total_bytes_read"] == 0


def test_same_names_and_offsets_in_two_models_and_two_shards(trace: Builder) -> None:
    for model in ("a", "b"):
        trace.write("tensors", [{"tensor_name": "t", "offset_bytes": 0, "size_bytes": 10, "model": model}])
        trace.adds(("t", 0, 10), ("t", 0, 10), model=model)
    trace.adds((None, 0, 10), model="a", shard=0)
    trace.adds((None, 0, 10), model="a", shard=1)
    report = reread(open_trace(trace.path))
    assert [(t["model"], t["bytes_read"], t["reread_bytes"]) for t in report["tensors"]] == [
        ("a", 20, 10),
        ("b", 20, 10),
    ]
    assert report["other_reread_bytes"] == 0  # the same offset in two files is not a re-read
    assert report["total_bytes_read"] == 60


def test_rows_without_a_model_name_still_meet_their_tensor(trace: Builder) -> None:
    trace.write("tensors", [{"tensor_name": "t", "offset_bytes": 0, "size_bytes": 10, "model": None}])
    trace.adds(("t", 0, 10), model=None)
    (t,) = reread(open_trace(trace.path))["tensors"]
    assert (t["bytes_read"], t["size_bytes"]) == (10, 10)


def test_unbacked_tensors_are_marked(trace: Builder) -> None:
    trace.tensor(("away", 0, 100), backed=False)
    assert of(reread(open_trace(trace.path)), "away")["backed"] is False


def test_another_session_does_not_count(trace: Builder) -> None:
    trace.write("pagecache", [{"tensor_name": "t", "offset_bytes": 0, "bytes": 7}], session="aaaaaaaa-1-1")
    trace.write("pagecache", [{"tensor_name": "t", "offset_bytes": 0, "bytes": 9}], session="bbbbbbbb-1-2")
    assert reread(open_trace(trace.path, "aaaaaaaa-1-1"))["total_bytes_read"] == 7


def test_a_lossy_trace_says_so(trace: Builder) -> None:
    lossy = {"pagecache": {"counted": 3, "delivered": 1, "dropped": 2, "missed": 0}}
    trace.write("pagecache", [{"tensor_name": "t", "offset_bytes": 0, "bytes": 7}], account=lossy)
    report = reread(open_trace(trace.path))
    assert report["account"] == lossy
    assert report["verdict"] == "2 dropped (pagecache)"


adds = st.lists(
    st.tuples(
        st.sampled_from(["m", "n"]),  # model
        st.integers(0, 1),  # shard
        st.sampled_from([None, "t", "u"]),
        st.integers(0, 60),  # offset
        st.integers(0, 25),  # bytes
        st.sampled_from(["load", "decode"]),
    ),
    max_size=40,
)


def brute_force(rows: list[Any]) -> dict[Any, tuple[int, int]]:
    """Return (bytes, unique bytes) by (model, tensor), byte by byte."""
    read: dict[Any, int] = {}
    seen: dict[Any, set[Any]] = {}
    for model, shard, name, offset, size, _ in rows:
        read[model, name] = read.get((model, name), 0) + size
        seen.setdefault((model, name), set()).update((shard, byte) for byte in range(offset, offset + size))
    return {key: (read[key], len(seen[key])) for key in read}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 25)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_union_is_that_of_a_set_of_bytes(rows: list[Any]) -> None:
    ranges = np.array([(piece, begin, begin + size) for piece, begin, size in rows], np.int64).reshape(-1, 3).T
    piece, begin, end = union(ranges)
    assert (begin[1:] > end[:-1])[piece[1:] == piece[:-1]].all()  # apart
    runs = zip(piece.tolist(), begin.tolist(), end.tolist(), strict=True)
    got = {(number, byte) for number, low, high in runs for byte in range(low, high)}
    assert got == {(piece, byte) for piece, begin, size in rows for byte in range(begin, begin + size)}


@given(adds, st.sampled_from([None, "load", "decode"]), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_the_report_agrees_with_brute_force_and_with_itself(rows: list[Any], phase: str | None, files: int) -> None:
    names = ("model", "shard", "tensor_name", "offset_bytes", "bytes", "phase")
    with tempfile.TemporaryDirectory() as folder:
        trace = Builder(Path(folder))
        for file in range(files):
            trace.write("pagecache", [dict(zip(names, row, strict=True)) for row in rows[file::files]])
        opened: Trace = open_trace(trace.path)
        report = reread(opened, phase)
    expected = brute_force([row for row in rows if phase in (None, row[5])])
    got = {(t["model"], t["tensor_name"]): (t["bytes_read"], t["unique_bytes"]) for t in report["tensors"]}
    assert got == {key: value for key, value in expected.items() if key[1] is not None}
    assert report["total_bytes_read"] == sum(read for read, _ in expected.values())
    assert report["unique_bytes"] == sum(unique for _, unique in expected.values())
    for total, other in (("total_bytes_read", "other_bytes_read"), ("reread_bytes", "other_reread_bytes")):
        key = "bytes_read" if total == "total_bytes_read" else total
        assert report[total] == sum(t[key] for t in report["tensors"]) + report[other]  # type: ignore[literal-required]
    assert report["reread_bytes"] == report["total_bytes_read"] - report["unique_bytes"]


def test_folding_in_pieces_changes_nothing(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    trace.tensor(("t", 0, 100))
    for start in range(0, 60, 10):
        trace.adds(("t", start, 40), ("t", 0, 5), ("t", start, 40))
    opened = open_trace(trace.path)
    whole = reread(opened)
    monkeypatch.setattr(columns, "_ROWS", 4)
    monkeypatch.setattr(reads, "_KEPT", 1)
    assert reread(opened) == whole
    assert (whole["total_bytes_read"], whole["unique_bytes"], whole["tensors"][0]["read_count"]) == (510, 90, 18)
