"""GGUF models with random weights, written in seconds, that a real llama-server runs.

Page faults, readahead and eviction do not care what the weights say, only where they lie; so a synthesised model of
the right shape stands in for a download of gigabytes. :func:`tensor_plan` (pure) says which tensors a :class:`Shape`
has; :func:`write` streams them, reusing one tile of random blocks a type, and holds a few megabytes in memory.

The weights are scaled so that numbers stay finite and the residual stream keeps remembering its token: a token's
embedding has elements of about 1, each layer adds a fraction of that. So the experts that a router chooses depend on
the token, and neighbouring layers see similar inputs, as in trained models; but how *well* a layer's routing predicts
the next one's is a property of these scales and no evidence about a trained model.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from llmtraced.errors import USAGE, LlmtracedError, printable

__all__ = [
    "QUANTS",
    "TINY_DENSE",
    "TINY_MOE",
    "Plan",
    "Shape",
    "dense_preset",
    "moe_preset",
    "plan_bytes",
    "tensor_plan",
    "write",
    "write_dense",
    "write_moe",
]

QUANTS: Final = ("Q8_0", "Q4_0", "F16")
"""Tensor types that can be written for the matrices. Norms and routers are F32, as in published models."""

_TILE_BLOCKS: Final = 65_537
"""Blocks of 32 weights in the reused tile. A prime, so that no two rows, tensors or experts start at the same block."""

_BYTE_TOKENS: Final = 256
_FIRST_BYTE: Final = 3  # after <unk>, <s>, </s>


@dataclass(frozen=True)
class Shape:
    """What a model looks like; ``n_experts`` 0 means dense, else ``n_ff`` is the width of one expert."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    vocab: int = 2048
    quant: str = "Q8_0"
    n_experts: int = 0
    n_used: int = 0
    n_ctx: int = 4096

    def check(self) -> None:
        """Raise :class:`LlmtracedError` (usage) if no engine could run this shape."""
        wrong = ""
        if self.quant not in QUANTS:
            wrong = f"quant is {printable(self.quant)}, must be one of {', '.join(QUANTS)}"
        elif min(self.n_layers, self.n_embd, self.n_ff, self.n_heads, self.n_kv_heads) < 1:
            wrong = "layers, widths and heads must be positive"
        elif self.n_embd % 32 or self.n_ff % 32:
            wrong = "n_embd and n_ff must be multiples of 32 (one quantisation block)"
        elif self.n_embd % self.n_heads or self.n_heads % self.n_kv_heads or (self.n_embd // self.n_heads) % 32:
            wrong = "n_embd / n_heads must be a multiple of 32, and n_kv_heads must divide n_heads"
        elif self.vocab < _FIRST_BYTE + _BYTE_TOKENS:
            wrong = f"vocab must be at least {_FIRST_BYTE + _BYTE_TOKENS} (3 specials and 256 byte tokens)"
        elif self.n_experts and not 0 < self.n_used <= self.n_experts:
            wrong = "n_used must lie between 1 and n_experts"
        if wrong:
            raise LlmtracedError(f"cannot synthesise such a model: {wrong}", USAGE)


@dataclass(frozen=True)
class Plan:
    """One tensor to be written: ``shape`` in numpy order (slowest first), ``std`` of its elements, 0 for all ones."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    std: float

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)


def tensor_plan(shape: Shape) -> list[Plan]:
    """Return the tensors of ``shape`` in file order: embedding, layers, output (llama architecture's names)."""
    shape.check()
    kind = gguf.GGMLQuantizationType[shape.quant]
    f32 = gguf.GGMLQuantizationType.F32
    embd, ff, experts = shape.n_embd, shape.n_ff, shape.n_experts
    kv = embd // shape.n_heads * shape.n_kv_heads

    def matrix(name: str, *dims: int) -> Plan:
        return Plan(f"{name}.weight", dims, kind, 0.5 / math.sqrt(dims[-1]))

    def norm(name: str) -> Plan:
        return Plan(f"{name}.weight", (embd,), f32, 0.0)

    plans = [Plan("token_embd.weight", (shape.vocab, embd), kind, 1.0)]
    for n in range(shape.n_layers):
        b = f"blk.{n}"
        plans += [norm(f"{b}.attn_norm"), matrix(f"{b}.attn_q", embd, embd), matrix(f"{b}.attn_k", kv, embd)]
        plans += [matrix(f"{b}.attn_v", kv, embd), matrix(f"{b}.attn_output", embd, embd), norm(f"{b}.ffn_norm")]
        if experts:
            plans.append(Plan(f"{b}.ffn_gate_inp.weight", (experts, embd), f32, 1.0 / math.sqrt(embd)))
            plans += [matrix(f"{b}.ffn_gate_exps", experts, ff, embd), matrix(f"{b}.ffn_up_exps", experts, ff, embd)]
            plans.append(matrix(f"{b}.ffn_down_exps", experts, embd, ff))
        else:
            plans += [matrix(f"{b}.ffn_gate", ff, embd), matrix(f"{b}.ffn_up", ff, embd)]
            plans.append(matrix(f"{b}.ffn_down", embd, ff))
    return [*plans, norm("output_norm"), matrix("output", shape.vocab, embd)]


def plan_bytes(shape: Shape) -> int:
    """Return the bytes of all tensor data of ``shape``; the file is larger by its header (tens of kilobytes)."""
    return sum(p.nbytes for p in tensor_plan(shape))


TINY_DENSE: Final = Shape(n_layers=4, n_embd=256, n_ff=768, n_heads=4, n_kv_heads=2, vocab=512)
"""About 3.5 MB: starts in well under a second."""

TINY_MOE: Final = Shape(n_layers=4, n_embd=256, n_ff=128, n_heads=4, n_kv_heads=2, vocab=512, n_experts=16, n_used=2)
"""About 8 MB: 16 experts of 102 kB (three matrices) in each of 4 layers, 2 of them used for a token."""


def _fit(shape: Shape, size_bytes: int) -> Shape:
    """Return ``shape`` with the ``n_ff`` that brings :func:`plan_bytes` closest to ``size_bytes``."""
    one, two = (plan_bytes(replace(shape, n_ff=32 * k)) for k in (1, 2))
    steps = max(1, 1 + round((size_bytes - one) / (two - one)))
    fitted = replace(shape, n_ff=32 * steps)
    if abs(plan_bytes(fitted) - size_bytes) > 0.1 * size_bytes:
        raise LlmtracedError(f"no preset is near {size_bytes} bytes; the smallest has {one}", USAGE)
    return fitted


def dense_preset(size_bytes: int, quant: str = "Q8_0") -> Shape:
    """Return a dense shape of about ``size_bytes`` (within 2 % from 10 MB up): 24 layers of 2048 at 1.7 GB."""
    ladder = ((3_000_000_000, 32, 4096), (1_000_000_000, 24, 2048), (200_000_000, 16, 1024), (30_000_000, 12, 512))
    layers, embd = next(((n, e) for least, n, e in ladder if size_bytes >= least), (4, 256))
    return _fit(Shape(layers, embd, 32, embd // 64, max(1, embd // 256), quant=quant), size_bytes)


def moe_preset(size_bytes: int, *, n_experts: int = 64, n_used: int = 4, quant: str = "Q8_0") -> Shape:
    """Return a mixture-of-experts shape of about ``size_bytes`` (within 4 % from 100 MB up).

    At 2.7 GB: 12 layers of 1024, 64 experts of 3.5 MB a layer, 4 of them used for a token.
    """
    ladder = ((10_000_000_000, 32, 2048), (1_000_000_000, 12, 1024), (200_000_000, 8, 512))
    layers, embd = next(((n, e) for least, n, e in ladder if size_bytes >= least), (4, 256))
    shape = Shape(layers, embd, 32, embd // 64, embd // 256, quant=quant, n_experts=n_experts, n_used=n_used)
    return _fit(shape, size_bytes)


def write_dense(
    path: Path | str,
    *,
    n_layers: int,
    n_embd: int,
    n_ff: int,
    n_heads: int,
    n_kv_heads: int,
    vocab: int = 2048,
    quant: str = "Q8_0",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a dense model of the llama architecture; see :func:`write`."""
    shape = Shape(n_layers, n_embd, n_ff, n_heads, n_kv_heads, vocab, quant)
    return write(path, shape, seed=seed, overwrite=overwrite)


def write_moe(
    path: Path | str,
    *,
    n_layers: int,
    n_embd: int,
    n_ff_expert: int,
    n_experts: int,
    n_used: int,
    n_heads: int,
    n_kv_heads: int,
    vocab: int = 2048,
    quant: str = "Q8_0",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a mixture of experts (llama architecture, merged expert tensors, as Mixtral); see :func:`write`."""
    shape = Shape(n_layers, n_embd, n_ff_expert, n_heads, n_kv_heads, vocab, quant, n_experts, n_used)
    return write(path, shape, seed=seed, overwrite=overwrite)


def write(
    path: Path | str, shape: Shape, *, seed: int = 0, overwrite: bool = False, split_max_tensors: int = 0
) -> Path:
    """Write the model ``shape`` to ``path`` and return the path to give to an engine.

    The file appears under its name only when it is complete. With ``split_max_tensors`` it is written as several
    files ``NAME-0000i-of-0000N.gguf`` of at most that many tensors, and the first one's path is returned.

    Raises:
        LlmtracedError: the file exists and ``overwrite`` is not set, or the shape is impossible.
    """
    path = Path(path)
    plans = tensor_plan(shape)
    if path.exists() and not overwrite:
        raise LlmtracedError(f"{printable(str(path))} already exists, will not overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it announces every file at INFO
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        writer = gguf.GGUFWriter(Path(folder) / path.name, "llama", split_max_tensors=split_max_tensors)
        _add_metadata(writer, shape, path.stem)
        for plan in plans:
            # With a type that is not uint8 the writer takes the shape in elements, whatever raw_dtype is.
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float16), plan.nbytes, raw_dtype=plan.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, {p.name: p for p in plans}, seed)
        writer.close()
        written = sorted(Path(folder).iterdir())
        for file in written:
            target = path.parent / file.name
            if target.exists() and not overwrite:
                raise LlmtracedError(f"{printable(str(target))} already exists, will not overwrite")
            file.replace(target)
    return path.parent / written[0].name


def _write_data(writer: Any, plans: dict[str, Plan], seed: int) -> None:
    """Stream every tensor's bytes into the writer's open files, each tensor from its own place in the tile."""
    tiles: dict[tuple[gguf.GGMLQuantizationType, float], memoryview] = {}
    for number, (out, infos) in enumerate(zip(writer.fout, writer.tensors, strict=True)):
        writer.write_padding(out, out.tell())
        for index, name in enumerate(infos):
            plan = plans[name]
            key = (plan.kind, plan.std)
            if key not in tiles:
                tiles[key] = memoryview(_tile(plan.kind, plan.std, np.random.default_rng((seed, len(tiles)))))
            unit = int(gguf.GGML_QUANT_SIZES[plan.kind][1])
            start = unit * ((7919 * (number * 1000 + index)) % (len(tiles[key]) // unit))
            for piece in _cycle(tiles[key], start, plan.nbytes):
                out.write(piece)
            writer.write_padding(out, plan.nbytes)


def _cycle(tile: memoryview, start: int, nbytes: int) -> Iterator[memoryview]:
    """Yield slices of ``tile``, read round and round from ``start``, that add up to ``nbytes``."""
    while nbytes:
        piece = tile[start : start + nbytes]
        yield piece
        nbytes -= len(piece)
        start = 0


def _tile(kind: gguf.GGMLQuantizationType, std: float, rng: np.random.Generator) -> bytes:
    """Return whole random blocks of ``kind`` whose weights have standard deviation ``std`` (all ones if 0).

    Block layouts are ggml's (ggml-common.h): Q8_0 is an f16 scale and 32 int8; Q4_0 is an f16 scale and 16 bytes of
    nibbles that stand for -8…7. A random sign on the scale makes the mean zero.
    """
    n = _TILE_BLOCKS
    if std == 0.0:
        return np.ones(n, np.float32).tobytes()
    if kind == gguf.GGMLQuantizationType.F32:
        return (rng.standard_normal(n, np.float32) * np.float32(std)).tobytes()
    if kind == gguf.GGMLQuantizationType.F16:
        return (rng.standard_normal(n * 32, np.float32) * np.float32(std)).astype(np.float16).tobytes()
    payload, spread = (32, 73.9) if kind == gguf.GGMLQuantizationType.Q8_0 else (16, 4.64)
    blocks: npt.NDArray[np.void] = np.zeros(n, np.dtype([("d", "<f2"), ("q", "u1", (payload,))]))
    blocks["d"] = rng.choice(np.array([-std / spread, std / spread]), n).astype(np.float16)
    blocks["q"] = rng.integers(0, 256, (n, payload), np.uint8)
    return blocks.tobytes()


def _add_metadata(writer: Any, shape: Shape, name: str) -> None:
    """Add hyperparameters and a SentencePiece vocabulary: 3 specials, 256 byte tokens, fillers."""
    writer.add_name(name)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(int(gguf.LlamaFileType["MOSTLY_" + shape.quant]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if shape.n_experts:
        writer.add_expert_count(shape.n_experts)
        writer.add_expert_used_count(shape.n_used)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(_BYTE_TOKENS))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * _BYTE_TOKENS
    fillers = range(shape.vocab - len(tokens))
    tokens += [f"\u2581w{n}" for n in fillers]
    kinds += [gguf.TokenType.NORMAL] * len(fillers)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (_FIRST_BYTE + _BYTE_TOKENS) + [-1.0 - n for n in fillers])
    writer.add_token_types([int(k) for k in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
