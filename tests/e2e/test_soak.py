"""Nothing of daemon and sidecar grows with time. LLMTRACED_SOAK: for how many seconds; `make soak`: ten minutes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers import wait_until
from running import Daemon, MadeUp, build

from llmtraced.bench.engine import Server

pytestmark = pytest.mark.e2e

SECONDS = float(os.environ.get("LLMTRACED_SOAK", "90"))
KEPT = 4_000_000  # of which the sessions that come and go write a fortieth a second
MB = 1_000_000


def measured(process: psutil.Process) -> dict[str, int]:
    maps = Path(f"/proc/{process.pid}/maps").read_text().count("\n")
    return {"rss": process.memory_info().rss, "descriptors": process.num_fds(), "maps": maps}


def size_of(path: Path) -> int:
    """Return a file's size; 0 where it has gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_nothing_grows(small_model: Path, llama_server: Path, tmp_path: Path) -> None:
    program, metrics, over = build(tmp_path / "made-up-llama"), tmp_path / "sidecar.prom", threading.Event()
    visit = threading.Lock()  # looked at when nobody visits: a session has descriptors of its own
    rows: list[dict[str, dict[str, int]]] = []
    with (
        Server(small_model, binary=llama_server, threads=1, ctx=256) as server,
        Daemon(tmp_path / "trace", tmp_path / "daemon.log", "--keep-size", str(KEPT)) as daemon,
    ):

        def ask() -> None:
            while not over.wait(0.3):
                server.completion(list(range(20, 27)), 8)

        def come_and_go() -> None:
            while not over.is_set():
                with visit, MadeUp(program, small_model) as visitor:
                    daemon.found(visitor.pid)
                    for _ in range(5):
                        visitor.do("t")
                        visitor.do("g")
                time.sleep(0.02)  # for whoever waits to look

        def alone() -> bool:
            return len(daemon.said("begin")) == len(daemon.said("end")) + 1

        command = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(server.pid), "--metrics", str(metrics)]
        threads = [threading.Thread(target=work) for work in (ask, come_and_go)]
        sidecar = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            for thread in threads:
                thread.start()
            wait_until(metrics.exists, 60, "the sidecar works")
            ends = time.monotonic() + SECONDS
            while time.monotonic() < ends:
                files = [p for p in (tmp_path / "trace").glob("**/*") if p.is_file()]
                folder = {"bytes": sum(map(size_of, files)), "unfinished": sum(p.name.startswith(".") for p in files)}
                assert daemon.total("llmtraced_detail") > 0
                with visit:
                    wait_until(alone, 20, "only the server is traced")
                    daemon_has = measured(psutil.Process(daemon.process.pid))
                    rows.append(
                        {"daemon": daemon_has, "sidecar": measured(psutil.Process(sidecar.pid)), "trace": folder}
                    )
                time.sleep(1)
        finally:
            over.set()
            sidecar.kill()
            sidecar.wait()
            for thread in threads:
                thread.join()
    third = len(rows) // 3
    sessions = len(daemon.said("end"))
    print(f"{len(rows)} looks, {sessions} sessions")
    for who, names in (("daemon", ("rss", "descriptors", "maps")), ("sidecar", ("rss", "descriptors", "maps"))):
        for name in names:
            middle, last = ([row[who][name] for row in part] for part in (rows[third : 2 * third], rows[2 * third :]))
            print(f"{who} {name}: median {statistics.median(middle):.0f}, then {statistics.median(last):.0f}")
            slack = max(4 * MB, 0.03 * statistics.median(middle)) if name == "rss" else 2
            assert statistics.median(last) <= statistics.median(middle) + slack, (who, name)
    assert sessions > SECONDS / 20
    assert max(row["trace"]["unfinished"] for row in rows) <= 2, "files that are being written"
    if SECONDS > 200:  # old ones have been deleted within the last third
        assert min(row["trace"]["bytes"] for row in rows[2 * third :]) < 1.1 * KEPT
