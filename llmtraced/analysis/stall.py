"""Where the time of each token went: computing, mapping pages, waiting for a read, reading.

The faults' intervals are laid over the tokens'. Everything is a union of intervals, so no event is looked at one by
one: the time in the most severe class is the size of its union, and each milder class is what its union adds to that.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from llmtraced.analysis.trace import Trace, collect

__all__ = ["IN_FLIGHT", "PARTS", "WAIT_NS", "stalls"]

WAIT_NS: Final = 50_000
"""Latency from which a minor fault is taken to have waited for a read; mapping a cached page takes 1 to 10 µs."""

PARTS: Final = ("compute_ns", "mapping_ns", "wait_ns", "hard_read_ns")
"""The parts of a token's duration, mildest first; they sum to it exactly."""

IN_FLIGHT: Final = ("reads_in_flight", "reads_in_flight_max")
"""How many threads waited for a read at once: the mean while there was one, and the most."""

_ROWS: Final = 4_000_000  # faults looked at together: 64 MB a column of times, some of them
_LONG_AGO: Final = np.iinfo(np.int64).min // 2
_SCHEMA: Final = {
    "token": pl.Int32,
    **dict.fromkeys(PARTS, pl.Int64),
    "reads_in_flight": pl.Float64,
    "reads_in_flight_max": pl.Int64,
}
_Times: TypeAlias = npt.NDArray[np.int64]


def stalls(trace: Trace, phase: str | None = None, wait_ns: int = WAIT_NS, rows: int = _ROWS) -> pl.DataFrame:
    """Return ``token``, :data:`PARTS` and :data:`IN_FLIGHT` of each token that ended, in order of time.

    At any instant the most severe class in flight counts: ``hard_read_ns``, a thread was in a major fault;
    ``wait_ns``, else a minor one that took ``wait_ns`` or longer; ``mapping_ns``, else a shorter one; ``compute_ns``,
    no thread was in a fault on the model. In a trace whose faults have no latency, tokens with faults have nulls.

    Args:
        trace: an open trace.
        phase: only tokens of this phase.
        wait_ns: where a minor fault stops being the mapping of a page that was there, ns.
        rows: about how many faults are held at a time; a token's are never parted.
    """
    ended = pl.col("token") > 0, pl.col("end_ns").is_not_null()
    counted = (pl.col("major_faults") + pl.col("minor_faults")).fill_null(0)
    tokens = (
        collect(trace.table("tokens").filter(*ended).with_columns(faults=counted))
        .sort("start_ns")
        .with_columns(block=pl.col("faults").cum_sum() // rows)
    )
    if phase is not None:  # after the blocks are cut: what happens between two prompts can be the whole trace
        tokens = tokens.filter(pl.col("phase") == phase)
    longest = collect(trace.table("faults").select(pl.col("latency_ns").max())).item()
    blocks = tokens.partition_by("block", maintain_order=True) if tokens.height else []
    found = [_block(trace, block, longest or 0, wait_ns) for block in blocks]
    parts = pl.concat([pl.DataFrame(schema=_SCHEMA), *found])
    if longest is not None:
        return parts
    untimed = (tokens["faults"] > 0).rename("untimed")
    return parts.with_columns(pl.when(~untimed).then(pl.exclude("token")).name.keep())


def _block(trace: Trace, tokens: pl.DataFrame, longest: int, wait_ns: int) -> pl.DataFrame:
    start, stop = tokens["start_ns"].to_numpy(), tokens["end_ns"].to_numpy()
    began, ends = pl.col("timestamp"), pl.col("timestamp") + pl.col("latency_ns")
    faults = collect(  # the second condition says less than the third, and lets whole row groups be skipped
        trace.table("faults")
        .filter(began < int(stop.max()), began >= int(start.min()) - longest, ends > int(start.min()))
        .filter(pl.col("latency_ns") > 0)
        .select(began, "latency_ns", hard=pl.col("major").fill_null(value=False))
    )
    if not faults["timestamp"].is_sorted():  # a fault is written when it ends: files overlap a little
        faults = faults.sort("timestamp")
    begin, latency, hard = (faults[name].to_numpy() for name in faults.columns)
    end, waited = begin + latency, hard | (latency >= wait_ns)
    hard_ns = _covered(begin[hard], end[hard], start, stop)
    read_ns = _covered(begin[waited], end[waited], start, stop)
    fault_ns = _covered(begin, end, start, stop)
    threads_ns, most = _in_flight(begin[waited], end[waited], start, stop)
    columns: dict[str, Any] = {
        "token": tokens["token"],
        "compute_ns": stop - start - fault_ns,
        "mapping_ns": fault_ns - read_ns,
        "wait_ns": read_ns - hard_ns,
        "hard_read_ns": hard_ns,
        "reads_in_flight": np.divide(threads_ns, read_ns, out=np.full(len(read_ns), np.nan), where=read_ns > 0),
        "reads_in_flight_max": most,
    }
    return pl.DataFrame(columns, schema=_SCHEMA, nan_to_null=True)


def _covered(begin: _Times, end: _Times, start: _Times, stop: _Times) -> _Times:
    """Return how much of each interval from ``start`` to ``stop`` is within one from ``begin`` (ascending) to ``end``.

    All int64 ns. The union of all that began by an instant, up to it, is what each one adds to those before, less what
    reaches beyond the instant.
    """
    reach = np.concatenate(([_LONG_AGO], np.maximum.accumulate(end)))
    union = np.concatenate(([0], np.cumsum(np.maximum(end - np.maximum(begin, reach[:-1]), 0))))

    def until(instants: _Times) -> _Times:
        begun = np.searchsorted(begin, instants, "right")
        covered: _Times = union[begun] - np.maximum(reach[begun] - instants, 0)
        return covered

    return until(stop) - until(start)


def _in_flight(begin: _Times, end: _Times, start: _Times, stop: _Times) -> tuple[_Times, _Times]:
    """Return the summed time in intervals from ``begin`` to ``end``, and how many there were at once at most.

    Both within each interval from ``start`` to ``stop``; ``begin`` is ascending and earlier than ``end``.
    """
    ends = np.sort(end)
    began_sum, ended_sum = (np.concatenate(([0], np.cumsum(times))) for times in (begin, ends))

    def until(instants: _Times) -> _Times:  # the sums may wrap around; what comes out does not
        begun, ended = (np.searchsorted(times, instants, "right") for times in (begin, ends))
        summed: _Times = instants * (begun - ended) - began_sum[begun] + ended_sum[ended]
        return summed

    at_once = np.append(np.arange(1, len(begin) + 1) - np.searchsorted(ends, begin, "right"), 0)
    first, last = np.searchsorted(begin, start, "left"), np.searchsorted(begin, stop, "left")
    slots = np.stack([first, last], axis=1).ravel()
    most = np.where(first < last, np.maximum.reduceat(at_once, slots)[::2], 0)
    already = first - np.searchsorted(ends, start, "right")
    return until(stop) - until(start), np.maximum(most, already)
