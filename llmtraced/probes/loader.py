"""Compile and load the BPF programs: the only module that imports BCC.

BCC brings LLVM, 150 MB of it, needed for seconds. So it runs in a child (this module as a program) which compiles,
loads, sends the descriptors of the programs and maps over a socket and exits; :func:`load` in the parent keeps only
descriptors.
"""

from __future__ import annotations

import array
import importlib.util
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from llmtraced import children, headers, schema
from llmtraced.capabilities import can_load, held
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import OPERATOR_BYTES
from llmtraced.probes import KERNEL_POINTS, btf, kernel
from llmtraced.probes.points import Tracepoint
from llmtraced.probes.shared import OP_RECORDS
from llmtraced.target import kernel_device

__all__ = [
    "FILES",
    "OP_THREADS",
    "PROGRAMS",
    "Programs",
    "Sizes",
    "answer",
    "bpf_folder",
    "compile_flags",
    "compile_in_child",
    "import_bcc",
    "load",
    "source",
]

log = logging.getLogger(__name__)

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
"""BPF programs and their types; uprobes are of type KPROBE as well, in ways that BCC does not know."""

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
_HEADERS_TRIED: Final = 3
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_ORIG_AX_OFFSET: Final = 120  # struct pt_regs, arch/x86/include/uapi/asm/ptrace.h
_DISTRIBUTION_BCC: Final = ("/usr/lib/python3/dist-packages", "/usr/lib/python3*/site-packages")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the maps are made; all memory is bounded by these.

    Attributes:
        ring_bytes: the ring, a power of two.
        bounds: extents of all traced models together; one takes 80 bytes. A model needs about 4 a tensor.
        model_bytes: bytes of all traced models together whose re-reads can be told (one bit a page).
        ranges: mapped stretches of model files, all processes.
        threads: threads of traced processes that can be in a fault at once.
    """

    ring_bytes: int = 16 << 20
    bounds: int = 1 << 16
    model_bytes: int = 256 << 30
    ranges: int = 4096
    threads: int = 8192


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
        "LT_ACCOUNTS": cpus * schema.SLOTS * schema.EPOCHS * len(schema.Probe),
        "LT_PAGE_SHIFT": schema.PAGE.bit_length() - 1,
        "LT_RUN_CHUNKS": 96,
        "LT_ROUTE_RECORDS": 2048,
        "LT_OP_THREADS": OP_THREADS,
        "LT_OPS": OP_RECORDS,
        "LT_TENSOR_BYTES": OPERATOR_BYTES,
        "LT_COOKIE_METHOD": kernel.COOKIE_METHOD,
        "LT_SYSCALL_OFFSET": _ORIG_AX_OFFSET,
        **layout,
        **_pid_namespace(),
        **{f"SYSCALL_{name}": number for name, number in _SYSCALLS_X86_64.items()},
    }
    return [f"-D{name}={value}" for name, value in defines.items()]


def _pid_namespace(ours: Path = Path("/proc/self/ns/pid")) -> dict[str, int]:
    """Return what the programs must know to number processes as we do; the first pid namespace is 0."""
    device, inode = kernel_device(ours)
    return {"LT_PIDNS_DEV": device, "LT_PIDNS_INO": 0 if inode == _FIRST_PID_NAMESPACE else inode}


def import_bcc() -> Any:
    """Import BCC: as any module, else from where distributions put it for their own Python.

    BCC's Python part is plain ctypes code, so the distribution's copy works in any virtual environment.

    Raises:
        LlmtracedError: it is not installed; the message names the packages.
    """
    try:
        import bcc
    except ImportError:
        bcc = None
    if bcc is not None and hasattr(bcc, "BPF"):
        return bcc
    folders = [f for pattern in _DISTRIBUTION_BCC for f in sorted(Path("/").glob(pattern.lstrip("/")))]
    for folder in folders:
        init = folder / "bcc" / "__init__.py"
        if init.is_file():
            spec = importlib.util.spec_from_file_location("bcc", init, submodule_search_locations=[str(init.parent)])
            if spec is None or spec.loader is None:
                continue
            module = importlib.util.module_from_spec(spec)
            sys.modules["bcc"] = module
            spec.loader.exec_module(module)
            return module
    raise LlmtracedError(
        "BCC is not installed; apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)",
        UNSUPPORTED,
    )


def compile_in_child(module: str, argument: str) -> tuple[dict[str, Any], list[int]]:
    """Run ``python -m module FD argument``, whose :func:`answer` comes back over the socket FD, and return it.

    BCC may be too old for the headers that are tried first: if it fails, others are.

    Raises:
        LlmtracedError: no permission, or what went wrong in the (first) child.
    """
    if not can_load(held()):
        raise LlmtracedError("loading BPF programs needs root, or CAP_BPF and CAP_PERFMON", NO_PERMISSION)
    first: LlmtracedError | None = None
    for skip in range(_HEADERS_TRIED):
        try:
            return _compile_in_child(module, argument, skip)
        except LlmtracedError as error:
            first = first or error
            if error.exit_code != UNSUPPORTED or not _others(skip + 1):
                break
            log.info("%s; trying other kernel headers", str(error).partition("\n")[0])
    assert first is not None
    raise first


def _others(tried: int) -> bool:
    """Tell whether there are more kernel headers than those that have been tried."""
    try:
        return len(headers.candidates()) > tried
    except LlmtracedError:
        return False


def _compile_in_child(module: str, argument: str, skip: int) -> tuple[dict[str, Any], list[int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    # A file, not a pipe: nobody reads what the verifier has to say before the child is done.
    with ours, theirs, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), argument],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=children.environment(**{headers.SKIP: str(skip)}),
        )
        theirs.close()
        fds: list[int] = []
        message = bytearray()
        while True:
            data, ancillary, _, _ = ours.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4))
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                    fds += received
            if not data:
                break
            message += data
        child.wait()
        said.seek(max(said.seek(0, os.SEEK_END) - (1 << 16), 0))
        output = said.read().decode(errors="replace")
    reply: dict[str, Any] = (
        json.loads(message) if message else {"error": "it ended without an answer", "exit_code": UNSUPPORTED}
    )
    if "error" in reply:
        log.debug("BPF compiler said: %s", output)
        detail = "" if "remedy" in reply or not output.strip() else "\n" + output.strip()[-2000:]
        raise LlmtracedError(f"cannot load the BPF programs: {reply['error']}{detail}", reply["exit_code"])
    return reply, fds


def load(sizes: Sizes | None = None) -> Programs:
    """Compile and load everything in a child and return the descriptors.

    Raises:
        LlmtracedError: no permission, no BCC, no headers, or the maps cannot be made. A single program that the
            kernel refuses is not an error here: it is in ``refused``.
    """
    sizes = sizes or Sizes()
    reply, fds = compile_in_child("llmtraced.probes.loader", json.dumps(asdict(sizes)))
    names = reply.pop("names")
    descriptors = dict(zip(names, fds, strict=True))
    return Programs(
        programs={n: fd for n, fd in descriptors.items() if n in PROGRAMS},
        maps={n: fd for n, fd in descriptors.items() if n not in PROGRAMS},
        sizes=sizes,
        **reply,
    )


def _compile(sizes: Sizes) -> tuple[dict[str, int], dict[str, Any]]:
    started = time.monotonic()
    bcc = import_bcc()
    found = headers.find()
    types = btf.running()
    flags = compile_flags(sizes, possible_cpus(), btf.kernel_layout(types))
    try:
        with headers.presented(found):
            bpf = bcc.BPF(text=source(), cflags=["-Wno-macro-redefined", *flags])
    except Exception as error:
        raise LlmtracedError(f"BCC cannot compile them ({error})", UNSUPPORTED) from error
    descriptors: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, kind in PROGRAMS.items():
        try:
            if name in _TYPED:  # BCC cannot say for which tracepoint
                number = types.tracepoint_type(_TYPED[name])
                descriptors[name] = kernel.load_typed_tracepoint(name, bpf.dump_func(name.encode()), number)
            elif kind == "UPROBE":
                descriptors[name] = kernel.load_uprobe(name, bpf.dump_func(name.encode()))
            else:
                descriptors[name] = bpf.load_func(name, getattr(bcc.BPF, kind)).fd
        except Exception as error:
            refused[name] = str(error)
    for name in _MAPS:
        descriptors[name] = bpf[name].map_fd
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    keep_alive.append(bpf)
    return descriptors, {
        "names": list(descriptors),
        "refused": refused,
        "compile_seconds": round(time.monotonic() - started, 3),
        "compile_rss_bytes": int(peak[1]) * 1024 if peak else 0,
        "headers": str(found),
        "needs_admin": "on_graph" not in descriptors or not kernel.has_uprobe_links(descriptors["on_graph"]),
        "bcc_version": str(getattr(bcc, "__version__", "?")),
    }


keep_alive: list[Any] = []  # BCC closes its descriptors when its object goes


def possible_cpus() -> int:
    """Return one more than the highest CPU number that can ever come online."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def answer(fd: int, compiled: Callable[[], tuple[dict[str, int], dict[str, Any]]]) -> None:
    """Send what ``compiled`` returns (descriptors by name, and what else is to be said), or its error, over ``fd``."""
    with socket.socket(fileno=fd) as parent:
        try:
            descriptors, reply = compiled()
        except LlmtracedError as error:
            parent.sendall(json.dumps({"error": str(error), "exit_code": error.exit_code}).encode())
            return
        fds = array.array("i", descriptors.values())
        parent.sendmsg([json.dumps(reply).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


if __name__ == "__main__":
    answer(int(sys.argv[1]), lambda: _compile(Sizes(**json.loads(sys.argv[2]))))
