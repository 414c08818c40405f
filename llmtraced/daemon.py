"""The daemon: finds servers as they come and go, records each, exports metrics.

One loop: wait for the ring, read it, and now and then look for processes. It costs nothing per fault while no model is
mapped anywhere, for then nothing is attached.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.registry import CollectorRegistry

from llmtraced import capabilities
from llmtraced import target as targets
from llmtraced.config import Config
from llmtraced.description import session_metadata, session_name
from llmtraced.dial import Governor
from llmtraced.errors import NO_PERMISSION, USAGE, LlmtracedError, printable
from llmtraced.exposition import exposition
from llmtraced.metrics import LlmtracedCollector
from llmtraced.prefetch.unit import is_sidecar
from llmtraced.probes import kernel
from llmtraced.probes.loader import Sizes
from llmtraced.probes.tracer import Tracer
from llmtraced.recorder import Recorder
from llmtraced.retention import Keeper
from llmtraced.schema import Detail, Phase
from llmtraced.serve import Access, MetricsServer, is_loopback
from llmtraced.service import Watchdog, notify
from llmtraced.session import Session
from llmtraced.store import TraceWriter, clean_leftovers

__all__ = ["KEPT", "Daemon"]

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.25
_LOADING_SECONDS = 0.05
_REFRESH_SECONDS = 1.0
_PRUNE_SECONDS = 60.0

_NO_PERF_EVENTS: Final = (
    "no perf events, so no faults: CAP_PERFMON is not enough on this kernel (Debian's is one) while "
    f"kernel.perf_event_paranoid is above 2: {kernel.PERF_EVENTS}"
)

KEPT: Final = ("CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE")
"""What the next server takes: reading its files and memory, attaching to it; and writing traces, as root, anywhere."""


class Daemon:
    """Traces every server there is.

    Args:
        config: what to do.
        say: told what happens, as a dict with an ``event``: ready, begin, end, stopped.
        pid: trace this process only.
        confine: give up what only loading takes: this process can load no BPF program afterwards.
    """

    def __init__(
        self,
        config: Config,
        say: Callable[[dict[str, Any]], None] = lambda _: None,
        pid: int | None = None,
        *,
        confine: bool = False,
    ) -> None:
        self.config = config
        self._say = say
        self._pid = pid
        self.detail = Detail[config.detail.upper()]
        if "CAP_PERFMON" in capabilities.held() and kernel.perf_events_refused():
            raise LlmtracedError(_NO_PERF_EVENTS, NO_PERMISSION)  # told now, and not of each process
        self.tracer = Tracer(Sizes(ring_bytes=config.ring))
        if confine:
            _confine(needs_admin=self.tracer.programs.needs_admin)
        self.recorder = Recorder(self.tracer, config.flush)
        self._sessions: dict[tuple[int, int], Session] = {}
        self._sizes: dict[int, bytes] = {}
        self._started = targets.start_ticks(os.getpid())
        self._refused: set[tuple[int, int]] = set()
        self._scanned = self._refreshed = 0.0
        self._server: MetricsServer | None = None
        self._governor = Governor(self.detail, config.cpu)
        self._keeper: Keeper | None = None
        self._pruned = -_PRUNE_SECONDS
        if config.trace:
            n = clean_leftovers(Path(config.trace))
            if n:
                log.info("removed %d unfinished files of an earlier run", n)
            self._keeper = Keeper(Path(config.trace), config.keep_age, config.keep_size)

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until ``stop()``; then everything is flushed.

        Raises:
            LlmtracedError: the address is taken.
        """
        try:
            self._listen()
            self._say({"event": "ready", "port": self.port, "compile_seconds": self.tracer.programs.compile_seconds})
            if os.environ.get("NOTIFY_SOCKET") and not notify("READY=1"):
                log.warning("cannot notify systemd at %s", os.environ["NOTIFY_SOCKET"])
            self._tell_status()
            watchdog = Watchdog()
            while not stop():
                self.step()
                watchdog.alive()
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
        loading = any(session.loading for session in self._sessions.values())
        self.tracer.ring.wait(_LOADING_SECONDS if loading else _WAIT_SECONDS)
        if self._sessions:
            self.recorder.poll()
        for session in self.recorder.ended():
            self._tell_end(session)
        now = time.monotonic()
        if now - self._scanned >= self.config.scan:
            self._scanned = now
            self._find()
        if self._keeper and now - self._pruned >= _PRUNE_SECONDS:
            self._pruned = now
            self.recorder.later(partial(self._keeper.prune, {s.writer.session for s in self._sessions.values()}))
        self._turn(now)
        if now - self._refreshed >= _REFRESH_SECONDS or loading:
            self._refreshed = now
            for key, session in list(self._sessions.items()):
                if not session.target.alive:
                    self._end(key)
                    continue
                try:
                    session.refresh()
                except Exception:  # a mistake about one process must not end the others' recording
                    log.exception("process %d: it is not traced any more", key[0])
                    self._refused.add(key)
                    self._end(key)

    def _turn(self, now: float) -> None:
        """Record less where it costs too much, and more again."""
        loads = {key: session.load for key, session in self._sessions.items()}
        behind = any(session.ledger.behind for session in self._sessions.values())
        change = self._governor.look(now, time.process_time(), loads, behind=behind)
        if change is None:
            return
        session, detail = self._sessions[change.key], change.detail.name.lower()
        log.warning("process %d: %s; from now on %s is recorded", session.target.pid, change.why, detail)
        session.set_detail(change.detail)
        told = {"event": "detail", "pid": session.target.pid, "session": session.writer.session, "detail": detail}
        self._say({**told, "why": change.why})

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
        self._sizes = sizes
        known = {pid for pid, _ in self._sessions}
        for pid in changed:
            try:
                for target in targets.scan([pid], known=known):
                    key = (target.pid, target.start)
                    if key not in self._refused and not is_sidecar(target.command):
                        self._begin(key, target, Phase.LOAD if target.start > self._started else Phase.UNKNOWN)
            except Exception:  # of one process; it is looked at again when its size has changed
                log.exception("process %d cannot be looked at", pid)

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
        self._tell_status()
        self._say({"event": "begin", "pid": target.pid, "session": writer.session, "models": list(target.models)})
        for problem in target.problems:
            log.warning("process %d: %s", target.pid, problem)

    def _end(self, key: tuple[int, int]) -> None:
        session = self._sessions.pop(key)
        self.recorder.remove(session)
        self._sizes.pop(key[0], None)  # should its number be used again, by a process of the same size
        self._tell_status()
        log.info("process %d %s", key[0], "is not traced any more" if session.target.alive else "has ended")

    def _tell_status(self) -> None:
        """Say in a line what is being done, for ``systemctl status``."""
        pids = ", ".join(str(pid) for pid, _ in self._sessions)
        notify(f"STATUS={f'tracing {pids}' if pids else 'waiting for a server'}, detail {self.detail.name.lower()}")

    def _tell_end(self, session: Session) -> None:
        told = {"event": "end", "pid": session.target.pid, "session": session.writer.session}
        self._say({**told, "account": session.account, "rows": session.writer.rows, "problems": session.problems})

    def close(self) -> None:
        """Stop listening, end all sessions, write everything."""
        if self._server:
            self._server.close()
        self.recorder.close()
        for session in self.recorder.ended():
            self._tell_end(session)
        self._sessions.clear()
        self.tracer.close()


