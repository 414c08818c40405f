"""A daemon and a sidecar under test, a small made-up server to be found, and a real one that has something to do."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq
from helpers import EMULATED, wait_until
from prometheus_client.parser import text_string_to_metric_families

from llmtraced.bench.engine import Server

__all__ = [
    "TOKENS",
    "Daemon",
    "MadeUp",
    "Router",
    "Sidecar",
    "accounts",
    "asking",
    "build",
    "mounted",
    "read_bytes",
    "sums",
]

TOKENS = 4 if EMULATED else 16
"""Tokens of an answer of :func:`asking`."""

_SOURCE = """
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile char sum;
__attribute__((noinline)) int ggml_graph_compute(int *p) { __asm__ volatile("" ::: "memory"); return *p; }
static void touch(const char *data, long size) { for (long at = 0; at < size; at += 4096) sum += data[at]; }
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDONLY), one = 1;
    struct stat status;
    char line[64];
    fstat(fd, &status);
    char *data = mmap(0, status.st_size, PROT_READ, MAP_SHARED, fd, 0);
    madvise(data, status.st_size, MADV_RANDOM);
    if (argc > 2) prctl(PR_SET_NAME, argv[2]);
    puts("ready"), fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (*line == 'g') ggml_graph_compute(&one);
        if (*line == 't') madvise(data, status.st_size, MADV_DONTNEED), touch(data, status.st_size);
        if (*line == 'f' && !fork()) {
            madvise(data, status.st_size, MADV_DONTNEED), touch(data, status.st_size);
            _exit(0);
        }
        if (*line == 'f') wait(0);
        printf("%d\\n", getpid()), fflush(stdout);
    }
    return 0;
}
"""


def build(path: Path) -> Path:
    """Compile the made-up server: it maps a model, and has a ``ggml_graph_compute``."""
    subprocess.run(["cc", "-O1", "-x", "c", "-", "-o", path], input=_SOURCE, text=True, check=True)
    return path


class MadeUp:
    """A process that maps a model and does what it is told: ``g`` a graph, ``t`` touch all pages, ``f`` in a child."""

    def __init__(self, program: Path, model: Path, *arguments: str) -> None:
        self.command = [program, model, *arguments]

    def __enter__(self) -> Self:
        self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.child.stdout
        assert self.child.stdout.readline() == "ready\n"
        return self

    @property
    def pid(self) -> int:
        return self.child.pid

    def do(self, what: str) -> bool:
        """Return whether it has done it (it may have died of it)."""
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.write(what + "\n")
        self.child.stdin.flush()
        return self.child.stdout.readline() == f"{self.pid}\n"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate()


class Daemon:
    """A daemon, ended with SIGTERM on exit and killed where it does not end.

    Attributes:
        process: the child.
        trace: its folder.
    """

    def __init__(self, trace: Path | str, log: Path, *options: str, wait: bool = True) -> None:
        self.trace, self.log, self.said_file = Path(trace), log, log.with_suffix(".json")
        self._wait = wait
        self._scraped = 0.0
        self.command = [sys.executable, "-m", "llmtraced", "daemon", "--trace", str(trace), "--listen", "127.0.0.1:0"]
        self.command += ["--flush", "500ms", "--scan", "100ms", "--json", *options]

    def __enter__(self) -> Self:
        with self.log.open("wb") as stderr, self.said_file.open("wb") as stdout:
            self.process = subprocess.Popen(self.command, stderr=stderr, stdout=stdout, start_new_session=True)
        if self._wait:
            self.port = wait_until(lambda: self.said("ready"), 60, "the daemon is ready")[0]["port"]
        return self

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return what it said of a kind of event."""
        lines = self.said_file.read_text().split("\n")[:-1]
        events = [json.loads(line) for line in lines]
        return [e for e in events if e["event"] == event and fields.items() <= e.items()]

    def text(self) -> str:
        """Return what it exports."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Yield (name, labels, value) of what it exports now: it makes a new text ten times a second at most."""
        time.sleep(max(self._scraped + 0.11 - time.monotonic(), 0))
        text = self.text()
        self._scraped = time.monotonic()
        for family in text_string_to_metric_families(text):
            yield from ((s.name, s.labels, s.value) for s in family.samples)

    def scrape(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Return the values by name and sorted labels."""
        return {(name, tuple(sorted(labels.items()))): value for name, labels, value in self.samples()}

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        return sum(v for n, have, v in self.samples() if n == name and labels.items() <= have.items())

    def found(self, pid: int) -> None:
        """Wait until it traces a process."""
        wait_until(lambda: self.said("begin", pid=pid), 20, f"process {pid} is found")

    def end(self) -> None:
        """End it as systemd does."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.end()
        finally:
            self.process.kill()
            self.process.wait()
            if kind is not None:
                print(self.log.read_text()[-4000:], self.said_file.read_text()[-4000:], sep="\n")


class Sidecar:
    """``llmtraced prefetch`` as a child; killed on exit if it is still there.

    Attributes:
        child: the process; the same before and after it has become the bare sidecar.
    """

    def __init__(self, pid: int, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.errors = folder / "sidecar.prom", folder / "sidecar.err"
        self.file.unlink(missing_ok=True)
        self.command = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(pid), "--json"]
        self.command += ["--metrics", str(self.file), *options]

    def __enter__(self) -> Self:
        with self.errors.open("wb") as err:
            self.child = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=err, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate()

    def said(self) -> str:
        return self.errors.read_text()

    def metrics(self) -> dict[str, float]:
        """Return what it last wrote, by name without the prefix; nothing before it has written."""
        try:
            text = self.file.read_text()
        except FileNotFoundError:
            return {}
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {s.name.removeprefix("llmtraced_prefetch_"): s.value for s in samples}

    def bare(self) -> bool:
        """Tell whether it has become the bare sidecar."""
        assert self.child.poll() is None, (self.child.returncode, self.said())
        return b"llmtraced.prefetch.sidecar" in Path(f"/proc/{self.child.pid}/cmdline").read_bytes()

    def first(self) -> bool:
        """Tell whether each of its threads has its turn before ordinary ones: one alone can hold up all."""
        threads = [int(task.name) for task in Path(f"/proc/{self.child.pid}/task").iterdir()]
        return all(os.sched_getscheduler(one) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO for one in threads)

    def settled(self) -> bool:
        """Tell whether it is engaged and pins no more."""
        assert self.child.poll() is None, (self.child.returncode, self.said())
        before = self.metrics()
        if not before.get("engaged"):
            return False
        time.sleep(12 if EMULATED else 1.2)
        return before["pinned_bytes"] == self.metrics()["pinned_bytes"]

    def end(self, number: int = signal.SIGTERM) -> dict[str, Any]:
        """Ask it to end; return its summary."""
        self.child.send_signal(number)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Wait until it has ended by itself; return its summary."""
        out, _ = self.child.communicate(timeout=300 if EMULATED else 30)
        assert self.child.returncode == 0, self.said()
        answer: dict[str, Any] = json.loads(out)
        return answer


def read_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextmanager
def mounted(kind: str, source: str, folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system for as long as the block takes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", kind, "-o", options, source, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def accounts(trace: Path, table: str, pid: int) -> list[dict[str, int]]:
    """Return the account of each of a process's files of a table; each is checked to add up to its rows."""
    found: list[dict[str, int]] = []
    for path in sorted(trace.glob(f"{table}/**/*-{pid}-*.parquet")):
        if path.name.startswith("."):
            continue
        cell: dict[str, int] = json.loads(pq.read_schema(path).metadata[b"llmtraced"])["account"].get(table, {})
        if cell:
            found.append(cell)
            assert cell["counted"] == cell["delivered"] + cell["dropped"], (path, cell)
            if table == "faults":
                assert pq.read_metadata(path).num_rows == cell["delivered"], path
    return found


def sums(cells: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return an account summed over files."""
    return {key: sum(cell[key] for cell in cells) for key in ("counted", "delivered", "dropped")}


@contextmanager
def asking(
    server: Server, expected: str = "", prompt: Sequence[int] = tuple(range(20, 27)), tokens: int = TOKENS
) -> Iterator[list[str]]:
    """Have the server generate all the time; yield the answers so far. Each must be ``expected``, where given."""
    answers: list[str] = []
    problems: list[BaseException] = []
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                answers.append(server.completion(prompt, tokens)["content"])
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert not problems, problems
    if expected:
        assert set(answers) == {expected}


class Router(Server):
    """A llama-server without a model of its own: it starts one for each model of a folder that is asked for."""

    def command(self, port: int) -> list[str]:
        words = super().command(port)
        at = words.index("-m")
        return [*words[:at], "--models-dir", str(self.model.parent), *words[at + 2 :]]
