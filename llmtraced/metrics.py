"""What Prometheus scrapes: totals that the kernel keeps, turned into series when they are asked for.

Nothing here counts events. Faults and pages are added up in the kernel (``struct counter`` in bpf/common.h), in arrays
that we have mapped: a scrape reads memory. docs/metrics.md lists the series.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmtraced import __version__
from llmtraced.errors import printable
from llmtraced.exposition import NONE, Family, Labels
from llmtraced.recorder import Recorder
from llmtraced.resolve import Resolver
from llmtraced.schema import CAUSES, PHASES, Probe
from llmtraced.session import Session
from llmtraced.sidecars import sidecar_families

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


class _Groups:
    """The series of a session's tensors: which tensors each stands for, and its labels, made once for all scrapes.

    Args:
        resolver: of the session.
        pid: of its process.
        limit: with more tensors than this they are grouped by layer and component.
    """

    def __init__(self, resolver: Resolver, pid: str, limit: int) -> None:
        self.resolver = resolver
        each = len(resolver.tensors) <= limit
        numbers: dict[tuple[str, ...], int] = {}
        self._of = np.zeros(len(resolver.tensors) + 1, np.int64)
        for number, tensor in enumerate(resolver.tensors):
            values = (
                pid,
                printable(resolver.labels[resolver.model_of[number]]),
                printable(tensor.name) if each else "",
                str(tensor.layer),
                printable(tensor.component),
            )
            # Tensors whose names are the same once they are escaped and cut are one series.
            self._of[number] = numbers.setdefault(values, len(numbers))
        outside = (pid, printable(resolver.labels[0]), "", "-1", "(outside tensors)")
        self._of[-1] = numbers.setdefault(outside, len(numbers))
        self.labels = [Labels(_TENSOR_LABELS, values) for values in numbers]
        self.major, self.minor = (
            [Labels((*_TENSOR_LABELS, "type"), (*values, kind)) for values in numbers] for kind in ("major", "minor")
        )

    def sums(self, by_tensor: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sums of the groups, from (tensors + 1,)."""
        sums = np.zeros(len(self.labels), np.int64)
        np.add.at(sums, self._of, by_tensor)
        return sums


