"""Figures per token and their spread."""

from pathlib import Path
from typing import Any

import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.tokens import per_token, tokens
from llmtraced.analysis.trace import open_trace


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def token(number: int, ms: float | None, **more: Any) -> dict[str, Any]:
    start = number * 10**9
    return {"token": number, "start_ns": start, "end_ns": None if ms is None else start + int(ms * 1e6)} | more


def test_one_row_a_token_with_bytes_by_cause(trace: Builder) -> None:
    trace.write("tokens", [token(2, 200, stall_ns=50_000_000, major_faults=3, minor_faults=9, bytes_read=999)])
    trace.write("tokens", [token(1, 100, phase="prompt", n_tokens=7)])
    adds = [(2, "fault", 10), (2, "readahead", 20), (2, "readahead", 5), (1, "prefetcher", 4), (0, "read", 1)]
    trace.write(
        "pagecache", [{"token": t, "cause": c, "bytes": b, "offset_bytes": 0, "tensor_name": None} for t, c, b in adds]
    )
    trace.write(
        "pagecache",
        [{"token": 2, "cause": "fault", "bytes": 77, "offset_bytes": 0, "tensor_name": None, "action": "evict"}],
    )
    first, second = per_token(open_trace(trace.path)).to_dicts()
    assert (first["token"], first["phase"], first["n_tokens"], first["prefetcher_bytes"]) == (1, "prompt", 7, 4)
    assert second == {
        "token": 2,
        "phase": "decode",
        "start_ns": 2 * 10**9,
        "duration_ns": 200_000_000,
        "n_tokens": 1,
        "n_outputs": 1,
        "stall_ns": 50_000_000,
        "stall_share": 0.25,
        "fault_ns": 0,
        "bytes_read": 35,
        "fault_bytes": 10,
        "readahead_bytes": 25,
        "prefetcher_bytes": 0,
        "read_bytes": 0,
        "other_bytes": 0,
        "major_faults": 3,
        "minor_faults": 9,
        "graph_nodes": 1,
    }
    assert tokens(open_trace(trace.path))["outside_bytes_read"] == 1


def test_the_bytes_of_all_tokens_and_outside_are_the_bytes_read(trace: Builder) -> None:
    trace.write("tokens", [token(i, 1) for i in range(1, 6)])
    trace.write("pagecache", [{"token": i, "bytes": 2**i, "offset_bytes": 0, "tensor_name": None} for i in range(9)])
    report = tokens(open_trace(trace.path))
    assert sum(row["bytes_read"] for row in report["tokens"]) + report["outside_bytes_read"] == 2**9 - 1


def test_without_page_cache_rows_the_recorders_own_count_stands(trace: Builder) -> None:
    trace.write("tokens", [token(1, 1, bytes_read=4096)])
    assert per_token(open_trace(trace.path))["bytes_read"].to_list() == [4096]


def test_percentiles_and_rate_by_phase(trace: Builder) -> None:
    trace.write("tokens", [token(i, i, stall_ns=i * 500_000) for i in range(1, 102)])  # 1 … 101 ms
    trace.write("tokens", [token(200, 500, phase="prompt", n_tokens=100)])
    prompt, decode = tokens(open_trace(trace.path))["phases"]
    assert (prompt["phase"], prompt["graphs"], prompt["n_tokens"]) == ("prompt", 1, 100)
    assert prompt["tokens_per_second"] == pytest.approx(200)
    assert decode["duration_ns"] == pytest.approx({"mean": 51e6, "p50": 51e6, "p90": 91e6, "p99": 100e6, "max": 101e6})
    assert decode["tokens_per_second"] == pytest.approx(101 / (101 * 51e-3))
    assert decode["stall_share"] == pytest.approx(0.5)
    assert decode["total"]["duration_ns"] == 101 * 51_000_000


def test_percentiles_interpolate_as_numpys_do(trace: Builder) -> None:
    trace.write("tokens", [token(i, i) for i in (1, 2, 3, 4)])
    (decode,) = tokens(open_trace(trace.path))["phases"]
    assert decode["duration_ns"]["p50"] == pytest.approx(2.5e6)
    assert decode["duration_ns"]["p90"] == pytest.approx(3.7e6)


def test_a_token_that_never_ended_is_listed_but_not_timed(trace: Builder) -> None:
    trace.write("tokens", [token(1, 10), token(2, None, stall_ns=10**12)])
    report = tokens(open_trace(trace.path))
    assert report["tokens"][1]["duration_ns"] is None
    (decode,) = report["phases"]
    assert (decode["graphs"], decode["duration_ns"]["max"], decode["stall_share"]) == (2, 10e6, 0)
    assert decode["tokens_per_second"] == pytest.approx(100)


def test_token_0_is_the_time_before_the_first_graph_and_no_token(trace: Builder) -> None:
    zero = {"n_tokens": None, "n_outputs": None, "graph_nodes": None, "stall_ns": None, "phase": "load"}
    trace.write("tokens", [token(0, 900, **zero), token(1, 10)])
    trace.write("pagecache", [{"token": 0, "bytes": 5, "offset_bytes": 0, "tensor_name": None, "phase": "load"}])
    report = tokens(open_trace(trace.path))
    assert [row["token"] for row in report["tokens"]] == [1]
    assert [phase["phase"] for phase in report["phases"]] == ["decode"]
    assert report["outside_bytes_read"] == 5


def test_the_stall_share_is_of_tokens_whose_stall_is_known(trace: Builder) -> None:
    trace.write("tokens", [token(1, 10, stall_ns=5_000_000), token(2, 1000, stall_ns=None)])
    (decode,) = tokens(open_trace(trace.path))["phases"]
    assert decode["stall_share"] == pytest.approx(0.5)
    assert decode["tokens_per_second"] == pytest.approx(2 / 1.01)


def test_a_phase_alone(trace: Builder) -> None:
    trace.write("tokens", [token(1, 1, phase="prompt"), token(2, 1)])
    report = tokens(open_trace(trace.path), "decode")
    assert [row["token"] for row in report["tokens"]] == [2]
    assert [phase["phase"] for phase in report["phases"]] == ["decode"]


def test_no_tokens(trace: Builder) -> None:
    trace.tensor(("t", 0, 1))
    report = tokens(open_trace(trace.path))
    assert (report["tokens"], report["phases"], report["outside_bytes_read"]) == ([], [], 0)
