"""Every requirement, tried: what is there, what is missing, what is lost without it and which command gets it.

Nothing is concluded from a version number: programs are compiled and loaded, every attach point is attached and
detached again, page faults of our own are counted. What depends on something that is missing is reported as
``unknown``, and all else is still looked at. docs/requirements.md explains each line.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from typing import Final

import numpy as np
from elftools.common.exceptions import ELFError

from llmtraced import elf, layouts, target
from llmtraced.cgroup import cgroup_of
from llmtraced.errors import LlmtracedError, printable
from llmtraced.loading import why_unmapped
from llmtraced.probes import KERNEL_POINTS, MATRICES, PROCESS_POINTS, kernel, loader
from llmtraced.probes.attach import attach_point, open_set
from llmtraced.probes.points import Tracepoint
from llmtraced.probes.tracer import Tracer
from llmtraced.requirements import IN_CONTAINER, Check, Status, all_fine, read_text, system
from llmtraced.resolve import Extents
from llmtraced.schema import EVENT, Kind, Phase, Probe

__all__ = ["Check", "Status", "all_fine", "probes", "process", "refused", "run"]

_POINTS: Final = (*KERNEL_POINTS, MATRICES, *PROCESS_POINTS)
_OTHERWISE: Final = {p.otherwise.program: p.lost for p in KERNEL_POINTS if isinstance(p, Tracepoint) and p.otherwise}
_LOST: Final = {p.program: p.lost for p in _POINTS} | _OTHERWISE
_OPTIONAL: Final = {p.program for p in _POINTS if not p.required} | _OTHERWISE.keys()
_SELF_TEST_FAULTS: Final = 61  # prime: a count that is off by a factor cannot come out right by chance
_FAULT_AROUND: Final = 64 << 10  # a fault maps what is cached in its aligned 64 KiB (mm/memory.c, fault_around_bytes)


def run(pid: int | None = None) -> Iterator[Check]:
    """Yield every check, in order; with ``pid``, also those of that process."""
    found: dict[str, Status] = {}
    for check in system():
        found[check.name] = check.status
        yield check
    needs = [n for n in ("privileges", "architecture", "btf", "bpf", "headers", "bcc") if found[n] == "missing"]
    tracer = None
    if needs:
        yield Check("programs", "unknown", f"not tried: needs {', '.join(needs)}")
    else:
        try:
            tracer = Tracer(anew=True)
        except (LlmtracedError, OSError, ValueError) as error:
            yield refused(str(error))
            needs = ["programs"]
    if needs:
        yield from _not_tried(f"not tried: needs {', '.join(needs)}")
    try:
        if tracer is not None:
            yield from probes(tracer)
        if pid is not None:
            yield from process(pid, tracer)
    finally:
        if tracer is not None:
            tracer.close()


# --- the probes ----------------------------------------------------------------------------------------------------


def _not_tried(why: str) -> Iterator[Check]:
    for point in KERNEL_POINTS:
        yield Check(f"attach {point.program}", "unknown", f"{point}: {why}", required=point.required)
    for name in ("ring", "uprobes", "flush", "self-test"):
        yield Check(name, "unknown", why, required=name != "uprobes")


def refused(error: str) -> Check:
    """Return the check for programs that could not be compiled or loaded at all, from the loader's message."""
    lines = error.splitlines() or ["?"]
    said = next((line for line in lines if " error: " in line), "")  # the compiler's own words
    hint = f"{sys.executable} -m llmtraced -v check (prints all that the compiler said)"
    if "Operation not permitted" in error or "Permission denied" in error:
        hint = f"a security policy refuses it (lockdown, seccomp, an LSM); {IN_CONTAINER}"
    elif "Cannot allocate memory" in error:
        hint = "ulimit -l unlimited, or free some memory"
    return Check("programs", "missing", printable(f"{lines[0]} {said}".strip(), 500), hint)


