"""How llama.cpp was told to load a model, and what that leaves to be seen. Pure; docs/load-modes.md has the table."""

from __future__ import annotations

from collections.abc import Sequence

from llmtraced.errors import printable

__all__ = ["direct_io", "why_unmapped"]


def direct_io(arguments: Sequence[str]) -> bool:
    """Tell whether a llama.cpp command line asks for direct I/O (``--load-mode dio``; older builds ``--direct-io``)."""
    before = ("", *arguments)
    return any(
        word in ("-dio", "--direct-io", "--load-mode=dio") or (word == "dio" and option in ("-lm", "--load-mode"))
        for option, word in zip(before, arguments, strict=False)
    )


def why_unmapped(label: str, arguments: Sequence[str]) -> str:
    """Return what is not seen of a model that a process with this command line has read instead of mapping it."""
    if direct_io(arguments):
        return (
            f"{printable(label)} was read with direct I/O into the process's own memory: that passes the page cache, "
            "so neither its reads, nor faults, nor page cache are seen"
        )
    return (
        f"{printable(label)} was read into the process's own memory instead of being mapped: reads of the file are "
        "recorded, faults and page cache of what was read are not to be had"
    )
