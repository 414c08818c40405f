"""What the page cache did with the model: what came in and why, what of it was of use, what stayed, what went.

See docs/reports/cache.md for what can be known of a page's use, and what cannot.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Ints, ahead
from llmtraced.analysis.pages import Marks, Pages, Rows, Steps
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
    for seen, steps in ahead(pages.steps(tally.look)):
        tally.add(seen)
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
        self._area = np.zeros((2, tensors), np.int64)  # bytes x ns: in 2^16 ns, and what is below that
        self.before = np.zeros(tensors, np.int64)
        self.evicted = np.zeros(tensors, np.int64)
        self.astray = 0

    def look(self, rows: Rows) -> tuple[Ints, Ints, Ints, Ints]:
        """Sum up rows as if each changed something; may run in several threads."""
        nbytes, mark = rows.end - rows.begin, Marks(rows.mark)
        added, counted = mark.added, np.where(mark.counted, nbytes, 0)
        evicted, moves = np.zeros_like(self.evicted), np.zeros_like(self.moves)
        gone = np.flatnonzero(~added)
        _add(evicted, rows.tensor[gone], counted[gone])
        here = self._bin(mark.time)
        _add(moves, np.where(added, mark.cause, len(CAUSES)) * self._count + here, counted)
        return evicted, moves, *self._changes(rows.tensor, np.where(added, nbytes, -nbytes), mark.time)

    def add(self, seen: tuple[Ints, Ints, Ints, Ints]) -> None:
        """Take in what :meth:`look` found."""
        for to, more in zip((self.evicted, self.moves, self.resident, self._area), seen, strict=True):
            to += more

    def take(self, steps: Steps) -> None:
        """Take in some steps, in order of time from call to call."""
        now, past = steps.now.packed, steps.past.packed
        added, came, known = now & 1 == 1, (past >= 0) & (past & 1 == 1), past >= 0
        astray = steps.only(np.flatnonzero(known & (added == came)))
        if astray.row.size:
            nbytes = astray.nbytes
            self.astray += int(nbytes.sum())
            back = np.where(astray.now.added, -nbytes, nbytes)  # nothing changed
            for to, more in zip(
                (self.resident, self._area), self._changes(astray.tensor, back, astray.now.time), strict=True
            ):
                to += more
        early = steps.only(np.flatnonzero(~added & ~known))  # goes, and was not seen to come
        _add(self.before, early.tensor, early.nbytes)
        lost = steps.only(np.flatnonzero(added & came))  # its eviction was not seen, or not in order
        self._decide(lost, np.full(lost.row.size, _UNKNOWN))
        self._judge(steps.only(np.flatnonzero(~added & came)), _WASTED)

    def _bin(self, time: Ints) -> Ints:
        return (np.clip(time, self._start, self._end) - self._start) // self._width

    def _changes(self, tensor: Ints, change: Ints, time: Ints) -> tuple[Ints, Ints]:
        """Return what changes in the cache by tensor and bin, and by tensor times the time that is left."""
        if int(time.max(initial=-1)) > self._end:
            change = np.where(time > self._end, 0, change)
        resident, area = np.zeros_like(self.resident), np.zeros_like(self._area)
        _add(resident, tensor * self._count + self._bin(time), change)
        left = self._end - np.clip(time, self._start, self._end)
        _add(area[0], tensor, change * (left >> 16))
        _add(area[1], tensor, change * (left & 0xFFFF))
        return resident, area

    def finish(self, still: Steps) -> None:
        """Take in what is in the cache at the end."""
        self._judge(still, _PENDING)
        self.resident[:, 0] += self.before
        self.resident = self.resident.cumsum(1)

    def mean(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the mean over time of the bytes of each tensor in the cache."""
        span = max(self._end - self._start, 1)
        area = [(high << 16) + low for high, low in zip(*self._area.tolist(), strict=True)]
        return np.array([before + one / span for before, one in zip(self.before.tolist(), area, strict=True)])

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

    def _judge(self, steps: Steps, unused: int) -> None:
        """Decide on pages that came in when they did before and leave now."""
        for some, used, may in self._evidence.weigh(steps):
            if used.all():
                self._decide(some, np.full(used.size, _USED))
                continue
            came = some.past
            hidden = may | came.loading | ~_MAPPED[came.cause] | (not self._seen)
            self._decide(some, np.where(used, _USED, np.where(hidden & (unused == _WASTED), _UNKNOWN, unused)))

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
