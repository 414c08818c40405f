"""What runs beside a server that is measured: the sidecar, vmtouch, a process that locks memory; and the disk's rate.

Each ends with its ``with`` block and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from llmtraced import children
from llmtraced.bench.engine import stop
from llmtraced.bench.fetch import log_tail
from llmtraced.bench.pressure import MemoryCgroup
from llmtraced.errors import UNSUPPORTED, USAGE, LlmtracedError, printable
from llmtraced.prefetch.pages import Pages

__all__ = [
    "LEFT_FREE",
    "READ_BYTES",
    "READ_THREADS",
    "Locked",
    "Reading",
    "Seen",
    "Settling",
    "Sidecar",
    "Vmtouch",
    "bytes_to_lock",
    "disk_bytes_per_s",
    "parse_metrics",
    "sample_of",
]

log = logging.getLogger(__name__)

READ_THREADS: Final = 8
READ_BYTES: Final = 2 << 20
"""How the disk is measured: so many reads at a time, of so many bytes, as the sidecar reads."""

LEFT_FREE: Final = 2 << 30
"""Bytes that :class:`Locked` must leave available."""

_DISK_SECONDS: Final = 3.0
_DISK_SAMPLE: Final = 256 << 20
_STABLE_WRITES: Final = 4  # of the metrics file, a second apart: longer than the sidecar waits before it pins more
_SEEN_TOKENS: Final = 6  # it watches three before it decides
_LOCK_SECONDS: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1


# --- the disk


class Reading:
    """Reads a file, READ_THREADS reads of READ_BYTES at a time, until its ``with`` block ends.

    The same quarter of a gigabyte, spread evenly over the file, is read again and again, as each token does. Pages that
    cannot be dropped (mapped by somebody, or in the kernel's hands) are not read again: so what counts is what the
    kernel has read for this process, and no more than what it was asked for.

    Args:
        path: of the file, at least READ_BYTES long.
        direct: past the page cache (O_DIRECT); otherwise into it in the sidecar's own way, pages dropped before.

    Raises:
        OSError: it cannot be read that way.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        chunks = os.fstat(self._fd).st_size // READ_BYTES
        self._sample = range(0, chunks, max(chunks * READ_BYTES // _DISK_SAMPLE, 1))
        self._pages = None if direct else Pages(self._fd, -1, [])
        self._numbers = count()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(READ_THREADS)

    def __enter__(self) -> Self:
        self._start, self._bytes, self._before = time.monotonic(), [0] * READ_THREADS, _read_bytes()
        self._futures = [self._pool.submit(self._work, number) for number in range(READ_THREADS)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._pool.shutdown()
        if self._pages is not None:
            self._pages.close()
        os.close(self._fd)
        if kind is None:
            for future in self._futures:
                future.result()

    def _work(self, number: int) -> None:
        with mmap.mmap(-1, READ_BYTES) as buffer:  # O_DIRECT wants aligned memory
            while not self._over.is_set():
                at = self._sample[next(self._numbers) % len(self._sample)]
                if self._pages is None:
                    self._bytes[number] += os.preadv(self._fd, [buffer], at * READ_BYTES)
                else:
                    self._pages.drop(at)
                    self._pages.read(at, "huge")
                    self._bytes[number] += READ_BYTES

    def so_far(self) -> tuple[float, int]:
        """Return the seconds since it began, and the bytes that were read."""
        return time.monotonic() - self._start, min(sum(self._bytes), _read_bytes() - self._before)


def _read_bytes() -> int:
    """Return what was read from disks for this process, all its threads: getrusage(2), in blocks of 512 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512


def disk_bytes_per_s(path: Path, seconds: float = _DISK_SECONDS) -> float:
    """Return the best rate at which the disk gives the file's bytes, past the page cache or into it (:class:`Reading`).

    Either may be the faster one. A file that is shorter than one read gives 0.

    Raises:
        LlmtracedError: the file system has no O_DIRECT.
    """
    if path.stat().st_size < READ_BYTES:
        return 0.0
    rates = []
    try:
        for direct in (True, False):
            with Reading(path, direct=direct) as reading:
                time.sleep(seconds / 2)
                passed, nbytes = reading.so_far()
            rates.append(nbytes / passed)
    except OSError as error:
        raise LlmtracedError(
            f"the disk's rate cannot be measured: {printable(str(path))} cannot be read with O_DIRECT "
            f"({error.strerror}); put the model on an ordinary disk file system",
            UNSUPPORTED,
        ) from error
    log.info("disk: %.2f GB/s past the page cache, %.2f GB/s into it", rates[0] / 1e9, rates[1] / 1e9)
    return max(rates)


@contextlib.contextmanager
def sample_of(path: Path) -> Iterator[Path]:
    """Make a file beside another one, of its first quarter of a gigabyte; it is gone afterwards.

    Raises:
        LlmtracedError: it is too short to read, or the copy cannot be written.
    """
    if path.stat().st_size < READ_BYTES:
        raise LlmtracedError(f"{printable(str(path))} is too small to measure a disk with", USAGE)
    with contextlib.ExitStack() as stack:
        try:
            copy = stack.enter_context(
                tempfile.NamedTemporaryFile(prefix=".llmtraced-", suffix=".sample", dir=path.parent)
            )
            with path.open("rb") as stream:
                left = _DISK_SAMPLE
                while left and (piece := stream.read(min(left, 1 << 20))):
                    copy.write(piece)
                    left -= len(piece)
            copy.flush()
            os.fsync(copy.fileno())  # pages that are not written yet cannot be dropped
        except OSError as error:
            raise LlmtracedError(
                f"cannot write {_DISK_SAMPLE >> 20} MB beside {printable(str(path))}, to measure the disk with: "
                f"{error.strerror}"
            ) from error
        yield Path(copy.name)


# --- the sidecar


@dataclass(frozen=True, slots=True)
class Seen:
    """What a metrics file of the sidecar says: when it was written (ns), and its figures."""

    written_ns: int
    engaged: bool
    pinned_bytes: int
    tokens: int


def parse_metrics(text: str, written_ns: int) -> Seen | None:
    """Return what a metrics file says; None if it is not complete."""
    found = {name: float(value) for name, value in re.findall(r"^llmtraced_prefetch_(\w+)\{.*\} (\S+)$", text, re.M)}
    try:
        return Seen(written_ns, found["engaged"] == 1, int(found["pinned_bytes"]), int(found["tokens_total"]))
    except KeyError:
        return None


class Settling:
    """Tells when the sidecar has settled: it has decided, and what it pins has not changed for some seconds.

    Attributes:
        last: the last look.
    """

    def __init__(self) -> None:
        self.last: Seen | None = None
        self._same = 0

    def settled(self, seen: Seen | None) -> bool:
        """Take in a look at its metrics; return whether it has settled. The same file twice is one look."""
        last = self.last
        if seen is not None and (last is None or seen.written_ns != last.written_ns):
            same = last is not None and (last.engaged, last.pinned_bytes) == (seen.engaged, seen.pinned_bytes)
            self._same = self._same + 1 if same and seen.tokens >= _SEEN_TOKENS else 0
            self.last = seen
        return self._same >= _STABLE_WRITES - 1


class Sidecar:
    """``llmtraced prefetch`` on a server, as a user would start it, in a session of its own.

    Args:
        pid: the server.
        strategy: as ``--strategy`` takes it; after a colon, joined by ``+``, what ``--predict`` takes: ``moe:router``.
        folder: for its metrics and what it says.
    """

    def __init__(self, pid: int, strategy: str, folder: Path) -> None:
        self.strategy, self._metrics = strategy, folder / "sidecar.prom"
        self._out, self._log = folder / "sidecar.json", folder / "sidecar.log"
        word, _, sources = strategy.partition(":")
        self._argv = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(pid), "--strategy", word]
        self._argv += ["--predict", sources.replace("+", ",")] if sources else []
        self._argv += ["--metrics", str(self._metrics), "--json"]
        self._settling = Settling()

    def __enter__(self) -> Self:
        self._metrics.unlink(missing_ok=True)
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self._child = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
                env=children.environment(),
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stop(self._child, 20.0)

    @property
    def pid(self) -> int:
        """Its process id; launcher and sidecar are the same process."""
        return self._child.pid

    def ready(self) -> bool:
        """Return whether it has settled.

        Raises:
            LlmtracedError: it has ended.
        """
        if self._child.poll() is not None:
            raise LlmtracedError(f"the sidecar ended with status {self._child.returncode}: {log_tail(self._log, 1)}")
        try:
            seen = parse_metrics(self._metrics.read_text(), self._metrics.stat().st_mtime_ns)
        except FileNotFoundError:
            seen = None
        return self._settling.settled(seen)

    def summary(self) -> dict[str, Any]:
        """Return what it said of itself when it ended; ``said``: its lines of log; ``settled_pinned_bytes``: before."""
        last = self._settling.last
        said = {
            "settled_pinned_bytes": last.pinned_bytes if last else None,
            "said": [printable(line, 400) for line in self._log.read_text(errors="replace").splitlines()],
        }
        try:
            return {**json.loads(self._out.read_text()), **said}
        except ValueError:
            return {"state": "no summary", **said}


# --- a comparator


class Vmtouch:
    """``vmtouch -l -p``: locks the first bytes of a file, inside the server's cgroup.

    Args:
        path: the file.
        nbytes: to lock, from its beginning.
        group: to run in.
    """

    def __init__(self, path: Path, nbytes: int, group: MemoryCgroup) -> None:
        self.nbytes = min(nbytes, path.stat().st_size) >> 20 << 20
        self._argv = group.enter_command(["vmtouch", "-q", "-l", "-p", f"-{self.nbytes >> 20}M", str(path)])

    @staticmethod
    def installed() -> bool:
        """Return whether there is a vmtouch."""
        return shutil.which("vmtouch") is not None

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stop(self._child)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def ready(self) -> bool:
        """Return whether everything is locked.

        Raises:
            LlmtracedError: it has ended.
        """
        if self._child.poll() is not None:
            raise LlmtracedError(f"vmtouch ended with status {self._child.returncode}")
        return _locked_bytes(self._child.pid) >= self.nbytes

    def summary(self) -> dict[str, Any]:
        """Return ``locked_bytes``."""
        return {"locked_bytes": self.nbytes}


def _locked_bytes(pid: int) -> int:
    """Return the bytes of files that a process has locked and that are there; VmLck alone counts what is to come."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return min(int(kb) * 1024 for kb in re.findall(r"^(?:VmLck|RssFile):\s+(\d+) kB", status, re.M))
    return 0


# --- pressure on the whole machine


def bytes_to_lock(available: int, wanted: int) -> int:
    """Return how much memory to lock so that ``wanted`` bytes of ``available`` are left.

    Raises:
        LlmtracedError: less than :data:`LEFT_FREE` would be left, or there is not more than that to begin with.
    """
    if wanted < LEFT_FREE:
        raise LlmtracedError(
            f"--pressure lock would leave {wanted / 1e9:.2f} GB to the whole machine, and {LEFT_FREE / 1e9:.2f} GB is "
            "the least that is safe: take a larger model or more memory, or --pressure cgroup",
            USAGE,
        )
    if available <= wanted:
        raise LlmtracedError(f"only {available / 1e9:.2f} GB are available: nothing is left to be locked")
    return available - wanted


class Locked:
    """A process that locks memory of the whole machine; the first to be killed should memory run out.

    Args:
        wanted: bytes that are to stay available.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self.nbytes = 0

    def __enter__(self) -> Self:
        meminfo = Path("/proc/meminfo").read_text()
        available = int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo)[0]) * 1024
        self.nbytes = bytes_to_lock(available, self._wanted)
        self._child = subprocess.Popen(
            [sys.executable, "-c", f"from llmtraced.bench.beside import _hold; _hold({self.nbytes})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=children.environment(),
        )
        assert self._child.stdout is not None
        try:
            if self._child.stdout.readline() != b"locked\n":
                raise LlmtracedError(f"{self.nbytes / 1e9:.2f} GB of memory cannot be locked: run as root")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stop(self._child, 5.0)
        if self._child.stdout is not None:
            self._child.stdout.close()


def _hold(nbytes: int) -> None:
    """Lock memory until told to stop, or until the parent is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_text("1000")
    with mmap.mmap(-1, nbytes) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        print("locked", flush=True)
        signal.pause()
