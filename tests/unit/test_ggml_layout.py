"""Field offsets found in made-up memory, or refused; graphs read with them."""

from __future__ import annotations

import os
import random
import struct
from dataclasses import replace

import pytest
from fake_ggml import (
    ARENA,
    GET_ROWS,
    MODEL,
    MUL_MAT,
    MUL_MAT_ID,
    PLACES,
    SEQUENCE,
    SHAPES,
    Memory,
    Offsets,
    head,
    known,
    moe,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import Graph, Layout, Weight, derive, memory_reader, read_graph

NOW = Offsets()
VARIANTS = {
    "as it is": NOW,
    "a pointer before ne": NOW.shifted("ne", 8),
    "16 bytes before ne": NOW.shifted("ne", 16),
    "8 more bytes of op_params": NOW.shifted("flags", 8),
    "a grad pointer before src": NOW.shifted("src", 8),
    "16 bytes before view_src": NOW.shifted("view_src", 16),
    "a pointer before data": NOW.shifted("data", 8),
    "a pointer before name": NOW.shifted("name", 8),
    "no view_offs": NOW.shifted("data", -8),
    "short op_params": Offsets(flags=116, src=120, view_src=200, data=216, name=224, size=304),
    "larger at the end": Offsets(size=400),
}


@pytest.mark.parametrize("offsets", VARIANTS.values(), ids=VARIANTS)
def test_layouts_are_found(offsets: Offsets) -> None:
    memory = Memory(offsets)
    graph = moe(memory)
    assert derive(memory.read, graph, known()) == offsets.layout()


@pytest.mark.parametrize("offsets", list(VARIANTS.values())[:4], ids=list(VARIANTS)[:4])
def test_a_model_that_is_not_mapped_is_told_by_its_bytes(offsets: Offsets) -> None:
    memory = Memory(offsets)
    graph = moe(memory)
    memory.blocks = {PLACES[name]: bytearray(head(name)) for name in SHAPES}
    assert derive(memory.read, graph, known(mapped=False)) == offsets.layout()


def test_what_is_mapped_decides_before_what_is_not() -> None:
    memory = Memory()
    graph = moe(memory, {"blk.0.attn_q.weight": 0x7D00_0000_0000})
    weights = known()
    weights["blk.0.attn_q.weight"] = known(mapped=False)["blk.0.attn_q.weight"]
    assert derive(memory.read, graph, weights) == NOW.layout()


def test_a_dense_model_has_no_mul_mat_id() -> None:
    memory = Memory()
    graph = moe(memory)
    weights = {n: w for n, w in known().items() if "_exps" not in n}
    layout = derive(memory.read, graph, weights)
    assert (layout.op_mul_mat, layout.op_mul_mat_id) == (MUL_MAT, 0)


def test_a_view_of_a_graph_has_size_0() -> None:
    memory = Memory()
    assert derive(memory.read, moe(memory, size=0), known()) == NOW.layout()


def test_a_name_behind_the_buffer_that_all_nodes_share() -> None:
    memory = Memory(buffer=ARENA)
    assert derive(memory.read, moe(memory), known()) == NOW.layout()


def test_repacked_weights_are_read_where_they_are() -> None:
    """Matrices were copied into another buffer, norms and embeddings not: the layout is found by the latter."""
    elsewhere = {n: 0x7D00_0000_0000 + 4096 * i for i, n in enumerate(SHAPES) if "attn_q" in n or "ffn" in n}
    memory = Memory()
    graph = moe(memory, elsewhere)
    layout = derive(memory.read, graph, known())
    assert layout == NOW.layout()
    found = dict(read_graph(memory.read, graph, layout, known()).weights.values())
    assert found == PLACES | elsewhere


def test_the_graph_is_the_sequence() -> None:
    memory = Memory()
    graph = read_graph(memory.read, moe(memory, rows=7), NOW.layout(), known())
    assert len(graph.nodes) == 20
    assert graph.sequence([GET_ROWS, MUL_MAT, MUL_MAT_ID]) == SEQUENCE
    assert graph.sequence([MUL_MAT_ID]) == [f"blk.{n}.ffn_up_exps.weight" for n in range(3)]
    assert dict(graph.weights.values()) == PLACES
    first, last = graph.nodes[0], graph.nodes[-1]
    assert (first.op, first.name, first.rows, len(first.sources)) == (GET_ROWS, "embd", 7, 2)
    assert (last.name, last.rows) == ("result_output", 1)
    assert [len(n.sources) for n in graph.nodes if n.op == MUL_MAT_ID] == [3, 3, 3]


def test_weights_of_other_shapes_are_not_taken_for_ours() -> None:
    """A draft model's tensors have the same names; one whose file is not known is told of."""
    memory = Memory()
    graph = moe(memory)
    weights = known()
    (ours,) = weights["output.weight"]
    weights["output.weight"] = [replace(ours, shape=(64, 97))]
    found = read_graph(memory.read, graph, NOW.layout(), weights)
    assert sorted(n for n, _ in found.weights.values()) == sorted(set(SHAPES) - {"output.weight"})
    assert found.strangers == {"output.weight"}


def twins(*, mapped: bool) -> dict[str, list[Weight]]:
    """Return the weights of two models with the same names and shapes, of which the second is in ``memory``."""
    ours = known(mapped=mapped, model="ours")
    away = 1 << 30
    return {
        name: [replace(one, model="other", address=away if mapped else None, head=lambda: b"other"), one]
        for name, (one,) in ours.items()
    }


def test_of_two_models_with_the_same_names_and_shapes_the_data_tell() -> None:
    memory = Memory()
    graph = moe(memory)
    assert derive(memory.read, graph, twins(mapped=True)) == NOW.layout()
    found = read_graph(memory.read, graph, NOW.layout(), twins(mapped=True))
    assert set(found.models.values()) == {"ours"}
    assert found.models.keys() == found.weights.keys()
    assert found.model == "ours"


def test_copies_are_of_the_model_that_has_the_others() -> None:
    """All matrices but the embedding were repacked: of it the address tells, of the others that it is there."""
    memory = Memory()
    elsewhere = {n: 0x7000_0000 + i * 4096 for i, n in enumerate(SHAPES) if n != "token_embd.weight"}
    graph = moe(memory, data={**PLACES, **elsewhere})
    found = read_graph(memory.read, graph, NOW.layout(), twins(mapped=True))
    assert found.model == "ours"
    assert found.models.keys() == found.weights.keys()


def test_models_that_were_read_are_told_by_their_bytes_or_not_at_all() -> None:
    memory = Memory()
    graph = moe(memory)
    for name in SHAPES:
        memory.blocks[PLACES[name]] = bytearray(head(name))
    found = read_graph(memory.read, graph, NOW.layout(), twins(mapped=False))
    assert set(found.models.values()) == {"ours"}
    same = {name: [replace(w, head=lambda n=name: head(n)) for w in ws] for name, ws in twins(mapped=False).items()}
    unclear = read_graph(memory.read, graph, NOW.layout(), same)
    assert unclear.weights == found.weights
    assert unclear.models == {}
    assert unclear.model is None


def test_an_adapter_does_not_make_a_graph_its_own() -> None:
    names = {1: "blk.0.attn_q.weight", 2: "blk.0.attn_q.weight.lora_a", 3: "blk.0.attn_q.weight.lora_b"}
    models = {1: "m.gguf", 2: "lora.gguf", 3: "lora.gguf"}
    graph = Graph((), {address: (name, 0) for address, name in names.items()}, models)
    assert graph.model == "m.gguf"


# --- refused ------------------------------------------------------------------------------------------------------


def refused(memory: Memory, graph: int, weights: dict | None = None) -> str:  # type: ignore[type-arg]
    with pytest.raises(LlmtracedError, match="cannot read this build's compute graph") as caught:
        derive(memory.read, graph, known() if weights is None else weights)
    assert caught.value.exit_code == UNSUPPORTED
    return str(caught.value).removeprefix("cannot read this build's compute graph: ")


@pytest.mark.parametrize(
    ("size", "n_nodes", "nodes"),
    [(0, 0, ARENA), (8, -1, ARENA), (-1, 5, ARENA), (1 << 30, 5, ARENA), (8, 1 << 30, ARENA), (8, 8, 3), (8, 8, 0)],
)
def test_no_graph(size: int, n_nodes: int, nodes: int) -> None:
    memory = Memory()
    at = memory.put(struct.pack("<iiiiQ", size, n_nodes, 0, 0, nodes) + bytes(64))
    assert refused(memory, at).startswith("no graph at its address")


def test_nodes_that_lead_nowhere() -> None:
    memory = Memory()
    graph = memory.graph([0xDEAD_0000_0000] * 4)
    assert refused(memory, graph) == "its nodes cannot be read"


def test_nothing_at_all_at_the_address() -> None:
    with pytest.raises(OSError, match="bad address"):
        derive(Memory().read, ARENA, known())


def test_names_of_another_model() -> None:
    memory = Memory()
    graph = moe(memory)
    weights = {f"other.{n}": w for n, w in known().items()}
    assert refused(memory, graph, weights) == "no source of its nodes has the name of a tensor of the model"
    assert "has the name of" in refused(memory, graph, {})


def test_shapes_of_another_model() -> None:
    memory = Memory()
    graph = moe(memory)
    weights = {n: [replace(w, shape=(999, 7))] for n, (w,) in known().items()}
    assert refused(memory, graph, weights) == "no tensor's shape is where the model's file says"


def test_all_data_somewhere_else() -> None:
    memory = Memory()
    graph = moe(memory, {n: 0x7D00_0000_0000 + 64 * i for i, n in enumerate(SHAPES)})
    assert refused(memory, graph) == "no tensor's data is where the model's file says"
    assert refused(memory, graph, known(mapped=False)) == "no tensor's data is where the model's file says"


def test_zeros_prove_nothing() -> None:
    """A weight that begins with zeros, in memory as in its file, is found at many a pointer."""
    memory = Memory()
    graph = moe(memory)
    memory.blocks = {MODEL: bytearray(1 << 20)}
    weights = {n: [replace(w, address=None, head=lambda: bytes(64))] for n, (w,) in known().items()}
    assert "no tensor's data" in refused(memory, graph, weights)


def patch(memory: Memory, name: str, at: int, data: bytes) -> None:
    """Write into the structure of the weight ``name``."""
    start = memory.arena.index(name.encode() + b"\0") - memory.offsets.name
    memory.arena[start + at : start + at + len(data)] = data


def test_tensors_that_disagree_on_data() -> None:
    memory = Memory()
    graph = moe(memory)
    for name in list(SHAPES)[:5]:  # of 14
        patch(memory, name, NOW.data, struct.pack("<Q", 0x7D00_0000_0000))
        patch(memory, name, NOW.data - 8, struct.pack("<Q", PLACES[name]))
    assert refused(memory, graph).startswith("its tensors disagree on where the data is")


def test_tensors_that_disagree_on_shape() -> None:
    memory = Memory()
    graph = moe(memory)
    for name in list(SHAPES)[:5]:
        ne = [*SHAPES[name], 1, 1, 1][:4]
        patch(memory, name, NOW.ne, struct.pack("<8q", 0, *ne, 0, 0, 0))
    assert refused(memory, graph).startswith("its tensors disagree on where the shape is")


def test_names_before_data_are_no_known_order() -> None:
    memory = Memory(Offsets(data=312, name=240, size=336))
    assert refused(memory, moe(memory))


def test_operators_that_are_none() -> None:
    memory = Memory()
    graph = moe(memory)
    at = memory.arena.index(b"result_output\0") - NOW.name + NOW.op
    for value in (0, 1000):
        memory.arena[at : at + 4] = struct.pack("<I", value)
        assert refused(memory, graph) == "its nodes have no operator where one should be"


def test_no_matrices() -> None:
    memory = Memory()
    graph = moe(memory)
    weights = {n: w for n, w in known().items() if "norm" in n or n == "token_embd.weight"}
    assert refused(memory, graph, weights) == "no matrix multiplication with a weight is in it"


def test_a_graph_that_is_gone_when_it_is_read() -> None:
    memory = Memory()
    graph = moe(memory)
    memory.arena[graph - ARENA + 4 : graph - ARENA + 8] = bytes(4)
    with pytest.raises(LlmtracedError, match="0 nodes"):
        read_graph(memory.read, graph, NOW.layout(), known())


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 400))
def test_damaged_memory_is_explained_or_refused(seed: int, n: int) -> None:
    """No bytes lead to another exception than the two that are promised."""
    memory, noise = Memory(), random.Random(seed)
    graph = moe(memory)
    for _ in range(n):
        memory.arena[noise.randrange(len(memory.arena))] = noise.randrange(256)
    try:
        layout = derive(memory.read, graph, known())
        read_graph(memory.read, graph, layout, known())
    except (LlmtracedError, OSError):
        return
    assert isinstance(layout, Layout)
    assert (layout.tensor_ne, layout.tensor_data, layout.tensor_name) == (NOW.ne, NOW.data, NOW.name)


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=64, max_size=4096))
def test_garbage_is_refused(data: bytes) -> None:
    memory = Memory()
    graph = memory.put(data)
    with pytest.raises((LlmtracedError, OSError)):
        derive(memory.read, graph, known())


def test_memory_reader_reads_this_process() -> None:
    import ctypes

    buffer = ctypes.create_string_buffer(b"found me")
    read = memory_reader(os.getpid())
    assert read(ctypes.addressof(buffer), 8) == b"found me"
    for address in (0, 4096, 1 << 63, (1 << 64) - 8):
        with pytest.raises(OSError, match=r"bad address|Input/output error"):
            read(address, 8)
