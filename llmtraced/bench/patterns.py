"""Page faults as a server under memory pressure makes them, computed from a model's tensor map: ring records, no kernel.

The shape was taken from traces of llama-server with the real Gemma 3 270M at 70 % of its memory (docs/benchmarks.md):
two threads share each tensor, each walks its half, and a fault maps what follows up to the next 64 KiB border.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.gguf_map import Model
from llmtraced.schema import EVENT, PAGE, Kind, Outcome, Phase

__all__ = ["PATTERNS", "faults"]

PATTERNS: Final = {"sequential": (0.0, 1), "mixed": (0.2, PAGE), "random": (1.0, 1)}
"""Name → the share of faults that stray, and what the offset of those is a multiple of, bytes.

The others walk the tensors in file order. A stray fault is anywhere in the tensors, each byte as likely as the next;
one that is page-aligned stands for a page that was evicted alone and met at its first byte.
"""

THREADS: Final = 2
COMPUTE_NS: Final = (1_000, 3_000)
"""A thread computes this long between two faults: uniform."""
LATENCY_MEDIAN_NS: Final = 6_000
LATENCY_SIGMA: Final = 1.2
"""Log-normal: 5 % are below 0.8 µs, 5 % above 43 µs."""
MAJOR_SHARE: Final = 0.05
"""The slowest faults are the major ones."""
FAULT_AROUND: Final = 64 << 10
BASE: Final = 0x7F3A_4000_0000
"""Where offset 0 of the file would be mapped."""


def walk(model: Model) -> list[NDArray[np.int64]]:
    """Return for each thread the file offsets at which it faults in one pass over the tensors of shard 0."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(THREADS)]
    for tensor in model.tensors:
        if tensor.shard or not tensor.size:
            continue
        for thread, mine in enumerate(parts):
            begin = tensor.offset + tensor.size * thread // THREADS
            end = tensor.offset + tensor.size * (thread + 1) // THREADS
            border = -(-(begin + 1) // FAULT_AROUND) * FAULT_AROUND
            mine.append(np.append(begin, np.arange(border, end, FAULT_AROUND)))
    return [np.concatenate(mine) for mine in parts]


def faults(model: Model, n: int, pattern: str, seed: int = 1) -> NDArray[Any]:
    """Return ``n`` FAULT records, dtype schema.EVENT, in the order in which they are completed (not begun).

    Args:
        model: whose first shard is walked, again and again; one pass is one token.
        n: number of records, at least 1.
        pattern: a key of :data:`PATTERNS`.
        seed: the same seed gives the same records.
    """
    random = np.random.default_rng(seed)
    tensors = [t for t in model.tensors if not t.shard and t.size]
    starts, sizes = np.array([t.offset for t in tensors]), np.array([t.size for t in tensors])
    ends = np.cumsum(sizes)
    records = []
    for thread, once in enumerate(walk(model)):
        mine = np.zeros(-(-n // THREADS), EVENT)
        step = np.arange(len(mine))
        offset = once[step % len(once)]
        share, multiple = PATTERNS[pattern]
        stray = random.random(len(mine)) < share
        byte = random.integers(0, ends[-1], len(mine))
        tensor = np.searchsorted(ends, byte, side="right")
        byte += (starts - ends + sizes)[tensor]  # from the tensors' bytes to the file's
        offset = np.where(stray, np.maximum(byte - byte % multiple, starts[0]), offset)
        latency = (LATENCY_MEDIAN_NS * np.exp(LATENCY_SIGMA * random.standard_normal(len(mine)))).astype(np.int64) + 500
        compute = random.integers(*COMPUTE_NS, len(mine))
        mine["ts"] = 3_600_000_000_000 + np.cumsum(compute + latency) - latency
        mine["token"] = 1 + step // len(once)
        mine["tid"], mine["pid"] = 4_001 + thread, 4_001
        mine["kind"], mine["mark"] = Kind.FAULT, Phase.DECODE
        slow = np.quantile(latency, 1 - MAJOR_SHARE)
        mine["code"] = np.where(latency > slow, Outcome.MAJOR, Outcome.MINOR)
        mine["a"], mine["b"], mine["c"], mine["d"] = BASE + offset, latency, offset, 0
        records.append(mine)
    together = np.concatenate(records)
    return together[np.argsort(together["ts"] + together["b"], kind="stable")][:n]