class LlmtracedCollector:
    """Makes the series.

    Args:
        recorder: whose sessions are shown.
        tensor_limit: a session with more tensors than this is shown by layer and component instead.
        gauges: further figures of the caller: name → (help, function).
        sidecars: pattern of the files in which sidecars say what they do; empty: none.
    """

    def __init__(
        self,
        recorder: Recorder,
        tensor_limit: int = 2000,
        gauges: dict[str, tuple[str, Callable[[], float]]] | None = None,
        sidecars: str = "",
    ) -> None:
        self._recorder = recorder
        self._limit = tensor_limit
        self._gauges = gauges or {}
        self._sidecars = sidecars
        self._groups: dict[int, _Groups] = {}

    def collect(self) -> list[Family]:
        """Return all series. Not to be called by two threads at a time."""
        started = time.perf_counter()
        with self._recorder.lock:
            self._recorder.tracer.flush()
            families = [*self._sessions(list(self._recorder.sessions.values())), *self._own()]
        if self._sidecars:
            families += sidecar_families(self._sidecars)
        seconds = time.perf_counter() - started
        return [*families, _gauge("llmtraced_scrape_duration_seconds", "Time that making these series took.", seconds)]

    def _sessions(self, sessions: list[Session]) -> list[Family]:
        faults = _counter("llmtraced_tensor_faults_total", "Page faults on the tensor's pages.")
        seconds = _counter("llmtraced_tensor_fault_seconds_total", "Time that threads spent in those faults.")
        read = _counter("llmtraced_tensor_read_bytes_total", "Bytes brought into the page cache.")
        again = _counter("llmtraced_tensor_reread_bytes_total", "Those that had been brought in before.")
        evicted = _counter("llmtraced_tensor_evicted_bytes_total", "Bytes that left the page cache.")
        causes = _counter("llmtraced_read_bytes_total", "Bytes of the model brought in, by cause.")
        tokens = _counter("llmtraced_tokens_total", "Tokens evaluated.")
        graphs = _counter("llmtraced_graphs_total", "Compute graphs evaluated.")
        evaluating = _counter("llmtraced_eval_seconds_total", "Time spent evaluating graphs.")
        stall = _counter("llmtraced_stall_seconds_total", "Time with at least one thread in a fault on the model.")
        events = _counter("llmtraced_events_total", "The account: counted in the kernel, delivered to disk, dropped.")
        size = Family("llmtraced_model_bytes", "Size of the model's files.", "gauge")
        mapped = Family("llmtraced_mapped_bytes", "Bytes of model files in the process.", "gauge")
        problems = Family("llmtraced_problems", "What cannot be traced in the process.", "gauge")
        detail = Family("llmtraced_detail", "What is recorded: 0 totals only, 1 faults, 2 ops, 3 full.", "gauge")
        kept: dict[int, _Groups] = {}
        for session in sessions:
            pid = str(session.target.pid)
            main = (pid, printable(next(iter(session.models), "")))
            groups = self._groups.get(session.slot)
            if groups is None or groups.resolver is not session.resolver:
                groups = _Groups(session.resolver, pid, self._limit)
            kept[session.slot] = groups
            totals = tensor_totals(session)
            faults.series += zip(groups.major, groups.sums(totals.major).tolist(), strict=True)
            faults.series += zip(groups.minor, groups.sums(totals.minor).tolist(), strict=True)
            seconds.series += zip(groups.labels, (groups.sums(totals.fault_ns) / 1e9).tolist(), strict=True)
            read.series += zip(groups.labels, groups.sums(totals.added.sum(axis=1)).tolist(), strict=True)
            again.series += zip(groups.labels, groups.sums(totals.again).tolist(), strict=True)
            evicted.series += zip(groups.labels, groups.sums(totals.evicted).tolist(), strict=True)
            models = np.append(np.array(session.resolver.model_of, np.int64), -1)
            for number, label in enumerate(session.resolver.labels):
                mine = (models == number) | ((models == -1) & (number == 0))
                by_cause = totals.added[mine].sum(axis=0).tolist()
                for cause, nbytes in zip(CAUSES, by_cause, strict=True):
                    causes.add(Labels((*_LABELS, "cause"), (pid, printable(label), cause)), nbytes)
                size.add(Labels(_LABELS, (pid, printable(label))), sum(s.size for s in session.models[label].shards))
            slot = session.tracer.slots[session.slot]
            for code, phase in enumerate(PHASES):
                tokens.add(Labels((*_LABELS, "phase"), (*main, phase)), int(slot["tokens"][code]))
            one, process = Labels(_LABELS, main), Labels(("pid",), (pid,))
            graphs.add(one, int(slot["token"]))
            evaluating.add(one, float(slot["eval_ns"]) / 1e9)
            stall.add(one, float(slot["stall_ns"]) / 1e9)
            mapped.add(process, session.target.mapped_bytes)
            problems.add(process, len(session.problems))
            detail.add(process, int(session.detail))
            for probe in Probe:
                name = probe.name.lower()
                cell = session.account.get(name, {})
                for outcome in ("counted", "delivered", "dropped"):
                    events.add(
                        Labels((*_LABELS, "probe", "outcome"), (*main, name, outcome)), int(cell.get(outcome, 0))
                    )
        self._groups = kept
        return [
            *(faults, seconds, read, again, evicted, causes, tokens, graphs, evaluating, stall, events),
            *(size, mapped, problems, detail),
        ]

    def _own(self) -> list[Family]:
        recorder, tracer = self._recorder, self._recorder.tracer
        info = Family("llmtraced_build_info", "This program.", "gauge")
        info.add(Labels(("version", "bcc"), (__version__, tracer.programs.bcc_version)), 1)
        attached = Family("llmtraced_attached", "1: attached; 0: could not be.", "gauge")
        for points, value in ((tracer.attached, 1), (tracer.missing, 0)):
            for point in points:
                attached.add(Labels(("point",), (point,)), value)
        missed = _counter("llmtraced_missed_total", "Events that the kernel did not hand to a program.")
        for program, n in tracer.misses().items():
            missed.add(Labels(("program",), (program,)), n)
        return [
            info,
            attached,
            missed,
            _count("llmtraced_records_total", "Records read from the ring.", recorder.events),
            _count("llmtraced_unplaced_pages_total", "Pages in no tensor's total.", tracer.unplaced),
            _count("llmtraced_unsettled_total", "Intervals whose account did not add up in time.", recorder.unsettled),
            _count("llmtraced_trace_bytes_total", "Bytes of trace files written.", recorder.bytes_written),
            _count("llmtraced_trace_write_errors_total", "Files that could not be written.", recorder.write_errors),
            _gauge(
                "llmtraced_recording_paused",
                "1: the last interval was not written (the log says why).",
                int(recorder.paused),
            ),
            _gauge("llmtraced_ring_waiting_records", "Records in the ring.", tracer.ring.waiting),
            _gauge("llmtraced_ring_capacity_records", "Records that it holds.", tracer.ring.capacity),
            _gauge(
                "llmtraced_compile_seconds", "Time to compile and load the programs.", tracer.programs.compile_seconds
            ),
            *(_gauge(name, text, value()) for name, (text, value) in self._gauges.items()),
        ]


def _counter(name: str, text: str) -> Family:
    return Family(name, text, "counter")


def _count(name: str, text: str, value: float) -> Family:
    return Family(name, text, "counter", [(NONE, value)])


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, text, "gauge", [(NONE, value)])
