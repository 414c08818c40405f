"""A flood of faults for a minute: memory stays bounded, losses are counted exactly, detail goes down by itself.

LLMTRACED_FLOOD: for how many seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import wait_until
from running import Daemon, accounts, sums

from llmtraced.bench.touch import Touch

pytestmark = pytest.mark.kernel

SECONDS = float(os.environ.get("LLMTRACED_FLOOD", "60"))
MOST_BYTES = 320e6
MOST_NS = 3000  # that a fault may take longer; docs/reliability.md has what it does take


def flood(touches: Sequence[Touch]) -> list[dict[str, Any]]:
    """Let all of them fault at the same time; return what each says."""
    with ThreadPoolExecutor(len(touches)) as pool:
        return list(pool.map(Touch.go, touches))


def ns_a_fault(done: Sequence[dict[str, Any]]) -> float:
    """Return how long a fault took, as each process saw it: mean."""
    return sum(one["duration_ns"] for one in done) / sum(one["minflt"] + one["majflt"] for one in done)


@contextmanager
def flooding(model: Path, faults: int) -> Iterator[list[Touch]]:
    """One process a processor, each of which will make so many faults."""
    with ExitStack() as stack:
        processors = range(len(os.sched_getaffinity(0)))
        yield [stack.enter_context(Touch(model, None, "--flood", str(faults))) for _ in processors]


def test_a_flood(small_model: Path, tmp_path: Path) -> None:
    alone = []
    for _ in range(3):
        with flooding(small_model, 500_000) as touches:
            alone.append(ns_a_fault(flood(touches)))
    n = int(SECONDS * 1e9 / min(alone))
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log", "--cpu", "0.02") as daemon:
        own = psutil.Process(daemon.process.pid)
        with flooding(small_model, n) as touches, ThreadPoolExecutor(1) as pool:
            pids = [touch.ready["pid"] for touch in touches]
            for pid in pids:
                daemon.found(pid)
            running = pool.submit(flood, touches)
            peak = 0
            while not running.done():
                peak = max(peak, own.memory_info().rss)
                assert daemon.total("llmtraced_detail", pid=str(pids[0])) >= 0
                time.sleep(0.2)
            done = running.result()
            counted = [daemon.total("llmtraced_tensor_faults_total", pid=str(pid)) for pid in pids]
        for pid in pids:
            wait_until(lambda pid=pid: daemon.said("end", pid=pid), 30, "it is written")  # type: ignore[misc]
    happened = [one["minflt"] + one["majflt"] for one in done]
    assert counted == happened
    accounted = [sums(accounts(daemon.trace, "faults", pid)) for pid in pids]
    seconds = max(one["end_ns"] for one in done) / 1e9 - min(one["start_ns"] for one in done) / 1e9
    print(
        f"{sum(happened) / seconds / 1e6:.2f} M faults/s by {len(done)} processes for {seconds:.0f} s, "
        f"{min(alone):.0f} ns a fault alone, {ns_a_fault(done):.0f} traced, peak {peak / 1e6:.0f} MB, {accounted}"
    )
    assert [one["counted"] for one in accounted] == happened
    assert all(one["counted"] == one["delivered"] + one["dropped"] for one in accounted)
    assert peak < MOST_BYTES
    assert any(daemon.said("detail", pid=pid, detail="totals") for pid in pids)
    assert "from now on totals is recorded" in daemon.log.read_text()
    assert sum(one["dropped"] for one in accounted) > sum(happened) / 4, "what is not recorded is not forgotten"
    assert ns_a_fault(done) - min(alone) < MOST_NS
