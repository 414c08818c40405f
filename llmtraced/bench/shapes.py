"""Which tensors a synthesised model has: llama.cpp's architectures, shapes, and the plan of a file. Pure.

Tensor names are those that llama.cpp loads (``src/models/*.cpp``): what it requires is there, and what published models
of the kind have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import gguf

from llmtraced.bench.routing import HIDDEN_STD, Activation, Made, Routing, activation_rms, mixed_rms
from llmtraced.errors import USAGE, LlmtracedError, printable

__all__ = ["ARCHS", "BYTE_TOKENS", "FIRST_BYTE", "QUANTS", "Arch", "Plan", "Shape", "dense_width", "tensor_plan"]

QUANTS: Final = ("Q8_0", "Q4_0", "F16")
"""Tensor types that can be written for the matrices. Norms and routers are F32, as in published models."""

FIRST_BYTE: Final = 3
"""The first token of the 256 that are single bytes, after <unk>, <s>, </s>."""

BYTE_TOKENS: Final = 256
_BIAS_STD: Final = 0.05


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        like: a published model of the kind.
        ffn_norm: name of the norm before the experts.
        shared: width of the shared expert, in experts; 0: none.
        shared_gate: the shared expert has a gate of its own.
        n_dense: layers without experts at the beginning, as wide as the experts that a token uses.
        qkv_bias: attention's inputs have biases.
        biases: attention's output, router and experts have biases, and there are attention sinks.
        renormalised: the weights of the chosen experts add up to 1.
        activation: between an expert's matrices.
        window: tokens that every other layer's attention sees; 0: all.
        fused: an expert's gate and up matrices are one.
        corrected: experts are chosen by the logits' sigmoid plus a correction (``exp_probs_b``).
        qk_norm: queries and keys are normalised.
    """

    like: str
    ffn_norm: str = "ffn_norm"
    shared: int = 0
    shared_gate: bool = False
    n_dense: int = 0
    qkv_bias: bool = False
    biases: bool = False
    renormalised: bool = False
    activation: Activation = "silu"
    window: int = 0
    fused: bool = False
    corrected: bool = False
    qk_norm: bool = False


ARCHS: Final[Mapping[str, Arch]] = {
    "llama": Arch("Mixtral; without experts Llama", renormalised=True),
    "qwen2moe": Arch("Qwen1.5-MoE", shared=4, shared_gate=True, qkv_bias=True),
    "deepseek": Arch("DeepSeekMoE", shared=2, n_dense=1),
    "gpt-oss": Arch(
        "gpt-oss",
        ffn_norm="post_attention_norm",
        qkv_bias=True,
        biases=True,
        renormalised=True,
        activation="oai",
        window=128,
    ),
    "hy_v3": Arch(
        "Hunyuan 3; choices as DeepSeek-V3's and GLM-4.5's",
        shared=1,
        n_dense=1,
        renormalised=True,
        fused=True,
        corrected=True,
        qk_norm=True,
    ),
}
"""By name in ``general.architecture``."""


@dataclass(frozen=True)
class Shape:
    """What a model looks like; ``n_experts`` 0 means dense, else ``n_ff`` is the width of one expert.

    ``arch`` is one of :data:`ARCHS`; ``routing`` says how experts are chosen; ``groups``, in how many groups of
    neighbours they are, and from how many of these a token's are chosen.
    """

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
    arch: str = "llama"
    routing: Routing = field(default_factory=Routing)
    groups: tuple[int, int] = (1, 1)

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
        elif self.vocab < FIRST_BYTE + BYTE_TOKENS:
            wrong = f"vocab must be at least {FIRST_BYTE + BYTE_TOKENS} (3 specials and 256 byte tokens)"
        elif self.n_experts and not 0 < self.n_used <= self.n_experts:
            wrong = "n_used must lie between 1 and n_experts"
        elif self.groups != (1, 1) and (self.n_experts % self.groups[0] or not 0 < self.groups[1] < self.groups[0]):
            wrong = "groups must be of equal size, and fewer used than there are"
        elif self.arch not in ARCHS:
            wrong = f"arch is {printable(self.arch)}, must be one of {', '.join(ARCHS)}"
        elif self.arch != "llama" and not self.n_experts:
            wrong = f"{self.arch} is not dense: it needs experts"
        elif self.n_layers <= ARCHS[self.arch].n_dense:
            wrong = f"n_layers must be more than {self.arch}'s {ARCHS[self.arch].n_dense} without experts"
        elif self.n_experts:
            wrong = self.routing.wrong(self.n_embd, self.vocab)
        if wrong:
            raise LlmtracedError(f"cannot synthesise such a model: {wrong}", USAGE)


