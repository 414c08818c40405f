"""The summary: every figure against the rows that it was made from."""

from pathlib import Path

import pytest
from test_analysis_trace import SESSION, Builder

from llmtraced.analysis.reread import reread
from llmtraced.analysis.summary import summary
from llmtraced.analysis.trace import Trace, open_trace


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Two layers and a tensor outside them; load, prompt and decode; two processes that read."""
    build = Builder(tmp_path / "trace")
    for name, offset, size, layer, component in (
        ("token_embd", 0, 100, -1, "token_embd"),
        ("q0", 100, 50, 0, "attn_q"),
        ("q1", 150, 50, 1, "attn_q"),
    ):
        build.tensor((name, offset, size), layer=layer, component=component)
    build.tensor(("unread", 230, 30), layer=1, component="attn_k")
    build.tensor(("k1", 200, 30), layer=1, component="attn_k", backed=False)
    build.adds(("token_embd", 0, 100), ("q0", 100, 50), ("q1", 150, 50), phase="load", token=0, cause="readahead")
    build.adds(("q0", 100, 50), ("q0", 100, 50))
    build.adds(("q1", 150, 20), cause="prefetcher", comm="llmtraced", timestamp=7_000_001_000)
    build.adds(("q0", 100, 50), ("q0", 100, 40), action="evict")
    faults = [("q0", True, 10), ("q1", True, 1000), ("q1", False, 5), ("q1", None, None)]
    build.write("faults", [{"tensor_name": n, "major": m, "latency_ns": ns} for n, m, ns in faults])
    build.write("tokens", [{"token": 1, "start_ns": 1000, "end_ns": 500_001_000, "stall_ns": 100_000_000}])
    return open_trace(build.path)


def test_what_was_traced(trace: Trace) -> None:
    report = summary(trace)
    assert (report["session"], report["sessions"], report["kernel"]) == (SESSION, [SESSION], "6.1.0")
    assert (report["detail"], report["command"], report["pid"]) == ("faults", "llama-server", 100)
    assert [model["model"] for model in report["models"]] == ["m.gguf"]
    assert report["started"] == "2023-11-14T22:13:20+00:00"
    assert report["duration_ns"] == 7_000_000_000
    assert report["cgroup_limit_bytes"] is None


def test_the_last_token_ends_the_recording_where_nothing_was_read_after_it(tmp_path: Path) -> None:
    build = Builder(tmp_path / "trace")
    build.write("tokens", [{"token": 0, "start_ns": 100, "end_ns": 200}, {"token": 1, "start_ns": 200, "end_ns": 950}])
    assert summary(open_trace(build.path))["duration_ns"] == 850


def test_totals(trace: Trace) -> None:
    report = summary(trace)
    assert report["faults"] == {"major": 2, "minor": 1, "unknown": 1, "stall_ns": 1015}
    assert report["bytes_by_cause"] == {"readahead": 200, "fault": 100, "prefetcher": 20}
    assert list(report["bytes_by_cause"]) == ["readahead", "fault", "prefetcher"]  # largest first
    assert report["bytes_by_process"] == {"llama-server": 300, "llmtraced": 20}
    assert report["evicted_bytes"] == 90
    assert report["reread"] == {
        "total_bytes_read": 320,
        "unique_bytes": 200,
        "reread_bytes": 120,
        "amplification": 1.6,
    }
    (decode,) = report["phases"]
    assert (decode["phase"], decode["graphs"], decode["tokens_per_second"]) == ("decode", 1, pytest.approx(2))
    assert decode["stall_share"] == pytest.approx(0.2)


def test_top_tensors(trace: Trace) -> None:
    report = summary(trace, top=2)
    assert [t["tensor_name"] for t in report["top_by_bytes_read"]] == ["q0", "token_embd"]
    assert [t["tensor_name"] for t in report["top_by_stall"]] == ["q1", "q0"]


def test_layers_and_components_add_up(trace: Trace) -> None:
    report = summary(trace)
    assert [(row["layer"], row["bytes_read"]) for row in report["layers"]] == [(-1, 100), (0, 150), (1, 70)]
    assert [(row["component"], row["reread_bytes"]) for row in report["components"]] == [
        ("attn_k", 0),
        ("attn_q", 120),
        ("token_embd", 0),
    ]
    assert sum(row["stall_ns"] for row in report["layers"]) == 1015


def test_unbacked_tensors_are_named(trace: Trace) -> None:
    assert summary(trace)["unbacked"] == {"count": 1, "size_bytes": 30, "tensor_names": ["k1"]}


def test_a_phase_restricts_every_figure(trace: Trace) -> None:
    report = summary(trace, "load")
    assert report["bytes_by_cause"] == {"readahead": 200}
    assert report["faults"] == {"major": 0, "minor": 0, "unknown": 0, "stall_ns": 0}
    assert report["evicted_bytes"] == 0
    assert report["phases"] == []
    assert report["reread"]["reread_bytes"] == 0


def test_it_agrees_with_the_other_reports(trace: Trace) -> None:
    report, reads = summary(trace), reread(trace)
    assert sum(report["bytes_by_cause"].values()) == reads["total_bytes_read"]
    assert report["account"] == reads["account"]


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    build = Builder(tmp_path / "trace")
    build.tensor(("t", 0, 10))
    report = summary(open_trace(build.path))
    assert (report["duration_ns"], report["started"], report["bytes_by_cause"]) == (0, None, {})
    assert report["reread"]["amplification"] is None
