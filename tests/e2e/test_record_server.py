"""A real llama-server with a real model: what is recorded is checked against what is known from elsewhere."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from running import Router, accounts, sums

from llmtraced.analysis.reread import reread
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, SyncEngine, ensure_gemma, ensure_llama_server
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.capture import Capture
from llmtraced.gguf_map import read_model
from llmtraced.schema import PAGE, Detail, Phase
from llmtraced.session import Session

pytestmark = pytest.mark.e2e

DECODED = 13  # prime


@pytest.fixture(scope="module")
def gemma() -> Path:
    return ensure_gemma()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 experts, 4 used, each slice of several pages; routing depends on the token."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    return models.write(path, models.moe_preset(120_000_000))


def table(trace: Path, name: str) -> pl.DataFrame:
    files = sorted((trace / name).glob("*.parquet"))
    return pl.concat([pl.read_parquet(f) for f in files])


def page_out(pid: int, stretches: list[tuple[int, int]]) -> None:
    """Have the process fault on everything again: process_madvise(MADV_PAGEOUT)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    for start, end in stretches:
        vector = (ctypes.c_uint64 * 2)(start, end - start)
        assert libc.syscall(440, pidfd, vector, 1, 21, 0) > 0, os.strerror(ctypes.get_errno())
    os.close(pidfd)


def step_for(capture: Capture, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        capture.step()


def learn(capture: Capture, server: Server) -> None:
    """Let the capture see graphs until it knows their layout."""
    deadline = time.monotonic() + 60
    assert capture.session is not None
    while capture.session.layout is None:
        assert time.monotonic() < deadline, capture.session.problems
        server.completion([5, 6, 7], 4)
        capture.step()


@pytest.mark.parametrize("repack", [True, False], ids=["repack", "no-repack"])
def test_the_sequence_of_weights_is_the_graphs(gemma: Path, tmp_path: Path, repack: bool) -> None:
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.OPS, flush_seconds=60)
    with Server(gemma, threads=1, ctx=512, extra=() if repack else ("--no-repack",)) as server:
        session = capture.attach(server.pid)
        learn(capture, server)
        step_for(capture, 0.3)
        server.completion([10, 11, 12], DECODED)
        step_for(capture, 0.3)
        assert session.graph is not None
        assert session.layout is not None
        expected = session.graph.sequence([session.layout.op_mul_mat, session.layout.op_mul_mat_id])
        known = {t.name for t in read_model(gemma).tensors}
    capture.close()
    assert len(expected) == 18 * 7 + 1  # 18 layers: q k v output gate up down; and the tied output matrix
    assert set(expected) <= known
    ops, tokens = table(trace, "ops"), table(trace, "tokens")
    newest = tokens.filter(pl.col("phase") == "decode").sort("token").tail(DECODED - 1)
    assert newest.height == DECODED - 1
    assert newest["n_tokens"].to_list() == [1] * (DECODED - 1)
    for token in newest["token"]:
        mine = ops.filter((pl.col("token") == token) & pl.col("tensor_name").is_not_null()).sort("timestamp")
        assert mine["tensor_name"].to_list() == expected
        assert mine["duration_ns"].min() > 0
    sizes = {t.name: t.size for t in read_model(gemma).tensors}
    assert "mul_mat" in set(ops["op"])
    assert not [name for name in set(ops["op"]) if name.startswith("op_")]
    assert all(sizes[n] == b for n, b in ops.select("tensor_name", "bytes_accessed").unique().iter_rows() if n)
    assert bool(session.unbacked) == repack
    backed = table(trace, "tensors")
    assert (backed["backed"] == False).sum() == len(session.unbacked)  # noqa: E712


def test_no_token_is_missed_from_the_first_on(gemma: Path, tmp_path: Path) -> None:
    """The layout is learned while tokens pass; all are counted, and once it is known each has all its operators."""
    n = 61
    capture = Capture(tmp_path / "trace", Detail.OPS, flush_seconds=60)
    with Server(gemma, threads=1, ctx=512) as server:  # with repacked weights
        capture.attach(server.pid)
        step_for(capture, 0.3)
        client = threading.Thread(target=server.completion, args=([10, 11, 12], n))
        client.start()
        while client.is_alive():
            capture.step()
        client.join()
        step_for(capture, 0.5)
    capture.close()
    tokens = table(tmp_path / "trace", "tokens").filter(pl.col("token") > 0)
    assert tokens.height == n
    assert tokens["end_ns"].null_count() == 0
    ops = table(tmp_path / "trace", "ops").filter(pl.col("tensor_name").is_not_null() & (pl.col("op") == "mul_mat"))
    per_token = dict(ops.group_by("token").len().iter_rows())
    complete = [token for token, count in per_token.items() if count == 18 * 7 + 1]
    assert min(complete) <= 20  # some tokens pass until the graph has been read
    assert sorted(complete)[-(n - 20) :] == list(range(21, n + 1))