def probes(tracer: Tracer) -> Iterator[Check]:
    """Yield whether programs were loaded, maps mapped, and each attach point can be attached (it is detached again)."""
    loaded = tracer.programs
    text = f"{len(loaded.programs)} of {len(loader.PROGRAMS)} loaded, in {loaded.compile_seconds:.1f} s"
    yield Check("programs", "ok", f"{text} and {loaded.compile_rss_bytes / 1e6:.0f} MB that are freed again")
    for name, why in loaded.refused.items():
        optional = name in _OPTIONAL
        lost = _LOST.get(name, "runs of pages are not sent in time")
        status: Status = "degraded" if optional else "missing"
        detail = f"{printable(why)}; lost: {lost}"
        yield Check(f"program {name}", status, detail, "a newer kernel" if optional else "", not optional)
    yield Check("ring", "ok", f"mapped, room for {tracer.ring.capacity:,} events; {len(loaded.maps) - 1} more maps")
    for point in KERNEL_POINTS:
        name = f"attach {point.program}"
        try:
            attached, fds = attach_point(point, loaded)
        except LlmtracedError as error:
            status = "missing" if point.required else "degraded"
            yield Check(name, status, f"{error}; lost: {point.lost}", required=point.required)
        else:
            for fd in fds.values():
                os.close(fd)
            yield Check(name, "ok", f"{attached}: attached and detached", required=point.required)
    yield _uprobes(loaded)
    yield _flush(loaded)
    yield _self_test(tracer)


def _uprobes(loaded: loader.Programs) -> Check:
    """Check uprobes and uretprobes on a function of our own C library."""
    try:
        libc = next(m.path for m in target.maps(os.getpid()) if "x" in m.permissions and "libc.so" in m.path)
        offset = elf.functions(libc, b"getpid")["getpid"]
    except (StopIteration, KeyError, ELFError, OSError, ValueError):
        return Check("uprobes", "unknown", "not tried: there is no C library to try it on", required=False)
    for name, on_return in (("on_graph", False), ("on_graph_return", True)):
        problem = _attach_uprobe(libc, offset, os.getpid(), name, "uprobe getpid", loaded, on_return)
        if problem:
            lost = "tokens, operators and experts are not recorded"
            return Check(
                "uprobes", "degraded", f"{problem}; lost: {lost}", "a kernel with CONFIG_UPROBE_EVENTS=y", False
            )
    return Check("uprobes", "ok", "attached and detached, on entry and return", required=False)


def _attach_uprobe(
    path: str, offset: int, pid: int, program: str, what: str, loaded: loader.Programs, on_return: bool
) -> str | None:
    if program not in loaded.programs:
        return f"its program {program} was refused"
    try:
        os.close(kernel.open_uprobe(path, offset, pid, loaded.programs[program], what, on_return=on_return))
    except LlmtracedError as error:
        return str(error)
    return None


def _flush(loaded: loader.Programs) -> Check:
    """Check that a program can be run on each CPU, which is how collected runs of pages are fetched."""
    remedy = "a newer kernel (BPF_PROG_TEST_RUN of raw tracepoints: 5.10)"
    program = loaded.programs.get("on_flush")
    if program is None:
        return Check("flush", "missing", "its program on_flush was refused", remedy)
    try:
        for cpu in kernel.online_cpus():
            kernel.run_on_cpu(program, cpu)
    except OSError as error:
        return Check("flush", "missing", f"collected runs of pages cannot be fetched: {error.strerror}", remedy)
    return Check("flush", "ok", f"ran on {len(kernel.online_cpus())} CPUs")


