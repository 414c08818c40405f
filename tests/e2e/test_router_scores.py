"""Which experts are chosen, from two independent sources: what the server looked up, and its routers' logits.

The ids of the table ``routing`` are llama-server's own ``ffn_moe_topk`` tensors. The logits are worked out here, in
numpy, from the routers in the file and the activations that a probe copied when the server began to multiply them.
"""

from __future__ import annotations

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from choices import compare, only_the_chosen_are_touched
from helpers import wait_until

from llmtraced.analysis.simulate_experts import simulate_experts
from llmtraced.analysis.trace import Trace, collect, open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server
from llmtraced.bench.shapes import ARCHS
from llmtraced.capture import Capture
from llmtraced.schema import Detail

pytestmark = pytest.mark.e2e

SIZE = 60_000_000
PROMPT = [5 + 7 * n for n in range(16)]
LATER = (
    "router, its own input",
    "attention's input",
    "router, 1 layer before",
    "router, 2 layers before",
    "last tokens",
)


def record(folder: Path, model: Path, server_binary: Path, n: int, *, page_out: bool = False, slots: int = 1) -> Trace:
    """Record ``n`` tokens of decoding in each of some slots at once, after the layout is known."""
    capture = Capture(folder, Detail.OPS, flush_seconds=1, router_scores=True)
    try:
        extra = ("--no-repack", "--parallel", str(slots))
        with Server(model, binary=server_binary, threads=1, ctx=2048, extra=extra) as server:
            session = capture.attach(server.pid)

            def ready() -> bool:
                server.completion(PROMPT[:3], 4)
                for _ in range(3):
                    capture.step()
                return session.layout is not None and session.writer.rows["router_scores"] > 0

            wait_until(ready, 60, f"router scores to come; {session.problems}")
            if page_out:
                for start, end, _, _ in session.tracer.ranges(session.slot):
                    drop(server.pid, start, end)
            with ThreadPoolExecutor(slots) as pool:
                asked = [
                    pool.submit(server.completion, [p + slot for p in PROMPT], n, temperature=1.0, seed=7 + slot)
                    for slot in range(slots)
                ]
                while not all(one.done() for one in asked):
                    capture.step()
            for one in asked:
                one.result()
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                capture.step()
    finally:
        capture.close()
    return open_trace(folder)


def drop(pid: int, start: int, end: int) -> None:
    """Have the process fault again on what it has mapped there: process_madvise(MADV_PAGEOUT)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    vector = (ctypes.c_uint64 * 2)(start, end - start)
    assert libc.syscall(440, pidfd, vector, 1, 21, 0) > 0, os.strerror(ctypes.get_errno())
    os.close(pidfd)


def test_a_thousand_tokens_choose_what_their_routers_say(tmp_path: Path, llama_server: Path) -> None:
    n = 1009  # a prime number
    shape = models.moe_preset(2 * SIZE)
    trace = record(tmp_path / "trace", models.write(tmp_path / "m.gguf", shape), llama_server, n)
    compared, ties, tokens = compare(trace)
    assert all(cell["dropped"] == 0 for cell in trace.account.values()), trace.account
    assert tokens >= 1000
    assert compared >= 1000 * shape.n_layers
    assert ties <= compared // 1000
    first = int(collect(trace.table("router_scores").select(pl.col("token").min())).item())  # begins in its middle
    routed = collect(trace.table("routing", "decode").filter(pl.col("token") > first))
    assert compared >= routed.height, "every choice since the routers were seen was compared"
    predictors = {
        (one["predictor"], one["width"]): one for one in simulate_experts(trace, disk_bandwidth=1e9)["predictors"]
    }
    right = {name: one["right_share"] for (name, width), one in predictors.items() if width == 1}
    assert right["router, its own input"] > 0.999
    assert right["attention's input"] > 0.9
    assert 0.95 > right["router, 1 layer before"] > right["router, 2 layers before"] > 0.5
    assert right["router, 2 layers before"] > right["last tokens"] > right["most frequent"] > 4 / 64
    leads = [predictors[name, 1]["lead_ns"] for name in LATER]
    assert leads == sorted(leads), "what is more certain comes later"
    print(f"{compared} choices of {shape.n_used} experts, {tokens} tokens: {ties} ties, no other difference")


ALL = (1, 1)
SHAPES = (
    ("llama", 8, 2, ALL),  # Mixtral's
    ("llama", 32, 14, ALL),  # more than a record of the probe holds
    ("qwen2moe", 16, 4, ALL),
    ("deepseek", 16, 3, ALL),
    ("gpt-oss", 32, 4, ALL),
    ("hy_v3", 16, 2, ALL),
    ("hy_v3", 32, 4, (8, 4)),  # DeepSeek-V3's groups
)


def test_all_architectures_are_tried() -> None:
    assert {arch for arch, *_ in SHAPES} == set(ARCHS)


@pytest.mark.parametrize(("arch", "n_experts", "n_used", "groups"), SHAPES)
def test_each_shape_has_the_right_ids_and_the_right_slices(
    tmp_path: Path, llama_server: Path, arch: str, n_experts: int, n_used: int, groups: tuple[int, int]
) -> None:
    """Ids are the routers', and no slice of others is touched; merged or fused matrices, biases, layers without."""
    shape = models.moe_preset(SIZE, n_experts=n_experts, n_used=n_used, arch=arch, groups=groups)
    path = models.write(tmp_path / "m.gguf", shape)
    trace = record(tmp_path / "trace", path, llama_server, 61, page_out=True)
    compared, ties, _ = compare(trace)
    assert compared >= 50 * (shape.n_layers - ARCHS[arch].n_dense)
    assert ties <= compared // 100
    routing = collect(trace.table("routing"))
    assert set(routing["layer"]) == set(range(ARCHS[arch].n_dense, shape.n_layers))
    assert set(routing["experts"].list.len()) == set(routing["experts"].list.n_unique()) == {n_used}
    only_the_chosen_are_touched(trace, path)


def test_several_slots_choose_each_for_itself(tmp_path: Path, llama_server: Path) -> None:
    n, slots = 61, 3
    shape = models.moe_preset(SIZE, n_experts=16, n_used=2)
    path = models.write(tmp_path / "m.gguf", shape)
    folder = tmp_path / "trace"
    trace = record(folder, path, llama_server, n, page_out=True, slots=slots)
    tokens = collect(trace.table("tokens", "decode").select("token", "n_tokens"))
    together = tokens.filter(pl.col("n_tokens") == slots)["token"]
    assert len(together) > n // 2
    rows = collect(trace.table("routing").filter(pl.col("token").is_in(together.to_list())))
    each = rows.group_by("token", "layer").agg(pl.col("position").sort(), pl.col("experts"))
    assert each.height == len(together) * shape.n_layers
    assert set(map(tuple, each["position"].to_list())) == {tuple(range(slots))}
    unlike = each.filter(pl.col("experts").list.n_unique() > 1).height
    assert unlike > each.height // 2, "they are different texts"
    only_the_chosen_are_touched(trace, path)
