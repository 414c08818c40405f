"""Layouts of builds: kept, described by debug information of real compilers, derived; and none believed unchecked."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from elftools.common.exceptions import ELFError
from fake_ggml import MUL_MAT, MUL_MAT_ID, PLACES, SHAPES, Memory, Offsets, head, known, moe
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced import debug_info, layouts
from llmtraced.debug_info import described
from llmtraced.elf import build_id, functions
from llmtraced.errors import LlmtracedError
from llmtraced.ggml_layout import Layout, derive, verify

NOW = Offsets()
SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
enum ggml_op { GGML_OP_NONE, GGML_OP_MUL_MAT = %(mul_mat)d, GGML_OP_MUL_MAT_ID = %(mul_mat_id)d, GGML_OP_COUNT };
struct ggml_tensor {
    int type; void *buffer; %(before_ne)s int64_t ne[4]; size_t nb[4]; enum ggml_op op; int32_t op_params[16];
    int32_t flags; struct ggml_tensor *src[10]; struct ggml_tensor *view_src; size_t view_offs; void *data;
    char name[64]; void *extra; char padding[8];
};
struct ggml_cgraph { int size, n_nodes, n_leafs; struct ggml_tensor **nodes, **grads; };
int %(function)s(struct ggml_cgraph *graph) { return graph->nodes[0]->op == GGML_OP_MUL_MAT; }
"""
DWARF = (["-g"], ["-g", "-gdwarf-4"], ["-g", "-gz"])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(debug_info, "SPLIT", tmp_path / "split")
    return tmp_path / "cache"


Library = Callable[..., str]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Compile a library with ggml's structures in it."""

    def build(*options: str, name: str = "ggml-cpu.c", before_ne: str = "", **ops: int) -> str:
        code = {"mul_mat": MUL_MAT, "mul_mat_id": MUL_MAT_ID, "before_ne": before_ne, "function": "ggml_f"} | ops
        source, made = tmp_path / name, tmp_path / "libggml-cpu.so"
        source.write_text(SOURCE % code)
        flags = ["-shared", "-fPIC", "-Wl,--build-id", *options]
        subprocess.run(["gcc", *flags, "-o", str(made), str(source)], check=True)
        return str(made)

    return build


@pytest.mark.parametrize("options", DWARF, ids=" ".join)
def test_dwarf_describes_the_layout(library: Library, options: list[str]) -> None:
    assert described(library(*options)) == (NOW.layout(), "DWARF")


def test_btf_describes_the_layout(library: Library) -> None:
    assert described(library("-gbtf")) == (NOW.layout(), "BTF")


def test_another_declaration_is_another_layout(library: Library) -> None:
    shifted = NOW.shifted("ne", 8).layout()
    expected = replace(shifted, op_mul_mat=31, op_mul_mat_id=33)
    assert described(library("-g", before_ne="void *more;", mul_mat=31, mul_mat_id=33)) == (expected, "DWARF")


def test_a_build_without_debug_information_has_no_description(library: Library) -> None:
    assert described(library()) is None


def test_a_unit_that_is_not_ggmls_describes_nothing(library: Library) -> None:
    assert described(library("-g", name="other.c")) is None


def test_debug_information_that_was_split_off_is_found_by_the_build_id(library: Library, tmp_path: Path) -> None:
    path = library("-g")
    build = build_id(path)
    split = tmp_path / "split" / build[:2] / f"{build[2:]}.debug"
    split.parent.mkdir(parents=True)
    subprocess.run(["objcopy", "--only-keep-debug", path, str(split)], check=True)
    subprocess.run(["strip", "--strip-all", path], check=True)
    assert described(path) == (NOW.layout(), "DWARF")
    split.unlink()
    assert described(path) is None


