"""What of a model is a mixture of experts, for the sidecar: routers, norms, and where the experts' slices lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import Graph, Layout
from llmtraced.gguf_map import Model, Tensor
from llmtraced.prefetch.router import LANES, machine_code

__all__ = ["ATTENTION", "by_sigmoid", "groups", "mixture", "parameters"]

_NORMS: Final = ("ffn_norm", "post_attention_norm")
"""Norms whose result is a router's input, by what architectures call them; the first that a layer has."""
ATTENTION: Final = ("attn_q", "attn_qkv", "attn_q_a")
"""Matrices that the input of a layer's attention is multiplied with first."""
_SIGMOID: Final = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID


def by_sigmoid(model: Model) -> bool:
    """Tell whether a router's probabilities are its logits' sigmoid, not their softmax."""
    return bool(model.metadata.get(f"{model.architecture}.expert_gating_func") == _SIGMOID)


def groups(model: Model, n_experts: int) -> tuple[int, int]:
    """Return in how many groups a layer's experts are, and from how many of them a token's are chosen; (1, 1): all.

    Raises:
        LlmtracedError: so many experts are not in so many equal groups.
    """
    count, used = (model.metadata.get(f"{model.architecture}.expert_group_{what}") for what in ("count", "used_count"))
    if not isinstance(count, int) or not isinstance(used, int) or not 0 < used < count:
        return 1, 1
    if n_experts % count:
        raise LlmtracedError(f"its {n_experts} experts cannot be in {count} equal groups", UNSUPPORTED)
    return count, used


def parameters(by_name: Mapping[str, Tensor], layer: int, n_experts: int, width: int) -> dict[str, Tensor | None]:
    """Return what belongs to a layer's router, float32, in one dimension; None: there is no such tensor.

    Args:
        by_name: the model's tensors.
        layer: its number.
        n_experts: of it.
        width: of the router's input.

    Returns:
        ``norm``, whose result is the router's input; ``attention_norm``, likewise of the attention; ``bias`` of
        the logits; ``correction`` of the probabilities before the choice.
    """

    def find(names: Iterable[str], count: int) -> Tensor | None:
        found = (by_name.get(f"blk.{layer}.{name}") for name in names)
        return next((t for t in found if t is not None and _plain(t) and t.shape == (count,)), None)

    return {
        "norm": find([f"{name}.weight" for name in _NORMS], width),
        "attention_norm": find(["attn_norm.weight"], width),
        "bias": find(["ffn_gate_inp.bias"], n_experts),
        "correction": find(["exp_probs_b.bias", "exp_probs_b"], n_experts),
    }


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
        attention; ``sigmoid``: probabilities are the logits' sigmoid, not their softmax; ``groups``: :func:`groups`.

    Raises:
        LlmtracedError: the layers differ, the experts do not fit into their groups, or the file does not say how many
            are used.
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
    grouped = groups(model, n_experts)
    if n_experts // grouped[0] * grouped[1] < used:
        raise LlmtracedError(f"{used} experts cannot be chosen from {grouped[1]} of {grouped[0]} groups", UNSUPPORTED)
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

    def of(layer: int, tensors: list[Tensor]) -> dict[str, Any]:
        router = routers[layer]
        attention = next((marks[n] for n in (f"blk.{layer}.{a}.weight" for a in ATTENTION) if n in marks), None)
        known = code is not None and router is not None and _plain(router)
        found = parameters(by_name, layer, n_experts, width)
        return {
            "router_mark": marks.get(router.name) if known and router is not None else None,
            "experts_mark": first_mark(tensors),
            "slices": [[t.shard, t.offset, t.expert_bytes] for t in tensors],
            "router": [router.shard, router.offset] if known and router is not None else None,
            **{name: None if t is None else [t.shard, t.offset, t.shape[0]] for name, t in found.items()},
            "attention_mark": attention if known else None,
        }

    return {
        "n_experts": n_experts,
        "n_used": used,
        "n": width if code is not None else 0,
        "code": code,
        "sigmoid": by_sigmoid(model),
        "groups": grouped,
        "layers": [of(layer, tensors) for layer, tensors in sorted(layers.items())],
    }


def _plain(tensor: Tensor) -> bool:
    return tensor.type == "F32"
