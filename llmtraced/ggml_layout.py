"""Where fields lie in this process's ``ggml_tensor`` and ``ggml_cgraph``, found in its own memory.

The structures change between builds and stripped builds carry no description, so nothing is assumed that is not
checked against what the GGUF file says: names, shapes and the bytes themselves. A layout that does not explain a whole
graph is refused; faults and page cache need none.

What is searched for (ggml.h, ggml-impl.h): a graph begins ``int size, n_nodes, n_leafs; ggml_tensor **nodes``; a tensor
has, in this order, ``type, buffer, ne[4], nb[4], op, …, src[10], …, data, name[64]``.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.gguf_map import Model

__all__ = [
    "OPERATOR_BYTES",
    "Graph",
    "Layout",
    "Node",
    "Weight",
    "Weights",
    "derive",
    "known_weights",
    "memory_reader",
    "read_graph",
    "verify",
]

Reader = Callable[[int, int], bytes]
"""Reads (address, length) of the process; raises OSError where nothing is mapped."""

OPERATOR_BYTES: Final = 192
"""As much of a ``ggml_tensor`` as the programs read to tell an operator: shape, operator, first two sources."""

_TENSOR_BYTES: Final = 512  # as much as is looked at; the structure is about 340 bytes
_SOURCES: Final = 10  # GGML_MAX_SRC
_MAX_NODES: Final = 1 << 20
_SAMPLE: Final = 160  # nodes that are looked at: a few layers
_HEADS: Final = 16  # tensors whose first bytes are read from the file, where none is mapped
_ADAPTER: Final = re.compile(r"\.lora_[ab]$")  # llama.cpp's names for what an adapter adds to a weight
_WEIGHT: Final = re.compile(r"\.(weight|bias|lora_[ab])$")


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets of fields, and the values of ``enum ggml_op`` that we need to tell apart."""

    graph_n_nodes: int
    graph_nodes: int
    tensor_op: int
    tensor_ne: int
    tensor_nb: int
    tensor_src: int
    tensor_data: int
    tensor_name: int
    op_mul_mat: int
    op_mul_mat_id: int


@dataclass(frozen=True, slots=True)
class Weight:
    """What is known of a weight from its file.

    Attributes:
        model: label of the model that has it.
        shape: elements, in ggml's order.
        address: where the process has mapped it, None where it is not mapped.
        head: returns its first bytes in the file; asked only where ``address`` is None, for it reads from disk.
    """

    model: str
    shape: tuple[int, ...]
    address: int | None
    head: Callable[[], bytes]


Weights = Mapping[str, Sequence[Weight]]
"""By name: a draft model's weights have the names of those of the model that it drafts for."""


def known_weights(
    models: Mapping[str, Model], address: Callable[[str, int, int], int | None]
) -> dict[str, list[Weight]]:
    """Return what files and mappings tell of the weights, by name.

    Args:
        models: by label.
        address: where a byte of a model is mapped: (label, shard, offset in the file) → address, or None.
    """
    weights: dict[str, list[Weight]] = {}
    for label, model in models.items():
        for tensor in model.tensors:
            path, offset, size = model.shards[tensor.shard].path, tensor.offset, tensor.size

            def head(path: Path = path, offset: int = offset, size: int = size) -> bytes:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                    return os.pread(fd, min(size, 64), offset)
                finally:
                    os.close(fd)

            place = address(label, tensor.shard, offset)
            weights.setdefault(tensor.name, []).append(Weight(label, tensor.shape, place, head))
    return weights


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph: its operator's number, its name, rows of its result, and its sources' addresses."""

    op: int
    name: str
    rows: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """A compute graph: nodes in the order of their evaluation, and the weights among their sources.

    Attributes:
        nodes: in order.
        weights: address of the ``ggml_tensor`` → (name, address of its data).
        models: address of a weight's ``ggml_tensor`` → label of its model; not there where that is not clear.
        strangers: names of what must be weights, but is in no model that is known.
    """

    nodes: tuple[Node, ...]
    weights: Mapping[int, tuple[str, int]]
    models: Mapping[int, str] = field(default_factory=dict)
    strangers: frozenset[str] = frozenset()

    @property
    def model(self) -> str | None:
        """The model that it evaluates: most of the weights are of it, adapters aside. None: that is not clear."""
        return _most(self.models, self.weights)

    def sequence(self, ops: Sequence[int]) -> list[str]:
        """Return the weights of nodes whose operator is in ``ops``, in order: the per-token access sequence."""
        return [
            self.weights[node.sources[0]][0]
            for node in self.nodes
            if node.op in ops and node.sources and node.sources[0] in self.weights
        ]


def memory_reader(pid: int) -> Reader:
    """Return a reader of ``pid``'s memory (needs the right to trace it)."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    class _Closing:
        def __del__(self) -> None:
            os.close(fd)

    owner = _Closing()

    def read(address: int, length: int, _owner: _Closing = owner) -> bytes:
        if not 0 < address < 1 << 63:
            raise OSError(14, "bad address")
        data = os.pread(fd, length, address)
        if len(data) != length:
            raise OSError(14, "bad address")
        return data

    return read


