"""Each knob of a synthesised mixture's routing does what it says, on arrays; a real server is asked in tests/e2e."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest

from llmtraced.bench import models
from llmtraced.bench.routing import HIDDEN_STD, Routing, Weights, activation_rms, mixed_rms
from llmtraced.bench.shapes import ARCHS, BYTE_TOKENS, FIRST_BYTE

N_USED = 4
FIRST_WORD = FIRST_BYTE + BYTE_TOKENS


def weights(**knobs: float) -> Weights:
    return Weights(replace(Routing(), **knobs), 256, 6, 32, 1500, FIRST_WORD)


def streams(w: Weights, layers: int) -> list[np.ndarray]:
    """The residual stream of every word behind 0 … layers layers, each of which adds what the knob says."""
    rng = np.random.default_rng(7)
    stream = np.concatenate(list(w.rows("embedding")))[FIRST_WORD:]
    seen = [stream]
    for _ in range(layers):
        stream = stream + w.routing.drift * rng.standard_normal(stream.shape)
        seen.append(stream)
    return seen


def normed(stream: np.ndarray) -> np.ndarray:
    return stream / np.sqrt((stream**2).mean(axis=1, keepdims=True))


def chosen(w: Weights, stream: np.ndarray, layer: int) -> np.ndarray:
    """Which experts, bool (words, experts)."""
    logits = normed(stream) @ w.router(layer).T
    marks = np.zeros(logits.shape, bool)
    np.put_along_axis(marks, np.argsort(-logits, axis=1)[:, :N_USED], True, axis=1)
    return marks


def recall(w: Weights, ahead: int, layer: int = 0) -> float:
    """How many of the experts of a later layer its router finds in an earlier layer's input."""
    seen = streams(w, layer + ahead)
    guess = chosen(w, seen[layer], layer + ahead)
    return float((guess & chosen(w, seen[layer + ahead], layer + ahead)).sum() / guess.sum())


def topics(w: Weights) -> np.ndarray:
    return w.topic_of(np.arange(FIRST_WORD, w.vocab))


def shared(w: Weights, *, same_topic: bool) -> float:
    """Share of experts that two words have in common."""
    marks, topic = chosen(w, streams(w, 0)[0], 0).astype(int), topics(w)
    common = marks @ marks.T / N_USED
    pairs = (topic[:, None] == topic) == same_topic
    np.fill_diagonal(pairs, False)
    return float(common[pairs].mean())


def test_embeddings_have_elements_of_one() -> None:
    stream = streams(weights(), 0)[0]
    assert float((stream**2).mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize(("skew", "topical"), [(0.2, 0.5), (0.5, 0.2), (0.0, 0.0), (1.0, 0.0)])
def test_logits_have_the_shares_of_variance(skew: float, topical: float, layer: int) -> None:
    w = weights(skew=skew, topical=topical, sharpness=3.0)
    logits = normed(streams(w, layer)[-1]) @ w.router(layer).T
    topic = topics(w)
    by_topic = np.stack([logits[topic == k].mean(axis=0) for k in range(w.routing.topics)])
    popular = by_topic.mean(axis=0).var()
    liked = (by_topic - by_topic.mean(axis=0)).var()
    own = (logits - by_topic[topic]).var()
    total = 3.0**2
    assert popular / total == pytest.approx(skew, abs=0.05)
    assert liked / total == pytest.approx(topical, abs=0.08)
    assert own / total == pytest.approx(1 - skew - topical, abs=0.08)


def test_skew_makes_hot_and_cold_experts() -> None:
    hottest = []
    for skew in (0.0, 0.2, 0.6):
        used = np.sort(chosen(w := weights(skew=skew, topical=0.3), streams(w, 0)[0], 0).sum(axis=0))[::-1]
        hottest.append(used[:8].sum() / used.sum())
    assert hottest[0] < 0.45
    assert hottest[1] > hottest[0] + 0.08
    assert hottest[2] > hottest[1] + 0.15


def test_every_layer_has_hot_experts_of_its_own() -> None:
    w = weights()
    assert len({tuple(np.argsort(w.popularity(layer))) for layer in range(6)}) == 6
    assert {tuple(np.sort(w.popularity(layer))) for layer in range(6)} == {tuple(np.sort(w.popularity(0)))}


def test_tokens_of_a_topic_share_experts() -> None:
    some, many = weights(skew=0.1, topical=0.3), weights(skew=0.1, topical=0.8)
    assert shared(some, same_topic=True) > shared(some, same_topic=False) + 0.1
    assert shared(many, same_topic=True) > shared(some, same_topic=True) + 0.2
    assert shared(many, same_topic=False) < 0.3


def test_fewer_topics_use_fewer_experts() -> None:
    def ever(n: int) -> int:
        w = weights(skew=0.0, topical=1.0, topics=n)
        return int(chosen(w, streams(w, 0)[0], 0).any(axis=0).sum())

    assert ever(2) <= 2 * N_USED
    assert ever(24) > 20


@pytest.mark.parametrize("stickiness", [0.5, 0.9, 1.0])
def test_the_next_token_stays_in_its_topic(stickiness: float) -> None:
    w = weights(stickiness=stickiness)
    logits = normed(streams(w, 6)[-1]) @ np.concatenate(list(w.rows("output"))).T
    topic, following = topics(w), w.topic_of(np.arange(w.vocab))
    for top_k in (40, w.vocab):  # with what a sampler leaves, and all
        kept = np.where(logits >= np.sort(logits, axis=1)[:, -top_k, None], np.exp(logits), 0)
        kept /= kept.sum(axis=1, keepdims=True)
        stays = float((kept * (topic[:, None] == following)).sum() / len(kept))
        assert stays == pytest.approx(stickiness, abs=0.05)
        assert kept[:, :FIRST_WORD].sum() / len(kept) < 1e-3, "neither specials nor single bytes"
        assert np.exp(-(kept * np.log(kept, where=kept > 0, out=np.zeros_like(kept))).sum(axis=1)).mean() > 10


def test_drift_hides_the_next_layers_choice() -> None:
    little, much = weights(drift=0.1), weights(drift=0.6)
    assert recall(little, 0) == 1
    assert 0.88 < recall(little, 1) < 1
    assert recall(much, 1) < recall(little, 1) - 0.15
    assert recall(much, 2) < recall(much, 1) - 0.03
    assert recall(much, 1, layer=4) > recall(much, 1) + 0.03, "early layers are harder"


def test_sharpness_leaves_the_choice_as_it_is() -> None:
    one, two = weights(sharpness=1.0), weights(sharpness=2.0)
    assert np.allclose(2 * one.router(3), two.router(3), rtol=1e-5)


def test_same_seed_same_rows() -> None:
    one, two, other = weights(), weights(), replace(weights(), seed=1)
    for made in ("embedding", "output", "router", "popularity"):
        mine, again, others = (np.concatenate(list(w.rows(made, 2))) for w in (one, two, other))
        assert (mine == again).all()
        assert (mine != others).mean() > 0.5
    assert sum(len(rows) for rows in one.rows("output")) == 1500


def test_a_vocabulary_of_bytes_speaks_bytes() -> None:
    w = Weights(Routing(), 256, 2, 8, FIRST_WORD, FIRST_WORD)
    assert w.speaks[:FIRST_WORD].any(axis=0).all()


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"skew": 0.7}, "together at most 1"),
        ({"skew": -0.1}, "shares"),
        ({"stickiness": 0.0}, "stickiness must be more than 0"),
        ({"drift": 0.0}, "drift and sharpness must be positive"),
        ({"topics": 200}, "topics must lie between 2 and 127"),
    ],
)
def test_impossible_knobs(knobs: dict[str, float], reason: str) -> None:
    assert not Routing().wrong(256, 512)
    assert reason in replace(Routing(), **knobs).wrong(256, 512)


