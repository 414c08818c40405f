"""The sidecar's loop: follow the server through its tokens, and decide when to work.

Runs in a bare interpreter (``python -S -E``), put in its place by :mod:`llmtraced.prefetch.launch`, which found out all
that is in the configuration. Standard library only; everything it holds (locked pages, probes, descriptors) goes with
the process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

from llmtraced.prefetch import governor as states
from llmtraced.prefetch.clock import BEGIN, END, PageTable, TickRing, decoded, next_step
from llmtraced.prefetch.governor import Governor
from llmtraced.prefetch.hold import let_go
from llmtraced.prefetch.memory import Memory, anonymous_bytes
from llmtraced.prefetch.mixture import Mixture
from llmtraced.prefetch.pages import Pages
from llmtraced.prefetch.policy import CHUNK, IDLE, lay_out
from llmtraced.prefetch.told import metrics_text, words
from llmtraced.prefetch.turn import Turn
from llmtraced.prefetch.work import Work, calibrate
from llmtraced.service import Watchdog, notify

__all__ = ["Sidecar", "main"]

_CHECK_SECONDS = 0.25  # between looks at the memory
_GUARD_SECONDS = 0.025  # between looks at what is left of it, while the server computes
_TOUCHED, _GROWN = 4_000_000_000, 1 << 20  # bytes/s that a prompt may have it touch; so many are looked into at once
_GROW_SECONDS = 2.0  # so long must memory be free before more is pinned
_STRIKES = 4  # checks in a row in which a limit was run into
_PRESSURE, _PRESSURE_SECONDS = 0.2, 15.0  # share of time in which all waited for memory; time for that to be ours
_POLL_SECONDS = 0.001  # between looks at the page table, where that is the clock


def _say(text: str) -> None:
    print(f"llmtraced: {text}", file=sys.stderr, flush=True)


class Sidecar:
    """One server's sidecar.

    Args:
        config: what the launcher found out: ``launch.configuration``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.pid: int = config["pid"]
        self.pidfd: int = config["pidfd"]
        self.pages = [Pages(f["fd"], self.pidfd, [tuple(m) for m in f["maps"]]) for f in config["files"]]
        entries = [tuple(e) for e in config["entries"]]
        self.chunks = lay_out(entries, [p.size for p in self.pages], CHUNK)
        self.total = sum(c.nbytes for c in self.chunks)
        self.memory = Memory(config["cgroup"]["folder"], config["cgroup"]["version"], self.pid)
        self.slack: int = config["slack"]
        told = config["mixture"]
        chosen = sum(told["n_used"] * sum(n for *_, n in layer["slices"]) for layer in told["layers"]) if told else 0
        self._hold: dict[str, int] | None = config["hold"]
        self._held: int = config["held"]  # bytes that are locked for us until we take over
        varied, held = told is not None, self._hold is not None
        self.governor = Governor(self.total + chosen, config["trial"], varied=varied, held=held)
        self.strategy: dict[str, Any] = config["strategy"]
        self.marks: list[list[int]] = config["marks"]  # steps at which each mark's weight is used
        ticks = config["ticks"]
        self.ring = TickRing(*(ticks[n] for n in ("ring", "clocks", "wakes", "ring_bytes", "marks"))) if ticks else None
        if self.ring is not None:
            self.ring.wait(0)  # ticks of graphs that began before the clock knew its marks say nothing
        self._operators = bool(ticks and ticks["operators"])
        self.table = PageTable(self.pid)
        self._looks: list[int] = []  # at what there is room for
        self.turn = Turn()
        self.work: Work | None = None
        self.mixture: Mixture | None = None
        self.experts: dict[str, Any] = {}  # what was last told of them
        self.budget = 0
        self.tokens = self.others = 0
        self.speeds: dict[str, dict[str, float]] = {}
        self.totals: dict[str, int] = {}
        self.last: dict[str, Any] = {}
        self.stopping = False
        self._step, self._begun, self._batch = IDLE, 0, 1
        self._server_read = self._read_bytes()
        self._checked = self._guarded = self._grow_since = self._written = self._engaged = 0.0
        self._strikes = self._relieved = self._touched = 0
        self._uneven = False  # the budget is another than what was divided
        self._started = time.monotonic()

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Work until told to stop, or the server ends. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        notify(f"READY=1\nSTATUS={self.governor.state}")
        watchdog = Watchdog()
        if self.governor.state == states.ENGAGED:
            self.engage()
        while not self.stopping:
            if self.ring is None:
                time.sleep(_POLL_SECONDS if self.work else _CHECK_SECONDS)
                self._look()
            else:
                patience = self._patience()
                for tick in self.ring.wait(patience):
                    self._tick(*tick)
                if patience == _POLL_SECONDS:
                    self._look()
            self._guard()
            now = time.monotonic()
            if now - self._checked >= _CHECK_SECONDS:
                self._checked = now
                watchdog.alive()
                if ended.poll(0):
                    _say(f"process {self.pid} has ended")
                    break
                if not self._still_mapped():
                    _say(f"process {self.pid} has unmapped the model, or replaced it")
                    break
                self._check_memory(now)
                self._check_reads()
                self._write_metrics(now)
        notify("STOPPING=1")
        self.last = self.summary()
        self.release()
        self._written = 0.0
        self._write_metrics(time.monotonic())
        if self.config["passing"]:
            with contextlib.suppress(OSError):
                os.unlink(self.config["metrics"])
        return 0

    def _still_mapped(self) -> bool:
        """Tell whether the server still has the model where it had it: its addresses may be something else's by now."""
        for one, pages in zip(self.config["files"], self.pages, strict=True):
            for start, end, _ in one["maps"]:
                try:
                    found = os.stat(f"/proc/{self.pid}/map_files/{start:x}-{end:x}")
                except OSError:
                    return False
                if not os.path.samestat(found, os.fstat(pages.fd)):
                    return False
        return True

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _tick(self, ts: int, _token: int, mark: int, value: int, experts: bytes) -> None:
        if self.mixture is not None:
            if mark == BEGIN:
                self.mixture.begin()
            elif self.mixture.tick(ts, mark, value, experts):
                return
        if mark == BEGIN:
            self._begun, self._batch = ts, decoded(value)
            self._step = IDLE
        elif mark == END:
            self._step = IDLE
            if self._begun and (value or not self._operators):
                self._token_ended(ts - self._begun, self._batch)
            elif self._begun:
                self._other_ended()
            self._begun = 0
        elif mark < len(self.marks):
            self._step = next_step(self.marks[mark], self._step)
        self._move(self._step, ts)

    def _token_ended(self, duration_ns: int, batch: int) -> None:
        self.tokens += 1
        before, self._server_read = self._server_read, self._read_bytes()
        read = self._server_read - before
        if self.mixture is not None:
            self.mixture.ended(read)
        if self.work is not None and self.work.totals["read_bytes"]:
            self.governor.read_through_ns = self.total / self.work.totals["read_bytes"] * self.work.reading_ns
        if self.governor.token(duration_ns, batch, read, time.monotonic()):
            self._obey()

    def _other_ended(self) -> None:
        """Take in the end of another model's graph: how long it took, and what it read, says nothing of ours."""
        self.others += 1
        self._server_read = self._read_bytes()
        if self.mixture is not None:
            self.mixture.other()

    def _obey(self) -> None:
        _say(f"{self.governor.state}: {self.governor.why}")
        notify(f"STATUS={self.governor.state}: {self.governor.why}")
        if self.governor.state == states.ENGAGED:
            self.engage()
        else:
            self.release()

    def _look(self) -> None:
        """Ask the server's page table how far it is: within an operator, or at all where there are no ticks."""
        stream = self.work.stream if self.work else None
        if self.work is None or stream is None:
            return
        now = time.monotonic_ns()
        i = self.work.furthest()
        if i is None:
            self._move(self._step, now)
            return
        chunk = stream.chunks[i]
        if self.ring is None and not chunk.first <= self._step <= chunk.last:
            if chunk.first < self._step:  # it has begun again
                self._token_ended(now - self._begun, 1)
                self._begun = now
            self._step = chunk.first
            self._move(self._step, now)
        stream.reach(i)
        self._move(self._step, now)

    def _patience(self) -> float:
        """Return how long to wait for a tick, in seconds."""
        stream = self.work.stream if self.work else None
        if self._begun and stream is not None and stream.crowded():
            return _POLL_SECONDS
        if not self._begun or self.work is None:
            return _CHECK_SECONDS
        return _GUARD_SECONDS if self._batch else min((self.work.window + self.slack) / _TOUCHED, _GUARD_SECONDS)

    # --- working ---------------------------------------------------------------------------------------------------

    def engage(self) -> None:
        """Take over the model's pages."""
        self.turn.leave()
        path = self.strategy["path"] or ("huge" if self.config["hold"] else "")
        if not path:
            path, self.speeds = calibrate(self.pages, self.chunks, self.config["depth"] or 8)
            figures = (
                f" ({p}: {v['bytes_per_s'] / 1e9:.2f} GB/s at {v['cpu_s_per_gb']:.2f} s of CPU a GB)"
                for p, v in self.speeds.items()
            )
            _say(f"reading by {path}{''.join(figures)}")
        window, depth = self.config["window"], self.config["depth"]
        self.work = Work(self.pages, self.table, self.chunks, self.strategy, path, window, depth, _say, self._end_hold)
        if self.config["mixture"] and self.ring is not None and self.strategy["experts"]:
            told, predict = self.config["mixture"], self.config["predict"]
            self.mixture = Mixture(self.pid, self.pages, told, predict, _say, large=path == "huge")
        self.memory.struck()
        self._engaged, self._strikes, self.slack = time.monotonic(), 0, self.config["slack"]
        self._looks.clear()
        self.budget = self._room()
        self._divide()

    def _end_hold(self) -> None:
        """Take over from who has kept the server's huge pages until now."""
        if self._hold is not None:
            let_go(**self._hold)
            self._hold, self._held = None, 0

    def _guard(self) -> None:
        """Give pins up at once where memory is about to run out: the server has touched more of its own."""
        now = time.monotonic()
        if self.work is None or not self.work.pinned:
            return
        soon = now - self._guarded < _GUARD_SECONDS
        if soon and self._batch:
            return
        anonymous = self.memory.anonymous_of_server()
        if soon and anonymous - self._touched < _GROWN:
            return
        self._guarded, self._touched = now, anonymous
        window = self.work.window if self.work.stream is not None else 0
        short = self.memory.short(window + self.slack)
        if short > self.slack // 2:
            given = self.mixture.relieve(short) if self.mixture is not None else 0
            self._relieved += given + (self.work.relieve(short - given) if given < short else 0)
            self._wake()

    def _check_reads(self) -> None:
        """Where no tokens are seen: find out from what the server reads whether to engage."""
        if self.ring is None and self.work is None:
            before, self._server_read = self._server_read, self._read_bytes()
            if self.governor.reading(self._server_read - before):
                self._obey()

    def _room(self) -> int:
        """Return the bytes that the model's chunks may take."""
        assert self.work is not None
        # Usage and residency cannot be read at the same moment, and megabytes move between two readings: the median of
        # three. They are of three calls, since to count residency is to walk the whole model.
        pinned = self.work.pinned_bytes + self._held
        small = self.mixture is not None  # pages: to count them would take too long
        count = 3 if self.strategy["stream"] else 1
        for _ in range(max(count - len(self._looks), 1)):
            self._looks.append(self.memory.room(None if small else self.work.resident(), pinned))
        del self._looks[:-count]
        room = max(sorted(self._looks)[count // 2] - self.slack, 0)
        asked: int | None = self.config["budget"]
        return room if asked is None else min(room, asked)

    def _divide(self) -> None:
        assert self.work is not None
        self.turn.leave()
        self._uneven = False
        experts = self.mixture.total if self.mixture is not None else 0
        enough = self.budget >= self.total + experts + self.slack and (experts or not self.config["partial"])
        if self.strategy["pin"] and enough and self.governor.fits():
            self._end_hold()
            self._obey()
            return
        self.work.divide(self.budget, self._step)
        if self.mixture is not None:
            self.mixture.hold(max(self.budget - self.total, 0))
        self.governor.settled()
        self._wake()
        self._move(self._step, time.monotonic_ns())
        if self.work.stream is not None or self.mixture is not None:
            self.turn.take()

    def _wake(self) -> None:
        """Be woken at the operators that matter."""
        if self.work is not None and self.ring is not None and self.work.changed:
            self.work.changed = False
            wakes = dict.fromkeys(self.work.wakes(self.marks), 1)
            self.ring.wake_at(wakes | (self.mixture.wakes() if self.mixture is not None else {}))

    def release(self) -> None:
        """Let go of everything; the kernel manages the model's pages again."""
        self.turn.leave()
        if self.mixture is not None:
            self.mixture.release()
            self.experts = self.mixture.summary()
            self.mixture = None
        if self.work is not None:
            self.work.release()
            for name, value in self.work.totals.items():
                self.totals[name] = self.totals.get(name, 0) + value
            self.work = None
        if self.ring is not None:
            self.ring.wake_at({})

    def _move(self, step: int, now_ns: int) -> None:
        if self.work is not None:
            self.work.move(step, now_ns)

    def _check_memory(self, now: float) -> None:
        """Follow the memory: give pins up at once where it is short, pin more where it has been free for a while."""
        work = self.work
        if work is None:
            return
        work.sweep()
        self._wake()
        if self.mixture is not None:
            self.mixture.sweep()
        if work.pinning:
            self.governor.settled()
            return
        if not self.strategy["pin"]:
            return
        self._adapt(now)
        # A prompt's time is processor time: what is given up in it flows, and all is divided anew afterwards.
        prompt = bool(self._begun) and not self._batch and self.mixture is None
        room, relieved = self._room(), self._relieved
        if relieved:
            _say(f"memory was about to run out: {relieved >> 20} MB were given back")
            room, self._relieved = min(room, self.budget - relieved), 0
        if room < self.budget - self.slack // 2:
            _say(f"memory is short by {self.budget - room >> 20} MB")
            if prompt:
                work.relieve(self.budget - room - relieved)
                self._wake()
            self.budget, self._grow_since, self._uneven = room, now, True
        elif room < self.budget + self.slack:
            self._grow_since = now
        elif now - self._grow_since > _GROW_SECONDS:
            self.budget, self._grow_since, self._uneven = room, now, True
        if self._uneven and not prompt:
            self._divide()

    def _adapt(self, now: float) -> None:
        """Leave more memory free where what is free by the books is not enough."""
        self._strikes = self._strikes + 1 if self.memory.struck() else 0
        # Without a stream the rest of the model runs into the limit all the time. Pressure is an average over 10 s.
        pressed = self._strikes >= _STRIKES or (
            now - self._engaged > _PRESSURE_SECONDS and self.memory.stalled_share() > _PRESSURE
        )
        if self.strategy["stream"] and pressed and self.slack < 4 * self.config["slack"]:
            self.slack += self.config["slack"] // 4
            self._strikes, self._engaged = 0, now

    def _read_bytes(self) -> int:
        """Return the bytes that the server has read from disk so far; 0 if we may not know."""
        try:
            with open(f"/proc/{self.pid}/io") as stream:
                return next((int(line.split()[1]) for line in stream if line.startswith("read_bytes")), 0)
        except OSError:
            return 0

    # --- what is told ----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Return what was done so far; docs/prefetching.md explains the fields."""
        t = dict.fromkeys(("used", "late", "missed", "wasted", "ahead_ns", "failed", "read_bytes"), 0) | self.totals
        if self.work is not None:
            self.work.count()
            t = {name: value + self.work.totals[name] for name, value in t.items()}
        asked = t["used"] + t["late"] + t["missed"]
        fetched = t["used"] + t["late"] + t["wasted"]
        without_ns, with_ns = (sorted(durations) for durations in self.governor.compared())
        return {
            "state": self.governor.state,
            "why": self.governor.why,
            "seconds": round(time.monotonic() - self._started, 3),
            "tokens": self.tokens,
            "other_graphs": self.others,
            "model_bytes": self.total,
            "budget_bytes": self.budget,
            "pinned_bytes": self.work.pinned_bytes if self.work else 0,
            "window_bytes": self.work.window if self.work else 0,
            "path": self.work.path if self.work else "",
            "clock": "ticks" if self.ring is not None else "page table",
            "prefetched_bytes": t["read_bytes"],
            **{f"{name}_bytes": t[name] * CHUNK for name in ("used", "late", "missed", "wasted")},
            "precision": (t["used"] + t["late"]) / fetched if fetched else None,
            "recall": (t["used"] + t["late"]) / asked if asked else None,
            "in_time_share": t["used"] / asked if asked else None,
            "mean_ahead_s": t["ahead_ns"] / t["used"] / 1e9 if t["used"] else None,
            "failed_reads": t["failed"],
            "experts": self.mixture.summary() if self.mixture is not None else self.experts or None,
            "demoted": self.turn.demoted,
            "ticks_lost": self.ring.lost if self.ring is not None else 0,
            "token_s_without": without_ns[len(without_ns) // 2] / 1e9 if without_ns else None,
            "token_s_with": with_ns[len(with_ns) // 2] / 1e9 if with_ns else None,
            "speeds": self.speeds,
            "anonymous_bytes": anonymous_bytes(),
            "cpu_s": time.process_time(),
        }

    def _write_metrics(self, now: float) -> None:
        """Write the metrics file, if one is wanted, at most once a second."""
        path: str | None = self.config["metrics"]
        if not path or now - self._written < 1.0:
            return
        self._written = now
        temporary = f"{path}.tmp"
        with contextlib.suppress(OSError):  # a full disk must not stop the work
            with open(temporary, "w") as stream:
                stream.write(metrics_text(self.summary(), self.pid, self.config["label"]))
            os.replace(temporary, path)


def main(fd: int) -> int:
    """Run with the configuration in the file ``fd``."""
    with os.fdopen(fd) as stream:
        config = json.load(stream)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as knob:
        knob.write("1000")  # should memory run out all the same, we go and not the server
    sidecar = Sidecar(config)
    code = sidecar.run()
    try:
        print(json.dumps(sidecar.last, indent=2) if config["json"] else words(sidecar.last), flush=True)
    except BrokenPipeError:  # nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
