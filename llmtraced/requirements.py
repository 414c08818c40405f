"""What a machine must have, and how to get what it lacks: all that can be told without loading a program.

Each requirement is a :class:`Check`; :mod:`llmtraced.checks` goes on from here and loads, attaches and counts.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from llmtraced import children, headers
from llmtraced.capabilities import can_load, held
from llmtraced.cgroup import Cgroup, cgroup_of
from llmtraced.errors import LlmtracedError, printable
from llmtraced.probes import btf as kernel_types
from llmtraced.probes import kernel

__all__ = ["IN_CONTAINER", "Check", "Status", "all_fine", "distribution", "read_text", "system"]

Status = Literal["ok", "missing", "degraded", "unknown"]

_WITHOUT: Final = {
    "CAP_SYS_PTRACE": "no CAP_SYS_PTRACE, operators and experts cannot be told, other users' processes not be seen",
    "CAP_DAC_READ_SEARCH": "no CAP_DAC_READ_SEARCH, models that others may not read cannot be understood",
    "CAP_CHECKPOINT_RESTORE": "no CAP_CHECKPOINT_RESTORE, models that were deleted or replaced cannot be reached",
}
_PACKAGES: Final = {
    # distribution: (kernel headers, BCC)
    "debian": ("apt-get install linux-headers-$(uname -r) || apt-get install linux-headers-amd64", "python3-bpfcc"),
    "ubuntu": ("apt-get install linux-headers-$(uname -r) || apt-get install linux-headers-generic", "python3-bpfcc"),
    "fedora": ("dnf install kernel-devel-$(uname -r) || dnf install kernel-devel", "python3-bcc"),
    "arch": ("pacman -S linux-headers", "python-bcc"),
    "suse": ("zypper install kernel-default-devel", "python3-bcc"),
}
IN_CONTAINER: Final = "in a container: docker run --privileged --pid=host …; or run llmtraced on the host"
_ENOUGH_BYTES: Final = 400 << 20  # compiling takes 230 MB for seconds, the maps some 60 MB


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement.

    Attributes:
        name: stable; scripts may look for it.
        status: ``missing`` is a failure if ``required``; ``unknown``: it could not be tried.
        detail: what was found, or what is lost.
        remedy: the command to run, or what to change; empty if nothing needs to be done.
        required: whether tracing is impossible without it.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    required: bool = True


def all_fine(checks: Sequence[Check]) -> bool:
    """Tell whether nothing that is required is missing."""
    return not any(c.required and c.status in ("missing", "unknown") for c in checks)


def system() -> Iterator[Check]:
    """Yield what can be said without loading anything; one that cannot be looked at does not keep the others away."""
    status, here = read_text("/proc/self/status"), distribution(read_text("/etc/os-release"))
    group = cgroup_of(os.getpid())
    paranoid, lockdown = "/proc/sys/kernel/perf_event_paranoid", "/sys/kernel/security/lockdown"
    looks: Mapping[str, Callable[[], Check]] = {
        "privileges": lambda: privileges(os.geteuid(), status, read_text("/proc/self/uid_map")),
        "architecture": lambda: architecture(os.uname().machine),
        "perf events": lambda: perf_events(kernel.try_software_event(), read_text(paranoid), status),
        "bpf": lambda: bpf(kernel.try_bpf(), status, read_text(lockdown)),
        "btf": btf,
        "headers": lambda: kernel_headers(headers.find, here),
        "bcc": lambda: bcc(here),
        "memory": lambda: memory(read_text("/proc/meminfo"), group),
        "memory cgroups": lambda: cgroup(group),
    }
    for name, look in looks.items():
        try:
            yield look()
        except OSError as error:
            yield Check(name, "unknown", printable(str(error)))


def privileges(euid: int, status: str, uid_map: str) -> Check:
    """Check for capabilities (root's, or given to a user), and that they are not those of a user namespace only.

    Args:
        euid: effective user.
        status: ``/proc/self/status``.
        uid_map: ``/proc/self/uid_map``.
    """
    if uid_map.split()[:3] not in ([], ["0", "0", "4294967295"]):
        return Check("privileges", "missing", "root of a user namespace only (a rootless container)", IN_CONTAINER)
    has, who = held(status), "root" if euid == 0 else f"user {euid}"
    if not can_load(has):
        command = f"sudo {sys.executable} -m llmtraced {' '.join(sys.argv[1:])}".rstrip()
        text = f"{who} without CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON: cannot load BPF programs"
        return Check("privileges", "missing", text, IN_CONTAINER if euid == 0 else command)
    if "CAP_SYS_ADMIN" in has:
        has |= {"CAP_CHECKPOINT_RESTORE"}
    if lost := [text for name, text in _WITHOUT.items() if name not in has]:
        return Check("privileges", "degraded", f"{who} without some capabilities: {'; '.join(lost)}", IN_CONTAINER)
    return Check("privileges", "ok", f"{who}, with the capabilities that are needed")


def architecture(machine: str) -> Check:
    """Check the processor."""
    if machine == "x86_64":
        return Check("architecture", "ok", machine)
    return Check("architecture", "missing", f"{machine}; registers and system calls are known for x86_64 only")


def perf_events(result: int, paranoid: str, status: str) -> Check:
    """Check for perf events, by which faults are seen.

    Args:
        result: errno of opening one; 0 if it can be had.
        paranoid: ``/proc/sys/kernel/perf_event_paranoid``. Above 2 some distributions' kernels (Debian's) ask for
            CAP_SYS_ADMIN where others are content with CAP_PERFMON.
        status: ``/proc/self/status``.
    """
    if not paranoid:
        return Check("perf events", "missing", "this kernel has none", "a kernel with CONFIG_PERF_EVENTS=y")
    value = f"perf_event_paranoid is {paranoid.strip()}"
    if result == 0:
        return Check("perf events", "ok", f"{value}, which does not bind us")
    if result in (errno.EACCES, errno.EPERM) and "CAP_PERFMON" in held(status):
        detail = f"{value}, and CAP_PERFMON is not enough here"
        return Check("perf events", "missing", detail, kernel.PERF_EVENTS)
    return Check("perf events", "missing", f"{value}: {os.strerror(result)}", "root, or CAP_PERFMON")


def bpf(result: int, status: str, lockdown: str) -> Check:
    """Check for the system call that everything needs.

    Args:
        result: errno of a call with a bad descriptor.
        status: ``/proc/self/status``.
        lockdown: ``/sys/kernel/security/lockdown``, empty if there is none.
    """
    if "[confidentiality]" in lockdown:
        why = "the kernel is locked down (confidentiality): no BPF program may read memory"
        return Check("bpf", "missing", why, "boot with lockdown=integrity, or without Secure Boot")
    if result in (0, errno.EBADF):
        return Check("bpf", "ok", "the bpf system call works" + (f", lockdown: {lockdown.strip()}" if lockdown else ""))
    if result == errno.ENOSYS:
        return Check("bpf", "missing", "this kernel has no bpf system call", "a kernel with CONFIG_BPF_SYSCALL=y")
    filtered = re.search(r"^Seccomp:\s*2", status, re.MULTILINE)
    why = f"the bpf system call fails: {os.strerror(result)}"
    return Check("bpf", "missing", why + (" (a seccomp filter is in force)" if filtered else ""), IN_CONTAINER)


def distribution(os_release: str) -> str:
    """Return which family of package names ``/etc/os-release`` stands for; empty if none that we know."""
    fields = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)"?$', os_release, re.MULTILINE))
    words = f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".split()
    known = {"rhel": "fedora", "centos": "fedora", "opensuse": "suse", "sles": "suse"}
    return next((known.get(w, w) for w in words if known.get(w, w) in _PACKAGES), "")


def btf(vmlinux: Path = kernel_types.VMLINUX) -> Check:
    """Check for the kernel's own description of its types, and that its page cache is understood."""
    try:
        layout = kernel_types.kernel_layout(kernel_types.running(vmlinux))
    except LlmtracedError as error:
        return Check("btf", "missing", str(error), "a kernel with CONFIG_DEBUG_INFO_BTF=y")
    folios = "folios of any size" if "LT_FOLIO_ORDER" in layout else "single pages"
    return Check("btf", "ok", f"{vmlinux}; the page cache is made of {folios}")