def _pointers(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])


def _plausible(value: int) -> bool:
    return value % 8 == 0 and 1 << 16 <= value < 1 << 56


def _unsupported(why: str) -> LlmtracedError:
    return LlmtracedError(f"cannot read this build's compute graph: {why}", UNSUPPORTED)


def derive(read: Reader, graph: int, weights: Weights) -> Layout:
    """Work out the layout from one live graph.

    Args:
        read: the process's memory.
        graph: address of the ``ggml_cgraph`` that is being, or was just, evaluated.
        weights: by name, from the GGUF.

    Raises:
        LlmtracedError: no layout explains what is there; the message says what did not fit.
        OSError: the memory is gone.
    """
    head = read(graph, 64)
    size, n_nodes = struct.unpack_from("<ii", head, 0)
    (nodes_at,) = struct.unpack_from("<Q", head, 16)
    # The scheduler hands each backend a view of the whole graph, whose size is 0.
    if not 0 < n_nodes <= max(size, n_nodes) <= _MAX_NODES or size < 0 or not _plausible(nodes_at):
        raise _unsupported(f"no graph at its address (size {size}, {n_nodes} nodes)")
    addresses = _pointers(read(nodes_at, n_nodes * 8))
    known = {name.encode(): same for name, same in weights.items()}
    sample = addresses[:_SAMPLE]
    tensors = {a: _try(read, a) for a in sample}
    if any(not data for data in tensors.values()):
        raise _unsupported("its nodes cannot be read")

    # Which word of a node points to something that carries a weight's name, and where that name stands in it.
    # A pointer counts once: all nodes have the same buffer, and some name may by chance stand behind it.
    found: Counter[tuple[int, int]] = Counter()
    named: dict[int, tuple[bytes, bytes]] = {}
    met: set[tuple[int, int]] = set()
    for data in tensors.values():
        for word, pointer in enumerate(_pointers(data)[: _TENSOR_BYTES // 16]):
            if not _plausible(pointer) or pointer in tensors or (word, pointer) in met:
                continue
            met.add((word, pointer))
            source = named.get(pointer)
            if source is None:
                content = _try(read, pointer)
                source = named[pointer] = (content, _name_in(content, known))
            if source[1]:
                found[word * 8, source[0].index(source[1] + b"\0")] += 1
    if not found:
        raise _unsupported("no source of its nodes has the name of a tensor of the model")
    names_at = Counter(at for (_, at), n in found.items() for _ in range(n)).most_common(1)[0][0]
    src = min(word for (word, at), n in found.items() if at == names_at)
    carriers = {
        p: (content, known[name])
        for p, (content, name) in named.items()
        if name and content.index(name + b"\0") == names_at
    }

    ne = _agree("shape", (_first(_find_shape(content, w.shape) for w in same) for content, same in carriers.values()))
    mapped = [(c, on) for c, same in carriers.values() if (on := [w for w in same if w.address is not None])]
    candidates = mapped or list(carriers.values())[:_HEADS]
    data_at = _agree("data", (_find_data(read, content, same, names_at) for content, same in candidates))
    nb = ne + 32
    op = nb + 32
    layout = Layout(4, 16, op, ne, nb, src, data_at, names_at, 0, 0)
    _check_order(layout)
    return _with_ops(read_graph(read, graph, layout, weights), layout, weights)


def verify(read: Reader, graph: int, layout: Layout, weights: Weights) -> None:
    """Check that a live graph, read by a layout, has the model's weights in it: names, shapes, data and operators.

    A layout without ``op_mul_mat_id`` (derived from a dense model) does not explain a graph with experts.

    Args:
        read: the process's memory.
        graph: address of the ``ggml_cgraph`` that is being, or was just, evaluated.
        layout: of another process, or described.
        weights: by name, from the GGUF.

    Raises:
        LlmtracedError: it does not explain what is there; the message says what did not fit.
        OSError: the memory is gone.
    """
    _check_order(layout)
    found = read_graph(read, graph, layout, weights)
    if not found.weights:
        raise _unsupported("no source of its nodes has the name and shape of a tensor of the model")
    known = [(weights[name], data) for name, data in found.weights.values()]
    mapped = [(places, data) for same, data in known if (places := {w.address for w in same} - {None})]
    if mapped:
        fits = any(data in places for places, data in mapped)
    else:
        fits = any(_begins_as(read, data, _heads(same)) for same, data in known[:_HEADS])
    if not fits:
        raise _unsupported("no tensor's data are where the model's file says")
    for address, (name, _) in list(found.weights.items())[:_HEADS]:
        # Weights are contiguous; that of the first dimension is a block's size.
        _, rows, matrices, whole = struct.unpack("<4Q", read(address + layout.tensor_nb, 32))
        ne = (*weights[name][0].shape, 1, 1, 1)[:4]
        if not 0 < rows * ne[1] == matrices or matrices * ne[2] != whole:
            raise _unsupported("no tensor's strides are those of its shape")
    told = _with_ops(found, layout, weights)
    if told.op_mul_mat != layout.op_mul_mat or told.op_mul_mat_id not in (0, layout.op_mul_mat_id):
        raise _unsupported("its matrices are multiplied by other operators")


def _heads(same: Sequence[Weight]) -> list[bytes]:
    return [head for weight in same if any(head := weight.head())]  # zeros tell nothing


def _begins_as(read: Reader, address: int, heads: Sequence[bytes]) -> bool:
    try:
        return _plausible(address) and any(read(address, len(head)) == head for head in heads)
    except OSError:
        return False


def _check_order(layout: Layout) -> None:
    """Check what the programs rely on: fields in the order of the declaration, an operator's within what they read."""
    in_front = layout.tensor_ne < layout.tensor_nb < layout.tensor_op < layout.tensor_src <= OPERATOR_BYTES - 16
    if not in_front or not layout.tensor_src < layout.tensor_data < layout.tensor_name:
        raise _unsupported(f"its fields are in no known order ({layout})")


def _try(read: Reader, address: int) -> bytes:
    try:
        return read(address, _TENSOR_BYTES)
    except OSError:
        return b""


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


def _name_in(content: bytes, known: Container[bytes]) -> bytes:
    """Return the first known tensor name that stands in ``content`` as a whole string at a multiple of 8 bytes."""
    for at in range(64, len(content) - 8, 8):
        end = content.find(b"\0", at)
        if end > at and content[at:end] in known and content.index(content[at:end] + b"\0") == at:
            return content[at:end]
    return b""


def _find_shape(content: bytes, shape: tuple[int, ...]) -> int | None:
    pattern = struct.pack("<4q", *shape, *[1] * (4 - len(shape)))
    at = content.find(pattern)
    return at if at >= 0 and at % 8 == 0 else None


def _find_data(read: Reader, content: bytes, same: Sequence[Weight], end: int) -> int | None:
    """Return where the pointer to the tensor's bytes stands: it equals its address, or they begin as in the file.

    Args:
        read: the process's memory.
        content: of the ``ggml_tensor``.
        same: the weights with its name. Where some are mapped, those decide.
        end: where to stop looking.
    """
    places = {weight.address for weight in same if weight.address is not None}
    heads = [] if places else _heads(same)
    for at in range(end - 8, 64, -8):
        (pointer,) = struct.unpack_from("<Q", content, at)
        if pointer in places if places else _begins_as(read, pointer, heads):
            return at
    return None  # repacked, or all zeros


def _agree(what: str, values: object) -> int:
    counted = Counter(v for v in values if v is not None)  # type: ignore[attr-defined]
    if not counted:
        raise _unsupported(f"no tensor's {what} is where the model's file says")
    best, n = counted.most_common(1)[0]
    if n * 10 < counted.total() * 9:
        raise _unsupported(f"its tensors disagree on where the {what} is ({dict(counted)})")
    return int(best)


def _with_ops(graph: Graph, layout: Layout, weights: Weights) -> Layout:
    """Complete ``layout`` with the operators' numbers, told by what they multiply."""
    if any(not 0 < node.op < 256 for node in graph.nodes):
        raise _unsupported("its nodes have no operator where one should be")
    dense: Counter[int] = Counter()
    experts: Counter[int] = Counter()
    for node in graph.nodes:
        first = graph.weights.get(node.sources[0]) if node.sources else None
        if first is None or len(node.sources) < 2:
            continue
        if "_exps." in first[0]:
            experts[node.op] += 1
        elif ".weight" in first[0] and first[0].startswith("blk.") and len(weights[first[0]][0].shape) == 2:
            dense[node.op] += 1
    if not dense:
        raise _unsupported("no matrix multiplication with a weight is in it")
    return replace(
        layout,
        op_mul_mat=dense.most_common(1)[0][0],
        op_mul_mat_id=experts.most_common(1)[0][0] if experts else 0,
    )


def read_graph(read: Reader, graph: int, layout: Layout, weights: Weights) -> Graph:
    """Read a whole graph: a few milliseconds, once for each graph that is new.

    Raises:
        LlmtracedError: it is not a graph (any more).
        OSError: the memory is gone.
    """
    (n_nodes,) = struct.unpack("<i", read(graph + layout.graph_n_nodes, 4))
    (nodes_at,) = struct.unpack("<Q", read(graph + layout.graph_nodes, 8))
    if not 0 < n_nodes <= _MAX_NODES:
        raise _unsupported(f"{n_nodes} nodes")
    length = layout.tensor_name + 64
    nodes: list[Node] = []
    found: dict[int, tuple[str, int]] = {}
    fitting: dict[int, list[Weight]] = {}
    strangers: set[str] = set()
    addresses = _pointers(read(nodes_at, n_nodes * 8))
    seen = set(addresses)
    for address in addresses:
        data = read(address, length)
        (op,) = struct.unpack_from("<I", data, layout.tensor_op)
        (rows,) = struct.unpack_from("<q", data, layout.tensor_ne + 8)
        sources = struct.unpack_from(f"<{_SOURCES}Q", data, layout.tensor_src)
        sources = sources[: next((i for i in range(_SOURCES - 1, -1, -1) if sources[i]), -1) + 1]
        nodes.append(Node(op, _c_string(data[layout.tensor_name :]), rows, sources))
        for source in sources:
            if source in seen or not _plausible(source):
                continue
            seen.add(source)
            content = read(source, length)
            name = _c_string(content[layout.tensor_name :])
            same = [w for w in weights.get(name, ()) if _find_shape(content, w.shape) == layout.tensor_ne]
            if same:
                found[source] = (name, struct.unpack_from("<Q", content, layout.tensor_data)[0])
                fitting[source] = same
            elif _WEIGHT.search(name):
                strangers.add(name)
    return Graph(tuple(nodes), found, _models_of(read, found, fitting), frozenset(strangers))


def _models_of(
    read: Reader, found: Mapping[int, tuple[str, int]], fitting: Mapping[int, Sequence[Weight]]
) -> dict[int, str]:
    """Return the model of each weight: the only one that has such a weight, or has it mapped where its data are.

    What is left (two models with the same names and shapes, whose weights are copies) is of the model that has others
    in this graph, since a graph evaluates one model; or of the one whose file has the same first bytes.
    """
    models: dict[int, str] = {}
    for source, same in fitting.items():
        there = [w for w in same if w.address == found[source][1]] or same
        if len(there) == 1:
            models[source] = there[0].model
    left = fitting.keys() - models.keys()
    if not left:
        return models
    label = _most(models, found) or _by_bytes(read, found, {s: fitting[s] for s in left})
    if label is None:
        return models
    return models | {s: label for s in left if any(w.model == label for w in fitting[s])}


def _most(models: Mapping[int, str], weights: Mapping[int, tuple[str, int]]) -> str | None:
    """Return the model that most of the weights are of, adapters aside; None: there are no others."""
    counted = Counter(label for address, label in models.items() if not _ADAPTER.search(weights[address][0]))
    return counted.most_common(1)[0][0] if counted else None


def _by_bytes(
    read: Reader, found: Mapping[int, tuple[str, int]], fitting: Mapping[int, Sequence[Weight]]
) -> str | None:
    """Return the one model whose file has the bytes that some weight has; norms may be the same in all of them."""
    matrices = [source for source, same in fitting.items() if len(same[0].shape) > 1]
    for source in matrices[:_HEADS]:
        heads = {weight.model: weight.head() for weight in fitting[source]}
        try:
            data = read(found[source][1], max(map(len, heads.values())))
        except OSError:
            continue
        alike = [label for label, head in heads.items() if data.startswith(head)]
        if len(alike) == 1:
            return alike[0]
    return None


def _c_string(data: bytes) -> str:
    return data[:64].split(b"\0", 1)[0].decode("utf-8", "replace")
