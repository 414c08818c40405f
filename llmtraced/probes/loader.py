"""The tracer's BPF programs: what they are compiled of, and loading them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from llmtraced import schema
from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import OPERATOR_BYTES
from llmtraced.probes import KERNEL_POINTS, btf, compiler, kernel
from llmtraced.probes.image import Image
from llmtraced.probes.points import Tracepoint
from llmtraced.probes.shared import OP_RECORDS
from llmtraced.target import kernel_device

__all__ = [
    "FILES",
    "OP_THREADS",
    "PROGRAMS",
    "Programs",
    "Sizes",
    "bpf_folder",
    "compile_flags",
    "load",
    "load_image",
    "source",
]

FILES: Final = 64
"""Model files (shards) that can be traced at the same time."""

OP_THREADS: Final = 256
"""Threads that can evaluate graphs at the same time, all processes, a power of two."""

PROGRAMS: Final[Mapping[str, str]] = {
    "on_fault_user": "RAW_TRACEPOINT",
    "on_fault_kernel": "RAW_TRACEPOINT",
    "on_minor_fault": "PERF_EVENT",
    "on_major_fault": "PERF_EVENT",
    "on_add": "RAW_TRACEPOINT",
    "on_evict": "RAW_TRACEPOINT",
    "on_read": "RAW_TRACEPOINT",
    "on_read_call": "KPROBE",
    "on_flush": "RAW_TRACEPOINT",
    "on_graph": "UPROBE",
    "on_graph_return": "UPROBE",
    "on_operator": "UPROBE",
    "on_fused": "UPROBE",
    "on_get_rows": "UPROBE",
}
"""BPF programs and their kinds (kernel.KINDS); some raw tracepoints are typed ones, if their point says so."""

_TYPED: Final = {p.program: p.name for p in KERNEL_POINTS if isinstance(p, Tracepoint) and p.typed}

_MAPS: Final = (
    *("ring", "slots", "targets", "ranges", "file_ids", "files", "aliases"),
    *("bounds", "counters", "seen", "accounts", "config", "ops"),
)
# System calls by number, x86-64: arch/x86/entry/syscalls/syscall_64.tbl
_SYSCALLS_X86_64: Final = {
    "read": 0, "pread64": 17, "readv": 19, "preadv": 295, "preadv2": 327, "sendfile": 40, "splice": 275,
    "copy_file_range": 326, "io_uring_enter": 426, "mmap": 9, "mlock": 149, "mlock2": 325, "mlockall": 151,
    "madvise": 28, "process_madvise": 440, "fadvise64": 221, "readahead": 187,
}  # fmt: skip
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_ORIG_AX_OFFSET, _R9_OFFSET = 120, 64  # struct pt_regs, arch/x86/include/uapi/asm/ptrace.h


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the maps are made; all memory is bounded by these.

    Attributes:
        ring_bytes: the ring, a power of two.
        bounds: extents of all traced models together; one takes 80 bytes. A model needs about 4 a tensor.
        model_bytes: bytes of all traced models together whose re-reads can be told (one bit a page).
        ranges: mapped stretches of model files, all processes.
        threads: threads of traced processes that can be in a fault at once.
        bare: faults, pages and operators are not looked at; the programs are there to be entered and left.
    """

    ring_bytes: int = 16 << 20
    bounds: int = 1 << 16
    model_bytes: int = 256 << 30
    ranges: int = 4096
    threads: int = 8192
    bare: bool = False


@dataclass(slots=True)
class Programs:
    """What was loaded: descriptors of programs and maps, why others were refused, and what it took.

    ``needs_admin``: uprobes take CAP_SYS_ADMIN here.
    """

    programs: dict[str, int]
    maps: dict[str, int]
    refused: dict[str, str]
    compile_seconds: float
    compile_rss_bytes: int
    headers: str
    bcc_version: str
    needs_admin: bool = False
    sizes: Sizes = field(default_factory=Sizes)

    def close(self) -> None:
        """Close all descriptors; the kernel then frees what nothing is attached to."""
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)
        self.programs.clear()
        self.maps.clear()


