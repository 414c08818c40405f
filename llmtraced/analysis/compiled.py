"""Loops that are compiled to machine code (numba): for what depends on the row before, where arrays at once do not do.

A function marked with :func:`compiled` is compiled when it is called first, for the types that it is called with, and
kept on disk, so that only the very first call takes seconds. numba is imported then, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

__all__ = ["compiled"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_lock = Lock()


def compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the function, compiled; other threads run while it does.

    It may use numbers and numpy arrays only. Whole numbers do not grow: they wrap around at 64 bits. Indices are not
    checked.
    """
    made: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not made:
            with _lock:
                if not made:
                    made.append(_made(function))
        result: _R = made[0](*args, **kwargs)
        return result

    return call


def _made(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    try:  # beside the module, else in the user's cache folder
        machine: Callable[..., Any] = numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # neither can be written to
        machine = numba.njit(function, nogil=True)
    return machine