def kernel_headers(find: Callable[[], headers.Headers], here: str) -> Check:
    """Check for kernel headers: the running kernel's, or any that will do."""
    try:
        found = find()
    except LlmtracedError as error:
        why = f"{error}".partition(";")[0]
        if why.startswith("BCC_KERNEL_SOURCE"):
            return Check("headers", "missing", printable(why), "unset BCC_KERNEL_SOURCE")
        anywhere = "; ".join(f"{name.capitalize()}: {packages[0]}" for name, packages in _PACKAGES.items())
        return Check("headers", "missing", why, _PACKAGES[here][0] if here else anywhere)
    return Check("headers", "ok", str(found))


def bcc(here: str) -> Check:
    """Check that BCC can be imported, in a process of its own: it brings LLVM, and may fail in its libraries."""
    code = "from llmtraced.probes import compiler; print(compiler.import_bcc().__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=children.environment(), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return Check("bcc", "ok", f"version {printable(done.stdout.split()[-1])}")
    install = {"arch": "pacman -S", "fedora": "dnf install", "suse": "zypper install"}.get(here, "apt-get install")
    anywhere = (
        "Debian, Ubuntu: apt-get install python3-bpfcc; Fedora: dnf install python3-bcc; Arch: pacman -S python-bcc"
    )
    last = (done.stderr.strip().splitlines() or ["?"])[-1].removeprefix("llmtraced.errors.LlmtracedError: ")
    why = printable(last.partition(";")[0])
    return Check("bcc", "missing", why, f"{install} {_PACKAGES[here][1]}" if here else anywhere)


def memory(meminfo: str, group: Cgroup | None) -> Check:
    """Check that programs can be compiled in the memory there is."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
    available = int(match[1]) << 10 if match else 0
    lock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = f"{available / 1e9:.1f} GB available; memory lock limit "
    text += "none" if lock == resource.RLIM_INFINITY else f"{lock / 1e6:.0f} MB (kernels before 5.11 count maps in it)"
    limit = group.limit if group else None
    if available < _ENOUGH_BYTES or (limit is not None and limit < _ENOUGH_BYTES):
        text += "" if limit is None else f"; our own memory cgroup has {limit / 1e6:.0f} MB"
        return Check("memory", "degraded", text, f"leave {_ENOUGH_BYTES >> 20} MB for compiling", required=False)
    return Check("memory", "ok", text, required=False)


def cgroup(group: Cgroup | None) -> Check:
    """Check for the memory controller, which knows the limit of a server."""
    if group is None:
        why = "no memory controller is mounted: a server's limit and usage are not known"
        return Check("memory cgroups", "degraded", why, "mount -t cgroup2 none /sys/fs/cgroup", required=False)
    return Check("memory cgroups", "ok", f"version {group.version}", required=False)


def read_text(path: str) -> str:
    """Return a file of ``/proc`` or ``/sys``; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
