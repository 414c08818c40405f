"""What tests of more than one folder use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

import pytest

__all__ = ["EMULATED", "SWITCHES", "need", "wait_until"]

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
