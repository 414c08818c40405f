"""What a mixture's routers say, recorded: of their own input, which is the choice itself, and of earlier inputs.

A router's logits are its weights times the layer's normalised activations. The weights are in the model file; the
activations are read by a probe at the moment when the server begins to multiply them (bpf/ticks.bpf.c). The routers of
later layers, applied to the same activations, are guesses of what these will choose: docs/experts.md tells how good.
What is kept are the products, a number an expert, and not the activations, which are some 20 times as many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmtraced import clock
from llmtraced.errors import LlmtracedError
from llmtraced.gguf_map import Model, Tensor
from llmtraced.prefetch.clock import INPUT, Tick, TickRing
from llmtraced.prefetch.routing import ATTENTION, by_sigmoid, groups, parameters
from llmtraced.probes import ticks as probes
from llmtraced.schema import PHASES, SOURCES, TABLES
from llmtraced.session import Session

__all__ = ["AHEAD", "Applied", "ScoreRecorder", "applied", "table"]

log = logging.getLogger(__name__)

Floats: TypeAlias = NDArray[np.float32]

AHEAD: Final = 2
"""Layers, with experts, that a router's input is tried on ahead."""

_TABLE: Final = "router_scores"
_RING_BYTES: Final = 16 << 20
_LATE_NS: Final = 1_000_000_000  # from a probe's clock to its record in the ring it takes less
_BUFFERED: Final = 8192  # inputs, of some kB each: then a file is written before its time


@dataclass(frozen=True)
class Applied:
    """One router, to be applied to an input that has been seen somewhere.

    Attributes:
        layer: whose router it is.
        source: one of :data:`llmtraced.schema.SOURCES`: what the input is of.
        ahead: layers with experts between the input's and this one.
        matrix: float32 ``(n_experts, n)``; includes what the norms' weights differ by.
        bias: float32 ``(n_experts,)``, added to the logits; None: none.
        correction: float32 ``(n_experts,)``, added to the probabilities before the choice (``exp_probs_b``); None.
        sigmoid: probabilities are the logits' sigmoid, not their softmax.
        groups: how many groups of neighbours the experts are in, and from how many of these they are chosen.
    """

    layer: int
    source: str
    ahead: int
    matrix: Floats
    bias: Floats | None = None
    correction: Floats | None = None
    sigmoid: bool = False
    groups: tuple[int, int] = (1, 1)

    def scores(self, inputs: Floats) -> Floats:
        """Return what the experts are ranked by, ``(rows, n_experts)``, of inputs ``(rows, n)``.

        Of experts in groups, only those of the groups whose two best add up to the most can be chosen (DeepSeek-V3,
        arXiv 2412.19437, 2.1.2); the others have -inf.
        """
        ranked = self._ranked(inputs)
        count, used = self.groups
        if count == 1:
            return ranked
        parts = ranked.reshape(len(ranked), count, -1)
        worth = np.sort(parts, axis=2)[:, :, -2:].sum(2)
        out = np.argsort(-worth, axis=1, kind="stable")[:, used:]
        np.put_along_axis(parts, out[:, :, None], -np.inf, axis=1)
        return parts.reshape(ranked.shape)

    def _ranked(self, inputs: Floats) -> Floats:
        logits = inputs @ self.matrix.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.correction is None and self.groups[0] == 1:
            return np.asarray(logits, np.float32)
        if self.sigmoid:
            likely = 1 / (1 + np.exp(-logits))
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            likely = powers / powers.sum(axis=1, keepdims=True)
        return np.asarray(likely if self.correction is None else likely + self.correction, np.float32)


