"""Small GGUF files that belong beside a model, or load in a way of their own: random weights for a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from llmtraced.gguf_map import read_model

__all__ = ["LAZY", "write_lazy", "write_lora", "write_projector"]

LAZY: Final = "per_layer_token_embd.weight"
"""The tensor that llama.cpp reads row by row with ``--lazy-mode on``."""

_RANK: Final = 8
_BYTES: Final = 256


def write_lora(path: Path, base: Path) -> Path:
    """Write an adapter for all queries and all down projections of ``base``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0 * _RANK)
    rng = np.random.default_rng(1)
    for tensor in read_model(base).tensors:
        if tensor.name.endswith(("attn_q.weight", "ffn_down.weight")):
            wide, high = tensor.shape
            writer.add_tensor(f"{tensor.name}.lora_a", rng.normal(0, 0.05, (_RANK, wide)).astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", rng.normal(0, 0.05, (high, _RANK)).astype(np.float32))
    return _close(writer, path)


def write_lazy(path: Path, layers: int = 6, wide: int = 256, inner: int = 512, vocab: int = 16_384) -> Path:
    """Write a model of the gemma4 architecture whose embeddings of layers (33 MB) are most of it."""
    head, each = 64, 320
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(wide)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_sliding_window(512)
    writer.add_vocab_size(vocab)
    for name, value in (("attention.key_length_swa", head), ("attention.value_length_swa", head)):
        writer.add_uint32(f"gemma4.{name}", value)
    writer.add_uint32("gemma4.rope.dimension_count_swa", head)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", each)
    writer.add_array("gemma4.attention.sliding_window_pattern", [bool(n % 2) for n in range(layers)])
    _add_words(writer, vocab)
    shapes = {"token_embd": (vocab, wide), "per_layer_token_embd": (vocab, each * layers)}
    shapes |= {"per_layer_model_proj": (each * layers, wide)}
    norms = {"output_norm": wide, "per_layer_proj_norm": each, "rope_freqs": head // 2}
    for n in range(layers):
        sizes = {"attn_q": (4 * head, wide), "attn_k": (head, wide), "attn_v": (head, wide)}
        sizes |= {"attn_output": (wide, 4 * head), "ffn_gate": (inner, wide), "ffn_up": (inner, wide)}
        sizes |= {"ffn_down": (wide, inner), "inp_gate": (each, wide), "proj": (wide, each)}
        shapes |= {f"blk.{n}.{name}": size for name, size in sizes.items()}
        names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
        norms |= {f"blk.{n}.{name}": wide for name in names}
        norms |= {f"blk.{n}.attn_q_norm": head, f"blk.{n}.attn_k_norm": head}
    _add_tensors(writer, shapes, norms)
    return _close(writer, path)


def write_projector(path: Path, wide: int, layers: int = 4) -> Path:
    """Write a vision projector of Gemma 3's kind for a model that is ``wide``: 64 patches, 4 tokens an image."""
    own, inner, side, patch = 128, 256, 112, 14
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "gemma3")
    numbers = {"embedding_length": own, "feed_forward_length": inner, "block_count": layers, "projection_dim": wide}
    numbers |= {"attention.head_count": 2, "image_size": side, "patch_size": patch}
    for name, value in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", [0.5, 0.5, 0.5])
    rng = np.random.default_rng(2)
    sizes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (own, 3, patch, patch),
        "v.patch_embd.bias": (own,),
        "v.position_embd.weight": ((side // patch) ** 2, own),
        "v.post_ln.weight": (own,),
        "v.post_ln.bias": (own,),
        "mm.input_projection.weight": (own, wide),
        "mm.soft_emb_norm.weight": (own,),
    }
    for n in range(layers):
        matrices = {f"attn_{x}": (own, own) for x in ("q", "k", "v", "out")}
        matrices |= {"ffn_up": (inner, own), "ffn_down": (own, inner)}
        sizes |= {f"v.blk.{n}.{name}.weight": size for name, size in matrices.items()}
        sizes |= {f"v.blk.{n}.{name}.bias": (size[0],) for name, size in matrices.items()}
        sizes |= {f"v.blk.{n}.ln{i}.{part}": (own,) for i in (1, 2) for part in ("weight", "bias")}
    for name, size in sizes.items():
        writer.add_tensor(name, rng.normal(0, 0.02, size).astype(np.float32))
    return _close(writer, path)


def _add_words(writer: Any, vocab: int) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(_BYTES))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * _BYTES]
    fill = vocab - len(words)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*words, *(f"\u2581w{n}" for n in range(fill))])
    writer.add_token_scores([0.0] * len(words) + [-1.0 - n for n in range(fill)])
    writer.add_token_types([int(kind) for kind in kinds] + [int(gguf.TokenType.NORMAL)] * fill)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def _add_tensors(writer: Any, matrices: dict[str, tuple[int, int]], vectors: dict[str, int]) -> None:
    """Add matrices in Q8_0, of one small piece of random numbers over and over, and vectors of ones."""
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, (rows, wide) in matrices.items():
        some = np.random.default_rng(rows + wide).normal(0, wide**-0.5, (61, wide)).astype(np.float32)
        tile = gguf.quants.quantize(some, kind)
        data = np.resize(tile, (rows, tile.shape[1]))
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name, wide in vectors.items():
        writer.add_tensor(f"{name}.weight", np.ones(wide, np.float32))


def _close(writer: Any, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
