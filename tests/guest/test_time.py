"""Clocks that are set and a machine that sleeps, for real: in a guest only (boot.py --copy), never on this machine.

A daemon traces two programs that make a known number of page faults, one on each processor, and a made-up server that
evaluates a known number of graphs. The wall clock is set by a day, forward and back, and the machine is suspended:
to idle, and to memory, where all processors but the first are unplugged.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Self

import pyarrow.parquet as pq
import pytest
from helpers import need, wait_until
from running import Daemon, MadeUp, accounts, build, sums

from llmtraced.analysis import summary as reports
from llmtraced.analysis.trace import open_trace
from llmtraced.bench.touch import Touch
from llmtraced.clock import realtime_offset_ns
from llmtraced.store import METADATA_KEY

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.environ.get("LLMTRACED_GUEST") != "1", reason="sets the clock and suspends; boot.py --copy"),
]

DAY: Final = 86_400
FAULTS, GRAPHS = 997, 7
"""Of each program, and of the server, at each stage."""
ALARM: Final = 30
"""Seconds from falling asleep, which takes some of them, to the alarm."""
SLEEP: Final = 4
"""Seconds that it must have slept."""
WATCHDOG: Final = 30
"""Seconds, as the unit has it."""


def set_clock(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


def asleep(how: str) -> float:
    """Return a clock that tells how long it slept: in memory CLOCK_MONOTONIC stands still; idle it may go on."""
    awake = time.clock_gettime(time.CLOCK_MONOTONIC) if how == "mem" else 0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - awake


def suspend(how: str) -> None:
    """Suspend to idle (``freeze``) or to memory (``mem``), until the clock or somebody at the power button wakes it."""
    alarm, power = Path("/sys/class/rtc/rtc0/wakealarm"), Path("/sys/power")
    need(how in (power / "state").read_text().split(), f"the kernel does not suspend to {how}")
    if how == "mem":
        (power / "mem_sleep").write_text("deep")
    for _ in range(5):  # the button may be pressed while it falls asleep
        alarm.write_text("0")
        alarm.write_text(f"+{ALARM}")
        before = asleep(how)
        with suppress(OSError):
            (power / "state").write_text(how)
        if asleep(how) - before > SLEEP:
            return
    pytest.fail("it does not sleep")


class Watched:
    """What systemd's watchdog sees of a process: when it was told that all is well, on the clock that it goes by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.since = time.time()
        self.told: list[float] = []

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def _listen(self) -> None:
        while said := self._socket.recv(4096):
            if said == b"WATCHDOG=1":
                self.told.append(time.monotonic())

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def longest(self) -> float:
        """Return the longest silence so far, s, since the first word."""
        assert self.told, "it has been told nothing"
        times = [*self.told, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))


@dataclass
class Stage:
    """When it was, on the trace's clock and on the wall, s; what was counted then."""

    name: str
    trace: tuple[int, int] = (0, 0)
    wall: tuple[float, float] = (0.0, 0.0)
    faults: list[float] = field(default_factory=list)
    graphs: float = 0.0


