"""Reports on what a real llama-server did without enough memory, against SQL over the same files.

How each figure is computed a second time is in ``tests/sql``; a report that is not named there fails here.
"""

from __future__ import annotations

import http.client
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sql import CHECKS, UNCHECKED, check

from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, ensure_gemma, ensure_llama_server, free_port
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.capture import Capture
from llmtraced.reporters.questions import QUESTIONS
from llmtraced.schema import Detail

pytestmark = pytest.mark.e2e

TOKENS = 17
OWN_BYTES = 60_000_000
"""What a server of so small a model needs besides its pages."""


@pytest.fixture(scope="module", params=["dense", "moe"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loading and two requests with memory for 60 % of the model: the real Gemma, or 64 experts, 4 of them used."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dense":
        model = ensure_gemma()
    else:
        model = models.write(folder / "moe.gguf", models.moe_preset(160_000_000))
    server = Server(model, binary=ensure_llama_server(), ctx=512, extra=("--no-repack",))
    server.port = free_port()
    drop_cache(model)
    capture = Capture(folder / "trace", Detail.OPS, flush_seconds=1)
    limit = OWN_BYTES + int(model.stat().st_size * 0.6)
    with MemoryCgroup(f"llmtraced-sql-{os.getpid()}", limit) as cgroup, ThreadPoolExecutor(1) as pool:
        child = capture.start(cgroup.enter_command(server.command(server.port)), env=server.environment)
        try:
            asked = pool.submit(ask, server)
            while not asked.done():
                assert child.poll() is None, server.log
                capture.step()
            asked.result()
        finally:
            child.terminate()
            child.wait()
        capture.close()
    return folder / "trace"


def ask(server: Server) -> None:
    deadline = time.monotonic() + 120
    while not healthy(server.port):
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.1)
    for first in (10, 100):
        server.completion(list(range(first, first + 7)), TOKENS, temperature=3.0, seed=first)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def test_the_trace_is_worth_checking(trace: Path) -> None:
    recorded = open_trace(trace)
    assert min(recorded.rows[name] for name in ("faults", "pagecache", "ops")) > 1000
    decoded = recorded.table("tokens", "decode").select("token").collect().height
    assert decoded == 2 * (TOKENS - 1)  # the first of each answer comes from its prompt's graph
    report = check("reread", trace, "decode")
    assert report["amplification"] > 1.5, "there was no memory pressure"
    assert report["verdict"] == "complete"


@pytest.mark.parametrize("phase", [None, "load", "prompt", "decode"])
@pytest.mark.parametrize("name", CHECKS)
def test_a_report_says_what_sql_says(trace: Path, name: str, phase: str | None) -> None:
    check(name, trace, phase)


def test_every_report_is_checked() -> None:
    assert set(QUESTIONS) == set(CHECKS) | set(UNCHECKED)
