"""What the page cache did with the model: what came in and why, what of it was of use, what stayed, what went.

See docs/reports/cache.md for what can be known of a page's use, and what cannot.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.pages import Ints, Pages, Steps
from llmtraced.analysis.touches import Evidence
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.schema import CAUSES, PHASES

__all__ = ["FATES", "TIME_BINS", "cache"]

FATES: Final = ("used", "wasted", "unknown", "pending")
"""What became of the bytes that came in: ``used`` (mapped by a fault while they were in the cache, or read by an
operator), ``wasted`` (evicted without), ``unknown`` (what happened to them cannot be seen), ``pending`` (still in the
cache when the trace ends, and not used yet)."""

TIME_BINS: Final = 200
"""Pieces that the time is cut into: bounds the size of the report."""

_USED, _WASTED, _UNKNOWN, _PENDING = range(len(FATES))
_MAPPED: Final = np.array([cause in ("fault", "readahead", "prefetcher") for cause in CAUSES])
_SUMS: Final = ("added_bytes", *(f"{fate}_bytes" for fate in FATES), "evicted_bytes")


def cache(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return what the page cache did; with ``phase``, with what came in (and what went out) during it.

    A page that came in during the phase is followed to the end of the trace, whatever the phase by then. What is in
    the cache is told of the time from the phase's first row to its last.
    """
    span = _span(trace, phase)
    pages = Pages(trace, phase)
    tally = _Tally(trace, pages, span)
    for steps in pages.steps(blocks=True):
        tally.take(steps)
    tally.finish(pages.resident())
    moved = collect(
        trace.table("pagecache", phase)
        .group_by("action", "cause", "comm", "phase")
        .agg(pl.col("bytes").sum())
        .with_columns(pl.col("action", "cause", "comm", "phase").cast(pl.String))
    )
    tensors = tally.tensors()
    resident = tally.resident.sum(0)
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "model_bytes": sum(int(model.get("size_bytes") or 0) for model in trace.meta["models"]),
        "cgroup_limit_bytes": trace.meta.get("cgroup_limit_bytes"),
        **{key: sum(int(row[key]) for row in tensors) for key in _SUMS},
        "wasted_share": _share(tally.fates.sum((0, 1))),
        "resident_before_bytes": int(tally.before.sum()),
        "resident_bytes": int(resident[-1]),
        "peak_resident_bytes": int(resident.max()),
        "mean_resident_bytes": round(float(tally.mean().sum())),
        "out_of_order_bytes": tally.astray,
        "causes": tally.causes(),
        "processes": _moved(moved, "comm"),
        "phases": sorted(_moved(moved, "phase"), key=lambda row: PHASES.index(row["phase"])),
        "bins": tally.bins(),
        "tensors": [row for row in tensors if row["tensor_name"] is not None],
        "other": [row for row in tensors if row["tensor_name"] is None],
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": [*trace.notes, *_doubts(trace)],
    }


