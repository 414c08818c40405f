"""kill -9 at random moments: the others go on, what was recorded can be read and adds up, nothing stays behind.

The sidecar is killed a hundred times in test_prefetch.py. LLMTRACED_KILLS: how often daemon and server are, each.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from helpers import wait_until
from prometheus_client.parser import text_string_to_metric_families
from running import TOKENS, Daemon, accounts, asking

from llmtraced.analysis.trace import open_trace, verdict
from llmtraced.bench.engine import Server, free_port
from llmtraced.schema import TABLES

pytestmark = pytest.mark.e2e

KILLS = int(os.environ.get("LLMTRACED_KILLS", "8"))
SEED = int(os.environ.get("LLMTRACED_SEED", "6"))
FLUSH_SECONDS = 0.5
SETTLE_SECONDS = 1.0  # until a file has its name, on a machine that is busy with a server, a daemon and a sidecar
PROMPT = list(range(20, 27))


def pinned() -> set[str]:
    """Return what is in the BPF file system: no more may be there afterwards."""
    return {path.name for path in Path("/sys/fs/bpf").glob("*")}


def check_cut_off(daemon: Daemon, pid: int, killed_ns: int, begun_ns: int) -> None:
    """What is on disk of a daemon that was killed is whole, adds up, and is all but the last interval."""
    (begin,) = daemon.said("begin", pid=pid)
    for table in TABLES:
        if table != "tensors":
            accounts(daemon.trace, table, pid)
    if (killed_ns - begun_ns) / 1e9 < FLUSH_SECONDS + SETTLE_SECONDS:
        return  # nothing need be on disk yet
    trace = open_trace(daemon.trace, begin["session"])
    assert any("has not been ended: it still runs, or was killed" in note for note in trace.notes)
    assert verdict(trace.account) == "complete"
    last = trace.table("tokens").select(pl.col("start_ns").max()).collect().item()
    missing = (killed_ns - last) / 1e9
    print(f"  {missing:.2f} s of {(killed_ns - begun_ns) / 1e9:.2f} s are missing")
    assert missing < FLUSH_SECONDS + SETTLE_SECONDS


def sidecar_tokens(file: Path) -> float:
    if not file.exists():
        return 0
    samples = [s for f in text_string_to_metric_families(file.read_text()) for s in f.samples]
    return next(s.value for s in samples if s.name == "llmtraced_prefetch_tokens_total")


def test_the_daemon_is_killed(small_model: Path, llama_server: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}, {KILLS} kills")
    before, trace, metrics = pinned(), tmp_path / "trace", tmp_path / "sidecar.prom"
    lives: set[int] = set()
    with Server(small_model, binary=llama_server, threads=1, ctx=256) as server:
        expected = server.completion(PROMPT, TOKENS)["content"]
        with asking(server, expected) as answers:
            command = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(server.pid), "--strategy", "off"]
            sidecar = subprocess.Popen([*command, "--metrics", str(metrics)], stderr=subprocess.DEVNULL)
            try:
                wait_until(lambda: sidecar_tokens(metrics) > 0, 60, "the sidecar sees tokens")
                for n in range(KILLS):
                    with Daemon(trace, tmp_path / f"{n}.log", wait=False) as daemon:
                        lives.add(daemon.process.pid)
                        if n % 3:  # while it records; else also while it compiles, attaches, looks for servers
                            wait_until(lambda: daemon.said("begin", pid=server.pid), 60, "the server is found")
                        begun_ns = time.monotonic_ns()
                        time.sleep(rng.uniform(0, 3))
                        assert daemon.process.poll() is None, daemon.log.read_text()
                        daemon.process.kill()
                        killed_ns = time.monotonic_ns()
                        daemon.process.wait()
                    if n % 3:
                        check_cut_off(daemon, server.pid, killed_ns, begun_ns)
                known, seen = len(answers), sidecar_tokens(metrics)
                wait_until(lambda: len(answers) > known + 1, 60, "the server goes on")
                wait_until(lambda: sidecar_tokens(metrics) > seen, 60, "the sidecar goes on")
                assert sidecar.poll() is None
            finally:
                sidecar.kill()
                sidecar.wait()
            (trace / "faults").mkdir(exist_ok=True, parents=True)
            (trace / "faults" / ".tmp-left-000000.parquet").touch()
            with Daemon(trace, tmp_path / "last.log") as daemon:  # nothing of its forerunners is in its way
                daemon.found(server.pid)
                assert not list(trace.glob("**/.tmp-*left*"))
            assert "unfinished files of an earlier run" in daemon.log.read_text()
            assert not list(trace.glob("**/.tmp-*"))
    trace_of_last = open_trace(trace, daemon.said("end", pid=server.pid)[0]["session"])
    assert not [note for note in trace_of_last.notes if "has not been ended" in note]

    def orphans() -> list[int]:  # each daemon led a session of its own: the compiler is in it, too
        return [pid for pid in psutil.pids() if session_of(pid) in lives]

    wait_until(lambda: not orphans(), 20, "no process of a daemon is left")
    assert pinned() == before


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def test_the_server_is_killed(small_model: Path, llama_server: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}, {KILLS} kills")
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as daemon:
        own = psutil.Process(daemon.process.pid)
        pids, before = [], 0
        for n in range(KILLS):
            server = Server(small_model, binary=llama_server, threads=1, ctx=256)
            with subprocess.Popen(
                server.command(free_port()),
                env=server.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as child:
                time.sleep(rng.uniform(0, 2))  # while it starts, loads, warms up, waits
                assert child.poll() is None
                child.kill()
            server.log.unlink()
            pids.append(child.pid)
            ended = lambda: len(daemon.said("end", pid=child.pid)) == len(daemon.said("begin", pid=child.pid))  # noqa: E731
            wait_until(ended, 20, "its end is seen")
            if n == 1:
                before = own.num_fds()
        wait_until(lambda: own.num_fds() <= before, 10, "no descriptor more: what it reads is open for a moment only")
        assert daemon.total("llmtraced_unsettled_total") == 0
        assert daemon.total("llmtraced_mapped_bytes") == 0 or not {
            labels["pid"] for name, labels, _ in daemon.samples() if name == "llmtraced_mapped_bytes"
        } & {str(pid) for pid in pids}
        assert len([pid for pid in pids if daemon.said("begin", pid=pid)]) > KILLS / 3
    for end in daemon.said("end"):
        if end["pid"] in pids:
            for table in TABLES:
                if table != "tensors":
                    accounts(daemon.trace, table, end["pid"])
            assert verdict(open_trace(daemon.trace, end["session"]).account) in (
                "complete",
                "unknown: the trace has no account",
            )
