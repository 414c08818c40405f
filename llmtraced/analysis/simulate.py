"""What another amount of RAM or another policy would do: bytes read and time per token, replayed from a trace.

The trace gives what tokens use and in which order (:mod:`llmtraced.analysis.ram`), how long they compute, how long they
stall for each byte read, and how fast the disk was at best. docs/reports/simulate.md has the policies and how well they
agree with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.facts import Facts, facts
from llmtraced.analysis.measured import Measured
from llmtraced.analysis.ram import Uses, belady_bytes, pinned_bytes
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.analysis.twolist import TwoLists
from llmtraced.errors import LlmtracedError, printable
from llmtraced.prefetch.policy import slack_for, window_for
from llmtraced.schema import PAGE

__all__ = ["BIN_NS", "POLICIES", "PREPARE", "SHARES", "STARTS", "best_rate", "pages", "simulate"]

POLICIES: Final = ("lru", "pin", "pin+stream", "belady")
"""What is replayed: the kernel as it is, pinned bytes, pinned bytes with the rest read ahead, the best possible."""

SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1)
"""RAM sizes of the curve, as shares of what can be used."""

STARTS: Final = ((0.03, 1), (0.04, 2), (0.05, 3))
"""What the kernel's replays begin with, whose mean counts: the share of the model on its active list (a load left 4 %),
and how many tokens old its statistics get (they are renewed every two seconds)."""

PREPARE: Final = 16
"""Tokens that only bring the kernel's lists into their balance."""

COUNTED: Final = 24
"""Tokens that count after them; those of the trace are repeated where they are fewer."""

BIN_NS: Final = 100_000_000
"""The disk's speed is the most that came in within a bin of so many ns."""

_PIECES: Final = 800  # a replay follows about so many stretches of the model
_THREADS: Final = 2  # compute at different places of a tensor
_SAME: Final = 0.02  # share by which a token's bytes may differ where the model is the same
_LARGEST: Final = 16 << 20  # bytes: readahead of 8 MB, doubled by POSIX_FADV_SEQUENTIAL


