"""How much is recorded of each process: turned down where it costs too much, and up again when that is over.

Pure: it is told what was used, and says what to change. docs/reliability.md has what it does under a flood of faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from llmtraced.schema import Detail

__all__ = ["Change", "Governor", "Load"]

_WINDOW_SECONDS: Final = 2.0
_STRIKES: Final = 2  # windows in a row that are too much: a model that is being loaded is not yet one
_CALM_SECONDS: Final = 30.0
_LONGEST_CALM_SECONDS: Final = 960.0


class Load(NamedTuple):
    """What a process has cost since it is traced: records read, and what the kernel found no room for."""

    records: int
    dropped: int


class Change(NamedTuple):
    """A process (pid and start) whose dial is to be turned, to what, and why."""

    key: tuple[int, int]
    detail: Detail
    why: str


@dataclass(slots=True)
class _Dial:
    detail: Detail
    calm: float = _CALM_SECONDS  # how long all must be well before it is turned up
    turned: float = 0.0
    raised: bool = False  # by the last turn


class Governor:
    """Turns the dials.

    The process of which most records come is recorded in less detail where, for two windows of two seconds, this
    program has used more of a processor than it may, or records were lost. When all has been well for half a minute it
    is turned up by a step; each time that this proves too early the wait is doubled, up to 16 minutes.

    Args:
        wanted: the detail that is configured.
        limit: processor seconds a second that may be used; 0: any, and nothing is ever turned down.
    """

    def __init__(self, wanted: Detail, limit: float) -> None:
        self.wanted = wanted
        self.limit = limit
        self._dials: dict[tuple[int, int], _Dial] = {}
        self._loads: dict[tuple[int, int], Load] = {}
        self._seen: tuple[float, float] | None = None
        self._strikes = 0

    def look(
        self, now: float, cpu_seconds: float, loads: Mapping[tuple[int, int], Load], *, behind: bool
    ) -> Change | None:
        """Take what was used up to now; return what to change, if anything.

        Args:
            now: a clock that never jumps, s.
            cpu_seconds: used by this program so far.
            loads: of each process that is traced.
            behind: the disk does not keep up with what is recorded.
        """
        if not self.limit:
            return None
        if self._seen is None:
            self._seen = now, cpu_seconds
        then, used = self._seen
        if now - then < _WINDOW_SECONDS:
            return None
        share = (cpu_seconds - used) / (now - then)
        self._seen = now, cpu_seconds
        self._dials = {key: self._dials.get(key) or _Dial(self.wanted, turned=now) for key in loads}
        before, self._loads = self._loads, dict(loads)
        recent = {
            key: Load(load.records - old.records, load.dropped - old.dropped)
            for key, load in loads.items()
            if (old := before.get(key)) is not None
        }
        lossy = any(load.dropped for key, load in recent.items() if self._dials[key].detail > Detail.TOTALS)
        if share > self.limit or lossy or behind:
            self._strikes += 1
            if self._strikes >= _STRIKES:
                why = "records are lost" if lossy else "the disk does not keep up" if behind else ""
                return self._down(now, recent, why or f"recording takes {share:.0%} of a processor")
            return None
        self._strikes = 0
        return self._up(now)

    def _down(self, now: float, recent: Mapping[tuple[int, int], Load], why: str) -> Change | None:
        able = [key for key in recent if self._dials[key].detail > Detail.TOTALS]
        if not able:
            return None
        self._strikes = 0
        key = max(able, key=lambda k: recent[k])
        dial = self._dials[key]
        if dial.raised:
            early = now - dial.turned < dial.calm
            dial.calm = min(2 * dial.calm, _LONGEST_CALM_SECONDS) if early else _CALM_SECONDS
        dial.detail, dial.turned, dial.raised = Detail(dial.detail - 1), now, False
        return Change(key, dial.detail, why)

    def _up(self, now: float) -> Change | None:
        for key, dial in self._dials.items():
            if dial.detail < self.wanted and now - dial.turned >= dial.calm:
                dial.detail, dial.turned, dial.raised = Detail(dial.detail + 1), now, True
                return Change(key, dial.detail, f"all has been well for {dial.calm:.0f} s")
        return None
