"""When to work and when to stand aside: decided by what tokens take. Pure, standard library only.

The sidecar must never make a server slower. So it watches some tokens before it does anything, unless the server would
lose its huge pages meanwhile; if they read nothing the model fits, and nothing is done. Else it engages, and compares
the tokens with those from before.
"""

from __future__ import annotations

from math import inf
from statistics import median

__all__ = ["ASIDE", "BACKED_OFF", "ENGAGED", "FITS", "WATCHING", "Governor"]

WATCHING, ENGAGED, FITS, BACKED_OFF = "watching", "engaged", "fits", "backed off"
ASIDE = (WATCHING, FITS, BACKED_OFF)
"""States in which nothing is pinned, read or given back."""

_FITS = 0.005  # of the model read by the server in a token: what still comes and goes when all of it fits
_WORSE = 0.97  # engaged tokens must take less than this share of those before
_SETTLE = 3  # tokens after engaging that are not compared
_ENOUGH, _ENOUGH_VARIED = 8, 32  # tokens that are compared
_FIRST_PAUSE = 60.0  # s; doubled each time
_MOST_TOGETHER = 64  # tokens in a batch that is still decoding: slots, times what a draft proposes


class Governor:
    """Decides from each decoded token.

    Args:
        model_bytes: that a token uses.
        trial: tokens to watch before engaging; 0: engage at once, and never compare.
        varied: tokens differ in what they read, as those of a mixture do: more of them are watched and compared.
        held: the server has huge pages that it would lose while it was watched: engage at once, and compare only if in
            doubt.

    Attributes:
        state: WATCHING, ENGAGED, FITS or BACKED_OFF.
        without, with_: (tokens in the batch, duration in ns) of the last evaluations without the sidecar's work, and
            with it. Those of several slots, or of a draft's proposals, take longer: only equal batches are compared.
        why: the last decision, in words.
        read_through_ns: what a token takes at least where the server reads all of the model for it, as one does whose
            memory is too small; set by who knows the disk's rate. Engaged tokens that take longer are in doubt.
    """

    def __init__(self, model_bytes: int, trial: int = 3, *, varied: bool = False, held: bool = False) -> None:
        self._enough = _ENOUGH_VARIED if varied else _ENOUGH
        self._bytes, self._trial = model_bytes, max(trial, self._enough // 2) if trial and varied else trial
        self.state = WATCHING if trial and not held else ENGAGED
        self.read_through_ns = inf
        self.without: list[tuple[int, int]] = []
        self.with_: list[tuple[int, int]] = []
        self._doubtful = held and trial > 0
        self.why = "watching the first tokens"
        if self.state == ENGAGED:
            self.why = "engaged at once, to keep the server's huge pages" if trial else "engaged at once, as asked"
        self._read: list[int] = []
        self._skip = _SETTLE
        self._pause, self._until = _FIRST_PAUSE, 0.0

    def token(self, duration_ns: int, batch: int, read: int, now: float) -> bool:
        """Take in a graph evaluation; return whether the state changed.

        Args:
            duration_ns: of the evaluation.
            batch: tokens in it, 0 if it is a prompt, which is not judged.
            read: bytes that the server itself read from disk since the one before.
            now: seconds, monotonic.
        """
        if not 0 < batch <= _MOST_TOGETHER:
            return False
        before = self.state
        if self.state in (WATCHING, FITS):
            if self.state == FITS and read > self._bytes * _FITS:
                self.without.clear()  # those were tokens of a model that fits: no measure of what is to come
            self.without = [*self.without, (batch, duration_ns)][-max(self._enough, 16) :]
            self._read = [*self._read, read][-min(max(self._trial, 2), 16) :]
            if len(self._read) >= max(self._trial, 2):
                self._judge_reads()
        elif self.state == ENGAGED:
            self._judge_speed(batch, duration_ns, now)
        elif now >= self._until:
            self.state, self.why = WATCHING, "trying again"
            self._read.clear()
            self.without.clear()
        return self.state != before

    def _judge_reads(self) -> None:
        least, most = self._bytes * _FITS, max(self._read)
        if most <= least:
            self.state, self.why = FITS, "tokens read next to nothing: the model fits in memory"
        elif self.state == WATCHING or min(self._read) > least:
            self.state, self.why = ENGAGED, f"tokens read {most} bytes"
            self._skip = _SETTLE
            self.with_.clear()

    def _judge_speed(self, batch: int, duration_ns: int, now: float) -> None:
        if self._skip:
            self._skip -= 1
            return
        self.with_ = [*self.with_, (batch, duration_ns)][-64:]
        before, since = _of(batch, self.without), _of(batch, self.with_)
        if len(since) < self._enough:
            return
        if self._doubtful and median(since[-self._enough :]) > self.read_through_ns * _WORSE:
            self.state, self.why = WATCHING, "not clearly faster with it: comparing"
            self._doubtful = False
            self._read.clear()
            return
        if not before:
            return
        without, engaged = median(before[-self._enough :]), median(since[-self._enough :])
        if engaged > without * _WORSE:
            self.state = BACKED_OFF
            self.why = f"tokens take {engaged / 1e6:.0f} ms with it and {without / 1e6:.0f} ms without it"
            self._until, self._pause = now + self._pause, self._pause * 2

    def compared(self) -> tuple[list[int], list[int]]:
        """Return the durations (ns) without and with the sidecar's work, of the batches of which most are known."""
        both = [batch for batch, _ in self.without + self.with_]
        batch = max(both, key=both.count, default=1)
        return _of(batch, self.without), _of(batch, self.with_)

    def reading(self, read: int) -> bool:
        """Take in what the server has read of late, where its tokens are not seen; return whether the state changed."""
        changed = self.state == FITS and read > self._bytes * _FITS
        if changed:
            self.state, self.why = ENGAGED, f"the server reads: {read} bytes of late"
        return changed

    def settled(self) -> None:
        """Take in that pinning has just ended: the next tokens are not compared."""
        self._skip = max(self._skip, _SETTLE)

    def fits(self) -> bool:
        """Take in that there is memory for the whole model; return whether the state changed."""
        changed = self.state == ENGAGED
        if changed:
            self.state, self.why = FITS, "there is memory for the whole model"
            self._read.clear()
        return changed


def _of(batch: int, evaluations: list[tuple[int, int]]) -> list[int]:
    return [duration for tokens, duration in evaluations if tokens == batch]
