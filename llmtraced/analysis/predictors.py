"""Which experts will be chosen? Guesses from what is known before, and how good they are for a prefetcher.

A *guess* is made for each text token and layer: the experts with the highest scores. Scores come from what earlier
tokens chose, from what an earlier layer of this token chose, or from routers applied to inputs that were seen earlier
(table ``router_scores``). What counts for a prefetcher is not how many of all choices are guessed, most of which are in
memory anyway, but how many of those that are *missing*; what is read in vain; and how long before its use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.coactivation import guesses
from llmtraced.analysis.routing import Layer, Routing
from llmtraced.analysis.trace import Trace, collect

__all__ = ["DECAY", "WIDTHS", "Choices", "Guess", "judge", "predictors"]

Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

DECAY: Final = 0.8
"""What a use of an expert by the token before counts, of one by the token after it."""

WIDTHS: Final = (1, 2)
"""Experts that are guessed, in experts that a token uses of a layer."""

_NOTHING: Final = -np.inf
_ROUTED: Final = (
    ("router, 2 layers before", "router", 2),
    ("router, 1 layer before", "router", 1),
    ("attention's input", "attention", 0),
    ("router, its own input", "router", 0),
)


@dataclass(frozen=True)
class Choices:
    """What evaluations of one text token each chose, every layer in each of them.

    Attributes:
        layers: in order.
        token: int64, numbers of the evaluations in the trace.
        when: int64 ``(evaluations, layers)``, ns: when each layer had chosen.
        chosen: int32 ``(evaluations, layers, k)``: experts; -1 fills up.
        used: bool ``(evaluations, slices)``.
        warm: evaluations before this one are only learned from.
    """

    layers: tuple[Layer, ...]
    token: Ints
    when: Ints
    chosen: NDArray[np.int32]
    used: Bools
    warm: int

    @classmethod
    def of(cls, routing: Routing, when: Ints) -> Choices:
        """Take ``routing`` with one row for each evaluation and layer, and when these had chosen, a row each."""
        token, rank = routing.ranked()
        shape = len(token), len(routing.layers)
        used = np.zeros((len(token), routing.n), np.bool_)
        row, slices = routing.selections
        used[rank[row], slices] = True
        chosen = routing.chosen.reshape(*shape, routing.chosen.shape[1])
        return cls(routing.layers, token, when.reshape(shape), chosen, used, len(token) // 2)

    def mine(self, at: int) -> slice:
        """Return the slices of the layer with the index ``at``."""
        return slice(self.layers[at].base, self.layers[at].base + self.layers[at].n_experts)


@dataclass(frozen=True)
class Guess:
    """What one predictor says.

    Attributes:
        name: of it.
        scores: float32 ``(evaluations, slices)``; -inf is never guessed.
        lead: int64 ``(evaluations, layers)``, ns from when it can be said to when the layer has chosen; -1: it cannot.
    """

    name: str
    scores: Floats
    lead: Ints


def predictors(trace: Trace, choices: Choices) -> Iterator[Guess]:
    """Yield what each predictor says, one after the other: they are large."""
    used = choices.used.astype(np.float32)
    since = np.diff(choices.when, axis=0, prepend=choices.when[:1] + 1)  # of the token before, the same layer
    often = used[: choices.warm].sum(axis=0)
    yield Guess("most frequent", np.broadcast_to(np.where(often > 0, often, _NOTHING), used.shape), since)
    recent = np.full(used.shape, _NOTHING, np.float32)
    heat = np.zeros(used.shape[1], np.float32)
    for at in range(1, len(used)):
        heat = DECAY * heat + used[at - 1]
        recent[at] = np.where(heat > 0, heat, _NOTHING)
    yield Guess("last tokens", recent, since)
    for ahead in (2, 1):
        yield _together(choices, ahead)
    for name, source, ahead in _ROUTED:
        found = _routed(trace, choices, source, ahead)
        if found is not None:
            yield Guess(name, *found)


def _together(choices: Choices, ahead: int) -> Guess:
    """Guess from what the layer ``ahead`` before chose, learned from the evaluations that do not count."""
    scores, lead = _blank(choices)
    learn = np.arange(len(choices.token)) < choices.warm
    for at in range(ahead, len(choices.layers)):
        first, second = choices.chosen[:, at - ahead], choices.chosen[:, at]
        n, m = choices.layers[at - ahead].n_experts, choices.layers[at].n_experts
        scores[:, choices.mine(at)] = guesses(first, second, n, m, learn)
        lead[:, at] = choices.when[:, at] - choices.when[:, at - ahead]
    return Guess(f"co-activation, {ahead} layer{'s' if ahead > 1 else ''} before", scores, lead)


def _routed(trace: Trace, choices: Choices, source: str, ahead: int) -> tuple[Floats, Ints] | None:
    """Return scores and lead of what routers say of an input; None: it was not recorded."""
    scores, lead = _blank(choices)
    table = trace.table("router_scores", "decode").filter(pl.col("source") == source, pl.col("ahead") == ahead)
    rows = collect(table.select("token", "layer", "timestamp", "scores"))
    if not rows.height:
        return None
    for at, layer in enumerate(choices.layers):
        mine = rows.filter(
            pl.col("layer") == layer.number,
            pl.col("token").is_in(choices.token.tolist()),
            pl.col("scores").list.len() == layer.n_experts,
        )
        where = np.searchsorted(choices.token, mine["token"].to_numpy())
        flat = mine["scores"].explode().to_numpy() if mine.height else np.zeros(0)
        scores[where, choices.mine(at)] = flat.reshape(mine.height, layer.n_experts)
        lead[where, at] = choices.when[where, at] - mine["timestamp"].to_numpy()
    return scores, lead


def _blank(choices: Choices) -> tuple[Floats, Ints]:
    return np.full(choices.used.shape, _NOTHING, np.float32), np.full(choices.when.shape, -1, np.int64)


def top(scores: Floats, count: int) -> Bools:
    """Return which columns of each row are among its ``count`` highest; of equals the first, and never -inf."""
    if count >= scores.shape[1]:
        return np.isfinite(scores)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    found = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(found, order, True, axis=1)
    return found & np.isfinite(scores)


def judge(
    choices: Choices, guess: Guess, width: int, states: Sequence[tuple[Bools, Bools]], sizes: Ints, disk: float | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how good a guess is, and what it is worth with each of several caches, in the evaluations that count.

    Args:
        choices: what was chosen.
        guess: of one predictor.
        width: experts that are guessed, in experts used.
        states: for each cache, what of ``choices.used`` it lacked, and what was in it as each evaluation began.
        sizes: int64, bytes of each slice.
        disk: bytes/s; None: not known.
    """
    late = np.arange(len(choices.token)) >= choices.warm
    used, lead = choices.used[late], guess.lead[late]
    guessed = np.zeros(used.shape, np.bool_)
    for at in range(len(choices.layers)):
        count = width * choices.chosen.shape[2]
        guessed[:, choices.mine(at)] = top(guess.scores[late][:, choices.mine(at)], count)
    able = np.repeat(lead >= 0, [layer.n_experts for layer in choices.layers], axis=1)
    guessed &= able
    known = int((used & able).sum())
    worth = [_worth(choices, used, guessed, lead, missed[late], there[late], sizes, disk) for missed, there in states]
    return {
        "predictor": guess.name,
        "width": width,
        "right_share": int((guessed & used).sum()) / known if known else None,
        "layers_guessed_share": float((lead >= 0).mean()) if lead.size else None,
        "lead_ns": float(np.median(lead[lead >= 0])) if (lead >= 0).any() else None,
    }, worth


