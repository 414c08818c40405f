"""What Prometheus scrapes: totals that the kernel keeps, turned into series when they are asked for.

Nothing here counts events. Faults and pages are added up in the kernel (``struct counter`` in bpf/common.h), in arrays
that we have mapped: a scrape reads memory. docs/metrics.md lists the series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from llmtraced import __version__
from llmtraced.errors import printable
from llmtraced.recorder import Recorder
from llmtraced.schema import CAUSES, PHASES, Probe
from llmtraced.session import Session

__all__ = ["LlmtracedCollector", "TensorTotals", "tensor_totals"]

_LABELS = ("pid", "model")
_TENSOR_LABELS = (*_LABELS, "tensor", "layer", "component")


class TensorTotals:
    """Totals of every tensor of a session, index = the resolver's tensor number, the last entry: outside tensors.

    Attributes:
        minor, major: int64 (n + 1,), faults.
        fault_ns: int64 (n + 1,).
        added: int64 (n + 1, causes), bytes.
        again, evicted: int64 (n + 1,), bytes.
    """

    def __init__(self, n: int) -> None:
        self.minor = np.zeros(n + 1, np.int64)
        self.major = np.zeros(n + 1, np.int64)
        self.fault_ns = np.zeros(n + 1, np.int64)
        self.added = np.zeros((n + 1, len(CAUSES)), np.int64)
        self.again = np.zeros(n + 1, np.int64)
        self.evicted = np.zeros(n + 1, np.int64)


def tensor_totals(session: Session) -> TensorTotals:
    """Return the kernel's totals by tensor; pages with several tensors in them are divided by bytes, exactly."""
    totals = TensorTotals(len(session.resolver.tensors))
    for file in session.files.values():
        extents = session.resolver.extents(file)
        by_byte, by_page = session.tracer.counters(file)
        for name in ("minor", "major", "fault_ns"):
            np.add.at(getattr(totals, name), extents.byte_tensor, by_byte[name].astype(np.int64))
        segment, tensor, share = _shares(extents.page_bytes)
        np.add.at(totals.added, tensor, by_page["added"][segment].astype(np.int64) * share[:, None])
        np.add.at(totals.again, tensor, by_page["again"][segment].astype(np.int64) * share)
        np.add.at(totals.evicted, tensor, by_page["evicted"][segment].astype(np.int64) * share)
    return totals


