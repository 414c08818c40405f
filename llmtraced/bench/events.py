"""How many events a second can be read, resolved and kept, and how many bytes a page fault takes on disk.

A ring is filled by the kernel, the producer stops, and only the emptying is timed; in each round once in each way, so
that a noisy machine treats them alike. Every record is checked afterwards: each was read once, in order, unchanged.
docs/benchmarks.md explains the method and the figures.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmtraced.bench import models, patterns
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.source import Source, words
from llmtraced.bench.workload import lay_out
from llmtraced.errors import FAILED, LlmtracedError
from llmtraced.gguf_map import Model, read_model
from llmtraced.probes.ringbuf import Ring
from llmtraced.probes.tracer import Tracer
from llmtraced.resolve import Resolver
from llmtraced.schema import Detail, Phase, Probe
from llmtraced.session import Session
from llmtraced.store import TraceWriter
from llmtraced.target import ModelFile, Target

__all__ = ["SYNTHETIC_BYTES", "run", "synthetic_model"]

log = logging.getLogger(__name__)

SYNTHETIC_BYTES: Final = 1_700_000_000
FILE_EVENTS: Final = 1 << 17
"""Records that the recorder keeps before it writes a file under load (recorder._BUFFERED_EVENTS)."""
TARGETS: Final = {
    "ring_events_per_s": (">=", 20e6),
    "ratio_ring_to_bcc": (">=", 30.0),
    "end_to_end_events_per_s": (">=", 2e6),
    "bytes_per_fault_event": ("<=", 8.0),
}


def synthetic_model(size_bytes: int = SYNTHETIC_BYTES) -> Model:
    """Return the tensor map of a dense model of about that size; no file is written."""
    return lay_out(models.dense_preset(size_bytes))


class _Drain:
    """Empties the ring in four ways; each returns its seconds, and raises if a record is lost or changed."""

    def __init__(self, source: Source, model: Model, folder: Path) -> None:
        self.source, self.ring, self.model = source, source.ring, model
        self.resolver = Resolver({"model": model}, {("model", 0): 0})
        self.layers = np.array([t.layer for t in self.resolver.tensors], np.int32)
        self._folder = folder
        self._runs = 0
        self.disk_bytes = 0
        self.verified = 0

    def expect(self, events: NDArray[Any]) -> None:
        self.events = events
        self.source.prepare(events)

    def _read(self) -> Iterator[NDArray[Any]]:
        return _batches(self.ring, len(self.events))

    def _check(self, good: bool, what: str) -> None:
        if not good or self.ring.waiting:
            raise LlmtracedError(f"the benchmark is void: {what}, {self.ring.waiting} are still in the ring", FAILED)
        self.verified += len(self.events)

    def read(self) -> float:
        """Copy all records out of the ring. Each batch is compared with what was sent, between the timed readings."""
        count, seconds, good = 0, 0.0, True
        while count < len(self.events):
            start = time.perf_counter()
            batch = self.ring.read()
            seconds += time.perf_counter() - start
            if not len(batch):
                break
            good = good and np.array_equal(words(batch), words(self.events[count : count + len(batch)]))
            count += len(batch)
        self._check(good and count == len(self.events), f"{count} records were read, or they are not those sent")
        return seconds

    def bcc(self) -> float:
        """Have BCC call a Python function that counts, for each record."""
        calls, seconds = self.source.drain_with_bcc()
        self._check(calls == len(self.events), f"BCC called back for {calls} of {len(self.events)} records")
        return seconds

    def resolve(self) -> float:
        """Read, and find each record's tensor, layer and expert."""
        found = []
        r = self.resolver
        with _timed() as clock:
            for batch in self._read():
                piece = r.at(batch["d"], batch["c"])
                tensor = r.tensor[piece]
                found.append((tensor, self.layers[tensor], r.expert[piece]))
        tensor = np.concatenate([f[0] for f in found])
        starts = np.array([t.offset for t in r.tensors], np.uint64)[tensor]
        sizes = np.array([t.size for t in r.tensors], np.uint64)[tensor]
        inside = (self.events["c"] - starts) < sizes  # unsigned: an offset below the start is far too large
        self._check(len(tensor) == len(self.events) and bool(inside.all()), "records resolved to the wrong tensor")
        return clock.seconds

    def store(self) -> float:
        """Run the recorder's own path: account, rows, tokens, Parquet files."""
        self._runs += 1
        folder = self._folder / str(self._runs)
        session = _session(self.model, folder)
        with _timed() as clock:
            for batch in self._read():
                session.take(batch)
                if session.buffered >= FILE_EVENTS:
                    session.write(*session.end_epoch(0), last=False)
            session.write(*session.end_epoch(0), last=True)
        account = session.account["faults"]
        self._check(account["delivered"] == len(self.events), f"{account['delivered']} were accounted for")
        self._check_files(sorted((folder / "faults").glob("*.parquet")))
        self.disk_bytes = session.writer.bytes["faults"]
        return clock.seconds

    def _check_files(self, files: list[Path]) -> None:
        table = pa.concat_tables([pq.read_table(f, use_threads=False) for f in files])
        sent = {"timestamp": "ts", "token": "token", "thread": "tid", "address": "a", "latency_ns": "b"}
        sent |= {"offset_bytes": "c"}
        for column, field in sent.items():
            kept = table[column].to_numpy()
            if not np.array_equal(np.sort(kept), np.sort(self.events[field]).astype(kept.dtype)):
                raise LlmtracedError(f"the benchmark is void: column {column} on disk is not what was sent", FAILED)
        for file in files:
            file.unlink()


