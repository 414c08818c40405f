"""Sessions: a traced process's events become the files of a trace.

One thread reads the ring (:meth:`Recorder.poll`); another makes rows and writes Parquet, so that a slow disk costs
memory (bounded) and then, in the ring, events (counted), but never the reader's attention.

Files follow *epochs* of the account. To end one, the kernel is told to count in the next; what was under way then
settles within microseconds, and the ended epoch's records are complete when their number is what the kernel counted
less what it dropped. So every file carries an account that is exact for its own rows.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
_QUEUED_FILES: Final = 4


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
        self._jobs: queue.Queue[tuple[Session, NDArray[Any], Account, bool] | None] = queue.Queue(_QUEUED_FILES)
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)
        self._writer.start()

    def add(self, target: Target, writer: TraceWriter, detail: Detail, phase: Phase) -> Session:
        """Begin to trace a process.

        Raises:
            LlmtracedError: it cannot be traced.
        """
        session = Session(self.tracer, target, writer, detail, phase)
        with self.lock:
            self.sessions[session.slot] = session
        self._write_tensors(session)
        return session

    def remove(self, session: Session) -> None:
        """Stop tracing a process and write what is left of it."""
        self.tracer.remove_process(session.slot)
        self.flush(last=session)
        self._jobs.join()
        self._write_tensors(session)
        with self.lock:
            del self.sessions[session.slot]
            self.tracer.free(session.slot)

    def _write_tensors(self, session: Session) -> None:
        try:
            session.write_tensors()
        except LlmtracedError as error:
            self.write_errors += 1
            log.error("%s", error)

    def poll(self) -> int:
        """Read what has come; flush when it is time. Returns the number of records."""
        n = self._drain()
        due = time.monotonic() - self._flushed >= self.flush_seconds
        if due or any(s.buffered > _BUFFERED_EVENTS for s in self.sessions.values()):
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
        while not all(s.settled(number) for s in self.sessions.values()):
            if time.monotonic() > deadline:
                self.unsettled += 1
                log.warning("the account of the last interval does not add up yet; its files say by how much")
                break
            time.sleep(0.001)
            self._drain()
        for session in self.sessions.values():
            events, account = session.end_epoch(number)
            if account or len(events) or session is last:
                self._jobs.put((session, events, account, session is last))

    def _write(self) -> None:
        while (job := self._jobs.get()) is not None:
            session, events, account, last = job
            before = sum(session.writer.bytes.values())
            try:
                session.write(events, account, last=last)
                self.bytes_written += sum(session.writer.bytes.values()) - before
                self.write_errors += session.write_error is not None
            except Exception:
                log.exception("writing the trace of process %d failed", session.target.pid)
            finally:
                del job, events
                pa.default_memory_pool().release_unused()  # a file's columns are some MB; between files we need none
                self._jobs.task_done()

    def close(self) -> None:
        """End all sessions; everything is on disk when this returns."""
        for session in list(self.sessions.values()):
            self.remove(session)
        self._jobs.put(None)
        self._writer.join()