def test_what_is_too_large_is_not_read(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library("-g")
    monkeypatch.setattr(debug_info, "_MOST_BYTES", 100)
    assert described(path) is None


@given(at=st.integers(64, 20_000), byte=st.integers(0, 255), cut=st.integers(0, 20_000) | st.none())
@settings(max_examples=200, deadline=None)
def test_damaged_files_are_no_error(damaged: tuple[bytes, Path], at: int, byte: int, cut: int | None) -> None:
    whole, path = damaged
    data = bytearray(whole)
    data[at % len(data)] = byte
    path.write_bytes(data[:cut])
    found = described(str(path))
    assert found is None or isinstance(found[0], Layout)
    assert isinstance(build_id(str(path)), str)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    source = folder / "ggml-cpu.c"
    source.write_text(SOURCE % {"mul_mat": 1, "mul_mat_id": 2, "before_ne": "", "function": "f"})
    subprocess.run(["gcc", "-g", "-shared", "-Wl,--build-id", "-o", str(folder / "whole"), str(source)], check=True)
    return (folder / "whole").read_bytes(), folder / "damaged"


@pytest.mark.parametrize(("count", "section", "at", "field"), [(0x3C, 0, 0x20, "<Q"), (0x38, 0xFFFF, 0x2C, "<I")])
def test_a_file_that_claims_to_have_no_end_is_not_read(
    library: Library, count: int, section: int, at: int, field: str
) -> None:
    """Of sections, and of segments: where the header's count is a mark, section 0 has the number (elf(5))."""
    path = Path(library("-g"))
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 0x28)
    struct.pack_into("<H", data, count, section)
    struct.pack_into(field, data, table + at, (1 << 32) - 1)
    path.write_bytes(data)
    with pytest.raises(ELFError, match="more sections or segments"):
        functions(str(path), b"ggml_")
    assert build_id(str(path)) == ""
    assert described(str(path)) is None


def test_a_build_id_is_read_and_is_that_of_the_linker(library: Library, tmp_path: Path) -> None:
    path = library()
    told = subprocess.run(["readelf", "-n", path], check=True, capture_output=True, text=True).stdout
    assert build_id(path)
    assert f"Build ID: {build_id(path)}\n" in told
    assert build_id(str(tmp_path / "nothing")) == ""
    assert build_id(library("-Wl,--build-id=none")) == ""


# --- which one is taken ---------------------------------------------------------------------------------------------


def _find(memory: Memory, path: str, graph: int | None = None) -> tuple[Layout, str]:
    return layouts.find(memory.read, moe(memory) if graph is None else graph, known(), path)


def test_what_was_derived_is_kept_for_the_next_process(library: Library) -> None:
    path = library()
    assert layouts.foreseen(path) == "memory"
    assert _find(Memory(), path) == (NOW.layout(), "memory")
    assert layouts.foreseen(path) == "kept"
    assert _find(Memory(), path) == (NOW.layout(), "kept")


def test_what_is_described_is_taken_and_kept(library: Library) -> None:
    path = library("-g")
    assert layouts.foreseen(path) == "DWARF"
    assert _find(Memory(), path) == (NOW.layout(), "DWARF")
    assert _find(Memory(), path) == (NOW.layout(), "kept")


def test_what_is_described_is_taken_where_what_was_kept_does_not_fit(library: Library) -> None:
    path = library("-g")
    _find(Memory(), path)
    kept = layouts.kept_path(path)
    assert kept
    kept.write_text(json.dumps(asdict(replace(NOW.layout(), tensor_src=160))))
    assert _find(Memory(), path) == (NOW.layout(), "DWARF")


def test_a_build_without_an_id_is_derived_each_time(library: Library, cache: Path) -> None:
    path = library("-Wl,--build-id=none")
    for _ in range(2):
        assert _find(Memory(), path) == (NOW.layout(), "memory")
    assert not cache.exists()


def test_a_kept_layout_that_is_not_the_processs_is_found_anew(library: Library) -> None:
    path = library()
    _find(Memory(), path)
    other = NOW.shifted("src", 8)
    assert _find(Memory(other), path) == (other.layout(), "memory")
    assert _find(Memory(other), path) == (other.layout(), "kept")