@pytest.mark.parametrize("activation", ["silu", "oai"])
def test_activation_rms(activation: str) -> None:
    gate, up = np.random.default_rng(0).standard_normal((2, 400_000)) * HIDDEN_STD
    slope, offset = (1.0, 0.0) if activation == "silu" else (1.702, 1.0)
    out = gate / (1 + np.exp(-slope * gate)) * (up + offset)
    assert activation_rms(activation) == pytest.approx(np.sqrt((out**2).mean()), rel=0.02)  # type: ignore[arg-type]


def test_mixed_rms() -> None:
    assert mixed_rms(8, 1, 2.0, renormalised=True) == pytest.approx(1)
    assert mixed_rms(16, 16, 1e-6, renormalised=False) == pytest.approx(1 / 4)
    assert mixed_rms(16, 4, 1e-6, renormalised=True) == pytest.approx(1 / 2, rel=1e-3)
    assert mixed_rms(16, 4, 1e-6, renormalised=False) == pytest.approx(1 / 8, rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_each_layer_adds_the_drift(tmp_path, arch: str) -> None:
    """The feed-forward of written files, in numpy, on normalised random inputs."""
    routing = Routing(drift=0.4)
    shape = models.moe_preset(20_000_000, n_experts=16, n_used=N_USED, arch=arch, routing=routing)
    reader = gguf.GGUFReader(models.write(tmp_path / "m.gguf", shape))
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    about = ARCHS[arch]

    def act(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        slope, offset = (1.0, 0.0) if about.activation == "silu" else (1.702, 1.0)
        return gate / (1 + np.exp(-slope * gate)) * (up + offset)

    def forward(suffix: str, x: np.ndarray, *expert: int) -> np.ndarray:
        if expert and about.fused:
            gate, up = np.split(tensors[f"blk.{n}.ffn_gate_up{suffix}.weight"][expert], 2)
        else:
            gate, up = (tensors[f"blk.{n}.ffn_{part}{suffix}.weight"][expert] for part in ("gate", "up"))
        down = tensors[f"blk.{n}.ffn_down{suffix}.weight"][expert]
        return down @ act(gate @ x, up @ x)

    rng = np.random.default_rng(0)
    for n in range(2):
        squares = []
        for x in rng.standard_normal((60, shape.n_embd)):
            if n < about.n_dense:
                added = forward("", x)
            else:
                logits = tensors[f"blk.{n}.ffn_gate_inp.weight"] @ x
                share = np.exp(logits) / np.exp(logits).sum()
                top = np.argsort(-logits)[:N_USED]
                if about.corrected:
                    share = 1 / (1 + np.exp(-logits))
                    top = np.argsort(-share - tensors[f"blk.{n}.exp_probs_b"])[:N_USED]
                share = share / share[top].sum() if about.renormalised else share
                added = sum(share[e] * forward("_exps", x, e) for e in top)
                if about.shared:
                    added = added + (0.5 if about.shared_gate else 1.0) * forward("_shexp", x)
            squares.append((added**2).mean())
        assert np.sqrt(np.mean(squares)) == pytest.approx(routing.drift, rel=0.3)
