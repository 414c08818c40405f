"""What a tracer's counters say at a moment, and what happened between two: the live view's figures.

Counters come as Prometheus families, whether a daemon was scraped or they were collected in this process, so there is
one way in (:func:`snapshot`). From there on everything is plain numbers. docs/metrics.md says what the series mean.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtraced.schema import CAUSES, PHASES

__all__ = ["COUNTERS", "Change", "History", "Interval", "Place", "Snapshot", "Totals", "change", "snapshot"]

COUNTERS: Final = ("read_bytes", "reread_bytes", "evicted_bytes", "major_faults", "minor_faults", "fault_seconds")
"""Columns of :attr:`Totals.counters`."""

_COLUMN: Final = {
    "llmtraced_tensor_read_bytes_total": COUNTERS.index("read_bytes"),
    "llmtraced_tensor_reread_bytes_total": COUNTERS.index("reread_bytes"),
    "llmtraced_tensor_evicted_bytes_total": COUNTERS.index("evicted_bytes"),
    "llmtraced_tensor_fault_seconds_total": COUNTERS.index("fault_seconds"),
}
_FAULTS: Final = "llmtraced_tensor_faults_total"
_FAULT_TYPES: Final = {"major": COUNTERS.index("major_faults"), "minor": COUNTERS.index("minor_faults")}
_PLAIN: Final = {
    "llmtraced_graphs_total": "graphs",
    "llmtraced_stall_seconds_total": "stall_seconds",
    "llmtraced_problems": "problems",
}

Numbers = NDArray[np.float64]


class Place(NamedTuple):
    """What has counters of its own: a tensor, or (``tensor`` is empty) all of a layer's with that component."""

    model: str
    tensor: str
    layer: int
    component: str


