"""Figures per token, where its time went, and their spread."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis.stall import PARTS, stalls
from llmtraced.analysis.tokens import per_token, tokens
from llmtraced.analysis.trace import open_trace
from llmtraced.reporters.text import Style
from llmtraced.reporters.tokens import draw, render


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def token(number: int, ms: float | None, **more: Any) -> dict[str, Any]:
    start = number * 10**9
    return {"token": number, "start_ns": start, "end_ns": None if ms is None else start + int(ms * 1e6)} | more


def test_several_models_are_not_thrown_together(trace: Builder) -> None:
    """A draft's graphs are many and fast."""
    of = [(1, "m.gguf", 200), (2, "draft.gguf", 10), (3, "draft.gguf", 10), (4, None, 50)]
    trace.write("tokens", [token(n, ms, phase="decode", n_tokens=1, model=model) for n, model, ms in of])
    phases = tokens(open_trace(trace.path))["phases"]
    assert [(one["model"], one["graphs"], one["tokens_per_second"]) for one in phases] == [
        ("m.gguf", 1, 5.0),
        ("draft.gguf", 2, 100.0),
        (None, 1, 20.0),
    ]


def test_a_trace_from_before_models_were_known_is_read(trace: Builder) -> None:
    path = trace.write("tokens", [token(1, 100, phase="decode", n_tokens=1), token(2, 100, phase="decode", n_tokens=1)])
    old = pq.read_table(path)
    pq.write_table(old.drop_columns("model"), path)
    opened = open_trace(trace.path)
    assert not opened.notes
    assert per_token(opened)["model"].to_list() == [None, None]
    assert [(one["model"], one["graphs"]) for one in tokens(opened)["phases"]] == [(None, 2)]


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
        "model": "m.gguf",
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


MS = 1_000_000


def fault(start_ms: float, end_ms: float | None, **more: Any) -> dict[str, Any]:
    """Return a fault from ``start_ms`` to ``end_ms``, minor unless told otherwise."""
    latency = None if end_ms is None else round((end_ms - start_ms) * MS)
    return {"timestamp": round(start_ms * MS), "latency_ns": latency, "major": False, "offset_bytes": 0} | more


def between(number: int, start_ms: int, end_ms: int | None, **more: Any) -> dict[str, Any]:
    end = None if end_ms is None else end_ms * MS
    return {"token": number, "start_ns": start_ms * MS, "end_ns": end} | more


def parts(trace: Builder, **more: Any) -> list[tuple[float | None, ...]]:
    """Return compute, mapping, wait and hard read of each token, in ms."""
    rows = stalls(open_trace(trace.path), **more).select(PARTS).rows()
    return [tuple(None if ns is None else ns / MS for ns in row) for row in rows]


def test_the_most_severe_fault_in_flight_gets_the_time(trace: Builder) -> None:
    trace.write("tokens", [between(1, 0, 100)])
    faults = [
        fault(10, 40, major=True),
        fault(30, 60, thread=2),  # waits: 30 to 40 belongs to the major one
        fault(55, 55.04),  # maps, while the other waits
        fault(70, 70.04),
        fault(70.02, 70.05, thread=2),  # mapping at the same time: counted once
    ]
    trace.write("faults", faults)
    assert parts(trace) == [(pytest.approx(100 - 50 - 0.05), pytest.approx(0.05), 20, 30)]
    (row,) = tokens(open_trace(trace.path))["tokens"]
    assert sum(row[part] for part in PARTS) == row["duration_ns"]
    assert row["reads_in_flight"] == pytest.approx(60 / 50)  # 30 ms and 30 ms in 50 ms
    assert row["reads_in_flight_max"] == 2


def test_a_fault_counts_in_each_token_with_what_lies_in_it(trace: Builder) -> None:
    trace.write("tokens", [between(1, 10, 20), between(2, 30, 40), between(3, 50, 60)])
    trace.write("faults", [fault(5, 35, major=True, token=2), fault(1, 4, token=0), fault(22, 29), fault(45, 47)])
    trace.write("faults", [fault(51, 53), fault(53, 55)])
    assert parts(trace) == [(0, 0, 0, 10), (5, 0, 0, 5), (6, 0, 4, 0)]
    rows = tokens(open_trace(trace.path))["tokens"]
    assert [row["reads_in_flight_max"] for row in rows] == [1, 1, 1]  # one after the other is one at once
    assert [row["reads_in_flight"] for row in rows] == [1, 1, 1]


def test_where_waiting_begins_is_a_parameter(trace: Builder) -> None:
    trace.write("tokens", [between(1, 0, 10)])
    trace.write("faults", [fault(1, 3)])
    assert parts(trace) == [(8, 0, 2, 0)]
    assert parts(trace, wait_ns=2 * MS) == [(8, 0, 2, 0)]
    assert parts(trace, wait_ns=2 * MS + 1) == [(8, 2, 0, 0)]
    assert tokens(open_trace(trace.path), wait_ns=7)["wait_threshold_ns"] == 7


