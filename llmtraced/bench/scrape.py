"""How long a scrape of ``/metrics`` takes, with many tensors and with few, at rest and while faults come in.

A real process maps a model with so many tensors and has faulted on all of them; a real daemon traces it and nothing
else, so that other servers of the machine are not in the answer. The scraper asks as Prometheus does, over HTTP, a new
connection each time. docs/benchmarks.md explains the method and the figures.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import gguf
import numpy as np

from llmtraced import children
from llmtraced.bench.engine import stop
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.pressure import drop_cache
from llmtraced.bench.switch import cpu_seconds
from llmtraced.bench.touch import Touch
from llmtraced.config import Config
from llmtraced.daemon import Daemon
from llmtraced.errors import FAILED, USAGE, LlmtracedError, printable
from llmtraced.schema import PAGE

__all__ = ["GOAL_SECONDS", "LOADS", "run", "series_of", "targets", "write_model"]

log = logging.getLogger(__name__)

GOAL_SECONDS: Final = 0.1
LOADS: Final = ("idle", "flood")
MODEL_BYTES: Final = 16 << 20
"""Of each model, however many tensors that is: each has as many pages, and as many faults."""

_MOST: Final = MODEL_BYTES // 32
_APART_SECONDS: Final = 0.15  # a text that is younger than 0.1 s would be sent again (serve._FRESH_SECONDS)
_READY_SECONDS: Final = 300.0  # compiling takes 4, and minutes on an emulated processor
_HEADERS: Final = {
    "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
    "Accept-Encoding": "gzip",
}
_OF_PROCESS: Final = 6 + 28
"""Series of a process besides those of tensors: one model's, and the process's (docs/metrics.md)."""


def write_model(path: Path, n_tensors: int) -> None:
    """Write a GGUF file with that many tensors of equal size, zeros, 16 MiB in all."""
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it announces every file at INFO
    writer = gguf.GGUFWriter(path, "llama")
    for i in range(n_tensors):
        writer.add_tensor(f"blk.{i // 9}.ffn_{i % 9}.weight", np.zeros(MODEL_BYTES // n_tensors // 4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def series_of(text: str, pid: int) -> tuple[Counter[str], int]:
    """Return how many series of each name are of a process, and how many series there are in all."""
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    mine = f'pid="{pid}"'
    return Counter(line.partition("{")[0] for line in samples if mine in line), len(samples)


class _Served:
    """A process with a model of ``n_tensors``, traced by a daemon of its own that serves it.

    Args:
        n_tensors: of the model.
        folder: for the model and the trace.
    """

    def __init__(self, n_tensors: int, folder: Path) -> None:
        self.n_tensors, self.model, self._trace = n_tensors, folder / f"{n_tensors}.gguf", folder / str(n_tensors)
        self._log = folder / f"{n_tensors}.log"
        self._made = 0.0

    def __enter__(self) -> Self:
        write_model(self.model, self.n_tensors)
        drop_cache(self.model)  # so that the first touches read
        offsets = range(0, self.model.stat().st_size, PAGE)
        with ExitStack() as stack:
            self.touch = stack.enter_context(Touch(self.model, offsets))
            self.pid: int = self.touch.ready["pid"]
            words = [str(self.pid), str(self.n_tensors), str(self._trace)]
            env = children.environment(OPENBLAS_NUM_THREADS="1")
            with self._log.open("wb") as stderr:
                command = [sys.executable, "-m", "llmtraced.bench.scrape", *words]
                self.daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
            stack.callback(self._end)
            patience = threading.Timer(_READY_SECONDS, self.daemon.kill)  # it may refuse the process, and wait on
            patience.start()
            stack.callback(patience.cancel)
            self._port = int(self._hear("ready")["port"])
            self._hear("begin")
            patience.cancel()
            self.touch.go()
            self._stack = stack.pop_all()
        return self

    def _hear(self, event: str) -> dict[str, Any]:
        assert self.daemon.stdout is not None
        for line in self.daemon.stdout:
            told: dict[str, Any] = json.loads(line)
            if told["event"] == event:
                return told
            if told["event"] == "failed":
                raise LlmtracedError(told["error"], told["exit_code"])
        last = (self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise LlmtracedError(f"the daemon ended with status {self.daemon.wait()}: {printable(last)}")

    def _end(self) -> None:
        assert self.daemon.stdout is not None
        stop(self.daemon, 30)
        self.daemon.stdout.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def scrape(self) -> dict[str, Any]:
        """Ask once; the answer is looked at after the clocks have been read."""
        time.sleep(_APART_SECONDS)
        cpu, begin = cpu_seconds(self.daemon.pid), time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("GET", "/metrics", headers=_HEADERS)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        seconds = time.perf_counter() - begin
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds(self.daemon.pid) - cpu, "bytes": len(body)}
        if answer.status != 200 or "Content-Encoding" in answer.headers:
            said = f"{answer.status}, {answer.headers.get('Content-Encoding', 'as it is')}"
            raise LlmtracedError(f"the benchmark is void: the daemon answered with {said}", FAILED)
        return {**found, **self._checked(body.decode())}

    def _checked(self, text: str) -> dict[str, Any]:
        """Return what the answer says of itself.

        Raises:
            LlmtracedError: it is not a new one, or not one with every series of the process.
        """
        mine, total = series_of(text, self.pid)
        wanted = 6 * (self.n_tensors + 1) + _OF_PROCESS
        if mine.total() != wanted:
            raise LlmtracedError(f"the benchmark is void: {mine.total()} series, {wanted} expected", FAILED)
        made = re.search(r"^llmtraced_scrape_duration_seconds (\S+)$", text, re.MULTILINE)
        if made is None or float(made[1]) == self._made:
            raise LlmtracedError("the benchmark is void: this text had been sent before", FAILED)
        self._made = float(made[1])
        faults = sum(float(value) for value in re.findall(r"^llmtraced_tensor_faults_total.+ (\S+)$", text, re.M))
        return {"made_seconds": self._made, "series": total, "faults": faults}

    def measure(self, load: str) -> dict[str, Any]:
        """Scrape once, at rest or while the process faults; ``faults_per_s`` are those that the daemon counted."""
        if load == "idle":
            return self.scrape()
        self.touch.again()
        try:
            first, start = self.scrape(), time.monotonic()
            second = self.scrape()
            rate = (second["faults"] - first["faults"]) / (time.monotonic() - start)
        finally:
            self.touch.rest()
        if not rate > 0:
            raise LlmtracedError("the benchmark is void: no faults came in meanwhile", FAILED)
        return {**second, "faults_per_s": rate}


def run(*, tensors: Sequence[int] = (2000, 100), rounds: int = 30) -> dict[str, Any]:
    """Measure and return the report (docs/benchmarks.md has its fields).

    Args:
        tensors: of the models; each is a process and a daemon of its own.
        rounds: how often each is scraped, at rest and in a flood, in turns.

    Raises:
        LlmtracedError: no root, no BCC, or an answer is not what it should be (the figures would mean nothing).
    """
    if len(set(tensors)) != len(tensors) or not all(0 < n <= _MOST for n in tensors):
        raise LlmtracedError(f"--tensors: different numbers of 1 to {_MOST}", USAGE)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmtraced-bench-")))
        served = [stack.enter_context(_Served(n, folder)) for n in tensors]
        conditions = {f"{one.n_tensors} {load}": (one, load) for one in served for load in LOADS}
        took: dict[str, list[dict[str, Any]]] = {name: [] for name in conditions}
        for number in range(rounds + 1):
            for name, (one, load) in conditions.items():
                found = one.measure(load)
                log.info("round %d of %d: %s: %.1f ms", number, rounds, name, found["seconds"] * 1e3)
                if number:  # the first makes the labels, once for all
                    took[name].append(found)
    scrapes = {name: _figures(*conditions[name], values) for name, values in took.items()}
    return {
        "scrapes": scrapes,
        "targets": targets(scrapes),
        "machine": machine(),
        "settings": {"tensors": list(tensors), "rounds": rounds, "model_bytes": MODEL_BYTES},
    }


def _figures(one: _Served, load: str, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": one.n_tensors, "load": load, "series": values[-1]["series"]}
    found |= {key: spread([v[key] for v in values]) for key in ("seconds", "made_seconds", "cpu_seconds")}
    found |= {"bytes": spread([v["bytes"] for v in values], digits=9)}
    return found if load == "idle" else found | {"faults_per_s": spread([v["faults_per_s"] for v in values])}


def targets(scrapes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the goal, and which scrapes meet it with their median."""
    met = {name: figures["seconds"]["median"] <= GOAL_SECONDS for name, figures in scrapes.items()}
    return {"seconds": {"limit": f"<= {GOAL_SECONDS:g}", "met": met}}


def _serve(pid: int, n_tensors: int, trace: str) -> None:
    """Be a daemon that traces one process, until SIGTERM; all else is as the daemon's configuration has it."""
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: told.append(received))
    config = Config(trace=trace, listen="127.0.0.1:0", tensors=n_tensors, sidecars="")
    Daemon(config, lambda event: print(json.dumps(event), flush=True), pid, confine=True).run(lambda: bool(told))


if __name__ == "__main__":
    try:
        _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except LlmtracedError as failure:
        told = {"event": "failed", "error": str(failure), "exit_code": failure.exit_code or FAILED}
        print(json.dumps(told), flush=True)