@dataclass(frozen=True)
class Plan:
    """One tensor to be written: ``shape`` in numpy order (slowest first), ``std`` of its elements, 0 for all ones.

    Where ``made`` says so, it is computed (:meth:`Weights.rows`, for ``layer``) instead of drawn, and ``std`` is 0.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    std: float
    made: Made | None = None
    layer: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)


def tensor_plan(shape: Shape) -> list[Plan]:
    """Return the tensors of ``shape`` in file order: embedding, layers, output (llama.cpp's names)."""
    shape.check()
    kind = gguf.GGMLQuantizationType[shape.quant]
    embd = shape.n_embd
    if shape.n_experts:
        ends = [Plan(f"{name}.weight", (shape.vocab, embd), kind, 0.0, made) for name, made in _MADE_ENDS]
    else:
        ends = [
            Plan("token_embd.weight", (shape.vocab, embd), kind, 1.0),
            Plan("output.weight", (shape.vocab, embd), kind, HIDDEN_STD / math.sqrt(embd)),
        ]
    layers = (plan for n in range(shape.n_layers) for plan in _layer_plan(shape, n, kind))
    return [ends[0], *layers, _f32("output_norm.weight", embd), ends[1]]


_MADE_ENDS: Final[tuple[tuple[str, Made], ...]] = (("token_embd", "embedding"), ("output", "output"))


def _f32(name: str, *dims: int, std: float = 0.0, made: Made | None = None, layer: int = -1) -> Plan:
    return Plan(name, dims, gguf.GGMLQuantizationType.F32, std, made, layer)


def _layer_plan(shape: Shape, n: int, kind: gguf.GGMLQuantizationType) -> Iterator[Plan]:
    """Yield the tensors of layer ``n``."""
    b, arch, embd, experts = f"blk.{n}", ARCHS[shape.arch], shape.n_embd, shape.n_experts
    kv = embd // shape.n_heads * shape.n_kv_heads

    def matrix(name: str, *dims: int, std: float = HIDDEN_STD) -> Plan:
        return Plan(f"{b}.{name}.weight", dims, kind, std / math.sqrt(dims[-1]))

    def bias(name: str, *dims: int) -> Plan:
        return _f32(f"{b}.{name}.bias", *dims, std=_BIAS_STD)

    def feed_forward(suffix: str, width: int, adds: float, *merged: int) -> Iterator[Plan]:
        yield matrix(f"ffn_gate{suffix}", *merged, width, embd)
        yield matrix(f"ffn_up{suffix}", *merged, width, embd)
        yield matrix(f"ffn_down{suffix}", *merged, embd, width, std=adds)

    yield _f32(f"{b}.attn_norm.weight", embd)
    yield from (matrix("attn_q", embd, embd), matrix("attn_k", kv, embd), matrix("attn_v", kv, embd))
    if arch.qkv_bias:
        yield from (bias("attn_q", embd), bias("attn_k", kv), bias("attn_v", kv))
    if arch.qk_norm:
        head = embd // shape.n_heads
        yield from (_f32(f"{b}.attn_q_norm.weight", head), _f32(f"{b}.attn_k_norm.weight", head))
    # A mixture's drift is to be that of its experts: attention, with random weights, adds about the same every time.
    yield matrix("attn_output", embd, embd, std=HIDDEN_STD * (shape.routing.drift if experts else 1))
    if arch.biases:
        yield from (bias("attn_output", embd), _f32(f"{b}.attn_sinks.weight", shape.n_heads, std=1.0))
    yield _f32(f"{b}.{arch.ffn_norm}.weight", embd)
    if not experts:
        yield from feed_forward("", shape.n_ff, HIDDEN_STD)
        return
    routed, shared, dense = _added(shape)
    if n < arch.n_dense:
        yield from feed_forward("", dense_width(shape), dense)
        return
    yield _f32(f"{b}.ffn_gate_inp.weight", experts, embd, made="router", layer=n)
    if arch.biases:
        yield _f32(f"{b}.ffn_gate_inp.bias", experts, made="popularity", layer=n)
    if arch.corrected:
        yield _f32(f"{b}.exp_probs_b", experts, std=_BIAS_STD)
    if arch.fused:
        yield matrix("ffn_gate_up_exps", experts, 2 * shape.n_ff, embd)
        yield matrix("ffn_down_exps", experts, embd, shape.n_ff, std=routed)
    else:
        yield from feed_forward("_exps", shape.n_ff, routed, experts)
    if arch.biases:
        yield from (bias("ffn_gate_exps", experts, shape.n_ff), bias("ffn_up_exps", experts, shape.n_ff))
        yield bias("ffn_down_exps", experts, embd)
    if arch.shared:
        if arch.shared_gate:
            yield _f32(f"{b}.ffn_gate_inp_shexp.weight", embd, std=_BIAS_STD / math.sqrt(embd))
        yield from feed_forward("_shexp", arch.shared * shape.n_ff, shared)


def dense_width(shape: Shape) -> int:
    """Return the width of a mixture's layers without experts: that of all experts a token uses in the others."""
    return (shape.n_used + ARCHS[shape.arch].shared) * shape.n_ff


def _added(shape: Shape) -> tuple[float, float, float]:
    """Return the scales of the down matrices of experts, shared expert and dense layers, in units of 1/sqrt(width).

    With them each layer adds ``routing.drift`` to the residual stream, half of its square from the shared expert if
    there is one.
    """
    arch, routing = ARCHS[shape.arch], shape.routing
    one = routing.drift / activation_rms(arch.activation)
    sharpness = 0.0 if arch.corrected else routing.sharpness  # the sigmoids of those that are chosen are all near 1
    mixed = mixed_rms(shape.n_experts, shape.n_used, sharpness, renormalised=arch.renormalised)
    part = math.sqrt(0.5) if arch.shared else 1.0
    gate = 0.5 if arch.shared_gate else 1.0  # its logits are near 0
    return part * one / mixed, part * one / gate, one
