"""Synthesised mixtures in a real server: every architecture runs, and experts are chosen as the knobs say."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from llmtraced.analysis.experts import experts
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server
from llmtraced.bench.shapes import ARCHS
from llmtraced.capture import Capture
from llmtraced.schema import Detail

pytestmark = pytest.mark.e2e

SIZE = 60_000_000
PREDICTED = 307  # prime
PROMPT = [5 + 7 * n for n in range(16)]


def ask(server: Server) -> list[int]:
    return list(server.completion(PROMPT, PREDICTED, temperature=1.0, return_tokens=True)["tokens"])


def stays(tokens: list[int], topics: int) -> float:
    return sum(a % topics == b % topics for a, b in pairwise(tokens)) / (len(tokens) - 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_writes_varied_text(tmp_path: Path, llama_server: Path, arch: str) -> None:
    shape = models.moe_preset(SIZE, n_experts=16, n_used=2, arch=arch)
    path = models.write(tmp_path / "m.gguf", shape)
    with Server(path, binary=llama_server, threads=1, ctx=512) as server:
        tokens = ask(server)
    assert len(tokens) == PREDICTED
    assert len(set(tokens)) > PREDICTED // 3
    assert min(tokens) >= 259, "words only"
    topics = shape.routing.topics
    assert 0.75 < stays(tokens, topics) < 0.99
    assert len({token % topics for token in tokens}) > 5


def step_for(capture: Capture, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        capture.step()


def test_experts_repeat_and_some_are_hot(tmp_path: Path, llama_server: Path) -> None:
    """64 experts, 4 used: 6 % repeat by chance, and in so few tokens the hottest quarter takes 32 % by chance."""
    path = models.write(tmp_path / "m.gguf", models.moe_preset(SIZE))
    capture = Capture(tmp_path / "trace", Detail.OPS, flush_seconds=60)
    with Server(path, binary=llama_server, threads=1, ctx=512) as server:
        session = capture.attach(server.pid)
        deadline = time.monotonic() + 60
        while session.layout is None:
            assert time.monotonic() < deadline, session.problems
            server.completion(PROMPT[:3], 4)
            capture.step()
        step_for(capture, 0.3)  # attaches what needs the layout
        ask(server)
        step_for(capture, 0.3)
    capture.close()
    report = experts(open_trace(tmp_path / "trace"), "decode")
    assert report["evaluations"] > PREDICTED - 20
    assert report["repeat_next"] > 0.2
    assert report["repeat_next"] > 1.5 * report["repeat_next_by_chance"], "more than popularity alone explains"
    for layer in report["layers"]:
        used = sorted((sum(row) for row in layer["matrix"]), reverse=True)
        assert sum(used[: len(used) // 4]) > 0.44 * sum(used)
        assert layer["used"] > 40, "cold ones are chosen, too"
