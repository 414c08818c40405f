"""GGUF models with random weights, written in seconds, that a real llama-server runs.

Page faults, readahead and eviction do not care what the weights say, only where they lie; so a synthesised model of
the right shape stands in for a download of gigabytes. :mod:`llmtraced.bench.shapes` says which tensors it has;
:func:`write` streams them, reusing one tile of random blocks a type, and holds a few megabytes in memory.

The weights are scaled so that numbers stay finite and the residual stream keeps remembering its token. Which experts a
mixture chooses is made like the routing of trained models, with knobs: :mod:`llmtraced.bench.routing`.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

from llmtraced.bench.routing import Routing, Weights
from llmtraced.bench.shapes import ARCHS, BYTE_TOKENS, FIRST_BYTE, QUANTS, Plan, Shape, dense_width, tensor_plan
from llmtraced.errors import USAGE, LlmtracedError, printable

__all__ = [
    "QUANTS",
    "TINY_DENSE",
    "TINY_MOE",
    "Plan",
    "Routing",
    "Shape",
    "dense_preset",
    "fingerprint",
    "moe_preset",
    "plan_bytes",
    "tensor_plan",
    "write",
    "write_dense",
    "write_moe",
]

_TILE_BLOCKS: Final = 65_537
"""Blocks of 32 weights in the reused tile. A prime, so that no two rows, tensors or experts start at the same block."""

_EDITION: Final = 3
"""Of what is written for a shape: to be raised when that changes, so that :func:`fingerprint` does."""


def plan_bytes(shape: Shape) -> int:
    """Return the bytes of all tensor data of ``shape``; the file is larger by its header (tens of kilobytes)."""
    return sum(p.nbytes for p in tensor_plan(shape))


def fingerprint(shape: Shape) -> str:
    """Return 8 hexadecimal digits that differ where :func:`write` would write another file: for names in caches."""
    return hashlib.blake2b(f"{_EDITION} {shape}".encode(), digest_size=4).hexdigest()


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


def moe_preset(
    size_bytes: int,
    *,
    n_experts: int = 64,
    n_used: int = 4,
    quant: str = "Q8_0",
    arch: str = "llama",
    routing: Routing | None = None,
    groups: tuple[int, int] = (1, 1),
) -> Shape:
    """Return a mixture-of-experts shape of about ``size_bytes`` (within 4 % from 100 MB up).

    At 2.7 GB: 12 layers of 1024, 64 experts of 3.5 MB a layer, 4 of them used for a token. ``n_experts=8, n_used=2``
    is Mixtral's; ``arch`` is one of :data:`llmtraced.bench.shapes.ARCHS`.
    """
    ladder = ((10_000_000_000, 32, 2048), (1_000_000_000, 12, 1024), (200_000_000, 8, 512))
    layers, embd = next(((n, e) for least, n, e in ladder if size_bytes >= least), (4, 256))
    shape = Shape(layers, embd, 32, embd // 64, embd // 256, quant=quant, n_experts=n_experts, n_used=n_used, arch=arch)
    return _fit(replace(shape, routing=routing or Routing(), groups=groups), size_bytes)


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
    arch: str = "llama",
    routing: Routing | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a mixture of experts with merged expert tensors, by default as Mixtral; see :func:`write`."""
    shape = Shape(n_layers, n_embd, n_ff_expert, n_heads, n_kv_heads, vocab, quant, n_experts, n_used, arch=arch)
    shape = replace(shape, routing=routing or Routing())
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
        writer = gguf.GGUFWriter(Path(folder) / path.name, shape.arch, split_max_tensors=split_max_tensors)
        _add_metadata(writer, shape, path.stem)
        for plan in plans:
            # With a type that is not uint8 the writer takes the shape in elements, whatever raw_dtype is.
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float16), plan.nbytes, raw_dtype=plan.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, {p.name: p for p in plans}, shape, seed)
        writer.close()
        written = sorted(Path(folder).iterdir())
        for file in written:
            target = path.parent / file.name
            if target.exists() and not overwrite:
                raise LlmtracedError(f"{printable(str(target))} already exists, will not overwrite")
            file.replace(target)
    return path.parent / written[0].name


def _write_data(writer: Any, plans: dict[str, Plan], shape: Shape, seed: int) -> None:
    """Stream every tensor's bytes into the writer's open files, each tensor from its own place in the tile."""
    tiles: dict[tuple[gguf.GGMLQuantizationType, float], memoryview] = {}
    biased = ARCHS[shape.arch].biases
    first_word = FIRST_BYTE + BYTE_TOKENS
    weights = Weights(
        shape.routing, shape.n_embd, shape.n_layers, shape.n_experts, shape.vocab, first_word, biased, seed
    )
    for number, (out, infos) in enumerate(zip(writer.fout, writer.tensors, strict=True)):
        writer.write_padding(out, out.tell())
        for index, name in enumerate(infos):
            plan = plans[name]
            if plan.made:
                for rows in weights.rows(plan.made, plan.layer):
                    out.write(gguf.quants.quantize(rows, plan.kind).tobytes())
                writer.write_padding(out, plan.nbytes)
                continue
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
    arch = ARCHS[shape.arch]
    writer.add_feed_forward_length(dense_width(shape) if arch.n_dense else shape.n_ff)
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
        if shape.arch != "llama":
            writer.add_expert_feed_forward_length(shape.n_ff)
    if arch.shared_gate or arch.fused:
        writer.add_expert_shared_feed_forward_length(arch.shared * shape.n_ff)
    elif arch.shared:
        writer.add_expert_shared_count(arch.shared)
    if arch.n_dense:
        writer.add_leading_dense_block_count(arch.n_dense)
    if arch.corrected:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(arch.renormalised)
    if shape.groups[0] > 1:
        writer.add_expert_group_count(shape.groups[0])
        writer.add_expert_group_used_count(shape.groups[1])
    if arch.window:
        writer.add_sliding_window(arch.window)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(BYTE_TOKENS))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * BYTE_TOKENS
    fillers = range(shape.vocab - len(tokens))
    tokens += [f"\u2581w{n}" for n in fillers]
    kinds += [gguf.TokenType.NORMAL] * len(fillers)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (FIRST_BYTE + BYTE_TOKENS) + [-1.0 - n for n in fillers])
    writer.add_token_types([int(k) for k in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