def test_without_latencies_where_the_time_went_is_not_known(trace: Builder) -> None:
    counted = {"major_faults": 1, "minor_faults": 0}
    trace.write("tokens", [between(1, 0, 10, **counted), between(2, 10, 20), between(3, 20, None)])
    trace.write("faults", [fault(1, None, major=None)])
    assert parts(trace) == [(None,) * 4, (10, 0, 0, 0)]
    report = tokens(open_trace(trace.path))
    assert [row["compute_ns"] for row in report["tokens"]] == [None, 10 * MS, None]
    assert draw(report, "png").startswith(b"\x89PNG")
    trace.write("faults", [fault(2, 4, major=True)])  # now some have: the one without is a fault that never ended
    assert parts(trace)[0] == (8, 0, 0, 2)
    assert stalls(open_trace(trace.path))["reads_in_flight"].to_list() == [1, None]


def test_files_that_overlap_in_time_and_blocks_change_nothing(trace: Builder) -> None:
    trace.write("tokens", [between(i, 10 * i, 10 * i + 9, minor_faults=2) for i in range(1, 7)])
    for at in (0, 1):
        trace.write("faults", [fault(10 * i + at, 10 * i + at + 3, thread=at) for i in range(1, 7)])
    assert parts(trace) == [(5, 0, 4, 0)] * 6
    assert parts(trace, rows=3) == [(5, 0, 4, 0)] * 6
    assert parts(trace, phase="prompt") == []


def test_the_split_of_a_phase_and_its_text(trace: Builder) -> None:
    trace.write("tokens", [between(1, 0, 10), between(2, 10, 40), between(3, 40, 50, phase="prompt")])
    trace.write("faults", [fault(0, 8), fault(10, 20), fault(10, 20, thread=2), fault(40, 41, major=True)])
    report = tokens(open_trace(trace.path))
    prompt, decode = report["phases"]
    assert [decode["total"][part] // MS for part in PARTS] == [22, 0, 18, 0]
    assert decode["reads_in_flight"] == pytest.approx(28 / 18)
    assert decode["wait_ns"]["p50"] == pytest.approx(9e6)
    assert prompt["total"]["hard_read_ns"] == MS
    text = render(report, 10, Style())
    assert text.startswith("decode: a token takes 20.0 ms, 55.0% of it with no thread in a page fault on the model")
    assert "went to: computing 55.0%, mapping 0.0%, waiting 45.0%, hard reads 0.0%" in text
    assert "1.6 threads at once waited for a read" in text


@pytest.mark.parametrize("picture", ["png", "svg", "web"])
def test_pictures(trace: Builder, picture: str) -> None:
    trace.tensor(("t", 0, 1))
    assert draw(tokens(open_trace(trace.path)), picture)[:4] in (b"\x89PNG", b"<?xm", b"<svg")
    trace.write(
        "tokens", [between(i, 10 * i, 10 * i + 9, phase="decode" if i % 9 else "prompt") for i in range(1, 4000)]
    )
    trace.write("faults", [fault(10 * i, 10 * i + 3) for i in range(1, 4000)])
    drawn = draw(tokens(open_trace(trace.path)), picture)
    assert drawn[:4] in (b"\x89PNG", b"<?xm", b"<svg")
    assert len(drawn) < 1_000_000  # many tokens are drawn together
    assert picture != "web" or b"each step the mean of 3" in drawn


def by_brute_force(faults: list[Any], marks: tuple[int, int]) -> tuple[list[int], int, int]:
    """Return compute, mapping, wait, hard read; thread time waiting for reads, and the most at once: ns by ns."""
    found, summed, most = [0, 0, 0, 0], 0, 0
    for ns in range(*marks):
        running = [(major, lasts) for begin, lasts, major in faults if begin <= ns < begin + lasts]
        kinds = [3 if major else 2 if lasts >= 5 else 1 for major, lasts in running]
        found[max(kinds, default=0)] += 1
        reading = sum(kind > 1 for kind in kinds)
        summed, most = summed + reading, max(most, reading)
    return found, summed, most


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20), st.sampled_from([True, False, None])), max_size=25),
    st.lists(st.integers(1, 70), min_size=2, max_size=6, unique=True),
    st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_the_split_agrees_with_brute_force(faults: list[Any], marks: list[int], rows: int) -> None:
    spans = list(itertools.pairwise(sorted(marks)))
    with tempfile.TemporaryDirectory() as folder:
        trace = Builder(Path(folder))
        spans_rows = [{"token": i, "start_ns": a, "end_ns": b, "minor_faults": 2} for i, (a, b) in enumerate(spans, 1)]
        trace.write("tokens", spans_rows)
        written = [{"timestamp": b, "latency_ns": n, "major": m} for b, n, m in faults] or [{"latency_ns": 0}]
        for part in (written[::2], written[1::2]):
            trace.write("faults", part)
        got = stalls(open_trace(trace.path), wait_ns=5, rows=rows)
    for row, span in zip(got.to_dicts(), spans, strict=True):
        found, summed, most = by_brute_force(faults, span)
        assert [row[part] for part in PARTS] == found
        assert row["reads_in_flight_max"] == most
        assert row["reads_in_flight"] == (pytest.approx(summed / sum(found[2:])) if sum(found[2:]) else None)
