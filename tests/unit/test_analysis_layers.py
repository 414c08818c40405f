"""Sums by layer and by component, worked out by hand; the report as text and as a picture."""

from pathlib import Path
from typing import Any

import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.layers import components, layers
from llmtraced.analysis.reread import reread
from llmtraced.analysis.trace import open_trace
from llmtraced.reporters.layers import draw, render
from llmtraced.reporters.text import Style


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


@pytest.fixture
def two_layers(trace: Builder) -> Builder:
    """Two layers of attn_q and ffn_up, and an embedding outside them that the server has copied."""
    trace.tensor(("embd", 0, 1000), layer=-1, component="token_embd", backed=False)
    for layer in (0, 1):
        start = 1000 + 300 * layer
        trace.tensor((f"blk.{layer}.q", start, 100), layer=layer, component="attn_q")
        trace.tensor((f"blk.{layer}.up", start + 100, 200), layer=layer, component="ffn_up")
    trace.adds(("blk.0.q", 1000, 100), ("blk.0.up", 1100, 200), ("blk.1.q", 1300, 60), (None, 1600, 96))
    trace.adds(("blk.0.up", 1100, 200), ("blk.0.up", 1200, 44))
    trace.adds(("blk.0.up", 1100, 50), action="evict")
    trace.write(
        "faults",
        [
            {"tensor_name": "blk.0.up", "major": True, "latency_ns": 600},
            {"tensor_name": "blk.1.q", "major": False, "latency_ns": 300},
            {"tensor_name": "blk.1.q", "major": None, "latency_ns": None},
            {"tensor_name": "embd", "major": False, "latency_ns": 100},
        ],
    )
    return trace


OPS: list[dict[str, Any]] = [
    {"tensor_name": "blk.0.q", "bytes_accessed": 100, "duration_ns": 10},
    {"tensor_name": "blk.0.up", "bytes_accessed": 200, "duration_ns": 20},
    {"tensor_name": "blk.0.up", "bytes_accessed": None, "duration_ns": None},
    {"tensor_name": None, "bytes_accessed": 0, "duration_ns": 999},
]


def test_by_layer_in_the_order_of_the_model(two_layers: Builder) -> None:
    two_layers.write("ops", OPS)
    report = layers(open_trace(two_layers.path))
    outside, first, second = report["layers"]
    assert first == {
        "model": "m.gguf",
        "layer": 0,
        "tensors": 2,
        "size_bytes": 300,
        "access_count": 1 + 3,
        "bytes_read": 100 + 200 + 200 + 44,
        "unique_bytes": 300,
        "reread_bytes": 244,
        "read_count": 4,
        "evicted_bytes": 50,
        "major_faults": 1,
        "minor_faults": 0,
        "stall_ns": 600,
        "unbacked_bytes": 0,
        "op_count": 3,
        "unsized_ops": 1,
        "bytes_accessed": 300,
        "op_ns": 30,
        "share_of_bytes_read": 544 / 700,
        "share_of_stall": 0.6,
    }
    assert (outside["layer"], outside["unbacked_bytes"], outside["stall_ns"], outside["bytes_read"]) == (
        -1,
        1000,
        100,
        0,
    )
    assert (second["layer"], second["bytes_read"], second["minor_faults"], second["access_count"]) == (1, 60, 1, 2)
    assert (second["op_ns"], second["share_of_stall"]) == (0, 0.3)
    assert (report["total_bytes_read"], report["other_bytes_read"], report["stall_ns"]) == (700, 96, 1000)


def test_by_component_most_read_first(two_layers: Builder) -> None:
    report = components(open_trace(two_layers.path))
    rows = [(row["component"], row["tensors"], row["size_bytes"], row["bytes_read"]) for row in report["components"]]
    assert rows == [("ffn_up", 2, 400, 444), ("attn_q", 2, 200, 160), ("token_embd", 1, 1000, 0)]
    assert [row["share_of_bytes_read"] for row in report["components"]] == [444 / 700, 160 / 700, 0]
    assert {row["op_ns"] for row in report["components"]} == {None}  # not seen is not zero
    assert {row["bytes_accessed"] for row in report["components"]} == {None}