@pytest.fixture
def traced(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Daemon, Watched, list[Touch], MadeUp]]:
    """A daemon that keeps traces for half a day, and what it traces."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG * 1_000_000))
    program = build(tmp_path / "made-up-llama")
    with ExitStack() as stack:
        watched = stack.enter_context(Watched(tmp_path / "notify"))
        options = ("--sidecars", f"{tmp_path}/*.prom", "--keep-age", "12h", "--cpu", "0")
        daemon = stack.enter_context(Daemon(tmp_path / "trace", tmp_path / "daemon.log", *options))
        touches = []
        for cpu in (0, 1):
            touch = stack.enter_context(Touch(small_model, None, "--flood", str(FAULTS)))
            os.sched_setaffinity(touch.ready["pid"], {cpu})
            touches.append(touch)
        server = stack.enter_context(MadeUp(program, small_model))
        for pid in (*(touch.ready["pid"] for touch in touches), server.pid):
            daemon.found(pid)
        yield daemon, watched, touches, server


STAGES: Final[dict[str, Callable[[], None]]] = {
    "undisturbed": lambda: None,
    "a day forward": lambda: set_clock(DAY),
    "and back": lambda: set_clock(-DAY),
    "a day back": lambda: set_clock(-DAY),
    # In this order: an alarm that did not wake it from idle stays pending, and nothing sleeps in memory then.
    "suspended to memory": lambda: suspend("mem"),
    "suspended to idle": lambda: suspend("freeze"),
    # Not a whole day: what was written meanwhile would look older than half a day, and be deleted.
    "and forward": lambda: set_clock(DAY / 3),
}


def text_of_a_sidecar(pid: int) -> str:
    return f'llmtraced_prefetch_tokens_total{{pid="{pid}",model="m"}} 1\n'


def test_clocks_that_are_set_and_sleep(traced: tuple[Daemon, Watched, list[Touch], MadeUp], tmp_path: Path) -> None:
    daemon, watched, touches, server = traced
    pids = [touch.ready["pid"] for touch in touches]
    stages = [Stage(name) for name in STAGES]
    left = tmp_path / "7.prom"
    left.write_text(text_of_a_sidecar(7))  # and its sidecar has gone
    wait_until(lambda: not handed_on(daemon), 20, "it is not fresh any more")
    kept: set[Path] = set()
    for stage, disturb in zip(stages, STAGES.values(), strict=True):
        before = [daemon.total("llmtraced_tensor_faults_total", pid=str(pid)) for pid in pids]
        graphs = daemon.total("llmtraced_graphs_total", pid=str(server.pid))
        jumps, offset = len(jumped(daemon)), realtime_offset_ns()
        disturb()
        watched.told[:] = [time.monotonic()]  # in suspension to idle this clock may go on, and nobody speaks
        if abs(realtime_offset_ns() - offset) > 10**9:  # not where idle processors let the clock go on
            wait_until(lambda jumps=jumps: len(jumped(daemon)) > jumps, 20, f"{stage.name}: it is seen")
        begun = time.monotonic_ns(), time.time()
        done = [touch.go() for touch in touches]
        assert all(FAULTS <= one["minflt"] <= FAULTS + 3 for one in done), done
        for _ in range(GRAPHS):
            assert server.do("g")
        stage.trace, stage.wall = (begun[0], time.monotonic_ns()), (begun[1], time.time())
        after = [daemon.total("llmtraced_tensor_faults_total", pid=str(pid)) for pid in pids]
        stage.faults = [b - a for a, b in zip(before, after, strict=True)]
        stage.graphs = daemon.total("llmtraced_graphs_total", pid=str(server.pid)) - graphs
        print(f"{stage.name}: {stage.faults} faults, {stage.graphs} graphs, {jumped(daemon)[jumps:]}", flush=True)
        # What a sidecar left behind stays unheard of, and one that lives is heard.
        assert not handed_on(daemon), stage
        living = tmp_path / "8.prom"
        living.write_text(text_of_a_sidecar(8))
        assert handed_on(daemon) == {"8"}, stage
        living.unlink()
        # Nothing is deleted but what is older than half a day by any clock.
        if stage.name in ("a day forward", "a day back"):
            pruned(daemon)
        now = {path for path in daemon.trace.rglob("*.parquet") if not path.name.startswith(".")}
        assert kept <= now, stage
        kept = now
        wait_until(lambda: len(watched.told) > 1, 3, "the watchdog is told that all is well")
        assert watched.longest() < WATCHDOG, stage
    assert [(stage.faults, stage.graphs) for stage in stages] == [([FAULTS] * 2, GRAPHS)] * len(stages)
    daemon.end()
    check_faults(daemon, pids, stages, watched.since)
    check_graphs(daemon, server, stages)


def jumped(daemon: Daemon) -> list[str]:
    return [line for line in daemon.log.read_text().splitlines() if "the clock was set, or the machine" in line]


def handed_on(daemon: Daemon) -> set[str]:
    """Return the pids of the sidecars whose series are exported."""
    return {labels["pid"] for name, labels, _ in daemon.samples() if name == "llmtraced_prefetch_tokens_total"}


def pruned(daemon: Daemon) -> None:
    """Wait until old traces have been looked for: one that is old by any clock is gone."""
    old = daemon.trace / "faults" / "host=h" / "model=m" / "date=2020-01-01" / "s-1-000000.parquet"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    os.utime(old, (time.time() - 4 * DAY,) * 2)
    wait_until(lambda: not old.parents[2].exists(), 70, "old traces are deleted, and their folders")


def rows_by_the_wall(daemon: Daemon, table: str, pid: int, column: str) -> list[tuple[int, float]]:
    """Return the times of a process's rows: of the trace's clock, and Unix time by the file's own footer."""
    found = []
    for path in sorted(daemon.trace.glob(f"{table}/**/*-{pid}-*.parquet")):
        offset = json.loads(pq.read_schema(path).metadata[METADATA_KEY])["realtime_offset_ns"]
        times = pq.read_table(path, columns=[column])[column].to_pylist()
        assert times == sorted(times), path
        found += [(ns, (ns + offset) / 1e9) for ns in times]
    assert [ns for ns, _ in found] == sorted(ns for ns, _ in found), "files follow each other"
    return found


def check_times(rows: list[tuple[int, float]], stages: list[Stage]) -> None:
    """Each stage has its rows, and their times of day are those that its clock had."""
    for stage in stages:
        walls = [wall for ns, wall in rows if stage.trace[0] <= ns <= stage.trace[1]]
        assert len(walls) == FAULTS, stage
        assert stage.wall[0] - 0.1 <= min(walls) <= max(walls) <= stage.wall[1] + 0.1, stage


def check_faults(daemon: Daemon, pids: list[int], stages: list[Stage], since: float) -> None:
    every = FAULTS * len(stages)
    for pid in pids:
        assert sums(accounts(daemon.trace, "faults", pid)) == {"counted": every, "delivered": every, "dropped": 0}
        check_times(rows_by_the_wall(daemon, "faults", pid, "timestamp"), stages)
        (end,) = daemon.said("end", pid=pid)
        trace = open_trace(daemon.trace, end["session"])
        faults = trace.table("faults").collect()
        assert faults["major"].null_count() == 0, "each has an end"
        assert faults["latency_ns"].max() < SLEEP * 10**9, "sleep is no latency"
        assert trace.account["faults"]["counted"] == every
        started = datetime.fromisoformat(reports.summary(trace)["started"]).timestamp()
        assert since - 1.1 <= started <= stages[0].wall[0]


def check_graphs(daemon: Daemon, server: MadeUp, stages: list[Stage]) -> None:
    (end,) = daemon.said("end", pid=server.pid)
    marks = 2 * GRAPHS * len(stages)
    assert end["account"]["tokens"] == {"counted": marks, "delivered": marks, "dropped": 0}
    tokens = open_trace(daemon.trace, end["session"]).table("tokens").collect()
    assert tokens["token"].to_list() == list(range(GRAPHS * len(stages) + 1))
    assert tokens["start_ns"].is_sorted()
    for stage in stages:
        assert tokens["start_ns"].is_between(*stage.trace).sum() == GRAPHS, stage
