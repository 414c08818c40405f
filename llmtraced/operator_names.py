"""Names of ``enum ggml_op`` in a process's build, from ggml's own table in its memory.

The table is an array of pointers to strings that begins ``"NONE", "DUP"`` (ggml.c, ``GGML_OP_NAME``). It is looked for
by what is in it and not by its symbol, which is a local one: a stripped build has the same table and no name for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from llmtraced.target import Mapping, Target, maps

__all__ = ["find_table", "operator_names"]

_FIRST: Final = (b"NONE", b"DUP")
_NAME: Final = re.compile(rb"[A-Z][A-Z0-9_]{1,31}\0")
_LIBRARY: Final = re.compile(r"lib(ggml|llama).*\.so.*")
_LONGEST: Final = 33
_MOST: Final = 1024
_MOST_BYTES: Final = 64 << 20


def operator_names(target: Target, read: Callable[[int, int], bytes]) -> dict[int, str]:
    """Return the names of the operators.

    Args:
        target: the process.
        read: its memory: (address, length) → bytes.

    Returns:
        Value → name in lower case, such as 29 → ``mul_mat``; empty where there is no such table.
    """
    program = os.path.realpath(f"/proc/{target.pid}/exe")
    files: dict[str, list[Mapping]] = {}
    for mapping in maps(target.pid):
        name = Path(mapping.path).name
        if mapping.path == program or _LIBRARY.fullmatch(name):  # never a model: its pages would be brought in
            files.setdefault(mapping.path, []).append(mapping)
    for path in sorted(files, key=lambda path: "ggml" not in Path(path).name):
        pieces = []
        for mapping in files[path]:
            if mapping.end - mapping.start <= _MOST_BYTES:
                with contextlib.suppress(OSError):
                    pieces.append((mapping.start, read(mapping.start, mapping.end - mapping.start)))
        found = find_table(pieces)
        if found:
            return found
    return {}


def find_table(pieces: Sequence[tuple[int, bytes]]) -> dict[int, str]:
    """Return the names in the table that is in some stretches of memory: (address, content); empty if there is none."""
    for start, content in pieces:
        for first in re.finditer(rb"NONE\0", content):
            pointer = struct.pack("<Q", start + first.start())
            for _, other in pieces:
                at = other.find(pointer)
                while at >= 0:
                    names = _names(pieces, other, at) if at % 8 == 0 else []
                    if tuple(names[:2]) == _FIRST:
                        return {number: name.decode().lower() for number, name in enumerate(names)}
                    at = other.find(pointer, at + 1)
    return {}


def _names(pieces: Sequence[tuple[int, bytes]], table: bytes, at: int) -> list[bytes]:
    """Return the strings that pointers from ``at`` on lead to, until one is no name."""
    names: list[bytes] = []
    for (pointer,) in struct.iter_unpack("<Q", table[at : at + (len(table) - at) // 8 * 8]):
        found = next((c[pointer - s : pointer - s + _LONGEST] for s, c in pieces if s <= pointer < s + len(c)), b"")
        name = _NAME.match(found)
        if name is None or len(names) >= _MOST:
            break
        names.append(name[0][:-1])
    return names
