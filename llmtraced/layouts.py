"""The layout of ggml's structures in one build: kept from an earlier process, described, or derived; always checked.

A build is told by its build id, so what was found once need not be searched again. But neither what was kept nor what
debug information says is believed before the process's own graph, read with it, has the model's weights in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Final

from llmtraced import elf, kept
from llmtraced.debug_info import described
from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import Layout, Reader, Weights, derive, verify

__all__ = ["KEPT", "MEMORY", "find", "foreseen", "kept_layout", "kept_path"]

log = logging.getLogger(__name__)

KEPT: Final = "kept"
MEMORY: Final = "memory"
_SUFFIX: Final = ".layout"
_MOST: Final = 256  # builds


def find(read: Reader, graph: int, weights: Weights, library: str) -> tuple[Layout, str]:
    """Return the layout by which a live graph has the model's weights in it, and where it is from.

    That is :data:`KEPT`, ``DWARF``, ``BTF`` or :data:`MEMORY`.

    Args:
        read: the process's memory.
        graph: address of the ``ggml_cgraph`` that is being, or was just, evaluated.
        weights: by name, from the GGUF.
        library: the file with ggml's CPU part.

    Raises:
        LlmtracedError: no layout explains what is there, or debug information and memory contradict each other.
        OSError: the memory is gone.
    """
    before = kept_layout(library)
    if before and _fits(read, graph, before, weights, KEPT):
        return before, KEPT
    told = described(library)
    if told and _fits(read, graph, told[0], weights, told[1]):
        _keep(library, told[0])
        return told
    layout = derive(read, graph, weights)
    if told and (unlike := ", ".join(_unlike(told[0], layout))):
        what = f"its {told[1]} and its memory contradict each other ({unlike})"
        raise LlmtracedError(f"cannot read this build's compute graph: {what}", UNSUPPORTED)
    _keep(library, layout)
    return layout, MEMORY


def _fits(read: Reader, graph: int, layout: Layout, weights: Weights, source: str) -> bool:
    try:
        verify(read, graph, layout, weights)
    except (LlmtracedError, OSError) as error:  # a wrong one leads anywhere
        log.info("the layout from %s is not that of this process: %s", source, error)
        return False
    return True


def foreseen(library: str) -> str:
    """Return where :func:`find` will look first: :data:`KEPT`, ``DWARF``, ``BTF`` or :data:`MEMORY`."""
    if kept_layout(library):
        return KEPT
    told = described(library)
    return told[1] if told else MEMORY


def _unlike(told: Layout, derived: Layout) -> Iterator[str]:
    for name, value in asdict(derived).items():
        if value != getattr(told, name) and not (name == "op_mul_mat_id" and value == 0):
            yield f"{name} {getattr(told, name)}, and {value}"


def kept_path(library: str) -> Path | None:
    """Return where a build's layout is kept; None: it has no build id."""
    build = elf.build_id(library)
    return kept.folder() / "layouts" / f"{build}{_SUFFIX}" if build else None


def kept_layout(library: str) -> Layout | None:
    """Return what is kept of a build; None: nothing that can be read."""
    path = kept_path(library)
    try:
        found = json.loads(kept.read(path) or b"null") if path else None
    except ValueError:
        return None
    names = [field.name for field in fields(Layout)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        return None
    return Layout(**found) if all(type(value) is int and 0 <= value < 4096 for value in found.values()) else None


def _keep(library: str, layout: Layout) -> None:
    if (path := kept_path(library)) is None:
        return
    try:
        kept.write(path, json.dumps(asdict(layout)).encode(), most=_MOST)
    except OSError as error:
        log.info("the layout is not kept for the next time (%s)", error)
