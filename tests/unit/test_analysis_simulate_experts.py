"""Keeping and guessing experts: figures of a small made-up mixture, worked out by hand."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.coactivation import guesses
from llmtraced.analysis.predictors import Choices, Guess, judge, top
from llmtraced.analysis.retention import BELADY, POLICIES, SIDECAR, Retention
from llmtraced.analysis.routing import Accesses, Layer, Routing
from llmtraced.analysis.simulate_experts import simulate_experts
from llmtraced.analysis.trace import open_trace
from llmtraced.commands import main
from llmtraced.errors import LlmtracedError
from llmtraced.reporters.simulate_experts import draw, render
from llmtraced.reporters.text import Style

MB = 1_000_000
MS = 1_000_000
TOKENS = 40
EVIL = "e\x1b[31mvil\u202e.gguf"


def routing(choices: list[list[list[int]]]) -> Routing:
    """Return the choices by evaluation and layer, of layers of four experts of 10 MB."""
    n_layers, k = len(choices[0]), len(choices[0][0])
    layers = tuple(Layer(number, 4, 10 * MB, 4 * number) for number in range(n_layers))
    rows = [(token, layer) for token in range(len(choices)) for layer in range(n_layers)]
    token, at = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    chosen = np.array(choices, np.int32).reshape(-1, k)
    return Routing(layers, 4 * n_layers, token + 1, at, np.ones(len(rows), np.bool_), chosen, 0)


def regular(number: int) -> list[list[int]]:
    """Return what token ``number`` chooses: layer 0 goes round, layer 1 takes the next one up, layer 2 always 3."""
    return [[number % 3], [number % 3 + 1], [3]]


def when(evaluations: int, layers: int) -> np.ndarray:
    """Tokens take 10 ms; layer n has chosen n + 1 ms after its token began."""
    return (np.arange(evaluations)[:, None] * 10 + np.arange(layers)[None, :] + 1) * MS


def choices_of(made: Routing) -> Choices:
    evaluations = len(made.ranked()[0])
    return Choices.of(made, when(evaluations, len(made.layers)).ravel())


def test_policies_by_hand() -> None:
    made = routing([regular(number) for number in range(TOKENS)])
    retention = Retention.of(Accesses.of(made), made.n, made.layers)
    sizes = np.full(made.n, 10 * MB)
    # 3 + 3 + 1 slices are used. With places for 7, nothing is missing; with 6, LRU misses the six that go round, and
    # LFU, which has counted most for the one that is always used, misses them as well
    assert set(retention.missed_bytes(sizes, 7).values()) == {0}
    six = retention.missed_bytes(sizes, 6)
    assert set(six) == set(POLICIES)
    assert six["lru"] == 20 * MB
    # pinned: the one of layer 2 and four more of those that go round; the other two of them pass, once in three tokens
    assert six["pinned"] == pytest.approx(2 / 3 * 10 * MB, rel=0.06)
    assert six[BELADY] <= min(six.values())


@pytest.mark.parametrize("policy", ["lru", SIDECAR])
def test_states_are_what_is_there_as_a_token_begins(policy: str) -> None:
    made = routing([regular(number) for number in range(6)])
    missed, there = Retention.of(Accesses.of(made), made.n, made.layers).states(policy, 3)
    assert missed.reshape(6, 3).tolist() == [[True, True, True], *[[True, True, False]] * 5]
    assert [np.flatnonzero(row).tolist() for row in there[:3]] == [[], [0, 5, 11], [1, 6, 11]]


def test_the_sidecars_decisions_with_layers_of_different_widths() -> None:
    """Four experts, then two; of two that are worth the same the one with the lower number goes."""
    layers = (Layer(0, 4, MB, 0), Layer(1, 2, MB, 4))
    chosen = np.array([[2], [0], [3], [1], [2], [0], [2], [1]], np.int32)
    token = np.repeat(np.arange(1, 5), 2)
    made = Routing(layers, 6, token, np.tile([0, 1], 4), np.ones(8, np.bool_), chosen, 0)
    missed, there = Retention.of(Accesses.of(made), made.n, layers).states(SIDECAR, 3)
    assert missed.tolist() == [True, True, True, True, True, False, False, False]
    assert [np.flatnonzero(row).tolist() for row in there] == [[], [2, 4], [3, 4, 5], [2, 4, 5]]


def test_the_highest_scores_are_guessed() -> None:
    scores = np.array([[0.5, -np.inf, 2.0, 0.5], [-np.inf] * 4, [1.0, 2.0, 3.0, 4.0]], np.float32)
    assert top(scores, 2).tolist() == [[True, False, True, False], [False] * 4, [False, False, True, True]]
    assert top(scores, 9).tolist() == [[True, False, True, True], [False] * 4, [True] * 4]


def test_a_guess_is_judged_by_hand() -> None:
    """Two tokens count. Layer 0 chooses 0 then 1, layer 1 chooses 2 then 2; each guess is of one expert."""
    made = routing([[[3], [3]], [[3], [3]], [[0], [2]], [[1], [2]]])
    choices = choices_of(made)
    scores = np.full((4, 8), -np.inf, np.float32)
    scores[2, 0] = 1.0  # layer 0: right
    scores[3, 2] = 1.0  # layer 0: wrong
    scores[2, 4 + 2] = 1.0  # layer 1: right
    scores[3, 4 + 0] = 1.0  # layer 1: wrong, but it is in memory: nothing is read
    lead = np.full((4, 2), 5 * MS, np.int64)
    lead[2, 1] = 1 * MS
    missed, there = np.zeros((4, 8), np.bool_), np.zeros((4, 8), np.bool_)
    missed[2, 0] = missed[2, 4 + 2] = missed[3, 1] = True
    there[3, 4 + 0] = there[3, 4 + 2] = True
    sizes = np.full(8, 10 * MB)
    found, (worth,) = judge(choices, Guess("made up", scores, lead), 1, [(missed, there)], sizes, disk=5e9)
    assert found == {
        "predictor": "made up",
        "width": 1,
        "right_share": 2 / 4,
        "layers_guessed_share": 1.0,
        "lead_ns": 5 * MS,
    }
    assert worth["missed_bytes_per_token"] == 15 * MB
    assert worth["recall"] == pytest.approx(2 / 3)
    assert worth["precision"] == pytest.approx(2 / 3)
    assert worth["wasted_bytes_per_token"] == 5 * MB
    # 10 MB at 5 GB/s take 2 ms: the first has 5 ms, the second 1
    assert worth["hidden_share"] == pytest.approx((10 + 5) / 30)


def test_layers_without_a_guess_find_nothing() -> None:
    made = routing([[[3], [3]], [[3], [3]], [[0], [2]], [[1], [2]]])
    choices = choices_of(made)
    scores = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    lead = np.full((4, 2), -1, np.int64)
    lead[:, 1] = MS
    missed = choices.used.copy()
    found, (worth,) = judge(choices, Guess("g", scores, lead), 2, [(missed, ~missed)], np.full(8, MB), None)
    assert found["layers_guessed_share"] == 0.5
    assert found["right_share"] == 1.0  # of the second layer, whose 2 and 3 are guessed
    assert worth["recall"] == 0.5
    assert worth["hidden_share"] is None


def test_co_activation_learns_from_the_rows_it_is_given() -> None:
    first = np.array([[0], [1], [0], [1]] * 20, np.int32)
    second = np.array([[2], [0], [2], [0]] * 20, np.int32)
    learn = np.arange(80) < 40
    score = guesses(first, second, 2, 3, learn)
    assert score.argmax(axis=1).tolist() == second.ravel().tolist()
    swapped = guesses(first, np.where(learn[:, None], second, 1).astype(np.int32), 2, 3, learn)
    assert np.array_equal(score, swapped), "what counts is not learned from"


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def written(trace: Builder, *, scores: bool = True, tokens: int = TOKENS, model: str = "m.gguf") -> None:
    """Write a mixture of three layers of four experts of 10 MB and 5 MB that every token uses."""
    trace.tensor(("output.weight", 0, 5 * MB), ("token_embd.weight", 5 * MB, 7 * MB), model=model)
    rows: dict[str, list[dict[str, Any]]] = {"tokens": [], "routing": [], "router_scores": []}
    for layer in range(3):
        merged = {"n_experts": 4, "expert_bytes": 10 * MB, "layer": layer, "model": model}
        trace.tensor((f"blk.{layer}.ffn_down_exps.weight", (100 + 40 * layer) * MB, 40 * MB), **merged)
    for number in range(tokens):
        start = number * 10 * MS
        mark = {"token": number + 1, "phase": "decode", "model": model}
        rows["tokens"].append(mark | {"start_ns": start, "end_ns": start + 9 * MS, "stall_ns": 3 * MS})
        for layer, ids in enumerate(regular(number)):
            chose = mark | {"layer": layer, "timestamp": start + (layer + 1) * MS}
            rows["routing"].append(chose | {"experts": ids, "position": 0})
            if scores:
                given = [1.0 if one in ids else 0.0 for one in range(4)]
                before = {"timestamp": start + layer * MS + MS // 2, "source": "router", "ahead": 0, "scores": given}
                rows["router_scores"].append(chose | before)
    # a batch of two texts, and a token of which only one layer is known, are left out
    odd = {"phase": "decode", "model": model, "timestamp": tokens * 10 * MS, "experts": [0]}
    rows["routing"] += [odd | {"token": tokens + 1, "layer": n, "position": p} for n in range(3) for p in range(2)]
    rows["routing"].append(odd | {"token": tokens + 2, "layer": 1, "position": 0})
    for table, some in rows.items():
        trace.write(table, some)


def test_the_report_by_hand(trace: Builder) -> None:
    written(trace)
    report = simulate_experts(open_trace(trace.path), [45 * MB], 10e9)
    assert (report["tokens"], report["counted_tokens"]) == (TOKENS, TOKENS // 2)
    assert (report["dense_bytes"], report["expert_bytes"]) == (5 * MB, 120 * MB)
    assert report["used_expert_bytes_per_token"] == 30 * MB
    assert report["compute_ns_per_token"] == 6 * MS
    (row,) = report["curve"]
    assert row["expert_slices"] == 4
    assert row["missed_bytes_per_token"]["lru"] == 20 * MB
    best = row["missed_bytes_per_token"][row["best_policy"]]
    assert best == min(v for k, v in row["missed_bytes_per_token"].items() if k != BELADY)
    assert row["ns_per_token"] == pytest.approx(6 * MS + best / 10)
    by = {(one["predictor"], one["width"]): one for one in row["predictors"]}
    own = by["router, its own input", 1]
    assert (own["recall"], own["precision"], own["wasted_bytes_per_token"]) == (1.0, 1.0, 0.0)
    assert own["hidden_share"] == pytest.approx(0.5)  # half a ms ahead; 10 MB take one
    assert own["ns_per_token"] == pytest.approx(6 * MS + best / 2 / 10)
    together = by["co-activation, 1 layer before", 1]
    assert together["precision"] == 1.0  # layer 1 follows from layer 0, and layer 2 is always the same
    assert together["recall"] < 1.0  # nothing says what layer 0 chooses
    found = {(one["predictor"], one["width"]): one for one in report["predictors"]}
    assert found["router, its own input", 1]["lead_ns"] == MS // 2
    assert found["co-activation, 2 layers before", 1]["lead_ns"] == 2 * MS
    assert found["last tokens", 1]["lead_ns"] == 10 * MS
    assert found["co-activation, 1 layer before", 1]["layers_guessed_share"] == pytest.approx(2 / 3)


def test_without_scores_routers_are_left_out_and_the_report_says_so(trace: Builder) -> None:
    written(trace, scores=False)
    report = simulate_experts(open_trace(trace.path), [45 * MB])
    assert not any("router" in one["predictor"] for one in report["predictors"])
    assert report["disk_bytes_per_second"] is None
    assert all(one["ns_per_token"] is None for one in report["curve"][0]["predictors"])
    text = render(report, Style(120))
    assert "--router-scores" in text
    assert "--disk-bandwidth" in text


def test_everything_fits(trace: Builder) -> None:
    written(trace)
    (row,) = simulate_experts(open_trace(trace.path), [500 * MB], 1e9)["curve"]
    assert set(row["missed_bytes_per_token"].values()) == {0}
    assert row["ns_per_token"] == 6 * MS
    assert all(one["recall"] is None for one in row["predictors"])


def test_what_is_too_little(trace: Builder) -> None:
    written(trace, tokens=19)
    with pytest.raises(LlmtracedError, match="19 tokens whose experts are all known, 20 are needed"):
        simulate_experts(open_trace(trace.path))


def test_less_ram_than_what_every_token_uses(trace: Builder) -> None:
    written(trace)
    with pytest.raises(LlmtracedError, match="5000000 bytes"):
        simulate_experts(open_trace(trace.path), [4 * MB])


def test_a_dense_model(trace: Builder) -> None:
    trace.tensor(("output.weight", 0, 5 * MB))
    with pytest.raises(LlmtracedError, match="no experts"):
        simulate_experts(open_trace(trace.path))


def test_only_the_last_tokens_are_looked_at(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    written(trace)
    monkeypatch.setattr("llmtraced.analysis.simulate_experts.CELLS", 12 * 25)
    assert simulate_experts(open_trace(trace.path))["tokens"] == 25


def test_more_memory_never_lacks_more_with_lru_or_belady(trace: Builder) -> None:
    rng = random.Random(3)
    made = routing([[[rng.randrange(4)], [rng.randrange(4)]] for _ in range(60)])
    retention = Retention.of(Accesses.of(made), made.n, made.layers)
    by_size = [retention.missed_bytes(np.full(8, MB), size) for size in range(1, 9)]
    for policy in ("lru", BELADY):
        lacking = [one[policy] for one in by_size]
        assert lacking == sorted(lacking, reverse=True)
    assert all(one[BELADY] <= one["lru"] for one in by_size)


def test_the_command_prints_draws_and_writes(
    trace: Builder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(trace, model=EVIL)
    picture = tmp_path / "p.png"
    arguments = ["simulate", str(trace.path), "--experts", "--ram", "45M", "--disk-bandwidth", "1G/s"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4 experts in 3 layers; a token uses 1 of each, 30.0 MB of 120 MB" in shown
    assert "router, its own input" in shown
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert b"\x1b" not in draw(report, "svg")
    assert "\x1b" not in render(report, Style(80))
    assert max(map(len, render(report, Style(80)).splitlines())) <= 80
