"""The whole story on a small real model: a server without enough memory, the daemon beside it, and the answers."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmtraced import kept
from llmtraced.bench.beside import Sidecar
from llmtraced.bench.engine import Server, ensure_gemma, ensure_llama_server, free_port, stop
from llmtraced.bench.pressure import MemoryCgroup, drop_cache, read_ahead_kb
from llmtraced.errors import USAGE, LlmtracedError

__all__ = ["Story", "tell"]

log = logging.getLogger(__name__)

SHARE: Final = 0.7
"""Memory of the server's cgroup beside the server's own, as a share of the model: not enough."""
_PROMPTS: Final = (  # for a model that continues text; it is not tuned to answer
    "The sky is blue because",
    "Once upon a time there was a machine with too little memory. Every day",
)
_READY_SECONDS: Final = 60.0
_FILES: Final = (
    *("trace", "metrics.txt", "daemon.log", "server.log"),
    *("sidecar.prom", "sidecar.json", "sidecar.log"),
)
"""What a demo leaves in its folder."""


@dataclass(frozen=True, slots=True)
class Story:
    """What the demo did.

    Attributes:
        trace, session: the trace's folder, and our server's session in it, among what else ran.
        metrics: a scrape, as a file.
        texts: prompts and what the model made of them.
        model, model_bytes: its file and its size.
        limit_bytes, own_bytes: the memory that the server had, and how much of that it needed beside the model.
        read_ahead_kb: of the model's disk, None where it cannot be read.
        tokens_per_second: decoded.
        sidecar_tokens_per_second: the same, with ``llmtraced prefetch`` beside the server.
    """

    trace: Path
    session: str
    metrics: Path
    texts: list[tuple[str, str]]
    model: Path
    model_bytes: int
    limit_bytes: int
    own_bytes: int
    read_ahead_kb: int | None
    tokens_per_second: float
    sidecar_tokens_per_second: float


@contextmanager
def _daemon(trace: Path, port: int, log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon beside us, as systemd would; leave when it has everything on disk."""
    command = [sys.executable, "-m", "llmtraced", "daemon", "--trace", str(trace), "--listen", f"127.0.0.1:{port}"]
    with log_file.open("wb") as output:
        child = subprocess.Popen([*command, "--flush", "2s", "--scan", "200ms", "--detail", "ops"], stderr=output)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                _get(port, "/metrics")
                break
            except (OSError, http.client.HTTPException):
                if child.poll() is not None or time.monotonic() > deadline:
                    said = log_file.read_text(errors="replace").strip()
                    raise LlmtracedError(f"the daemon did not start: {said}", child.poll() or 1) from None
                time.sleep(0.1)
        yield child
    finally:
        stop(child, _READY_SECONDS)


def _mean(rates: list[float]) -> float:
    """Return the rate of all answers together; they are of the same length."""
    return len(rates) / sum(1 / rate for rate in rates)


def _get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def tell(folder: Path | None = None, *, n_predict: int = 32) -> Story:
    """Do it; progress goes to the log.

    Args:
        folder: for trace, metrics and logs, the cache folder by default; an earlier demo in it is replaced.
        n_predict: tokens to generate for each prompt.

    Raises:
        LlmtracedError: something is missing that could not be had.
    """
    base = folder or kept.folder() / "demo"
    mine = {base / name for name in _FILES}
    if base.exists() and (not base.is_dir() or not set(base.iterdir()) <= mine):
        raise LlmtracedError(
            f"{base} has other things in it than an earlier demo; name an empty or a new folder", USAGE
        )
    base.mkdir(parents=True, exist_ok=True)
    for path in mine:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    log.info("getting llama-server (built from source the first time, some minutes)")
    binary = ensure_llama_server()
    log.info("getting the model")
    model = ensure_gemma()
    size = model.stat().st_size
    trace, metrics = base / "trace", base / "metrics.txt"
    port = free_port()
    read_ahead = read_ahead_kb(model)
    log.info("starting the daemon: tracing into %s, metrics on http://127.0.0.1:%d/metrics", trace, port)
    texts: list[tuple[str, str]] = []
    rates: list[float] = []
    faster: list[float] = []
    with ExitStack() as stack:
        daemon = stack.enter_context(ExitStack())
        daemon.enter_context(_daemon(trace, port, base / "daemon.log"))
        drop_cache(model)
        cgroup = stack.enter_context(MemoryCgroup(f"llmtraced-demo-{os.getpid()}", None))
        log.info("starting llama-server")
        options = ("--no-repack",)  # weights stay where the file is mapped
        server = stack.enter_context(
            Server(model, binary=binary, ctx=512, extra=options, cgroup=cgroup, log=base / "server.log")
        )
        server.completion(_PROMPTS[0], 4)  # it has all the memory of its own that it needs
        own = cgroup.own_bytes()
        limit = own + int(size * SHARE)
        cgroup.set_limit(limit)
        log.info(
            "limiting it to %d MB for a model of %d MB and %d MB of its own", *(n // 10**6 for n in (limit, size, own))
        )
        for prompt in _PROMPTS:
            answer: dict[str, Any] = server.completion(prompt, n_predict)
            texts.append((prompt, str(answer.get("content", "")).strip()))
            rates.append(float(answer["timings"]["predicted_per_second"]))
            log.info("%s … %.2f tokens/s", json.dumps(prompt), rates[-1])
        pid = server.pid
        time.sleep(0.5)
        metrics.write_text(_get(port, "/metrics"))
        daemon.close()
        log.info("the same again, with llmtraced prefetch beside the server")
        sidecar = stack.enter_context(Sidecar(pid, "auto", base))
        deadline = time.monotonic() + _READY_SECONDS
        while not sidecar.ready() and time.monotonic() < deadline:
            server.completion(_PROMPTS[0], 4)
        for prompt, before in texts:
            answer = server.completion(prompt, n_predict)
            faster.append(float(answer["timings"]["predicted_per_second"]))
            same = "the same text" if str(answer.get("content", "")).strip() == before else "ANOTHER TEXT"
            log.info("%s … %.2f tokens/s, %s", json.dumps(prompt), faster[-1], same)
    written = next((trace / "tensors").glob(f"**/*-{pid}-*.parquet"), None)
    if written is None:
        said = (base / "daemon.log").read_text(errors="replace").strip()
        raise LlmtracedError(f"the daemon has not recorded the server: {said}")
    return Story(
        trace,
        written.stem.rpartition("-")[0],
        metrics,
        texts,
        model,
        size,
        limit,
        own,
        read_ahead,
        _mean(rates),
        _mean(faster),
    )
