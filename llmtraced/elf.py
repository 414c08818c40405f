"""Build ids and symbols of ELF files; both tables at once, as arrays: a large binary has 10^5 of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

__all__ = ["build_id", "functions", "opened"]

_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_STT_FUNC = 2
_MOST = 4096  # sections, or segments: a file may say that it has 2^64


def functions(path: str, *prefixes: bytes) -> dict[str, int]:
    """Return the defined functions of an ELF file whose names begin with a prefix, and their offsets in the file.

    Raises:
        ELFError, OSError, ValueError: not an ELF file, unreadable or malformed.
    """
    found: dict[str, int] = {}
    with open(path, "rb") as stream:  # noqa: PTH123  a path in /proc
        elf = opened(stream)
        segments = [(s["p_vaddr"], s["p_filesz"], s["p_offset"]) for s in elf.iter_segments("PT_LOAD")]
        for name, value in _symbols(elf, prefixes):
            for address, size, offset in segments:
                if address <= value < address + size:
                    found.setdefault(name, value - address + offset)
    return found


def build_id(path: str) -> str:
    """Return an ELF file's build id, hexadecimal digits; empty: it has none, or cannot be read."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123  a path in /proc
            for segment in opened(stream).iter_segments("PT_NOTE"):
                for note in segment.iter_notes():
                    if note["n_type"] == "NT_GNU_BUILD_ID" and re.fullmatch("[0-9a-f]{8,}", note["n_desc"]):
                        return str(note["n_desc"])
    except (ELFError, OSError, ValueError, KeyError):
        pass
    return ""


def opened(stream: BinaryIO) -> ELFFile:
    """Return a file that is open as one of those that we read.

    Raises:
        ELFError, ValueError: it is none.
    """
    elf = ELFFile(stream)
    if elf.elfclass != 64 or not elf.little_endian:
        raise ELFError("not a 64-bit little-endian file")
    if max(elf.num_sections(), elf.num_segments()) > _MOST:
        raise ELFError("more sections or segments than any library has")
    return elf


def _symbols(elf: ELFFile, prefixes: tuple[bytes, ...]) -> Iterator[tuple[str, int]]:
    """Yield name and value of functions; ``.symtab`` is missing in stripped files, ``.dynsym`` has what is exported."""
    for section in elf.iter_sections():
        if section["sh_type"] not in ("SHT_DYNSYM", "SHT_SYMTAB"):
            continue
        data = section.data()
        table = np.frombuffer(data, _SYMBOL, count=len(data) // _SYMBOL.itemsize)
        strings = elf.get_section(section["sh_link"]).data()
        defined = table[((table["info"] & 15) == _STT_FUNC) & (table["section"] != 0)]
        # Anywhere, not only after a NUL: linkers store a name that ends another one inside it.
        wanted = {m.start() for m in re.finditer(b"|".join(map(re.escape, prefixes)), strings)}
        for symbol in defined[np.isin(defined["name"], np.fromiter(wanted, np.uint32, len(wanted)))]:
            start = int(symbol["name"])
            name = strings[start : strings.index(b"\0", start)].decode("ascii", "replace")
            yield name, int(symbol["value"])