def bpf_folder() -> Path:
    """Return the folder of the BPF sources: in the package (wheel) or beside it (checkout)."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "bpf", package.parent / "bpf"):
        if (folder / "common.h").is_file():
            return folder
    raise LlmtracedError(f"the BPF sources are missing beside {package}; install llmtraced again")


def source() -> str:
    """Return the one text that is compiled: generated defines, then the sources in their order."""
    folder = bpf_folder()
    parts = ["common.h", "faults.bpf.c", "pagecache.bpf.c", "ggml.bpf.c"]
    return schema.c_header() + "\n".join((folder / part).read_text() for part in parts)


def _steps(n: int) -> int:
    return max(n, 2).bit_length() + 1


def compile_flags(sizes: Sizes, cpus: int, layout: Mapping[str, int]) -> list[str]:
    """Return the -D flags: map sizes, where the kernel's fields lie (``btf.kernel_layout``), system call numbers."""
    if os.uname().machine != "x86_64":
        raise LlmtracedError(f"llmtraced runs on x86_64, this is {os.uname().machine}", UNSUPPORTED)
    defines = {
        "LT_RING_PAGES": sizes.ring_bytes // schema.PAGE,
        "LT_WAKE_EVENTS": max(sizes.ring_bytes // 64 // 8, 1),
        "LT_BOUNDS": sizes.bounds,
        "LT_BOUND_STEPS": _steps(sizes.bounds),
        "LT_RANGES": sizes.ranges,
        "LT_RANGE_STEPS": _steps(sizes.ranges),
        "LT_FILES": FILES,
        "LT_SEEN_WORDS": sizes.model_bytes // schema.PAGE // 64,
        "LT_THREADS": sizes.threads,
        "LT_BARE": int(sizes.bare),
        "LT_ACCOUNTS": cpus * schema.SLOTS * schema.EPOCHS * len(schema.Probe),
        "LT_PAGE_SHIFT": schema.PAGE.bit_length() - 1,
        "LT_RUN_CHUNKS": 96,
        "LT_ROUTE_RECORDS": 2048,
        "LT_OP_THREADS": OP_THREADS,
        "LT_OPS": OP_RECORDS,
        "LT_TENSOR_BYTES": OPERATOR_BYTES,
        "LT_COOKIE_METHOD": kernel.COOKIE_METHOD,
        "LT_SYSCALL_OFFSET": _ORIG_AX_OFFSET,
        "LT_SIXTH_OFFSET": _R9_OFFSET,  # of a system call's arguments
        **layout,
        **_pid_namespace(),
        **{f"SYSCALL_{name}": number for name, number in _SYSCALLS_X86_64.items()},
    }
    return [f"-D{name}={value}" for name, value in defines.items()]


def _pid_namespace(ours: Path = Path("/proc/self/ns/pid")) -> dict[str, int]:
    """Return what the programs must know to number processes as we do; the first pid namespace is 0."""
    device, inode = kernel_device(ours)
    return {"LT_PIDNS_DEV": device, "LT_PIDNS_INO": 0 if inode == _FIRST_PID_NAMESPACE else inode}


def load(sizes: Sizes | None = None, *, anew: bool = False) -> Programs:
    """Load everything, compiled in a child or kept from the last time, and return the descriptors.

    Args:
        sizes: of the maps.
        anew: compile, whatever is kept.

    Raises:
        LlmtracedError: no permission, no BCC, no headers, or the maps cannot be made. A single program that the
            kernel refuses is not an error here: it is in ``refused``.
    """
    sizes = sizes or Sizes()
    started = time.monotonic()
    depends = [source(), *compile_flags(sizes, possible_cpus(), {}), json.dumps([{**PROGRAMS}, _TYPED, _MAPS])]
    found = compiler.image("llmtraced.probes.loader", json.dumps(asdict(sizes)), depends, anew=anew)
    programs, maps, refused = load_image(found, _MAPS)
    return Programs(
        programs,
        maps,
        refused | found.about["absent"],
        compile_seconds=round(time.monotonic() - started, 3),
        compile_rss_bytes=found.about["compile_rss_bytes"],
        headers=found.about["headers"],
        bcc_version=found.about["bcc_version"],
        needs_admin="on_graph" not in programs or not kernel.has_uprobe_links(programs["on_graph"]),
        sizes=sizes,
    )


def load_image(image: Image, maps: Sequence[str]) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Do what :meth:`Image.load` does.

    Raises:
        LlmtracedError: a map cannot be made.
    """
    try:
        return image.load(maps)
    except OSError as error:
        raise LlmtracedError(f"cannot load the BPF programs: {error}", UNSUPPORTED) from error


def _compile(sizes: Sizes) -> Image:
    types = btf.running()
    flags = compile_flags(sizes, possible_cpus(), btf.kernel_layout(types))
    programs: dict[str, tuple[str, int]] = {}
    absent: dict[str, str] = {}
    for name, kind in PROGRAMS.items():
        try:
            typed = name in _TYPED
            programs[name] = ("TYPED_TRACEPOINT", types.tracepoint_type(_TYPED[name])) if typed else (kind, 0)
        except LlmtracedError as error:
            absent[name] = str(error)
    return compiler.compiled(source(), flags, programs, _MAPS, absent=absent)


def possible_cpus() -> int:
    """Return one more than the highest CPU number that can ever come online."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


if __name__ == "__main__":
    compiler.answer(int(sys.argv[1]), lambda: _compile(Sizes(**json.loads(sys.argv[2]))))