def applied(model: Model) -> dict[str, list[Applied]]:
    """Return by weight, whose multiplication shows an input, the routers that are to be applied to it.

    Raises:
        LlmtracedError: the file cannot be read, or its experts do not fit into their groups.
    """
    by_name = {tensor.name: tensor for tensor in model.tensors}
    experts = {t.layer: t.n_experts for t in model.tensors if t.n_experts and t.layer >= 0}
    sigmoid = by_sigmoid(model)

    def values(tensor: Tensor | None) -> Floats | None:
        return None if tensor is None else _read(model, tensor)

    routers: dict[int, Applied] = {}
    norms: dict[int, tuple[Floats | None, Floats | None]] = {}
    for layer, n_experts in sorted(experts.items()):
        router = by_name.get(f"blk.{layer}.ffn_gate_inp.weight")
        if router is None or router.type != "F32" or router.shape[1:] != (n_experts,):
            continue
        parts = parameters(by_name, layer, n_experts, router.shape[0])
        bias, correction, grouped = values(parts["bias"]), values(parts["correction"]), groups(model, n_experts)
        routers[layer] = Applied(layer, SOURCES[0], 0, _read(model, router), bias, correction, sigmoid, grouped)
        norms[layer] = values(parts["norm"]), values(parts["attention_norm"])
    found: dict[str, list[Applied]] = {}
    order = list(routers)
    for at, layer in enumerate(order):
        mine, attention = norms[layer]
        ones = found[f"blk.{layer}.ffn_gate_inp.weight"] = [routers[layer]]
        for ahead, later in enumerate(order[at + 1 : at + 1 + AHEAD], 1):
            moved = _moved(routers[later], SOURCES[0], ahead, mine, norms[later][0])
            ones += [] if moved is None else [moved]
        name = next((n for n in (f"blk.{layer}.{a}.weight" for a in ATTENTION) if n in by_name), None)
        before = _moved(routers[layer], SOURCES[1], 0, attention, mine)
        if name is not None and before is not None:
            found[name] = [before]
    return found


def _moved(router: Applied, source: str, ahead: int, here: Floats | None, there: Floats | None) -> Applied | None:
    """Return the router for an input that another norm has made; None: the norms do not fit."""
    if here is None or there is None or router.matrix.shape[1:] != here.shape:
        return None
    ratio = np.divide(there, here, out=np.zeros_like(there), where=here != 0)
    return replace(router, source=source, ahead=ahead, matrix=router.matrix * ratio)


def _read(model: Model, tensor: Tensor) -> Floats:
    """Return the values of an F32 tensor, its slowest dimension first."""
    path = model.shards[tensor.shard].path
    try:
        values = np.fromfile(path, "<f4", tensor.size // 4, offset=tensor.offset)
    except OSError as error:
        raise LlmtracedError(f"cannot read {path}: {error.strerror or error}") from error
    return values.reshape(tensor.shape[::-1]).astype(np.float32)


def table(
    ticks: Sequence[Tick], routers: Mapping[int, Sequence[Applied]], starts: Sequence[tuple[int, int, int]]
) -> pa.Table:
    """Return rows of table ``router_scores``.

    Args:
        ticks: with inputs, of marks in ``routers``.
        routers: by mark, what is applied to its input.
        starts: graphs that began: time in ns, token and phase, in order; an input is of the last one before it.
    """
    when = np.array([start for start, _, _ in starts], np.int64)
    tokens = np.array([token for _, token, _ in starts] + [0], np.int32)  # the last: none began before
    phases = np.array([phase for _, _, phase in starts] + [PHASES.index("unknown")], np.int8)
    made: list[dict[str, Any]] = []
    for mark, ones in routers.items():
        mine = [tick for tick in ticks if tick[2] == mark]
        if not mine:
            continue
        times = np.array([tick[0] for tick in mine], np.int64)
        inputs = np.stack([np.frombuffer(tick[4], "<f4", ones[0].matrix.shape[1]) for tick in mine])
        owner = np.searchsorted(when, times, "right") - 1
        for one in ones:
            scores = one.scores(inputs)
            made.append({"one": one, "timestamp": times, "token": tokens[owner], "phase": phases[owner], "at": scores})
    schema = TABLES[_TABLE]
    if not made:
        return schema.empty_table()
    count = [len(part["timestamp"]) for part in made]
    lengths = np.repeat([part["at"].shape[1] for part in made], count)
    flat = np.concatenate([part["at"].ravel() for part in made])
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))

    def each(values: Iterable[int]) -> NDArray[np.int32]:
        return np.repeat(np.array(list(values), np.int32), count)

    def named(codes: NDArray[Any], names: Sequence[str]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8)), pa.array(names, pa.string()))

    columns = {
        "timestamp": np.concatenate([part["timestamp"] for part in made]),
        "token": np.concatenate([part["token"] for part in made]),
        "phase": named(np.concatenate([part["phase"] for part in made]), PHASES),
        "layer": each(part["one"].layer for part in made),
        "source": named(each(SOURCES.index(part["one"].source) for part in made), SOURCES),
        "ahead": each(part["one"].ahead for part in made),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(flat)),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema).sort_by("timestamp")


