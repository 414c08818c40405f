"""Times in a trace: CLOCK_MONOTONIC nanoseconds, as the kernel's ``bpf_ktime_get_ns`` gives them."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["boot_id", "monotonic_ns", "realtime_offset_ns"]


def monotonic_ns() -> int:
    """Return now on the trace's clock, ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def realtime_offset_ns() -> int:
    """Return what to add to a trace time to get Unix time, ns; until the clock is set, or the machine suspended."""
    looks = [(monotonic_ns(), time.time_ns(), monotonic_ns()) for _ in range(3)]
    before, realtime, after = min(looks, key=lambda look: look[2] - look[0])  # the one with the least in between
    return realtime - (before + after) // 2


def boot_id() -> str:
    """Return the id of this boot: trace times of different boots cannot be compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
