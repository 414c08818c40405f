"""The daemon as an operator runs it: beside servers that come and go, scraped, stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import polars as pl
import psutil
import pytest
from helpers import wait_until
from running import Daemon

from llmtraced.analysis.reread import reread
from llmtraced.analysis.trace import open_trace
from llmtraced.bench.engine import Server, ensure_gemma, ensure_llama_server
from llmtraced.bench.pressure import MemoryCgroup, drop_cache

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


def test_a_scrape_of_2000_tensors(tmp_path: Path) -> None:
    """It takes less than a tenth of a second, the way over HTTP included; the figure in benchmarks.md is this one."""
    path, n = tmp_path / "many.gguf", 2000
    writer = gguf.GGUFWriter(path, "llama")
    for i in range(n):
        writer.add_tensor(f"blk.{i // 9}.ffn_{i % 9}.weight", np.zeros(1500, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code = "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
    code += "print(sum(m[::4096]), flush=True); time.sleep(600)"
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running:
        reader = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        try:
            pid = str(reader.pid)
            wait_until(lambda: running.total("llmtraced_model_bytes", pid=pid) > n * 6000, 20, "the reader is found")
            seconds, made = [], []
            for _ in range(20):
                time.sleep(0.15)  # a text that is younger than 0.1 s would be sent again
                begin = time.perf_counter()
                text = running.text()
                seconds.append(time.perf_counter() - begin)
                made += [float(found) for found in re.findall(r"^llmtraced_scrape_duration_seconds (\S+)$", text, re.M)]
        finally:
            reader.kill()
            reader.communicate()
    assert text.count(f'llmtraced_tensor_faults_total{{pid="{pid}"') == 2 * (n + 1)
    print(f"{n} tensors, {len(text)} bytes: {median(seconds) * 1e3:.1f} ms, {max(seconds) * 1e3:.1f} at most;")
    print(f"series made in {median(made) * 1e3:.1f} ms")
    assert median(seconds) < 0.1


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as running:
        command = [sys.executable, "-m", "llmtraced", "daemon", "--trace", "", "--listen", f"127.0.0.1:{running.port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "cannot listen on" in done.stderr
        assert "Traceback" not in done.stderr
