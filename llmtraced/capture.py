"""An ad-hoc capture of one process: what ``llmtraced record`` and the tests run."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
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
_REFRESH_SECONDS = 1.0  # between looks at where its models are mapped
_POLL_SECONDS = 0.25  # each look costs some 100 us; the probes wake us for a first graph, and where the ring fills up


class Capture:
    """Records one process into a folder.

    Args:
        folder: of the trace.
        detail: the dial.
        flush_seconds: how old a record may be before it is in a file.
        ring_bytes: size of the ring, a power of two.
        router_scores: record what a mixture's routers say, too; ``detail`` must be more than ``FAULTS``.
        tracer: a loaded one, for its owner to close; by default one is loaded, which takes seconds.
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
        self.session: Session | None = None
        self._scores: ScoreRecorder | None = None
        self._wants_scores = router_scores
        self._child: subprocess.Popen[bytes] | None = None
        self._refreshed = 0.0
        self._started = time.monotonic()
        clean_leftovers(folder)

    def attach(self, pid: int, phase: Phase = Phase.UNKNOWN) -> Session:
        """Begin to trace a running process.

        Raises:
            LlmtracedError: there is none, or it uses no model.
        """
        return self._begin(targets.find_target(pid), phase)

    def _begin(self, target: targets.Target, phase: Phase) -> Session:
        writer = TraceWriter(self.folder, session_name(target), session_metadata(target, self.detail))
        self.session = self.recorder.add(target, writer, self.detail, phase)
        models = ", ".join(self.session.models)
        log.info("tracing process %d (%s) with %s into %s", target.pid, target.comm, models, self.folder)
        return self.session

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``command`` and trace it.

        Model files that the command line names are counted before the command's first instruction, so that nothing
        of the load is missed; others from when they are found in its address space.

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
        if self.session is None:
            time.sleep(_LOOK_SECONDS)
            if self._child is not None:
                for target in targets.scan(_family(self._child.pid)):
                    if target.mapped_bytes:
                        self._begin(target, Phase.LOAD)
                        break
            return 0
        self.tracer.ring.wait(_POLL_SECONDS if self.session.clocked else _LOOK_SECONDS)
        if self._wants_scores and self.session.clocked:
            self._wants_scores = False
            self._scores = ScoreRecorder.open(self.session, self.recorder.flush_seconds)
        if self._scores is not None:
            self._scores.poll()  # before the marks of graphs are read: then those of what it finds are there
        n = self.recorder.poll()
        if self._scores is not None:
            self._scores.flush()
        settled = self.session.clocked and self.session.target.mapped_bytes
        if time.monotonic() - self._refreshed > (_REFRESH_SECONDS if settled else _LOOK_SECONDS):
            self._refreshed = time.monotonic()
            self.session.refresh()
        return n

    @property
    def alive(self) -> bool:
        """Whether what is traced, or waited for, still runs."""
        if self.session is not None:
            return self.session.target.alive
        return self._child is None or self._child.poll() is None

    def close(self) -> dict[str, Any]:
        """End the trace, write everything, and return what it holds."""
        unplaced, misses = self.tracer.unplaced, self.tracer.misses()
        if self._scores is not None:
            self._scores.stop()
        self.recorder.close()
        if self._scores is not None:
            self._scores.write()
        if self._owned:
            self.tracer.close()
        if self.session is None:
            return {"trace": str(self.folder), "account": {}, "rows": {}}
        self.session.tell_what_was_not_seen()
        return {
            "trace": str(self.folder),
            "session": self.session.writer.session,
            "seconds": round(time.monotonic() - self._started, 3),
            "account": self.session.account,
            "rows": self.session.writer.rows,
            "bytes": self.session.writer.bytes,
            "missed": {program: n for program, n in misses.items() if n},
            "unplaced_pages": unplaced,
            "problems": self.session.problems,
        }

    def summary(self) -> Iterator[str]:
        """Yield what was recorded, a line each."""
        if self.session is None:
            yield "nothing was recorded: the command never mapped a GGUF model"
            return
        for probe, cell in self.session.account.items():
            lost = f", {cell['dropped']:,} dropped" if cell["dropped"] else ", none dropped"
            yield f"{probe}: {cell['counted']:,} counted in the kernel, {cell['delivered']:,} recorded{lost}"
        yield from self.session.problems
        size = sum(self.session.writer.bytes.values())
        yield f"{size / 1e6:.1f} MB in {self.folder}; next: llmtraced report summary {self.folder}"


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
