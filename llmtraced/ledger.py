"""What of a session is on disk, and what is not: the account stays exact where nothing can be written.

An interval that could not be written counts as dropped, in the next file that can be. So in every file, and for the
session as a whole, what the kernel counted is what was delivered and what was dropped, also over a full disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pyarrow as pa

from llmtraced.errors import LlmtracedError
from llmtraced.store import TraceWriter

__all__ = ["Account", "Ledger"]

log = logging.getLogger(__name__)

Account = dict[str, dict[str, int]]
"""By probe: ``counted``, ``delivered``, ``dropped``."""


class Ledger:
    """Writes a session's intervals and keeps its account. Safe to use from several threads.

    Args:
        writer: of its files.
        pid: of the process, for the log.

    Attributes:
        account: totals since the start: of what is on disk, and of what was not written.
        paused: why nothing is being recorded at the moment; empty: it is.
        behind: the writer has so much to do that intervals are lost; set by whoever loses them.
        error: what went wrong when the last interval was written; empty: nothing.
    """

    def __init__(self, writer: TraceWriter, pid: int) -> None:
        self._writer = writer
        self._pid = pid
        self.account: Account = {}
        self.paused = ""
        self.behind = False
        self.error = ""
        self._owed: Account = {}  # what was lost and is in no file yet
        self._lock = threading.Lock()

    def owed(self) -> set[str]:
        """Return the probes whose next file has a loss to tell of."""
        with self._lock:
            return set(self._owed)

    def lose(self, account: Account, why: str) -> None:
        """Do not write an interval: its records count as dropped, and the next file of each probe says so."""
        if not self.paused:
            log.error("process %d: %s; recording pauses, metrics go on", self._pid, why)
        self.paused = why
        lost = {n: {"counted": c["counted"], "delivered": 0, "dropped": c["counted"]} for n, c in account.items()}
        with self._lock:
            _add(self._owed, lost)
            _add(self.account, lost)

    def ready(self) -> bool:
        """Tell whether to try: not while recording pauses and there is no room, so that others find some."""
        self.error = self._writer.obstacle() if self.paused else ""
        return not self.error

    def write(self, tables: Sequence[tuple[str, pa.Table]], account: Account) -> None:
        """Write an interval, a file a table; what cannot be written is lost.

        Args:
            tables: each with the name of its probe; none where :meth:`ready` says no.
            account: of the interval.
        """
        left = dict(account)
        for name, table in tables:
            try:
                self._write(name, table, account.get(name))
            except LlmtracedError as error:
                self.error = str(error)
            else:
                left.pop(name, None)
        if self.error:
            self.lose(left, self.error)
        elif self.paused and not self.behind:
            self.paused = ""
            log.warning("process %d: recording goes on; what was missed counts as dropped", self._pid)

    def _write(self, name: str, table: pa.Table, cell: dict[str, int] | None) -> None:
        cells: Account = {}
        with self._lock:
            owed = self._owed.pop(name, None)
        for part in (owed, cell):
            if part:
                _add(cells, {name: part})
        try:
            self._writer.write(name, table, name, cells)
        except BaseException:
            if owed:
                with self._lock:
                    _add(self._owed, {name: owed})
            raise
        if cell:
            with self._lock:
                _add(self.account, {name: cell})


def _add(sums: Account, account: Account) -> None:
    """Add ``account`` to ``sums``."""
    for probe, cell in account.items():
        total = sums.setdefault(probe, dict.fromkeys(("counted", "delivered", "dropped"), 0))
        for key, value in cell.items():
            total[key] += value
