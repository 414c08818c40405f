"""The experts report against answers worked out by hand, and its parts against brute force."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis import coactivation as co
from llmtraced.analysis import experts as module
from llmtraced.analysis.coactivation import coactivation
from llmtraced.analysis.experts import experts, hot_cold
from llmtraced.analysis.routing import Accesses, Gaps, Layer, Routing, chance, spread, use
from llmtraced.analysis.trace import open_trace
from llmtraced.commands import main
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.reporters.experts import draw, render
from llmtraced.reporters.text import Style

EVIL = "e\x1b[31mvil\u202e.gguf"
GATE, UP, DOWN = (f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))

# graph evaluation: experts of layer 1, and of layer 2, by position. Layer 0 is dense; 1 is a prompt of two positions,
# of which the last layer computes only the one that has outputs.
CHOICES: dict[int, tuple[list[list[int]], ...]] = {
    1: ([[0, 1], [2, 1]], [[1, 0]]),
    2: ([[1, 0]], [[0, 1]]),
    3: ([[1, 2]], [[0, 1]]),
    4: ([[1, 0]], [[1, 0]]),
    5: ([[3, 1]], [[2, 0]]),
}


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def model(trace: Builder, **more: Any) -> None:
    """Two layers of four experts: 30 bytes each in the first, 31 in the second (fused, with a bias)."""
    trace.tensor(("token_embd.weight", 0, 100), ("blk.0.ffn_up.weight", 100, 50), **more)
    merged = {"n_experts": 4, "expert_bytes": 10, "layer": 1, **more}
    trace.tensor((GATE, 1000, 40), (UP, 1040, 40), (DOWN, 1080, 40), **merged)
    trace.tensor(("blk.1.ffn_up_shexp.weight", 1120, 40), layer=1, **more)
    trace.tensor(("blk.2.ffn_gate_up_exps.weight", 2000, 80), **(merged | {"layer": 2, "expert_bytes": 20}))
    trace.tensor(("blk.2.ffn_down_exps.weight", 2080, 40), **(merged | {"layer": 2}))
    trace.tensor(("blk.2.ffn_down_exps.bias", 2120, 4), **(merged | {"layer": 2, "expert_bytes": 1}))


def route(trace: Builder, choices: dict[int, tuple[list[list[int]], ...]] = CHOICES, **meta: Any) -> None:
    rows = [
        {"token": token, "layer": layer, "position": position, "experts": ids}
        | {"phase": "prompt" if token == 1 else "decode"}
        for token, layers in choices.items()
        for layer, positions in enumerate(layers, 1)
        for position, ids in enumerate(positions)
    ]
    trace.write("routing", rows[::-1], **meta)  # in another order than it is needed


@pytest.fixture
def report(trace: Builder) -> dict[str, Any]:
    model(trace)
    route(trace)
    return experts(open_trace(trace.path))


def test_what_there_is(report: dict[str, Any]) -> None:
    assert report["state"] == "routed"
    assert (report["n_layers"], report["n_experts"], report["n_slices"], report["n_slices_used"]) == (2, 4, 8, 7)
    assert report["size_bytes"] == 4 * 30 + 4 * 31
    assert (report["routing_rows"], report["evaluations"], report["selections"]) == (11, 5, 22)
    sequence = {"phase": "decode", "evaluations": 4, "accesses": 16, "used_bytes": 8 * 30 + 8 * 31}
    assert report["sequence"] == sequence | {"bytes_read": 0, "read_per_used": 0}


def test_selections_by_layer_expert_and_token(report: dict[str, Any]) -> None:
    first, second = report["layers"]
    assert report["matrix_bins"] == [{"first_token": token, "last_token": token} for token in range(1, 6)]
    assert first["matrix"] == [[1, 1, 0, 1, 0], [2, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert second["matrix"] == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert (first["layer"], first["n_experts"], first["slice_bytes"]) == (1, 4, 30)
    assert (second["layer"], second["n_experts"], second["slice_bytes"]) == (2, 4, 31)
    assert (first["text_tokens"], first["selections"], first["experts_per_text_token"]) == (6, 12, 2)
    assert (second["text_tokens"], second["selections"]) == (5, 10)


def test_how_even_the_use_is(report: dict[str, Any]) -> None:
    second = report["layers"][1]  # 5, 4, 1, 0 of 10
    assert (second["used"], second["never_used"], second["used_share"]) == (3, 1, 0.75)
    assert (second["hottest_share"], second["top_tenth_share"]) == (0.5, 0.5)
    assert second["gini"] == pytest.approx(0.45)
    entropy = -(0.5 * math.log(0.5) + 0.4 * math.log(0.4) + 0.1 * math.log(0.1)) / math.log(4)
    assert second["entropy"] == pytest.approx(entropy)
    assert second["variation"] == pytest.approx(math.sqrt(17 / 3 - 5 * 0.5 * 0.5) / 2.5)
    assert second["accesses"] == 8
    assert (second["experts_per_evaluation"], second["active_share"]) == (2, 0.5)


def test_hot_and_cold(report: dict[str, Any]) -> None:
    ranked = [(row["layer"], row["expert"], row["selections"]) for row in report["hot_cold"]]
    assert ranked == [(1, 1, 6), (2, 0, 5), (2, 1, 4), (1, 0, 3), (1, 2, 2), (1, 3, 1), (2, 2, 1), (2, 3, 0)]
    assert hot_cold(report)[1] == {"layer": 2, "expert": 0, "selections": 5, "share": 0.5, "bytes": 31, "rank": 2} | {
        "heat": "hot"
    }
    assert [row["heat"] for row in hot_cold(report)] == ["hot"] * 3 + ["cold"] * 4 + ["unused"]
    assert [row["rank"] for row in hot_cold(report)] == list(range(1, 9))


def test_repeats_and_reuse(report: dict[str, Any]) -> None:
    first, second = report["layers"]
    assert (first["repeat_next"], second["repeat_next"], report["repeat_next"]) == (3 / 6, 5 / 6, 8 / 12)
    assert first["repeat_next_by_chance"] == pytest.approx((2 * 1 / 3 + 4 * 1) / 8)
    assert second["repeat_next_by_chance"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 8)
    assert report["repeat_next_by_chance"] == pytest.approx((14 / 3 + 6) / 16)
    assert report["repeat_8"] is None  # no token has eight before it
    assert (report["reuse"]["first_accesses"], report["reuse"]["again_accesses"]) == (7, 9)
    assert report["reuse"]["histogram"] == [
        {"from_tokens": 1, "to_tokens": 1, "accesses": 8},
        {"from_tokens": 2, "to_tokens": 2, "accesses": 1},
    ]
    assert report["reuse"]["tokens"]["mean"] == pytest.approx(10 / 9)
    assert first["reuse_tokens"]["max"] == 2
    assert second["reuse_tokens"]["max"] == 1


def test_repeats_within_eight_tokens(trace: Builder) -> None:
    model(trace)
    # expert 0 comes back after 8 tokens, expert 1 after 9; 2 is chosen in between
    ids = [[0, 1], *([[2]] * 7), [0], [1, 3]]
    route(trace, {token: ([chosen], []) for token, chosen in enumerate(ids, 2)})
    report = experts(open_trace(trace.path))
    assert report["repeat_8"] == 1 / 3  # 0, and of the last token neither
    assert [(one["from_tokens"], one["to_tokens"], one["accesses"]) for one in report["reuse"]["histogram"]] == [
        (1, 1, 6),
        (2, 2, 0),
        (3, 4, 0),
        (5, 8, 1),
        (9, 16, 1),
    ]
    assert report["layers"][1]["repeat_next"] is None


def test_hit_rates(report: dict[str, Any]) -> None:
    cache = report["cache"]
    assert (cache["evaluations"], cache["accesses"], cache["complete"], cache["first_accesses"]) == (4, 16, True, 7)
    assert cache["stack_distance"]["max"] == 4
    # slices 0-3 and 4-7: 0 1 4 5 | 1 2 4 5 | 0 1 4 5 | 1 3 4 6
    by_size = {row["slices"]: row for row in cache["curve"]}
    assert list(by_size) == [1, 2, 3, 4, 5, 6, 7, 8]
    # LFU: 2 evicts 0 (once, like 4 and 5, but longest ago), 0 evicts 2 (once), 3 evicts 0 (twice), 6 evicts 3 (once)
    rates = {"lru": 7 / 16, "lfu": 8 / 16, "pinned": 8 / 16, "belady": 8 / 16}
    second_half = {"second_half_lru": 4 / 8, "second_half_pinned": 5 / 8}
    assert by_size[4] == {"slices": 4, "share": 0.5, "bytes": 122} | rates | second_half
    assert (by_size[3]["lru"], by_size[5]["lru"]) == (2 / 16, 9 / 16)
    assert {by_size[8][policy] for policy in ("lru", "lfu", "pinned", "belady")} == {9 / 16}
    assert cache["lru_curve"]["slices"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cache["lru_curve"]["hit_rate"] == [row["lru"] for row in cache["curve"]]


def test_layer_to_layer(report: dict[str, Any]) -> None:
    (found,) = report["coactivation"]["transitions"]
    assert (found["layer"], found["next_layer"]) == (1, 2)
    # learned from tokens 2 and 3: always 0 and 1. Token 4 chose these, token 5 one of them
    assert (found["recall"], found["frequency_recall"], found["recall_double"]) == (3 / 4, 3 / 4, 1)
    follows = [(one["expert"], one["next_expert"], one["count"], one["expected"]) for one in found["follows"]]
    assert follows == [(3, 2, 1, 0.25), (0, 1, 2, 1.5), (2, 1, 1, 0.75)]
    assert [one["probability"] for one in found["follows"]] == [1, 1, 1]
    assert found["follows"][0]["lift"] == 4


def test_reads_faults_and_stalls_of_each_expert(trace: Builder) -> None:
    model(trace)
    route(trace)
    trace.adds((GATE, 1010, 10), expert=1, phase="prompt")
    trace.adds((GATE, 1010, 10), (UP, 1050, 4), (UP, 1052, 4), expert=1)
    trace.adds((GATE, 1010, 10), expert=1, action="evict")
    trace.adds(("blk.0.ffn_up.weight", 100, 50))
    faults: list[dict[str, Any]]
    faults = [{"major": True, "latency_ns": 5}, {"major": False, "latency_ns": 7}, {"major": None, "latency_ns": None}]
    trace.write("faults", [{"tensor_name": DOWN, "expert": 1, **fault} for fault in faults])
    trace.write("faults", [{"tensor_name": "token_embd.weight", "major": True, "latency_ns": 100}])
    report = experts(open_trace(trace.path))
    hottest = report["hot_cold"][0]
    costs = {"bytes_read": 28, "reread_bytes": 12, "major_faults": 1, "minor_faults": 1, "stall_ns": 12}
    for of in (hottest, report["layers"][0], report):
        assert {name: of[name] for name in costs} == costs
    assert hottest["expert"] == 1
    assert (report["sequence"]["bytes_read"], report["sequence"]["read_per_used"]) == (18, 18 / 488)
    decode = experts(open_trace(trace.path), "decode")
    assert (decode["bytes_read"], decode["reread_bytes"]) == (18, 2)
    assert decode["sequence"]["bytes_read"] == 18


def test_a_batch_accesses_each_expert_once(trace: Builder) -> None:
    model(trace)
    route(trace)
    report = experts(open_trace(trace.path), "prompt")
    assert (report["selections"], report["sequence"]["phase"]) == (6, "prompt")
    assert report["sequence"]["accesses"] == 3 + 2
    assert report["coactivation"]["transitions"] == []  # which of its positions the last layer computed is not known
    assert report["layers"][0]["experts_per_evaluation"] == 3


def test_without_decode_all_of_it_is_the_sequence(trace: Builder) -> None:
    model(trace)
    rows = [{"token": token, "layer": 1, "position": 0, "experts": [token], "phase": "unknown"} for token in (1, 2)]
    trace.write("routing", rows)
    report = experts(open_trace(trace.path))
    assert (report["sequence"]["phase"], report["sequence"]["accesses"], report["repeat_next"]) == (None, 2, 0)


def test_one_layer(trace: Builder) -> None:
    model(trace)
    route(trace)
    report = experts(open_trace(trace.path), layer=2)
    assert [one["layer"] for one in report["layers"]] == [2]
    assert (report["n_slices"], report["size_bytes"], report["repeat_next"]) == (4, 124, 5 / 6)
    assert report["cache"]["accesses"] == 8
    assert {row["layer"] for row in report["hot_cold"]} == {2}
    with pytest.raises(LlmtracedError, match="layer 0 has no experts; these have: 1, 2") as caught:
        experts(open_trace(trace.path), layer=0)
    assert caught.value.exit_code == USAGE


def test_without_routing_reads_are_told_and_how_to_get_more(trace: Builder) -> None:
    model(trace)
    trace.adds((GATE, 1010, 10), expert=1)
    report = experts(open_trace(trace.path))
    assert (report["state"], report["bytes_read"]) == ("unrouted", 10)
    assert [row["expert"] for row in report["hot_cold"] if row["bytes_read"]] == [1]
    text = render(report, 5, Style(100))
    assert "the trace does not say which were chosen; 10 B were read" in text
    assert "record with --detail ops" in text
    route(trace)
    assert "look at another phase" in render(experts(open_trace(trace.path), "load"), 5, Style(100))


def test_ops_without_routing_says_what_may_be_wrong(trace: Builder) -> None:
    model(trace)
    trace.write("tokens", [{"start_ns": 5000, "end_ns": 6000}], detail="full")
    assert "llmtraced check --pid" in render(experts(open_trace(trace.path)), 5, Style(200))


def test_a_dense_model_and_an_empty_trace_say_so(trace: Builder) -> None:
    trace.write("faults", [])
    for _ in range(2):
        report = experts(open_trace(trace.path), layer=3)
        assert (report["state"], report["n_slices"], report["hot_cold"]) == ("dense", 0, [])
        assert render(report, 5, Style(100)).startswith("the model has no experts")
        trace.tensor(("blk.0.ffn_up.weight", 0, 50))
        trace.adds(("blk.0.ffn_up.weight", 0, 50))


def test_choices_that_the_model_cannot_make_are_left_out(trace: Builder) -> None:
    model(trace)
    route(trace, {2: ([[0, 4]], [[65535, -7]])})
    report = experts(open_trace(trace.path))
    assert report["selections"] == 1
    assert any(note.startswith("left out 3 choices") for note in report["notes"])


def test_a_map_without_experts(trace: Builder) -> None:
    route(trace)
    report = experts(open_trace(trace.path))
    assert (report["n_slices"], report["size_bytes"], report["selections"]) == (4 + 3, 0, 22)
    assert any("sizes" in note for note in report["notes"])
    assert report["sequence"]["read_per_used"] is None
    json.dumps(report)


def test_two_models_with_experts(trace: Builder) -> None:
    model(trace)
    small = {"layer": 1, "n_experts": 2, "expert_bytes": 5, "model": "draft.gguf"}
    trace.tensor((GATE, 0, 10), **small)
    trace.adds((GATE, 5, 5), expert=1, model="draft.gguf")
    report = experts(open_trace(trace.path))
    assert report["size_bytes"] == 244
    assert report["bytes_read"] == 0
    assert any("several models" in note for note in report["notes"])


def test_experts_of_a_split_model_and_not_mapped(trace: Builder) -> None:
    merged = {"n_experts": 2, "expert_bytes": 10, "layer": 0}
    trace.tensor(("blk.0.ffn_up_exps.weight", 0, 20), shard=0, **merged)
    trace.tensor(("blk.0.ffn_down_exps.weight", 0, 20), shard=1, backed=False, **merged)
    trace.adds(("blk.0.ffn_up_exps.weight", 0, 10), expert=0)
    trace.adds(("blk.0.ffn_down_exps.weight", 0, 10), expert=0, shard=1)
    report = experts(open_trace(trace.path))
    assert (report["size_bytes"], report["bytes_read"], report["reread_bytes"]) == (40, 20, 0)
    assert report["unbacked_bytes"] == 20
    assert "not used from the mapped file, so reads are not visible: 20 B" in render(report, 5, Style(100))


def test_long_traces_are_binned_and_replayed_in_stretches(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    model(trace)
    route(trace, {token: ([[token % 4, (token // 4) % 4]], []) for token in range(2, 202)})
    whole = experts(open_trace(trace.path))
    assert len(whole["matrix_bins"]) == 100
    assert (whole["cache"]["complete"], whole["cache"]["evaluations"]) == (True, 200)
    monkeypatch.setattr(module, "REPLAYED", 100)
    monkeypatch.setattr(module, "CELLS", 80)
    report = experts(open_trace(trace.path))
    assert report["matrix_bins"][0]["first_token"] == 2
    assert report["matrix_bins"][-1]["last_token"] == 201
    assert len(report["matrix_bins"]) == 10
    for one, same in zip(report["layers"], whole["layers"], strict=True):
        assert [sum(row) for row in one["matrix"]] == [sum(row) for row in same["matrix"]]
    assert not report["cache"]["complete"]
    assert report["cache"]["accesses"] <= 100
    assert report["cache"]["evaluations"] >= 48
    assert f"{report['cache']['evaluations']} tokens of 200 (stretches" in render(report, 5, Style(120))


def made(choices: list[list[list[int]]], sizes: list[int]) -> Routing:
    """Return the routing of one position an evaluation: choices[evaluation][layer] -> experts."""
    layers = [Layer(i, n, 1, sum(sizes[:i])) for i, n in enumerate(sizes)]
    rows = [(token, at, ids) for token, some in enumerate(choices) for at, ids in enumerate(some)]
    wide = max((len(ids) for *_, ids in rows), default=0)
    chosen = [[-1] * (wide - len(ids)) + sorted(ids) for *_, ids in rows]
    return Routing(
        layers=tuple(layers),
        n=sum(sizes),
        token=np.array([token for token, *_ in rows], np.int64),
        at=np.array([at for _, at, _ in rows], np.int64),
        decode=np.ones(len(rows), bool),
        chosen=np.array(chosen, np.int32).reshape(len(rows), wide),
        strays=0,
    )


CHOSEN = st.lists(st.tuples(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 2))), max_size=20).map(
    lambda tokens: [[sorted(ids) for ids in token] for token in tokens]
)


@given(CHOSEN)
def test_accesses_and_gaps_are_those_of_brute_force(choices: list[list[list[int]]]) -> None:
    routing = made(choices, [5, 3])
    accesses = Accesses.of(routing)
    expected = [(token, 5 * at + e) for token, some in enumerate(choices) for at, ids in enumerate(some) for e in ids]
    assert list(zip(accesses.rank.tolist(), accesses.slices.tolist(), strict=True)) == sorted(expected)
    assert accesses.heard.tolist() == ([len(choices)] * 2 if choices else [0, 0])
    gaps = Gaps.of(accesses)
    found = sorted(zip(gaps.rank.tolist(), gaps.slices.tolist(), gaps.gap.tolist(), strict=True))
    assert found == sorted(
        (token, one, token - max((past for past, other in expected if other == one and past < token), default=token))
        for token, one in expected
    )
    for within in (1, 3):
        did, could = gaps.repeats(8, within)
        late = [(token, one) for token, one in expected if token >= within]
        again = [1 for token, one in late if {(token - back, one) for back in range(1, within + 1)} & set(expected)]
        assert (did.sum(), could.sum()) == (len(again), len(late))


@given(CHOSEN)
def test_pairs_are_those_of_brute_force(choices: list[list[list[int]]]) -> None:
    for pair in coactivation(made(choices, [5, 3]))["pairs"]:
        sets = [set(token[pair["layer"]]) for token in choices]
        both, one, other = (
            sum(ids <= chosen for chosen in sets)
            for ids in ({pair["expert"], pair["other"]}, {pair["expert"]}, {pair["other"]})
        )
        assert pair["expert"] < pair["other"]
        assert (pair["count"], pair["expected"]) == (both, pytest.approx(one * other / len(sets)))
        assert both > pair["expected"]


def test_a_layer_that_follows_another_is_predicted_and_frequencies_are_not_enough() -> None:
    rng = np.random.default_rng(7)
    choices = [[[int(e)], [(int(e) + 3) % 8]] for e in rng.integers(0, 8, 400)]
    found = coactivation(made(choices, [8, 8]))
    assert found["recall"] == 1
    assert found["frequency_recall"] < 0.3
    follows = found["transitions"][0]["follows"]
    assert len(follows) == co.PAIRS
    assert all(one["next_expert"] == (one["expert"] + 3) % 8 and one["probability"] == 1 for one in follows)


def test_many_evaluations_are_counted_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co, "COUNTED", 10)
    found = coactivation(made([[[0, 1], [0]] if token % 2 else [[2], [1]] for token in range(100)], [3, 2]))
    assert found["evaluations"] == 10
    (pair,) = found["pairs"]
    assert (pair["expert"], pair["other"], pair["count"]) == (0, 1, 5)


@pytest.mark.parametrize("within", [1, 8])
def test_independent_choices_repeat_as_by_chance(within: int) -> None:
    rng = np.random.default_rng(3)
    tokens, n = 4000, 16
    weights = 1 / np.arange(1, n + 1)
    choices = [[rng.choice(n, 3, False, weights / weights.sum()).tolist()] for _ in range(tokens)]
    accesses = Accesses.of(made(choices, [n]))
    did, could = Gaps.of(accesses).repeats(n, within)
    guess = chance(np.bincount(accesses.slices, minlength=n), tokens, within)
    assert guess == pytest.approx(did.sum() / could.sum(), abs=0.01)


@pytest.mark.parametrize(("tokens", "within"), [(1_000, 0.15), (50_000, 0.03)])
@pytest.mark.parametrize("cv", [0.0, 0.5])
def test_variation_is_the_routers_and_not_that_of_few_tokens(tokens: int, within: float, cv: float) -> None:
    rng = np.random.default_rng(5)
    n = 64
    weights = 1 + cv * np.where(np.arange(n) % 2, 1, -1)
    chosen = rng.choice(n, tokens, p=weights / weights.sum())
    assert use(np.bincount(chosen, minlength=n), tokens)["variation"] == pytest.approx(cv, abs=within)


def test_spread_of_nothing() -> None:
    assert set(spread(np.zeros(0)).values()) == {None}
    assert chance(np.array([1, 0]), 1, 1) is None


def hostile(trace: Builder) -> None:
    model(trace, model=EVIL)
    route(trace, models=[{"model": EVIL}])


def unrouted(trace: Builder) -> None:
    model(trace)
    trace.adds((GATE, 1010, 10), expert=1)


@pytest.mark.parametrize("make", [hostile, unrouted, lambda trace: trace.write("faults", []), model])
@pytest.mark.parametrize("layer", [None, 1])
def test_rendered_and_drawn(trace: Builder, make: Callable[[Builder], None], layer: int | None) -> None:
    make(trace)
    report = experts(open_trace(trace.path), layer=layer)
    json.dumps(report, allow_nan=False)
    for width in (60, 120):
        text = render(report, 3, Style(width))
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert max(map(len, text.splitlines())) <= max(width, 84)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert draw(report, "png").startswith(b"\x89PNG")
    assert b"\x1b" not in draw(report, "svg")
    assert draw(report, "web").startswith(b"<svg")


def test_text_says_the_figures(report: dict[str, Any]) -> None:
    text = render(report, 1, Style(120))
    assert text.startswith("4 experts in 2 layers, 244 B; 2 chosen for each token; the hottest tenth gets 27%")
    assert "1 of 8 slices get none" in text
    assert "66.7% (66.7% by chance) of a token's experts" in text
    assert "replayed over 4 tokens, decode; 43.8% are first uses" in text
    assert re.search(r"^ *122 B +50% +4 +43.8% +50.0% +50.0% +50.0% +50.0% +62.5%$", text, re.MULTILINE)
    assert "… 1 more layer" in text
    assert "… 6 more slices" in text
    assert "never chosen: 1 slice, 31 B; 0 B of them were read all the same" in text


def test_a_list_of_hot_experts_as_a_file(trace: Builder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(trace)
    file = tmp_path / "hot.csv"
    asked = ["report", "experts", str(trace.path), "--hot-list", str(file)]
    assert main(asked) == 1
    assert "the trace does not say which were chosen" in capsys.readouterr().err
    assert not file.exists()
    route(trace)
    assert main(asked) == 0
    lines = file.read_text().splitlines()
    assert lines[:3] == [
        "layer,expert,selections,share,bytes,rank,heat",
        "1,1,6,0.5,30,1,hot",
        "2,0,5,0.5,31,2,hot",
    ]
    assert (len(lines), lines[-1]) == (9, "2,3,0,0.0,31,8,unused")
    assert main(asked) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["report", "cache", str(trace.path), "--hot-list", str(tmp_path / "x")]) == USAGE