def _self_test(tracer: Tracer) -> Check:
    """Count page faults of our own: everything from the kernel's event to the record that we read."""
    size = _SELF_TEST_FAULTS * _FAULT_AROUND
    fd = os.memfd_create("llmtraced-check")
    try:
        os.posix_fallocate(fd, 0, size)  # pages that are there: each first touch of a window is one minor fault
        device, inode = target.kernel_device(f"/proc/self/fd/{fd}")
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
            start = np.frombuffer(memory, np.uint8).ctypes.data
            seen, counted = _count_faults(tracer, memory, (start, device, inode))
    except (LlmtracedError, OSError) as error:
        return Check("self-test", "missing", f"page faults of our own cannot be traced: {error}")
    finally:
        os.close(fd)
    text = f"of {_SELF_TEST_FAULTS} page faults of our own, the kernel counted {counted} and {seen} records arrived"
    if seen == counted == _SELF_TEST_FAULTS:
        return Check("self-test", "ok", text)
    return Check("self-test", "missing" if not seen else "degraded", text, required=not seen)


def _count_faults(tracer: Tracer, memory: mmap.mmap, where: tuple[int, int, int]) -> tuple[int, int]:
    """Touch ``memory`` under trace and return how many faults were recorded, and how many counted."""
    start, device, inode = where
    nothing = np.zeros(1, np.uint64)
    slot, file = tracer.add_process(os.getpid(), Phase.UNKNOWN), tracer.next_file()
    try:
        tracer.add_file(
            file, slot, device, inode, len(memory), Extents(nothing, np.array([-1], np.int32), nothing, [[]])
        )
        tracer.set_ranges(slot, [(start, start + len(memory), 0, file)])
        for offset in range(0, len(memory), _FAULT_AROUND):
            memory[offset]
        records = np.concatenate([np.empty(0, EVENT), *tracer.read()])
        counted = int(tracer.account(slot, tracer.epoch)["counted"][Probe.FAULTS])
    finally:
        tracer.remove_process(slot)
        tracer.free(slot)
        tracer.detach()
    return int(np.count_nonzero(records["kind"] == Kind.FAULT)), counted


# --- a process -----------------------------------------------------------------------------------------------------


def process(pid: int, tracer: Tracer | None) -> Iterator[Check]:
    """Yield what there is to say about process ``pid`` as a target."""
    try:
        target.start_ticks(pid)
    except (ProcessLookupError, PermissionError):
        yield Check("process", "missing", f"there is no process {pid}", "pgrep -a llama-server")
        return
    yield Check("process", "ok", f"{pid}, {printable(read_text(f'/proc/{pid}/comm').strip())}")
    try:
        it = target.find_target(pid)
    except (LlmtracedError, OSError) as error:
        what, _, remedy = str(error).partition("; ")
        yield Check("model", "missing", printable(what, 500), printable(remedy, 500))
        return
    for label, model in it.models.items():
        size = sum(s.size for s in model.shards) / 1e9
        parts = f" in {len(model.shards)} files" if len(model.shards) > 1 else ""
        yield Check("model", "ok", f"{printable(label)}: {len(model.tensors)} tensors, {size:.2f} GB{parts}")
    for problem in it.problems:
        yield Check("model", "degraded", printable(problem, 500), required=False)
    yield from _mapped(it)
    yield from _hooks(it, tracer)
    yield _limit(it)
    yield from _readahead(it)


def _mapped(it: target.Target) -> Iterator[Check]:
    total = sum(s.size for m in it.models.values() for s in m.shards)
    text = f"{it.mapped_bytes / 1e9:.2f} of {total / 1e9:.2f} GB ({it.mapped_bytes / max(total, 1):.0%})"
    if it.mapped_bytes:
        locked = it.locked_bytes
        text += f"; {locked / 1e9:.2f} GB are locked in memory by the process itself" if locked else ""
        yield Check("mapped", "ok", text, required=False)
    remedy = "start the server with --load-mode mmap" if not it.mapped_bytes else ""
    for label in it.unmapped:
        yield Check("mapped", "degraded", why_unmapped(label, it.load_mode), remedy, required=False)


