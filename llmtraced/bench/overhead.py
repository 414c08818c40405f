"""What tracing costs a real server: tokens a second with it and without it, in pairs, one right after the other.

One llama-server runs through all of a condition and is asked the same thing each time; only tracing changes. Which half
of a pair comes first alternates. A control, where nothing is attached in either half, says what the machine's own
unrest looks like; a bare level, whose programs return at once, what no program at these points could save.
docs/benchmarks.md explains the method and the figures.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmtraced.bench.engine import Server, ensure_gemma
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.pressure import MemoryCgroup, drop_cache, read_ahead_kb
from llmtraced.bench.switch import Switch, counting, cpu_seconds
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.schema import Detail
from llmtraced.values import size

__all__ = ["BARE", "CONTROL", "busy_seconds", "limit_bytes", "run"]

log = logging.getLogger(__name__)

CONTROL: Final = "control"
BARE: Final = "bare-"
"""Before a level: its points are attached to, and the programs there return at once."""
TARGETS: Final = {"faults": 0.99, "ops": 0.98, "full": 0.97}
PROMPT: Final = "The sea is calm tonight, and the"
_WARM_TOKENS: Final = 4
_SETTLE_SECONDS: Final = 0.15
_IDLE_SECONDS: Final = 10.0
_FOREIGN: Final = 0.06
_FOREIGN_PRESSED: Final = 0.2
"""Cores that others may use during a request; a pair with more is measured again.