def _confine(*, needs_admin: bool) -> None:
    """Give up all capabilities but :data:`KEPT`, and what else attaching takes on this kernel.

    Args:
        needs_admin: it takes CAP_SYS_ADMIN: perf events with uprobes do, so it does before 6.6.
    """
    had = capabilities.held()
    keep = had & {*KEPT, "CAP_SYS_ADMIN"} if needs_admin else had & {*KEPT}
    if "CAP_PERFMON" not in keep:
        return  # CAP_SYS_ADMIN stands for all, and attaching takes it
    try:
        with capabilities.without_all_but(keep):
            if kernel.try_bpf() == errno.EPERM:  # before 5.19, where sysctl kernel.unprivileged_bpf_disabled is set
                keep |= {"CAP_BPF"}
            if kernel.perf_events_refused():  # Debian's, by sysctl perf_event_paranoid
                keep |= had & {"CAP_SYS_ADMIN"}
        capabilities.give_up_all_but(keep)
    except OSError as error:
        log.warning("cannot give up capabilities: %s", error)
    else:
        log.info("kept of all capabilities: %s", ", ".join(sorted(keep)))
        if any(capabilities.held(path.read_text()) - keep for path in Path("/proc/self/task").glob("*/status")):
            log.warning("a thread of a library has kept more")


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
