"""The figures that advice stands on, each table read once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.ram import LOOKED_UP, Uses, curve, needed_ram, uses
from llmtraced.analysis.trace import Trace, collect
from llmtraced.schema import PAGE

__all__ = ["GAP_NS", "Facts", "facts"]

GAP_NS: Final = 1_000_000_000
"""A pause between two tokens from which on the server counts as having been idle."""

_ROWS: Final = 200_000
_ROUNDS: Final = 4  # times the model's size


@dataclass(frozen=True)
class Facts:
    """What was found.

    Attributes:
        trace: where.
        phase: the phase that is judged: the one asked for, else decode, else unknown if graphs were not understood.
        tokens: its tokens that ended: token, n_tokens, duration_ns, stall_ns (null: not known), bytes_read,
            major_faults.
        after_gap: ``bytes_read`` of tokens of the phase by whether they began after a pause of :data:`GAP_NS`: bool,
            tokens, mean.
        moved: bytes ``added``, ``evicted``, and ``evicted_loading``: before the first graph.
        others: what other processes moved: added, comm, idle (after a graph ended, before the next), bytes.
        peak_resident_bytes: most bytes of the model in the page cache at once, a lower bound; None: cannot be told.
        loaded: what came in before the first graph: model, tensor_name, expert, bytes.
        unused: of that, what no graph used: the same columns; None: cannot be told.
        uses: which weights consecutive tokens use; None: cannot be told.
        curve: bytes read per token by RAM, see :func:`llmtraced.analysis.ram.curve`.
        needed_ram: bytes from which on LRU reads nothing; None as ``uses``.
    """

    trace: Trace
    phase: str | None
    tokens: pl.DataFrame
    after_gap: dict[bool, tuple[int, float]]
    moved: dict[str, int]
    others: pl.DataFrame
    peak_resident_bytes: int | None
    loaded: pl.DataFrame
    unused: pl.DataFrame | None
    uses: Uses | None
    curve: list[dict[str, Any]]
    needed_ram: int | None

    @property
    def limit(self) -> int | None:
        """The server's memory limit, bytes."""
        limit = self.trace.meta.get("cgroup_limit_bytes")
        return None if limit is None else int(limit)

    @property
    def read_per_token(self) -> float | None:
        """Bytes read per token in the second half of the tokens, when the caches are warm; None: no token."""
        late = self.tokens["bytes_read"].tail(max(self.tokens.height // 2, 1))
        return float(late.sum()) / len(late) if len(late) else None

    @property
    def used_per_token(self) -> float | None:
        """Bytes of weights used per token."""
        return None if self.uses is None else self.uses.bytes_per_token

    @property
    def stall_share(self) -> float | None:
        """Of the time inside the tokens whose stall is known."""
        known = self.tokens.drop_nulls("stall_ns")
        duration = int(known["duration_ns"].sum())
        return int(known["stall_ns"].sum()) / duration if duration else None

    def size(self, backed: bool | None) -> int:
        """Return the bytes of the tensors that are so ``backed``."""
        return int(self.trace.tensors.filter(pl.col("backed").eq_missing(backed))["size_bytes"].sum())

    @property
    def file_bytes(self) -> int:
        """The bytes of the tensors that the server uses from the file, as far as is known."""
        return self.size(True) + self.size(None)


def _of_the_largest(trace: Trace) -> pl.Expr:
    """Return what selects the graphs of the largest model: a draft model's are not what anybody waits for."""
    sizes = trace.tensors.group_by("model").agg(pl.col("size_bytes").sum()).sort("size_bytes", "model")
    if sizes.height < 2:
        return pl.lit(True)
    model = pl.col("model").cast(pl.String)
    chosen: pl.Expr = model.is_null() | (model == sizes["model"][-1])
    return chosen


def facts(trace: Trace, phase: str | None = None) -> Facts:
    """Read the trace; ``phase`` is judged, the page cache is looked at as a whole."""
    marks = collect(trace.table("tokens").filter(pl.col("token") > 0).with_columns(pl.col("phase").cast(pl.String)))
    marks = marks.sort("token")
    phases = set(marks["phase"])
    judged = phase or next((name for name in ("decode", "unknown") if name in phases), None)
    read, moved, peak = _pagecache(trace, int(marks["token"].max() or 0))  # type: ignore[arg-type]
    known = pl.Series(read[marks["token"].to_numpy()]) if trace.rows["pagecache"] else marks["bytes_read"].fill_null(0)
    marks = marks.with_columns(
        bytes_read=known,
        duration_ns=pl.col("end_ns") - pl.col("start_ns"),
        late=(pl.col("start_ns") - pl.col("end_ns").shift(1) >= GAP_NS).fill_null(False),
    )
    tokens = marks.filter(pl.col("phase").is_in([judged] if judged else []), _of_the_largest(trace))
    ended = tokens.drop_nulls("duration_ns")
    used = uses(trace, tokens["token"].to_list())
    loaded = collect(
        trace.table("pagecache")
        .filter(pl.col("token") == 0, pl.col("phase") == "load", pl.col("action") == "add")
        .group_by("model", "tensor_name", "expert")
        .agg(pl.col("bytes").sum())
        .with_columns(pl.col("model", "tensor_name").cast(pl.String))
    )
    rams = [ram for ram in (trace.meta.get("cgroup_limit_bytes"), peak) if ram is not None]
    needed = needed_ram(used) if used else None
    return Facts(
        trace=trace,
        phase=judged,
        tokens=ended.select("token", "n_tokens", "duration_ns", "stall_ns", "bytes_read", "major_faults"),
        after_gap={
            late: (rows.height, float(rows["bytes_read"].sum()) / rows.height)
            for late in (False, True)
            if (rows := ended.filter(pl.col("late") == late)).height
        },
        moved=moved,
        others=_others(trace, marks),
        peak_resident_bytes=peak,
        loaded=loaded,
        unused=_unused(trace, loaded) if trace.rows["ops"] and loaded.height else None,
        uses=used,
        curve=curve(used, rams) if used else [],
        needed_ram=None if needed is None else int(needed.max(initial=0)),
    )


def _pagecache(trace: Trace, last: int) -> tuple[np.ndarray[Any, Any], dict[str, int], int | None]:
    """Return the bytes added by token (the last element: of tokens without a row), sums, and the peak in the cache."""
    by_token = collect(trace.table("pagecache").group_by("token", "action").agg(pl.col("bytes").sum()))
    sums = np.zeros((2, last + 2), np.int64)
    for row, action in enumerate(("add", "evict")):
        some = by_token.filter(pl.col("action") == action)
        np.add.at(sums[row], np.minimum(some["token"].to_numpy(), last + 1), some["bytes"].to_numpy())
    lost = trace.account.get("pagecache", {})
    whole = trace.rows["pagecache"] and not lost.get("dropped") and not lost.get("missed")
    resident = np.cumsum(sums[0] - sums[1])
    peak = int(resident.max(initial=0)) + max(-int(resident.min(initial=0)), _before(trace)) if whole else None
    totals = {
        "added": int(sums[0].sum()),
        "evicted": int(sums[1].sum()),
        "evicted_loading": int(sums[1, 0]),
    }
    return sums[0], totals, peak


def _before(trace: Trace) -> int:
    """Return the bytes that went out and had not been seen to come in: they were in the cache at the beginning.

    Looked at until each page can have been moved a few times; what never moves is not seen.
    """
    left = _ROUNDS * int(trace.tensors["size_bytes"].sum())
    first: dict[Any, np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(0, np.int8))  # 1: it came, 2: it went
    for piece in trace.slices("pagecache", rows=_ROWS):
        rows = collect(piece.select("model", "shard", "offset_bytes", "bytes", went=pl.col("action") == "evict"))
        rows = rows.filter((pl.col("bytes") > 0) & (pl.col("bytes").cum_sum().shift(1, fill_value=0) < left))
        for file, some in rows.partition_by("model", "shard", as_dict=True).items():
            begin = some["offset_bytes"].to_numpy() // PAGE
            count = (some["offset_bytes"].to_numpy() + some["bytes"].to_numpy() - 1) // PAGE - begin + 1
            page = np.arange(int(count.sum())) + np.repeat(begin - (np.cumsum(count) - count), count)
            known = np.concatenate([first[file], np.zeros(max(int(page.max()) + 1 - len(first[file]), 0), np.int8)])
            new = np.flatnonzero(known[page] == 0)[::-1]
            known[page[new]] = np.repeat(1 + some["went"].to_numpy().astype(np.int8), count)[new]  # the first one stays
            first[file] = known
        left -= int(rows["bytes"].sum())
        if left <= 0:
            break
    return sum(int(np.count_nonzero(known == 2)) for known in first.values()) * PAGE


def _others(trace: Trace, marks: pl.DataFrame) -> pl.DataFrame:
    """Return what other processes moved: added, comm, idle, bytes."""
    ends = marks.select("token", "end_ns").lazy()
    rows = (
        trace.table("pagecache")
        .filter(pl.col("pid") != int(trace.meta.get("pid") or 0))
        .join(ends, on="token", how="left")
        .group_by(
            "comm",
            added=pl.col("action") == "add",
            idle=((pl.col("timestamp") > pl.col("end_ns")) & (pl.col("token") > 0)).fill_null(False),
        )
        .agg(pl.col("bytes").sum())
    )
    return collect(rows).with_columns(pl.col("comm").cast(pl.String).fill_null("?"))


def _unused(trace: Trace, loaded: pl.DataFrame) -> pl.DataFrame:
    """Return what was loaded of tensors that were in no graph, and of experts that were never chosen.

    A tensor was in a graph if the map says where its data is, an operator used it, or it was faulted for a graph. What
    operators of the recorded detail do not show (norms, look-ups) is not taken to be unused.
    """
    owner = ["model", "tensor_name"]
    known = trace.tensors.select(*owner, "layer", "n_experts", "backed")
    rows = loaded.join(known, on=owner).filter(pl.col("tensor_name") != LOOKED_UP)
    never = rows.filter(pl.col("backed").is_null())
    for table in ("ops", "faults") if never.height else ():
        named = pl.col("tensor_name").cast(pl.String).is_in(never["tensor_name"].to_list())
        after = trace.table(table).filter(pl.col("token") > 0).select(owner).unique().filter(named)
        never = never.join(collect(after).with_columns(pl.col(owner).cast(pl.String)), on=owner, how="anti")
    if trace.rows["routing"]:
        routing = trace.table("routing").select("layer", expert="experts")
        chosen = collect(routing.explode("expert").unique())
        idle = rows.filter(pl.col("backed"), pl.col("n_experts") > 0, pl.col("expert") >= 0)
        never = pl.concat([never, idle.join(chosen, on=["layer", "expert"], how="anti")])
    return never.select(loaded.columns)
