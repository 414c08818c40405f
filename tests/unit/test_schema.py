"""The format's one source agrees with the C sources and with the contract of the trace's tables."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from llmtraced import schema
from llmtraced.probes import loader, shared
from llmtraced.schema import EVENT, TABLES

WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s32": 4, "s64": 8}
PREFIXES = {
    "KIND": schema.Kind,
    "PROBE": schema.Probe,
    "PHASE": schema.Phase,
    "CAUSE": schema.Cause,
    "OUTCOME": schema.Outcome,
    "DETAIL": schema.Detail,
}


def defines() -> dict[str, int]:
    lines = schema.c_header().splitlines()
    found = [re.fullmatch(r"#define ([A-Z]\w*) (\d+)", line) for line in lines]
    assert all(found), "nothing but #define lines"
    names = [m[1] for m in found if m]
    assert [n for n, times in Counter(names).items() if times > 1] == []
    return {m[1]: int(m[2]) for m in found if m}


def struct(name: str) -> list[tuple[str, int, int]]:
    """Return (field, width, elements) of a C struct of bpf/, in order."""
    text = "".join((loader.bpf_folder() / file).read_text() for file in ("common.h", "ggml.bpf.c"))
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
    assert body, f"bpf/ has no struct {name}"
    found = []
    for declaration in body[1].split(";"):
        if not declaration.strip():
            continue
        kind, _, fields = declaration.strip().removeprefix("struct ").partition(" ")
        width = WIDTHS.get(kind) or sum(width * n for _, width, n in struct(kind))
        for field in fields.split(","):
            parts = re.fullmatch(r"\s*(\w+)(?:\[(\w+)\])?\s*", field)
            assert parts, field
            count = parts[2] or "1"
            number = int(count) if count.isdigit() else (defines() | {"LT_OPS": shared.OP_RECORDS})[count]
            found.append((parts[1], width, number))
    return found


def fields(dtype: np.dtype) -> list[tuple[str, int, int]]:  # type: ignore[type-arg]
    assert dtype.names
    kinds = [dtype[name].subdtype or (dtype[name], (1,)) for name in dtype.names]
    return [(n, kind.itemsize, shape[0]) for n, (kind, shape) in zip(dtype.names, kinds, strict=True)]


def test_event_is_the_ring_s_header_and_struct_event() -> None:
    assert EVENT.itemsize == 64
    assert fields(EVENT)[:2] == [("header", 4, 1), ("pgoff", 4, 1)]
    assert fields(EVENT)[2:] == struct("event")
    assert all(EVENT[n].kind == "u" and EVENT[n].byteorder in "<=|" for n in EVENT.names or ())
    offsets = [EVENT.fields[n][1] for n in EVENT.names or ()]  # type: ignore[index]
    widths = [EVENT[n].itemsize for n in EVENT.names or ()]
    assert all(offset % width == 0 for offset, width in zip(offsets, widths, strict=True)), "C would pad"
    assert offsets == np.cumsum([0, *widths[:-1]]).tolist()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (shared.SLOT, "slot"),
        (shared.RANGE, "model_range"),
        (shared.FILE, "model_file"),
        (shared.COUNTER, "counter"),
        (shared.ACCOUNT, "account"),
        (shared.OP, "op"),
        (shared.OP_RECORD, "op_record"),
    ],
)
def test_shared_arrays_mirror_their_structs(dtype: np.dtype, name: str) -> None:  # type: ignore[type-arg]
    assert fields(dtype) == struct(name)
    assert dtype.itemsize == sum(width * n for _, width, n in struct(name))
    assert dtype.itemsize % 8 == 0, "the kernel would pad"
    assert all(offset % dtype[n].base.itemsize == 0 for n, (_, offset, *_) in dtype.fields.items()), (  # type: ignore[union-attr]
        "C would pad"
    )


def test_what_programs_touch_at_each_event_is_in_one_line() -> None:
    assert shared.OP.fields["records"][1] == 64  # type: ignore[index]
    assert shared.OP_RECORD.itemsize == EVENT.itemsize == 64
    assert shared.SLOT.itemsize % 64 == 0
    offsets = {name: field[1] for name, field in shared.SLOT.fields.items()}  # type: ignore[union-attr]
    first = (
        "token",
        "window",
        "phase",
        "epoch",
        "process",
        "detail",
        "layout",
        "op_mul_mat",
        "tensor_op",
        "tensor_src",
    )
    assert all(offsets[name] < 64 for name in first)
    assert {offsets[name] // 64 for name in ("in_fault", "stall_since", "stall_ns", "graph_start")} == {1}


@pytest.mark.parametrize("done", [0, 1, shared.OP_RECORDS])
def test_operators_that_wait_are_records_of_the_ring(done: int) -> None:
    ops = np.zeros(2, shared.OP)
    ops["done"][1] = done
    events = np.zeros(shared.OP_RECORDS, EVENT)
    events["ts"], events["d"], events["mark"] = np.arange(16) + 1, np.arange(16) << 40, 0x21
    ops["records"]["event"][1] = events.view(np.uint8).reshape(-1, 64)[:, 8:].copy().view("V56").reshape(-1)
    assert (shared.op_events(ops[1]) == events[:done]).all()
    assert len(shared.op_events(ops[1])) == done


def test_plain_arrays_are_u64() -> None:
    text = (loader.bpf_folder() / "common.h").read_text()
    for name in ("bounds", "seen", "config"):
        assert re.search(rf'BPF_F_TABLE\("array", u32, u64, {name}, \w+, BPF_F_MMAPABLE\)', text)
    assert shared.BOUND == shared.CONFIG == np.dtype("<u8")


def test_c_header_has_each_member_once() -> None:
    found = defines()
    for prefix, enum in PREFIXES.items():
        expected = {f"{prefix}_{m.name}": m.value for m in enum} | {f"{prefix}_COUNT": len(enum)}
        assert {n: v for n, v in found.items() if n.startswith(prefix + "_")} == expected
        assert [m.value for m in enum] == list(range(len(enum))), "codes index arrays and tuples of names"
    assert found["LT_SLOTS"] == schema.SLOTS
    assert found["LT_EPOCHS"] == schema.EPOCHS
    assert {n.split("_")[0] for n in found} == {*PREFIXES, "LT"}


def test_every_code_that_c_uses_is_defined() -> None:
    names = set(re.findall(rf"\b(?:{'|'.join(PREFIXES)})_[A-Z_]+\b", loader.source()))
    assert names <= set(defines())


def test_marks_have_room() -> None:
    """Phase and epoch share a byte, slots have one, and epochs wrap by a mask."""
    assert len(schema.Phase) <= 16
    assert schema.EPOCHS <= 16
    assert schema.EPOCHS & (schema.EPOCHS - 1) == 0
    assert schema.SLOTS <= 256
    assert tuple(p.name.lower() for p in schema.Phase) == schema.PHASES
    assert tuple(c.name.lower() for c in schema.Cause) == schema.CAUSES


CONTRACT = {
    "tensors": "tensor_name offset_bytes size_bytes type layer component shard n_experts expert_bytes",
    "tokens": "token start_ns end_ns n_tokens phase stall_ns",
    "ops": "timestamp token tensor_name data_ptr bytes_accessed op thread duration_ns",
    "faults": "timestamp token thread address offset_bytes tensor_name expert major latency_ns",
    "pagecache": "timestamp token action offset_bytes bytes tensor_name expert cause pid comm",
    "routing": "timestamp token layer experts position",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_tables_keep_the_contract(name: str) -> None:
    columns = TABLES[name].names
    promised = CONTRACT[name].split()
    assert [c for c in columns if c in promised] == promised
    assert len(set(columns)) == len(columns)


def test_types() -> None:
    for table in TABLES.values():
        for field in table:
            if field.name.endswith(("_ns", "_bytes")) or field.name in ("timestamp", "bytes", "address", "data_ptr"):
                assert field.type == pa.int64(), field
    assert TABLES["faults"].field("major").type == pa.bool_()
    assert TABLES["routing"].field("experts").type == pa.list_(pa.int32())
    assert {str(TABLES[t].field("token").type) for t in CONTRACT if t != "tensors"} == {"int32"}
