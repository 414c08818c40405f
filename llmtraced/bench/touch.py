"""A workload whose page faults are known beforehand: the answer that probes are checked against.

It maps a file read-only and shared, as llama.cpp does, then touches one byte at each of the given offsets. With the
page cache dropped and ``MADV_RANDOM`` every first touch of a page is one major fault that reads one page. With
``--flood`` it makes minor faults as fast as one process can (and drops what is cached of the file first). It runs
from its file with nothing but the standard library (``python3 -I -S touch.py MODEL --offsets FILE``), so it is small
and starts at once.

It speaks JSON, a line at a time. It prints ``{"state": "ready", …}``, waits for ``go`` on stdin, works, prints
``{"state": "done", …}`` with what the kernel counted meanwhile, waits for another line (so that it can be inspected
alive), and ends, or works once more if that is ``go`` again. At ``again`` it unmaps everything and touches the same
offsets, on and on, until a line comes: ``rest`` for a pause, or one of the others (not with ``--pread``).
:class:`Touch` does that for a Python caller.

Everything is allocated before the measured part, and its own code is locked in memory where that is allowed:
measured, ``majflt`` is exact, and ``minflt`` has 0 faults of the interpreter's own in it (0 or 1 with threads).
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

__all__ = ["Touch", "choose_offsets", "main"]

_FAULT_AROUND = 65536
"""A minor fault maps every cached page in the aligned 64 KiB around it (the kernel's default)."""


def choose_offsets(size_bytes: int, count: int, *, seed: int = 0, align: int = mmap.PAGESIZE) -> list[int]:
    """Return ``count`` file offsets in random order, each in an ``align``-sized block of its own.

    With ``align=65536`` no touch can map a page that another touch is meant to fault on, even when all is cached.
    """
    blocks = size_bytes // align
    if count > blocks:
        raise ValueError(f"{size_bytes} bytes have only {blocks} blocks of {align} bytes, {count} were asked for")
    rng = random.Random(seed)  # noqa: S311  # repeatable, not secret
    return [block * align + rng.randrange(align) for block in rng.sample(range(blocks), count)]


def _lock_self() -> bool:
    """Lock what is mapped now (the interpreter, not the model), so that none of it faults later; say if it worked."""
    return int(ctypes.CDLL(None).mlockall(1)) == 0  # MCL_CURRENT


def _address(data: mmap.mmap) -> int:
    """Return where a mapping starts; the buffer interface tells it, also for a read-only one."""
    view = (ctypes.c_void_p * 16)()  # room for a Py_buffer, whose first field is the address
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), view, 0)
    start = view[0]
    ctypes.pythonapi.PyBuffer_Release(view)
    return start or 0


def _touch(data: Any, offsets: Sequence[int], laps: Any) -> None:
    """Read one byte at each offset; ``laps`` (if not empty) takes the nanoseconds of each touch."""
    now = time.perf_counter_ns
    if laps:
        for number, offset in enumerate(offsets):
            start = now()
            data[offset]
            laps[number] = now() - start
    else:
        for offset in offsets:
            data[offset]


def _pread(fd: int, offsets: Sequence[int]) -> None:
    for offset in offsets:
        os.pread(fd, 1, offset)


