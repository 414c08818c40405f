"""Memory pressure on purpose: a memory cgroup with a limit, dropped page cache, a chosen readahead.

:class:`MemoryCgroup` works with cgroup v1 and v2, whichever has the memory controller. A page of the page cache is
charged to the cgroup whose process brought it in, so a server must be started *inside* (:meth:`MemoryCgroup.
enter_command`) and its model's pages dropped before (:func:`drop_cache`), or it lives on pages that cost it nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from llmtraced.errors import UNSUPPORTED, USAGE, LlmtracedError, printable
from llmtraced.residency import resident_bytes

__all__ = ["MemoryCgroup", "ReadAhead", "drop_cache", "memory_controller", "read_ahead_file", "resident_bytes"]

_STAT_NAMES: Final = {
    # cgroup v1: v2: ours
    ("cache", "file"): "file_bytes",
    ("rss", "anon"): "anon_bytes",
    ("mapped_file", "file_mapped"): "file_mapped_bytes",
    ("active_file", "active_file"): "active_file_bytes",
    ("inactive_file", "inactive_file"): "inactive_file_bytes",
    ("unevictable", "unevictable"): "unevictable_bytes",
    ("pgfault", "pgfault"): "pgfault",
    ("pgmajfault", "pgmajfault"): "pgmajfault",
    ("workingset_refault_file", "workingset_refault_file"): "refault_file",
    ("oom_kill", "oom_kill"): "oom_kill",
}


def memory_controller(mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[int, Path]:
    """Return ``(1 or 2, mount point)`` of the cgroup hierarchy that has the memory controller.

    Raises:
        LlmtracedError: neither hierarchy has it (exit code 4).
    """
    for line in mountinfo.read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        fstype, _, options = tail.partition(" ")
        mount = Path(fields.split()[4].encode().decode("unicode_escape"))  # spaces are written as \040
        if fstype == "cgroup" and "memory" in options.split()[-1].split(","):
            return 1, mount
        if fstype == "cgroup2":
            with contextlib.suppress(OSError):
                if "memory" in (mount / "cgroup.controllers").read_text().split():
                    return 2, mount
    raise LlmtracedError(
        "no cgroup hierarchy has the memory controller, so memory cannot be limited; mount cgroup2, or boot without "
        "cgroup_disable=memory",
        UNSUPPORTED,
    )


class MemoryCgroup:
    """A memory cgroup of our own, made on entry and removed on exit.

    Processes still in it at exit are moved to the cgroup of the calling process (never killed).

    Args:
        name: one path component; the cgroup is made at the top of the hierarchy.
        limit_bytes: the hard limit (page cache and anonymous memory together), None for none.
        controller: version and mount point; found by :func:`memory_controller` by default.

    Attributes:
        path: the cgroup's directory.
        version: 1 or 2.
    """

    def __init__(self, name: str, limit_bytes: int | None, *, controller: tuple[int, Path] | None = None) -> None:
        if not name or "/" in name or name.startswith("."):
            raise LlmtracedError(f"{printable(name)!r} cannot be the name of a cgroup", USAGE)
        self.version, self.root = controller or memory_controller()
        self.path = self.root / name
        self.limit_bytes = limit_bytes

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def _make(self) -> None:
        if self.path.is_dir():
            if self.pids():
                raise LlmtracedError(f"cgroup {self.path} exists and has processes in it; choose another name")
            self.path.rmdir()  # left behind by a run that was killed
        try:
            if self.version == 2:
                control = self.root / "cgroup.subtree_control"
                if "memory" not in control.read_text().split():
                    control.write_text("+memory")
            self.path.mkdir()
        except OSError as failure:
            raise _explain(failure, f"cannot make the memory cgroup {self.path}") from failure
        self.set_limit(self.limit_bytes)

    def set_limit(self, limit_bytes: int | None) -> None:
        """Set the hard limit in bytes (None: none).

        Lowering it reclaims at once. Where that is not possible version 1 refuses, and version 2 kills in the cgroup.
        """
        name, none = ("memory.limit_in_bytes", "-1") if self.version == 1 else ("memory.max", "max")
        try:
            (self.path / name).write_text(none if limit_bytes is None else str(limit_bytes))
        except OSError as failure:
            raise _explain(failure, f"cannot set {self.path / name} to {limit_bytes}") from failure
        self.limit_bytes = limit_bytes

    def add(self, pid: int) -> None:
        """Move the process ``pid`` in. What it has been charged before stays where it was."""
        try:
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError as failure:
            raise _explain(failure, f"cannot move process {pid} into {self.path}") from failure

    def enter_command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that enters the cgroup and then becomes ``argv`` (same pid), so that all is charged."""
        script = 'echo $$ > "$0" || exit 125; exec "$@"'
        return ["sh", "-c", script, str(self.path / "cgroup.procs"), *argv]

    def pids(self) -> list[int]:
        """Return the processes in the cgroup."""
        return [int(word) for word in (self.path / "cgroup.procs").read_text().split()]

    def usage(self) -> int:
        """Return the bytes charged now: page cache, anonymous and kernel memory."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.path / name).read_text())

    def own_bytes(self) -> int:
        """Return the bytes charged now that are not of files: anonymous and kernel memory."""
        return max(self.usage() - self.stat().get("file_bytes", 0), 0)

    def stat(self) -> dict[str, int]:
        """Return counters under the same names for v1 and v2.

        ``file_bytes anon_bytes file_mapped_bytes active_file_bytes inactive_file_bytes unevictable_bytes`` (now), and
        since the cgroup was made: ``pgfault pgmajfault refault_file oom_kill``. What the kernel does not tell is left
        out.
        """
        raw: dict[str, int] = {}
        for name in ("memory.stat", "memory.events" if self.version == 2 else "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                for line in (self.path / name).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    raw[key] = int(value)
        side = self.version - 1
        return {ours: raw[names[side]] for names, ours in _STAT_NAMES.items() if names[side] in raw}

    def remove(self, deadline_s: float = 2.0) -> None:
        """Move what is left in the cgroup out and remove it, trying until the deadline while it is busy."""
        end = time.monotonic() + deadline_s
        while self.path.is_dir():
            try:
                self._evacuate()
                self.path.rmdir()
            except OSError as failure:
                if failure.errno == errno.ENOENT:
                    return
                if time.monotonic() > end:
                    raise _explain(failure, f"cannot remove the cgroup {self.path}") from failure
                time.sleep(0.02)

    def _evacuate(self) -> None:
        home = self.root / _own_cgroup(self.version)
        for pid in self.pids():
            for target in (home, self.root):
                with contextlib.suppress(OSError):  # it may be gone, or the target unfit: rmdir will tell
                    (target / "cgroup.procs").write_text(str(pid))
                    break


def _own_cgroup(version: int) -> str:
    """Return the calling process's cgroup, relative to the top of the hierarchy with the memory controller."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) if version == 1 else not controllers:
            return path.lstrip("/")
    return ""


