"""The daemon: finds servers as they come and go, records each, exports metrics.

One loop: wait for the ring, read it, and now and then look for processes. It costs nothing per fault while no model is
mapped anywhere, for then nothing is attached.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.registry import CollectorRegistry

from llmtraced import target as targets
from llmtraced.config import Config
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.exposition import exposition
from llmtraced.metrics import LlmtracedCollector
from llmtraced.prefetch.launch import is_sidecar
from llmtraced.probes.loader import Sizes
from llmtraced.probes.tracer import Tracer
from llmtraced.recorder import Recorder
from llmtraced.schema import Detail, Phase
from llmtraced.serve import Access, MetricsServer, is_loopback
from llmtraced.session import Session, session_metadata, session_name
from llmtraced.store import TraceWriter, clean_leftovers

__all__ = ["Daemon", "notify"]

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.25
_LOADING_SECONDS = 0.05
_REFRESH_SECONDS = 1.0


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); without systemd nothing happens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as systemd:
            systemd.sendto(state.encode(), address)
    except OSError as error:
        log.warning("cannot notify systemd: %s", error)


class Daemon:
    """Traces every server there is.

    Args:
        config: what to do.
        say: told what happens, as a dict with an ``event``: ready, begin, end, stopped.
        pid: trace this process only.
    """

    def __init__(
        self, config: Config, say: Callable[[dict[str, Any]], None] = lambda _: None, pid: int | None = None
    ) -> None:
        self.config = config
        self._say = say
        self._pid = pid
        self.detail = Detail[config.detail.upper()]
        self.tracer = Tracer(Sizes(ring_bytes=config.ring))
        self.recorder = Recorder(self.tracer, config.flush)
        self._sessions: dict[tuple[int, int], Session] = {}
        self._sizes: dict[int, bytes] = {}
        self._started = targets.start_ticks(os.getpid())
        self._refused: set[tuple[int, int]] = set()
        self._scanned = self._refreshed = 0.0
        self._server: MetricsServer | None = None
        if config.trace:
            n = clean_leftovers(Path(config.trace))
            if n:
                log.info("removed %d unfinished files of an earlier run", n)

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until ``stop()``; then everything is flushed.

        Raises:
            LlmtracedError: the address is taken.
        """
        try:
            self._listen()
            self._say({"event": "ready", "port": self.port, "compile_seconds": self.tracer.programs.compile_seconds})
            notify(f"READY=1\nSTATUS=tracing {self.detail.name.lower()}")
            while not stop():
                self.step()
        finally:
            notify("STOPPING=1")
            self.close()
            self._say({"event": "stopped"})

    def _listen(self) -> None:
        if not self.config.address:
            return
        host, port = self.config.address
        access = _access(self.config)
        collector = LlmtracedCollector(self.recorder, self.config.tensors, sidecars=self.config.sidecars)
        registry = CollectorRegistry()
        for own in (ProcessCollector, PlatformCollector, GCCollector):
            own(registry=registry)

        def make() -> bytes:
            return exposition(collector.collect()) + generate_latest(registry)

        try:
            self._server = MetricsServer(host, port, make, access)
        except OSError as error:
            raise LlmtracedError(f"cannot listen on {self.config.listen}: {error.strerror or error}") from error
        scheme = "https" if access.cert else "http"
        log.info("metrics on %s://%s:%d/metrics", scheme, f"[{host}]" if ":" in host else host, self.port)
        if not is_loopback(host) and not (access.user and access.cert):
            open_to = "everyone who can reach it can read them" if not access.user else "the password is sent in clear"
            log.warning("%s is not loopback: %s; see tls_cert, user, password_file", self.config.listen, open_to)

    @property
    def port(self) -> int:
        """The port of ``/metrics`` (the one that was chosen where the configuration says 0)."""
        return self._server.port if self._server else 0

    def step(self) -> None:
        """Wait a little, take what has come, look for processes when it is time."""
        loading = any(not s.clocked and not s.problems for s in self._sessions.values())
        self.tracer.ring.wait(_LOADING_SECONDS if loading else _WAIT_SECONDS)
        if self._sessions:
            self.recorder.poll()
        now = time.monotonic()
        if now - self._scanned >= self.config.scan:
            self._scanned = now
            self._find()
            notify("WATCHDOG=1")
        if now - self._refreshed >= _REFRESH_SECONDS or loading:
            self._refreshed = now
            for key, session in list(self._sessions.items()):
                if session.target.alive:
                    session.refresh()
                else:
                    self._end(key)

    def _find(self) -> None:
        """Look at processes that are new, or whose address space has changed its size since the last look."""
        sizes: dict[int, bytes] = {}
        for name in os.listdir("/proc") if self._pid is None else [str(self._pid)]:
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/statm", "rb") as stream:
                        sizes[int(name)] = stream.read(64).split()[0]
                except (OSError, IndexError):
                    continue
        changed = [pid for pid, size in sizes.items() if self._sizes.get(pid) != size and size != b"0"]
        known = {pid for pid, _ in self._sessions}
        for target in targets.scan(changed, known=known):
            key = (target.pid, target.start)
            if key not in self._refused and not is_sidecar(target.command):
                self._begin(key, target, Phase.LOAD if target.start > self._started else Phase.UNKNOWN)
        self._sizes = sizes

    def _begin(self, key: tuple[int, int], target: targets.Target, phase: Phase) -> None:
        writer = TraceWriter(
            Path(self.config.trace) if self.config.trace else None,
            session_name(target),
            session_metadata(target, self.detail),
            _partition(target),
        )
        try:
            self._sessions[key] = self.recorder.add(target, writer, self.detail, phase)
        except LlmtracedError as error:
            self._refused.add(key)
            log.error("process %d (%s): %s", target.pid, printable(target.comm), error)
            return
        log.info(
            "tracing process %d (%s) with %s", target.pid, printable(target.comm), printable(", ".join(target.models))
        )
        self._say({"event": "begin", "pid": target.pid, "session": writer.session, "models": list(target.models)})
        for problem in target.problems:
            log.warning("process %d: %s", target.pid, problem)

    def _end(self, key: tuple[int, int]) -> None:
        session = self._sessions.pop(key)
        self.recorder.remove(session)
        self._tell_end(session)
        log.info("process %d has ended", key[0])

    def _tell_end(self, session: Session) -> None:
        told = {"event": "end", "pid": session.target.pid, "session": session.writer.session}
        self._say({**told, "account": session.account, "rows": session.writer.rows, "problems": session.problems})

    def close(self) -> None:
        """Stop listening, end all sessions, write everything."""
        if self._server:
            self._server.close()
        self.recorder.close()
        for session in self._sessions.values():
            self._tell_end(session)
        self._sessions.clear()
        self.tracer.close()


def _access(config: Config) -> Access:
    """Return how the metrics are protected.

    Raises:
        LlmtracedError: the file with the hash of the password cannot be read, or holds something else.
    """
    if not config.user:
        return Access(config.tls_cert, config.tls_key)
    where = f"password_file {printable(config.password_file)}"
    try:
        with open(config.password_file, encoding="utf-8") as stream:
            word = stream.read(1000).strip()
        return Access(config.tls_cert, config.tls_key, config.user, word)
    except (OSError, ValueError) as error:
        raise LlmtracedError(f"{where}: {getattr(error, 'strerror', None) or error}", USAGE) from error
    except LlmtracedError as error:
        raise LlmtracedError(f"{where}: {error}", USAGE) from error


def _partition(target: targets.Target) -> str:
    """Return the hive folders of a session: host, its first model, the day it was first seen."""
    model = re.sub(r"[^\w.+-]", "_", next(iter(target.models)))[:100]
    host = re.sub(r"[^\w.+-]", "_", os.uname().nodename)[:64] or "unknown"
    return f"host={host}/model={model}/date={datetime.now(UTC):%Y-%m-%d}"