def test_the_groups_and_what_is_outside_tensors_are_the_whole(two_layers: Builder) -> None:
    opened = open_trace(two_layers.path)
    whole = reread(opened)
    for report in (layers(opened), components(opened)):
        rows = report[f"{report['by']}s"]
        assert sum(row["bytes_read"] for row in rows) + report["other_bytes_read"] == whole["total_bytes_read"]
        assert sum(row["reread_bytes"] for row in rows) + report["other_reread_bytes"] == whole["reread_bytes"]
        assert sum(row["tensors"] for row in rows) == len(whole["tensors"])


def test_a_phase_counts_by_itself(trace: Builder) -> None:
    trace.tensor(("t", 0, 100), layer=0)
    trace.adds(("t", 0, 100), phase="load")
    trace.adds(("t", 0, 30))
    trace.write(
        "ops", [{"tensor_name": "t", "duration_ns": 5}, {"tensor_name": "t", "duration_ns": 7, "phase": "load"}]
    )
    (row,) = layers(open_trace(trace.path), "decode")["layers"]
    assert (row["bytes_read"], row["reread_bytes"], row["op_ns"]) == (30, 0, 5)


def test_layers_of_two_models_stay_apart_and_shards_belong_together(trace: Builder) -> None:
    for model, read in (("a", 10), ("b", 5)):
        for shard in (0, 1):
            name = f"blk.0.{shard}"
            tensor = {
                "tensor_name": name,
                "offset_bytes": 0,
                "size_bytes": 10,
                "model": model,
                "shard": shard,
                "layer": 0,
            }
            trace.write("tensors", [tensor], models=[{"model": model}])
            trace.adds((name, 0, read), model=model, shard=shard)
            trace.write("ops", [{"tensor_name": name, "model": model, "duration_ns": read}])
    report = layers(open_trace(trace.path))
    assert [(row["model"], row["layer"], row["bytes_read"], row["op_ns"]) for row in report["layers"]] == [
        ("a", 0, 20, 20),
        ("b", 0, 10, 10),
    ]
    assert "0 of a" in render(report, 10, Style())
    assert draw(report, "png").startswith(b"\x89PNG")


def test_a_tensor_that_the_map_does_not_hold_has_no_layer(trace: Builder) -> None:
    trace.tensor(("t", 0, 100), layer=0)
    trace.adds(("t", 0, 100), ("elsewhere", 100, 7))
    rows = layers(open_trace(trace.path))["layers"]
    assert [(row["layer"], row["bytes_read"], row["size_bytes"]) for row in rows] == [(0, 100, 100), (None, 7, 0)]


def test_text(two_layers: Builder) -> None:
    two_layers.write("ops", OPS)
    opened = open_trace(two_layers.path)
    text = render(layers(opened), 1, Style())
    assert text.startswith("read most: layer 0, 544 B (77.7%); waited for most: layer 0, 600 ns (60.0%)\n")
    assert "… 2 more layers, 60 B read, 400 ns" in text
    assert "outside tensors (header, padding): 96 B read" in text
    assert "not used from the mapped file, so its use is not visible here: 1.00 kB" in text
    assert "without 1 operator whose experts are not known" in text
    text = render(components(opened), 10, Style(width=80))
    assert text.startswith("read most: ffn_up, 444 B (63.4%); waited for most: ffn_up")
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith(("ffn_up", "attn_q", "token_embd")))


@pytest.mark.parametrize("by", ["layer", "component"])
def test_names_of_control_characters_do_not_reach_the_terminal(trace: Builder, by: str) -> None:
    trace.tensor(("t", 0, 10), layer=0, component="evil\x1b[2J\u202e$x_{$")
    trace.adds(("t", 0, 10))
    report = (layers if by == "layer" else components)(open_trace(trace.path))
    assert render(report, 5, Style()).replace("\n", "").isprintable()
    assert draw(report, "svg").startswith(b"<?xml")


@pytest.mark.parametrize("of", [layers, components])
@pytest.mark.parametrize("picture", ["png", "svg", "web"])
def test_nothing_recorded(trace: Builder, of: Any, picture: str) -> None:
    trace.tensor(("t", 0, 1))
    report = of(open_trace(trace.path))
    assert render(report, 5, Style()).startswith("nothing was read from disk")
    assert draw(report, picture)[:4] in (b"\x89PNG", b"<?xm", b"<svg")
    trace.write("tensors", [], session="aaaaaaaa-1-1")
    empty = of(open_trace(trace.path, "aaaaaaaa"))
    assert empty[f"{empty['by']}s"] == []
    assert draw(empty, picture)[:4] in (b"\x89PNG", b"<?xm", b"<svg")
