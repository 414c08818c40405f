"""Which files of old traces to delete: by age, and by the size of all of them together.

Only the daemon's own layout is looked at (``TABLE/host=…/model=…/date=…/``): what ``llmtraced record`` wrote into the
same folder is somebody's. A session's table of tensors, which its other files need, goes with the last of them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from llmtraced.schema import TABLES

__all__ = ["Keeper", "Stored", "expired"]

log = logging.getLogger(__name__)

_TENSORS: Final = "tensors"


class Stored(NamedTuple):
    """A file of a trace: its table and session, when it was written (Unix time, s), and its size (bytes)."""

    path: Path
    table: str
    session: str
    written: float
    size: int


def expired(
    files: Iterable[Stored], now: float, keep_seconds: float, keep_bytes: int, running: Collection[str] = ()
) -> list[Stored]:
    """Return the files to delete, oldest first.

    Args:
        files: all there are.
        now: Unix time, s.
        keep_seconds: how old a file may be; 0: any age.
        keep_bytes: how large all files together may be; 0: any size.
        running: sessions that are being recorded; their tables of tensors stay.
    """
    known = sorted(files, key=lambda f: (f.written, f.path))
    total = sum(f.size for f in known)
    left = Counter(f.session for f in known if f.table != _TENSORS)
    tensors = {f.session: f for f in known if f.table == _TENSORS}
    doomed = []

    def old(file: Stored) -> bool:
        return bool(keep_seconds and now - file.written > keep_seconds) or bool(keep_bytes and total > keep_bytes)

    for file in known:
        if file.table == _TENSORS or not old(file):
            continue
        doomed.append(file)
        total -= file.size
        left[file.session] -= 1
        whole = tensors.get(file.session)
        if not left[file.session] and whole and file.session not in running:
            doomed.append(whole)
            total -= whole.size
    for file in tensors.values():  # of sessions in which nothing happened
        if file.session not in left and file.session not in running and old(file):
            doomed.append(file)
            total -= file.size
    return doomed


class Keeper:
    """Keeps a trace folder within its bounds.

    Args:
        folder: the trace.
        keep_seconds: how old a file may be; 0: any age.
        keep_bytes: how large all files together may be; 0: any size.
        wall: Unix time, s. A clock that is set must not delete everything, neither forward (what was written before
            looks old) nor back (what is written then does): it is as late as the clock says, and no later than it said
            at first and CLOCK_BOOTTIME since.

    Attributes:
        deleted: files deleted so far.
        bytes: size of what was left by the last :meth:`prune`.
    """

    def __init__(
        self, folder: Path, keep_seconds: float, keep_bytes: int, wall: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self.keep_seconds, self.keep_bytes = keep_seconds, keep_bytes
        self.deleted = 0
        self.bytes = 0
        self._wall = wall
        self._offset = wall() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def prune(self, running: Collection[str] = ()) -> None:
        """Delete what is too old or too much, and folders that are empty then."""
        files = list(self._files())
        now = min(self._wall(), self._offset + time.clock_gettime(time.CLOCK_BOOTTIME))
        doomed = expired(files, now, self.keep_seconds, self.keep_bytes, running)
        self.bytes = sum(f.size for f in files) - sum(f.size for f in doomed)
        for file in doomed:
            try:
                file.path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("cannot delete %s: %s", file.path, error.strerror)
                return
            self.deleted += 1
            with suppress(OSError):  # not empty
                for folder in file.path.relative_to(self.folder).parents[:3]:
                    (self.folder / folder).rmdir()
        if doomed:
            log.info("deleted %d old files of traces, %d bytes", len(doomed), sum(f.size for f in doomed))

    def _files(self) -> Iterator[Stored]:
        for table in TABLES:
            for path in self.folder.glob(f"{table}/host=*/model=*/date=*/*.parquet"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if not path.name.startswith("."):
                        yield Stored(path, table, path.name.rpartition("-")[0], status.st_mtime, status.st_size)