class ScoreRecorder:
    """Records the table ``router_scores`` of a session.

    Batches of one text token only: what larger ones multiply is not copied by the probe.

    Args:
        session: whose process has a mixture.
        probe: attached to it.
        routers: by weight, :func:`applied`.
        flush_seconds: how old an input may be before its scores are in a file.
    """

    def __init__(
        self, session: Session, probe: probes.Ticks, routers: Mapping[str, list[Applied]], flush_seconds: float
    ) -> None:
        self.session, self._probe, self._routers = session, probe, routers
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        maps = probe.maps
        self._ring = TickRing(maps["ticks"], maps["clocks"], maps["wakes"], _RING_BYTES, probes.MARKS)
        self._by_mark: dict[int, list[Applied]] = {}
        self._ticks: list[Tick] = []
        self._starts: list[tuple[int, int, int]] = []
        self._lost = self._polled = 0
        session.marks = []

    @classmethod
    def open(cls, session: Session, flush_seconds: float) -> ScoreRecorder | None:
        """Attach to the session's process; None, and a problem of the session: that is not possible."""
        try:
            routers: dict[str, list[Applied]] = {}
            for model in session.models.values():
                routers = routers or applied(model)
            widths = {one.matrix.shape[1] for ones in routers.values() for one in ones}
            if len(widths) != 1:
                raise LlmtracedError("the model has no routers of float32, all of the same width")
            probe = probes.open_ticks(session.target.pid, session.target.symbols, widths.pop(), _RING_BYTES)
        except LlmtracedError as error:
            session.problems.append(f"router scores: {error}")
            log.warning("process %d: %s; router scores are not recorded", session.target.pid, error)
            return None
        if not probe.operators:
            session.problems += [f"router scores: {sentence}" for sentence in probe.lost]
        return cls(session, probe, routers, flush_seconds)

    def poll(self) -> None:
        """Take what has come; begin, if the layout of the process's structures has become known."""
        self._polled = clock.monotonic_ns()
        found = self._ring.wait(0)
        graph, layout = self.session.graph, self.session.layout
        if not self._by_mark:
            if graph is None or layout is None:
                return
            named = {data: name for name, data in graph.weights.values() if name in self._routers}
            addresses = sorted(named)
            self._by_mark = {mark: self._routers[named[data]] for mark, data in enumerate(addresses)}
            self._ring.wake_at(dict.fromkeys(self._by_mark, INPUT))
            self._probe.set_layout(layout, addresses)
            return
        self._ticks += [tick for tick in found if tick[2] in self._by_mark and tick[4]]

    def flush(self) -> None:
        """Write a file if it is time."""
        if time.monotonic() - self._flushed >= self._flush_seconds or len(self._ticks) > _BUFFERED:
            self.write()

    def write(self) -> None:
        """Write what there is; what cannot be written counts as dropped (see :mod:`llmtraced.ledger`)."""
        self._flushed = time.monotonic()
        for marks in self.session.marks or ():
            self._starts += zip(
                marks["ts"].tolist(), marks["token"].tolist(), (marks["mark"] & 15).tolist(), strict=True
            )
        self.session.marks = []
        self._starts.sort()
        lost, self._lost = self._ring.lost - self._lost, self._ring.lost
        if self._ticks or lost:
            cell = {"counted": len(self._ticks) + lost, "delivered": len(self._ticks), "dropped": lost}
            rows = table(self._ticks, self._by_mark, self._starts)
            ledger = self.session.ledger
            ledger.write([(_TABLE, rows)] if ledger.ready() else [], {_TABLE: cell})
        self._ticks = []
        later = [start for start, _, _ in self._starts if start > self._polled - _LATE_NS]
        self._starts = self._starts[-1 - len(later) :]  # what comes next may be older than the newest graph

    def stop(self) -> None:
        """Take what is left and detach; :meth:`write` is still to be called."""
        self.poll()
        self._probe.close()
