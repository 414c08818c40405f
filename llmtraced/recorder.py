"""Sessions: a traced process's events become the files of a trace.

One thread reads the ring (:meth:`Recorder.poll`); another makes rows and writes Parquet, so that a slow disk costs
memory (bounded) and then intervals (counted as dropped), but never the reader's attention: nothing that it does waits
for the disk.

Files follow *epochs* of the account. To end one, the kernel is told to count in the next; what was under way then
settles within microseconds, and the ended epoch's records are complete when their number is what the kernel counted
less what it dropped. So every file carries an account that is exact for its own rows.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmtraced import clock
from llmtraced.errors import LlmtracedError
from llmtraced.probes.tracer import Tracer
from llmtraced.schema import Detail, Phase
from llmtraced.session import Account, Session
from llmtraced.store import TraceWriter
from llmtraced.target import Target

__all__ = ["Recorder"]

log = logging.getLogger(__name__)

_SETTLE_SECONDS: Final = 1.0
_BUFFERED_EVENTS: Final = 1 << 17  # 8 MB of records, a row group: then a file is written before its time
_JUMP_NS: Final = 500_000_000  # of the wall clock against the trace's; less is made up for at the next interval
_QUEUED_BYTES: Final = 64 << 20  # of records that wait for the writer; what comes then is not recorded


class Recorder:
    """Polls the tracer and keeps its sessions' files coming.

    Args:
        tracer: to poll.
        flush_seconds: how old a record may be before it is in a file.

    Attributes:
        sessions: by slot; held under :attr:`lock` where another thread looks.
        unsettled: intervals whose account did not add up in time.
        events: records read.
        bytes_written, write_errors: of trace files.
    """

    def __init__(self, tracer: Tracer, flush_seconds: float = 5.0) -> None:
        self.tracer = tracer
        self.flush_seconds = flush_seconds
        self.sessions: dict[int, Session] = {}
        self.lock = threading.Lock()
        self.unsettled = 0
        self.events = 0
        self.bytes_written = 0
        self.write_errors = 0
        self._flushed = time.monotonic()
        self._offset = clock.realtime_offset_ns()  # of this interval's records, to Unix time
        self._queued = 0
        self._counting = threading.Lock()
        self._ended: queue.SimpleQueue[Session] = queue.SimpleQueue()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._writer = threading.Thread(target=self._work, name="writer", daemon=True)
        self._writer.start()

    def add(self, target: Target, writer: TraceWriter, detail: Detail, phase: Phase) -> Session:
        """Begin to trace a process.

        Raises:
            LlmtracedError: it cannot be traced.
        """
        if not self.sessions:  # nobody has looked at the clock
            self._offset = clock.realtime_offset_ns()
        writer.describe({"flush_seconds": self.flush_seconds, "ended_ns": None, "realtime_offset_ns": self._offset})
        session = Session(self.tracer, target, writer, detail, phase)
        with self.lock:
            self.sessions[session.slot] = session
        self.later(lambda: self._write_tensors(session))
        return session

    def remove(self, session: Session) -> None:
        """Stop tracing a process; what is left of it is written by and by, and then it is in :meth:`ended`."""
        self._drain()  # it is looked at for what has come until now
        session.detach()
        self.flush(last=session)
        with self.lock:
            del self.sessions[session.slot]
            self.tracer.free(session.slot)

    def ended(self) -> list[Session]:
        """Return the sessions that were removed and, since the last call, written to their end."""
        found = []
        while not self._ended.empty():
            found.append(self._ended.get())
        return found

    @property
    def paused(self) -> bool:
        """Whether the last interval of some session could not be written, or did not find the writer ready."""
        return any(session.paused for session in list(self.sessions.values()))

    def later(self, job: Callable[[], None]) -> None:
        """Have the writer's thread do something when it has done all that it was given before."""
        self._jobs.put(job)

    def wait(self) -> None:
        """Return when the writer has done all that it was given."""
        self._jobs.join()

    def poll(self) -> int:
        """Read what has come; flush when it is time. Returns the number of records."""
        self.tracer.follow_cpus()
        n = self._drain()
        due = time.monotonic() - self._flushed >= self.flush_seconds
        jumped = abs(clock.realtime_offset_ns() - self._offset) > _JUMP_NS  # what has been recorded goes by the old one
        if due or jumped or any(s.buffered > _BUFFERED_EVENTS for s in self.sessions.values()):
            self.flush()
        return n

    def _drain(self) -> int:
        self.tracer.flush()
        n = 0
        for batch in self.tracer.read():
            n += len(batch)
            slots = batch["slot"]
            for slot in np.unique(slots):
                session = self.sessions.get(int(slot))
                if session:
                    session.take(batch if (slots == slot).all() else batch[slots == slot])
        self.events += n
        return n

    def flush(self, last: Session | None = None) -> None:
        """End the epoch and give its records to the writer; ``last`` ends with it."""
        self._flushed = time.monotonic()
        number = self.tracer.next_epoch()
        deadline = time.monotonic() + _SETTLE_SECONDS
        self._drain()
        while missing := {s.target.pid: left for s in self.sessions.values() if (left := s.missing(number))}:
            if time.monotonic() > deadline:
                self.unsettled += 1
                for pid, left in missing.items():
                    what = ", ".join(f"{n:+d} {probe}" for probe, n in left.items())
                    log.warning("process %d: the account of the last interval does not add up yet: %s", pid, what)
                break
            time.sleep(0.001)
            self._drain()
        for session in self.sessions.values():
            events, account = session.end_epoch(number)
            ends = session is last
            ledger = session.ledger
            ledger.behind = bool(account) and self._queued > _QUEUED_BYTES // (4 if ledger.behind else 1)
            if ledger.behind:
                session.lose(account, "the disk does not keep up")
                events, account = events[:0], {}
            if account or len(events) or ends:
                with self._counting:
                    self._queued += events.nbytes
                self.later(partial(self._write, session, events, account, ends, self._offset))
        before, self._offset = self._offset, clock.realtime_offset_ns()
        jump = self._offset - before
        if abs(jump) > _JUMP_NS:  # since poll() looked, it may be
            log.info("the clock was set, or the machine suspended: %+.1f s", jump / 1e9)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("writing a trace failed")
            finally:
                del job
                pa.default_memory_pool().release_unused()  # a file's columns are some MB; between files we need none
                self._jobs.task_done()
        self._jobs.task_done()

    def _write(self, session: Session, events: NDArray[Any], account: Account, last: bool, offset: int) -> None:
        session.writer.describe({"realtime_offset_ns": offset})
        before = sum(session.writer.bytes.values())
        try:
            if not session.described and session.ledger.ready():  # it could not be written when the session began
                self._write_tensors(session)
            if last:
                session.writer.describe({"ended_ns": clock.monotonic_ns()})
            session.write(events, account, last=last)
        finally:
            with self._counting:
                self._queued -= events.nbytes
            self.bytes_written += sum(session.writer.bytes.values()) - before
            self.write_errors += bool(session.write_error)
            if last:
                self._write_tensors(session)
                self._ended.put(session)

    def _write_tensors(self, session: Session) -> None:
        try:
            session.write_tensors()
        except LlmtracedError as error:
            self.write_errors += 1
            session.lose({}, str(error))

    def close(self) -> None:
        """End all sessions; everything is on disk when this returns."""
        for session in list(self.sessions.values()):
            self.remove(session)
        self._jobs.put(None)
        self._writer.join()
