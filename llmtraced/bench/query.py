"""How long each report takes on a large trace, and how much memory.

The trace is made up (:mod:`llmtraced.bench.synthetic`), so that its totals are known, and reports are checked against
them. Every report runs in a process of its own, in turns: all of them once, then all of them again. docs/benchmarks.md
explains the method and the figures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl

from llmtraced.bench import peak
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.synthetic import write_trace
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.reporters.questions import QUESTIONS

__all__ = ["GOALS", "GOAL_ROWS", "run"]

log = logging.getLogger(__name__)

GOAL_ROWS: Final = 100_000_000
GOALS: Final = {"seconds": 10.0, "peak_rss_bytes": 2e9}
"""For so many rows, on 2 cores."""
_DEADLINE_SECONDS: Final = 900.0
_KNOWN: Final = "synthetic.json"
"""Beside the tables of a trace of ours: how it was made, and its totals. Written last."""


def run(
    *,
    rows: int = GOAL_ROWS,
    reports: Sequence[str] | None = None,
    rounds: int = 3,
    trace: Path | None = None,
    n_tensors: int = 1000,
    model_bytes: int = 4_000_000_000,
    moe: bool = True,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure and return the figures (docs/benchmarks.md has their fields).

    Args:
        rows: of the trace, all tables together.
        reports: their names; all that there are by default.
        rounds: how often each is run.
        trace: keep the trace in this folder; one of the same kind that is there already is used again. By default it
            lies in a temporary folder and is deleted.
        n_tensors: of the model, at least; fewer make more and shorter tokens.
        model_bytes: the model's size, about.
        moe: a mixture of experts, not a dense model.
        seed: the same one gives the same trace.

    Raises:
        LlmtracedError: no such report, or another trace in the folder.
    """
    names = list(QUESTIONS) if reports is None else list(dict.fromkeys(reports))
    if unknown := [name for name in names if name not in QUESTIONS]:
        raise LlmtracedError(f"no such report: {printable(unknown[0])}; there are {', '.join(QUESTIONS)}", USAGE)
    model: dict[str, Any] = {"n_tensors": n_tensors, "model_bytes": model_bytes, "moe": moe, "seed": seed}
    wanted = {"rows": rows, **model}
    with tempfile.TemporaryDirectory(prefix="llmtraced-bench-") as scratch:
        folder = trace or Path(scratch) / "trace"
        known, write_seconds = _ready(folder, wanted)
        empty = Path(scratch) / "empty"
        write_trace(empty, 0, **model)
        files = list(folder.rglob("*.parquet"))
        for path in files:  # from the page cache, not from the disk
            path.read_bytes()
        took: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        bare: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                if any(one["failed"] for one in took[name]):
                    continue  # it would fail again
                one = _measure(name, folder, Path(scratch), known)
                took[name].append(one)
                bare[name].append(_measure(name, empty, Path(scratch), {}))
                outcome = one["failed"] or f"{one['seconds']:.2f} s, {one['peak_rss_bytes'] / 1e6:.0f} MB"
                log.info("round %d of %d: %s: %s", number + 1, rounds, name, outcome)
    total = sum(known["rows"].values())
    found = {name: _figures(took[name], bare[name], total) for name in names}
    return {
        "reports": found,
        "targets": targets(found),
        "trace": {
            "rows": total,
            "rows_by_table": known["rows"],
            "tokens": known["tokens"],
            "tensors": len(known["tensors"]),
            "files": len(files),
            "disk_bytes": sum(known["disk_bytes"].values()),
            "disk_bytes_per_row": round(sum(known["disk_bytes"].values()) / total, 3),
            "write_seconds": write_seconds,
        },
        "verified": sorted(set(names) & set(_CHECKS)),
        "machine": {**machine(), "polars": pl.__version__},
        "settings": {**wanted, "rounds": rounds, "threads": pl.thread_pool_size()},
    }


