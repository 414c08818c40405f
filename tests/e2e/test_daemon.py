"""The daemon as an operator runs it: beside servers that come and go, scraped, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from helpers import wait_until
from running import Daemon, Router

from llmtraced.analysis.reread import reread
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, ensure_gemma, ensure_llama_server
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.bench.scrape import write_model
from llmtraced.bench.touch import Touch
from llmtraced.gguf_map import read_model
from llmtraced.schema import PAGE

pytestmark = pytest.mark.e2e


def test_metrics_and_trace_tell_the_same_story(tmp_path: Path) -> None:
    ensure_llama_server()
    model = ensure_gemma()
    drop_cache(model)
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running:
        with MemoryCgroup(f"llmtraced-daemon-{os.getpid()}", int(model.stat().st_size * 0.75)) as cgroup:
            with Server(model, threads=1, ctx=512, extra=("--no-repack",), cgroup=cgroup) as server:
                pid = str(server.pid)
                wait_until(lambda: running.total("llmtraced_mapped_bytes", pid=pid) > 0, 20, "the server is found")
                for _ in range(3):
                    server.completion([10, 11, 12], 5)
                time.sleep(2.5)  # two flushes: what the kernel counted is on disk
                last, scraped_ns = running.scrape(), time.monotonic_ns()
                assert psutil.Process(running.process.pid).memory_info().rss < 200e6
                time.sleep(2)
                assert {k for k in running.scrape() if ("pid", pid) in k[1]} == {
                    k for k in last if ("pid", pid) in k[1]
                }
            wait_until(lambda: running.total("llmtraced_mapped_bytes", pid=pid) == 0, 20, "the server's end is seen")
        # A second server after the first.
        with Server(model, threads=1, ctx=512) as server:
            second = str(server.pid)
            wait_until(lambda: running.total("llmtraced_mapped_bytes", pid=second) > 0, 20, "the next server is found")
            server.completion([10, 11, 12], 3)
            time.sleep(0.5)
        running.end()

    events = [json.loads(line) for line in running.said_file.read_text().splitlines()]
    assert [e["event"] for e in events][:: len(events) - 1] == ["ready", "stopped"]
    assert [e["event"] for e in events if e.get("pid") == int(pid)] == ["begin", "end"]
    sessions = [str(s) for s in open_trace(tmp_path / "trace").sessions]  # and what else ran on the machine
    (first,) = [s for s in sessions if f"-{pid}-" in s]
    assert [s for s in sessions if f"-{second}-" in s]
    trace = open_trace(tmp_path / "trace", first)
    report = reread(trace)
    assert report["verdict"] == "complete"

    def scraped(name: str, **labels: str) -> float:
        wanted = {("pid", pid), *labels.items()}
        return sum(v for (n, have), v in last.items() if n == name and wanted <= set(have))

    # Should they differ: what came in after the scrape, by whom (none should, and it is no difference of the counts).
    adds = trace.table("pagecache").filter(pl.col("action") == "add", pl.col("timestamp") > scraped_ns)
    late = adds.group_by("pid", "comm", "cause").agg(pl.col("bytes").sum()).collect().rows()
    # The scrape came from totals in the kernel, the report from every single event; the server was idle in between.
    for tensor in report["tensors"]:
        name = tensor["tensor_name"]
        assert scraped("llmtraced_tensor_faults_total", tensor=name, type="major") == tensor["major_faults"]
        assert scraped("llmtraced_tensor_faults_total", tensor=name, type="minor") == tensor["minor_faults"]
        assert scraped("llmtraced_tensor_fault_seconds_total", tensor=name) == pytest.approx(tensor["stall_ns"] / 1e9)
        assert scraped("llmtraced_tensor_read_bytes_total", tensor=name) == tensor["bytes_read"], late
        assert scraped("llmtraced_tensor_reread_bytes_total", tensor=name) == tensor["reread_bytes"]
    assert scraped("llmtraced_tensor_read_bytes_total") == report["total_bytes_read"] > 0
    assert report["reread_bytes"] > 0
    tokens = trace.table("tokens").collect()
    assert (
        scraped("llmtraced_tokens_total", phase="decode")
        == tokens.filter(pl.col("phase") == "decode")["n_tokens"].sum()
    )
    assert scraped("llmtraced_graphs_total") == tokens.filter(pl.col("token") > 0).height
    stall = tokens.filter(pl.col("token") > 0)["stall_ns"].sum() / 1e9
    assert scraped("llmtraced_stall_seconds_total") >= stall * 0.999
    for probe in ("faults", "pagecache", "tokens"):
        counted = scraped("llmtraced_events_total", probe=probe, outcome="counted")
        delivered = scraped("llmtraced_events_total", probe=probe, outcome="delivered")
        assert counted == delivered + scraped("llmtraced_events_total", probe=probe, outcome="dropped") > 0


def test_the_servers_that_a_router_starts_are_traced(tmp_path: Path) -> None:
    ensure_llama_server()
    (tmp_path / "models").mkdir()
    names = {"one": 7, "two": 11}
    for name in names:
        models.write(tmp_path / "models" / f"{name}.gguf", models.dense_preset(20_000_000))
    with (
        Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running,
        Router(tmp_path / "models" / "one.gguf", threads=1, ctx=256, extra=("--no-repack",)) as router,
    ):

        def graphs(name: str) -> float:
            return sum(running.total("llmtraced_graphs_total", pid=str(e["pid"])) for e in begun(name))

        def begun(name: str) -> list[dict[str, Any]]:
            return running.said("begin", models=[f"{name}.gguf"])

        def hooked(name: str) -> float:
            router.completion([10], 1, model=name)
            return graphs(name)

        for name in names:
            wait_until(partial(hooked, name), 20, f"graphs of {name} are seen")
        children = {name: [e["pid"] for e in begun(name)] for name in names}
        assert [len(pids) for pids in children.values()] == [1, 1]
        assert {psutil.Process(pid).ppid() for (pid,) in children.values()} == {router.pid}
        before = {name: graphs(name) for name in names}
        for name, n in names.items():
            router.completion([10, 11, 12], n, model=name)
        assert {name: graphs(name) - before[name] for name in names} == names
        assert not running.said("begin", pid=router.pid), "it uses no model itself"


def test_2000_tensors_are_exported_one_by_one(tmp_path: Path) -> None:
    """With what was read of each; how long it takes is measured by ``llmtraced bench scrape``."""
    path, n = tmp_path / "many.gguf", 2000
    write_model(path, n)
    model = read_model(path)
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running:
        with Touch(path, range(0, path.stat().st_size, PAGE)) as touch:
            pid = str(touch.ready["pid"])
            running.found(int(pid))
            drop_cache(path)  # the daemon has read its header
            done = touch.go()
            found = {key: v for key, v in running.scrape().items() if ("pid", pid) in key[1]}
        assert done["majflt"] == -(-path.stat().st_size // PAGE)
    read = {dict(ls)["tensor"]: v for (name, ls), v in found.items() if name == "llmtraced_tensor_read_bytes_total"}
    outside = path.stat().st_size - sum(t.size for t in model.tensors)
    assert outside <= read.pop("") < outside + PAGE  # to the end of the last page
    assert read == {t.name: t.size for t in model.tensors}
    faults = [v for (name, _), v in found.items() if name == "llmtraced_tensor_faults_total"]
    assert (len(faults), sum(faults)) == (2 * (n + 1), done["majflt"])
    assert len(found) == 6 * (n + 1) + 6 + 28  # as docs/metrics.md says


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running:
        command = [sys.executable, "-m", "llmtraced", "daemon", "--trace", "", "--listen", f"127.0.0.1:{running.port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "cannot listen on" in done.stderr
        assert "Traceback" not in done.stderr
