"""Graph evaluations, operators and routing from the traced process's ggml (bpf/ggml.bpf.c, docs/ggml.md)."""

from __future__ import annotations

from llmtraced.probes.points import Uprobe, UprobeSet
from llmtraced.schema import Detail

__all__ = ["MATRICES", "POINTS"]

POINTS = (
    Uprobe("on_graph", "ggml_graph_compute", "no token clock: all rows have token 0", Detail.FAULTS),
    Uprobe("on_graph_return", "ggml_graph_compute", "tokens have no end", Detail.FAULTS, on_return=True),
    Uprobe("on_get_rows", "ggml_compute_forward_get_rows", "the experts chosen are not recorded", Detail.OPS),
    # Operators, where MATRICES cannot be had. The first sees all, repacked weights and merged experts too, for a trap
    # each; where a build lacks it, mul_mat by its own symbol.
    Uprobe(
        "on_operator",
        "ggml_cpu_extra_compute_forward",
        "only mul_mat is seen, and not repacked",
        Detail.OPS,
        instead_of_ops=True,
    ),
    Uprobe(
        "on_fused",
        "ggml_compute_forward_rms_norm_mul_fused",
        "norms that are computed together with a multiplication are not recorded",
        Detail.FULL,
        beside="ggml_cpu_extra_compute_forward",
    ),
    Uprobe("on_operator", "ggml_compute_forward_mul_mat", "matrix multiplications are not recorded", Detail.OPS),
)

MATRICES = UprobeSet(
    "on_operator",
    "ggml_compute_forward_mul_mat",
    r"_ZN4ggml3cpu.*15compute_forwardEP19ggml_compute_paramsP11ggml_tensor",
    ("ggml_compute_forward_flash_attn_ext",),
    "with --detail ops, every operator costs a trap, not only matrix multiplications",
    Detail.OPS,
)
"""Matrix multiplications of dense models, alone: by their own symbol, and by the methods for repacked weights.

Where experts' matrices were not repacked, the code that multiplies them is inlined into its caller: for such models, as
for ``full``, the hook for all operators is needed. Attention takes long where the context is long, so it must not count
as the matrix's before it.
"""