def test_all_that_is_read_from_the_first_byte_on(gemma: Path, tmp_path: Path) -> None:
    """``record -- CMD`` sees the whole load, and under pressure its sums are the kernel's own."""
    trace = tmp_path / "trace"
    drop_cache(gemma)
    size = gemma.stat().st_size
    capture = Capture(trace, Detail.FAULTS, flush_seconds=2)
    with MemoryCgroup(f"llmtraced-e2e-{os.getpid()}", int(size * 0.8)) as cgroup:
        server = Server(gemma, binary=ensure_llama_server(), threads=1, ctx=512, extra=("--no-repack",), cgroup=cgroup)
        command = server.command(port := free_port())
        child = capture.start(cgroup.enter_command(command), env=server.environment)
        try:
            deadline = time.monotonic() + 60
            while not healthy(port):
                assert time.monotonic() < deadline
                assert child.poll() is None
                capture.step()
            complete(port, 8)
            step_for(capture, 0.5)
            io = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
            stat = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            step_for(capture, 0.2)
        finally:
            child.terminate()
            child.wait()
        capture.close()
    adds = table(trace, "pagecache").filter(pl.col("action") == "add")
    load = adds.filter(pl.col("phase") == "load")
    header = read_model(gemma).shards[0].data_offset  # what we have looked at ourselves is in the cache before
    unique = reread(open_trace(trace))["unique_bytes"]
    assert size - header - 2**20 <= unique <= -(-size // PAGE) * PAGE
    assert load["bytes"].sum() >= size - header - 2**20  # MAP_POPULATE reads all of it
    own = int(adds.filter(pl.col("pid") == child.pid)["bytes"].sum())
    # read_bytes has, besides, what was read of libraries and of /proc; page-cache adds has what was started to be read.
    assert own <= int(io["read_bytes"]) + 16 * 2**20
    assert own >= int(io["read_bytes"]) - 80 * 2**20
    faults = table(trace, "faults")
    assert faults.filter(pl.col("major")).height <= int(stat[9])
    assert set(faults["phase"].to_list()) <= {"load", "prompt", "decode"}
    tokens = table(trace, "tokens")
    assert tokens.filter(pl.col("phase") == "decode").height == 8 - 1
    assert tokens.filter(pl.col("token") > 0)["stall_ns"].null_count() == 0


def test_all_that_a_command_starts_is_recorded(tmp_path: Path) -> None:
    """A router starts a server for each model that is asked for; each is a session, and one may end before the rest."""
    trace, names = tmp_path / "trace", {"one": 7, "two": 11}
    for name in names:
        models.write(tmp_path / "models" / f"{name}.gguf", models.dense_preset(20_000_000))
    router = Router(
        tmp_path / "models/one.gguf", binary=ensure_llama_server(), threads=1, ctx=256, extra=("--no-repack",)
    )
    capture = Capture(trace, Detail.OPS, flush_seconds=60)
    child = capture.start(router.command(port := free_port()), env=router.environment)

    def ask(name: str, n: int) -> None:
        client = threading.Thread(target=complete, args=(port, n, name))
        client.start()
        while client.is_alive():
            capture.step()
        step_for(capture, 0.3)

    def session(name: str) -> Session | None:
        return next((one for one in capture.sessions if f"{name}.gguf" in one.models), None)

    try:
        while not healthy(port):
            assert child.poll() is None
            capture.step()
        assert not capture.sessions, "the router uses no model itself"
        for name in names:
            for _ in range(20):
                ask(name, 1)
                if (one := session(name)) is not None and one.layout is not None:
                    break
        (first, second) = (session(name) for name in names)
        assert first
        assert second
        assert {psutil.Process(one.target.pid).ppid() for one in (first, second)} == {child.pid}
        before = {one: int(capture.tracer.slots["token"][one.slot]) for one in (first, second)}
        for name, n in names.items():
            ask(name, n)
        os.kill(first.target.pid, signal.SIGKILL)
        while first.target.alive:
            capture.step()
        assert capture.alive
        ask("two", 5)
    finally:
        child.terminate()
        child.wait()
    totals = capture.close()
    assert totals["sessions"] == [first.writer.session, second.writer.session]
    for one, n in ((first, 7), (second, 11 + 5)):
        files = sorted((trace / "tokens").glob(f"*-{one.target.pid}-*.parquet"))
        tokens = pl.concat([pl.read_parquet(f) for f in files]).filter(pl.col("token") > before[one])
        assert tokens["n_tokens"].to_list() == [3, *[1] * 6] if n == 7 else [3, *[1] * 10, 3, *[1] * 4]
    operators = [cell for one in (first, second) for cell in accounts(trace, "ops", one.target.pid)]
    assert totals["account"]["ops"] == sums(operators)
    assert totals["rows"]["ops"] == totals["account"]["ops"]["delivered"] >= (7 + 11 + 5) * 29
    assert totals["problems"] == []
    assert open_trace(trace)


def healthy(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def complete(port: int, n: int, model: str = "") -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": [10, 11, 12], "n_predict": n, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    body |= {"model": model} if model else {}
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().read()


def free_port() -> int:
    from llmtraced.bench import engine

    return engine.free_port()


def test_the_experts_chosen_are_the_experts_touched(moe: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    layers = max(t.layer for t in read_model(moe).tensors) + 1
    capture = Capture(trace, Detail.OPS, flush_seconds=60)
    with Server(moe, threads=1, ctx=512, extra=("--no-repack", "--no-warmup")) as server:
        session = capture.attach(server.pid)
        learn(capture, server)
        step_for(capture, 0.3)
        page_out(server.pid, [(start, end) for start, end, _, _ in session.tracer.ranges(session.slot)])
        server.completion(list(range(20, 43)), DECODED, temperature=5.0, seed=3)
        step_for(capture, 0.3)
    capture.close()
    routing, faults, tokens = table(trace, "routing"), table(trace, "faults"), table(trace, "tokens")
    assert routing["experts"].list.len().to_list() == [4] * routing.height
    assert routing["experts"].list.n_unique().to_list() == [4] * routing.height
    per_token = routing.group_by("token").agg(pl.len(), pl.col("position").n_unique())
    sizes = {token: counts for token, *counts in tokens.select("token", "n_tokens", "n_outputs").iter_rows()}
    for token, rows, positions in per_token.iter_rows():
        n_tokens, n_outputs = sizes[token]
        assert rows == (layers - 1) * n_tokens + n_outputs  # the last layer computes only what is asked for
        assert positions == n_tokens
    chosen = {
        key: set(ids)
        for *key_parts, ids in routing.explode("experts")
        .group_by("token", "layer")
        .agg(pl.col("experts").unique())
        .iter_rows()
        for key in [tuple(key_parts)]
    }
    layer_of = {t.name: t.layer for t in read_model(moe).tensors}
    touched = faults.filter((pl.col("expert") >= 0) & pl.col("token").is_in(per_token["token"].implode()))
    assert touched.height > 50
    for token, name, expert in touched.select("token", "tensor_name", "expert").unique().iter_rows():
        assert expert in chosen[token, layer_of[name]]
    assert len({frozenset(v) for v in chosen.values()}) > layers  # the routing is not one and the same


def test_a_second_engine_is_traced_as_well(gemma: Path, tmp_path: Path) -> None:
    """Another ggml build, prebuilt, in a Python process."""
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.OPS, flush_seconds=60)
    with SyncEngine(gemma, threads=1, ctx=256, repack=False) as engine:
        session = capture.attach(engine.pid)
        for _ in range(8):
            engine.generate([5, 6, 7], 3)
            step_for(capture, 0.1)
            if session.layout is not None:
                break
        assert session.layout is not None, session.problems
        step_for(capture, 0.2)
        before = int(capture.tracer.slots["token"][session.slot])
        engine.generate([10, 11, 12], DECODED)
        step_for(capture, 0.3)
        assert int(capture.tracer.slots["token"][session.slot]) - before == DECODED
        assert session.graph is not None
        expected = session.graph.sequence([session.layout.op_mul_mat])
    capture.close()
    ops, tokens = table(trace, "ops"), table(trace, "tokens")
    newest = tokens.sort("token").tail(3)["token"].to_list()
    for token in newest:
        mine = ops.filter((pl.col("token") == token) & pl.col("tensor_name").is_not_null()).sort("timestamp")
        assert mine["tensor_name"].to_list() == expected


def test_the_server_outlives_a_tracer_that_is_killed(gemma: Path, tmp_path: Path) -> None:
    with Server(gemma, threads=1, ctx=512) as server:
        before = server.completion([10, 11, 12], 8)["content"]
        command = [sys.executable, "-m", "llmtraced", "record", "--pid", str(server.pid), "--detail", "full"]
        with subprocess.Popen([*command, "--flush", "500ms", "-o", str(tmp_path / "trace")]) as recorder:
            try:
                deadline = time.monotonic() + 60
                while not list((tmp_path / "trace" / "ops").glob("*.parquet")):
                    assert time.monotonic() < deadline, [*(tmp_path / "trace").glob("**/*.parquet")]
                    server.completion([10, 11, 12], 8)
            finally:
                recorder.send_signal(signal.SIGKILL)
        assert server.completion([10, 11, 12], 8)["content"] == before
        report = reread(open_trace(tmp_path / "trace"))  # what was written is readable
        assert all(c["counted"] == c["delivered"] + c["dropped"] for c in report["account"].values())
        # A new recording beside the old files loses nothing of either.
        files = sorted((tmp_path / "trace").glob("**/*.parquet"))
        done = subprocess.run(
            [*command, "--duration", "2s", "--force", "-o", str(tmp_path / "trace")],
            capture_output=True,
            check=True,
            text=True,
        )
        assert set(files) - {f for f in files if f.name.startswith(".tmp-")} <= set(
            (tmp_path / "trace").glob("**/*.parquet")
        ), done


def test_phase_of_what_comes_before_the_first_graph() -> None:
    assert [p.name.lower() for p in Phase] == ["load", "prompt", "decode", "unknown"]


@pytest.fixture(scope="module", autouse=True)
def _server_is_there() -> None:
    ensure_llama_server()
