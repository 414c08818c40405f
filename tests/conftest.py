"""The three-way switch for tests that need a real kernel or a real engine, and models to share.

``pytest.mark.kernel`` and ``pytest.mark.e2e`` need root, BCC and kernel headers; ``pytest.mark.kernel("root")`` needs
only what it names. LLMTRACED_KERNEL and LLMTRACED_E2E: unset, such tests run where they can and are skipped elsewhere,
with a reason that says how to force them; 1, what is missing is a failure; 0, they are off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers import SWITCHES, need
from hypothesis import settings

from llmtraced import headers, requirements
from llmtraced.bench import fetch, models
from llmtraced.errors import LlmtracedError

settings.register_profile("llmtraced", deadline=None)  # compiled loops and busy machines take longer than 200 ms
settings.load_profile("llmtraced")


@cache
def _no_root() -> str:
    return "" if os.geteuid() == 0 else "needs root"


@cache
def _no_bcc() -> str:
    check = requirements.bcc(requirements.distribution(requirements.read_text("/etc/os-release")))
    return "" if check.status == "ok" else f"needs BCC: {check.remedy}"


@cache
def _no_headers() -> str:
    try:
        headers.find()
    except LlmtracedError as error:
        return f"needs kernel headers: {error}"
    return ""


LACKING: dict[str, Callable[[], str]] = {"root": _no_root, "bcc": _no_bcc, "headers": _no_headers}
"""Requirement → what returns the reason why it is not met."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail marked tests whose requirements are not met, before their fixtures are made."""
    for name, switch in SWITCHES.items():
        marker = item.get_closest_marker(name)
        if marker is None:
            continue
        if os.environ.get(switch) == "0":
            pytest.skip(f"{switch}=0")
        for requirement in marker.args or LACKING:
            why = LACKING[requirement]()
            need(not why, why, name)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of about 24 MB: small enough to write for each session, large enough to fault on."""
    return models.write(tmp_path_factory.mktemp("models") / "small.gguf", models.dense_preset(24_000_000))


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """A real llama-server; built, which takes minutes, only where LLMTRACED_E2E=1 asks for it."""
    if os.environ.get(SWITCHES["e2e"]) == "1":
        return fetch.ensure_llama_server()
    found = fetch.find_llama_server()
    if found is None:
        pytest.skip("no llama-server is installed; LLMTRACED_E2E=1 builds it")
    return found
