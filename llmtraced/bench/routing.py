"""Weights that make a synthesised mixture of experts choose as trained ones do: by token, again and again, unevenly.

A token's embedding is the sum of three orthogonal parts: one that all tokens share, one of its *topic*, one of its
own. A router's row has the same three parts, so an expert's logit is

    its popularity  +  its liking for the topic  +  its liking for this token

with the shares of variance that :class:`Routing` says. The output matrix keeps sampled tokens in their topic for a
while. Every layer adds a random vector to the residual stream, so the token's own part turns away from layer to layer,
and the next layer's router, applied to this layer's input, is right often but not always. The rows grow with the
stream, so that the shares are the same in all layers.

Nothing here is trained: experts follow no syntax, layers do not differ in kind, and what a token's context adds
(through attention with random weights) is little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["HIDDEN_STD", "Activation", "Made", "Routing", "Weights", "activation_rms", "mixed_rms"]

Floats: TypeAlias = NDArray[np.float32]
Made: TypeAlias = Literal["embedding", "output", "router", "popularity"]
Activation: TypeAlias = Literal["silu", "oai"]

HIDDEN_STD: Final = 0.5
"""Standard deviation of what the random gate and up matrices give for a normalised input."""

_COMMON: Final = 0.2  # of an embedding's square, what all tokens share; routers undo it, so it changes no logit
_TOPIC: Final = 0.3
_SPOKEN: Final = 8.0  # logits by which the words of a topic are above all others: these get 1 % or so together
_NEVER: Final = -12.0  # logits of specials and single bytes
_CHUNK: Final = 256  # rows made at once
_DRAWS: Final = 2048


@dataclass(frozen=True)
class Routing:
    """How a mixture of experts chooses. What the knobs do to measured figures: docs/test-models.md.

    Attributes:
        skew: share of the variance of a router's logits that is the expert's popularity, the same for all tokens:
            0 makes all experts equally likely, 1 chooses the same ones for ever. A normal distribution over the
            experts of a layer, dealt out anew in every layer.
        topical: share of the variance that is the token's topic; the rest is the token's own. More of it: experts
            repeat at the next token more often, as long as the topic lasts.
        topics: kinds of tokens. Fewer: experts of a topic are a larger part of all that is chosen.
        stickiness: probability that a sampled token stays in its topic, so topics last ``1 / (1 - stickiness)`` tokens.
            Roughly, whatever the sampler cuts off: the words that lead elsewhere are as likely as those that do not.
        drift: RMS of what each layer adds to the residual stream, of a token's embedding, which has 1. More of it: one
            layer's router input says less about the next one's choice, first in the early layers.
        sharpness: standard deviation of a router's logits: how unlike the weights of the chosen experts are. It does
            not change which are chosen.
    """

    skew: float = 0.12
    topical: float = 0.45
    topics: int = 24
    stickiness: float = 0.9
    drift: float = 0.3
    sharpness: float = 2.0

    def wrong(self, n_embd: int, vocab: int) -> str:
        """Return why no model can be made with these values, or nothing."""
        if self.skew < 0 or self.topical < 0 or self.skew + self.topical > 1:
            return "skew and topical are shares, together at most 1"
        if not 0 < self.stickiness <= 1:
            return "stickiness must be more than 0 and at most 1"
        if self.drift <= 0 or self.sharpness <= 0:
            return "drift and sharpness must be positive"
        if not 2 <= self.topics <= min(n_embd // 2 - 1, vocab):
            return f"topics must lie between 2 and {min(n_embd // 2 - 1, vocab)} (half of n_embd, less one; vocab)"
        return ""


@dataclass(frozen=True)
class Weights:
    """Computes the tensors that decide routing: embedding, output, routers.

    Attributes:
        n_embd, n_layers, n_experts, vocab: of the model.
        first_word: the first token that is neither special nor a single byte.
        biased: routers have a bias that holds the popularity, so their rows do not.
        seed: of everything random.
    """

    routing: Routing
    n_embd: int
    n_layers: int
    n_experts: int
    vocab: int
    first_word: int
    biased: bool = False
    seed: int = 0

    @cached_property
    def basis(self) -> Floats:
        """Orthonormal rows, ``(1 + topics, n_embd)``: the direction that all tokens share, then the topics'."""
        square = self._rng(0).standard_normal((self.n_embd, 1 + self.routing.topics))
        return np.asarray(np.linalg.qr(square)[0].T, np.float32)

    @cached_property
    def speaks(self) -> NDArray[np.bool_]:
        """``(vocab, topics)``: whether a token may follow one of this topic.

        A topic's own words may, and as many of the others' as leave ``stickiness`` to its own: all are equally likely,
        so that a sampler's top-k or min-p cuts off both alike. The logits of the others' vary more, by what the layers
        happen to add in the direction of their own topic, and ``exp`` favours what varies: they are fewer for that.
        """
        topic = self.topic_of(np.arange(self.vocab))
        words = np.arange(self.vocab) >= self._first_word
        speaks: NDArray[np.bool_] = (topic[:, None] == np.arange(self.routing.topics)) & words[:, None]
        rng = self._rng(1)
        varies = _SPOKEN**2 * (self.grown(self.n_layers) ** 2 - 1) / (self.n_embd * _TOPIC)
        leave = (1 / self.routing.stickiness - 1) * math.exp(-varies / 2)
        for k in range(self.routing.topics):
            others = np.flatnonzero(words & (topic != k))
            wanted = max(round(int(speaks[:, k].sum()) * leave), int(leave > 0))
            speaks[rng.choice(others, min(wanted, len(others)), replace=False), k] = True
        return speaks

    def topic_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the topics of token ids."""
        return tokens % self.routing.topics

    def grown(self, layer: int) -> float:
        """Return the RMS of the residual stream where ``layer`` layers have added to it; embeddings have 1."""
        return math.sqrt(1 + layer * self.routing.drift**2)

    def rows(self, made: Made, layer: int = 0) -> Iterator[Floats]:
        """Yield the rows of a tensor, some at a time: ``(n, n_embd)``; of ``popularity`` it is one ``(n_experts,)``."""
        if made == "router":
            yield self.router(layer)
        elif made == "popularity":
            yield self.popularity(layer)
        else:
            rng = self._rng(2 if made == "embedding" else 3)
            for first in range(0, self.vocab, _CHUNK):
                tokens = np.arange(first, min(first + _CHUNK, self.vocab))
                yield self._embedding(tokens, rng) if made == "embedding" else self._output(tokens, rng)

    def popularity(self, layer: int) -> Floats:
        """Return what a layer's router gives each expert whatever the token, ``(n_experts,)``, in logits."""
        normal = NormalDist()
        scores = np.array([normal.inv_cdf((i + 0.5) / self.n_experts) for i in range(self.n_experts)])
        scores *= math.sqrt(self.routing.skew) * self.routing.sharpness / max(float(scores.std()), 1e-9)
        return self._rng(4, layer).permutation(scores).astype(np.float32)

    def router(self, layer: int) -> Floats:
        """Return a layer's router, ``(n_experts, n_embd)``."""
        routing, rng = self.routing, self._rng(5, layer)
        topical = rng.standard_normal((self.n_experts, routing.topics))
        topical -= topical.mean(axis=1, keepdims=True)  # what an expert likes in all topics is its popularity
        topical *= math.sqrt(routing.topical) * routing.sharpness / float(topical.std())
        own = math.sqrt(max(1 - routing.skew - routing.topical, 0)) * routing.sharpness
        common = np.zeros(self.n_experts, np.float32) if self.biased else self.popularity(layer)
        return self._readers(common, topical.astype(np.float32), own, layer, rng)

    def _embedding(self, tokens: NDArray[np.int64], rng: np.random.Generator) -> Floats:
        own = self._own(len(tokens), rng) * np.float32(math.sqrt(1 - _COMMON - _TOPIC))
        shared = self.basis[0] * np.float32(math.sqrt(_COMMON))
        topic = self.basis[1 + self.topic_of(tokens)] * np.float32(math.sqrt(_TOPIC))
        return np.asarray((own + shared + topic) * math.sqrt(self.n_embd), np.float32)

    def _output(self, tokens: NDArray[np.int64], rng: np.random.Generator) -> Floats:
        common = np.where(tokens < self._first_word, _NEVER, 0).astype(np.float32)
        topical = self.speaks[tokens].astype(np.float32) * np.float32(_SPOKEN)
        return self._readers(common, topical, 1.0, self.n_layers, rng)

    def _readers(self, common: Floats, topical: Floats, own: float, layer: int, rng: np.random.Generator) -> Floats:
        """Return vectors whose products with the normalised residual stream behind ``layer`` layers are as asked.

        Args:
            common: ``(n,)``, the product's mean over the tokens.
            topical: ``(n, topics)``, what is added for a token of each topic.
            own: standard deviation of what a token's own part and the layers add.
            layer: how many layers have added to the stream.
            rng: for the direction in which ``own`` is looked for.
        """
        grown = self.grown(layer)
        unit = grown / math.sqrt(self.n_embd)
        free = self.n_embd - 1 - self.routing.topics
        rest = math.sqrt(self.n_embd / free * (1 - (_COMMON + _TOPIC) / grown**2))  # RMS along a free direction
        vectors = self._own(len(common), rng) * np.float32(own / rest)
        vectors += common[:, None] * self.basis[0] * np.float32(unit / math.sqrt(_COMMON))
        vectors += topical @ self.basis[1:] * np.float32(unit / math.sqrt(_TOPIC))
        return vectors

    def _own(self, n: int, rng: np.random.Generator) -> Floats:
        """Return ``n`` random unit vectors without any part in the shared directions."""
        vectors = rng.standard_normal((n, self.n_embd), np.float32)
        vectors -= vectors @ self.basis.T @ self.basis
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    @property
    def _first_word(self) -> int:
        """Where words begin; a vocabulary with fewer words than topics must do with bytes."""
        return self.first_word if self.vocab - self.first_word >= self.routing.topics else 0

    def _rng(self, *which: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *which))