Under pressure the kernel's own threads, which read the disk and reclaim memory, are among these others.
"""
_TRIES: Final = 20
_CALM_SECONDS: Final = 60.0


def limit_bytes(pressure: str, model_bytes: int, own_bytes: int) -> int | None:
    """Return the memory limit that ``pressure`` names.

    Args:
        pressure: ``none``; a share of the model such as ``70%``, to which the server's own memory is added; or a size
            such as ``300M``, for everything.
        model_bytes: of the model file.
        own_bytes: anonymous memory of the server.
    """
    if pressure == "none":
        return None
    try:
        if pressure.endswith("%"):
            share = float(pressure[:-1]) / 100
            if share <= 0:
                raise ValueError
            return own_bytes + int(model_bytes * share)
        return size(pressure)
    except Exception as error:
        raise LlmtracedError(f"no such pressure: {printable(pressure)}; write none, 70% or 300M", USAGE) from error


class _Condition:
    """A server that is ready to be measured, and recorders beside it: one, and one whose programs are bare."""

    def __init__(self, server: Server, switches: Sequence[Switch], tokens: int, foreign: float) -> None:
        self.server, self.switches, self.tokens = server, switches, tokens
        self.switch = switches[0]  # the one that is used
        self.foreign = foreign  # cores that others may use

    def once(self, detail: Detail | None) -> dict[str, Any]:
        """Ask once, traced at ``detail`` or not at all."""
        if detail is not None:
            self.switch.on(detail)
        self.server.completion(PROMPT, _WARM_TOKENS)  # the recorder learns the graph, and is done with it
        time.sleep(_SETTLE_SECONDS)
        start, before = time.monotonic(), self._processors()
        rate = self.server.tokens_per_second(PROMPT, self.tokens)
        seconds, after = time.monotonic() - start, self._processors()
        recorder, server, busy = ((b - a) / seconds for a, b in zip(before, after, strict=True))
        found = {"rate": rate, "cpu": recorder, "foreign": busy - recorder - server}
        if detail is not None:
            found |= self.switch.memory() | self.switch.off()
        return found

    def _processors(self) -> tuple[float, float, float]:
        """Return processor seconds so far of the recorder, of the server, and of everything (stolen time too)."""
        return self.switch.cpu_seconds(), cpu_seconds(self.server.pid), busy_seconds()

    def wait_for_calm(self) -> None:
        """Wait until others leave the processors alone, or for a minute."""
        deadline = time.monotonic() + _CALM_SECONDS
        busy = _FOREIGN + 1
        while busy > _FOREIGN and time.monotonic() < deadline:
            start, before = time.monotonic(), busy_seconds()
            time.sleep(0.2)
            busy = (busy_seconds() - before) / (time.monotonic() - start)

    def pair(self, detail: Detail | None, reverse: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Return both halves of a pair, repeated while others disturb it, and how often it was disturbed."""
        for disturbed in range(_TRIES):
            self.wait_for_calm()
            first = self.once(detail if reverse else None)
            second = self.once(None if reverse else detail)
            without, traced = (second, first) if reverse else (first, second)
            foreign = max(without["foreign"], traced["foreign"])
            if foreign <= self.foreign:
                return without, traced, disturbed
            log.info("disturbed: other processes used %.2f cores meanwhile", foreign)
        return without, traced, _TRIES

    def pairs(self, name: str, count: int) -> dict[str, Any]:
        """Return what ``count`` pairs say about a level."""
        detail = _level(name)
        self.switch = self.switches[name.startswith(BARE)]
        without: list[dict[str, Any]] = []
        traced: list[dict[str, Any]] = []
        disturbed = 0
        for number in range(count):
            *halves, repeated = self.pair(detail, number % 2 == 1)
            for results, half in zip((without, traced), halves, strict=True):
                results.append(half)
            disturbed += repeated
            a, b = without[-1]["rate"], traced[-1]["rate"]
            log.info("%s, pair %d of %d: %.2f → %.2f tokens/s, %.4f", name, number + 1, count, a, b, b / a)
        ratios = spread([b["rate"] / a["rate"] for a, b in zip(without, traced, strict=True)])
        report = {
            "median_ratio": ratios["median"],
            "ratio": ratios,
            "pairs": count,
            "pairs_repeated": disturbed,
            "foreign_cpu": round(max(one["foreign"] for one in without + traced), 3),
            "tokens_per_s_without": spread([one["rate"] for one in without]),
            "tokens_per_s_with": spread([one["rate"] for one in traced]),
        }
        if detail is None:
            return report
        cells = [cell for one in traced for cell in one["account"].values()]
        evaluated = count * (self.tokens + _WARM_TOKENS)
        return (
            report
            | self.programs(detail)
            | {
                "recorder_cpu": spread([one["cpu"] for one in traced]),
                "recorder_rss_bytes": max(one["rss_bytes"] for one in traced),
                "events_per_token": round(sum(cell["counted"] for cell in cells) / evaluated, 1),
                "trace_bytes_per_token": round(sum(one["bytes"] for one in traced) / evaluated, 1),
                "dropped": sum(cell["dropped"] for cell in cells),
            }
        )

    def programs(self, detail: Detail) -> dict[str, float]:
        """Return how often BPF programs run for a token at ``detail``, and for how long; the kernel's own count.

        The counting costs time itself, so this is no part of the pairs. Entering a program (a trap for a uprobe) is
        not in it.
        """
        self.switch.on(detail)
        self.server.completion(PROMPT, _WARM_TOKENS)
        try:
            with counting():
                runs, ns = self.switch.program_runs()
                self.server.completion(PROMPT, self.tokens)
                more_runs, more_ns = self.switch.program_runs()
        finally:
            self.switch.off()
        names = ("bpf_runs_per_token", "bpf_ns_per_token")
        totals = (more_runs - runs, more_ns - ns)
        return {name: round(total / self.tokens, 1) for name, total in zip(names, totals, strict=True)}

    def idle(self, seconds: float) -> dict[str, Any]:
        """Return what the recorder uses beside an idle server: before it has seen a graph evaluated, and after."""
        self.switch = self.switches[0]
        self.switch.on(Detail.FAULTS)
        fresh = self._idle_cpu(seconds)
        self.server.completion(PROMPT, _WARM_TOKENS)
        settled = self._idle_cpu(seconds)
        memory = self.switch.memory()
        self.switch.off()
        found = {
            "detail": "faults",
            "seconds": seconds,
            "recorder_cpu": settled,
            "recorder_cpu_before_first_graph": fresh,
        }
        return {**found, **memory}

    def _idle_cpu(self, seconds: float) -> float:
        time.sleep(1.0)
        before, start = self.switch.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return round((self.switch.cpu_seconds() - before) / (time.monotonic() - start), 5)


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Return the processor seconds that were not idle since boot, all cores; time stolen by the hypervisor counts."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(n) for n in stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _level(name: str) -> Detail | None:
    """Return the detail that a level is recorded with; None for the control."""
    if name == CONTROL:
        return None
    try:
        return Detail[name.removeprefix(BARE).upper()]
    except KeyError as error:
        there = "control, faults, ops, full, bare-faults, bare-ops, bare-full"
        raise LlmtracedError(f"no such detail: {printable(name)}; there are {there}", USAGE) from error