class _Tally:
    """The sums that grow while the pages are followed."""

    def __init__(self, trace: Trace, pages: Pages, span: tuple[int, int]) -> None:
        self._trace, self._pages = trace, pages
        self._evidence = Evidence(trace, pages)
        self._seen = trace.rows["faults"] > 0
        self._start, self._end = span[0] - pages.start_ns, span[1] - pages.start_ns
        self._width = -(-(self._end - self._start + 1) // TIME_BINS)
        self._count = count = -(-(self._end - self._start + 1) // self._width)
        tensors = max(pages.tensors.height, 1)
        self.fates = np.zeros((tensors, len(CAUSES), len(FATES)), np.int64)
        self.moves = np.zeros((len(CAUSES) + 1, count), np.int64)  # in by cause, then out
        self.resident = np.zeros((tensors, count), np.int64)  # at the end of each bin, once finished
        self._area = np.zeros(tensors)  # byte x ns
        self.before = np.zeros(tensors, np.int64)
        self.evicted = np.zeros(tensors, np.int64)
        self.astray = 0

    def take(self, steps: Steps) -> None:
        """Take in some steps, in order of time."""
        now, nbytes, added = steps.now, steps.nbytes, steps.now.added
        known, came = steps.past.known, steps.past.known & steps.past.added
        counted = np.where(now.counted, nbytes, 0)
        here = (np.clip(now.time, self._start, self._end) - self._start) // self._width
        _add(self.evicted, steps.tensor, np.where(added, 0, counted))
        _add(self.moves, np.where(added, now.cause, len(CAUSES)) * self._count + here, counted)

        change = np.where(added, np.where(came, 0, nbytes), np.where(known & ~came, 0, -nbytes))
        change[now.time > self._end] = 0
        _add(self.resident, steps.tensor * self._count + here, change)
        left = (self._end - np.clip(now.time, self._start, self._end)).astype(float)
        self._area += np.bincount(steps.tensor, change * left, self._area.size)

        early = np.flatnonzero(~added & ~known)  # goes, and was not seen to come
        _add(self.before, steps.tensor[early], nbytes[early])
        self.astray += int(nbytes[known & (added == came)].sum())
        lost = steps.only(added & came)  # its eviction was not seen, or not in order
        self._decide(lost, np.full(lost.nbytes.size, _UNKNOWN))
        self._decide(*self._judged(steps.only(~added & came), _WASTED))

    def finish(self, still: Steps) -> None:
        """Take in what is in the cache at the end."""
        self._decide(*self._judged(still, _PENDING))
        self.resident[:, 0] += self.before
        self.resident = self.resident.cumsum(1)

    def mean(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the mean over time of the bytes of each tensor in the cache."""
        return self.before + self._area / max(self._end - self._start, 1)

    def causes(self) -> list[dict[str, Any]]:
        """Return what came in, and what became of it, by cause; most first."""
        rows = [
            {"cause": cause, "added_bytes": int(one.sum()), **_fates(one), "wasted_share": _share(one)}
            for cause, one in zip(CAUSES, self.fates.sum(0), strict=True)
        ]
        return sorted((row for row in rows if row["added_bytes"]), key=lambda row: -int(str(row["added_bytes"])))

    def bins(self) -> dict[str, list[int]]:
        """Return the columns over time; a bin ends where the next one starts."""
        starts = range(self.moves.shape[1])
        names = (*(f"{cause}_bytes" for cause in CAUSES), "evicted_bytes")
        return {
            "start_ns": [self._pages.start_ns + self._start + i * self._width for i in starts],
            **{name: column.tolist() for name, column in zip(names, self.moves, strict=True)},
            "resident_bytes": self.resident.sum(0).tolist(),
        }

    def tensors(self) -> list[dict[str, Any]]:
        """Return one row a tensor of the map or with page-cache rows, in the order of the map."""
        fates, mean = self.fates.sum(1), self.mean()
        known = self._trace.tensors.select("model", "tensor_name", "layer", "component", "size_bytes", "backed")
        found = known.with_row_index("order").join(
            self._pages.tensors.with_row_index("row"),
            on=["model", "tensor_name"],
            how="full",
            coalesce=True,
            nulls_equal=True,
        )
        rows = []
        for row in found.sort("order", nulls_last=True).drop("order").iter_rows(named=True):
            at, size = row.pop("row"), row["size_bytes"]
            one = np.zeros(len(FATES), np.int64) if at is None else fates[at]
            resident = np.zeros(self.resident.shape[1]) if at is None else self.resident[at]
            rows.append(
                row
                | {"added_bytes": int(one.sum()), **_fates(one), "wasted_share": _share(one)}
                | {
                    "evicted_bytes": 0 if at is None else int(self.evicted[at]),
                    "resident_before_bytes": 0 if at is None else int(self.before[at]),
                    "resident_bytes": int(resident[-1]),
                    "mean_resident_share": (0.0 if at is None else float(mean[at]) / size) if size else None,
                    "resident_share": (resident / size).round(4).tolist() if size else None,
                }
            )
        return rows

    def _judged(self, steps: Steps, unused: int) -> tuple[Steps, Ints]:
        """Return the steps and the fate of their pages, which came in when they did before and leave now."""
        used, may = self._evidence.weigh(steps)
        came = steps.past
        hidden = may | came.loading | ~_MAPPED[came.cause] | (not self._seen)
        return steps, np.where(used, _USED, np.where(hidden & (unused == _WASTED), _UNKNOWN, unused))

    def _decide(self, steps: Steps, fate: Ints) -> None:
        came = steps.past
        at = (steps.tensor * len(CAUSES) + came.cause) * len(FATES) + fate
        _add(self.fates, at, np.where(came.counted, steps.nbytes, 0))


def _add(to: Ints, at: Ints, nbytes: Ints) -> None:
    """Add to places of the array, counted through; ``np.add.at`` is fast in one dimension only."""
    np.add.at(to.reshape(-1), at, nbytes)


def _fates(of: Ints) -> dict[str, int]:
    return {f"{fate}_bytes": int(nbytes) for fate, nbytes in zip(FATES, of, strict=True)}


def _share(of: Ints) -> float | None:
    """Return the share that was wasted, of all that is not pending: a lower bound; None: there is nothing else."""
    over = int(of.sum() - of[_PENDING])
    return int(of[_WASTED]) / over if over else None


def _span(trace: Trace, phase: str | None) -> tuple[int, int]:
    """Return the first and last time, CLOCK_MONOTONIC ns, of the trace or of a phase's page-cache rows."""
    first, last = trace.first_ns, trace.last_ns
    if phase is not None:
        time = pl.col("timestamp")
        first, last = collect(trace.table("pagecache", phase).select(a=time.min(), b=time.max())).row(0)
    return first or 0, last or first or 0


def _moved(moved: pl.DataFrame, key: str) -> list[dict[str, Any]]:
    """Return bytes in by cause, and bytes out, for each value of ``key``; most bytes in first."""
    nbytes, added = pl.col("bytes"), pl.col("action") == "add"
    return (
        moved.group_by(pl.col(key).fill_null("?"))
        .agg(
            added_bytes=nbytes.filter(added).sum(),
            **{f"{cause}_bytes": nbytes.filter(added & (pl.col("cause") == cause)).sum() for cause in CAUSES},
            evicted_bytes=nbytes.filter(~added).sum(),
        )
        .sort("added_bytes", "evicted_bytes", key, descending=[True, True, False])
        .to_dicts()
    )


def _doubts(trace: Trace) -> list[str]:
    if not trace.rows["pagecache"]:
        return []
    if not trace.rows["faults"]:
        return ["no page faults were recorded, so whether what came in was used cannot be told"]
    faults = trace.account.get("faults", {})
    if faults.get("dropped") or faults.get("missed"):
        return ["page faults were dropped: the wasted bytes are an upper bound"]
    return []