def targets(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each goal its limit, and which reports meet it: one that failed meets none."""
    return {
        goal: {
            "limit": f"<= {limit:g}",
            "met": {n: "failed" not in r and r[goal]["median"] <= limit for n, r in reports.items()},
        }
        for goal, limit in GOALS.items()
    }


def _ready(folder: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return what is known about the trace in ``folder``, which is written unless it is there, and the seconds."""
    note = folder / _KNOWN
    with contextlib.suppress(OSError, ValueError, KeyError):
        made = json.loads(note.read_text())
        if made["made"] == wanted:
            log.info("using the trace in %s", printable(str(folder)))
            return made["known"], None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LlmtracedError(
            f"{printable(str(folder))} holds something else than this trace, or an unfinished one: name a new folder",
            USAGE,
        )
    log.info("writing a trace of %s rows", f"{wanted['rows']:,}")
    start = said = time.monotonic()

    def progress(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log.info("%s rows", f"{done:,}")

    known = write_trace(folder, progress=progress, **wanted)
    seconds = time.monotonic() - start
    note.write_text(json.dumps({"made": wanted, "known": known}))
    return known, round(seconds, 2)


def _measure(name: str, trace: Path, scratch: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Run one report in a process of its own; ``failed`` is empty, or says what is wrong with the answer."""
    output = scratch / f"{name}.json"
    report = [sys.executable, "-m", "llmtraced", "report", name, str(trace), "--json", "-o", str(output), "--force"]
    command = [sys.executable, "-I", "-S", peak.__file__, *report]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            out, err = child.communicate(timeout=_DEADLINE_SECONDS)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)  # the report, too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"failed": f"no answer within {_DEADLINE_SECONDS:.0f} s"}
    took: dict[str, Any] = json.loads(out)
    code = took.pop("code")
    if code:
        last = (err.strip().splitlines() or [""])[-1]
        return {**took, "failed": printable(f"exit code {code}: {last}")}
    return {**took, "json_bytes": output.stat().st_size, "failed": _difference_of(name, output, known)}


def _figures(full: list[dict[str, Any]], empty: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Return one report's figures, or only what it ``failed`` with."""
    if failed := next((one["failed"] for one in (*full, *empty) if one["failed"]), ""):
        return {"failed": failed}
    found: dict[str, Any] = {key: spread([one[key] for one in full]) for key in (*GOALS, "cpu_seconds")}
    found["empty"] = {key: spread([one[key] for one in empty]) for key in GOALS}
    state = found["peak_rss_bytes"]["median"] - found["empty"]["peak_rss_bytes"]["median"]
    return {**found, "state_bytes_per_row": round(state / rows, 3), "json_bytes": full[-1]["json_bytes"]}


def _reread(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, report[key]) for key in ("total_bytes_read", "unique_bytes"))
    yield "tensors", {tensor["tensor_name"]: tensor for tensor in report["tensors"]}


def _summary(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, report[key]) for key in ("evicted_bytes", "bytes_by_cause", "faults"))
    yield from ((key, report["reread"][key]) for key in ("total_bytes_read", "unique_bytes"))


def _tokens(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "tokens", len(report["tokens"])
    read = sum(token["bytes_read"] for token in report["tokens"])
    yield "total_bytes_read", read + report["outside_bytes_read"]


_CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]]] = {
    "reread": _reread,
    "summary": _summary,
    "tokens": _tokens,
}
"""Report → what in it is known beforehand: keys of :func:`write_trace`'s answer, and the report's figures."""


def _difference_of(name: str, output: Path, known: Mapping[str, Any]) -> str:
    """Return what differs between the report and what is known; empty if nothing does, or nothing is known."""
    if name not in _CHECKS or not known:
        return ""
    found = _CHECKS[name](json.loads(output.read_bytes()))
    return next((said for key, got in found if (said := _difference(key, got, known[key]))), "")


def _difference(where: str, got: Any, expected: Any) -> str:
    """Compare what is expected, all of it, with what was got, which may say more."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        parts = (_difference(f"{where}.{key}", got.get(key), value) for key, value in expected.items())
        return next((part for part in parts if part), "")
    return "" if got == expected else f"{printable(where)} is {printable(str(got))}, not {expected}"
