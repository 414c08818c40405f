"""How much faster the sidecar makes a server whose model does not fit in memory, and what else one could do instead.

Strategies are measured in turns, A B C A B C ..., and each measurement has a server and a memory cgroup of its own: it
begins with nothing of the model in memory, whatever the one before has left there (large folios, locked pages).
docs/benchmarks.md explains the method and the figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from llmtraced.bench.beside import (
    READ_BYTES,
    READ_THREADS,
    Locked,
    Reading,
    Sidecar,
    Vmtouch,
    bytes_to_lock,
    disk_bytes_per_s,
    sample_of,
)
from llmtraced.bench.engine import Server
from llmtraced.bench.experiment import model_path
from llmtraced.bench.figures import machine
from llmtraced.bench.overhead import busy_seconds, limit_bytes
from llmtraced.bench.prefetch_figures import COMPARATORS, FITS, OFF, share_of, summed, targets
from llmtraced.bench.pressure import MemoryCgroup, ReadAhead, drop_cache
from llmtraced.bench.pressure import read_ahead_kb as read_ahead_of
from llmtraced.bench.switch import cpu_seconds
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.gguf_map import Model, read_model
from llmtraced.prefetch.guesses import SOURCES
from llmtraced.prefetch.plan import from_tensors

__all__ = ["STRATEGIES", "other_read_ahead", "run"]

log = logging.getLogger(__name__)

MIXTURE: Final = "moe"
SIDECAR: Final = ("auto", "pin", "pattern", "uring", MIXTURE)
STRATEGIES: Final = (OFF, *SIDECAR, *COMPARATORS)

_LOAD_MODES: Final = {"load-none": "none", "load-dio": "dio"}
_READ_AHEADS: Final = (128, 8192)
_SERVER_OPTIONS: Final = ("--no-repack",)
_WARM_TOKENS: Final = 2
_LEAST_SECONDS: Final = 3.0  # of measured decoding: fast ones are asked again
_MOST_REQUESTS: Final = 8
_VARIED_REQUESTS: Final = 2
_SETTLE_SECONDS: Final = 120.0
_START_SECONDS: Final = 90.0
_VMTOUCH_SLACK: Final = 64 << 20  # what the server reads goes through here


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of every server: one token to begin with, so that each graph is one token; then a prompt.

    ``varied``: of a mixture, tokens that differ from each other and from request to request, for else a few experts
    would serve them all; then the number of requests is given, so that all servers are asked the same.
    """

    tokens: int
    prompt_tokens: int
    threads: int
    varied: bool = False

    def settings(self, number: int) -> dict[str, Any]:
        """Return how the tokens of a request are chosen."""
        return {"temperature": 1.0, "seed": 1 + number} if self.varied else {}

    @property
    def prompt(self) -> list[int]:
        return [5 + 7 * i % 193 for i in range(self.prompt_tokens)]

    @property
    def ctx(self) -> int:
        return max(512, self.prompt_tokens + 64, self.tokens + 64)


@dataclass(frozen=True, slots=True)
class _Condition:
    """Memory for the server and its model, and how it is taken from them."""

    model: Model
    limit: int
    own: int  # of the limit: the server's own memory
    pressure: str
    sample: Path  # a file to read while the server computes

    @property
    def path(self) -> Path:
        return self.model.shards[0].path

    @property
    def fitting(self) -> int:
        return max(self.limit - self.own, 0)


def other_read_ahead(kb: int | None) -> int:
    """Return the readahead that the comparator tries where the run's is ``kb``: large where that is small, and back."""
    small, large = _READ_AHEADS
    return large if kb is not None and kb < large else small


def _drop(model: Model) -> int:
    """Drop the model's pages; return the bytes that are still there."""
    return sum(drop_cache(shard.path) for shard in model.shards)


def _peak(group: MemoryCgroup) -> int | None:
    """Return the most that was ever charged to a cgroup; None: the kernel does not tell (version 2 before 5.19)."""
    with contextlib.suppress(OSError):
        name = "memory.max_usage_in_bytes" if group.version == 1 else "memory.peak"
        return int((group.path / name).read_text())
    return None


# --- one measurement


