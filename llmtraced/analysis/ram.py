"""How much would be read with how much RAM: the weights that tokens use, replayed through caches of every size.

A *unit* is what is used as a whole: a tensor, or an expert's matrices of one layer together. Units have their true
sizes and caches hold bytes, so that nothing is rounded to blocks: a unit's pages are gone through in the same order
each time, so under LRU all of them have the same reuse distance, and they are hit or missed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.replay import previous_access
from llmtraced.analysis.trace import Trace, collect

__all__ = [
    "ACCESSES",
    "LOOKED_UP",
    "POINTS",
    "TOKENS",
    "Uses",
    "belady_bytes",
    "curve",
    "needed_ram",
    "pinned_bytes",
    "uses",
]

Ints: TypeAlias = NDArray[np.int64]

TOKENS: Final = 256
"""Consecutive tokens that are replayed, at most: those in the middle of the trace."""

ACCESSES: Final = 40_000
"""Uses of units that are replayed, about, at most."""

LOOKED_UP: Final = "token_embd.weight"
"""Rows of it are looked up, which is no matrix multiplication, unless it is the output matrix, too."""

POINTS: Final = 32
"""Evenly spaced RAM sizes in the curve, from 0 to all that can be used."""

_EXTENT: Final = pl.Schema(
    {
        "unit": pl.Int64,
        "model": pl.String,
        "shard": pl.Int16,
        "offset_bytes": pl.Int64,
        "size_bytes": pl.Int64,
    }
)
_CHUNK: Final = 256
_WARM: Final = 3  # one token in so many only prepares the caches


@dataclass(frozen=True)
class Uses:
    """The units that consecutive tokens use, in order.

    Attributes:
        source: ``ops``: recorded; ``map``: assumed, each token uses every tensor of a model without experts once.
        tokens: how many tokens.
        rank: int64, of each use the number of its token, from 0.
        units: int64, of each use the number of its unit.
        sizes: int64, bytes of each unit: tensors in file order, then experts by layer, also those that were not chosen.
        extents: where the units lie, in file order: unit, model, shard, offset_bytes, size_bytes.
    """

    source: str
    tokens: int
    rank: Ints
    units: Ints
    sizes: Ints
    extents: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_EXTENT))

    @property
    def warm(self) -> int:
        """How many tokens only prepare the caches."""
        return self.tokens // _WARM

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which uses count."""
        return self.rank >= self.warm

    @property
    def bytes_per_token(self) -> float:
        """What a token uses."""
        return float(self.sizes[self.units[self.counted]].sum() / max(self.tokens - self.warm, 1))


def uses(trace: Trace, tokens: Sequence[int]) -> Uses | None:
    """Return what consecutive ``tokens`` (those of one phase, ascending) use; None: the trace does not tell.

    Weights come from ``ops`` and experts from ``routing``. Look-ups of rows are left out: they need a few pages. So are
    weights that the server does not use from the file.
    """
    tensors = trace.tensors.filter(pl.col("backed").fill_null(True)).sort("model", "shard", "offset_bytes")
    merged = tensors.filter((pl.col("n_experts") > 0) & (pl.col("layer") >= 0))
    plain = tensors.filter((pl.col("n_experts").fill_null(0) == 0) | (pl.col("layer") < 0))
    if not len(tokens) or not tensors.height:
        return None
    seen = collect(_weights(trace, tokens[0], tokens[-1]).select("token").unique())["token"].to_list()
    recorded = sorted(set(tokens) & set(seen))
    if merged.height and not (recorded and trace.rows["routing"]):
        return None
    if not recorded:
        return _assumed(plain)
    first, last = _window(trace, recorded)
    kept = [token for token in recorded if first <= token <= last]
    units = pl.concat([plain.select(*_UNIT, layer=None, expert=None), _experts(merged)], how="vertical_relaxed")
    units = units.with_row_index("unit")
    both = (
        pl.concat([_used(trace, first, last, units), _chosen(trace, first, last, units)])
        .filter(pl.col("token").is_in(kept))
        .sort("token", "timestamp", "unit")
        .unique(["token", "unit"], keep="first", maintain_order=True)  # its pages are there for the second use
    )
    ever = units["expert"].is_not_null().to_numpy().copy()
    ever[both["unit"].to_numpy()] = True
    number = np.cumsum(ever) - 1
    rank = np.searchsorted(kept, both["token"].to_numpy())
    sizes = units["size_bytes"].to_numpy()[ever].astype(np.int64)
    extents = _extents(units, plain, merged).filter(pl.lit(pl.Series(ever)).gather(pl.col("unit")))
    extents = extents.with_columns(unit=pl.Series(number[extents["unit"].to_numpy()]))
    return Uses("ops", len(kept), rank, number[both["unit"].to_numpy()], sizes, extents)


