"""How llama.cpp was told to load a model, and what that leaves to be seen. Pure; docs/load-modes.md has the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmtraced.errors import printable

__all__ = ["load_mode", "recorded_mode", "why_unmapped"]

_OPTIONS: Final = ("-lm", "--load-mode")
_OLDER: Final = {"-dio": "dio", "--direct-io": "dio"}


def load_mode(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Return the mode that a llama.cpp process was told (``--load-mode``; older builds ``--direct-io``), "" if none.

    Args:
        arguments: its command line, of which the last word counts, before what the environment says.
        environment: with ``LLAMA_ARG_LOAD_MODE``.
    """
    mode = (environment or {}).get("LLAMA_ARG_LOAD_MODE", "")
    for option, word in zip(("", *arguments), arguments, strict=False):
        if option in _OPTIONS:
            mode = word
        elif word.startswith("--load-mode="):
            mode = word.partition("=")[2]
        else:
            mode = _OLDER.get(word, mode)
    return mode


def recorded_mode(meta: Mapping[str, Any]) -> str:
    """Return :func:`load_mode` of a trace's metadata; older ones have the command line only."""
    if "load_mode" in meta:
        return str(meta["load_mode"])
    command = meta.get("command") or []
    return load_mode(command.split() if isinstance(command, str) else [str(word) for word in command])


def why_unmapped(label: str, mode: str) -> str:
    """Return what is not seen of a model that was read instead of being mapped, by :func:`load_mode`."""
    if mode == "dio":
        return (
            f"{printable(label)} was read with direct I/O into the process's own memory: that passes the page cache, "
            "so neither its reads, nor faults, nor page cache are seen"
        )
    return (
        f"{printable(label)} was read into the process's own memory instead of being mapped: reads of the file are "
        "recorded, faults and page cache of what was read are not to be had"
    )