def _counters(server: int, helper: int | None) -> dict[str, float]:
    """Return what is counted of the server, of what runs beside it, and of the machine."""

    def read_bytes(pid: int) -> int:
        text = Path(f"/proc/{pid}/io").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes"))

    stat = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return {
        "server_bytes": read_bytes(server),
        "helper_bytes": read_bytes(helper) if helper else 0,
        "major_faults": int(stat[9]),  # proc_pid_stat(5): field 12; the state, which is field 3, is the first here
        "server_cpu_s": cpu_seconds(server),
        "helper_cpu_s": cpu_seconds(helper) if helper else 0.0,
        "machine_cpu_s": busy_seconds(),
    }


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


def _decode(server: Server, asked: _Asked) -> tuple[list[dict[str, Any]], float, int]:
    """Ask until enough decoding was timed; return the answers, and the milliseconds of so many tokens."""
    answers: list[dict[str, Any]] = []
    milliseconds, timed = 0.0, 0
    least, most = (_VARIED_REQUESTS, _VARIED_REQUESTS) if asked.varied else (1, _MOST_REQUESTS)
    while len(answers) < least or (milliseconds < _LEAST_SECONDS * 1e3 and len(answers) < most):
        settings = asked.settings(len(answers))
        answers.append(server.completion([5], asked.tokens, return_tokens=True, **settings))
        # llama-server's clock begins when the first token is there, so it times one graph less than there are tokens.
        milliseconds += answers[-1]["timings"]["predicted_ms"]
        timed += answers[-1]["timings"]["predicted_n"] - 1
    return answers, milliseconds, timed


def _ask(server: Server, helper: int | None, group: MemoryCgroup, asked: _Asked) -> dict[str, Any]:
    """Measure decoding, then a prompt."""
    before = _counters(server.pid, helper)
    answers, milliseconds, timed = _decode(server, asked)
    graphs = sum(answer["timings"]["predicted_n"] for answer in answers)
    texts = [(answer["content"], answer.get("tokens")) for answer in answers]
    counted = _difference(_counters(server.pid, helper), before)
    charged = group.usage()
    found: dict[str, Any] = {
        "ms_per_token": milliseconds / timed,
        "tokens_per_s": timed / milliseconds * 1e3,
        "tokens": timed,
        **{f"{name}_per_token": value / graphs for name, value in counted.items()},
        "charged_bytes": charged,
        "prompt_ms": None,
    }
    if asked.prompt_tokens:
        before = _counters(server.pid, helper)
        answer = server.completion(asked.prompt, 1, return_tokens=True)
        counted = _difference(_counters(server.pid, helper), before)
        found["prompt_ms"] = answer["timings"]["prompt_ms"]
        found |= {f"prompt_{name}": value for name, value in counted.items()}
        texts.append((answer["content"], answer.get("tokens")))
    distinct = list(dict.fromkeys(repr(text) for text in texts))
    digest = hashlib.sha256("\0".join(distinct).encode()).hexdigest()[:16]
    return {**found, "peak_bytes": _peak(group), "answer": digest}


def _together(server: Server, asked: _Asked, sample: Path) -> dict[str, float]:
    """Measure computing and reading at the same time: what they take from each other of processors and memory."""
    with Reading(sample) as reading:
        server.completion([5], _WARM_TOKENS)
        start, before = reading.so_far()
        _, milliseconds, timed = _decode(server, asked)
        end, after = reading.so_far()
    return {
        "busy_ms_per_token": milliseconds / timed,
        "busy_disk_bytes_per_s": (after - before) / (end - start),
    }


def _settle(server: Server, beside: Sidecar | Vmtouch, asked: _Asked) -> tuple[bool, float]:
    """Ask for tokens until what runs beside the server has settled, or it has taken too long."""
    start = time.monotonic()
    requests = count(_VARIED_REQUESTS)  # where they vary: like those that will be measured, but others
    while time.monotonic() - start < _SETTLE_SECONDS:
        server.completion([5], asked.tokens if asked.varied else _WARM_TOKENS, **asked.settings(next(requests)))
        if beside.ready():
            return True, time.monotonic() - start
    return False, time.monotonic() - start


