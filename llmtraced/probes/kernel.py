"""The system calls that probes need: bpf(2), perf_event_open(2), and maps as numpy arrays.

Everything here takes and gives plain descriptors, so that attaching needs no BPF library. Numbers and structures are
those of include/uapi/linux/bpf.h and perf_event.h, for x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError

__all__ = [
    "COOKIE_METHOD",
    "KINDS",
    "PERF_EVENTS",
    "MapInfo",
    "create_map",
    "emulated",
    "has_uprobe_links",
    "load_program",
    "map_array",
    "map_delete",
    "map_info",
    "map_lookup",
    "map_update",
    "online_cpus",
    "open_kprobe",
    "open_software_event",
    "open_tracepoint",
    "open_uprobe",
    "open_uprobes",
    "perf_events_refused",
    "program_misses",
    "run_on_cpu",
    "time_enabled",
    "try_bpf",
    "try_software_event",
]

PERF_EVENTS: Final = "sysctl kernel.perf_event_paranoid=2, or give it CAP_SYS_ADMIN"
"""What lets a process with CAP_PERFMON open perf events on a kernel that asks for more, as Debian's do."""

_NR_PERF_EVENT_OPEN = 298
_NR_BPF = 321
_BPF_MAP_CREATE, _BPF_MAP_LOOKUP_ELEM, _BPF_MAP_UPDATE_ELEM, _BPF_MAP_DELETE_ELEM = 0, 1, 2, 3
_BPF_PROG_LOAD, _BPF_PROG_TEST_RUN, _BPF_OBJ_GET_INFO_BY_FD, _BPF_RAW_TRACEPOINT_OPEN = 5, 10, 15, 17
_BPF_LINK_CREATE = 28
_BPF_PERF_EVENT, _BPF_TRACE_UPROBE_MULTI = 41, 48
_BPF_F_UPROBE_MULTI_RETURN = 1
_PERF_TYPE_SOFTWARE = 1
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_FORMAT_TOTAL_TIME_ENABLED = 1
_PERF_EVENT_IOC_ENABLE, _PERF_EVENT_IOC_SET_BPF = 0x2400, 0x40042408
_NO_DESCRIPTOR = 0xFFFFFFFF  # -1 in the u32 that the system call reads
_PERF_ATTR_SIZE = 112  # PERF_ATTR_SIZE_VER5
_PMUS = Path("/sys/bus/event_source/devices")
_UPROBE_PMU = _PMUS / "uprobe"

_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_REALIGNED = re.compile(
    rb"\x4c\x8d\x54\x24.\x48(?:\x83\xe4.|\x81\xe4.{4})(?:\x48\x89[\xc0\xc8\xd0\xd8\xe0\xe8\xf0\xf8])?\x41\xff\x72.",
    re.DOTALL,
)
"""``lea N(%rsp), %r10; and $-ALIGNMENT, %rsp; (mov …, %rax;) push -8(%r10)``: how functions with wide vectors on the
stack begin."""
_EMULATED = re.compile(rb"A?[\x50-\x57]|\x90|\x0f\x1f|[\xe8\xe9\xeb]|[\x70-\x7f]", re.DOTALL)

COOKIE_METHOD = 1 << 8
"""Beside the slot in a uprobe's cookie: the function is a C++ method, with ``this`` before its other arguments."""

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attr: bytes) -> bytes:
    """Call bpf(2) and return what it has made of ``attr``."""
    return _called(command, attr)[1]


def _bpf_fd(command: int, attr: bytes) -> int:
    """Call bpf(2) and return the descriptor that it returns."""
    return _called(command, attr)[0]


