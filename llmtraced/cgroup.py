"""The memory cgroup of a process, version 1 or 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cgroup", "cgroup_of"]


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A memory cgroup: version 1 or 2, its folder, and its limit in bytes (None: unlimited)."""

    version: int
    path: Path
    limit: int | None


def cgroup_of(pid: int, proc: Path = Path("/proc")) -> Cgroup | None:
    """Return the memory cgroup of ``pid``, or None where no memory controller is mounted."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    v1 = v2 = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            v1 = path
        elif not controllers:
            v2 = path
    for version, inner, kind in ((1, v1, "cgroup"), (2, v2, "cgroup2")):
        if inner is None:
            continue
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            fields, tail = before.split(), after.split()
            if tail[0] != kind or (version == 1 and "memory" not in tail[2].split(",")):
                continue
            folder = Path(fields[4]) / inner.removeprefix(fields[3]).lstrip("/")
            knob = folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")
            if (
                version == 2
                and inner == "/"
                and not knob.exists()
                and (Path(fields[4]) / "cgroup.controllers").exists()
            ):
                if "memory" in (Path(fields[4]) / "cgroup.controllers").read_text().split():
                    return Cgroup(2, folder, None)  # the root has no limit file
                continue
            try:
                text = knob.read_text().strip()
            except OSError:
                continue
            limit = None if text == "max" or int(text) >= 1 << 62 else int(text)
            return Cgroup(version, folder, limit)
    return None
