"""What the page cache did with the model: what came in and why, what of it was of use, what stayed, what went.

See docs/reports/cache.md for what can be known of a page's use, and what cannot.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Bools, Ints, Numbers, ahead, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.moved import Moved
from llmtraced.analysis.pages import CLOCK, Pages, Rows, Steps
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
    pages = Pages(trace, phase, processes=True)
    tally, sums = _Tally(trace, pages, span), Moved(pages)
    for rows, steps in ahead(pages.steps()):
        sums.add(rows)
        tally.add(rows)
        tally.take(steps)
    tally.finish(pages.resident())
    moved = sums.by_process()
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
        tensors = max(pages.count, 1)
        self.fates = np.zeros((tensors, len(CAUSES), len(FATES)), np.int64)
        self.moves = np.zeros((len(CAUSES) + 1, count), np.int64)  # in by cause, then out
        self.resident = np.zeros((tensors, count), np.int64)  # at the end of each bin, once finished
        self._area = np.zeros((2, tensors), np.int64)  # bytes x ns: in 2^16 ns, and what is below that
        self.before = np.zeros(tensors, np.int64)
        self.evicted = np.zeros(tensors, np.int64)
        self.astray = 0

    def add(self, rows: Rows) -> None:
        """Take in a batch as if each row changed something."""
        self._fit(self._pages.count)
        changed = self.evicted, self.moves, self.resident, self._area
        _move(rows.mark, rows.tensor, rows.begin, rows.end, self._start, self._end, self._width, *changed)

    def take(self, steps: Steps) -> None:
        """Take in the steps of that batch."""
        rows, span = steps.rows, (self._start, self._end, self._width)
        astray, left = _sort_out(
            steps.row,
            steps.before,
            steps.begin,
            steps.end,
            rows.mark,
            rows.tensor,
            *span,
            self.resident,
            self._area,
            self.before,
            self.fates,
        )
        self.astray += astray
        self._judge(steps.only(left), _WASTED)

    def finish(self, still: Steps) -> None:
        """Take in what is in the cache at the end."""
        self._judge(still, _PENDING)
        self.resident[:, 0] += self.before
        self.resident = self.resident.cumsum(1)

    def _fit(self, tensors: int) -> None:
        self.fates = grown(self.fates, (tensors, *self.fates.shape[1:]))
        self.resident = grown(self.resident, (tensors, self.resident.shape[1]))
        self._area = grown(self._area, (2, tensors))
        self.before, self.evicted = grown(self.before, (tensors,)), grown(self.evicted, (tensors,))

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
        moved = self._pages.tensors.with_row_index("row").filter(pl.col("moved")).drop("moved")
        found = known.with_row_index("order").join(
            moved.sort(pl.col("model", "tensor_name").fill_null("None")),
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
        if not steps.row.size:
            return
        for some, used, may in self._evidence.weigh(steps):
            rows = some.rows
            _decide(
                some.row,
                some.before,
                some.begin,
                some.end,
                rows.mark,
                rows.tensor,
                used,
                may,
                _MAPPED & self._seen,
                unused,
                self.fates,
            )


@compiled
def _move(
    mark: Ints,
    tensor: Numbers,
    begin: Ints,
    end: Ints,
    first: int,
    last: int,
    width: int,
    evicted: Ints,
    moves: Ints,
    resident: Ints,
    area: Ints,
) -> None:
    """Add rows to what went by tensor, to what moved, and to what changes in the cache."""
    for i in range(mark.size):
        what, of, nbytes = mark[i], tensor[i], end[i] - begin[i]
        time = what >> CLOCK
        here = (min(max(time, first), last) - first) // width
        if what & 16:
            if what & 1:
                moves[what >> 1 & 7, here] += nbytes
            else:
                moves[-1, here] += nbytes
                evicted[of] += nbytes
        if time <= last:
            change = nbytes if what & 1 else -nbytes
            left = last - max(time, first)
            resident[of, here] += change
            area[0, of] += change * (left >> 16)
            area[1, of] += change * (left & 0xFFFF)


@compiled
def _sort_out(
    row: Ints,
    before: Ints,
    begin: Ints,
    end: Ints,
    mark: Ints,
    tensor: Numbers,
    first: int,
    last: int,
    width: int,
    resident: Ints,
    area: Ints,
    early: Ints,
    fates: Ints,
) -> tuple[int, Ints]:
    """Return the bytes that moved out of order, and which steps are evictions of what came in.

    Of the others: what went and was not seen to come is added to ``early``, and what came and was not seen to go
    to ``fates``; what moved out of order changed nothing, which is taken back from ``resident`` and ``area``.
    """
    astray = count = 0
    left = np.empty(row.size, np.int64)
    for i in range(row.size):
        now, past, of, nbytes = mark[row[i]], mark[before[i]], tensor[row[i]], end[i] - begin[i]
        added, known = now & 1, past >= 0
        came = known and past & 1
        if known and bool(added) == bool(came):
            astray += nbytes
            time = now >> CLOCK
            if time <= last:
                back = -nbytes if added else nbytes
                remains = last - max(time, first)
                resident[of, (max(time, first) - first) // width] += back
                area[0, of] += back * (remains >> 16)
                area[1, of] += back * (remains & 0xFFFF)
        if not added:
            if not known:
                early[of] += nbytes
            elif came:
                left[count] = i
                count += 1
        elif came and past & 16:
            fates[of, past >> 1 & 7, _UNKNOWN] += nbytes
    return astray, left[:count]


@compiled
def _decide(
    row: Ints,
    before: Ints,
    begin: Ints,
    end: Ints,
    mark: Ints,
    tensor: Numbers,
    used: Bools,
    may: Bools,
    mapped: Bools,
    unused: int,
    fates: Ints,
) -> None:
    """Add pages that leave now to the fates of when they came in; ``may`` is said of those not used."""
    for i in range(row.size):
        past = mark[before[i]]
        if not past & 16:
            continue
        fate = _USED if used[i] else unused
        if fate == _WASTED and (may[i] or past & 32 or not mapped[past >> 1 & 7]):
            fate = _UNKNOWN
        fates[tensor[row[i]], past >> 1 & 7, fate] += end[i] - begin[i]


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
