"""Start real engines, alone or in a memory cgroup, and ask them for tokens.

:class:`Server` is an unmodified ``llama-server``; :class:`SyncEngine` a second, different build of llama.cpp
(``libllama.so`` of a package, in a Python process), for what must not depend on one build. :mod:`llmtraced.bench.fetch`
gets both; its functions are at hand here too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from llmtraced.bench.fetch import (
    ensure_gemma,
    ensure_llama_server,
    ensure_sync_package,
    find_llama_server,
    log_tail,
)
from llmtraced.bench.pressure import MemoryCgroup
from llmtraced.errors import LlmtracedError, printable

__all__ = [
    "Server",
    "SyncEngine",
    "ensure_gemma",
    "ensure_llama_server",
    "find_llama_server",
    "free_port",
]

_ENVIRONMENT: Final = {
    # What would use memory beside the model, or split the context; a build that does not know a name ignores it.
    "LLAMA_ARG_N_PARALLEL": "1",
    "LLAMA_ARG_CACHE_RAM": "0",
    "LLAMA_ARG_CTX_CHECKPOINTS": "0",
}


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(child: subprocess.Popen[Any], deadline_s: float = 10.0) -> None:
    """End a child with SIGTERM, after the deadline with SIGKILL."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def _temporary_log(prefix: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=".log")
    os.close(handle)
    return Path(name)


