"""What debug information says of ggml's structures: DWARF or BTF, in a library or in the file that was split off it.

Few builds that people run have any. What is read is another's file, so it is read within bounds, and whatever is wrong
with it is no more than no description.

DWARF: dwarfstd.org, version 5, chapters 5.7 and 5.8. BTF in an ELF file: section ``.BTF``, as pahole(1) and gcc's
``-gbtf`` put it there. Split files: ``/usr/lib/debug/.build-id``, gdb's manual, "Separate Debug Files".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.die import DIE
from elftools.elf.elffile import ELFFile

from llmtraced import elf
from llmtraced.errors import LlmtracedError
from llmtraced.ggml_layout import Layout
from llmtraced.probes.btf import Btf

__all__ = ["SPLIT", "described"]

log = logging.getLogger(__name__)

SPLIT: Final = Path("/usr/lib/debug/.build-id")
"""Where distributions put the debug information of stripped files."""

_UNITS: Final = ("ggml-cpu.c", "ggml.c")  # in C, and with ggml-impl.h: they have both structures and all operators
_MOST_BYTES: Final = 64 << 20
_MOST_UNITS: Final = 4096
_MOST_ENTRIES: Final = 1 << 16
_TENSOR: Final = ("op", "ne", "nb", "src", "data", "name")
_GRAPH: Final = ("n_nodes", "nodes")
_OPS: Final = ("mul_mat", "mul_mat_id")


def described(library: str) -> tuple[Layout, str] | None:
    """Return the layout that a library's debug information describes, and what that is; None: it has none of it.

    Args:
        library: the file with ggml's CPU part.
    """
    files = [library]
    if build := elf.build_id(library):
        files.append(str(SPLIT / build[:2] / f"{build[2:]}.debug"))
    for file in files:
        try:
            found = _of_file(file)
        except OSError:
            continue
        except Exception as error:  # a file made by others, and a reader that trusts it
            log.info("debug information of %s is not understood: %r", file, error)
            continue
        if found:
            return found
    return None


def _of_file(path: str) -> tuple[Layout, str] | None:
    with Path(path).open("rb") as stream:
        file = elf.opened(stream)
        sections = [s for s in file.iter_sections() if s.name.startswith(".debug_") or s.name == ".BTF"]
        if sum(s.data_size for s in sections) > _MOST_BYTES:
            log.info("debug information of %s is larger than %d MB: not read", path, _MOST_BYTES >> 20)
            return None
        if any(s.name == ".debug_info" for s in sections) and (layout := _by_dwarf(file)):
            return layout, "DWARF"
        if (section := file.get_section_by_name(".BTF")) and (layout := _by_btf(section.data())):
            return layout, "BTF"
    return None


def _layout(tensor: Mapping[str, int], graph: Mapping[str, int], ops: Mapping[str, int]) -> Layout | None:
    try:
        fields = {f"tensor_{name}": tensor[name] for name in _TENSOR} | {
            f"graph_{name}": graph[name] for name in _GRAPH
        }
        return Layout(**fields, **{f"op_{op}": ops[f"GGML_OP_{op.upper()}"] for op in _OPS})
    except KeyError:
        return None


def _by_dwarf(file: ELFFile) -> Layout | None:
    for unit in islice(file.get_dwarf_info(follow_links=False).iter_CUs(), _MOST_UNITS):
        if _name(unit.get_top_DIE()).rpartition("/")[2] in _UNITS and (found := _by_unit(unit)):
            return found
    return None


def _by_unit(unit: CompileUnit) -> Layout | None:
    tensor: dict[str, int] = {}
    graph: dict[str, int] = {}
    ops: dict[str, int] = {}
    for entry in islice(unit.get_top_DIE().iter_children(), _MOST_ENTRIES):
        if entry.tag == "DW_TAG_structure_type" and _name(entry) == "ggml_tensor":
            tensor = tensor or _members(entry, "DW_AT_data_member_location")
        elif entry.tag == "DW_TAG_structure_type" and _name(entry) == "ggml_cgraph":
            graph = graph or _members(entry, "DW_AT_data_member_location")
        elif entry.tag == "DW_TAG_enumeration_type" and _name(entry) == "ggml_op":
            ops = ops or _members(entry, "DW_AT_const_value")
        if tensor and graph and ops:
            return _layout(tensor, graph, ops)
    return None


def _name(entry: DIE) -> str:
    name = entry.attributes.get("DW_AT_name")
    return name.value.decode(errors="replace") if name else ""


def _members(entry: DIE, attribute: str) -> dict[str, int]:
    children = islice(entry.iter_children(), _MOST_ENTRIES)
    return {_name(c): int(c.attributes[attribute].value) for c in children if attribute in c.attributes}


def _by_btf(data: bytes) -> Layout | None:
    try:
        types = Btf(data)
        return _layout(types.fields("ggml_tensor"), types.fields("ggml_cgraph"), types.enum("ggml_op"))
    except (KeyError, LlmtracedError):
        return None
