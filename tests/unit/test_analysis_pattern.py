"""Access sequences: fingerprints, classes and their reasons worked out by hand, and against brute force."""

import tempfile
from hashlib import blake2b
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis.accesses import name_hash
from llmtraced.analysis.choices import chance_overlap
from llmtraced.analysis.pattern import CLASSES, pattern
from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.reporters.pattern import draw, render
from llmtraced.reporters.text import Style

FACTOR = 0x9E3779B97F4A7C15
PNG = b"\x89PNG"


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def ops(token: int, *names: str | None, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Return one operator a name, 10 ns apart, the first 10 ns after ``start``."""
    at = range(start + 10, start + 10 * len(names) + 1, 10)
    return [
        {"token": token, "timestamp": ns, "tensor_name": n, "bytes_accessed": 5} | more
        for ns, n in zip(at, names, strict=True)
    ]


def marks(*tokens: int, **more: Any) -> list[dict[str, Any]]:
    """Return tokens that begin at 1,000 times their number and take 100 ns."""
    return [{"token": t, "start_ns": 1000 * t, "end_ns": 1000 * t + 100} | more for t in tokens]


def fingerprint(*names: str) -> str:
    total = 0
    for at, name in enumerate(names):
        total += int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") * FACTOR**at
    return f"{total % 2**64:016x}"


def run(trace: Builder, phase: str | None = None) -> dict[str, Any]:
    return pattern(open_trace(trace.path), phase)


def shown(report: dict[str, Any], width: int = 100, top: int = 12) -> str:
    text = render(report, top, Style(width))
    assert text.replace("\n", "").isprintable()
    assert max(map(len, text.splitlines())) <= width
    return text


def test_the_same_weights_in_the_same_order(trace: Builder) -> None:
    trace.tensor(("a", 0, 50), ("b", 50, 30), ("c", 100_000, 20), layer=2, component="ffn_up")
    trace.write("tokens", marks(1, 2, 3))
    for token in (1, 2, 3):
        trace.write("ops", ops(token, "a", None, "c", "b", start=1000 * token))
    report = run(trace)
    assert report["pattern"] == "deterministic"
    assert report["answer"] == "deterministic: 3 of 3 decode tokens use the same 3 weights in the same order"
    (one,) = report["classes"]
    assert (one["tokens"], one["length"], one["bytes"], one["phases"]) == (3, 3, [15, 15], {"decode": 3})
    assert one["fingerprint"] == fingerprint("a", "c", "b")
    assert one["other_ops"] == [1, 1]
    assert [row["fingerprint"] for row in report["tokens"]] == [one["fingerprint"]] * 3
    a, c, b = report["sequence"]
    assert (a["tensor_name"], c["tensor_name"], b["tensor_name"]) == ("a", "c", "b")
    assert (b["position"], b["layer"], b["component"], b["op"]) == (2, 2, "ffn_up", "MUL_MAT")
    assert (b["bytes"], b["size_bytes"], b["offset_bytes"], b["experts_vary"]) == (5, 30, 50, False)
    assert (a["at_ns"], a["at_share"], b["at_ns"], b["at_share"]) == (10, 0.1, 40, 0.4)
    assert report["scan"] == {"adjacent_steps": 0, "forward_steps": 1, "backward_steps": 1, "file_steps": 0}


def test_a_fingerprint_is_the_same_everywhere(trace: Builder) -> None:
    assert (
        name_hash("blk.0.attn_q.weight") == 0xDA4E25A3CF9837E0
    )  # also what `printf NAME | b2sum -l 64` says, reversed
    trace.write("ops", ops(1, "a", "b") + ops(2, "b", "a", start=100))
    assert {row["fingerprint"] for row in run(trace)["tokens"]} == {fingerprint("a", "b"), fingerprint("b", "a")}


def test_times_are_medians_over_the_reference_tokens(trace: Builder) -> None:
    trace.tensor(("a", 0, 50))
    trace.write("tokens", [*marks(1, 2), {"token": 3, "start_ns": 3000, "end_ns": None}])
    for token, late in ((1, 0), (2, 40), (3, 500)):
        trace.write("ops", ops(token, "a", start=1000 * token + late))
    (row,) = run(trace)["sequence"]
    assert row["at_ns"] == 50  # of 10, 50 and 510
    assert row["at_share"] == pytest.approx(0.3)  # the third token has no duration


def reasons(report: dict[str, Any], number: int = 1) -> list[str]:
    return [one["reason"] for one in report["classes"][number]["reasons"]]


def test_reasons_hold_for_all_of_a_class_and_none_of_the_reference(trace: Builder) -> None:
    batch = {"n_tokens": 512, "n_outputs": 0, "phase": "prompt"}
    trace.write("tokens", marks(1, **batch) + marks(2, 3) + marks(4, **batch) + marks(5, 6, 7))
    for token in (1, 4):
        trace.write("ops", ops(token, "a", "b", start=token * 1000, phase="prompt"))
    for token in (2, 3, 5, 6, 7):
        trace.write("ops", ops(token, "a", "b", "out", start=token * 1000))
    report = run(trace)
    assert reasons(report) == ["prompt batch", "no outputs"]
    (example,) = report["classes"][1]["examples"]
    assert example == {"kind": "missing", "position": 2, "tensor_name": "out"}
    assert [row["class"] for row in report["tokens"]] == [1, 0, 0, 1, 0, 0, 0]
    assert report["phases"] == [
        {"phase": "prompt", "tokens": 2, "identical": 0, "classes": 1, "length": 2.0, "bytes": 10.0},
        {"phase": "decode", "tokens": 5, "identical": 5, "classes": 1, "length": 3.0, "bytes": 15.0},
    ]
    assert "A differs by missing out. Reason: prompt batch: 512 text tokens in it, the reference has 1" in shown(report)
    # One prompt batch that runs the reference's sequence: batches as such are then no explanation.
    trace.write("tokens", marks(8, n_tokens=9, phase="prompt"))
    trace.write("ops", ops(8, "a", "b", "out", start=8000, phase="prompt"))
    assert reasons(run(trace)) == ["no outputs"]


@pytest.mark.parametrize(
    ("row", "names", "expected"),
    [
        ({"graph_nodes": 7}, ("a", "x", "c"), "another graph"),
        ({}, ("a", "x", "c"), "unexplained"),
        ({}, ("a", "c", "b"), "unexplained"),
        ({}, ("a", None, "b"), "another graph"),
    ],
)
def test_reasons_of_a_token_in_between(trace: Builder, row: Any, names: Any, expected: str) -> None:
    trace.write("tokens", marks(1, 3, 4, graph_nodes=5) + marks(2, **({"graph_nodes": 5} | row)))
    for token in (1, 3, 4):
        trace.write("ops", ops(token, "a", "b", "c", start=1000 * token))
    trace.write("ops", ops(2, *names, start=2000))
    report = run(trace)
    assert report["pattern"] == "not deterministic"  # 3 of 4 are less than 90%
    assert reasons(report) == [expected]
    evidence = report["classes"][1]["reasons"][0]["evidence"]
    assert ("another order" in evidence) == (names == ("a", "c", "b"))


@pytest.mark.parametrize(("token", "names", "what"), [(1, ("b", "c"), "first token"), (4, ("a", "b"), "last token")])
def test_tokens_that_were_recorded_in_part(trace: Builder, token: int, names: Any, what: str) -> None:
    trace.write("tokens", marks(1, 2, 3, 4))
    for t in range(1, 5):
        trace.write("ops", ops(t, *(names if t == token else ("a", "b", "c")), start=1000 * t))
    report = run(trace)
    assert reasons(report) == ["cut"]
    assert what in report["classes"][1]["reasons"][0]["evidence"]
    assert report["classes"][1]["missing"] == 1


def test_records_lost_are_a_reason_only_where_weights_are_missing(trace: Builder) -> None:
    lossy = {"ops": {"counted": 4, "delivered": 3, "dropped": 1, "missed": 0}}
    trace.write("tokens", marks(1, 2, 3, 4, 5))
    for t, names in enumerate(("abc", "ac", "abc", "axc", "abc"), 1):
        trace.write("ops", ops(t, *names, start=1000 * t), account=lossy if t == 1 else None)
    report = run(trace)
    assert (reasons(report, 1), reasons(report, 2)) == (["records lost"], ["unexplained"])


def test_another_model_with_the_same_names_is_another_sequence(trace: Builder) -> None:
    both = [{"model": "m.gguf"}, {"model": "draft.gguf"}]
    trace.write(
        "tensors",
        [{"tensor_name": "a", "offset_bytes": 0, "size_bytes": 9, "model": m} for m in ("m.gguf", "draft.gguf")],
        models=both,
    )
    trace.write("tokens", marks(1, 2, 3, 4, 5), models=both)
    for t in range(1, 6):
        trace.write("ops", ops(t, "a", start=1000 * t, model="draft.gguf" if t in (2, 4) else "m.gguf"), models=both)
    report = run(trace)
    assert [one["tokens"] for one in report["classes"]] == [3, 2]
    assert report["classes"][0]["fingerprint"] == fingerprint("a")
    assert report["classes"][1]["fingerprint"] == fingerprint("draft.gguf\0a")
    assert report["classes"][1]["reasons"] == [{"reason": "another model", "evidence": "draft.gguf"}]


def moe(trace: Builder, routing: dict[int, dict[int, list[list[int]]]], bytes_accessed: int | None) -> None:
    """Write tokens that use a dense weight and a merged one of 8 experts of 10 bytes in each of two layers."""
    for layer in (0, 1):
        trace.write(
            "tensors", [{"tensor_name": f"d{layer}", "offset_bytes": 200 * layer, "size_bytes": 5, "layer": layer}]
        )
        merged = {"tensor_name": f"e{layer}", "offset_bytes": 200 * layer + 5, "size_bytes": 80, "layer": layer}
        trace.write("tensors", [merged | {"n_experts": 8, "expert_bytes": 10}])
    for token, layers in routing.items():
        rows = ops(token, "d0", "e0", "d1", "e1", start=1000 * token)
        for row in rows:
            if row["tensor_name"].startswith("e"):
                row["bytes_accessed"] = bytes_accessed
        trace.write("ops", rows)
        common = {"token": token, "timestamp": 1000 * token, "phase": "decode"}
        chosen = [
            common | {"layer": layer, "experts": experts, "position": position}
            for layer, positions in layers.items()
            for position, experts in enumerate(positions)
        ]
        if chosen:
            trace.write("routing", chosen)


def test_experts_are_compared_with_the_token_before(trace: Builder) -> None:
    trace.write("tokens", marks(1, 2, 3, 5))
    moe(
        trace,
        {
            1: {0: [[1, 2]], 1: [[3, 4]]},
            2: {0: [[2, 1]], 1: [[4, 5]]},  # the same set in another order; one of three
            3: {0: [[1, 7]], 1: [[6, 7]]},  # one of three; none
            5: {0: [[1, 7]], 1: [[6, 7]]},  # token 4 was not seen: nothing to compare with
        },
        bytes_accessed=80,
    )
    report = run(trace)
    experts = report["experts"]
    assert (experts["pairs"], experts["chosen"], experts["n_experts"]) == (4, 2.0, 8.0)
    assert experts["overlap"] == pytest.approx((1 + 1 / 3 + 1 / 3 + 0) / 4)
    assert experts["identical_share"] == 0.25
    first, second = experts["layers"]
    assert (first["pairs"], first["overlap"], first["identical_share"]) == (2, pytest.approx(2 / 3), 0.5)
    assert (second["overlap"], second["identical_share"]) == (pytest.approx(1 / 6), 0.0)
    assert [row["expert_overlap"] for row in report["tokens"]] == [
        None,
        pytest.approx(2 / 3),
        pytest.approx(1 / 6),
        None,
    ]
    assert report["pattern"] == "deterministic but for the experts"
    assert "they choose 2 of 8 experts in each layer" in report["answer"]
    assert shown(report, width=80)
    # Two experts of 10 bytes in two layers and two dense weights of 5, not the merged tensors' 80 bytes.
    assert [row["bytes"] for row in report["tokens"]] == [50] * 4
    assert [row["bytes"] for row in report["sequence"]] == [5, 20, 5, 20]
    assert [row["experts_vary"] for row in report["sequence"]] == [False, True, False, True]
    assert "a token needs 10 B that is the same each time, and 40 B of chosen experts" in shown(report)


def test_a_batch_needs_the_union_of_its_positions_choices(trace: Builder) -> None:
    moe(trace, {1: {0: [[1, 2], [2, 3]], 1: [[0], [0]]}, 2: {0: [[1], [2]], 1: [[0]]}}, bytes_accessed=None)
    report = run(trace)
    assert [row["bytes"] for row in report["tokens"]] == [10 + 30 + 10, 10 + 20 + 10]
    assert report["experts"]["overlap"] == pytest.approx((2 / 3 + 1) / 2)
    assert report["unsized_uses"] == 0


def test_experts_that_are_always_the_same_are_deterministic(trace: Builder) -> None:
    moe(trace, {token: {0: [[1]], 1: [[2]]} for token in (1, 2, 3)}, bytes_accessed=None)
    assert run(trace)["pattern"] == "deterministic"


def test_choices_that_were_not_recorded_are_not_guessed(trace: Builder) -> None:
    moe(trace, {1: {}, 2: {}}, bytes_accessed=None)
    report = run(trace)
    assert report["answer"].endswith("which experts they use of each was not recorded")
    assert report["unsized_uses"] == 4
    assert [row["bytes"] for row in report["tokens"]] == [10, 10]
    assert report["experts"] is None
    assert "bytes of those tokens are lower bounds" in shown(report)


def test_chance_overlap() -> None:
    assert chance_overlap(1, 4) == 0.25
    assert chance_overlap(8, 8) == 1
    assert chance_overlap(2, 4) == pytest.approx((4 * (1 / 3) + 1) / comb(4, 2))


def test_a_look_up_reads_rows_and_not_the_whole_weight(trace: Builder) -> None:
    trace.tensor(("embd", 0, 1000))
    for token in (1, 2):
        trace.write("ops", ops(token, "embd", start=1000 * token, op="get_rows", bytes_accessed=1000))
        trace.write("ops", ops(token, "embd", start=1000 * token + 50, op="mul_mat", bytes_accessed=1000))
    report = run(trace)
    assert [row["bytes"] for row in report["tokens"]] == [1000, 1000]
    assert [row["bytes"] for row in report["sequence"]] == [None, 1000]
    assert report["unsized_uses"] == 0


def test_a_phase(trace: Builder) -> None:
    trace.write("tokens", marks(1, 2, phase="prompt") + marks(3, 4))
    trace.write("ops", ops(1, "p", phase="prompt") + ops(2, "p", start=100, phase="prompt"))
    trace.write("ops", ops(3, "d", start=200) + ops(4, "d", start=300))
    report = run(trace, "prompt")
    assert report["answer"] == "deterministic: 2 of 2 prompt tokens use the same 1 weights in the same order"
    assert [row["tensor_name"] for row in report["sequence"]] == ["p"]
    assert run(trace)["sequence"][0]["tensor_name"] == "d"
    assert run(trace, "load")["source"] is None


def test_one_token_is_nothing_to_compare(trace: Builder) -> None:
    trace.write("ops", ops(1, "a"))
    report = run(trace)
    assert report["pattern"] == "unknown"
    assert "only 1" in report["answer"]


def test_what_happens_before_the_first_graph_is_in_no_token(trace: Builder) -> None:
    trace.write("ops", ops(0, "x") + ops(1, "a", start=100) + ops(2, "a", start=200))
    assert [row["token"] for row in run(trace)["tokens"]] == [1, 2]
    assert run(trace)["classes"][0]["length"] == 1


@pytest.mark.parametrize("table", ["faults", "pagecache"])
def test_without_operators_an_order_is_learned_and_nothing_is_certain(trace: Builder, table: str) -> None:
    trace.tensor(("a", 0, 50), ("b", 50, 50), ("c", 100, 50))
    trace.write("tokens", marks(1, 2, 3))
    seen = {1: "caab", 2: "cb", 3: "ba"}  # c before a before b in two tokens, b before a in one
    for token, names in seen.items():
        rows = [
            {"token": token, "timestamp": 1000 * token + 10 * (i + 1), "tensor_name": name, "bytes": 4}
            for i, name in enumerate(names)
        ]
        trace.write(table, rows)
    report = run(trace)
    assert (report["source"], report["pattern"]) == (table, "unknown")
    # Medians: c 10; a 20 of (20, 20); b 20 of (10, 20, 40), and a is first in the tensor map.
    assert [row["tensor_name"] for row in report["sequence"]] == ["c", "a", "b"]
    assert [row["seen_share"] for row in report["sequence"]] == [pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0]
    assert [row["agreement"] for row in report["tokens"]] == [1.0, 1.0, 0.0]
    assert [row["length"] for row in report["tokens"]] == [3, 2, 2]
    assert {row["bytes"] for row in report["tokens"]} == {None}
    assert "not known for certain" in report["answer"]
    assert "67% of those" in report["answer"]
    assert "Record with --detail ops" in " ".join(shown(report).split())
    assert draw(report, "png").startswith(PNG)


def test_page_cache_evictions_are_no_use_of_a_weight(trace: Builder) -> None:
    trace.adds(("a", 0, 4), action="evict")
    assert run(trace)["source"] is None


def test_more_classes_than_are_listed_are_counted(trace: Builder) -> None:
    trace.write("tokens", marks(*range(1, CLASSES + 6)))
    for token in range(1, CLASSES + 6):
        trace.write("ops", ops(token, "a", f"w{token}" if token > 2 else "b", start=1000 * token))
    report = run(trace)
    assert report["class_count"] == CLASSES + 4
    assert len(report["classes"]) == CLASSES
    assert report["unlisted_tokens"] == 4
    assert report["pattern"] == "not deterministic"
    assert "… 26 more sequences" in shown(report, top=2)
    assert draw(report, "svg").lstrip().startswith(b"<?xml")


def test_tokens_over_files_and_slices_stay_whole(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    moe(trace, {t: {0: [[t % 8, 7]], 1: [[t % 3, 4]]} for t in range(1, 12)}, bytes_accessed=None)
    trace.write("tokens", marks(*range(1, 12)))
    whole = run(trace)
    slices = Trace.slices
    monkeypatch.setattr(Trace, "slices", lambda self, name, phase=None, rows=0: slices(self, name, phase, rows=3))
    assert run(trace) == whole
    assert whole["class_count"] == 1
    assert whole["experts"]["pairs"] == 20


def test_rows_out_of_order_are_put_in_order(trace: Builder) -> None:
    rows = ops(1, "a", "b") + ops(2, "a", "b", start=100)
    trace.write("ops", [rows[i] for i in (1, 0, 2, 3)])
    assert run(trace)["class_count"] == 1


def test_an_empty_trace(trace: Builder) -> None:
    trace.write("faults", [])
    report = run(trace)
    assert (report["pattern"], report["source"], report["classes"], report["sequence"]) == ("unknown", None, [], [])
    assert shown(report).startswith("not known: the trace has no use of a weight")
    for picture, magic in (("png", PNG), ("svg", b"<?xml"), ("web", b"<svg")):
        assert draw(report, picture).startswith(magic)


def test_hostile_names_and_a_name_that_the_map_does_not_hold(trace: Builder) -> None:
    evil = "evil\x1b]0;owned\x07$x_{$\n"
    trace.tensor(("a", 0, 10))
    for token, names in ((1, ("a", evil)), (2, ("a", evil)), (3, ("a", evil, evil + "2"))):
        trace.write("ops", ops(token, *names, start=1000 * token, op="mul\x1b"))
    report = run(trace)
    assert report["sequence"][1]["tensor_name"] == evil
    assert report["sequence"][1]["offset_bytes"] is None
    assert "owned" in shown(report)
    assert draw(report, "png").startswith(PNG)
    assert b"\x1b" not in draw(report, "svg")


names = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=6), min_size=1, max_size=12)


@given(names, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_classes_are_those_of_comparing_the_sequences_themselves(tokens: list[list[str]], files: int) -> None:
    rows = [row for t, some in enumerate(tokens, 1) for row in ops(t, *some, start=1000 * t)]
    with tempfile.TemporaryDirectory() as folder:
        trace = Builder(Path(folder))
        trace.tensor(*((name, i, 1) for i, name in enumerate("abc")))
        for some in np.array_split(np.array(rows, dtype=object), files):
            trace.write("ops", list(some))
        report = run(trace)
    groups: dict[str, int] = {}
    for some in tokens:
        groups["".join(some)] = groups.get("".join(some), 0) + 1
    assert report["class_count"] == len(groups)
    assert report["classes"][0]["tokens"] == max(groups.values())
    by_class = {row["token"]: row["class"] for row in report["tokens"]}
    firsts = {one["class"]: "".join(tokens[one["first_token"] - 1]) for one in report["classes"]}
    assert all(firsts[by_class[t]] == "".join(some) for t, some in enumerate(tokens, 1))
    assert [row["fingerprint"] for row in report["tokens"]] == [fingerprint(*some) for some in tokens]
    assert [row["bytes"] for row in report["tokens"]] == [5 * len(some) for some in tokens]


choice = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True), min_size=1, max_size=3),
    min_size=2,
    max_size=9,
)


@given(choice, st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_overlaps_are_those_of_sets(tokens: list[list[list[int]]], rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        trace = Builder(Path(folder))
        moe(trace, {t: {0: some, 1: []} for t, some in enumerate(tokens, 1)}, bytes_accessed=None)
        slices = Trace.slices
        patch.setattr(Trace, "slices", lambda self, name, phase=None, **_: slices(self, name, phase, rows=rows))
        report = run(trace)
    sets = [set().union(*some) for some in tokens]
    pairs = list(pairwise(sets))
    layer = report["experts"]["layers"][0]
    assert layer["pairs"] == len(pairs)
    assert layer["overlap"] == pytest.approx(sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
    assert layer["identical_share"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert layer["chosen"] == pytest.approx(sum(map(len, sets)) / len(sets))
    assert [row["bytes"] for row in report["tokens"]] == [10 + 10 * len(some) for some in sets]
