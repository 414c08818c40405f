"""Page faults of traced processes on their models (bpf/faults.bpf.c, docs/faults.md)."""

from __future__ import annotations

from llmtraced.probes.points import SoftwareEvent, Tracepoint

__all__ = ["POINTS"]

POINTS = (
    SoftwareEvent("on_minor_fault", "page-faults-min", 5, "minor faults are not recorded"),
    SoftwareEvent("on_major_fault", "page-faults-maj", 6, "major faults are not recorded"),
    Tracepoint("on_fault_user", "page_fault_user", "faults have no latency, tokens no stall", False),
    Tracepoint("on_fault_kernel", "page_fault_kernel", "faults in system calls have no latency", False),
)
