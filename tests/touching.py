"""A process that has a file mapped, as a server has its model, and touches what it is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import CHUNK

__all__ = ["SKIPPED", "Server", "opened"]

SKIPPED = 64 << 10  # the server maps from here, as llama.cpp leaves out the header

CHILD = """
import mmap, os, sys
fd, skip = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
data = mmap.mmap(fd, os.fstat(fd).st_size - skip, mmap.MAP_SHARED, mmap.PROT_READ, offset=skip)
if sys.argv[3] == "ahead":  # as llama.cpp does
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
else:
    data.madvise(mmap.MADV_RANDOM)
print("ready", flush=True)
for line in sys.stdin:
    first, last = map(int, line.split())
    data[max(first - skip, 0) : last - skip : 4096]
    print("touched", flush=True)
"""


class Server:
    """A process that has the file mapped, and touches what it is told; the kernel reads ``ahead`` for it, or not."""

    def __init__(self, path: Path, skip: int = SKIPPED, *, ahead: bool = False) -> None:
        command = [sys.executable, "-I", "-S", "-c", CHILD, str(path), str(skip), "ahead" if ahead else ""]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == "ready\n"
        self.pidfd = os.pidfd_open(self.child.pid)
        self.maps = [
            (int(start, 16), int(end, 16), int(fields[2], 16))
            for line in Path(f"/proc/{self.child.pid}/maps").read_text().splitlines()
            if line.endswith(path.name)
            for fields in [line.split()]
            for start, end in [fields[0].split("-")]
        ]

    def touch(self, chunk: int, count: int = 1) -> None:
        self.touch_range(chunk * CHUNK, (chunk + count) * CHUNK)

    def touch_range(self, first: int, last: int) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{first} {last}\n")
        self.child.stdin.flush()
        assert self.child.stdout.readline() == "touched\n"

    def address(self, chunk: int) -> int:
        start, _, offset = self.maps[0]
        return start + max(chunk * CHUNK, SKIPPED) - offset

    def end(self) -> None:
        self.child.communicate()
        os.close(self.pidfd)


@contextlib.contextmanager
def opened(path: Path, server: Server) -> Iterator[Pages]:
    """Give the pages of a file that a server has mapped."""
    fd = os.open(path, os.O_RDONLY)
    made = Pages(fd, server.pidfd, server.maps)
    yield made
    made.close()
    os.close(fd)
