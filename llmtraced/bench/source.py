"""A BPF ring that can be filled with given records: the tracer's kind of ring, without anything that is traced.

The program (bpf/bench.bpf.c) is compiled in a child, as the tracer's are. The child stays: it is BCC's side of
``bench events``, and empties the same ring through BCC's own callback when it is told to.
"""

from __future__ import annotations

import array
import gc
import json
import os
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from llmtraced import children, headers
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError
from llmtraced.probes import compiler, kernel, loader
from llmtraced.probes.ringbuf import Ring
from llmtraced.schema import EVENT, PAGE

__all__ = ["Source", "words"]

_RECORD: Final = np.dtype([("word", "<u8", (7,))])
_CURSOR: Final = np.dtype("<u8")
_BATCH: Final = 1024
_MAPS: Final = ("ring", "records", "cursor")


def words(events: NDArray[Any]) -> NDArray[np.uint64]:
    """Return records as uint64 (n, 7), without the ring's own header: what must not change on the way."""
    return np.ascontiguousarray(events).view("<u8").reshape(-1, EVENT.itemsize // 8)[:, 1:]


class Source:
    """A ring and what fills it.

    Args:
        ring_bytes: a power of two.

    Attributes:
        ring: our reader of it.
        capacity: records that fit; the ring is never quite full.
    """

    def __init__(self, ring_bytes: int) -> None:
        if os.geteuid() != 0:
            raise LlmtracedError("a BPF ring needs root (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN)", NO_PERMISSION)
        self.ring_bytes = ring_bytes
        self.capacity = ring_bytes // EVENT.itemsize - 1

    def __enter__(self) -> Self:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "llmtraced.bench.source", str(theirs.fileno()), str(self.ring_bytes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                env=children.environment(),
            )
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def _start(self) -> None:
        message, ancillary, _, _ = self._link.recvmsg(1 << 16, socket.CMSG_SPACE(64))
        reply = json.loads(message or b'{"error": "the compiler ended without an answer"}')
        if "error" in reply:
            raise LlmtracedError(
                f"cannot load bench.bpf.c: {reply['error']}; `llmtraced check` says what is missing",
                reply.get("exit_code", UNSUPPORTED),
            )
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        self._program, ring, records, cursor = self._fds = list(fds)
        self.ring = Ring(ring, self.ring_bytes)
        self._records = kernel.map_array(records, _RECORD, self.capacity + 1)
        self._cursor = kernel.map_array(cursor, _CURSOR, 2)
        self.bcc_version = str(reply["bcc_version"])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.ring.close()
        for fd in self._fds:
            os.close(fd)
        self._end()

    def _end(self) -> None:
        self._link.close()  # the child ends at the end of its input
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    @property
    def child(self) -> int:
        """The pid of BCC's side."""
        return self._child.pid

    def prepare(self, events: NDArray[Any]) -> None:
        """Take the records that :meth:`fill` will send, at most ``capacity``."""
        if not 0 < len(events) <= self.capacity:
            raise LlmtracedError(f"a ring of {self.ring_bytes} bytes takes 1 to {self.capacity} records at once")
        self._records["word"][: len(events)] = words(events)
        self._cursor[1] = len(events)

    def fill(self) -> int:
        """Have the kernel send all prepared records, in order, and return how many there are in the ring now."""
        cpu = min(os.sched_getaffinity(0))
        self._cursor[0] = before = 0
        while self._cursor[0] < self._cursor[1]:
            kernel.run_on_cpu(self._program, cpu)
            if self._cursor[0] == before:
                raise LlmtracedError(f"the ring was full after {before} of {self._cursor[1]} records: it was not empty")
            before = int(self._cursor[0])
        return self.ring.waiting

    def drain_with_bcc(self) -> tuple[int, float]:
        """Have BCC empty the ring with a Python callback for each record; return its calls and seconds."""
        self._link.sendall(b"drain\n")
        reply = json.loads(self._link.recv(1 << 16) or b"{}")
        if "calls" not in reply:
            raise LlmtracedError(f"BCC's side of the benchmark ended with status {self._child.wait(5)}")
        return int(reply["calls"]), float(reply["seconds"])


def _compile(ring_bytes: int) -> tuple[Any, int]:
    bcc = compiler.import_bcc()
    flags = [
        "-Wno-macro-redefined",
        f"-DBENCH_RING_PAGES={ring_bytes // PAGE}",
        f"-DBENCH_RECORDS={ring_bytes // EVENT.itemsize}",
        f"-DBENCH_BATCH={_BATCH}",
    ]
    try:
        with headers.presented(headers.find()):
            bpf = bcc.BPF(text=(loader.bpf_folder() / "bench.bpf.c").read_text(), cflags=flags)
        return bpf, bpf.load_func("emit", bcc.BPF.RAW_TRACEPOINT).fd
    except Exception as error:
        raise LlmtracedError(f"BCC cannot compile it ({error})", UNSUPPORTED) from error


def _serve(link: socket.socket, ring_bytes: int) -> None:
    try:
        bpf, program = _compile(ring_bytes)
    except LlmtracedError as error:
        link.sendall(json.dumps({"error": str(error), "exit_code": error.exit_code}).encode())
        return
    fds = array.array("i", [program, *(bpf[name].map_fd for name in _MAPS)])
    version = getattr(sys.modules["bcc"], "__version__", "?")
    link.sendmsg([json.dumps({"bcc_version": version}).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    calls = 0

    def callback(_context: object, _data: object, _size: object) -> None:
        nonlocal calls
        calls += 1

    bpf["ring"].open_ring_buffer(callback)
    gc.disable()
    while link.recv(64):
        calls = 0
        start = time.perf_counter()
        bpf.ring_buffer_consume()
        seconds = time.perf_counter() - start
        link.sendall(json.dumps({"calls": calls, "seconds": seconds}).encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _link:
        _serve(_link, int(sys.argv[2]))
