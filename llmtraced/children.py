"""Python processes that we start."""

from __future__ import annotations

import os
import sys

__all__ = ["environment"]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which an interpreter finds the modules that this one does, with ``more`` set."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}
