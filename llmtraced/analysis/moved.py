"""What came in and went out, by who did it, why, and in which token and phase: sums over the rows of the page cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from llmtraced.analysis.columns import Ints, Numbers, grown
from llmtraced.analysis.compiled import compiled
from llmtraced.analysis.pages import Pages, Rows

__all__ = ["Moved"]


class Moved:
    """The sums over the rows that are in the phase asked for.

    Attributes:
        pages: knows the words; with ``processes``.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._sums = np.zeros((0, 0, 0, 2, 2), np.int64)  # of comm, phase, cause, and out or in: bytes, rows
        self._added = np.zeros((0, 0), np.int64)  # of token and cause: bytes in

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        comms, phases, causes = (len(words.list) for words in (self.pages.comms, self.pages.phases, self.pages.causes))
        tokens = max(int(rows.token.max(initial=0)) + 1, self._added.shape[0])
        self._sums = grown(self._sums, (comms, phases, causes, 2, 2))
        self._added = grown(self._added, (tokens, causes))
        _add(rows.mark, rows.token, rows.who, rows.begin, rows.end, self._sums, self._added)

    def by_process(self) -> pl.DataFrame:
        """Return ``comm``, ``phase``, ``cause``, ``action`` and the ``bytes`` that moved."""
        comm, phase, cause, action = np.nonzero(self._sums[..., 1])
        pages = self.pages
        columns: dict[str, Any] = {
            "comm": [pages.comms.list[number] for number in comm.tolist()],
            "phase": [pages.phases.list[number] for number in phase.tolist()],
            "cause": [pages.causes.list[number] for number in cause.tolist()],
            "action": [("evict", "add")[number] for number in action.tolist()],
            "bytes": self._sums[comm, phase, cause, action, 0],
        }
        words = dict.fromkeys(("comm", "phase", "cause", "action"), pl.String)
        return pl.DataFrame(columns, schema={**words, "bytes": pl.Int64})

    def by_token(self) -> pl.DataFrame:
        """Return ``token``, ``cause`` and the ``bytes`` that came in."""
        token, cause = np.nonzero(self._added)
        columns: dict[str, Any] = {
            "token": token,
            "cause": [self.pages.causes.list[number] for number in cause.tolist()],
            "bytes": self._added[token, cause],
        }
        return pl.DataFrame(columns, schema={"token": pl.Int32, "cause": pl.String, "bytes": pl.Int64})


@compiled
def _add(mark: Ints, token: Numbers, who: Ints, begin: Ints, end: Ints, sums: Ints, added: Ints) -> None:
    for i in range(mark.size):
        what, nbytes = mark[i], end[i] - begin[i]
        if not what & 16:
            continue
        cause = who[i] & 0xFF
        of = sums[who[i] >> 16, who[i] >> 8 & 0xFF, cause, what & 1]
        of[0] += nbytes
        of[1] += 1
        if what & 1:
            added[token[i], cause] += nbytes