def test_a_kept_layout_that_leads_where_nothing_is_is_found_anew(library: Library) -> None:
    path, memory = library(), Memory()
    graph = moe(memory)
    _find(memory, path, graph)
    kept = layouts.kept_path(path)
    assert kept
    wrong = replace(NOW.layout(), graph_nodes=0)  # numbers, where a pointer should be
    with pytest.raises(OSError, match="bad address"):
        verify(memory.read, graph, wrong, known())
    kept.write_text(json.dumps(asdict(wrong)))
    assert _find(memory, path, graph) == (NOW.layout(), "memory")
    assert layouts.kept_layout(path) == NOW.layout()


def test_a_description_that_memory_contradicts_is_refused_and_says_where(library: Library, cache: Path) -> None:
    path = library("-g", before_ne="void *more;")
    with pytest.raises(
        LlmtracedError, match=r"its DWARF and its memory contradict each other \(.*tensor_ne 24, and 16"
    ):
        _find(Memory(), path)
    assert not cache.exists()


def test_operators_numbers_that_memory_contradicts_are_refused(library: Library) -> None:
    with pytest.raises(LlmtracedError, match=rf"\(op_mul_mat 3, and {MUL_MAT}\)"):
        _find(Memory(), library("-g", mul_mat=3))


def test_of_a_dense_model_the_number_of_mul_mat_id_is_learnt_later(library: Library) -> None:
    path, memory = library(), Memory()
    graph = moe(memory)
    dense = {n: w for n, w in known().items() if "_exps" not in n}
    assert layouts.find(memory.read, graph, dense, path)[0].op_mul_mat_id == 0
    assert _find(memory, path, graph) == (NOW.layout(), "memory")
    assert layouts.find(memory.read, graph, dense, path) == (NOW.layout(), "kept")


def test_a_description_serves_a_dense_model(library: Library) -> None:
    memory = Memory()
    graph = moe(memory)
    dense = {n: w for n, w in known().items() if "_exps" not in n}
    assert layouts.find(memory.read, graph, dense, library("-g")) == (NOW.layout(), "DWARF")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"tensor_ne": 16}', b"\xff\xfe", b'{"op_mul_mat": 1, "more": 2}', b"9" * 5000],
)
def test_a_damaged_kept_file_is_made_again(library: Library, content: bytes) -> None:
    path = library()
    _find(Memory(), path)
    kept = layouts.kept_path(path)
    assert kept
    kept.write_bytes(content)
    assert _find(Memory(), path) == (NOW.layout(), "memory")
    assert layouts.kept_layout(path) == NOW.layout()


@pytest.mark.parametrize("value", [-1, 4096, 1.5, None, True, "8"])
def test_values_out_of_range_are_not_taken(library: Library, value: object) -> None:
    path = library()
    _find(Memory(), path)
    kept = layouts.kept_path(path)
    assert kept
    kept.write_text(json.dumps(asdict(NOW.layout()) | {"tensor_ne": value}))
    assert layouts.kept_layout(path) is None


def test_no_place_to_keep_it_is_no_error(library: Library, cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    assert _find(Memory(), library()) == (NOW.layout(), "memory")


# --- the check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", Layout.__dataclass_fields__)
@pytest.mark.parametrize("by", [16, -8])  # in the graph that is made here, its nodes are there a second time, 8 further
def test_a_layout_with_one_field_elsewhere_is_refused(field: str, by: int) -> None:
    memory = Memory()
    graph = moe(memory)
    right = derive(memory.read, graph, known())
    verify(memory.read, graph, right, known())
    wrong = replace(right, **{field: max(getattr(right, field) + by, 0)})
    with pytest.raises((LlmtracedError, OSError)):
        verify(memory.read, graph, wrong, known())


def test_a_model_that_is_not_mapped_is_checked_by_its_bytes() -> None:
    memory = Memory()
    graph = moe(memory)
    memory.blocks = {PLACES[name]: bytearray(head(name)) for name in SHAPES}
    verify(memory.read, graph, NOW.layout(), known(mapped=False))
    memory.blocks = {PLACES[name]: bytearray(b"else" * 16) for name in SHAPES}
    with pytest.raises(LlmtracedError, match="data"):
        verify(memory.read, graph, NOW.layout(), known(mapped=False))


def test_what_is_in_the_tests_is_there() -> None:
    assert shutil.which("gcc")
    assert shutil.which("objcopy")