def activation_rms(activation: Activation) -> float:
    """Return the RMS of gate times up, for both normally distributed with :data:`HIDDEN_STD`.

    ``silu`` is ``g * sigmoid(g) * u``; ``oai`` is gpt-oss's ``g * sigmoid(1.702 g) * (u + 1)`` (ggml's
    ``ggml_swiglu_oai``; its limit of 7 is never reached).
    """
    points, weights = np.polynomial.hermite_e.hermegauss(32)
    gate = points * HIDDEN_STD
    slope, offset = (1.0, 0.0) if activation == "silu" else (1.702, 1.0)
    square = float(weights @ (gate / (1 + np.exp(-slope * gate))) ** 2 / weights.sum())
    return math.sqrt(square * (HIDDEN_STD**2 + offset**2))


def mixed_rms(n_experts: int, n_used: int, sharpness: float, *, renormalised: bool) -> float:
    """Return the RMS of a weighted sum of the chosen experts' outputs that are independent and have RMS 1.

    Args:
        n_experts: of a layer.
        n_used: of them, for a token.
        sharpness: standard deviation of the logits.
        renormalised: the weights of the chosen add up to 1; else they are parts of a softmax over all.
    """
    logits = np.random.default_rng(0).standard_normal((_DRAWS, n_experts)) * sharpness
    weights = np.exp(logits)
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.sort(weights, axis=1)[:, -n_used:]
    if renormalised:
        weights /= weights.sum(axis=1, keepdims=True)
    return math.sqrt(float((weights**2).sum(axis=1).mean()))
