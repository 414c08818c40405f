"""Tracepoints as tracefs describes them: whether they exist, their fields, their numbers."""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError

__all__ = ["ensure_mounted", "exists", "has_field", "number", "root"]

_PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def root() -> Path | None:
    """Return where tracefs is mounted, or None."""
    return next((p for p in _PLACES if (p / "events").is_dir()), None)


def ensure_mounted() -> Path:
    """Return tracefs, mounting it where it belongs if no one has (it stays mounted, as on most distributions).

    Raises:
        LlmtracedError: it cannot be mounted; the message has the command.
    """
    found = root()
    if found:
        return found
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", str(_PLACES[0]).encode(), b"tracefs", 0, None) == 0:
        return _PLACES[0]
    error = ctypes.get_errno()
    raise LlmtracedError(
        f"tracefs is not mounted and cannot be: {os.strerror(error)}; mount -t tracefs tracefs {_PLACES[0]}",
        NO_PERMISSION if error in (1, 13) else UNSUPPORTED,
    )


@cache
def _format(category: str, name: str) -> str:
    base = root()
    try:
        return (base / "events" / category / name / "format").read_text() if base else ""
    except OSError:
        return ""


def exists(category: str, name: str) -> bool:
    """Tell whether this kernel has the tracepoint ``category:name``."""
    return bool(_format(category, name))


def has_field(category: str, name: str, field: str) -> bool:
    """Tell whether the tracepoint's record has ``field``."""
    return re.search(rf"field:[^;]*\b{re.escape(field)};", _format(category, name)) is not None


def number(category: str, name: str) -> int:
    """Return the tracepoint's number, as ``perf_event_open`` wants it.

    Raises:
        LlmtracedError: this kernel has no such tracepoint.
    """
    found = re.search(r"^ID:\s*(\d+)", _format(category, name), re.MULTILINE)
    if not found:
        raise LlmtracedError(f"this kernel has no tracepoint {category}:{name}", UNSUPPORTED)
    return int(found[1])