def _worth(
    choices: Choices,
    used: Bools,
    guessed: Bools,
    lead: Ints,
    missed: Bools,
    there: Bools,
    sizes: Ints,
    disk: float | None,
) -> dict[str, Any]:
    each = max(len(used), 1)
    right, vain = guessed & missed, guessed & ~used & ~there
    missed_bytes, right_bytes, vain_bytes = (float((which @ sizes).sum()) for which in (missed, right, vain))
    hidden = None
    if disk:
        hidden = 0.0
        for at in range(len(choices.layers)):
            mine = choices.mine(at)
            good, all_read = right[:, mine] @ sizes[mine], (right | vain)[:, mine] @ sizes[mine]
            needs = all_read / disk * 1e9
            ahead = np.where(needs > 0, np.clip(lead[:, at] / np.maximum(needs, 1), 0, 1), 0)
            hidden += float((good * ahead).sum())
    return {
        "recall": right_bytes / missed_bytes if missed_bytes else None,
        "precision": right_bytes / (right_bytes + vain_bytes) if right_bytes + vain_bytes else None,
        "hidden_share": None if hidden is None or not missed_bytes else hidden / missed_bytes,
        "wasted_bytes_per_token": vain_bytes / each,
        "missed_bytes_per_token": missed_bytes / each,
    }