def simulate(
    trace: Trace,
    rams: Sequence[int] = (),
    disk_bandwidth: float | None = None,
    window: int | None = None,
    phase: str | None = None,
    machine: Measured | None = None,
) -> dict[str, Any]:
    """Return the report; docs/reports/simulate.md has every field.

    Args:
        trace: an open trace.
        rams: bytes for the model's pages that are looked at besides :data:`SHARES`.
        disk_bandwidth: bytes/s; None: the most that the trace shows.
        window: bytes that ``pin`` and ``pin+stream`` do not pin; None: what the sidecar takes, by RAM.
        phase: whose tokens; by default decoding.
        machine: what was measured of the machine with this model, instead of what the trace shows.

    Raises:
        LlmtracedError: the trace does not tell what tokens use or how long they take; another model was measured.
    """
    known = facts(trace, phase)
    used, late = known.uses, known.tokens.tail(max(known.tokens.height // 2, 1)).drop_nulls("stall_ns")
    where = printable(str(trace.path))
    if used is None or not used.bytes_per_token:
        lack = "which weights or experts its tokens use was not recorded"
        raise LlmtracedError(f"{where}: nothing can be simulated: {lack}; record decoding with --detail ops")
    if not late.height:
        raise LlmtracedError(f"{where}: nothing can be simulated: no token whose time and stall are known")
    if machine is not None and abs(machine.bytes_per_token / used.bytes_per_token - 1) > _SAME:
        lack = f"a token used {machine.bytes_per_token:.0f} bytes there, and {used.bytes_per_token:.0f} here"
        raise LlmtracedError(f"{where}: another model was measured: {lack}")
    compute = float((late["duration_ns"] - late["stall_ns"]).median())  # type: ignore[arg-type]
    best = best_rate(trace)
    cost, exposed, source = _stall_per_byte(late, used.bytes_per_token), 0.0, "trace"
    if machine is not None:
        compute, best, exposed, source = machine.compute_ns, machine.disk, machine.exposed, "bench"
        cost = machine.stall_ns_per_byte or cost
    disk = disk_bandwidth or best
    measured = float(late["bytes_read"].mean())  # type: ignore[arg-type]
    total = int(used.sizes.sum())
    peak = known.peak_resident_bytes
    points = {round(total * share) for share in SHARES} | {ram for ram in rams if ram > 0}
    if peak and measured:
        points.add(min(peak, total))
    ahead = _readahead(late)
    sizes, sequence = pages(used, total // _PIECES)
    rows = []
    for ram in sorted(points):
        reads = _kernel(sizes, sequence, ram, ahead)
        free = _window(total, ram) if window is None else window
        pinned, streamed = pinned_bytes(used, max(ram - free, 0)), pinned_bytes(used, ram)
        each = max(used.tokens - used.warm, 1)
        whole = ram >= total
        read: dict[str, float] = {
            "lru": 0.0 if whole else mean(reads),
            "pin": 0.0 if whole else pinned / each,
            "pin+stream": 0.0 if whole else pinned / each,
            "belady": belady_bytes(used, ram) / each,
        }
        spread = {"low": 0, "high": 0} if whole else {"low": round(min(reads)), "high": round(max(reads))}
        bound = _overlapped(compute, streamed / each, disk, 0.0)
        rows.append(
            {
                "ram_bytes": ram,
                "ram_share": ram / total,
                "window_bytes": free,
                "bound_ns_per_token": bound,
                "policies": [
                    {
                        "policy": policy,
                        **_timed(policy, read[policy], compute, cost, disk, exposed),
                        **({f"bytes_{k}": v for k, v in spread.items()} if policy == "lru" else {}),
                    }
                    for policy in POLICIES
                ],
            }
        )
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "judged_phase": known.phase,
        "tokens": known.tokens.height,
        "bytes_used_per_token": used.bytes_per_token,
        "usable_bytes": total,
        "uses_source": used.source,
        "replayed_tokens": used.tokens,
        "compute_ns_per_token": compute,
        "stall_ns_per_byte": cost,
        "disk_bytes_per_second": disk,
        "disk_source": "given" if disk_bandwidth else source if best else None,
        "exposed_share": exposed,
        "readahead_bytes": ahead,
        "measured": _measured(known, late),
        "curve": rows,
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def pages(used: Uses, piece: int) -> tuple[list[int], list[list[int]]]:
    """Return what :class:`TwoLists` is to replay.

    The pages of each piece of the model, in file order, none larger than ``piece`` bytes (at least 128 KiB) or part of
    two units; and the pieces that each token uses, in order.
    """
    most = max(piece, 32 * PAGE)
    sizes = used.extents["size_bytes"].to_numpy()
    count = -(-sizes // most)
    split = np.repeat(sizes / count, count)
    ends = np.round(np.cumsum(split) / PAGE).astype(np.int64)
    each = np.maximum(np.diff(ends, prepend=0), 1)
    owner = np.repeat(used.extents["unit"].to_numpy(), count)
    begins = np.repeat(np.cumsum(count) - count, count)
    at, share = np.arange(len(owner)) - begins, -(-np.repeat(count, count) // _THREADS)
    order = np.lexsort((at // share, at % share, begins, owner))  # the threads' places in turn
    first = np.searchsorted(owner[order], np.arange(len(used.sizes) + 1))
    pieces = [order[a:b].tolist() for a, b in pairwise(first)]
    tokens: list[list[int]] = [[] for _ in range(used.tokens)]
    for token, unit in zip(used.rank.tolist(), used.units.tolist(), strict=True):
        tokens[token] += pieces[unit]
    return each.tolist(), tokens


def _kernel(sizes: list[int], tokens: list[list[int]], ram: int, ahead: int) -> list[float]:
    """Return the bytes read per token, of a replay from each of :data:`STARTS`."""
    total = sum(sizes)
    if ram >= total * PAGE:
        return [0.0]
    window = max(round(ahead / PAGE / (total / len(sizes))), 1)
    found = []
    for start, renewed in STARTS:
        lists = TwoLists(sizes, ram // PAGE, window, round(start * len(sizes)))
        read = []
        for number in range(PREPARE + COUNTED):
            lists.read = 0
            if number % renewed == 0:
                lists.refresh()
            for piece in tokens[number % len(tokens)]:
                lists.touch(piece)
            read.append(lists.read * PAGE)
        found.append(mean(read[PREPARE:]))
    return found


def best_rate(trace: Trace) -> float | None:
    """Return the most bytes per second that came into the page cache within a bin."""
    added = trace.table("pagecache").filter(pl.col("action") == "add")
    by_bin = added.group_by(bin=pl.col("timestamp") // BIN_NS).agg(pl.col("bytes").sum())
    most = collect(by_bin.select(pl.col("bytes").max())).item()
    return float(most) * 1e9 / BIN_NS if most else None


def _stall_per_byte(late: pl.DataFrame, used: float) -> float | None:
    """Return the median over the tokens that read a hundredth of what they use; None: there are none."""
    some = late.filter(pl.col("bytes_read") >= used / 100)
    return float((some["stall_ns"] / some["bytes_read"]).median()) if some.height else None  # type: ignore[arg-type]


def _readahead(late: pl.DataFrame) -> int:
    """Return about how much readahead brings in at once: a major fault brings two windows or more."""
    majors, read = int(late["major_faults"].sum()), int(late["bytes_read"].sum())
    return min(read // majors // 2, _LARGEST) if majors and read else _LARGEST


def _window(total: int, ram: int) -> int:
    """Return what the sidecar does not pin, bytes: what passes through, and what it leaves free."""
    slack = slack_for(ram)
    return window_for(total, max(ram - slack, 0)) + slack


def _overlapped(compute: float, read: float, disk: float | None, exposed: float) -> float | None:
    """Return the time of a token whose reads go on behind its computing; None: the disk's speed is not known."""
    if not read:
        return compute
    return max(compute, read / disk * 1e9 + exposed * compute) if disk else None


def _timed(
    policy: str, read: float, compute: float, cost: float | None, disk: float | None, exposed: float
) -> dict[str, Any]:
    if policy in ("pin+stream", "belady"):
        ns = _overlapped(compute, read, disk, exposed if policy == "pin+stream" else 0.0)
    else:
        each = cost if cost is not None else 1e9 / disk if disk else None
        ns = compute if not read else None if each is None else compute + read * each
    return {
        "bytes_per_token": round(read),
        "ns_per_token": None if ns is None else round(ns),
        "tokens_per_second": None if not ns else 1e9 / ns,
    }


def _measured(known: Facts, late: pl.DataFrame) -> dict[str, Any]:
    """Return what the trace itself had."""
    return {
        "ram_bytes": known.peak_resident_bytes,
        "cgroup_limit_bytes": known.limit,
        "bytes_per_token": float(late["bytes_read"].mean()),  # type: ignore[arg-type]
        "ns_per_token": median(late["duration_ns"].to_list()),
        "tokens": late.height,
    }
