"""Attach to one of the kernel's own points, in the newest form that it has, or to matrix multiplications alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.probes import kernel
from llmtraced.probes.loader import Programs
from llmtraced.probes.points import Kprobe, SoftwareEvent, Tracepoint, UprobeSet
from llmtraced.target import Symbol

__all__ = ["attach_point", "open_on_cpu", "open_set", "program"]


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


def open_set(point: UprobeSet, symbols: Mapping[str, Symbol], pid: int, programs: Programs, cookie: int = 0) -> int:
    """Attach to all functions of a set and return their descriptor.

    Args:
        point: the set.
        symbols: ggml's functions in the process.
        pid: the process.
        programs: loaded.
        cookie: what ``bpf_get_attach_cookie`` gives the program, besides whether it is a method.

    Raises:
        LlmtracedError: it is not known to see all matrices here, would be dearer than a trap for each operator, or
            cannot be attached.
    """
    first = symbols.get(point.symbol)
    methods = [symbol for name, symbol in symbols.items() if re.fullmatch(point.methods, name)]
    why = ""
    if first is None:
        why = "this build has no such symbol"
    elif not methods:
        why = "this build has no symbols of the methods that multiply repacked weights"
    elif {s.library for s in methods} != {first.library}:
        why = "the methods that multiply repacked weights are not in the same library"
    elif not all(kernel.emulated(s.library, s.offset) for s in (first, *methods)):
        why = "a function of this build begins with an instruction that the kernel has to single-step"
    if first is None or why:
        raise LlmtracedError(f"{point}: {why}", UNSUPPORTED)
    ends = [symbols[name] for name in point.ends if name in symbols]
    cookies = {s.offset: cookie | kernel.COOKIE_METHOD for s in methods} | {first.offset: cookie}
    cookies |= {s.offset: cookie for s in ends if s.library == first.library and kernel.emulated(s.library, s.offset)}
    return kernel.open_uprobes(first.library, cookies, pid, program(programs, point.program), str(point))