class Server:
    """A llama-server on 127.0.0.1, ready on entry, stopped on exit.

    Args:
        model: the GGUF file (the first part of a split one).
        binary: the program; found or built by :func:`ensure_llama_server` if None.
        threads: compute threads.
        ctx: context size in tokens.
        extra: further options, such as ``--no-repack``.
        cgroup: start inside it, so that the model's pages are charged to it.
        log: the server's log, a temporary file if None.
        deadline_s: how long loading may take.
        env: further environment variables.

    Attributes:
        pid: the server's process id.
        port: its TCP port.
        log: the path of its log.
        started_s: seconds from start to ready.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        binary: Path | str | None = None,
        threads: int = 2,
        ctx: int = 2048,
        extra: Sequence[str] = (),
        cgroup: MemoryCgroup | None = None,
        log: Path | str | None = None,
        deadline_s: float = 300.0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.model = Path(model)
        self.binary = Path(binary) if binary else None
        self.threads, self.ctx, self.extra, self.cgroup = threads, ctx, list(extra), cgroup
        self.deadline_s = deadline_s
        self.env = dict(env or {})
        self.port = 0
        self.started_s = 0.0
        self._own_log = log is None
        self.log = Path(log) if log else _temporary_log("llama-server-")
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._child is None:
            raise LlmtracedError("the server has not been started")
        return self._child.pid

    @property
    def environment(self) -> dict[str, str]:
        """What the server runs with."""
        return {**os.environ, **_ENVIRONMENT, **self.env}

    def command(self, port: int) -> list[str]:
        """Return the command line for ``port``, without the cgroup's wrapper."""
        argv = [str(self.binary or "llama-server"), "-m", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        return [*argv, "-t", str(self.threads), "-c", str(self.ctx), *self.extra]

    def __enter__(self) -> Self:
        if not self.model.is_file():
            raise LlmtracedError(f"there is no model {printable(str(self.model))}")
        self.binary = self.binary or ensure_llama_server()
        try:
            for _ in range(3):
                if self._start():
                    return self
            raise LlmtracedError(
                f"llama-server found its port taken three times; the end of its log:\n{log_tail(self.log)}"
            )
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if kind is None and self._own_log:
            self.log.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the server; it may have died already."""
        if self._child is not None:
            stop(self._child)

    def _start(self) -> bool:
        """Start it and wait until it is ready; return False if only its port was taken."""
        self.port = free_port()
        argv = self.command(self.port)
        begin = time.monotonic()
        with self.log.open("wb") as out:
            self._child = subprocess.Popen(
                self.cgroup.enter_command(argv) if self.cgroup else argv,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        while time.monotonic() - begin < self.deadline_s:
            if self._child.poll() is not None:
                tail = log_tail(self.log)
                if "couldn't bind" in tail:
                    return False
                raise LlmtracedError(
                    f"llama-server ended with status {self._child.returncode} while loading "
                    f"{printable(str(self.model))}; the end of its log:\n{tail}"
                )
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._request("GET", "/health", None, 5.0)[0] == 200:
                    self.started_s = time.monotonic() - begin
                    return True
            time.sleep(0.05)
        raise LlmtracedError(
            f"llama-server was not ready after {self.deadline_s:.0f} s; the end of its log:\n{log_tail(self.log)}"
        )

    def _request(self, method: str, path: str, body: object, timeout_s: float) -> tuple[int, bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            text = None if body is None else json.dumps(body)
            link.request(method, path, text, {"Content-Type": "application/json"})
            answer = link.getresponse()
            return answer.status, answer.read()
        finally:
            link.close()

    def _body(self, prompt: str | Sequence[int], n_predict: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        given = prompt if isinstance(prompt, str) else list(prompt)
        defaults = {"temperature": 0, "seed": 1, "ignore_eos": True, "cache_prompt": False}
        return {"prompt": given, "n_predict": n_predict, **defaults, **settings}

    def completion(
        self, prompt: str | Sequence[int], n_predict: int = 16, *, timeout_s: float = 600.0, **settings: Any
    ) -> dict[str, Any]:
        """Return llama-server's answer to /completion, among it ``content`` and ``timings`` (ms).

        Settings go into the request as they are; by default temperature 0, seed 1, ignore_eos, no cached prompt.
        """
        try:
            status, raw = self._request("POST", "/completion", self._body(prompt, n_predict, settings), timeout_s)
            answer = json.loads(raw)
        except (OSError, http.client.HTTPException, ValueError) as failure:
            raise self._lost(failure) from failure
        if status != 200:
            raise LlmtracedError(f"llama-server refused the completion ({status}): {printable(str(answer))}")
        return dict(answer)

    def tokens_per_second(self, prompt: str | Sequence[int], n_predict: int = 16, **settings: Any) -> float:
        """Return the decode speed of one completion, by llama-server's own clock."""
        return float(self.completion(prompt, n_predict, **settings)["timings"]["predicted_per_second"])

    def token_times(
        self, prompt: str | Sequence[int], n_predict: int = 16, *, timeout_s: float = 600.0, **settings: Any
    ) -> list[int]:
        """Return when each token of a streamed completion arrived (CLOCK_MONOTONIC, ns); differences are per token.

        A server holds back pieces that are not whole UTF-8, so a random model may stream fewer pieces than tokens;
        their last arrivals are still in order.
        """
        body = {**self._body(prompt, n_predict, settings), "stream": True, "return_tokens": True}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        times: list[int] = []
        try:
            link.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = link.getresponse()
            if answer.status != 200:
                raise LlmtracedError(f"llama-server refused the completion ({answer.status})")
            for line in answer:
                now = time.monotonic_ns()
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    if piece.get("stop"):
                        break
                    times += [now] * max(1, len(piece.get("tokens") or ()))
        except (OSError, http.client.HTTPException, ValueError) as failure:
            raise self._lost(failure) from failure
        finally:
            link.close()
        return times

    def _lost(self, failure: Exception) -> LlmtracedError:
        status = self._child.poll() if self._child else None
        what = f"llama-server ended with status {status}" if status is not None else f"llama-server: {failure}"
        return LlmtracedError(f"{what}; the end of its log:\n{log_tail(self.log)}")


class SyncEngine:
    """A second build of llama.cpp, in a Python child: ready on entry, stopped on exit.

    Args:
        model: the GGUF file.
        threads: compute threads.
        ctx: context size in tokens.
        repack: let it repack weights into anonymous memory.
        cgroup: start inside it.
        package: the folder with another ``llama-cpp-py-sync`` than the one of :func:`fetch.ensure_sync_package`, which
            is installed in any case: what the package needs is beside it.
        bindings: the name by which the package is imported, one of :data:`sync_driver.BINDINGS`.
        log: the child's stderr, a temporary file if None.
        deadline_s: how long loading, or one :meth:`generate`, may take.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        threads: int = 2,
        ctx: int = 2048,
        repack: bool = True,
        cgroup: MemoryCgroup | None = None,
        package: Path | str | None = None,
        bindings: str = "llama_cpp_py_sync",
        log: Path | str | None = None,
        deadline_s: float = 300.0,
    ) -> None:
        self.package = Path(package) if package else None
        driver = Path(__file__).with_name("sync_driver.py")
        self.argv = [sys.executable, "-P", str(driver), str(model), "--threads", str(threads), "--ctx", str(ctx)]
        self.argv += ["--bindings", bindings, *([] if repack else ["--no-repack"])]
        self.cgroup = cgroup
        self.deadline_s = deadline_s
        self._own_log = log is None
        self.log = Path(log) if log else _temporary_log("sync-engine-")
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The engine's process id."""
        if self._child is None:
            raise LlmtracedError("the engine has not been started")
        return self._child.pid

    def __enter__(self) -> Self:
        packages = [self.package, ensure_sync_package()]
        argv = self.cgroup.enter_command(self.argv) if self.cgroup else self.argv
        with self.log.open("w") as err:
            self._child = subprocess.Popen(
                argv,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in packages if p)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )
        try:
            self._hear()
        except BaseException:
            stop(self._child)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._child is not None:
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            stop(self._child)
        if kind is None and self._own_log:
            self.log.unlink(missing_ok=True)

    def generate(
        self, prompt: Sequence[int], n_predict: int = 16, *, temperature: float = 0.0, seed: int = 1
    ) -> dict[str, Any]:
        """Evaluate ``prompt`` and generate: ``tokens`` (ids), ``start_ns`` and ``times_ns`` (end of each evaluation).

        Exactly ``n_predict`` graphs are evaluated: the prompt's and one for each token but the last.
        """
        assert self._child is not None
        assert self._child.stdin is not None
        request = {"prompt": list(prompt), "n_predict": n_predict, "temperature": temperature, "seed": seed}
        with contextlib.suppress(BrokenPipeError):  # _hear tells why
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], self.deadline_s)[0]:
            raise LlmtracedError(f"the second engine did not answer in {self.deadline_s:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            raise LlmtracedError(
                f"the second engine ended with status {self._child.returncode}; the end of its log:\n"
                f"{log_tail(self.log)}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
