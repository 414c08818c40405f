"""Where the fields lie that the programs read from the kernel: its own description of its types, BTF.

The layout of BTF: Documentation/bpf/btf.rst and include/uapi/linux/btf.h of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError

__all__ = ["VMLINUX", "Btf", "kernel_layout", "running"]

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")

_MAGIC: Final = 0xEB9F
_PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _FUNC_PROTO = 2, 3, 4, 5, 6, 8, 13
_QUALIFIERS: Final = frozenset({_TYPEDEF, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
# What follows a type's 12 bytes: (fixed, for each of its members), by kind.
_SIZES: Final = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12),
                 17: (4, 0), 19: (0, 12)}  # fmt: skip


class Btf:
    """The types of a kernel.

    Args:
        data: the content of ``/sys/kernel/btf/vmlinux``.

    Raises:
        LlmtracedError: it is not BTF.
    """

    def __init__(self, data: bytes) -> None:
        try:
            magic, _, _, header, types, length, strings, size = struct.unpack_from("<HBBIIIII", data)
        except struct.error:
            magic = 0
        if magic != _MAGIC or max(header + types + length, header + strings + size) > len(data):
            raise LlmtracedError("the kernel's type information (BTF) cannot be read", UNSUPPORTED)
        self._data, self._strings = data, header + strings
        self._at = [0]  # where each type begins, by number; 0 is void
        position, end = header + types, header + types + length
        while position < end:
            self._at.append(position)
            info = struct.unpack_from("<I", data, position + 4)[0]
            fixed, each = _SIZES.get(info >> 24 & 31, (0, 0))
            position += 12 + fixed + each * (info & 0xFFFF)

    def _type(self, number: int) -> tuple[str, int, int, int]:
        """Return name, kind, number of members, and size or type."""
        name, info, rest = struct.unpack_from("<III", self._data, self._at[number])
        return self._name(name), info >> 24 & 31, info & 0xFFFF, rest

    def _name(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode(errors="replace")

    def _find(self, name: str, kind: int) -> int:
        wanted = b"\0" + name.encode() + b"\0"
        offset = self._data.find(wanted, self._strings) + 1 - self._strings
        if offset <= 0:
            raise KeyError(name)
        for number, at in enumerate(self._at):
            if at and struct.unpack_from("<I", self._data, at)[0] == offset and self._type(number)[1] == kind:
                return number
        raise KeyError(name)

    def _plain(self, number: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        while True:
            _, kind, _, rest = self._type(number)
            if kind not in _QUALIFIERS:
                return number
            number = rest

    def _members(self, number: int, base: int = 0) -> Iterator[tuple[str, int]]:
        _, _, count, _ = self._type(number)
        big = struct.unpack_from("<I", self._data, self._at[number] + 4)[0] >> 31
        for i in range(count):
            name, of, bits = struct.unpack_from("<III", self._data, self._at[number] + 12 + 12 * i)
            offset = base + ((bits & 0xFFFFFF) if big else bits) // 8
            inner = self._plain(of) if of else 0
            if name:
                yield self._name(name), offset
            elif inner and self._type(inner)[1] in (_STRUCT, _UNION):
                yield from self._members(inner, offset)

    def fields(self, name: str) -> dict[str, int]:
        """Return the offset in bytes of each field of ``struct name``, those of anonymous members too.

        Raises:
            KeyError: there is no such structure.
        """
        found: dict[str, int] = {}
        for field, offset in self._members(self._find(name, _STRUCT)):
            found.setdefault(field, offset)
        return found

    def enum(self, name: str) -> dict[str, int]:
        """Return the values of ``enum name``.

        Raises:
            KeyError: there is no such enumeration.
        """
        number = self._find(name, _ENUM)
        count = self._type(number)[2]
        pairs = (struct.unpack_from("<Ii", self._data, self._at[number] + 12 + 8 * i) for i in range(count))
        return {self._name(name): value for name, value in pairs}

    def tracepoint_type(self, name: str) -> int:
        """Return the number of the tracepoint's own type, by which a program is loaded for it.

        Raises:
            KeyError: there is no such tracepoint.
        """
        return self._find(f"btf_trace_{name}", _TYPEDEF)

    def tracepoint(self, name: str) -> list[str]:
        """Return what the tracepoint hands over: for each argument the structure it points to, or ``""``.

        Raises:
            KeyError: there is no such tracepoint.
        """
        number = self._plain(self.tracepoint_type(name))
        proto = self._plain(self._type(number)[3])  # a pointer to the probe's prototype
        arguments = []
        for i in range(1, self._type(proto)[2]):  # the first is the probe's own
            of = struct.unpack_from("<II", self._data, self._at[proto] + 12 + 8 * i)[1]
            kind, rest = self._type(self._plain(of))[1::2]
            target = self._type(self._plain(rest)) if kind == _PTR and rest else ("", 0, 0, 0)
            arguments.append(target[0])
        return arguments


def kernel_layout(btf: Btf) -> dict[str, int]:
    """Return the ``LT_*`` constants that bpf/pagecache.bpf.c reads folios, inodes and requests with, offsets in bytes.

    Raises:
        LlmtracedError: this kernel's page cache is of a kind that we do not know.
    """
    try:
        handed = btf.tracepoint("mm_filemap_add_to_page_cache")[0]
        page, inode = btf.fields(handed), btf.fields("inode")
        layout = {
            "LT_FOLIO_FLAGS": page["flags"],
            "LT_FOLIO_MAPPING": page["mapping"],
            "LT_FOLIO_INDEX": page["index"],
            "LT_MAPPING_HOST": btf.fields("address_space")["host"],
            "LT_INODE_INO": inode["i_ino"],
            "LT_INODE_SB": inode["i_sb"],
            "LT_INODE_SIZE": inode["i_size"],
            "LT_SB_DEV": btf.fields("super_block")["s_dev"],
            "LT_KIOCB_FILE": btf.fields("kiocb")["ki_filp"],
            "LT_KIOCB_POS": btf.fields("kiocb")["ki_pos"],
            "LT_FILE_MAPPING": btf.fields("file")["f_mapping"],
            "LT_ITER_COUNT": btf.fields("iov_iter")["count"],
        }
        if handed == "folio":  # its number of pages, a power of two, where flags say that it is more than one
            layout["LT_PG_HEAD"] = btf.enum("pageflags")["PG_head"]
            layout["LT_FOLIO_ORDER"] = page["_folio_order"] if "_folio_order" in page else page["_flags_1"]
    except (KeyError, IndexError) as error:
        problem = f"the kernel's type information (BTF) has no {error}: its page cache is not understood"
        raise LlmtracedError(problem, UNSUPPORTED) from error
    return layout


def running(vmlinux: Path = VMLINUX) -> Btf:
    """Return the types of the running kernel.

    Raises:
        LlmtracedError: it does not describe itself.
    """
    try:
        return Btf(vmlinux.read_bytes())
    except OSError as error:
        raise LlmtracedError(
            f"{vmlinux} cannot be read ({error.strerror}): a kernel with CONFIG_DEBUG_INFO_BTF=y is needed", UNSUPPORTED
        ) from error