def _called(command: int, attr: bytes) -> tuple[int, bytes]:
    buffer = ctypes.create_string_buffer(attr, max(len(attr), 128))
    result = int(_libc.syscall(_NR_BPF, command, buffer, len(buffer)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result, buffer.raw


def _address(data: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(data)


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Set ``map[key] = value``; both in the map's own layout."""
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _bpf(_BPF_MAP_UPDATE_ELEM, struct.pack("<I4xQQQ", fd, _address(k), _address(v), 0))


def map_delete(fd: int, key: bytes) -> None:
    """Delete ``map[key]``; a key that is not there is no error."""
    k = ctypes.create_string_buffer(key, len(key))
    with contextlib.suppress(FileNotFoundError):
        _bpf(_BPF_MAP_DELETE_ELEM, struct.pack("<I4xQQQ", fd, _address(k), 0, 0))


def map_lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """Return ``map[key]`` (``size`` bytes), or None."""
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    try:
        _bpf(_BPF_MAP_LOOKUP_ELEM, struct.pack("<I4xQQQ", fd, _address(k), _address(v), 0))
    except FileNotFoundError:
        return None
    return v.raw


def try_bpf() -> int:
    """Return the errno of a bpf(2) that fails in any case: EBADF if the system call can be made."""
    try:
        map_lookup(_NO_DESCRIPTOR, bytes(4), 4)
    except OSError as error:
        return error.errno or 0
    return 0


def try_software_event() -> int:
    """Return the errno of opening a software event, as :func:`open_software_event` does; 0 if it can be had."""
    try:
        os.close(_open_perf_event(_attr(_PERF_TYPE_SOFTWARE, 5, period=1), -1, online_cpus()[0]))
    except OSError as error:
        return error.errno or 0
    return 0


def perf_events_refused() -> bool:
    """Tell whether this process may not open perf events; :data:`PERF_EVENTS` is what lets it."""
    return try_software_event() in (errno.EACCES, errno.EPERM)


def map_array(fd: int, dtype: np.dtype[Any], entries: int) -> NDArray[Any]:
    """Return an array map (BPF_F_MMAPABLE) as a writable numpy array that shares the kernel's memory.

    Args:
        fd: the map.
        dtype: of an element; the kernel pads elements to 8 bytes, so must the dtype be.
        entries: number of elements.
    """
    assert dtype.itemsize % 8 == 0
    size = -(-entries * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(memory, dtype=dtype, count=entries)


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What a map is: its name, type (BPF_MAP_TYPE_*), bytes of a key and a value, entries, flags (BPF_F_*)."""

    name: str
    type: int
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int


def map_info(fd: int, name: str = "") -> MapInfo:
    """Return what a map is; ``name``: what to call it, for the kernel cuts names off after 15 characters."""
    info = ctypes.create_string_buffer(128)  # bpf_map_info: type, id, key_size, value_size, max_entries, flags, name
    _bpf(_BPF_OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", fd, len(info), _address(info)))
    kind, _, key, value, entries, flags, cut = struct.unpack_from("<6I16s", info.raw)
    return MapInfo(name or cut.rstrip(b"\0").decode(), kind, key, value, entries, flags)


def create_map(info: MapInfo) -> int:
    """Make a map and return its descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    sizes = (info.type, info.key_bytes, info.value_bytes, info.entries, info.flags)
    attr = struct.pack("<5I8x15sx", *sizes, info.name.encode())  # 8: inner_map_fd, numa_node
    try:
        return _bpf_fd(_BPF_MAP_CREATE, attr)
    except PermissionError:  # before 5.11 maps are charged to this limit
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return _bpf_fd(_BPF_MAP_CREATE, attr)


KINDS: Final = {
    "RAW_TRACEPOINT": (17, 0),
    "TYPED_TRACEPOINT": (26, 23),
    "PERF_EVENT": (7, 0),
    "KPROBE": (2, 0),
    "UPROBE": (2, 48),
}
"""Kinds of programs: BPF_PROG_TYPE_*, BPF_* to attach as. A typed one is for one raw tracepoint, whose arguments' types
the verifier takes from the kernel's BTF (5.5). Kernels before 6.6, which do not know uprobe links (48,
BPF_TRACE_UPROBE_MULTI), do not look at what a program of type KPROBE (2) is loaded for."""


def load_program(name: str, instructions: bytes, kind: str, btf_type: int = 0) -> int:
    """Load a program and return its descriptor.

    Args:
        name: of the program.
        instructions: compiled, 8 bytes each, with the descriptors of its maps in them.
        kind: of :data:`KINDS`.
        btf_type: of a typed tracepoint, number of its type, ``btf_trace_NAME``.

    Raises:
        OSError: the kernel refuses it; with the end of what the verifier said.
    """
    number, attach_type = KINDS[kind]
    code, license_ = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(b"GPL")
    # prog_type, insn_cnt, insns, license; then log_level, log_size, log_buf; then kern_version, prog_flags, prog_name,
    # prog_ifindex, expected_attach_type, prog_btf_fd and six more for functions and lines, attach_btf_id
    head = struct.pack("<IIQQ", number, len(instructions) // 8, _address(code), _address(license_))
    tail = struct.pack("<II15sxII36xI", 0, 0, name.encode(), 0, attach_type, btf_type)

    def load(log: bytes) -> int:
        return _bpf_fd(_BPF_PROG_LOAD, (head + log + tail).ljust(144, b"\0"))

    try:
        return load(struct.pack("<IIQ", 0, 0, 0))
    except OSError as error:  # again, to hear why
        said = ctypes.create_string_buffer(1 << 20)
        with contextlib.suppress(OSError):
            return load(struct.pack("<IIQ", 1, len(said), _address(said)))
        lines = said.value.decode(errors="replace").strip().splitlines()[-8:]
        raise OSError(error.errno, "; ".join([os.strerror(error.errno or 0), *lines])) from error


def run_on_cpu(program: int, cpu: int) -> int:
    """Run a raw tracepoint program once, on ``cpu``, and return its result (5.10 and later)."""
    # prog_fd, retval, data_size_in/out, data_in/out, repeat, duration, ctx_size_in/out, ctx_in/out, flags, cpu
    attr = struct.pack("<IIIIQQIIIIQQII", program, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, cpu)
    return int(struct.unpack_from("<I", _bpf(_BPF_PROG_TEST_RUN, attr), 4)[0])


def program_misses(program: int) -> int:
    """Return how often the kernel skipped the program because another ran on that CPU (5.12 and later, else 0)."""
    info = ctypes.create_string_buffer(232)
    _bpf(_BPF_OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", program, len(info), _address(info)))
    return int(struct.unpack_from("<Q", info.raw, 208)[0])  # bpf_prog_info.recursion_misses


def online_cpus() -> list[int]:
    """Return the numbers of the CPUs that are online."""
    cpus: list[int] = []
    for part in Path("/sys/devices/system/cpu/online").read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def _open_perf_event(attr: bytes, pid: int, cpu: int) -> int:
    buffer = ctypes.create_string_buffer(attr, _PERF_ATTR_SIZE)
    fd = int(_libc.syscall(_NR_PERF_EVENT_OPEN, buffer, pid, cpu, -1, _PERF_FLAG_FD_CLOEXEC))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def _perf_event_open(attr: bytes, pid: int, cpu: int, what: str) -> int:
    try:
        return _open_perf_event(attr, pid, cpu)
    except OSError as error:
        raise _cannot_attach(what, error.errno or 0) from error


def _cannot_attach(what: str, code: int) -> LlmtracedError:
    reason = "this kernel has no such point" if code == errno.ENOENT else os.strerror(code)
    exit_code = NO_PERMISSION if code in (errno.EPERM, errno.EACCES) else UNSUPPORTED
    return LlmtracedError(f"cannot attach to {what}: {reason}", exit_code)


def _attr(kind: int, config: int, *, period: int = 0, config1: int = 0, config2: int = 0) -> bytes:
    # type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type, config1, config2
    form = _PERF_FORMAT_TOTAL_TIME_ENABLED
    head = struct.pack("<IIQQQQQIIQQ", kind, _PERF_ATTR_SIZE, config, period, 0, form, 1, 0, 0, config1, config2)
    return head.ljust(_PERF_ATTR_SIZE, b"\0")


def _start(fd: int, program: int, what: str) -> int:
    try:
        fcntl.ioctl(fd, _PERF_EVENT_IOC_SET_BPF, program)
        fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError as error:
        os.close(fd)
        raise LlmtracedError(f"cannot attach to {what}: {error.strerror}", UNSUPPORTED) from error
    return fd


def open_tracepoint(name: str, program: int, what: str, *, typed: bool = False) -> int:
    """Attach ``program`` on all CPUs; closing the returned descriptor detaches it.

    It is of type RAW_TRACEPOINT or, if ``typed``, was loaded for this tracepoint (kind TYPED_TRACEPOINT).
    """
    text = ctypes.create_string_buffer(name.encode())
    buffer = ctypes.create_string_buffer(struct.pack("<QI", 0 if typed else _address(text), program), 128)
    fd = int(_libc.syscall(_NR_BPF, _BPF_RAW_TRACEPOINT_OPEN, buffer, len(buffer)))
    if fd < 0:
        raise _cannot_attach(what, ctypes.get_errno())
    return fd


def open_software_event(config: int, cpu: int, program: int, what: str) -> int:
    """Attach ``program`` to every occurrence of a software event on ``cpu``; closing the descriptor detaches it."""
    # A period of 1 is never throttled: the kernel throttles only the second and later samples of one occurrence.
    return _start(_perf_event_open(_attr(_PERF_TYPE_SOFTWARE, config, period=1), -1, cpu, what), program, what)


def time_enabled(fd: int) -> int:
    """Return for how long a software event has counted, ns: as long as it does, this rises from call to call."""
    return int(struct.unpack("<QQ", os.read(fd, 16))[1])  # value, time_enabled


def open_kprobe(function: str, program: int, what: str) -> int:
    """Attach ``program``, of type KPROBE, to the entry of a kernel function; closing the descriptor detaches it."""
    try:
        kind = int((_PMUS / "kprobe/type").read_text())
    except OSError as error:
        raise LlmtracedError(f"cannot attach to {what}: this kernel has no kprobes", UNSUPPORTED) from error
    name = ctypes.create_string_buffer(function.encode())
    return _start(_perf_event_open(_attr(kind, 0, config1=_address(name)), -1, 0, what), program, what)


def _code(path: str, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as stream:  # noqa: PTH123  a path in /proc
            return os.pread(stream.fileno(), length, offset)
    except OSError:
        return b""  # attaching will say what is wrong


def _first(path: str, offset: int, *, on_return: bool = False) -> int:
    """Return where in the function at ``offset`` a probe goes: behind what changes none of its arguments.

    The kernel emulates the ``push`` that most functions begin with, but single-steps an ``endbr64``, and what aligns a
    stack, in a copy: measured, 0.7 against 10.9 us a hit (6.18). A return is told by the stack as it is on entry, so
    that a probe on returns goes behind the ``endbr64`` only.
    """
    code = _code(path, offset, 32)
    length = len(_ENDBR64) if code.startswith(_ENDBR64) else 0
    aligned = None if on_return else _REALIGNED.match(code, length)
    return offset + (aligned.end() if aligned else length)


def emulated(path: str, offset: int) -> bool:
    """Tell whether the kernel emulates the instruction that a uprobe there replaces (arch/x86/kernel/uprobes.c)."""
    return _EMULATED.match(_code(path, _first(path, offset), 2)) is not None


def open_uprobe(
    path: str, offset: int, pid: int, program: int, what: str, *, on_return: bool = False, cookie: int = 0
) -> int:
    """Attach ``program`` at ``offset`` in the file ``path``, in process ``pid`` only.

    Args:
        path: the library or executable, reachable from here (``/proc/PID/map_files/…`` for other mount namespaces).
        offset: of the instruction in the file, bytes.
        pid: the process; its threads are included, its children are not.
        program: of type KPROBE.
        what: for the error message.
        on_return: attach to the function's return.
        cookie: what ``bpf_get_attach_cookie`` gives the program.
    """
    offset = _first(path, offset, on_return=on_return)
    with contextlib.suppress(OSError):  # 6.6; the other way takes CAP_SYS_ADMIN (perf_uprobe_event_init)
        return _uprobe_link(path, {offset: cookie}, pid, program, on_return=on_return)
    try:
        kind = int((_UPROBE_PMU / "type").read_text())
        bit = int((_UPROBE_PMU / "format/retprobe").read_text().strip().removeprefix("config:"))
    except OSError as error:
        raise LlmtracedError(f"this kernel has no uprobes (CONFIG_UPROBE_EVENTS): {error}", UNSUPPORTED) from error
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = _attr(kind, (1 << bit) if on_return else 0, config1=_address(name), config2=offset)
    event = _perf_event_open(attr, pid, -1, what)
    try:  # a link, and not the ioctl, for its cookie (5.15); it holds the event
        link = _bpf_fd(_BPF_LINK_CREATE, struct.pack("<IIIIQ", program, event, _BPF_PERF_EVENT, 0, cookie))
        fcntl.ioctl(event, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError as error:
        raise LlmtracedError(f"cannot attach to {what}: {error.strerror}", UNSUPPORTED) from error
    finally:
        os.close(event)
    return link


def open_uprobes(path: str, cookies: Mapping[int, int], pid: int, program: int, what: str) -> int:
    """Attach ``program`` to functions' entries, in process ``pid`` only (6.6); closing detaches from all.

    Args:
        path: as for :func:`open_uprobe`.
        cookies: what ``bpf_get_attach_cookie`` gives the program, by the function's offset in the file.
        pid: the process.
        program: of kind UPROBE.
        what: for the error message.
    """
    try:
        firsts = {_first(path, offset): cookie for offset, cookie in cookies.items()}
        return _uprobe_link(path, firsts, pid, program)
    except OSError as error:
        raise _cannot_attach(what, error.errno or 0) from error


def has_uprobe_links(program: int) -> bool:
    """Tell whether uprobes can be had without perf events, and so without CAP_SYS_ADMIN (6.6)."""
    try:  # the head of an executable is mapped, and never executed
        os.close(_uprobe_link("/proc/self/exe", {0: 0}, os.getpid(), program))
    except OSError:
        return False
    return True


def _uprobe_link(
    path: str,
    cookies: Mapping[int, int],
    pid: int,
    program: int,
    *,
    on_return: bool = False,
) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    n = len(cookies)
    offsets, values = (ctypes.c_uint64 * n)(*cookies), (ctypes.c_uint64 * n)(*cookies.values())
    # prog_fd, target_fd, attach_type, flags; then path, offsets, ref_ctr_offsets, cookies, cnt, flags, pid
    head = struct.pack("<IIII", program, 0, _BPF_TRACE_UPROBE_MULTI, 0)
    addresses = ctypes.addressof(name), ctypes.addressof(offsets), 0, ctypes.addressof(values)
    flags = _BPF_F_UPROBE_MULTI_RETURN if on_return else 0
    return _bpf_fd(_BPF_LINK_CREATE, head + struct.pack("<QQQQIII", *addresses, n, flags, pid))
