"""What every benchmark says besides its own figures: the spread of repeated values, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["machine", "spread"]


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Return ``min p25 median p75 max`` of the values, a 95 % interval of the median, and the values in their order.

    Percentiles interpolate linearly; ``median_ci95`` is where the medians of 2,000 resamplings (bootstrap, the same
    ones each time) fall.

    Args:
        values: at least one.
        digits: all are rounded to this many significant digits.
    """
    points = np.percentile(np.asarray(values, np.float64), [0, 25, 50, 75, 100])
    names = ("min", "p25", "median", "p75", "max")
    named: dict[str, Any] = {name: _significant(point, digits) for name, point in zip(names, points, strict=True)}
    sample = np.asarray(values, np.float64)
    drawn = np.random.default_rng(1).integers(0, len(sample), (2000, len(sample)))
    interval = np.percentile(np.median(sample[drawn], axis=1), [2.5, 97.5])
    named["median_ci95"] = [_significant(end, digits) for end in interval]
    return {**named, "values": [_significant(value, digits) for value in values]}


def _significant(value: float, digits: int) -> float:
    rounded = float(f"{float(value):.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) >= 10**digits else rounded


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, memory, kernel, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    for line in cpuinfo.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