def _shares(page_bytes: list[list[tuple[int, int]]]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return for each (page segment, tensor) pair: the segment, the tensor, its bytes in one page."""
    flat = np.array([(i, t, b) for i, share in enumerate(page_bytes) for t, b in share], np.int64).reshape(-1, 3)
    return flat[:, 0], flat[:, 1], flat[:, 2]


class LlmtracedCollector(Collector):
    """Makes the series.

    Args:
        recorder: whose sessions are shown.
        tensor_limit: a session with more tensors than this is shown by layer and component instead.
        gauges: further figures of the caller: name → (help, function).
    """

    def __init__(
        self,
        recorder: Recorder,
        tensor_limit: int = 2000,
        gauges: dict[str, tuple[str, Callable[[], float]]] | None = None,
    ) -> None:
        self._recorder = recorder
        self._limit = tensor_limit
        self._gauges = gauges or {}

    def describe(self) -> Iterable[Metric]:
        """Return nothing: series come and go with the traced processes."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all series."""
        started = time.perf_counter()
        with self._recorder.lock:
            self._recorder.tracer.flush()
            yield from self._sessions(list(self._recorder.sessions.values()))
            yield from self._own()
        seconds = time.perf_counter() - started
        yield _gauge("llmtraced_scrape_duration_seconds", "Time that making these series took.", seconds)

    def _sessions(self, sessions: list[Session]) -> Iterator[Metric]:
        faults = _counter("llmtraced_tensor_faults", "Page faults on the tensor's pages.", (*_TENSOR_LABELS, "type"))
        seconds = _counter("llmtraced_tensor_fault_seconds", "Time that threads spent in those faults.", _TENSOR_LABELS)
        read = _counter("llmtraced_tensor_read_bytes", "Bytes brought into the page cache.", _TENSOR_LABELS)
        again = _counter("llmtraced_tensor_reread_bytes", "Those that had been brought in before.", _TENSOR_LABELS)
        evicted = _counter("llmtraced_tensor_evicted_bytes", "Bytes that left the page cache.", _TENSOR_LABELS)
        causes = _counter("llmtraced_read_bytes", "Bytes of the model brought in, by cause.", (*_LABELS, "cause"))
        tokens = _counter("llmtraced_tokens", "Tokens evaluated.", (*_LABELS, "phase"))
        graphs = _counter("llmtraced_graphs", "Compute graphs evaluated.", _LABELS)
        evaluating = _counter("llmtraced_eval_seconds", "Time spent evaluating graphs.", _LABELS)
        stall = _counter("llmtraced_stall_seconds", "Time with at least one thread in a fault on the model.", _LABELS)
        events = _counter(
            "llmtraced_events",
            "The account: counted in the kernel, delivered to disk, dropped.",
            (*_LABELS, "probe", "outcome"),
        )
        size = GaugeMetricFamily("llmtraced_model_bytes", "Size of the model's files.", labels=_LABELS)
        mapped = GaugeMetricFamily("llmtraced_mapped_bytes", "Bytes of model files in the process.", labels=("pid",))
        problems = GaugeMetricFamily("llmtraced_problems", "What cannot be traced in the process.", labels=("pid",))
        detail = GaugeMetricFamily(
            "llmtraced_detail", "What is recorded: 0 totals only, 1 faults, 2 ops, 3 full.", labels=("pid",)
        )
        for session in sessions:
            pid = str(session.target.pid)
            main = (pid, printable(next(iter(session.models), "")))
            totals = tensor_totals(session)
            for labels, members in self._groups(session, pid):
                faults.add_metric((*labels, "major"), float(totals.major[members].sum()))
                faults.add_metric((*labels, "minor"), float(totals.minor[members].sum()))
                seconds.add_metric(labels, float(totals.fault_ns[members].sum()) / 1e9)
                read.add_metric(labels, float(totals.added[members].sum()))
                again.add_metric(labels, float(totals.again[members].sum()))
                evicted.add_metric(labels, float(totals.evicted[members].sum()))
            models = np.append(np.array(session.resolver.model_of, np.int64), -1)
            for number, label in enumerate(session.resolver.labels):
                mine = (models == number) | ((models == -1) & (number == 0))
                for code, cause in enumerate(CAUSES):
                    causes.add_metric((pid, printable(label), cause), float(totals.added[mine, code].sum()))
                model = session.models[label]
                size.add_metric((pid, printable(label)), float(sum(s.size for s in model.shards)))
            slot = session.tracer.slots[session.slot]
            for code, phase in enumerate(PHASES):
                tokens.add_metric((*main, phase), float(slot["tokens"][code]))
            graphs.add_metric(main, float(slot["token"]))
            evaluating.add_metric(main, float(slot["eval_ns"]) / 1e9)
            stall.add_metric(main, float(slot["stall_ns"]) / 1e9)
            mapped.add_metric((pid,), float(session.target.mapped_bytes))
            problems.add_metric((pid,), float(len(session.problems)))
            detail.add_metric((pid,), float(session.detail))
            for probe in Probe:
                cell = session.account.get(probe.name.lower(), {})
                for outcome in ("counted", "delivered", "dropped"):
                    events.add_metric((*main, probe.name.lower(), outcome), float(cell.get(outcome, 0)))
        yield from (faults, seconds, read, again, evicted, causes, tokens, graphs, evaluating, stall, events)
        yield from (size, mapped, problems, detail)

    def _groups(self, session: Session, pid: str) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64]]]:
        """Yield label values and the tensors they stand for."""
        r = session.resolver
        if len(r.tensors) <= self._limit:
            for number, tensor in enumerate(r.tensors):
                label = printable(r.labels[r.model_of[number]])
                names: tuple[str, ...] = (
                    pid,
                    label,
                    printable(tensor.name),
                    str(tensor.layer),
                    printable(tensor.component),
                )
                yield names, np.array([number])
        else:
            groups: dict[tuple[str, ...], list[int]] = {}
            for number, tensor in enumerate(r.tensors):
                label = printable(r.labels[r.model_of[number]])
                key = (pid, label, "", str(tensor.layer), printable(tensor.component))
                groups.setdefault(key, []).append(number)
            for group, numbers in groups.items():
                yield group, np.array(numbers)
        yield (pid, printable(r.labels[0]), "", "-1", "(outside tensors)"), np.array([len(r.tensors)])

    def _own(self) -> Iterator[Metric]:
        recorder, tracer = self._recorder, self._recorder.tracer
        info = InfoMetricFamily("llmtraced_build", "This program.")
        info.add_metric((), {"version": __version__, "bcc": tracer.programs.bcc_version})
        yield info
        attached = GaugeMetricFamily("llmtraced_attached", "1: attached; 0: could not be.", labels=("point",))
        for point in tracer.attached:
            attached.add_metric((point,), 1)
        for point in tracer.missing:
            attached.add_metric((point,), 0)
        yield attached
        missed = _counter("llmtraced_missed", "Events that the kernel did not hand to a program.", ("program",))
        for program, n in tracer.misses().items():
            missed.add_metric((program,), n)
        yield missed
        yield _count("llmtraced_records", "Records read from the ring.", recorder.events)
        yield _count("llmtraced_unplaced_pages", "Pages in no tensor's total.", tracer.unplaced)
        yield _count("llmtraced_unsettled", "Intervals whose account did not add up in time.", recorder.unsettled)
        yield _count("llmtraced_trace_bytes", "Bytes of trace files written.", recorder.bytes_written)
        yield _count("llmtraced_trace_write_errors", "Files that could not be written.", recorder.write_errors)
        yield _gauge(
            "llmtraced_recording_paused", "1: the last interval was not written (the log says why).", recorder.paused
        )
        yield _gauge("llmtraced_ring_waiting_records", "Records in the ring.", tracer.ring.waiting)
        yield _gauge("llmtraced_ring_capacity_records", "Records that it holds.", tracer.ring.capacity)
        yield _gauge(
            "llmtraced_compile_seconds", "Time to compile and load the programs.", tracer.programs.compile_seconds
        )
        for name, (text, value) in self._gauges.items():
            yield _gauge(name, text, value())


def _counter(name: str, text: str, labels: tuple[str, ...]) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=labels)


def _count(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: Any) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
