"""How much memory there is for the model: from the server's memory cgroup, or the machine. Standard library only."""

from __future__ import annotations

import contextlib
import os

__all__ = ["Memory", "anonymous_bytes"]

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.failcnt")
_V2 = ("memory.max", "memory.current", "memory.events")
_UNLIMITED = 1 << 60


def _number(path: str) -> int | None:
    """Return what a control file says; None: no limit, or no such file."""
    try:
        with open(path) as stream:
            text = stream.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def anonymous_bytes(status: str = "/proc/self/status") -> int:
    """Return the process's memory that is not of files, bytes."""
    with open(status) as stream:
        return next((int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon:")), 0)


class Memory:
    """The memory that bounds a server.

    Args:
        folder: of its memory cgroup; empty: there is none, the machine is the bound.
        version: of the cgroup. Limits of all groups above it count, too.
        machine: where ``meminfo`` and ``pressure`` are.
    """

    def __init__(self, folder: str, version: int, machine: str = "/proc") -> None:
        self._machine = machine
        self._limit, self._usage, self._events = _V1 if version == 1 else _V2
        self._version = version
        self._folders: list[str] = []
        while folder and os.path.exists(f"{folder}/cgroup.procs"):
            self._folders.append(folder)
            folder = os.path.dirname(folder)
        self._strikes = self._hits()

    def room(self, resident: int, locked: int) -> int:
        """Return how many bytes the model's pages may take: what nothing else has, of the cgroups and the machine.

        Args:
            resident: bytes of the model in the page cache, charged to the cgroup.
            locked: those of them that are locked.
        """
        least = self._available() + locked  # the rest of the model's pages is available memory by the kernel's own word
        for folder in self._folders:
            limit, usage = _number(f"{folder}/{self._limit}"), _number(f"{folder}/{self._usage}")
            high = _number(f"{folder}/memory.high") if self._version == 2 else None
            if high is not None:
                limit = high if limit is None else min(limit, high)
            if limit is not None and usage is not None:
                least = min(least, limit - max(usage - resident, 0))
        return max(least, 0)

    def short(self, needed: int) -> int:
        """Return how many bytes are missing so that ``needed`` could be charged if all page cache were dropped.

        Quick enough to be asked all the time. What cannot be dropped: anonymous memory, what is locked, the kernel's
        own. Negative: so much is left.
        """
        missing = needed - self._available()
        for folder in self._folders:
            limit = _number(f"{folder}/{self._limit}")
            if limit is not None:
                missing = max(missing, needed + self._fixed(folder) - limit)
        return missing

    def _fixed(self, folder: str) -> int:
        """Return the bytes of a cgroup that cannot be dropped."""
        found: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/memory.stat") as stream:
            for line in stream:
                name, _, value = line.partition(" ")
                found[name] = int(value)
        if self._version == 1:
            kernel = _number(f"{folder}/memory.kmem.usage_in_bytes") or 0
            return found.get("total_rss", 0) + found.get("total_unevictable", 0) + kernel
        parts = ("slab", "kernel_stack", "pagetables", "percpu")  # before 5.18 they are not summed up
        kernel = found.get("kernel", sum(found.get(name, 0) for name in parts))
        return found.get("anon", 0) + found.get("unevictable", 0) + found.get("sock", 0) + kernel

    def _available(self) -> int:
        """Return the machine's available memory, bytes."""
        with open(f"{self._machine}/meminfo") as stream:
            return next((int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable")), 0)

    def _hits(self) -> int:
        """Return how often a limit was run into since the cgroup was made."""
        count = 0
        for folder in self._folders:
            try:
                with open(f"{folder}/{self._events}") as stream:
                    text = stream.read()
            except OSError:
                continue
            if self._version == 1:
                count += int(text)
            else:
                events = dict(line.split() for line in text.splitlines())
                count += sum(int(events.get(name, 0)) for name in ("high", "max", "oom"))
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