def curve(used: Uses, more: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return what is read per token with so much RAM for the model's pages.

    At :data:`POINTS`, at ``more``, and just below what lets LRU hit anything, and everything.
    Each: ``ram_bytes``, ``lru_bytes_per_token`` (what the kernel comes near to), ``pinned_bytes_per_token`` (what the
    first tokens used most is kept, the rest passes by), ``belady_bytes_per_token`` (no policy reads less).
    """
    total, counted = int(used.sizes.sum()), max(used.tokens - used.warm, 1)
    need, sizes = needed_ram(used), used.sizes[used.units[used.counted]]
    edges = [int(end) - 1 for end in (need.min(initial=total), need.max(initial=1))]  # just before LRU hits some, all
    even = np.linspace(0, total, POINTS, dtype=np.int64).tolist()
    rams = sorted({*even, *(int(ram) for ram in (*edges, *more) if 0 <= ram < total)})
    order = np.argsort(need)
    hit = np.concatenate([[0], np.cumsum(sizes[order])])
    lru = sizes.sum() - hit[np.searchsorted(need[order], rams, "right")]
    return [
        {
            "ram_bytes": ram,
            "lru_bytes_per_token": round(int(read) / counted),
            "pinned_bytes_per_token": round(pinned_bytes(used, ram) / counted),
            "belady_bytes_per_token": round(belady_bytes(used, ram) / counted),
        }
        for ram, read in zip(rams, lru, strict=True)
    ]


def needed_ram(used: Uses) -> Ints:
    """Return of each use that counts the RAM from which on LRU hits it: its reuse distance and itself, in bytes.

    Before the first token all units were read once, in the order of their numbers, as when a model is loaded. This is
    :func:`llmtraced.analysis.replay.stack_distances` with sizes: what lies in between is summed up, not counted.
    """
    units, sizes = used.units, used.sizes
    before = previous_access(units)
    needed = np.empty(len(units), np.int64)
    stack = np.arange(len(sizes))[::-1]  # the last used first
    touched = np.zeros(len(sizes), np.bool_)
    earlier = np.tri(_CHUNK, k=-1, dtype=np.bool_)
    for start in range(0, len(units), _CHUNK):
        chunk = units[start : start + _CHUNK]
        n, size = len(chunk), sizes[chunk]
        depth = np.empty(len(sizes), np.int64)
        depth[stack] = np.arange(len(sizes))
        at = np.where(before[start : start + n] >= start, before[start : start + n] - start, -1 - depth[chunk])
        less = (at[None, :] < at[:, None]) & earlier[:n, :n]
        # up to and with the last use, from the chunk's start; negative: of what lies above it in the stack
        upto = np.cumsum(size)[np.maximum(at, 0)]
        above = np.concatenate([[0], np.cumsum(sizes[stack])])[np.maximum(-1 - at, 0)]
        needed[start : start + n] = less @ size - np.where(at >= 0, upto, -above) + size
        last = chunk[::-1][np.sort(np.unique(chunk[::-1], return_index=True)[1])]
        touched[last] = True
        stack = np.concatenate([last, stack[~touched[stack]]])
        touched[last] = False
    return needed[used.counted]


def pinned_bytes(used: Uses, ram: int) -> int:
    """Return the bytes read by the uses that count if ``ram`` bytes are pinned: what the uses before them used most.

    The rest needs no room here: it passes through some pages.
    """
    learned = used.units[~used.counted] if used.warm else used.units
    ranking = np.argsort(-np.bincount(learned, minlength=len(used.sizes)), kind="stable")
    room = ram - (np.cumsum(used.sizes[ranking]) - used.sizes[ranking])
    missing = np.empty_like(used.sizes)
    missing[ranking] = used.sizes[ranking] - np.clip(room, 0, used.sizes[ranking])
    return int(missing[used.units[used.counted]].sum())


def belady_bytes(used: Uses, ram: int) -> int:
    """Return the bytes read by the uses that count if what is needed last is evicted first, page by page.

    It begins with what is best to have, so that no policy reads less, however it begins.
    """
    units = used.units[used.counted]
    before = previous_access(units)
    never = len(units)
    following = np.full(len(units), never)
    following[before[before >= 0]] = np.flatnonzero(before >= 0)
    first = np.full(len(used.sizes), never)
    first[units[::-1]] = np.arange(len(units))[::-1]
    sizes, upcoming = used.sizes.tolist(), first.tolist()
    order = np.argsort(first, kind="stable")
    room = ram - (np.cumsum(used.sizes[order]) - used.sizes[order])
    begin = np.zeros_like(used.sizes)
    begin[order] = np.clip(room, 0, used.sizes[order])
    resident = begin.tolist()
    held = sum(resident)
    furthest = [(-use, unit) for unit, use in enumerate(upcoming) if resident[unit]]  # stale ones are in the past
    heapify(furthest)
    read = 0
    for unit, use in zip(units.tolist(), following.tolist(), strict=True):
        missing = sizes[unit] - resident[unit]
        read, held = read + missing, held + missing
        resident[unit], upcoming[unit] = sizes[unit], use
        heappush(furthest, (-use, unit))
        while held > ram:
            when, victim = heappop(furthest)
            if -when != upcoming[victim]:
                continue
            out = min(resident[victim], held - ram)
            resident[victim], held = resident[victim] - out, held - out
            if resident[victim]:
                heappush(furthest, (when, victim))
    return read


_UNIT: Final = ("model", "tensor_name", "size_bytes")


def _weights(trace: Trace, first: int, last: int) -> pl.LazyFrame:
    return trace.table("ops").filter(
        pl.col("token").is_between(first, last), pl.col("tensor_name").is_not_null(), pl.col("op") != "get_rows"
    )


def _window(trace: Trace, tokens: Sequence[int]) -> tuple[int, int]:
    """Return the first and last of the consecutive tokens that are replayed, in the middle of ``tokens``."""
    middle = tokens[len(tokens) // 2]
    at = pl.col("token") == middle
    each = collect(_weights(trace, middle, middle).select(pl.len())).item()
    each += collect(trace.table("routing").filter(at).select(pl.col("experts").list.len().sum())).item() or 0
    count = min(len(tokens), TOKENS, max(ACCESSES // max(each, 1), 2))
    start = (len(tokens) - count) // 2
    return tokens[start], tokens[start + count - 1]


def _assumed(plain: pl.DataFrame) -> Uses:
    """Return two tokens that use each tensor once, the input embeddings aside where there is another output matrix."""
    names = plain["tensor_name"].to_list()
    looked_up = (pl.col("tensor_name") == LOOKED_UP) & ("output.weight" in names)
    some = plain.filter(~looked_up).with_row_index("unit")
    sizes = some["size_bytes"].to_numpy().astype(np.int64)
    n = len(sizes)
    extents = some.select(*_EXTENT).cast(_EXTENT)
    return Uses("map", 2, np.repeat(np.arange(2), n), np.tile(np.arange(n), 2), sizes, extents)


def _experts(merged: pl.DataFrame) -> pl.DataFrame:
    """Return one row a layer and expert, of the largest model that has experts: routing does not say whose it is."""
    owners = merged.group_by("model").agg(pl.col("size_bytes").sum()).sort("size_bytes", "model", descending=True)
    return (
        merged.filter(pl.col("model").is_in(owners["model"].head(1).to_list()))
        .select("model", "layer", "expert_bytes", expert=pl.int_ranges("n_experts", dtype=pl.Int32))
        .explode("expert")
        .group_by("model", "layer", "expert")
        .agg(tensor_name=pl.lit(None, pl.String), size_bytes=pl.col("expert_bytes").sum())
        .sort("layer", "expert")
        .select(*_UNIT, "layer", "expert")
    )


def _extents(units: pl.DataFrame, plain: pl.DataFrame, merged: pl.DataFrame) -> pl.DataFrame:
    """Return where the units lie: a tensor in one place, an expert in one of each merged tensor of its layer."""
    whole = units.filter(pl.col("expert").is_null()).join(
        plain.select("model", "tensor_name", "shard", "offset_bytes"), on=["model", "tensor_name"], nulls_equal=True
    )
    parts = units.filter(pl.col("expert").is_not_null()).select("unit", "model", "layer", "expert")
    slices = parts.join(merged.select("model", "layer", "shard", "offset_bytes", "expert_bytes"), on=["model", "layer"])
    begin = pl.col("offset_bytes") + pl.col("expert").cast(pl.Int64) * pl.col("expert_bytes")
    slices = slices.with_columns(offset_bytes=begin, size_bytes=pl.col("expert_bytes"))
    both = pl.concat([whole.select(*_EXTENT), slices.select(*_EXTENT)], how="vertical_relaxed")
    return both.cast(_EXTENT).sort("model", "shard", "offset_bytes")


def _used(trace: Trace, first: int, last: int, units: pl.DataFrame) -> pl.DataFrame:
    rows = collect(_weights(trace, first, last).select("token", "timestamp", "model", "tensor_name"))
    named = rows.with_columns(pl.col("model", "tensor_name").cast(pl.String))
    plain = units.filter(pl.col("expert").is_null())
    return named.join(plain, on=["model", "tensor_name"], nulls_equal=True).select("token", "timestamp", "unit")


def _chosen(trace: Trace, first: int, last: int, units: pl.DataFrame) -> pl.DataFrame:
    rows = collect(
        trace.table("routing")
        .filter(pl.col("token").is_between(first, last))
        .select("token", "timestamp", "layer", expert="experts")
        .explode("expert")
    )
    return rows.join(units, on=["layer", "expert"]).select("token", "timestamp", "unit")
