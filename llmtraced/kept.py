"""Files that are kept because making them again would take long, in the user's cache directory.

What is kept may be lost, damaged or not writable at any time: then it is made again. Only what this user alone could
have written is taken back.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["folder", "read", "write"]

_MOST_BYTES: Final = 16 << 20


def folder() -> Path:
    """Return ``$LLMTRACED_CACHE``, else systemd's ``$CACHE_DIRECTORY``, else ``llmtraced`` in the cache directory."""
    for own in ("LLMTRACED_CACHE", "CACHE_DIRECTORY"):
        if path := os.environ.get(own):
            return Path(path)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "llmtraced"
    home = os.environ.get("HOME", "/")
    return Path(home if home != "/" else pwd.getpwuid(os.geteuid()).pw_dir) / ".cache" / "llmtraced"


def read(path: Path) -> bytes | None:
    """Return what was kept; None: nothing, or something that others could have written."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as stream:
            found = os.fstat(fd)
            mine = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if mine and stat.S_ISREG(found.st_mode) and found.st_size <= _MOST_BYTES:
                return stream.read(_MOST_BYTES)
    return None


def write(path: Path, data: bytes, *, most: int) -> None:
    """Keep data, in whole or not at all, and of the files of its kind (its suffix) the ``most`` newest.

    Raises:
        OSError: it cannot be kept; nothing is lost.
    """
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    kind = [(one.stat().st_mtime_ns, one) for one in path.parent.glob(f"*{path.suffix}")]
    for _, one in sorted(kind)[:-most]:
        one.unlink(missing_ok=True)
