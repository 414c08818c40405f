"""How much memory there is for the model: from the server's memory cgroup, or the machine. Standard library only."""

from __future__ import annotations

import os

__all__ = ["Memory", "anonymous_bytes"]

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.failcnt")
_V2 = ("memory.max", "memory.current", "memory.events")
_UNLIMITED = 1 << 60
_MOST = 1 << 16  # bytes of such a file
_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Files:
    """Files of the kernel that are read again and again: opened once each, since that takes longer than reading."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read(self, path: str) -> bytes:
        """Return what a file says now; empty: there is none (any more)."""
        try:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._open[path], _MOST, 0)
        except OSError:
            return b""

    def number(self, path: str) -> int | None:
        """Return what a control file says; None: no limit, or no such file."""
        text = self.read(path).strip()
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _field(text: bytes, name: str) -> int | None:
    """Return the number after a name at the beginning of a line; None: there is no such line."""
    _, found, rest = (b"\n" + text).partition(f"\n{name} ".encode())
    return int(rest.split(maxsplit=1)[0]) if found else None


def anonymous_bytes(status: str = "/proc/self/status") -> int:
    """Return the process's memory that is not of files, bytes."""
    with open(status) as stream:
        return next((int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon:")), 0)


class Memory:
    """The memory that bounds a server.

    Args:
        folder: of its memory cgroup; empty: there is none, the machine is the bound.
        version: of the cgroup. Limits of all groups above it count, too.
        pid: of the server.
        machine: where ``meminfo`` and ``pressure`` are.
    """

    def __init__(self, folder: str, version: int, pid: int = 0, machine: str = "/proc") -> None:
        self._machine, self._statm = machine, f"{machine}/{pid}/statm"
        self._limit, self._usage, self._events = _V1 if version == 1 else _V2
        self._version = version
        self._files = _Files()
        self._folders: list[str] = []
        while folder and os.path.exists(f"{folder}/cgroup.procs"):
            self._folders.append(folder)
            folder = os.path.dirname(folder)
        self._strikes = self._hits()

    def room(self, resident: int | None, locked: int) -> int:
        """Return how many bytes the model's pages may take: what nothing else has, of the cgroups and the machine.

        Args:
            resident: bytes of the model in the page cache, charged to the cgroup; None: not known, and all of the
                cgroup's page cache is taken for the model's, which most of it is and which gives way to it.
            locked: those of them that are locked.
        """
        least = self._available() + locked  # the rest of the model's pages is available memory by the kernel's own word
        for folder in self._folders:
            limit, usage = self._files.number(f"{folder}/{self._limit}"), self._files.number(f"{folder}/{self._usage}")
            high = self._files.number(f"{folder}/memory.high") if self._version == 2 else None
            if high is not None:
                limit = high if limit is None else min(limit, high)
            if limit is not None and usage is not None:
                model = self._cached(folder) if resident is None else resident
                least = min(least, limit - max(usage - model, 0))
        return max(least, 0)

    def short(self, needed: int) -> int:
        """Return how many bytes are missing so that ``needed`` could be charged if all page cache were dropped.

        Quick enough to be asked all the time. What cannot be dropped: anonymous memory, what is locked, the kernel's
        own. Negative: so much is left.
        """
        missing = needed - self._available()
        for folder in self._folders:
            limit = self._files.number(f"{folder}/{self._limit}")
            if limit is not None:
                missing = max(missing, needed + self._fixed(folder) - limit)
        return missing

    def anonymous_of_server(self) -> int:
        """Return the server's memory that is not of files, bytes; 0: it has ended.

        One short line, where :meth:`short` reads four files; late by some 100 KB a processor.
        """
        fields = self._files.read(self._statm).split(maxsplit=3)  # Documentation/filesystems/proc.rst
        return (int(fields[1]) - int(fields[2])) * _PAGE if len(fields) == 4 else 0

    def _cached(self, folder: str) -> int:
        """Return the bytes of a cgroup that are pages of files."""
        stat = self._files.read(f"{folder}/memory.stat")
        cache, shared = ("total_cache", "total_shmem") if self._version == 1 else ("file", "shmem")
        return (_field(stat, cache) or 0) - (_field(stat, shared) or 0)

    def _fixed(self, folder: str) -> int:
        """Return the bytes of a cgroup that cannot be dropped."""
        stat = self._files.read(f"{folder}/memory.stat")
        if self._version == 1:
            used = self._files.number(f"{folder}/memory.kmem.usage_in_bytes") or 0
            return used + sum(_field(stat, name) or 0 for name in ("total_rss", "total_unevictable"))
        kernel = _field(stat, "kernel")
        if kernel is None:  # before 5.18 its parts are not summed up
            parts = ("slab", "kernel_stack", "pagetables", "percpu")
            kernel = sum(_field(stat, name) or 0 for name in parts)
        return kernel + sum(_field(stat, name) or 0 for name in ("anon", "unevictable", "sock"))

    def _available(self) -> int:
        """Return the machine's available memory, bytes."""
        return (_field(self._files.read(f"{self._machine}/meminfo"), "MemAvailable:") or 0) * 1024

    def _hits(self) -> int:
        """Return how often a limit was run into since the cgroup was made."""
        count = 0
        for folder in self._folders:
            path = f"{folder}/{self._events}"
            if self._version == 1:
                count += self._files.number(path) or 0
            else:
                events = self._files.read(path)
                count += sum(_field(events, name) or 0 for name in ("high", "max", "oom"))
        return count

    def struck(self) -> int:
        """Return how often a limit was run into since the last call."""
        before, self._strikes = self._strikes, self._hits()
        return self._strikes - before

    def stalled_share(self) -> float:
        """Return the share of the last 10 s (0 to 1) in which all tasks waited for memory (PSI); 0 if unknown."""
        paths = [f"{folder}/memory.pressure" for folder in self._folders] if self._version == 2 else []
        for path in (*paths, f"{self._machine}/pressure/memory"):
            try:
                with open(path) as stream:
                    for line in stream:
                        if line.startswith("full"):
                            return float(line.split("avg10=")[1].split()[0]) / 100
            except (OSError, IndexError, ValueError):
                continue
        return 0.0
