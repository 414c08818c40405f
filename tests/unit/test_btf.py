"""Reading BTF: a small one made by hand, the running kernel's, and what is not one."""

import struct
from pathlib import Path

import pytest

from llmtraced.errors import LlmtracedError
from llmtraced.probes.btf import VMLINUX, Btf, kernel_layout, running


class Types:
    """Put BTF together, type by type; numbers begin at 1."""

    def __init__(self) -> None:
        self.types, self.strings, self.count = b"", b"\0", 0

    def name(self, name: str) -> int:
        if not name:
            return 0
        offset = len(self.strings)
        self.strings += name.encode() + b"\0"
        return offset

    def add(self, kind: int, name: str, rest: int, extra: bytes = b"", n: int = 0, flag: bool = False) -> int:
        self.types += struct.pack("<III", self.name(name), kind << 24 | n | flag << 31, rest) + extra
        self.count += 1
        return self.count

    def struct(self, name: str, fields: list[tuple[str, int, int]], kind: int = 4, flag: bool = False) -> int:
        members = b"".join(struct.pack("<III", self.name(field), of, bits) for field, of, bits in fields)
        return self.add(kind, name, 64, members, len(fields), flag)

    def data(self) -> bytes:
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return head + self.types + self.strings


def kernel(folio: str = "folio", order: str = "_flags_1") -> Types:
    t = Types()
    word = t.add(1, "unsigned long", 8, struct.pack("<I", 64))
    t.add(6, "pageflags", 4, struct.pack("<IiIi", t.name("PG_locked"), 0, t.name("PG_head"), 5), 2)
    inner = t.struct("", [("mapping", word, 0), ("index", word, 64)])
    union = t.struct("", [("", inner, 0), ("pp", word, 0)], kind=5)
    qualified = t.add(10, "", union)
    page = t.struct(folio, [("flags", word, 0), ("", qualified, 192), (order, word, 512)], flag=True)
    t.struct("address_space", [("host", word, 0)])
    t.struct("inode", [("i_sb", word, 40 * 8), ("i_ino", word, 64 * 8), ("i_size", word, 80 * 8)])
    t.struct("file", [("f_mapping", word, 24 * 8)])
    t.struct("kiocb", [("ki_filp", word, 0), ("ki_pos", word, 8 * 8)])
    t.struct("iov_iter", [("count", word, 24 * 8)])
    t.struct("super_block", [("s_dev", word, 16 * 8)])
    pointer = t.add(2, "", t.add(10, "", page))
    proto = t.add(13, "", 0, struct.pack("<IIII", 0, pointer, 0, pointer), 2)
    t.add(8, "btf_trace_mm_filemap_add_to_page_cache", t.add(2, "", proto))
    return t


def test_fields_of_anonymous_members_behind_qualifiers() -> None:
    layout = kernel_layout(Btf(kernel().data()))
    assert layout == {
        "LT_FOLIO_FLAGS": 0,
        "LT_FOLIO_MAPPING": 24,
        "LT_FOLIO_INDEX": 32,
        "LT_MAPPING_HOST": 0,
        "LT_INODE_INO": 64,
        "LT_INODE_SB": 40,
        "LT_INODE_SIZE": 80,
        "LT_SB_DEV": 16,
        "LT_KIOCB_FILE": 0,
        "LT_KIOCB_POS": 8,
        "LT_FILE_MAPPING": 24,
        "LT_ITER_COUNT": 24,
        "LT_PG_HEAD": 5,
        "LT_FOLIO_ORDER": 64,
    }


def test_a_kernel_with_an_order_of_its_own() -> None:
    assert kernel_layout(Btf(kernel(order="_folio_order").data()))["LT_FOLIO_ORDER"] == 64


def test_a_kernel_from_before_folios_has_single_pages() -> None:
    layout = kernel_layout(Btf(kernel(folio="page").data()))
    assert "LT_FOLIO_ORDER" not in layout
    assert layout["LT_FOLIO_MAPPING"] == 24


def test_what_is_missing_is_named() -> None:
    with pytest.raises(LlmtracedError, match="'_flags_1'"):
        kernel_layout(Btf(kernel(order="gone").data()))
    with pytest.raises(LlmtracedError, match="btf_trace_mm_filemap_add_to_page_cache"):
        kernel_layout(Btf(Types().data()))


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb\1", b"x" * 100, kernel().data()[:200]])
def test_what_is_not_btf(data: bytes) -> None:
    with pytest.raises(LlmtracedError, match="cannot be read"):
        Btf(data)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LlmtracedError, match="CONFIG_DEBUG_INFO_BTF"):
        running(tmp_path / "vmlinux")


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel does not describe itself: CONFIG_DEBUG_INFO_BTF=y")
def test_the_running_kernel() -> None:
    btf = Btf(VMLINUX.read_bytes())
    assert btf.fields("super_block")["s_dev"] == 16, "after two pointers of s_list, in every kernel since 2.6"
    assert btf.tracepoint("page_fault_user")[0] == ""
    assert kernel_layout(running())["LT_FOLIO_FLAGS"] == 0, "flags come first in every kernel since 2.6"
    assert btf.tracepoint_type("mm_filemap_add_to_page_cache") > 0