def _hooks(it: target.Target, tracer: Tracer | None) -> Iterator[Check]:
    """Yield the libraries that the hooks are in, and each hook: there, and attachable."""
    wanted = {p.symbol: it.symbols[p.symbol] for p in PROCESS_POINTS if p.symbol in it.symbols}
    for path in dict.fromkeys(s.library for s in wanted.values()):
        build = f"build id {found}" if (found := elf.build_id(path)) else "no build id"
        yield Check("library", "ok", f"{printable(path)}, {build}", required=False)
    if target.EVALUATE in wanted:
        yield _layout(wanted[target.EVALUATE].library)
    if not wanted:
        why = "no function of ggml is found: tokens, operators and experts are not recorded; faults and page cache are"
        remedy = "use a build whose symbols were not stripped, or one with shared libraries"
        yield Check("library", "degraded", why, remedy, required=False)
    if it.rivalry:
        yield Check("library", "degraded", it.rivalry, required=False)
    for point in PROCESS_POINTS:
        name, symbol = f"hook {point}", wanted.get(point.symbol)
        if symbol is None and point.beside in it.symbols and not point.is_needed(it.symbols):
            yield Check(name, "ok", f"{point}: this build has no such function, and nothing is lost", required=False)
            continue
        if symbol is None:
            problem: str | None = f"{point}: this build has no such symbol"
        elif tracer is None:
            yield Check(name, "unknown", f"{point}: the symbol is there; attaching was not tried", required=False)
            continue
        else:
            arguments = symbol.library, symbol.offset, it.pid, point.program, str(point)
            problem = _attach_uprobe(*arguments, tracer.programs, point.on_return)
        if problem:
            yield Check(name, "degraded", f"{problem}; lost: {point.lost}", required=False)
        elif symbol is not None:
            detail = f"attached and detached (from --detail {point.detail.name.lower()} on)"
            detail += f", at {symbol.instead}, for it was inlined" if symbol.instead else ""
            yield Check(name, "ok", f"{point}: {detail}", required=False)
    if tracer is not None:
        yield _matrices(it, tracer)


def _layout(library: str) -> Check:
    source = layouts.foreseen(library)
    words = {
        layouts.KEPT: "kept from an earlier process of this build",
        layouts.MEMORY: "to be derived from its memory",
    }
    text = words.get(source, f"described by its {source} information")
    return Check("layout", "ok", f"of ggml's structures: {text}, and checked against its first graph", required=False)


def _matrices(it: target.Target, tracer: Tracer) -> Check:
    name = f"hook {MATRICES}"
    try:
        os.close(open_set(MATRICES, it.symbols, it.pid, tracer.programs))
    except LlmtracedError as error:
        return Check(name, "degraded", f"{error}; lost: {MATRICES.lost}", required=False)
    return Check(name, "ok", f"{MATRICES}: attached and detached (dense models, --detail ops)", required=False)


def _limit(it: target.Target) -> Check:
    group = cgroup_of(it.pid)
    if group is None:
        return Check("memory limit", "degraded", "not known: the process is in no memory cgroup", required=False)
    total = sum(s.size for m in it.models.values() for s in m.shards)
    limit = (
        "no limit"
        if group.limit is None
        else f"{group.limit / 1e9:.2f} GB, {group.limit / max(total, 1):.0%} of the model"
    )
    return Check("memory limit", "ok", f"{limit}; cgroup v{group.version} {printable(str(group.path))}", required=False)


def _readahead(it: target.Target) -> Iterator[Check]:
    """Yield the readahead of each disk that holds a model: it decides how much a fault reads."""
    paths = {s.path.stat().st_dev: s.path for m in it.models.values() for s in m.shards if s.path.exists()}
    for device, path in paths.items():
        number = f"{os.major(device)}:{os.minor(device)}"
        kb = read_text(f"/sys/class/bdi/{number}/read_ahead_kb").strip()
        if kb:
            yield Check("readahead", "ok", f"{kb} KB on device {number}; Linux's default is 128", required=False)
        else:
            why = f"not known for device {number}, where {printable(str(path))} is"
            yield Check("readahead", "degraded", why, required=False)
