"""Chrome trace events: valid JSON, exact times, every row; hostile names; and no silent end."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.trace import open_trace
from llmtraced.errors import LlmtracedError
from llmtraced.reporters import trace_events as module
from llmtraced.reporters.trace_events import trace_events

EVIL = 'evil\x1b[2J\n"\\\x7f\u202e</script>'
START = 9_007_199_254_740_993  # an odd number of ns that no float holds


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    """Two tokens of two layers, with operators on both, and faults of two threads."""
    build = Builder(tmp_path / "trace")
    build.tensor((EVIL, 0, 100), layer=0)
    build.tensor(("blk.0.up", 100, 100), layer=0)
    build.tensor(("blk.1.up", 200, 100), layer=1)
    build.tensor(("embd", 300, 100), layer=-1)
    build.write(
        "tokens",
        [
            {"token": 1, "start_ns": START, "end_ns": START + 1_000_001, "stall_ns": None},
            {"token": 2, "start_ns": START + 2_000_000, "end_ns": None, "phase": "prompt"},
        ],
    )
    at = {"token": 1, "thread": 7}
    build.write(
        "ops",
        [
            at | {"timestamp": START + 10, "tensor_name": "embd", "duration_ns": 5, "op": "get_rows"},
            at | {"timestamp": START + 20, "tensor_name": EVIL, "duration_ns": 7, "bytes_accessed": None},
            at | {"timestamp": START + 30, "tensor_name": None, "duration_ns": 1, "op": "add"},
            at | {"timestamp": START + 40, "tensor_name": "blk.0.up", "duration_ns": 9},
            at | {"timestamp": START + 50, "tensor_name": "blk.1.up", "duration_ns": None},
            at | {"timestamp": START + 2_000_010, "token": 2, "tensor_name": "blk.1.up", "duration_ns": 3},
        ],
    )
    build.write(
        "faults",
        [
            {"timestamp": START + 1234, "major": True, "latency_ns": 5678, "tensor_name": EVIL, "offset_bytes": 12},
            {"timestamp": START + 2000, "major": False, "latency_ns": 9, "thread": 2, "offset_bytes": 1 << 40},
            {"timestamp": START + 3000, "major": None, "latency_ns": None, "tensor_name": "embd", "token": 2},
        ],
    )
    adds = [(100, "fault", 10), (200, "readahead", 20), (300, "readahead", 5), (3_000_000, "read", 7)]
    build.write(
        "pagecache",
        [
            {"timestamp": START + at, "cause": cause, "bytes": n, "offset_bytes": 0, "tensor_name": None}
            for at, cause, n in adds
        ]
        + [{"timestamp": START + 400, "action": "evict", "bytes": 99, "offset_bytes": 0, "tensor_name": None}],
    )
    return build


def events(trace: Builder, **more: Any) -> list[dict[str, Any]]:
    text = b"".join(trace_events(open_trace(trace.path), **more))
    assert text.isascii()
    assert text.replace(b"\n", b"").decode().isprintable()
    document = json.loads(text, parse_float=str)  # exactly as written
    found: list[dict[str, Any]] = document["traceEvents"]
    assert all({"name", "ph", "pid", "tid"} <= set(event) for event in found)
    return found


def of(found: list[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    return [event for event in found if event.get("cat") == category]


def test_tokens_layers_operators_and_faults_with_exact_times(trace: Builder) -> None:
    found = events(trace)
    tokens = [(e["name"], e["ph"], e["ts"], e["dur"]) for e in of(found, "token")]
    assert tokens == [
        ("token 1, decode", "X", "0.000", "1000.001"),
        ("token 2, prompt (its end was not seen)", "X", "2000.000", "0.000"),
    ]
    assert of(found, "token")[0]["args"]["stall_ns"] is None
    layers = [(e["name"], e["ts"], e["dur"], e["args"]["ops"]) for e in of(found, "layer")]
    assert layers == [
        ("outside the layers", "0.010", "0.005", 1),
        ("layer 0", "0.020", "0.029", 2),  # the operator without weight in between does not part them
        ("layer 1", "0.050", "0.000", 1),
        ("layer 1", "2000.010", "0.003", 1),  # of the next token
    ]
    ops = of(found, "op")
    assert [(e["name"], e["ts"], e["dur"]) for e in ops[:3]] == [
        ("get_rows embd", "0.010", "0.005"),
        (f"MUL_MAT {EVIL}", "0.020", "0.007"),
        ("add", "0.030", "0.001"),
    ]
    assert ops[1]["args"] == {"token": 1, "tensor_name": EVIL, "layer": 0, "bytes_accessed": None}
    assert len(ops) == 6
    faults = of(found, "fault")
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in faults] == [
        (f"major {EVIL}", 1, "1.234", "5.678"),
        ("minor outside tensors", 2, "2.000", "0.009"),
        ("unfinished embd", 1, "3.000", "0.000"),
    ]
    assert faults[0]["args"] == {"token": 1, "tensor_name": EVIL, "offset_bytes": 12, "expert": -1, "major": True}
    assert (faults[1]["args"]["offset_bytes"], faults[2]["args"]["major"]) == (1 << 40, None)


def checked(text: bytes) -> dict[tuple[int, int], int]:
    """Check that it is what the format says, read with floating-point numbers as viewers do; return events by track."""
    document = json.loads(text)
    assert set(document) == {"otherData", "traceEvents"}, "displayTimeUnit is the unit of ts to some of Perfetto"
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    counters: dict[tuple[int, str], list[float]] = defaultdict(list)
    named = set()
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is type(event["tid"]) is int
        track = (event["pid"], event["tid"])
        if event["ph"] == "M":
            (value,) = event["args"].values()
            kinds = {"process_name": str, "thread_name": str, "process_sort_index": int}
            assert type(value) is kinds[event["name"]]
            assert (event["name"], *track) not in named
            named.add((event["name"], *track))
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(type(value) is int and value >= 0 for value in event["args"].values())
            counters[event["pid"], event["name"]].append(event["ts"])
            continue
        assert event["ph"] == "X"
        assert event["dur"] >= 0
        assert event["cat"]
        assert ("thread_name", *track) in named
        assert ("process_name", event["pid"], 0) in named
        tracks[track].append((event["ts"], event["ts"] + event["dur"]))
    for found in tracks.values():  # one lies within another of its track, or they are apart
        within: list[float] = []
        for began, ended in sorted(found, key=lambda span: (span[0], -span[1])):
            while within and within[-1] <= began:
                within.pop()
            assert not within or ended <= within[-1]
            within.append(ended)
    for times in counters.values():
        assert times == sorted(set(times))
    return {track: len(found) for track, found in tracks.items()}


def test_it_is_what_the_format_says(trace: Builder) -> None:
    expected = {(1, 1): 2, (2, 7): 4, (3, 7): 6, (4, 1): 2, (4, 2): 1}
    assert checked(b"".join(trace_events(open_trace(trace.path)))) == expected


def test_events_that_touch_do_not_overlap_in_floating_point(tmp_path: Path) -> None:
    build = Builder(tmp_path / "trace")
    build.tensor(("t", 0, 1), layer=0)
    rows, at = [], START
    for i in range(2000):
        duration = 1 + i * 7919 % 100_003
        rows.append({"timestamp": at, "tensor_name": "t", "duration_ns": duration, "thread": 7, "token": 1 + i // 100})
        at += duration
    build.write("ops", rows)
    build.write(
        "faults",
        [
            {"timestamp": row["timestamp"], "latency_ns": row["duration_ns"], "thread": 1 + i % 2}
            for i, row in enumerate(rows)
        ],
    )
    text = b"".join(trace_events(open_trace(build.path)))
    assert checked(text) == {(2, 7): 20, (3, 7): 2000, (4, 1): 1000, (4, 2): 1000}
    ops = [event for event in json.loads(text)["traceEvents"] if event.get("cat") == "op"]
    assert [round(event["dur"] * 1000) for event in ops[:-1]] == [row["duration_ns"] - 1 for row in rows[:-1]]
    faults = [event for event in json.loads(text)["traceEvents"] if event.get("cat") == "fault"]
    assert [round(event["dur"] * 1000) for event in faults] == [row["duration_ns"] for row in rows]


def test_reads_are_a_counter_that_falls_to_zero(trace: Builder) -> None:
    counters = [(e["ts"], {k: v for k, v in e["args"].items() if v}) for e in events(trace) if e["ph"] == "C"]
    assert counters == [
        ("0.000", {"fault": 10, "readahead": 25}),
        ("1000.000", {}),
        ("3000.000", {"read": 7}),
        ("4000.000", {}),
    ]


def test_tracks_have_names_and_ids_of_their_own(trace: Builder) -> None:
    found = events(trace)
    named = {(e["pid"], e["tid"]) for e in found if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in found if e["ph"] == "X"} == named
    assert {e["pid"] for e in found} == {e["pid"] for e in found if e["name"] == "process_name"}


def test_a_range_of_tokens_and_a_phase(trace: Builder) -> None:
    found = events(trace, tokens=(2, 9))
    assert [len(of(found, category)) for category in ("token", "layer", "op", "fault")] == [1, 1, 1, 1]
    assert of(found, "op")[0]["ts"] == "2000.010"  # since the beginning of the trace all the same
    assert [len(of(events(trace, phase="prompt"), category)) for category in ("token", "op")] == [1, 0]


def test_too_much_is_refused_before_anything_is_written(trace: Builder) -> None:
    opened = open_trace(trace.path)
    with pytest.raises(LlmtracedError, match=r"9 operators and page faults.*--token FIRST:LAST.*--limit 9"):
        trace_events(opened, limit=8)
    assert len(of(events(trace, limit=9), "fault")) == 3
    assert len(of(events(trace, limit=None), "fault")) == 3
    assert len(of(events(trace, tokens=(2, 2), limit=2), "fault")) == 1


def test_written_in_pieces_it_is_the_same(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(event: dict[str, Any]) -> str:
        return json.dumps(event, sort_keys=True)

    whole = sorted(events(trace), key=key)
    monkeypatch.setattr(module, "_ROWS", 1)
    assert len(list(trace_events(open_trace(trace.path)))) > 12
    assert sorted(events(trace), key=key) == whole


def test_nothing_recorded(tmp_path: Path) -> None:
    build = Builder(tmp_path / "trace")
    build.tensor(("t", 0, 1))
    assert {event["ph"] for event in events(build)} == {"M"}