@contextlib.contextmanager
def _ready(
    model: Path, pressure: str, threads: int, folder: Path, tokens: int, bare: bool
) -> Iterator[tuple[_Condition, Any]]:
    """Start a server and a recorder, or two; the server is warm, and then its memory is limited."""
    with contextlib.ExitStack() as stack:
        group = (
            stack.enter_context(MemoryCgroup(f"llmtraced-overhead-{os.getpid()}", None)) if pressure != "none" else None
        )
        if group:
            drop_cache(model)  # what is cached already would be charged to nobody
        server = stack.enter_context(Server(model, threads=threads, cgroup=group))
        server.completion(PROMPT, 16)
        limit = None
        if group:
            limit = limit_bytes(pressure, model.stat().st_size, group.stat().get("anon_bytes", 0))
            group.set_limit(limit)
        switches = [stack.enter_context(Switch(server.pid, folder, bare=b)) for b in (False, True)[: 1 + bare]]
        for _ in range(2):
            server.completion(PROMPT, max(tokens // 4, 4))
        yield _Condition(server, switches, tokens, _FOREIGN_PRESSED if group else _FOREIGN), limit


def run(
    *,
    details: Sequence[str] = (CONTROL, "faults", "ops", "full"),
    pressures: Sequence[str] = ("none", "70%"),
    pairs: int = 30,
    tokens: int = 64,
    pressed_tokens: int = 16,
    threads: int = 2,
    model: Path | None = None,
    idle_seconds: float = _IDLE_SECONDS,
) -> dict[str, Any]:
    """Measure and return the report (docs/benchmarks.md has its fields).

    Args:
        details: levels of detail, the same with :data:`BARE` before them, and :data:`CONTROL`.
        pressures: as :func:`limit_bytes` takes them; each is a condition with a server of its own.
        pairs: for each level and condition.
        tokens: generated in a request where the model fits.
        pressed_tokens: generated in a request under pressure, where a token takes ten times as long.
        threads: compute threads of the server.
        model: the GGUF file; by default Gemma 3 270M.
        idle_seconds: how long the recorder is watched beside an idle server.

    Raises:
        LlmtracedError: no root, no BCC, or no server.
    """
    for name in details:
        _level(name)
    for pressure in pressures:
        limit_bytes(pressure, 1, 1)
    path = model or ensure_gemma()
    bare = any(name.startswith(BARE) for name in details)
    conditions = []
    for pressure in pressures:
        count = tokens if pressure == "none" else pressed_tokens
        log.info("pressure %s: starting the server and the recorder", pressure)
        with (
            tempfile.TemporaryDirectory(prefix="llmtraced-bench-") as folder,
            _ready(path, pressure, threads, Path(folder), count, bare) as (condition, limit),
        ):
            found = {name: condition.pairs(name, pairs) for name in details}
            idle = condition.idle(idle_seconds)
        conditions.append({"pressure": pressure, "limit_bytes": limit, "tokens": count, "details": found, "idle": idle})
    medians: dict[str, dict[str, float]] = {
        one["pressure"]: {name: found["median_ratio"] for name, found in one["details"].items()} for one in conditions
    }
    return {
        "median_ratio": medians,
        "conditions": conditions,
        "machine": machine(),
        "settings": {
            "pairs": pairs,
            "threads": threads,
            "model": path.name,
            "model_bytes": path.stat().st_size,
            "read_ahead_kb": read_ahead_kb(path),
            "prompt": PROMPT,
        },
        "targets": targets(medians),
    }


def targets(medians: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return for each level its limit, and under which pressure (of those measured) it is met."""
    return {
        name: {
            "limit": f">= {limit}",
            "met": {p: found[name] >= limit for p, found in medians.items() if name in found},
        }
        for name, limit in TARGETS.items()
    }
