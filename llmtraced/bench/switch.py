"""A recorder in a process of its own, as ``llmtraced record`` is one, that attaches and detaches when it is told to.

It compiles once, before anything is timed; then tracing is on or off within some tens of milliseconds, so that a
benchmark can go back and forth. While it is off, nothing is attached, to the kernel or to the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmtraced import children
from llmtraced.capture import Capture
from llmtraced.errors import FAILED, LlmtracedError
from llmtraced.probes.loader import Sizes
from llmtraced.probes.tracer import Tracer
from llmtraced.schema import Detail

__all__ = ["Switch", "counting", "cpu_seconds", "program_runs"]


class Switch:
    """Records process ``pid`` into ``folder`` while it is on; off at first.

    Args:
        pid: the process.
        folder: of the trace.
        bare: faults, pages and operators are not looked at: their programs are entered and left.
    """

    def __init__(self, pid: int, folder: Path, *, bare: bool = False) -> None:
        self.pid, self.folder, self.bare = pid, folder, bare

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "llmtraced.bench.switch", str(self.pid), str(self.folder), str(int(self.bare))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=children.environment(),
        )
        try:
            self._hear()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()  # it ends with its input
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def on(self, detail: Detail) -> None:
        """Attach, and return when everything is attached."""
        self._say(f"on {detail.name}")

    def off(self) -> dict[str, Any]:
        """Write what was recorded, detach, and return ``account`` and ``bytes`` of it."""
        return self._say("off")

    def cpu_seconds(self) -> float:
        """Return the processor time that the recorder has used so far."""
        return cpu_seconds(self._child.pid)

    def program_runs(self) -> tuple[int, int]:
        """Return what :func:`program_runs` does of the recorder."""
        return program_runs(self._child.pid)

    def memory(self) -> dict[str, int]:
        """Return ``rss_bytes`` and ``peak_rss_bytes``."""
        text = Path(f"/proc/{self._child.pid}/status").read_text()
        found = {name: int(kb) * 1024 for name, kb in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", text)}
        return {"rss_bytes": found["VmRSS"], "peak_rss_bytes": found["VmHWM"]}

    def _say(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise LlmtracedError(f"the recorder ended with status {self._child.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise LlmtracedError(reply["error"], reply["exit_code"])
        return reply


@contextlib.contextmanager
def counting(switch: Path = Path("/proc/sys/kernel/bpf_stats_enabled")) -> Iterator[None]:
    """Have the kernel count and time runs of BPF programs, which costs some 60 ns each; then as it was before."""
    before = switch.read_text()
    try:
        switch.write_text("1")
        yield
    finally:
        switch.write_text(before)


def program_runs(pid: int, kind: int | None = None) -> tuple[int, int]:
    """Return how often the BPF programs that a process holds ran, and for how many ns, while :func:`counting`.

    Args:
        pid: the process.
        kind: only those of this BPF_PROG_TYPE; of uprobes, kernel.KINDS["KPROBE"][0].
    """
    found: dict[bytes, tuple[int, int]] = {}
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            pairs = (line.partition(b":") for line in info.read_bytes().splitlines())
            fields = {key: value.strip() for key, _, value in pairs}
            if b"run_cnt" in fields and kind in (None, int(fields[b"prog_type"])):
                found[fields[b"prog_id"]] = int(fields[b"run_cnt"]), int(fields[b"run_time_ns"])
    return sum(count for count, _ in found.values()), sum(ns for _, ns in found.values())


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far, in user space and kernel, all threads; to the ns."""
    return time.clock_gettime(~pid << 3 | 2)  # its CPU-time clock, as clock_getcpuclockid(3) makes it


def _serve(pid: int, folder: Path, bare: bool) -> None:
    tracer = Tracer(Sizes(bare=bare))
    capture = Capture(folder, Detail.FAULTS, tracer=tracer)
    try:
        print("{}", flush=True)
        while True:
            if capture.session is None or select.select([0], [], [], 0)[0]:
                words = os.read(0, 64).split()
                if not words:
                    return
                print(json.dumps(_obey(capture, pid, [word.decode() for word in words])), flush=True)
            if capture.session is not None:
                capture.step()
    finally:
        capture.close()
        tracer.close()


def _obey(capture: Capture, pid: int, words: list[str]) -> dict[str, Any]:
    if words[0] == "on":
        capture.detail = Detail[words[1]]
        return {"problems": capture.attach(pid).problems}
    ended = capture.end()
    capture.tracer.detach()
    if not ended:
        return {}
    (session,) = ended
    return {"account": session.account, "bytes": sum(session.writer.bytes.values())}


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1")
    except LlmtracedError as failure:
        print(json.dumps({"error": str(failure), "exit_code": failure.exit_code or FAILED}), flush=True)
