"""An ad-hoc capture of one process, or of all that a command starts: what ``llmtraced record`` and the tests run."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtraced import target as targets
from llmtraced.description import session_metadata, session_name
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.probes.loader import Sizes
from llmtraced.probes.tracer import Tracer
from llmtraced.recorder import Recorder
from llmtraced.router_scores import ScoreRecorder
from llmtraced.schema import Detail, Phase
from llmtraced.session import Session
from llmtraced.store import TraceWriter, clean_leftovers

__all__ = ["Capture"]

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.02  # between looks at a process that has not mapped its model yet
_FAMILY_SECONDS = 0.1  # between looks for further processes of a command: each reads /proc for all of its threads
_REFRESH_SECONDS = 1.0  # between looks at where its models are mapped
_POLL_SECONDS = 0.25  # each look costs some 100 us; the probes wake us for a first graph, and where the ring fills up


class Capture:
    """Records one process, or those that a command starts, into a folder.

    Args:
        folder: of the trace.
        detail: the dial.
        flush_seconds: how old a record may be before it is in a file.
        ring_bytes: size of the ring, a power of two.
        router_scores: record what a mixture's routers say, too; ``detail`` must be more than ``FAULTS``.
        tracer: a loaded one, for its owner to close; by default one is loaded, which takes seconds.

    Attributes:
        sessions: of each process that is or was traced.
    """

    def __init__(
        self,
        folder: Path,
        detail: Detail,
        *,
        flush_seconds: float = 5.0,
        ring_bytes: int = 16 << 20,
        router_scores: bool = False,
        tracer: Tracer | None = None,
    ) -> None:
        if ring_bytes & (ring_bytes - 1) or ring_bytes < 1 << 16:
            raise LlmtracedError(f"the ring must be a power of two of at least 64K, not {ring_bytes} bytes", USAGE)
        self.folder = folder
        self.detail = detail
        self._owned = tracer is None
        self.tracer = tracer or Tracer(Sizes(ring_bytes=ring_bytes))
        self.recorder = Recorder(self.tracer, flush_seconds)
        self.sessions: list[Session] = []
        self._scores: dict[int, ScoreRecorder | None] = {}  # by slot
        self._wants_scores = router_scores
        self._child: subprocess.Popen[bytes] | None = None
        self._refreshed = self._looked = 0.0
        self._started = time.monotonic()
        clean_leftovers(folder)

    @property
    def session(self) -> Session | None:
        """The first that is or was traced, usually the only one."""
        return self.sessions[0] if self.sessions else None

    def attach(self, pid: int, phase: Phase = Phase.UNKNOWN) -> Session:
        """Begin to trace a running process.

        Raises:
            LlmtracedError: there is none, or it uses no model.
        """
        return self._begin(targets.find_target(pid), phase)

    def _begin(self, target: targets.Target, phase: Phase) -> Session:
        writer = TraceWriter(self.folder, session_name(target), session_metadata(target, self.detail))
        session = self.recorder.add(target, writer, self.detail, phase)
        self.sessions.append(session)
        models = ", ".join(session.models)
        log.info("tracing process %d (%s) with %s into %s", target.pid, target.comm, models, self.folder)
        return session

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``command`` and trace it, and each process that it starts and that uses a model.

        Model files that the command line names are counted before the command's first instruction, so that nothing
        of the load is missed; others from when they are found in the address space of it or of a descendant.

        Raises:
            LlmtracedError: it cannot be started.
        """
        program = shutil.which(command[0], path=(env or os.environ).get("PATH"))
        if program is None:
            raise LlmtracedError(f"cannot start {command[0]}: no such program")
        targets.prepare(program)
        # The shell stops itself and, once we have looked, becomes the command, in the same process.
        waiting = ["/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *command]
        self._child = subprocess.Popen(waiting, env=dict(env) if env is not None else None)
        os.waitid(os.P_PID, self._child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        named = targets.from_arguments(self._child.pid, command)
        if named:
            self._begin(named, Phase.LOAD)
        else:
            log.info("waiting for process %d to map its model", self._child.pid)
        self._child.send_signal(signal.SIGCONT)
        return self._child

    def step(self) -> int:
        """Wait a little, take what has come, and return the number of records."""
        live = list(self.recorder.sessions.values())
        if self._child is not None and time.monotonic() - self._looked >= (_FAMILY_SECONDS if live else _LOOK_SECONDS):
            self._look(self._child.pid)
        if not live:
            time.sleep(_LOOK_SECONDS)
            return 0
        settled = all(session.clocked and session.target.mapped_bytes for session in live)
        clocked = all(session.clocked for session in live)
        self.tracer.ring.wait((_FAMILY_SECONDS if self._child else _POLL_SECONDS) if clocked else _LOOK_SECONDS)
        if self._wants_scores:
            for session in live:
                if session.clocked and session.slot not in self._scores:
                    self._scores[session.slot] = ScoreRecorder.open(session, self.recorder.flush_seconds)
        scores = [one for one in self._scores.values() if one is not None]
        for one in scores:
            one.poll()  # before the marks of graphs are read: then those of what it finds are there
        n = self.recorder.poll()
        for one in scores:
            one.flush()
        if time.monotonic() - self._refreshed > (_REFRESH_SECONDS if settled else _LOOK_SECONDS):
            self._refreshed = time.monotonic()
            for session in live:
                session.refresh()
        return n

    def _look(self, pid: int) -> None:
        """Begin with what ``pid`` has started, and end with what has ended."""
        self._looked = time.monotonic()
        for session in list(self.recorder.sessions.values()):
            if not session.target.alive:
                self._end(session)
        traced = [session.target.pid for session in self.recorder.sessions.values()]
        for target in targets.scan(_family(pid), known=traced):
            if target.mapped_bytes:
                self._begin(target, Phase.LOAD)

    def _end(self, session: Session) -> None:
        scores = self._scores.pop(session.slot, None)
        if scores is not None:
            scores.stop()
        self.recorder.remove(session)
        if scores is not None:
            self.recorder.wait()
            scores.write()

    @property
    def alive(self) -> bool:
        """Whether the command, or what is traced, still runs."""
        if self._child is not None and self._child.poll() is None:
            return True
        return any(session.target.alive for session in self.recorder.sessions.values())

    def end(self) -> list[Session]:
        """Stop tracing; return what was traced, which is on disk then. Another process can be attached to."""
        for session in list(self.recorder.sessions.values()):
            self._end(session)
        self.recorder.wait()
        ended, self.sessions = self.sessions, []
        return ended

    def close(self) -> dict[str, Any]:
        """End the trace, write everything, and return what it holds: sums over :attr:`sessions`."""
        unplaced, misses = self.tracer.unplaced, self.tracer.misses()
        for session in list(self.recorder.sessions.values()):
            self._end(session)
        self.recorder.close()
        if self._owned:
            self.tracer.close()
        if not self.sessions:
            return {"trace": str(self.folder), "account": {}, "rows": {}}
        for session in self.sessions:
            session.tell_what_was_not_seen()
        return {
            "trace": str(self.folder),
            "session": self.sessions[0].writer.session,
            "sessions": [session.writer.session for session in self.sessions],
            "seconds": round(time.monotonic() - self._started, 3),
            "account": self._account(),
            "rows": _sum(session.writer.rows for session in self.sessions),
            "bytes": _sum(session.writer.bytes for session in self.sessions),
            "missed": {program: n for program, n in misses.items() if n},
            "unplaced_pages": unplaced,
            "problems": self._problems(),
        }

    def _account(self) -> dict[str, dict[str, int]]:
        probes = dict.fromkeys(probe for session in self.sessions for probe in session.account)
        return {
            probe: _sum(session.account[probe] for session in self.sessions if probe in session.account)
            for probe in probes
        }

    def _problems(self) -> list[str]:
        if len(self.sessions) == 1:
            return self.sessions[0].problems
        return [f"process {session.target.pid}: {problem}" for session in self.sessions for problem in session.problems]

    def summary(self) -> Iterator[str]:
        """Yield what was recorded, a line each."""
        if not self.sessions:
            yield "nothing was recorded: the command never mapped a GGUF model"
            return
        for probe, cell in self._account().items():
            lost = f", {cell['dropped']:,} dropped" if cell["dropped"] else ", none dropped"
            yield f"{probe}: {cell['counted']:,} counted in the kernel, {cell['delivered']:,} recorded{lost}"
        yield from self._problems()
        size = sum(sum(session.writer.bytes.values()) for session in self.sessions)
        yield f"{size / 1e6:.1f} MB in {self.folder}; next: llmtraced report summary {self.folder}"


def _sum(each: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in each:
        total.update(one)
    return dict(total)


def _family(pid: int) -> list[int]:
    """Return ``pid`` and its descendants: what was started may be a script that starts the server."""
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        for task in Path(f"/proc/{current}/task").glob("*/children"):
            try:
                todo += [int(p) for p in task.read_text().split()]
            except OSError:
                continue
    if not Path(f"/proc/{pid}/task/{pid}/children").exists():  # kernels without CONFIG_PROC_CHILDREN
        found += [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(int(p.name)) == pid]
    return found


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(text[text.rindex(b")") + 2 :].split()[1])
