"""Reading order against answers worked out by hand, and against a loop over the adds."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis.timeline import CLASSES, RESUMED, timeline
from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.reporters.text import Style
from llmtraced.reporters.timeline import draw, render

PAGE, MIB = 4096, 1 << 20


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def reads(build: Builder, *ranges: tuple[int, int], start: int = 0, **more: Any) -> None:
    """One file of adds, one ns apart: offset, bytes."""
    rows = [{"timestamp": start + i, "offset_bytes": o, "bytes": b, **more} for i, (o, b) in enumerate(ranges)]
    build.write("pagecache", rows)


def counts(figures: dict[str, Any]) -> dict[str, tuple[int, int]]:
    found = {name: (figures[f"{name}_count"], figures[f"{name}_bytes"]) for name in CLASSES}
    return {name: pair for name, pair in found.items() if pair[0]}


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        *((0, "sequential"), (PAGE - 1, "sequential"), (PAGE, "small_gap"), (MIB, "small_gap")),
        *((MIB + 1, "large_gap"), (-1, "backward"), (-PAGE, "backward")),
    ],
)
def test_the_gap_decides(trace: Builder, gap: int, expected: str) -> None:
    reads(trace, (0, 2 * PAGE), (2 * PAGE + gap, 100))
    total = timeline(open_trace(trace.path))["total"]
    both = {"sequential": (1, 2 * PAGE)}
    assert counts(total) == both | {expected: (2, 2 * PAGE + 100) if expected == "sequential" else (1, 100)}
    assert (total["bytes"], total["count"]) == (2 * PAGE + 100, 2)


def test_the_first_add_is_compared_with_the_beginning_of_the_file(trace: Builder) -> None:
    reads(trace, (5 * MIB, 10))
    assert counts(timeline(open_trace(trace.path))["total"]) == {"large_gap": (1, 10)}


def test_tensors_that_share_a_page_are_no_jump(trace: Builder) -> None:
    reads(trace, (0, 1000), (1000, 96), (1096, 3000), (PAGE, PAGE), tensor_name="t")
    assert counts(timeline(open_trace(trace.path))["total"]) == {"sequential": (4, 2 * PAGE)}


def test_shares_by_bytes_and_by_count_and_the_stretch_between_jumps(trace: Builder) -> None:
    reads(trace, (0, 3 * PAGE), (3 * PAGE, PAGE), (0, 2 * PAGE), (4 * PAGE, 2 * PAGE))
    total = timeline(open_trace(trace.path), small_gap_limit_bytes=PAGE)["total"]
    assert counts(total) == {"sequential": (2, 4 * PAGE), "large_gap": (1, 2 * PAGE), "backward": (1, 2 * PAGE)}
    assert (total["sequential_byte_share"], total["sequential_count_share"]) == (0.5, 0.5)
    assert (total["backward_byte_share"], total["small_gap_count_share"]) == (0.25, 0)
    assert (total["jumps"], total["stretch_bytes"]) == (2, 4 * PAGE)
    small = timeline(open_trace(trace.path), small_gap_limit_bytes=2 * PAGE)["total"]
    assert counts(small)["small_gap"] == (1, 2 * PAGE)


def test_evictions_are_no_reads(trace: Builder) -> None:
    reads(trace, (0, PAGE))
    reads(trace, (MIB, PAGE), start=1, action="evict")
    reads(trace, (PAGE, PAGE), start=2)
    assert counts(timeline(open_trace(trace.path))["total"]) == {"sequential": (2, 2 * PAGE)}


def test_files_have_their_own_order(trace: Builder) -> None:
    for i in range(3):
        for shard in (0, 1):
            reads(trace, (i * PAGE, PAGE), start=2 * i + shard, shard=shard)
        reads(trace, (i * PAGE, PAGE), start=2 * i, model="n.gguf")
    report = timeline(open_trace(trace.path))
    assert counts(report["total"]) == {"sequential": (9, 9 * PAGE)}
    assert {(row["model"], row["shard"]) for row in report["map"]["rows"]} == {
        *(("m.gguf", 0), ("m.gguf", 1), ("n.gguf", 0))
    }


def test_a_phase_looks_back_beyond_its_beginning(trace: Builder) -> None:
    reads(trace, (0, 3 * MIB), phase="prompt")
    reads(trace, (3 * MIB, PAGE), (0, PAGE), start=10)
    opened = open_trace(trace.path)
    report = timeline(opened)
    assert [(p["phase"], p["first_ns"], p["last_ns"], p["bytes"]) for p in report["phases"]] == [
        *(("prompt", 0, 0, 3 * MIB), ("decode", 10, 11, 2 * PAGE)),
    ]
    alone = timeline(opened, "decode")
    assert counts(alone["total"]) == {"sequential": (1, PAGE), "backward": (1, PAGE)}
    assert alone["total"] == {key: value for key, value in report["phases"][1].items() if key != "phase"}
    assert (alone["map"]["first_ns"], sum(alone["map"]["cells"]["bytes"])) == (10, 2 * PAGE)


def test_readers_that_take_turns_resume(trace: Builder) -> None:
    a, b = 0, 100 * MIB
    reads(trace, (a, PAGE), (b, PAGE), (a + PAGE, PAGE), (b + PAGE, 5 * PAGE), (a + 9 * PAGE, PAGE))
    total = timeline(open_trace(trace.path))["total"]
    assert counts(total) == {"sequential": (1, PAGE), "large_gap": (2, 6 * PAGE), "backward": (2, 2 * PAGE)}
    assert (total["resumed_count"], total["resumed_bytes"]) == (2, 6 * PAGE)


def test_only_a_few_stretches_back_and_only_the_same_token_resumes(trace: Builder) -> None:
    away = [((i + 1) * 10 * MIB, PAGE) for i in range(RESUMED)]
    reads(trace, (0, PAGE), *away, (PAGE, PAGE))
    assert timeline(open_trace(trace.path))["total"]["resumed_count"] == 1
    reads(trace, (500 * MIB, PAGE), *away, (MIB, PAGE), (500 * MIB + PAGE, PAGE), start=100)
    assert timeline(open_trace(trace.path))["total"]["resumed_count"] == 1  # one stretch too many in between
    reads(trace, (700 * MIB, PAGE), start=200, token=2)
    reads(trace, (0, PAGE), start=201, token=3)
    reads(trace, (700 * MIB + PAGE, PAGE), start=202, token=3)
    assert timeline(open_trace(trace.path))["total"]["resumed_count"] == 1


def test_bins_of_time_and_the_map(trace: Builder) -> None:
    trace.tensor(("t", 0, 4 * PAGE), layer=2)
    for at, token, offset, count in ((1000, 1, 0, 2 * PAGE), (1006, 2, PAGE, 3 * PAGE), (1011, 3, 0, 100)):
        reads(trace, (offset, count), start=at, token=token)
    trace.write(
        "tokens",
        [
            {"token": t, "start_ns": at, "end_ns": at, "phase": p}
            for t, at, p in ((1, 900, "prompt"), (2, 1006, "decode"))
        ],
    )
    report = timeline(open_trace(trace.path), bins=2, rows=4)
    first, second = report["bins"]
    assert (first["first_ns"], first["last_ns"], first["token"], first["phase"]) == (1000, 1005, 1, "prompt")
    assert (second["first_ns"], second["last_ns"], second["token"], second["phase"]) == (1006, 1011, 2, "decode")
    assert counts(first) == {"sequential": (1, 2 * PAGE)}
    assert counts(second) == {"backward": (2, 3 * PAGE + 100)}
    assert (report["map"]["column_ns"], report["map"]["columns"], len(report["map"]["rows"])) == (2, 6, 4)
    cells = report["map"]["cells"]
    assert list(zip(cells["row"], cells["column"], cells["bytes"], cells["token"], strict=True)) == [
        *((0, 0, PAGE, 1), (0, 5, 100, 3), (1, 0, PAGE, 1), (1, 3, PAGE, 2), (2, 3, PAGE, 2), (3, 3, PAGE, 2)),
    ]


adds = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from([0, 0, 0, PAGE, 5 * PAGE, MIB, 3 * MIB]),
        st.booleans(),
        st.sampled_from([100, PAGE, 3 * PAGE]),
        st.sampled_from(["prompt", "decode"]),
        st.integers(1, 2),
    ),
    max_size=40,
)


@given(adds, st.integers(1, 3), st.sampled_from([None, "decode"]), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_a_loop_over_the_adds_gives_the_same(steps: list[Any], files: int, phase: str | None, size: int) -> None:
    rows, ends = [], [0, 0]
    for at, (shard, gap, on, count, of, token) in enumerate(steps):
        offset = ends[shard] + gap if on else gap
        ends[shard] = offset + count
        rows.append(
            {"timestamp": at, "shard": shard, "offset_bytes": offset, "bytes": count, "phase": of, "token": token}
        )
    expected = {name: [0, 0] for name in CLASSES}
    resumed = 0
    before: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    ends, tokens = [0, 0], [0, 0]
    for row in rows:
        shard, offset = row["shard"], row["offset_bytes"]
        gap = offset - ends[shard]
        name = "backward" if gap < 0 else "sequential" if gap < PAGE else "small_gap" if gap <= MIB else "large_gap"
        counted = phase in (None, row["phase"])
        expected[name][0] += counted
        expected[name][1] += row["bytes"] * counted
        if name != "sequential":
            last = before[shard][-RESUMED:]
            resumed += counted and any(0 <= offset - end < PAGE and row["token"] == token for end, token in last)
            before[shard].append((ends[shard], tokens[shard]))
        ends[shard], tokens[shard] = offset + row["bytes"], row["token"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        build = Builder(Path(folder))
        for i in range(files):
            build.write("pagecache", rows[i * len(rows) // files : (i + 1) * len(rows) // files])
        slices = Trace.slices
        patch.setattr(Trace, "slices", lambda self, name, rows=0: slices(self, name, rows=size))
        report = timeline(open_trace(build.path), phase)
    total = report["total"]
    assert {name: [total[f"{name}_count"], total[f"{name}_bytes"]] for name in CLASSES} == expected
    assert total["resumed_count"] == resumed
    for name in CLASSES:
        for part in ("bins", "phases"):
            assert sum(one[f"{name}_bytes"] for one in report[part]) == expected[name][1]
    assert sum(report["map"]["cells"]["bytes"]) == total["bytes"] == sum(pair[1] for pair in expected.values())


def test_rows_out_of_time_within_a_slice_are_put_in_order(trace: Builder) -> None:
    reads(trace, (PAGE, PAGE), start=5)
    reads(trace, (0, PAGE), start=3)
    trace.write(
        "pagecache",
        [{"timestamp": t, "offset_bytes": o, "bytes": PAGE} for t, o in ((9, 3 * PAGE), (8, 2 * PAGE), (9, 4 * PAGE))],
    )
    assert counts(timeline(open_trace(trace.path))["total"]) == {"sequential": (5, 5 * PAGE)}


def test_an_empty_trace(trace: Builder) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    trace.write("faults", [])
    report = timeline(open_trace(trace.path))
    assert (report["total"]["stretch_bytes"], report["total"]["sequential_byte_share"]) == (None, None)
    assert (report["phases"], report["bins"], report["map"]["columns"]) == ([], [], 0)
    assert "nothing was read from disk" in render(report, 10, Style(80))
    assert draw(report, "png").startswith(b"\x89PNG")
    json.dumps(report)


def test_text_and_pictures(trace: Builder) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    trace.tensor(("t", 0, 400 * PAGE), model="evil\x1b[2J.gguf")
    second = 10**9
    more = {"model": "evil\x1b[2J.gguf", "phase": "prompt"}
    for i in range(4):
        for j in range(2):
            reads(trace, ((200 * j + i) * PAGE, PAGE), start=(2 * i + j) * second, **more)
    trace.write("tokens", [{"token": 1, "start_ns": 0, "end_ns": 8 * second, "phase": "prompt"}])
    report = timeline(open_trace(trace.path))
    text = render(report, 10, Style(80))
    words = " ".join(text.split())
    assert "prompt: 4.68 kB at a stretch on average, 7 jumps; 12.5% of the bytes come right behind those" in words
    assert "85.7% of the jumps (75.0% of the bytes) go on where one of the 4 stretches before ended" in words
    assert text.replace("\n", "").isprintable()
    assert max(map(len, text.splitlines())) <= 80
    assert draw(report, "png").startswith(b"\x89PNG")
    assert b"<svg" in draw(report, "svg")
    assert b"<svg" in draw(report, "web")
