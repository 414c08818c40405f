"""A process's memory with ggml structures in it, at field offsets of one's choice."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmtraced.ggml_layout import Layout, Weight

GET_ROWS, MUL, MUL_MAT, MUL_MAT_ID, ADD, VIEW = 40, 7, 29, 30, 2, 36
ARENA = 0x5555_0000_0000
MODEL = 0x7F00_0000_0000


@dataclass(frozen=True)
class Offsets:
    """Fields of ggml_tensor; the defaults are those of ggml in 2024 and 2025 (64 bits, GGML_MAX_SRC 10)."""

    buffer: int = 8
    ne: int = 16
    nb: int = 48
    op: int = 80
    flags: int = 148
    src: int = 152
    view_src: int = 232
    data: int = 248
    name: int = 256
    size: int = 336

    def shifted(self, after: str, by: int) -> Offsets:
        """Return the offsets with ``by`` bytes put in before field ``after``."""
        limit = getattr(self, after)
        fields = {n: getattr(self, n) for n in Offsets.__dataclass_fields__}
        return Offsets(**{n: v + by if v >= limit else v for n, v in fields.items()})

    def layout(self) -> Layout:
        return Layout(4, 16, self.op, self.ne, self.nb, self.src, self.data, self.name, MUL_MAT, MUL_MAT_ID)


@dataclass
class Memory:
    """Stretches of memory by their addresses, and an arena in which structures are put one after the other."""

    offsets: Offsets = field(default_factory=Offsets)
    blocks: dict[int, bytearray] = field(default_factory=dict)
    arena: bytearray = field(default_factory=bytearray)
    buffer: int = 0x5600_0000_0000

    def read(self, address: int, length: int) -> bytes:
        for start, block in (*self.blocks.items(), (ARENA, self.arena)):
            if start <= address and address + length <= start + len(block):
                return bytes(block[address - start : address - start + length])
        raise OSError(14, "bad address")

    def put(self, data: bytes) -> int:
        """Append to the arena (ggml puts a 32-byte object header before each structure)."""
        self.arena += bytes(32)
        address = ARENA + len(self.arena)
        self.arena += data + bytes(-len(data) % 16)
        return address

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        op: int = 0,
        sources: Sequence[int] = (),
        data: int = 0,
        view_of: int = 0,
    ) -> int:
        at, o = bytearray(self.offsets.size), self.offsets
        ne = [*shape, *[1] * (4 - len(shape))]
        struct.pack_into("<I", at, 0, 12 if data else 0)
        struct.pack_into("<Q", at, o.buffer, self.buffer)
        struct.pack_into("<4q", at, o.ne, *ne)
        struct.pack_into("<4Q", at, o.nb, 4, 4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2])
        struct.pack_into("<I", at, o.op, op)
        struct.pack_into("<f", at, o.op + 4, 1e-5)
        struct.pack_into("<i", at, o.flags, 16)
        struct.pack_into(f"<{len(sources)}Q", at, o.src, *sources)
        struct.pack_into("<Q", at, o.view_src, view_of)
        struct.pack_into("<Q", at, o.data, data or 0x7E00_0000_0000 + 64 * len(self.arena))
        struct.pack_into("<64s", at, o.name, name.encode()[:63])
        return self.put(bytes(at))

    def graph(self, nodes: Sequence[int], size: int = 8192) -> int:
        table = self.put(struct.pack(f"<{len(nodes)}Q", *nodes))
        return self.put(struct.pack("<iiiiQQQ", size, len(nodes), 3, 0, table, table, 0) + bytes(24))


SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (32, 96)}
for _layer in range(3):
    SHAPES |= {
        f"blk.{_layer}.attn_norm.weight": (32,),
        f"blk.{_layer}.attn_q.weight": (32, 48),
        f"blk.{_layer}.ffn_gate_inp.weight": (32, 8),
        f"blk.{_layer}.ffn_up_exps.weight": (32, 64, 8),
    }
SHAPES["output.weight"] = (32, 97)
PLACES = {name: MODEL + 4096 * (i + 1) for i, name in enumerate(SHAPES)}
SEQUENCE = [
    "token_embd.weight",
    *(f"blk.{n}.{w}.weight" for n in range(3) for w in ("attn_q", "ffn_gate_inp", "ffn_up_exps")),
    "output.weight",
]
"""The weights that GET_ROWS and the matrix multiplications of :func:`moe` read, in order."""


def head(name: str) -> bytes:
    """Return the first bytes of a weight's data, different for each."""
    return (name * 9).encode()[:64]


def known(mapped: bool = True, model: str = "m.gguf") -> dict[str, list[Weight]]:
    """Return what the GGUF says of the weights."""

    def unasked() -> bytes:
        raise AssertionError("a mapped weight is not read from its file")

    return {
        name: [Weight(model, shape, PLACES[name] if mapped else None, unasked if mapped else lambda n=name: head(n))]
        for name, shape in SHAPES.items()
    }


def moe(memory: Memory, data: dict[str, int] | None = None, rows: int = 5, size: int = 8192) -> int:
    """Put a small mixture of experts into ``memory`` and return its graph's address.

    Args:
        memory: where to.
        data: weight → address of its data; where the file is mapped by default.
        rows: tokens in the batch.
        size: of the graph; the scheduler's views have 0.
    """
    places = PLACES | (data or {})
    w = {name: memory.tensor(name, shape, data=places[name]) for name, shape in SHAPES.items()}
    tokens = memory.tensor("inp_tokens", (rows,))
    nodes = [memory.tensor("embd", (32, rows), GET_ROWS, [w["token_embd.weight"], tokens])]
    for n in range(3):
        up = w[f"blk.{n}.ffn_up_exps.weight"]
        nodes.append(memory.tensor(f"norm-{n}", (32, rows), MUL, [nodes[-1], w[f"blk.{n}.attn_norm.weight"]]))
        nodes.append(memory.tensor(f"q-{n}", (48, rows), MUL_MAT, [w[f"blk.{n}.attn_q.weight"], nodes[-1]]))
        nodes.append(memory.tensor(f"view-{n}", (32, rows), VIEW, [nodes[-1]], view_of=nodes[-1]))
        router = memory.tensor(
            f"ffn_moe_logits-{n}", (8, rows), MUL_MAT, [w[f"blk.{n}.ffn_gate_inp.weight"], nodes[-1]]
        )
        nodes += [router, memory.tensor(f"up-{n}", (64, 2, rows), MUL_MAT_ID, [up, nodes[-1], router])]
        nodes.append(memory.tensor(f"out-{n}", (32, rows), ADD, [nodes[-1], nodes[-3]]))
    nodes.append(memory.tensor("result_output", (97, 1), MUL_MAT, [w["output.weight"], nodes[-1]]))
    graph = memory.graph(nodes, size)
    memory.arena += bytes(1024)
    return graph
