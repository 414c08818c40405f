"""What a server without enough memory does, computed: which bytes each token uses, what comes and goes for it.

The *access stream* is all bytes that are used, one after the other; a position in it is a number of bytes. A page cache
drops what has not been used for a stretch of it, which is how an LRU list behaves on average (Che's approximation), and
can be computed for many tokens at once. :mod:`llmtraced.bench.synthetic` makes a trace of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.bench import models
from llmtraced.gguf_map import Model, Shard, Tensor
from llmtraced.schema import PAGE

__all__ = [
    "DATA_OFFSET",
    "N_USED",
    "PROMPT_EVERY",
    "Cache",
    "Ints",
    "Layout",
    "Router",
    "Runs",
    "Use",
    "cut",
    "lay_out",
    "shape_of",
    "touched",
    "use_of",
]

Ints = NDArray[np.int64]

N_EXPERTS: Final = 64
N_USED: Final = 4
DATA_OFFSET: Final = 96 << 10  # what a header of some hundred tensors takes, about
PROMPT_EVERY: Final = 512
PROMPT_TOKENS: Final = 8
_CHOICES: Final = 1024  # sets of experts prepared for each layer
_REPEATED: Final = 0.3  # of the choices are the token's before
_ALIGNMENT: Final = 32
_MOST_PAGES: Final = 512  # in a run, on average; a run of twice as many is the longest that is recorded


def lay_out(shape: models.Shape) -> Model:
    """Return the tensor map that a file of ``shape`` would have; no file is written."""
    tensors: list[Tensor] = []
    end = DATA_OFFSET
    for plan in models.tensor_plan(shape):
        layer, component = -1, plan.name.removesuffix(".weight")
        if component.startswith("blk."):
            _, number, component = component.split(".", 2)
            layer = int(number)
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        experts = plan.shape[0] if component.endswith("_exps") else 0
        each = plan.nbytes // experts if experts else 0
        dims = tuple(reversed(plan.shape))
        tensors.append(Tensor(plan.name, offset, plan.nbytes, plan.kind.name, dims, layer, component, 0, experts, each))
        end = offset + plan.nbytes
    return Model((Shard(Path("synthetic.gguf"), end, DATA_OFFSET),), tuple(tensors), "llama", "synthetic", {}, "0" * 32)


def shape_of(n_tensors: int, model_bytes: int, moe: bool) -> models.Shape:
    """Return a shape with at least ``n_tensors`` tensors (at most 9 more) and about ``model_bytes``."""
    embd = (512 if moe else 1024) if model_bytes >= 1_000_000_000 else 256
    layers = max(1, math.ceil((n_tensors - 3) / (10 if moe else 9)))
    shape = models.Shape(layers, embd, 32, embd // 64, embd // 256, vocab=32 * embd)
    if moe:
        shape = replace(shape, n_experts=N_EXPERTS, n_used=N_USED)
    one, two = (models.plan_bytes(replace(shape, n_ff=32 * k)) for k in (1, 2))
    return replace(shape, n_ff=32 * max(1, 1 + round((model_bytes - one) / (two - one))))


class Layout:
    """The model as *pieces*: a tensor, an expert of a tensor, or (the last one) the header.

    Attributes:
        start, size, pages, tensor, expert: of each piece; the header's tensor is the number of tensors.
        first: the first piece of each tensor.
        steps: tensors in the order in which a token uses them; operators are the ``is_op`` among them.
        layer: of each step; ``merged``: whether it is one of a layer's merged expert tensors.
    """

    def __init__(self, model: Model) -> None:
        tensors = self.tensors = model.tensors
        parts = np.array([max(t.n_experts, 1) for t in tensors])
        ends = np.cumsum(parts)
        self.first = ends - parts
        tensor = np.repeat(np.arange(len(tensors)), parts)
        number = np.arange(len(tensor)) - self.first[tensor]
        sizes = np.array([t.size for t in tensors]) // parts
        self.tensor = np.append(tensor, len(tensors))
        self.expert = np.append(np.where(parts[tensor] > 1, number, -1), -1).astype(np.int32)
        self.size = np.append(sizes[tensor], DATA_OFFSET)
        self.start = np.append(np.array([t.offset for t in tensors])[tensor] + number * sizes[tensor], 0)
        self.pages = (self.start + self.size - 1) // PAGE - self.start // PAGE + 1
        used = [n for n, t in enumerate(tensors) if t.component != "token_embd"]
        self.steps = np.array(used)
        self.is_op = np.array([len(tensors[n].shape) > 1 for n in used])
        self.merged = np.array([tensors[n].n_experts > 0 for n in used])
        self.layer = np.array([tensors[n].layer for n in used])
        self.layers = 1 + int(self.layer.max())


@dataclass
class Use:
    """Which pieces some tokens use, in order: ``piece``, the ``token`` (from 0, of these) and the step of each."""

    piece: Ints
    token: Ints
    step: Ints
    routing: NDArray[np.int32]  # rows (token, layer, position) by expert
    positions: Ints  # text tokens of each token


class Router:
    """Chooses experts: some are popular, and a choice is often the one of the token before."""

    def __init__(self, layout: Layout, random: np.random.Generator) -> None:
        self.layout, self.random = layout, random
        liking = random.standard_normal((layout.layers, 1, N_EXPERTS)) + random.gumbel(
            size=(layout.layers, _CHOICES, N_EXPERTS)
        )
        self.sets = np.argpartition(-liking, N_USED, axis=2)[:, :, :N_USED].astype(np.int32)
        self.before = np.zeros(layout.layers, np.int64)

    def choose(self, rows: int) -> NDArray[np.int32]:
        """Return experts, int32 [rows, layers, used]."""
        layers = self.layout.layers
        drawn = self.random.integers(0, _CHOICES, (rows, layers))
        fresh = self.random.random((rows, layers)) >= _REPEATED
        drawn[0] = np.where(fresh[0], drawn[0], self.before)
        at = np.maximum.accumulate(np.where(fresh, np.arange(rows)[:, None], 0), axis=0)
        drawn = np.take_along_axis(drawn, at, axis=0)
        self.before = drawn[-1]
        return self.sets[np.arange(layers), drawn]


def use_of(layout: Layout, router: Router | None, first: int, count: int) -> Use:
    """Return what tokens ``first``, ``first`` + 1, … (1 is the first graph) use."""
    positions = np.where((np.arange(first, first + count) - 1) % PROMPT_EVERY == 0, PROMPT_TOKENS, 1)
    steps = len(layout.steps)
    whole = np.flatnonzero(~layout.merged)
    token, step = np.repeat(np.arange(count), len(whole)), np.tile(whole, count)
    piece = layout.first[layout.steps[step]]
    if router is None:
        return Use(piece, token, step, np.zeros((0, 0), np.int32), positions)
    chosen = router.choose(int(positions.sum()))
    owner = np.repeat(np.arange(count), positions)
    wanted = np.zeros((count, layout.layers, N_EXPERTS), bool)  # a batch's positions may choose the same expert
    wanted[owner[:, None, None], np.arange(layout.layers)[None, :, None], chosen] = True
    tokens, pieces, at = [token], [piece], [step]
    merged = np.flatnonzero(layout.merged)
    by_layer = merged[np.argsort(layout.layer[merged], kind="stable")].reshape(layout.layers, -1)
    t, layer, expert = np.nonzero(wanted)
    for column in by_layer.T:  # gate, up, down
        tokens.append(t)
        at.append(column[layer])
        pieces.append(layout.first[layout.steps[column[layer]]] + expert)
    token, step, piece = (np.concatenate(arrays) for arrays in (tokens, at, pieces))
    order = np.argsort(token * steps + step, kind="stable")
    return Use(piece[order], token[order], step[order], chosen.reshape(-1, N_USED), positions)


class Cache:
    """What is resident: a piece goes when ``window`` bytes of the access stream have passed since its last use."""

    def __init__(self, pieces: int, window: int) -> None:
        self.window = window
        self.last = np.full(pieces, -(1 << 62))

    def use(self, piece: Ints, at: Ints, begin: int, end: int) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """Use pieces at positions of the access stream, all in [begin, end); return those added and those evicted.

        Both are pieces and positions. A piece is evicted at its last use + ``window``, wherever that lies: so each
        eviction belongs to exactly one stretch [begin, end).
        """
        order = np.argsort(piece, kind="stable")
        p, x = piece[order], at[order]
        again = np.zeros(len(p), bool)
        again[1:] = p[1:] == p[:-1]
        before = self.last[p]
        before[1:] = np.where(again[1:], x[:-1], before[1:])
        missed = x - before > self.window
        gone = missed & (before + self.window >= begin)
        self.last[p] = x  # of several uses the last one stays
        leaves = self.last + self.window
        late = np.flatnonzero((leaves >= begin) & (leaves < end))
        evicted = np.concatenate([p[gone], late]), np.concatenate([before[gone] + self.window, leaves[late]])
        return (p[missed], x[missed]), evicted


def cut(layout: Layout, piece: Ints, rows: float, random: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Cut pieces into about ``rows`` runs at random pages, none above 1,024 pages.

    Returns:
        Of each run the index of its piece in ``piece``, the offset in the file, and the bytes; in their order.
    """
    pages = layout.pages[piece]
    mean = min(max(float(pages.sum()) / max(rows, 1), 1.0), _MOST_PAGES)
    parts = np.clip(
        (pages / mean + random.random(len(pages))).astype(np.int64), np.maximum(-(-pages // _MOST_PAGES), 1), pages
    )
    source = np.repeat(np.arange(len(piece)), parts)
    number = np.arange(len(source)) - np.repeat(np.cumsum(parts) - parts, parts)
    border = (number + random.random(len(source)) - 0.5) * (pages / parts)[source]
    start, size = layout.start[piece][source], layout.size[piece][source]
    low = np.where(number == 0, start, (start // PAGE + border.astype(np.int64)) * PAGE)
    low = np.clip(low, start, start + size)
    high = np.append(low[1:], 0)
    final = number == parts[source] - 1
    high[final] = (start + size)[final]
    kept = high > low
    return source[kept], low[kept], (high - low)[kept]


class Runs:
    """Runs of pages that came or went: the ``piece``, ``offset`` and ``size`` of each, and its piece's ``position``."""

    def __init__(self, layout: Layout, piece: Ints, at: Ints, rows: float, random: np.random.Generator) -> None:
        source, self.offset, self.size = cut(layout, piece, rows, random)
        self.piece, self.position = piece[source], at[source]

    def columns(self) -> tuple[Ints, Ints, Ints]:
        """Return piece, offset and size."""
        return self.piece, self.offset, self.size


def touched(
    layout: Layout, added: tuple[Ints, Ints], use: tuple[Ints, Ints], many: int, random: np.random.Generator
) -> tuple[Ints, Ints, Ints]:
    """Spread ``many`` faults over what was ``added``, or over all that was used where nothing was.

    Args:
        layout: of the model.
        added: pieces and their positions in the access stream; in any order.
        use: the same, in order of position.
        many: how many faults.
        random: where exactly.

    Returns:
        Of each fault its piece, the byte within that, and the position, ascending.
    """
    piece, at = use
    if len(added[0]):
        order = np.argsort(added[1])
        piece, at = added[0][order], added[1][order]
    size = layout.size[piece]
    ends = np.cumsum(size)
    x = (np.arange(many) + random.random(many)) * (int(ends[-1]) / max(many, 1))
    x = np.minimum(x.astype(np.int64), ends[-1] - 1)
    access = np.searchsorted(ends, x, "right")
    within = x - (ends - size)[access]
    return piece[access], within, at[access] + within