def _measure(condition: _Condition, strategy: str, asked: _Asked, folder: Path) -> dict[str, Any]:
    """Start a server, and what the strategy is; measure; end both. ``failed``: why it could not be done."""
    left = _drop(condition.model)
    limited = strategy != FITS
    in_cgroup = limited and condition.pressure == "cgroup"
    extra = [*_SERVER_OPTIONS]
    if strategy in _LOAD_MODES:
        extra += ["--load-mode", _LOAD_MODES[strategy]]
    group = MemoryCgroup(f"llmtraced-prefetch-{os.getpid()}", condition.limit if in_cgroup else None)
    server = Server(
        condition.path,
        threads=asked.threads,
        ctx=asked.ctx,
        extra=extra,
        cgroup=group,
        log=folder / "server.log",
        deadline_s=_START_SECONDS,
    )
    found: dict[str, Any] = {"left_bytes": left}
    with contextlib.ExitStack() as stack:
        if limited and condition.pressure == "lock":
            stack.enter_context(Locked(condition.limit))
        if strategy.startswith("readahead"):
            stack.enter_context(ReadAhead(condition.path, int(strategy.split()[1])))
        stack.enter_context(group)
        stack.callback(_drop, condition.model)  # before the cgroup is removed: nothing is left for its parent
        try:
            stack.enter_context(server)
            server.completion([5], _WARM_TOKENS)
            beside = _beside(condition, strategy, server, group, folder)
            if beside is None:
                found |= _ask(server, None, group, asked)
                if strategy == FITS:
                    found |= _together(server, asked, condition.sample)
            else:
                try:
                    with beside:
                        settled, seconds = _settle(server, beside, asked)
                        found |= {"settled": settled, "settle_s": seconds}
                        found |= _ask(server, beside.pid, group, asked)
                finally:
                    found["helper"] = beside.summary()
            found["own_bytes"] = group.own_bytes()
        except (LlmtracedError, OSError) as error:  # OSError: the server was gone when its counters were read
            if strategy == FITS:
                raise
            found["failed"] = _why(str(error), group.stat().get("oom_kill", 0))
    return found


def _beside(
    condition: _Condition, strategy: str, server: Server, group: MemoryCgroup, folder: Path
) -> Sidecar | Vmtouch | None:
    if strategy.partition(":")[0] in SIDECAR:
        return Sidecar(server.pid, strategy, folder)
    if strategy == "vmtouch":
        return Vmtouch(condition.path, max(condition.fitting - _VMTOUCH_SLACK, 1 << 20), group)
    return None


def _why(error: str, oom_kills: int) -> str:
    """Return why a measurement failed, in a line."""
    if oom_kills or "ended with status -9" in error:
        return "killed: out of memory"
    return error.splitlines()[0]


# --- a run


def run(
    *,
    strategies: Sequence[str] = STRATEGIES,
    memory: Sequence[str] = ("85%",),
    read_ahead_kb: Sequence[int] = (),
    model: str = "dense",
    rounds: int = 5,
    tokens: int = 16,
    prompt_tokens: int = 256,
    threads: int = 2,
    pressure: str = "cgroup",
) -> dict[str, Any]:
    """Measure and return the report (docs/benchmarks.md has its fields).

    Args:
        strategies: of :data:`STRATEGIES`; ``off`` and a model that fits are always measured. ``moe`` may be followed by
            what experts are guessed by: ``moe:none``, ``moe:attention+router``.
        memory: shares of the model, to which the server's own memory is added, or sizes for everything.
        read_ahead_kb: readahead of the model's device, restored afterwards; none: as it is.
        model: of bench.experiment.MODELS, or a GGUF file.
        rounds: how often each strategy is measured in each condition.
        tokens: of a request, at least 2.
        prompt_tokens: of the prompt that is measured; 0: none.
        threads: compute threads of the server.
        pressure: ``cgroup``, or ``lock``: a process locks the machine's memory.

    Raises:
        LlmtracedError: no root, no server, no such model, strategy or memory; the model does not even run unlimited.
    """
    _check(strategies, memory, tokens, pressure)
    _, path = model_path(model)
    whole = read_model(path)
    mixture = any(tensor.n_experts for tensor in whole.tensors)
    asked = _Asked(tokens, prompt_tokens, threads, varied=mixture)
    names, skipped = _available(strategies, mixture=mixture)
    conditions = []
    with tempfile.TemporaryDirectory(prefix="llmtraced-bench-") as name, sample_of(path) as sample:
        folder = Path(name)
        own = _measure(_Condition(whole, 0, 0, pressure, sample), FITS, asked, folder)["own_bytes"]
        log.info("the server's own memory: %.0f MB", own / 1e6)
        limits = [(level, limit_bytes(level, sum(s.size for s in whole.shards), own) or 0) for level in memory]
        if pressure == "lock":
            for _, limit in limits:
                bytes_to_lock(1 << 62, limit)
        for kb in read_ahead_kb or (None,):
            with ReadAhead(path, kb) if kb is not None else contextlib.nullcontext():
                for level, limit in limits:
                    condition = _Condition(whole, limit, own, pressure, sample)
                    ahead = read_ahead_of(path)
                    conditions.append(
                        {"memory": level, "limit_bytes": limit, "own_bytes": own, "read_ahead_kb": ahead}
                        | _rounds(condition, _named(names, ahead), rounds, asked, folder, level)
                    )
    report = {
        "conditions": conditions,
        "identical": len({answer for condition in conditions for answer in condition["answers"]}) == 1,
        "skipped": skipped,
        "machine": machine(),
        "settings": {
            "model": path.name,
            "model_bytes": sum(s.size for s in whole.shards),
            "rounds": rounds,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "threads": threads,
            "pressure": pressure,
            "server_options": list(_SERVER_OPTIONS),
            "disk": {"threads": READ_THREADS, "read_bytes": READ_BYTES},
        },
    }
    return {**report, "targets": targets(conditions)}


