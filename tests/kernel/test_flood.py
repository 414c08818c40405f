"""A flood of faults for a minute: memory stays bounded, losses are counted exactly, detail goes down by itself.

LLMTRACED_FLOOD: for how many seconds.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import wait_until
from running import Daemon, accounts, sums

from llmtraced.bench.touch import Touch

pytestmark = pytest.mark.kernel

SECONDS = float(os.environ.get("LLMTRACED_FLOOD", "60"))
MOST_BYTES = 320e6
MOST_NS = 3000  # that a fault may take longer; docs/reliability.md has what it does take


def ns_a_fault(model: Path) -> float:
    n = 500_000
    with Touch(model, None, "--flood", str(n)) as touch:
        return float(touch.go()["duration_ns"]) / n


def test_a_flood(small_model: Path, tmp_path: Path) -> None:
    alone = min(ns_a_fault(small_model) for _ in range(3))
    n = int(SECONDS * 1e9 / alone)
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log", "--cpu", "0.02") as daemon:
        own = psutil.Process(daemon.process.pid)
        with Touch(small_model, None, "--flood", str(n)) as touch:
            pid = touch.ready["pid"]
            daemon.found(pid)
            result: dict[str, int] = {}
            worker = threading.Thread(target=lambda: result.update(touch.go()))
            worker.start()
            peak = 0
            while worker.is_alive():
                peak = max(peak, own.memory_info().rss)
                assert daemon.total("llmtraced_detail", pid=str(pid)) >= 0
                time.sleep(0.2)
            worker.join()
            faults = daemon.total("llmtraced_tensor_faults_total", pid=str(pid))
        wait_until(lambda: daemon.said("end", pid=pid), 30, "it is written")
    happened = result["minflt"] + result["majflt"]
    assert faults == happened
    found = sums(accounts(daemon.trace, "faults", pid))
    print(
        f"{happened / result['duration_ns'] * 1e3:.2f} M faults/s for {result['duration_ns'] / 1e9:.0f} s, "
        f"{alone:.0f} ns a fault alone, {result['duration_ns'] / happened:.0f} traced, "
        f"peak {peak / 1e6:.0f} MB, {found}"
    )
    assert found["counted"] == happened
    assert peak < MOST_BYTES
    assert daemon.said("detail", pid=pid, detail="totals")
    assert "from now on totals is recorded" in daemon.log.read_text()
    assert found["dropped"] > happened / 4, "what is not recorded is not forgotten"
    assert result["duration_ns"] / happened - alone < MOST_NS
