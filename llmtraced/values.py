"""Argument types that several commands share: sizes and durations as people write them."""

from __future__ import annotations

import argparse
import re

__all__ = ["duration", "size"]

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"  # what a float holds exactly
_SIZE = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def size(text: str) -> int:
    """Return bytes for ``4096``, ``64K``, ``1.2G`` or ``1.2GiB`` (powers of 1024)."""
    match = re.fullmatch(_NUMBER + r"\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write it like 512M or 1.2G")
    return int(float(match[1]) * _SIZE[match[2]])


def duration(text: str) -> float:
    """Return seconds for ``90``, ``500ms``, ``30s``, ``10m`` or ``2h``."""
    match = re.fullmatch(_NUMBER + r"\s*(ms|[smhd]?)", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r}; write it like 30s or 10m")
    return float(match[1]) * _SECONDS[match[2]]
