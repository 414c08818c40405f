"""Heatmaps against answers worked out by hand and against counting row by row; as text and as pictures."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis.axes import pieces
from llmtraced.analysis.heatmap import heatmap
from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.reporters.grid import chunks, grid, merged, scale, stripes
from llmtraced.reporters.heatmap import draw, render
from llmtraced.reporters.text import Style

EVIL = "evil\x1b[2J\n.weight"


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def rows(report: dict[str, Any]) -> dict[str | None, list[int]]:
    return {row["tensor_name"]: row["values"] for row in report["rows"]}


def spans(report: dict[str, Any]) -> list[tuple[int, int]]:
    return [(column["first_token"], column["last_token"]) for column in report["columns"]]


def three_tensors(trace: Builder) -> None:
    trace.tensor(("a", 0, 8192), ("b", 8192, 4096), ("idle", 12288, 10), layer=0)
    trace.adds(("a", 0, 5000), token=0, phase="load", timestamp=10**9)
    trace.adds(("a", 0, 100), ("a", 4096, 10), ("b", 8192, 7), token=2, timestamp=2 * 10**9)
    trace.adds(("b", 8192, 3), (None, 20000, 9), token=4, timestamp=3 * 10**9)
    trace.write("pagecache", [{"tensor_name": "a", "offset_bytes": 0, "bytes": 999, "action": "evict", "token": 3}])


def test_bytes_by_tensor_and_token(trace: Builder) -> None:
    three_tensors(trace)
    report = heatmap(open_trace(trace.path))
    assert spans(report) == [(0, 0), (2, 2), (3, 3), (4, 4)]
    assert rows(report) == {"a": [5000, 110, 0, 0], "b": [0, 7, 0, 3], "idle": [0, 0, 0, 0], None: [0, 0, 0, 9]}
    assert [row["total"] for row in report["rows"]] == [5110, 10, 0, 9]
    assert (report["total"], report["unplaced"], report["unit"]) == (5129, 0, "bytes")
    assert report["rows"][0] == {
        "model": "m.gguf",
        "tensor_name": "a",
        "shard": 0,
        "layer": 0,
        "component": "c",
        "offset_bytes": 0,
        "size_bytes": 8192,
        "backed": True,
        "total": 5110,
        "values": [5000, 110, 0, 0],
    }


def test_a_phase_alone(trace: Builder) -> None:
    three_tensors(trace)
    report = heatmap(open_trace(trace.path), "load")
    assert spans(report) == [(0, 0)]
    assert (report["total"], rows(report)["a"], rows(report)["b"]) == (5000, [5000], [0])


def test_tokens_without_a_read_have_columns(trace: Builder) -> None:
    trace.tensor(("a", 0, 8192))
    trace.write("tokens", [{"token": token, "start_ns": token, "end_ns": token + 1} for token in (1, 2, 5)])
    trace.adds(("a", 0, 3), token=2)
    assert rows(heatmap(open_trace(trace.path)))["a"] == [0, 3, 0, 0, 0]


def test_stall_and_accesses(trace: Builder) -> None:
    trace.tensor(("a", 0, 100), ("b", 100, 100))
    trace.write(
        "faults",
        [
            {"tensor_name": "a", "token": 1, "latency_ns": 5, "major": True},
            {"tensor_name": "a", "token": 1, "latency_ns": 7, "major": False},
            {"tensor_name": "b", "token": 2, "latency_ns": None},
        ],
    )
    trace.write(
        "ops", [{"tensor_name": "b", "token": 2}, {"tensor_name": "b", "token": 1}, {"tensor_name": None, "token": 1}]
    )
    opened = open_trace(trace.path)
    stall, accesses = heatmap(opened, value="stall"), heatmap(opened, value="accesses")
    assert rows(stall) == {"a": [12], "b": [0]}  # the fault without a latency says nothing of token 2
    assert rows(accesses) == {"a": [2, 0], "b": [1, 2]}
    assert (stall["unit"], accesses["unit"], accesses["total"]) == ("ns", "accesses", 5)
    assert heatmap(opened, value="accesses", by="time")["total"] == 3  # operators are at no offset


def test_many_tokens_are_binned_and_nothing_is_lost(trace: Builder) -> None:
    trace.tensor(("a", 0, 4096))
    trace.write("pagecache", [{"tensor_name": "a", "offset_bytes": 0, "bytes": t, "token": t} for t in range(1003)])
    report = heatmap(open_trace(trace.path), bins=7)
    assert spans(report) == [(0, 0), *((1 + i * 144, min(144 * (i + 1), 1002)) for i in range(7))]
    assert rows(report)["a"] == [0, *(sum(range(1 + i * 144, min(144 * (i + 1), 1002) + 1)) for i in range(7))]
    assert report["total"] == sum(range(1003))


def test_layer_order_puts_what_is_outside_layers_where_it_is_used(trace: Builder) -> None:
    for offset, (name, layer, component) in enumerate(
        [
            *(("output_norm", -1, "output_norm"), ("output", -1, "output"), ("token_embd", -1, "token_embd")),
            *(("blk.1.ffn_up", 1, "ffn_up"), ("blk.1.attn_q", 1, "attn_q"), ("blk.0.ffn_up", 0, "ffn_up")),
        ]
    ):
        trace.write(
            "tensors",
            [{"tensor_name": name, "layer": layer, "component": component, "offset_bytes": offset, "size_bytes": 1}],
        )
    trace.adds(("unknown", 50, 1))
    opened = open_trace(trace.path)
    by_file = ["output_norm", "output", "token_embd", "blk.1.ffn_up", "blk.1.attn_q", "blk.0.ffn_up", "unknown"]
    assert list(rows(heatmap(opened))) == by_file
    by_layer = ["token_embd", "blk.0.ffn_up", "blk.1.attn_q", "blk.1.ffn_up", "output", "output_norm", "unknown"]
    assert list(rows(heatmap(opened, order="layer"))) == by_layer


def test_file_offset_by_time_cuts_adds_at_the_bins(trace: Builder) -> None:
    trace.tensor(("a", 0, 4 * 4096), layer=3)
    adds = [(100, 4000, 200), (100, 8192, 4096), (199, 0, 3 * 4096)]
    trace.write("pagecache", [{"timestamp": t, "tensor_name": "a", "offset_bytes": o, "bytes": b} for t, o, b in adds])
    trace.write("tokens", [{"token": 9, "start_ns": 150, "end_ns": 160, "phase": "prompt"}])
    report = heatmap(open_trace(trace.path), by="time", bins=2, rows=4)
    assert [row["values"] for row in report["rows"]] == [[96, 4096], [104, 4096], [4096, 4096], [0, 0]]
    assert [row["offset_bytes"] for row in report["rows"]] == [0, 4096, 8192, 12288]
    assert {(row["tensor_name"], row["layer"], row["size_bytes"]) for row in report["rows"]} == {("a", 3, 4096)}
    assert report["columns"] == [
        {"first_ns": 100, "last_ns": 149, "token": 0, "phase": None},
        {"first_ns": 150, "last_ns": 199, "token": 9, "phase": "prompt"},
    ]


def test_several_files_keep_apart_and_strangers_are_counted(trace: Builder) -> None:
    for model, shard, size in (("m.gguf", 0, 8192), ("m.gguf", 1, 4096), ("n.gguf", 0, 4096)):
        trace.tensor((f"{model}{shard}", 0, size), model=model, shard=shard)
    fault = {"offset_bytes": 0, "latency_ns": 2, "token": 1}
    trace.write(
        "faults",
        [
            {**fault, "offset_bytes": 8191},
            {**fault, "shard": 1, "tensor_name": "m.gguf1"},
            *({**fault, "model": "n.gguf", "tensor_name": "n.gguf0"} for _ in range(3)),
            {**fault, "model": None, "shard": None, "latency_ns": 50},
        ],
    )
    report = heatmap(open_trace(trace.path), value="stall", by="time", rows=4)
    where = [(row["model"], row["shard"], row["offset_bytes"], row["values"]) for row in report["rows"]]
    assert where == [
        *(("m.gguf", 0, 0, [0]), ("m.gguf", 0, 4096, [2]), ("m.gguf", 1, 0, [2]), ("n.gguf", 0, 0, [6])),
    ]
    assert (report["total"], report["unplaced"]) == (60, 50)
    assert heatmap(open_trace(trace.path), value="stall")["total"] == 60
    assert "n.gguf/0 0 B" in render(report, 4, Style(80))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["m.gguf", "n.gguf"]),
            st.sampled_from(["a", "b", None]),
            st.integers(0, 60),
            st.integers(0, 40_000),
            st.integers(1, 30_000),
            st.sampled_from(["load", "decode"]),
        ),
        max_size=30,
    ),
    st.integers(1, 9),
    st.sampled_from([None, "load", "decode"]),
)
@settings(max_examples=30, deadline=None)
def test_counting_row_by_row_gives_the_same(adds: list[Any], bins: int, phase: str | None) -> None:
    names = ("model", "tensor_name", "token", "offset_bytes", "bytes", "phase")
    with tempfile.TemporaryDirectory() as folder:
        build = Builder(Path(folder))
        build.tensor(("a", 0, 1000), ("quiet", 1000, 1))
        for some in (adds[::2], adds[1::2]):
            build.write("pagecache", [dict(zip(names, add, strict=True), timestamp=add[2] * 7) for add in some])
        opened = open_trace(build.path)
        by_token, by_time = heatmap(opened, phase, bins=bins), heatmap(opened, phase, by="time", bins=bins, rows=bins)
    kept = [add for add in adds if phase in (None, add[5])]
    expected: dict[Any, int] = defaultdict(int)
    for model, name, token, _, count, _ in kept:
        (column,) = (i for i, (first, last) in enumerate(spans(by_token)) if first <= token <= last)
        expected[model, name, column] += count
    got = {
        (row["model"], row["tensor_name"], i): value
        for row in by_token["rows"]
        for i, value in enumerate(row["values"])
        if value
    }
    assert got == dict(expected)
    assert {"a", "quiet"} <= set(rows(by_token))
    assert len(by_token["columns"]) <= bins + 1
    pixels: dict[Any, int] = defaultdict(int)
    for model, _, token, offset, count, _ in kept:
        (column,) = (i for i, c in enumerate(by_time["columns"]) if c["first_ns"] <= token * 7 <= c["last_ns"])
        for i, row in enumerate(by_time["rows"]):
            low, high = row["offset_bytes"], row["offset_bytes"] + row["size_bytes"]
            if row["model"] == model:
                pixels[i, column] += max(min(high, offset + count) - max(low, offset), 0)
    seen = {(i, j): value for i, row in enumerate(by_time["rows"]) for j, value in enumerate(row["values"])}
    assert {key: value for key, value in seen.items() if value} == {k: v for k, v in pixels.items() if v}
    assert by_token["total"] == by_time["total"] == sum(add[4] for add in kept)


def test_folding_in_slices_changes_nothing(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    three_tensors(trace)
    trace.write(
        "faults", [{"tensor_name": "ab"[i % 2], "latency_ns": i, "token": i, "timestamp": i} for i in range(50)]
    )
    opened = open_trace(trace.path)
    asked = [(value, by) for value in ("bytes", "stall", "accesses") for by in ("token", "time")]
    whole = [heatmap(opened, value=value, by=by) for value, by in asked]
    slices = Trace.slices
    monkeypatch.setattr(Trace, "slices", lambda self, name, phase=None: slices(self, name, phase, rows=3))
    assert [heatmap(opened, value=value, by=by) for value, by in asked] == whole
    assert [report["total"] for report in whole[:4]] == [5129, 5129, 1225, 1225]


def test_pieces_cover_each_byte_once() -> None:
    offset, size = np.array([0, 5, 10, 39]), np.array([40, 5, 1, 1])
    cut = [(int(w), int(a), int(p)) for part in pieces(offset, size, 10) for w, a, p in zip(*part, strict=True)]
    assert sorted(cut) == [(0, 0, 10), (0, 1, 10), (0, 2, 10), (0, 3, 10), (1, 0, 5), (2, 1, 1), (3, 3, 1)]


@pytest.mark.parametrize("wrong", [{"value": "x"}, {"by": "x"}, {"order": "x"}])
def test_no_such_heatmap(trace: Builder, wrong: dict[str, str]) -> None:
    trace.tensor(("a", 0, 1))
    with pytest.raises(ValueError, match="no such heatmap"):
        heatmap(open_trace(trace.path), **wrong)


@pytest.mark.parametrize("by", ["token", "time"])
@pytest.mark.parametrize("value", ["bytes", "stall", "accesses"])
def test_empty_traces_and_every_kind_are_shown_and_drawn(trace: Builder, by: str, value: str) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    trace.write("tokens", [])
    empty = heatmap(open_trace(trace.path), value=value, by=by)
    assert json.loads(json.dumps(empty))["total"] == 0
    assert "nothing" in render(empty, 10, Style(80))
    assert draw(empty, "png").startswith(b"\x89PNG")
    three_tensors(trace)
    trace.tensor((EVIL, 50_000, 10))
    trace.write("faults", [{"tensor_name": EVIL, "latency_ns": 5, "token": 7, "offset_bytes": 50_000}])
    full = heatmap(open_trace(trace.path), value=value, by=by)
    text = render(full, 10, Style(80))
    assert text.replace("\n", "").isprintable()
    assert "\x1b[38;5;" in render(full, 10, Style(80, colour=True))
    assert max(map(len, text.splitlines()[3:])) <= 80
    assert draw(full, "png").startswith(b"\x89PNG")
    assert b"<svg" in draw(full, "svg")
    assert b"<svg" in draw(full, "web")


def test_the_answer_in_words(trace: Builder) -> None:
    three_tensors(trace)
    text = render(heatmap(open_trace(trace.path), "decode"), 10, Style(80))
    assert "129 B read from disk; most by a (110 B), and in token 2 (117 B)" in text


def test_the_terminal_joins_layers_and_keeps_sums(trace: Builder) -> None:
    for layer in range(30):
        trace.tensor(
            *((f"blk.{layer}.{c}.weight", layer * 8192 + i * 4096, 4096) for i, c in enumerate("xy")), layer=layer
        )
        trace.adds((f"blk.{layer}.x.weight", layer * 8192, 1000 if layer == 29 else 400), token=1)
    report = heatmap(open_trace(trace.path))
    by_layer, joined = (render(report, top, Style(100)).splitlines()[3:] for top in (30, 5))
    assert [line.split()[0] for line in by_layer[:30]] == [str(layer) for layer in range(30)]
    assert [line.split()[0] for line in joined[:5]] == ["0-5", "6-11", "12-17", "18-23", "24-29"]
    assert "██ to 1.00 kB" in by_layer[31]
    assert "██ to 3.00 kB" in joined[6]  # 5 x 400 + 1000, of one token
    assert set(by_layer[0].split()[1]) == {"▒"}
    assert set(by_layer[29].split()[1]) == {"█"}


def test_shades_axis_and_legend() -> None:
    lines = grid(["a", "bb"], np.array([[0, 1, 2, 3], [4, 0, 0, 4]]), ["1", "", "4"], "{:g}".format, Style(40))
    assert lines == [" a  ░▒▓", "bb █  █", "   1  4", "   ░░ to 1  ▒▒ to 2  ▓▓ to 3  ██ to 4"]
    wide = grid(["a"], np.array([[1, 10, 10, 1000.0]]), [], "{:.3g}".format, Style(80))
    assert wide[0] == "a ░▒▒█"
    assert wide[-1] == "  ░░ to 1  ▒▒ to 10  ▓▓ to 100  ██ to 1e+03  (logarithmic)"


def test_scale_is_logarithmic_around_the_median_where_few_cells_stand_out() -> None:
    assert scale(np.array([[0, 1, 2, 4]])) == (0, 4)
    assert scale(np.array([[0, 2, 2, 20]])) == (0.2, 20)
    assert scale(np.zeros((2, 2))) == (0, 0)


def test_chunks_and_merged() -> None:
    assert chunks(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert chunks(2, 5) == [(0, 1), (1, 2)]
    assert merged(np.arange(7.0)[None, :], chunks(7, 3), 1).tolist() == [[1, 5, 15]]


def test_stripes_name_layers_and_components_outside() -> None:
    of = [(-1, "token_embd"), (0, "q"), (0, "k"), (1, "q"), (-1, "output\x1b"), (-1, "output_norm"), (None, None)]
    found = stripes([{"layer": layer, "component": c, "tensor_name": None} for layer, c in of])
    assert found == [
        *(("token_embd", 0, 1), ("0", 1, 3), ("1", 3, 4)),
        *((r"output\x1b, output_norm", 4, 6), ("no tensor", 6, 7)),
    ]
