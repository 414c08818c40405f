"""What sidecars say of themselves, for whoever scrapes the daemon.

A sidecar must stay small, so it serves nothing: once a second it writes a text into a file (``prefetch/told.py``), and
the daemon hands on what is fresh. The texts are read with suspicion: known names only, bounded length.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Final

from llmtraced.errors import printable
from llmtraced.exposition import Family, Labels
from llmtraced.prefetch.told import LABELS, METRICS, NAME

__all__ = ["sidecar_families"]

log = logging.getLogger(__name__)

# A sidecar writes each second; one that was killed has left its last text behind. A time to come is an old one, too:
# the clock was set back since.
_FRESH_SECONDS: Final = 10.0
_MOST_BYTES: Final = 64 << 10
_MOST_FILES: Final = 64
_LINE: Final = re.compile(r'([a-z_]+)\{pid="([0-9]{1,10})",model="((?:[^"\\]|\\.)*)"\} (\S+)')


def sidecar_families(pattern: str) -> list[Family]:
    """Return the series of sidecars whose files match ``pattern`` and are not older than some seconds."""
    families = {f"{NAME}{name}": Family(f"{NAME}{name}", text, kind) for name, kind, _, text in METRICS}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for text in _texts(pattern):
        for line in text.splitlines():
            found = _LINE.fullmatch(line)
            if found is None or found[1] not in families:
                continue
            try:
                value = float(found[4])
            except ValueError:
                continue
            labels = Labels(LABELS, (found[2], printable(_unescaped(found[3]))))
            if math.isfinite(value) and (found[1], labels.values) not in seen:
                seen.add((found[1], labels.values))
                families[found[1]].add(labels, value)
    return list(families.values())


def _texts(pattern: str) -> Iterator[str]:
    """Yield the texts of files that are fresh."""
    now = time.time()
    for path in sorted(glob.glob(pattern))[:_MOST_FILES]:  # noqa: PTH207 (an absolute pattern)
        try:
            # Opening a FIFO must not wait, and a link is nobody's text.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as stream:
                if abs(now - os.fstat(fd).st_mtime) < _FRESH_SECONDS:
                    yield (stream.read(_MOST_BYTES) or b"").decode("utf-8", "replace")
        except OSError as error:
            log.debug("%s: %s", path, error)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], text)