def _prepare_flood(fd: int, size: int) -> Any:
    """Return a mapping of up to 256 windows of 64 KiB with exactly one cached page each, and lock those pages.

    With one page a window a fault maps one page (1.1 us measured here) instead of 16 (5 us). The lock, through a
    second mapping, keeps reclaim (DAMON's too) from turning a minor fault into a major one.
    """
    windows = min(256, size // _FAULT_AROUND)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for number in range(windows):
        os.pread(fd, 1, number * _FAULT_AROUND)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    second = libc.mmap(None, windows * _FAULT_AROUND, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    libc.madvise(ctypes.c_void_p(second), ctypes.c_size_t(windows * _FAULT_AROUND), mmap.MADV_RANDOM)
    for number in range(windows):
        libc.mlock(ctypes.c_void_p(second + number * _FAULT_AROUND), ctypes.c_size_t(1))
    return mmap.mmap(fd, windows * _FAULT_AROUND, mmap.MAP_SHARED, mmap.PROT_READ)


def _flood(data: mmap.mmap, count: int) -> None:
    """Make ``count`` minor faults on cached pages: unmap them, touch one byte in each 64 KiB, again and again."""
    windows = len(data) // _FAULT_AROUND
    while count > 0:
        data.madvise(mmap.MADV_DONTNEED)  # drops this process's page table entries; the pages stay cached
        batch = min(count, windows)
        data[: batch * _FAULT_AROUND : _FAULT_AROUND]  # the loop over the slice is in C
        count -= batch


def _io_read_bytes(fd: int) -> int:
    """Return ``read_bytes`` of /proc/self/io: what this process had fetched from storage."""
    text = os.pread(fd, 4096, 0)
    start = text.index(b"\nread_bytes: ") + 13
    return int(text[start : text.index(b"\n", start)])


def _counters(io: int) -> tuple[int, int, int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)  # the majflt and minflt of /proc/self/stat, without a read
    return usage.ru_majflt, usage.ru_minflt, _io_read_bytes(io), time.monotonic_ns()


def _workers(jobs: Sequence[Callable[[], None]], warm: Callable[[], None]) -> tuple[list[int], Callable[[], None]]:
    """Return the thread ids that will run ``jobs``, and a function that runs them all and returns when all are done.

    Several jobs run in threads started (and warmed up) here, and take turns: Python lets one run at a time.
    """
    if len(jobs) == 1:
        warm()
        return [threading.get_native_id()], jobs[0]
    tids = [0] * len(jobs)
    ready, go, end = (threading.Barrier(len(jobs) + 1) for _ in range(3))

    def body(number: int) -> None:
        tids[number] = threading.get_native_id()
        warm()
        ready.wait()
        while True:
            go.wait()
            jobs[number]()
            end.wait()

    for number in range(len(jobs)):
        threading.Thread(target=body, args=(number,), daemon=True).start()
    ready.wait()

    def run() -> None:
        go.wait()
        end.wait()

    return tids, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="touch", description="Make a known number of page faults on a mapped file.")
    parser.add_argument("model", help="the file to map")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument(
        "--offsets", metavar="FILE", help="touch these file offsets, one a line; - reads stdin's first line"
    )
    work.add_argument(
        "--flood", type=int, default=0, metavar="N", help="make N minor faults (drops the file's page cache)"
    )
    parser.add_argument("--pread", action="store_true", help="pread one byte at each offset instead of touching it")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="split the offsets over N threads (default 1)"
    )
    parser.add_argument("--map-offset", type=int, default=0, metavar="BYTES", help="map from here, as llama.cpp may")
    parser.add_argument("--readahead", action="store_true", help="leave the kernel's readahead on (no MADV_RANDOM)")
    parser.add_argument("--drop", action="store_true", help="drop the file from the page cache before saying ready")
    parser.add_argument("--latency", action="store_true", help="report the nanoseconds of each touch, in order")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the workload; see the module's docstring for what it says and when."""
    args = _parser().parse_args(argv)
    fd = os.open(args.model, os.O_RDONLY)
    size = os.fstat(fd).st_size
    if args.offsets:
        with contextlib.ExitStack() as stack:
            source = sys.stdin if args.offsets == "-" else stack.enter_context(open(args.offsets))  # noqa: PTH123
            words = (source.readline() if args.offsets == "-" else source.read()).split()
        offsets = [int(word) for word in words]
    else:
        offsets = []
    if args.drop:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    io = os.open("/proc/self/io", os.O_RDONLY)
    scratch = mmap.mmap(-1, 1 << 20)
    scratch.write(bytes(1 << 20))

    locked = _lock_self()
    if args.flood:
        data = _prepare_flood(fd, size)
    else:
        data = mmap.mmap(fd, size - args.map_offset, mmap.MAP_SHARED, mmap.PROT_READ, offset=args.map_offset)
    if not args.readahead:
        data.madvise(mmap.MADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    inside = offsets if args.pread else [offset - args.map_offset for offset in offsets]
    if any(not 0 <= offset < (size if args.pread else len(data)) for offset in inside):
        print("touch: an offset lies outside what is mapped", file=sys.stderr)
        return 2
    shares = [inside[number :: args.threads] for number in range(args.threads)]
    laps = [array.array("q", [0]) * (len(share) if args.latency else 0) for share in shares]

    def job(share: list[int], lap: Any) -> Callable[[], None]:
        if args.flood:
            return lambda: _flood(data, args.flood // args.threads)
        return (lambda: _pread(fd, share)) if args.pread else (lambda: _touch(data, share, lap))

    def warm() -> None:
        _touch(scratch, range(100), array.array("q"))
        _touch(scratch, range(100), array.array("q", [0]) * 100)
        for _ in range(3):
            _counters(io)

    tids, run = _workers([job(share, lap) for share, lap in zip(shares, laps, strict=True)], warm)
    ready = {"state": "ready", "pid": os.getpid(), "tids": tids, "address": _address(data), "locked": locked}
    print(json.dumps(ready), flush=True)
    while (line := sys.stdin.readline().strip()) in ("go", "again", "rest"):
        while line == "again" and not select.select([sys.stdin], [], [], 0)[0]:
            data.madvise(mmap.MADV_DONTNEED)
            _touch(data, inside, ())
        if line != "go":
            continue
        _counters(io)

        before = _counters(io)
        run()
        after = _counters(io)

        major, minor, read, duration = (b - a for a, b in zip(before, after, strict=True))
        done: dict[str, Any] = {"state": "done", "touched": args.flood // args.threads * args.threads or len(offsets)}
        done |= {"majflt": major, "minflt": minor, "read_bytes": read}
        done |= {"start_ns": before[3], "end_ns": after[3], "duration_ns": duration}
        if args.latency:
            merged = [0] * len(offsets)
            for number, lap in enumerate(laps):
                merged[number :: args.threads] = lap
            done["latency_ns"] = merged
        print(json.dumps(done), flush=True)
    return 0


class Touch:
    """Run this program as a child and step it: enter (waits for ready), :meth:`go`, leave.

    Between the last two, :meth:`again` and :meth:`rest` have it fault on and on, and pause.

    Args:
        model: the file to map.
        offsets: what to touch, None with ``--flood`` among ``options``.
        options: further options of the program.
        wrap: turns the command into one that runs it elsewhere (``MemoryCgroup.enter_command``).

    Attributes:
        ready: the program's first line: ``pid``, ``tids``, ``address`` (of the mapping), ``locked``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        offsets: Sequence[int] | None = None,
        *options: str,
        wrap: Callable[[Sequence[str]], list[str]] = list,
    ) -> None:
        given = [] if offsets is None else ["--offsets", "-"]
        self.command = wrap([sys.executable, "-I", "-S", __file__, os.fspath(model), *given, *options])
        self._first = None if offsets is None else " ".join(map(str, offsets))
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Touch:
        import subprocess  # not needed by the program itself

        self._child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            if self._first is not None:
                self._say(self._first)
            self.ready = self._hear()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def go(self) -> dict[str, Any]:
        """Let it work, once more if it has already, and return what it says then.

        Those are counts, and ``start_ns`` and ``end_ns`` of CLOCK_MONOTONIC.
        """
        self._say("go")
        return self._hear()

    def again(self) -> None:
        """Have it unmap and touch everything again and again; returns at once."""
        self._say("again")

    def rest(self) -> None:
        """Have it pause, soon."""
        self._say("rest")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._child.kill()
        with contextlib.suppress(OSError):
            self._child.communicate("end\n")

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the touch program ended early: {' '.join(self.command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    sys.exit(main())