def _explain(failure: OSError, what: str) -> LlmtracedError:
    """Turn a refused write into the error the user sees."""
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return LlmtracedError(f"{what}: {failure.strerror}; run as root (in a container: with cgroups writable)", 3)
    if failure.errno == errno.EBUSY:
        return LlmtracedError(
            f"{what}: {failure.strerror}; a cgroup v2 with processes of its own cannot give memory to children (common "
            "in containers), or the limit is below what cannot be reclaimed",
            UNSUPPORTED,
        )
    return LlmtracedError(f"{what}: {failure.strerror or failure}")


# --- the page cache of one file


def drop_cache(path: Path | str) -> int:
    """Evict one file's pages from the page cache and return the bytes that are still in it.

    Dirty pages are written first. Pages that some process has mapped and touched, or locked, stay.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return resident_bytes(path)


# --- readahead


def read_ahead_file(path: Path | str, sysfs: Path = Path("/sys")) -> Path:
    """Return the sysfs file with the readahead (in KB) of the device that holds ``path``.

    Raises:
        LlmtracedError: the file system is on no such device, as with overlay or tmpfs (exit code 4).
    """
    device = Path(path).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = sysfs / "dev" / "block" / number
    if (block / "partition").exists():
        block = block.resolve().parent
    for candidate in (block / "queue" / "read_ahead_kb", sysfs / "class" / "bdi" / number / "read_ahead_kb"):
        if candidate.exists():
            return candidate
    raise LlmtracedError(
        f"{printable(str(path))} is on device {number}, which has no readahead setting in /sys; put the model on an "
        "ordinary disk file system",
        UNSUPPORTED,
    )


def read_ahead_kb(path: Path | str) -> int | None:
    """Return the readahead, in kilobytes, of the device that holds ``path``; None: it has no such setting."""
    try:
        return int(read_ahead_file(path).read_text())
    except (LlmtracedError, OSError, ValueError):
        return None


class ReadAhead:
    """Set the readahead of the device that holds ``path`` to ``kb`` kilobytes, and restore it on exit.

    A file takes its readahead when it is opened: start the process to be measured inside. (llama.cpp then doubles
    it with ``POSIX_FADV_SEQUENTIAL``.) It holds for everything on that device.

    Attributes:
        before_kb: the setting that will be restored, known after entry.
    """

    def __init__(self, path: Path | str, kb: int, *, sysfs: Path = Path("/sys")) -> None:
        self.file = read_ahead_file(path, sysfs)
        self.kb = kb
        self.before_kb = 0

    def __enter__(self) -> Self:
        self.before_kb = int(self.file.read_text())
        self._write(self.kb)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._write(self.before_kb)

    def _write(self, kb: int) -> None:
        try:
            self.file.write_text(str(kb))
        except OSError as failure:
            raise _explain(failure, f"cannot set {self.file} to {kb}") from failure
