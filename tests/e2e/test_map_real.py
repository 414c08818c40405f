"""The tensor map of a real model against the gguf package's own reader."""

from __future__ import annotations

import time

import pytest
from gguf import GGUFReader

from llmtraced.bench.engine import ensure_gemma
from llmtraced.gguf_map import read_model

pytestmark = pytest.mark.e2e


def test_a_real_model_entry_by_entry() -> None:
    path = ensure_gemma()
    started = time.process_time()
    model = read_model(path)
    assert time.process_time() - started < 2, "262,144 tokens must be skipped quickly"  # 0.07 s
    expected = {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name, [int(n) for n in t.shape])
        for t in GGUFReader(path).tensors
    }
    assert {t.name: (t.offset, t.size, t.type, list(t.shape)) for t in model.tensors} == expected
    assert (len(model.tensors), model.architecture, model.name) == (236, "gemma3", "Gemma 3 270m")
    assert {t.layer for t in model.tensors} == {-1, *range(18)}
    assert model.metadata["tokenizer.ggml.tokens"] == "STRING[262144]"
    assert model.metadata["gemma3.block_count"] == 18
