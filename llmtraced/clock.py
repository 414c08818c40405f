"""Times in a trace: CLOCK_MONOTONIC nanoseconds, as the kernel's ``bpf_ktime_get_ns`` gives them."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["boot_id", "monotonic_ns", "realtime_offset_ns"]


def monotonic_ns() -> int:
    """Return now on the trace's clock, ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def realtime_offset_ns() -> int:
    """Return what to add to a trace time to get Unix time, ns; it holds until the wall clock is set."""
    before = monotonic_ns()
    realtime = time.time_ns()
    return realtime - (before + monotonic_ns()) // 2


def boot_id() -> str:
    """Return the id of this boot: trace times of different boots cannot be compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
