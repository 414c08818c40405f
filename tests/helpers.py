"""What tests of more than one folder use."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Final, TypeVar

import pytest

__all__ = ["EMULATED", "SWITCHES", "bounded", "need", "wait_until"]

T = TypeVar("T")

SWITCHES: Final = {"kernel": "LLMTRACED_KERNEL", "e2e": "LLMTRACED_E2E"}
"""Marker → environment variable. Unset: skip where something is missing; 1: that is a failure; 0: off."""

EMULATED: Final = os.environ.get("LLMTRACED_EMULATED") == "1"
"""The processor is an emulated one, 10 to 20 times slower: models are smaller then, and more is waited for."""


def need(ok: object, what: str, marker: str = "kernel") -> None:
    """Skip the test if a requirement is not met, or fail it where the marker's switch is 1.

    Args:
        ok: whether it is met.
        what: is missing, for the reader.
        marker: whose switch decides.
    """
    switch = SWITCHES[marker]
    if ok:
        return
    if os.environ.get(switch) == "1":
        pytest.fail(f"{what}, and {switch}=1 forbids to skip", pytrace=False)
    pytest.skip(f"{what}; {switch}=1 makes this a failure")


def wait_until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """Return what ``condition`` returns as soon as it is true; fail, naming ``what``, after ``seconds``.

    Ten times as long where the processor is emulated.
    """
    seconds *= 10 if EMULATED else 1
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)
    return result


def bounded(call: Callable[[], T], seconds: float, memory: int) -> T:
    """Return what ``call`` returns; fail if it takes more time or memory than a bound.

    It is called twice, for tracing allocations makes the same work take several times longer.

    Args:
        call: may be called twice.
        seconds: processor time of this process.
        memory: bytes that Python has allocated more at the peak than before.
    """
    started = time.process_time()
    call()
    took = time.process_time() - started
    assert took < seconds, f"{took:.2f} s of processor time"
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory, f"{peak} bytes at the peak"
    return result
