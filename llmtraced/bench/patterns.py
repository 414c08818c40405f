"""Page faults as a server under memory pressure makes them, computed from a model's tensor map: ring records.

Their shape was taken from traces of llama-server with the real Gemma 3 270M at 70 % of its memory (docs/benchmarks.md):
two threads share each tensor and wait for each other before the next; each walks its half, and a fault maps what
follows up to the next 64 KiB border.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.gguf_map import Model, Tensor
from llmtraced.schema import EVENT, PAGE, Kind, Outcome, Phase

__all__ = ["DESCRIPTIONS", "PATTERNS", "faults"]

DESCRIPTIONS: Final = {
    "sequential": "every tensor in file order, in steps of 64 KiB",
    "mixed": "the same, but 20 % of the faults are at the start of a random page of the tensor at hand",
    "random": "any byte of any tensor",
}
PATTERNS: Final = tuple(DESCRIPTIONS)
STRAY: Final = {"sequential": 0.0, "mixed": 0.2, "random": 1.0}

THREADS: Final = 2
COMPUTE_NS: Final = (1_000, 3_000)
"""A thread computes this long between two faults: uniform."""
LATENCY_MEDIAN_NS: Final = 6_000
LATENCY_SIGMA: Final = 1.2
"""Log-normal: 5 % of the faults take less than 0.8 µs, 5 % more than 43 µs."""
MAJOR_SHARE: Final = 0.05
"""The slowest faults are the major ones."""
FAULT_AROUND: Final = 64 << 10
BASE: Final = 0x7F3A_4000_0000
"""Where offset 0 of the file would be mapped."""
BEGIN_NS: Final = 3_600_000_000_000


def _walk(tensors: list[Tensor], thread: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where a thread faults in one pass over the tensors: file offset and index of the tensor of each fault."""
    offsets, owners = [], []
    for number, tensor in enumerate(tensors):
        begin = tensor.offset + tensor.size * thread // THREADS
        end = tensor.offset + tensor.size * (thread + 1) // THREADS
        border = (begin // FAULT_AROUND + 1) * FAULT_AROUND
        offsets.append(np.append(begin, np.arange(border, end, FAULT_AROUND)))
        owners.append(np.full(len(offsets[-1]), number))
    return np.concatenate(offsets), np.concatenate(owners)


def faults(model: Model, n: int, pattern: str, seed: int = 1) -> NDArray[Any]:
    """Return ``n`` FAULT records, dtype schema.EVENT, in the order in which the faults end (not begin).

    Args:
        model: whose first shard is walked, again and again; one pass is one token.
        n: number of records, at least 1.
        pattern: one of :data:`PATTERNS`.
        seed: the same seed gives the same records.
    """
    random = np.random.default_rng(seed)
    tensors = [t for t in model.tensors if not t.shard and t.size]
    starts, sizes = np.array([t.offset for t in tensors]), np.array([t.size for t in tensors])
    ends = np.cumsum(sizes)
    walks = [_walk(tensors, thread) for thread in range(THREADS)]
    passes = -(-n // sum(len(offsets) for offsets, _ in walks))
    parts, durations = [], []
    for thread, (offsets, owners) in enumerate(walks):
        count = len(offsets) * passes
        mine = np.zeros(count, EVENT)
        turn = np.repeat(np.arange(passes), len(offsets))
        offset, owner = np.tile(offsets, passes), np.tile(owners, passes)
        stray = random.random(count) < STRAY[pattern]
        if pattern == "random":
            byte = random.integers(0, ends[-1], count)
            owner_of = np.searchsorted(ends, byte, side="right")
            elsewhere = byte + (starts - ends + sizes)[owner_of]  # from a byte of the tensors to one of the file
        else:
            byte = starts[owner] + random.integers(0, sizes[owner])
            elsewhere = np.maximum(byte - byte % PAGE, starts[owner])
        offset = np.where(stray, elsewhere, offset)
        latency = (LATENCY_MEDIAN_NS * np.exp(LATENCY_SIGMA * random.standard_normal(count))).astype(np.int64) + 500
        ended = np.cumsum(random.integers(*COMPUTE_NS, count) + latency)
        block = turn * len(tensors) + owner
        first = np.flatnonzero(np.diff(block, prepend=-1))
        before = np.concatenate([[0], ended[first[1:] - 1]])
        durations.append(np.diff(before, append=ended[-1]))
        mine["ts"] = ended - before[block]  # from the tensor's begin, for now
        mine["token"] = 1 + turn
        mine["tid"], mine["pid"] = 4_001 + thread, 4_001
        mine["kind"], mine["mark"] = Kind.FAULT, Phase.DECODE
        slow = np.quantile(latency, 1 - MAJOR_SHARE)
        mine["code"] = np.where(latency > slow, Outcome.MAJOR, Outcome.MINOR)
        mine["a"], mine["b"], mine["c"], mine["d"] = BASE + offset, latency, offset, 0
        parts.append((mine, block))
    longest = np.maximum.reduce(durations)  # the threads wait for each other at the end of a tensor
    begin = (BEGIN_NS + np.cumsum(longest) - longest).astype(np.uint64)
    for mine, block in parts:
        mine["ts"] += begin[block]
    together = np.concatenate([mine for mine, _ in parts])
    together = together[np.argsort(together["ts"], kind="stable")][:n]
    together["ts"] -= together["b"]  # a record carries when its fault began
    return together
