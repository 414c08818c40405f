"""Probes: one module a family, its attach points declared as data. :mod:`tracer` attaches them."""

from __future__ import annotations

from llmtraced.probes import faults, ggml, pagecache

__all__ = ["KERNEL_POINTS", "MATRICES", "PROCESS_POINTS"]

KERNEL_POINTS = (*faults.POINTS, *pagecache.POINTS)
"""Attached once, filtered in the kernel by process and file."""

PROCESS_POINTS = ggml.POINTS
"""Attached to each traced process."""

MATRICES = ggml.MATRICES
"""Attached in place of some of these, where it is cheaper."""