@dataclass(slots=True)
class Totals:
    """A process's counters, since it was first traced.

    Attributes:
        models: bytes of each model's files, by label.
        tokens: float64 (phases,).
        causes: float64 (causes,), bytes brought into the page cache.
        counters: float64 (places, :data:`COUNTERS`).
        resident: bytes in the page cache and size, by place; None: not known.
    """

    pid: int
    models: dict[str, float] = field(default_factory=dict)
    problems: float = 0.0
    graphs: float = 0.0
    stall_seconds: float = 0.0
    tokens: Numbers = field(default_factory=lambda: np.zeros(len(PHASES)))
    causes: Numbers = field(default_factory=lambda: np.zeros(len(CAUSES)))
    places: tuple[Place, ...] = ()
    counters: Numbers = field(default_factory=lambda: np.zeros((0, len(COUNTERS))))
    resident: Mapping[Place, tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All traced processes at ``time`` (seconds, of any steady clock)."""

    time: float
    processes: Mapping[int, Totals]


def snapshot(families: Iterable[Any], time: float) -> Snapshot | None:
    """Return what Prometheus families (of prometheus_client) say, or None if they are not llmtraced's."""
    processes: dict[int, Totals] = {}
    rows: dict[int, dict[Place, Numbers]] = {}
    ours = False
    for family in families:
        ours |= family.name.startswith("llmtraced_build")
        for sample in family.samples:
            labels, value = sample.labels, float(sample.value)
            pid = labels.get("pid", "")
            if not pid.isdecimal() or not math.isfinite(value):
                continue
            process = processes.setdefault(int(pid), Totals(int(pid)))
            if sample.name in _COLUMN or sample.name == _FAULTS:
                column = _FAULT_TYPES.get(labels.get("type", "")) if sample.name == _FAULTS else _COLUMN[sample.name]
                if column is not None:
                    mine = rows.setdefault(int(pid), {})
                    place = _place(labels)
                    row = mine.get(place)
                    if row is None:
                        row = mine[place] = np.zeros(len(COUNTERS))
                    row[column] += value
            else:
                _take(process, sample.name, labels, value)
    for pid_, mine in rows.items():
        processes[pid_].places = tuple(mine)
        processes[pid_].counters = np.stack(list(mine.values()))
    return Snapshot(time, processes) if ours else None


def _place(labels: Mapping[str, str]) -> Place:
    layer = labels.get("layer", "")
    number = int(layer) if layer.isdecimal() else -1
    return Place(labels.get("model", ""), labels.get("tensor", ""), number, labels.get("component", ""))


def _take(process: Totals, name: str, labels: Mapping[str, str], value: float) -> None:
    if name in _PLAIN:
        setattr(process, _PLAIN[name], value)
    elif name == "llmtraced_model_bytes":
        process.models[labels.get("model", "")] = value
    elif name == "llmtraced_tokens_total" and labels.get("phase") in PHASES:
        process.tokens[PHASES.index(labels["phase"])] = value
    elif name == "llmtraced_read_bytes_total" and labels.get("cause") in CAUSES:
        process.causes[CAUSES.index(labels["cause"])] += value


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a process in ``seconds``: differences of the fields of :class:`Totals` with the same names."""

    seconds: float
    graphs: float
    stall_seconds: float
    tokens: Numbers
    causes: Numbers
    places: tuple[Place, ...]
    counters: Numbers

    @property
    def stall_share(self) -> float:
        """The share of the time with at least one thread in a fault on the model.

        The kernel adds a stall when it ends, so one that began earlier may make it more than there was time: it is 1.
        """
        return min(self.stall_seconds / self.seconds, 1.0)


def change(before: Totals, after: Totals, seconds: float) -> Change | None:
    """Return what happened between two readings of a process's counters, ``seconds`` apart.

    A place that was not there before has counted from nothing (a model that was mapped in between).

    Returns:
        None if there is no telling: no time went by, or a counter has become less or a place is gone, because the
        tracer was restarted.
    """
    if seconds <= 0:
        return None
    places = after.places
    earlier = before.counters
    if before.places != places:
        known = dict(zip(before.places, earlier, strict=True))
        nothing = np.zeros(len(COUNTERS))
        if not known.keys() <= set(places):
            return None
        earlier = np.stack([known.get(place, nothing) for place in places])
    counters, tokens, causes = after.counters - earlier, after.tokens - before.tokens, after.causes - before.causes
    graphs, stall = after.graphs - before.graphs, after.stall_seconds - before.stall_seconds
    if min(graphs, stall, tokens.min(), causes.min(), counters.min(initial=0)) < 0:
        return None
    return Change(seconds, graphs, stall, tokens, causes, places, counters)


@dataclass(frozen=True, slots=True)
class Interval:
    """What is kept of the time between two snapshots.

    Attributes:
        seconds: how long it was.
        causes: float64 (causes,), bytes brought in.
        layers: bytes brought in, by layer; -1 is what is in no layer.
    """

    seconds: float
    causes: Numbers
    layers: Mapping[int, float]


@dataclass(slots=True)
class _Kept:
    """Of one process: (time, counters) within the window, oldest first; what they say; intervals, oldest first."""

    snapshots: deque[tuple[float, Totals]]
    intervals: deque[Interval]
    latest: Totals
    recent: Change | None = None


class History:
    """The last snapshots, and what happened between them.

    Args:
        window: seconds over which figures are averaged; at least one interval, however long.
        length: how many intervals are kept.
    """

    def __init__(self, window: float = 5.0, length: int = 400) -> None:
        self.window = window
        self._length = length
        self._processes: dict[int, _Kept] = {}

    @property
    def pids(self) -> list[int]:
        """The processes there are, by pid."""
        return sorted(self._processes)

    def add(self, now: Snapshot) -> None:
        """Take the next snapshot in; processes that are not in it are forgotten."""
        for pid in self._processes.keys() - now.processes.keys():
            del self._processes[pid]
        for pid, totals in now.processes.items():
            kept = self._processes.setdefault(pid, _Kept(deque(), deque(maxlen=self._length), totals))
            kept.latest = totals
            before = kept.snapshots
            if before:
                step = change(before[-1][1], totals, now.time - before[-1][0])
                if step is None:
                    before.clear()
                    kept.recent = None
                else:
                    kept.intervals.append(Interval(step.seconds, step.causes, _by_layer(step)))
            before.append((now.time, totals))
            while len(before) > 2 and now.time - before[1][0] >= self.window:
                before.popleft()
            if len(before) > 1:
                kept.recent = change(before[0][1], totals, now.time - before[0][0])

    def skip(self) -> None:
        """Do not count the time until the next snapshot: nobody is looking."""
        for kept in self._processes.values():
            kept.snapshots.clear()

    def latest(self, pid: int) -> Totals:
        """Return the newest counters of a process."""
        return self._processes[pid].latest

    def recent(self, pid: int) -> Change | None:
        """Return what happened in the last :attr:`window` seconds; None until there are two snapshots."""
        return self._processes[pid].recent

    def intervals(self, pid: int) -> Sequence[Interval]:
        """Return a process's intervals, oldest first."""
        return tuple(self._processes[pid].intervals)


def _by_layer(step: Change) -> dict[int, float]:
    found: dict[int, float] = {}
    for place, read in zip(step.places, step.counters[:, COUNTERS.index("read_bytes")].tolist(), strict=True):
        found[place.layer] = found.get(place.layer, 0.0) + read
    return found
