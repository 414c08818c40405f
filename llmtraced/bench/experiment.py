"""The matrix: dense and mixture-of-experts models at several memory limits, the same prompt, recorded and summed up.

Each cell of the matrix (model, memory level) runs once in every round, in its own memory cgroup with a server of its
own, so that the disk's moods meet all cells alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from llmtraced import kept
from llmtraced.analysis.experts import experts
from llmtraced.analysis.pattern import pattern
from llmtraced.analysis.reread import reread
from llmtraced.analysis.timeline import timeline
from llmtraced.analysis.tokens import tokens
from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, ensure_gemma
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.overhead import limit_bytes
from llmtraced.bench.pressure import MemoryCgroup, ReadAhead, drop_cache
from llmtraced.bench.pressure import read_ahead_kb as read_ahead_of
from llmtraced.capture import Capture
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.schema import Detail

__all__ = ["LEVELS", "MODELS", "Prompt", "run"]

log = logging.getLogger(__name__)

MODELS: Final[Mapping[str, models.Shape | None]] = {
    "gemma": None,  # the real one
    "dense": models.dense_preset(1_700_000_000),
    "moe": models.moe_preset(2_700_000_000),
}
"""What the matrix can be made of; all but the real one are written into the cache folder the first time."""

LEVELS: Final = ("fits", "85%", "70%", "50%", "35%")
"""Memory for the model's pages as a share of its size; the server's own memory is added. ``fits``: no limit."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked in every cell: token ids that any vocabulary has, so that every model gets the same.

    Attributes:
        n_prompt: tokens in the prompt.
        n_predict: tokens generated.
        temperature: 0 always takes the likeliest token; a random model then settles on one, and so on its experts.
    """

    n_prompt: int = 32
    n_predict: int = 16
    temperature: float = 1.0

    @property
    def ids(self) -> list[int]:
        """The prompt."""
        return [5 + 7 * i % 193 for i in range(self.n_prompt)]


def model_path(name: str) -> tuple[str, Path]:
    """Return a short name and the file of a model of :data:`MODELS`, or of a file of one's own.

    Raises:
        LlmtracedError: neither.
    """
    if name not in MODELS:
        path = Path(name)
        if not path.is_file():
            raise LlmtracedError(
                f"no such model: {printable(name)}; name a GGUF file, or of {', '.join(MODELS)}", USAGE
            )
        return path.stem, path
    shape = MODELS[name]
    if shape is None:
        return name, ensure_gemma()
    path = kept.folder() / f"experiment-{name}-{models.fingerprint(shape)}.gguf"
    if not path.exists():
        log.info("writing the %s model, %.1f GB", name, models.plan_bytes(shape) / 1e9)
        models.write(path, shape)
    return name, path


def limit_of(level: str, model_bytes: int, own_bytes: int) -> int | None:
    """Return the memory limit, bytes, of a level; None: no limit.

    Raises:
        LlmtracedError: not a level.
    """
    if level == "fits":
        return None
    share = level.removesuffix("%")
    if not level.endswith("%") or not share.isdecimal() or not 1 <= int(share) <= 1000:
        raise LlmtracedError(f"no such memory level: {printable(level)}; write fits, or a share such as 70%", USAGE)
    return limit_bytes(level, model_bytes, own_bytes)


def run(
    folder: Path,
    *,
    names: Sequence[str] = tuple(MODELS),
    levels: Sequence[str] = LEVELS,
    rounds: int = 3,
    threads: int = 2,
    read_ahead_kb: int | None = None,
    prompt: Prompt | None = None,
    router_scores: bool = False,
) -> dict[str, Any]:
    """Run the matrix and return the report; each cell's last trace stays in ``folder`` as ``MODEL-LEVEL``.

    Args:
        folder: for the traces.
        names: of :data:`MODELS`, or GGUF files.
        levels: memory levels.
        rounds: how often each cell runs.
        threads: compute threads of the server.
        read_ahead_kb: readahead of the model's device while it runs; None: as it is.
        prompt: what is asked.
        router_scores: record those, too, of mixtures.

    Raises:
        LlmtracedError: no root, no BCC, no server, no such model or level.
    """
    asked = prompt or Prompt()
    for level in levels:
        limit_of(level, 1, 1)
    paths = dict(model_path(name) for name in names)
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {(m, level): [] for m in paths for level in levels}
    for number in range(rounds):
        for (name, level), runs in cells.items():
            log.info("round %d of %d: %s, %s", number + 1, rounds, name, level)
            trace = folder / f"{name}-{level.rstrip('%')}"
            shutil.rmtree(trace, ignore_errors=True)
            with ReadAhead(paths[name], read_ahead_kb) if read_ahead_kb else contextlib.nullcontext():
                ahead = read_ahead_of(paths[name])
                limit, asked_at = _record(paths[name], level, trace, asked, threads, router_scores)
            runs.append({"limit_bytes": limit, "read_ahead_kb": ahead, **_figures(open_trace(trace), asked_at)})
            one = runs[-1]["phases"]["decode"]
            log.info("  %.3g tokens/s, %.3g GB a token", one["tokens_per_second"] or 0, one["bytes_per_token"] / 1e9)
    return {
        "cells": [
            {"model": m, "model_bytes": paths[m].stat().st_size, "level": level, "trace": f"{m}-{level.rstrip('%')}"}
            | _summed(runs)
            for (m, level), runs in cells.items()
        ],
        "machine": machine(),
        "settings": {
            "rounds": rounds,
            "threads": threads,
            "read_ahead_kb": next(iter(cells.values()))[0]["read_ahead_kb"],
            "n_prompt": asked.n_prompt,
            "n_predict": asked.n_predict,
            "temperature": asked.temperature,
            "server_options": ["--no-repack"],
        },
    }


def _record(
    model: Path, level: str, trace: Path, asked: Prompt, threads: int, router_scores: bool
) -> tuple[int | None, int]:
    """Record one answer; return the memory limit and how many graphs had run before it was asked for."""
    drop_cache(model)  # what is cached already would be charged to nobody
    with (
        MemoryCgroup(f"llmtraced-experiment-{os.getpid()}", None) as group,
        Server(model, threads=threads, ctx=512, extra=("--no-repack",), cgroup=group) as server,
    ):
        server.completion(asked.ids[:4], 2)
        limit = limit_of(level, model.stat().st_size, group.stat().get("anon_bytes", 0))
        group.set_limit(limit)
        capture = Capture(trace, Detail.OPS, router_scores=router_scores)
        try:
            session = capture.attach(server.pid)
            stop = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                watching = pool.submit(_watch, capture, stop)
                try:
                    # Twice unmeasured: the graph's layout is learned, and the cache finds its balance.
                    server.completion(asked.ids, 4, temperature=asked.temperature)
                    server.completion(asked.ids, 2, temperature=asked.temperature)
                    before = int(session.tracer.slots["token"][session.slot])
                    server.completion(asked.ids, asked.n_predict, temperature=asked.temperature, timeout_s=1800)
                finally:
                    stop.set()
                    watching.result()
        finally:
            capture.close()
    return limit, before


def _watch(capture: Capture, stop: threading.Event) -> None:
    while not stop.is_set():
        capture.step()


def _figures(trace: Trace, before: int) -> dict[str, Any]:
    """Return what a cell's table and the findings need, of the answer that began after graph ``before``."""
    rows = [row for row in tokens(trace)["tokens"] if row["token"] > before]
    reads = reread(trace, "decode", follow=False)
    order = {one["phase"]: one for one in timeline(trace)["phases"]}
    phases: dict[str, dict[str, Any]] = {}
    for phase in ("prompt", "decode"):
        of = [row for row in rows if row["phase"] == phase and row["duration_ns"]]
        count = sum(row["n_tokens"] for row in of)
        seconds = sum(row["duration_ns"] for row in of) / 1e9
        stall = sum(row["stall_ns"] or 0 for row in of) / 1e9
        read = sum(row["bytes_read"] for row in of)
        phases[phase] = {
            "tokens": count,
            "graphs": len(of),
            "tokens_per_second": count / seconds if seconds else None,
            "stall_share": stall / seconds if seconds else None,
            "bytes_per_token": read / len(of) if of else 0,
            "major_faults_per_token": sum(row["major_faults"] or 0 for row in of) / len(of) if of else 0,
            "compute_ns_per_token": (seconds - stall) * 1e9 / len(of) if of else None,
            **{name: share for name, share in order.get(phase, {}).items() if name.endswith("_byte_share")},
        }
    found = pattern(trace)
    routed = experts(trace) if trace.rows["routing"] else None
    return {
        "phases": phases,
        "decode_bytes_read": reads["total_bytes_read"],
        "decode_unique_bytes": reads["unique_bytes"],
        "amplification": reads["amplification"],
        "verdict": reads["verdict"],
        "pattern": found["answer"],
        "experts": None
        if routed is None
        else {key: routed[key] for key in ("evaluations", "n_slices", "n_slices_used", "sequence", "reuse", "cache")},
    }


def _summed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds, the spread of the speed, and the rounds themselves."""
    decode = [run["phases"]["decode"] for run in runs]
    speeds = [one["tokens_per_second"] for one in decode if one["tokens_per_second"]]
    amplified = [run["amplification"] for run in runs if run["amplification"] is not None]
    return {
        "limit_bytes": runs[0]["limit_bytes"],
        "tokens_per_second": spread(speeds) if speeds else None,
        "bytes_per_token": median(one["bytes_per_token"] for one in decode),
        "unique_bytes": median(run["decode_unique_bytes"] for run in runs),
        "amplification": median(amplified) if amplified else None,
        "stall_share": median(one["stall_share"] or 0 for one in decode),
        "rounds": [dict(run) for run in runs],
    }
