"""Linux capabilities of this process: which it has, and giving up those that it needs no longer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["NUMBERS", "can_load", "give_up_all_but", "held", "without_all_but"]

NUMBERS: Final = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
    "CAP_CHECKPOINT_RESTORE": 40,
}
"""Those that matter to us, by their bits: include/uapi/linux/capability.h."""

_VERSION: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)


def held(status: str | None = None) -> frozenset[str]:
    """Return the names in :data:`NUMBERS` of the effective capabilities in a ``/proc/PID/status``, ours by default."""
    text = Path("/proc/self/status").read_text() if status is None else status
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", text, re.MULTILINE)
    bits = int(match[1], 16) if match else 0
    return frozenset(name for name, bit in NUMBERS.items() if bits >> bit & 1)


def can_load(names: Collection[str]) -> bool:
    """Tell whether these capabilities suffice to load tracing programs (Linux 5.8)."""
    return "CAP_SYS_ADMIN" in names or {"CAP_BPF", "CAP_PERFMON"} <= set(names)


def give_up_all_but(names: Collection[str]) -> None:
    """Keep only those of ``names`` that this thread has, for good: what it starts gets no more, not even as root.

    Threads that run already keep theirs: call it before there are any.

    Raises:
        OSError: the kernel refuses.
    """
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _limit(names, range(6))


@contextlib.contextmanager
def without_all_but(names: Collection[str]) -> Iterator[None]:
    """Do without the others for as long as the context lasts, in this thread.

    Raises:
        OSError: the kernel refuses.
    """
    before = _limit(names, (0, 3))
    try:
        yield
    finally:
        _check(_libc.capset(_header(), before))


def _header() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_VERSION, 0)


def _limit(names: Collection[str], words: Iterable[int]) -> ctypes.Array[ctypes.c_uint32]:
    """Take all but ``names`` out of some words of the sets, and return the sets as they were.

    The words are the effective, permitted and inheritable capabilities 0 to 31, then the same of those from 32 on.
    """
    before = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(_header(), before))
    keep = sum(1 << NUMBERS[name] for name in names)
    sets = (ctypes.c_uint32 * 6).from_buffer_copy(before)
    for word in words:
        sets[word] &= keep >> 32 * (word // 3) & 0xFFFFFFFF
    _check(_libc.capset(_header(), sets))
    return before


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
