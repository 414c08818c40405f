"""Attach to one of the kernel's own points, in the newest form that this kernel has."""

from __future__ import annotations

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.probes import kernel
from llmtraced.probes.loader import Programs
from llmtraced.probes.points import Kprobe, SoftwareEvent, Tracepoint

__all__ = ["attach_point", "open_on_cpu", "program"]


def program(programs: Programs, name: str) -> int:
    """Return the descriptor of a program.

    Raises:
        LlmtracedError: it was not loaded; the message says why.
    """
    if name not in programs.programs:
        raise LlmtracedError(f"cannot load program {name}: {programs.refused.get(name, 'not loaded')}", UNSUPPORTED)
    return programs.programs[name]


def attach_point(point: Tracepoint | SoftwareEvent, programs: Programs) -> tuple[str, dict[int, int]]:
    """Return what was attached, ``point`` or what there is otherwise, and its descriptors; closing those detaches it.

    They come by CPU for a software event; what is attached to all CPUs at once has the key -1.

    Raises:
        LlmtracedError: neither can be attached.
    """
    try:
        return str(point), _attach(point, programs)
    except LlmtracedError as error:
        otherwise = point.otherwise if isinstance(point, Tracepoint) else None
        if otherwise is None:
            raise
        try:
            return str(otherwise), _attach(otherwise, programs)
        except LlmtracedError as second:
            raise LlmtracedError(f"{error}; {second}", error.exit_code) from second


def _attach(point: Tracepoint | SoftwareEvent | Kprobe, programs: Programs) -> dict[int, int]:
    loaded, what = program(programs, point.program), str(point)
    if isinstance(point, Tracepoint):
        return {-1: kernel.open_tracepoint(point.name, loaded, what, typed=point.typed)}
    if isinstance(point, Kprobe):
        return {-1: kernel.open_kprobe(point.name, loaded, what)}
    return {cpu: open_on_cpu(point, programs, cpu) for cpu in kernel.online_cpus()}


def open_on_cpu(point: SoftwareEvent, programs: Programs, cpu: int) -> int:
    """Attach to a software event of one CPU and return its descriptor.

    Raises:
        LlmtracedError: it cannot be attached.
    """
    return kernel.open_software_event(point.config, cpu, program(programs, point.program), str(point))
