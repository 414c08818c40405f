"""The experts that a trace says were chosen, compared with what llmtraced had no part in choosing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from llmtraced.analysis.trace import Trace, collect
from llmtraced.gguf_map import read_model

__all__ = ["compare", "only_the_chosen_are_touched"]

CLOSE = 1e-4
"""Logits, whose standard deviation is 2, that are nearer to each other than this count as a tie: llama-server adds up
the same products in another order."""


def compare(trace: Trace) -> tuple[int, int, int]:
    """Return how many choices of experts were compared, how many of them are ties, and of how many tokens they are."""
    own = trace.table("router_scores", "decode").filter(pl.col("source") == "router", pl.col("ahead") == 0)
    chosen = trace.table("routing", "decode").select("token", "layer", "experts")
    rows = collect(own.select("token", "layer", "scores").join(chosen, on=("token", "layer")))
    scores = np.array(rows["scores"].to_list())
    experts = np.array(rows["experts"].to_list())
    k = experts.shape[1]
    given = np.take_along_axis(scores, experts, axis=1)
    best = -np.sort(-scores, axis=1)[:, :k]
    wrong = given != best  # in the router's order; the same number stands for the same expert
    assert np.abs(given - best)[wrong].max(initial=0) < CLOSE
    unlike = (np.sort(np.argsort(-scores, axis=1)[:, :k], axis=1) != np.sort(experts, axis=1)).any(axis=1)
    return rows.height, int(unlike.sum()), rows["token"].n_unique()


def only_the_chosen_are_touched(trace: Trace, path: Path) -> None:
    """Check each fault on a merged matrix: its expert is what the byte says, and one that was chosen for that token."""
    merged = {t.name: t for t in read_model(path).tensors if t.n_experts and t.name.endswith(".weight")}
    chosen: dict[tuple[int, int], set[int]] = {}
    for token, layer, experts in collect(trace.table("routing").select("token", "layer", "experts")).iter_rows():
        chosen.setdefault((token, layer), set()).update(experts)
    touched = collect(
        trace.table("faults")
        .filter(pl.col("expert") >= 0, pl.col("token").is_in(sorted({token for token, _ in chosen})))
        .select("token", pl.col("tensor_name").cast(pl.String), "expert", "offset_bytes")
    ).filter(pl.col("tensor_name").is_in(list(merged)))  # biases share pages with what lies beside them
    for token, name, expert, offset in touched.iter_rows():
        one = merged[name]
        assert (offset - one.offset) // one.expert_bytes == expert
        assert expert in chosen[token, one.layer], (token, name, expert)
    assert set(touched["tensor_name"]) == set(merged)
    assert touched.select("tensor_name", "expert").n_unique() > len(merged)