def _check(strategies: Sequence[str], memory: Sequence[str], tokens: int, pressure: str) -> None:
    for name in strategies:
        word, colon, sources = name.partition(":")
        if word not in STRATEGIES:
            raise LlmtracedError(f"no such strategy: {printable(name)}; there are {', '.join(STRATEGIES)}", USAGE)
        if colon and (word != MIXTURE or not set(sources.split("+")) <= {"none", *SOURCES}):
            said = f"{MIXTURE}:none, or {MIXTURE}: and, joined by +, of {', '.join(SOURCES)}"
            raise LlmtracedError(f"no such strategy: {printable(name)}; to choose what is guessed by: {said}", USAGE)
    for level in memory:
        if limit_bytes(level, 1000, 1) is None:
            raise LlmtracedError("--memory none: a model that fits is measured anyway; write 85% or 1400M", USAGE)
        share_of(level)
    if tokens < 2:
        raise LlmtracedError("--tokens: at least 2, because the first is not timed", USAGE)
    if pressure not in ("cgroup", "lock"):
        raise LlmtracedError(f"no such pressure: {printable(pressure)}; there are cgroup and lock", USAGE)


def _available(strategies: Sequence[str], *, mixture: bool) -> tuple[list[str], dict[str, str]]:
    """Return the strategies that can be measured here, and why the others cannot."""
    skipped: dict[str, str] = {}
    if not mixture:
        skipped |= {
            name: "the model is no mixture of experts" for name in strategies if name.partition(":")[0] == MIXTURE
        }
    if "vmtouch" in strategies and not Vmtouch.installed():
        skipped["vmtouch"] = "vmtouch is not installed: apt-get install vmtouch"
    names = list(dict.fromkeys([FITS, OFF, *strategies]))
    return [name for name in names if name not in skipped], skipped


def _named(names: Sequence[str], kb: int | None) -> list[str]:
    return [f"readahead {other_read_ahead(kb)}" if name == "readahead" else name for name in names]


def _rounds(
    condition: _Condition, names: Sequence[str], rounds: int, asked: _Asked, folder: Path, level: str
) -> dict[str, Any]:
    """Measure all strategies in turns, and the disk before, between and after."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    _drop(condition.model)
    disk = [disk_bytes_per_s(condition.path)]
    for number in range(rounds):
        for name, found in runs.items():
            if name in _LOAD_MODES and found and "failed" in found[-1]:
                continue  # it cannot be started here, and that does not change
            one = _measure(condition, name, asked, folder)
            found.append({"round": number, **one})
            said = one.get("failed") or f"{one['ms_per_token']:.0f} ms a token, prompt {one['prompt_ms'] or 0:.0f} ms"
            log.info("%s, round %d of %d, %s: %s", level, number + 1, rounds, name, said)
        disk.append(disk_bytes_per_s(condition.path))
        log.info("the disk gives %.2f GB/s", disk[-1] / 1e9)
    per_token = from_tensors("", condition.model).bytes_per_token
    used = condition.model.metadata.get(f"{condition.model.architecture}.expert_used_count")
    if isinstance(used, int):  # the rest of the merged tensors is not read
        unused = sum(t.size * (1 - used / t.n_experts) for t in condition.model.tensors if t.n_experts)
        per_token = max(int(per_token - unused), 0)
    return summed(runs, disk, bytes_per_token=per_token, fitting_bytes=condition.fitting)
