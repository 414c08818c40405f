"""What of a model is a mixture of experts, for the sidecar: routers, norms, and where the experts' slices lie."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import Graph, Layout
from llmtraced.gguf_map import Model, Tensor
from llmtraced.prefetch.router import LANES, machine_code

__all__ = ["ATTENTION", "NORMS", "SIGMOID", "mixture"]

NORMS: Final = ("ffn_norm", "post_attention_norm")
"""Norms whose result is a router's input, by what architectures call them; the first that a layer has."""
ATTENTION: Final = ("attn_q", "attn_qkv", "attn_q_a")
"""Matrices that the input of a layer's attention is multiplied with first."""
SIGMOID: Final = 2
"""Value of ``expert_gating_func``: llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID."""


def mixture(model: Model, graph: Graph, layout: Layout, marks: Mapping[str, int]) -> dict[str, Any]:
    """Return what the sidecar is told of the experts.

    Args:
        model: a mixture of experts.
        graph: of the server; says in which order a layer uses its merged matrices.
        layout: by which it was read.
        marks: numbers of the clock's marks, by name of the weight.

    Returns:
        ``n_experts``, ``n_used``; ``n``: length of a router's input, 0 if routers cannot be worked out; ``code``: a
        descriptor of the code that does, or None; ``layers``, in order, each with ``router_mark`` and ``experts_mark``
        (null: the clock cannot tell), ``slices`` (file, offset of the first expert's, bytes of each) in the order of
        use, ``router`` (file, offset), ``norm``, ``bias`` of the logits and ``correction`` of the probabilities (file,
        offset, length) or null; and ``attention_mark`` and ``attention_norm`` of the same kind, for the layer's
        attention; ``sigmoid``: probabilities are the logits' sigmoid, not their softmax.

    Raises:
        LlmtracedError: the layers differ, or the file does not say how many experts are used.
    """
    by_name = {tensor.name: tensor for tensor in model.tensors}
    order = [graph.weights[source][0] for node in graph.nodes for source in node.sources if source in graph.weights]
    layers: dict[int, list[Tensor]] = {}
    for name in dict.fromkeys(order):
        tensor = by_name.get(name)
        if tensor is not None and tensor.n_experts:
            layers.setdefault(tensor.layer, []).append(tensor)
    used = model.metadata.get(f"{model.architecture}.expert_used_count")
    experts = {tensor.n_experts for tensors in layers.values() for tensor in tensors}
    if len(experts) != 1 or not isinstance(used, int) or not 0 < used <= max(experts):
        raise LlmtracedError("its layers have different numbers of experts, or it does not say how many", UNSUPPORTED)
    n_experts = experts.pop()
    routers = {layer: by_name.get(f"blk.{layer}.ffn_gate_inp.weight") for layer in layers}
    widths = {t.shape[0] for t in routers.values() if t is not None and _plain(t) and t.shape[1:] == (n_experts,)}
    width = widths.pop() if len(widths) == 1 else 0
    code = None
    if width and width % LANES == 0:
        code = os.memfd_create("llmtraced-router", 0)
        os.write(code, machine_code())

    def first_mark(tensors: list[Tensor]) -> int | None:
        operators = {
            graph.weights[node.sources[0]][0]
            for node in graph.nodes
            if node.op == layout.op_mul_mat_id and node.sources and node.sources[0] in graph.weights
        }
        return next((marks[t.name] for t in tensors if t.name in operators and t.name in marks), None)

    def values(layer: int, names: Sequence[str], count: int) -> list[int] | None:
        found = (by_name.get(f"blk.{layer}.{name}") for name in names)
        one = next((t for t in found if t is not None and _plain(t) and t.shape == (count,)), None)
        return None if one is None else [one.shard, one.offset, count]

    def of(layer: int, tensors: list[Tensor]) -> dict[str, Any]:
        router = routers[layer]
        attention = next((marks[n] for n in (f"blk.{layer}.{a}.weight" for a in ATTENTION) if n in marks), None)
        known = code is not None and router is not None and _plain(router)
        return {
            "router_mark": marks.get(router.name) if known and router is not None else None,
            "experts_mark": first_mark(tensors),
            "slices": [[t.shard, t.offset, t.expert_bytes] for t in tensors],
            "router": [router.shard, router.offset] if known and router is not None else None,
            "norm": values(layer, [f"{name}.weight" for name in NORMS], width),
            "bias": values(layer, ["ffn_gate_inp.bias"], n_experts),
            "correction": values(layer, ["exp_probs_b.bias", "exp_probs_b"], n_experts),
            "attention_mark": attention if known else None,
            "attention_norm": values(layer, ["attn_norm.weight"], width),
        }

    return {
        "n_experts": n_experts,
        "n_used": used,
        "n": width if code is not None else 0,
        "code": code,
        "sigmoid": model.metadata.get(f"{model.architecture}.expert_gating_func") == SIGMOID,
        "layers": [of(layer, tensors) for layer, tensors in sorted(layers.items())],
    }


def _plain(tensor: Tensor) -> bool:
    return tensor.type == "F32"