def _batches(ring: Ring, n: int) -> Iterator[NDArray[Any]]:
    while n > 0:
        batch = ring.read()
        if not len(batch):
            return
        n -= len(batch)
        yield batch


class _Clock:
    seconds = 0.0


@contextlib.contextmanager
def _timed() -> Iterator[_Clock]:
    clock = _Clock()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        yield clock
        clock.seconds = time.perf_counter() - start
    finally:
        gc.enable()


class _NoKernel:
    """The part of a Tracer that a Session asks for, with nothing behind it: what it counted is what was delivered."""

    def __init__(self) -> None:
        self.counted = np.zeros(len(Probe), [("counted", "<u8"), ("dropped", "<u8")])

    def add_process(self, _pid: int, _phase: Phase) -> int:
        return 0

    def next_file(self) -> int:
        return 0

    def account(self, _slot: int, _epoch: int) -> NDArray[Any]:
        return self.counted

    def uprobes(self, _slot: int) -> dict[str, Any]:
        return {}

    def set_detail(self, *_arguments: object, **_settings: object) -> list[str]:
        return []

    def add_file(self, *_arguments: object) -> None:
        pass

    def set_ranges(self, *_arguments: object) -> None:
        pass


def _session(model: Model, folder: Path) -> Session:
    target = Target(os.getpid(), 0, "bench", [], {"model": model}, [ModelFile("model", 0, 0, 0, ())])
    target.__dict__["symbols"] = {}  # nothing to attach to
    writer = TraceWriter(folder, "bench", {})
    return Session(cast("Tracer", _NoKernel()), target, writer, Detail.FAULTS, Phase.DECODE)


@contextlib.contextmanager
def _one_core(others: list[int]) -> Iterator[int]:
    """Run on one CPU, with all threads of this process and of ``others``; yields the CPU's number."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)

    def move(to: set[int]) -> None:
        for pid in (os.getpid(), *others):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), to)

    threads = pa.cpu_count(), pa.io_thread_count()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    move({cpu})
    try:
        yield cpu
    finally:
        move(allowed)
        pa.set_cpu_count(threads[0])
        pa.set_io_thread_count(threads[1])


def run(
    *, rounds: int = 7, ring_bytes: int = 64 << 20, events: int | None = None, model: Path | None = None
) -> dict[str, Any]:
    """Measure and return the report (docs/benchmarks.md has its fields).

    Args:
        rounds: how often each way is timed, after one round that is not counted.
        ring_bytes: size of the ring, a power of two.
        events: records a round; by default as many as the ring takes.
        model: whose tensor map is used; by default that of a synthetic dense model of 1.7 GB.

    Raises:
        LlmtracedError: no root, no BCC, or a record was lost (the figures would mean nothing).
    """
    shape = read_model(model) if model else synthetic_model()
    with (
        Source(ring_bytes) as source,
        tempfile.TemporaryDirectory(prefix="llmtraced-bench-") as folder,
        _one_core([source.child]) as cpu,
    ):
        n = events or source.capacity
        drain = _Drain(source, shape, Path(folder))
        ways = {"ring": drain.read, "bcc_callback": drain.bcc, "resolved": drain.resolve, "end_to_end": drain.store}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        drain.expect(patterns.faults(shape, n, "mixed"))
        for number in range(rounds + 1):
            for name, drained in ways.items():
                if source.fill() != n:
                    raise LlmtracedError(f"the ring holds {source.ring.waiting} records, {n} were sent")
                rate = n / drained()
                log.info("round %d of %d: %s %.2f M events/s", number, rounds, name, rate / 1e6)
                if number:
                    rates[name].append(rate)
        per_event = {}
        for pattern in patterns.PATTERNS:
            drain.expect(patterns.faults(shape, n, pattern))
            source.fill()
            drain.store()
            per_event[pattern] = round(drain.disk_bytes / n, 3)
        spreads = {name: spread(values) for name, values in rates.items()}
        ratios = spread([a / b for a, b in zip(rates["ring"], rates["bcc_callback"], strict=True)])
        report = {
            **{f"{name}_events_per_s": found["median"] for name, found in spreads.items()},
            "ratio_ring_to_bcc": ratios["median"],
            "bytes_per_fault_event": per_event["mixed"],
            "bytes_per_fault_event_by_pattern": per_event,
            "rounds": {**spreads, "ratio_ring_to_bcc": ratios},
            "verified_events": drain.verified,
            "machine": {**machine(), "bcc": source.bcc_version},
            "settings": {
                "rounds": rounds,
                "events_per_round": n,
                "ring_bytes": ring_bytes,
                "file_events": FILE_EVENTS,
                "pattern": "mixed",
                "cpu": cpu,
                "model": shape.name,
                "model_bytes": shape.shards[0].size,
                "tensors": len(shape.tensors),
            },
        }
    return {**report, "targets": targets(report)}


def targets(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each target its limit, and whether the report meets it."""
    return {
        name: {"limit": f"{sign} {limit:g}", "met": report[name] >= limit if sign == ">=" else report[name] <= limit}
        for name, (sign, limit) in TARGETS.items()
    }
