"""Synthesised models: they parse back, have the size asked for, and are not all the same byte."""

from __future__ import annotations

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest

from llmtraced.bench import models
from llmtraced.errors import USAGE, LlmtracedError


@pytest.mark.parametrize("quant", models.QUANTS)
def test_dense_parses_back(tmp_path, quant):
    path = models.write_dense(
        tmp_path / "m.gguf", n_layers=2, n_embd=64, n_ff=96, n_heads=2, n_kv_heads=1, vocab=300, quant=quant
    )
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == 2
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 * 9 + 3
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == quant
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [96, 64]
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == 300


@pytest.mark.parametrize("quant", models.QUANTS)
def test_weights_have_the_planned_spread(tmp_path, quant):
    shape = models.Shape(n_layers=1, n_embd=256, n_ff=512, n_heads=4, n_kv_heads=2, quant=quant)
    reader = gguf.GGUFReader(models.write(tmp_path / "m.gguf", shape))
    plans = {p.name: p for p in models.tensor_plan(shape)}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        expected = plans[tensor.name].std
        if expected:
            assert float(values.std()) == pytest.approx(expected, rel=0.1)
            assert abs(float(values.mean())) < 0.1 * expected
        else:
            assert (values == 1).all()


def test_experts_are_merged_and_differ(tmp_path):
    path = models.write(tmp_path / "moe.gguf", models.TINY_MOE)
    reader = gguf.GGUFReader(path)
    assert reader.fields["llama.expert_count"].contents() == 16
    assert reader.fields["llama.expert_used_count"].contents() == 2
    tensors = {t.name: t for t in reader.tensors}
    for name in ("gate", "up"):
        assert list(tensors[f"blk.3.ffn_{name}_exps.weight"].shape) == [256, 128, 16]
    down = tensors["blk.3.ffn_down_exps.weight"]
    assert list(down.shape) == [128, 256, 16]
    assert len({expert.tobytes() for expert in down.data}) == 16
    assert list(tensors["blk.0.ffn_gate_inp.weight"].shape) == [256, 16]
    assert tensors["blk.0.ffn_gate_inp.weight"].data.std() > 0


def test_data_is_where_the_header_says(tmp_path):
    shape = models.TINY_DENSE
    path = models.write(tmp_path / "m.gguf", shape)
    last = gguf.GGUFReader(path).tensors[-1]
    assert last.name == "output.weight"
    assert path.stat().st_size == last.data_offset + math.ceil(last.n_bytes / 32) * 32
    assert path.stat().st_size == pytest.approx(models.plan_bytes(shape), rel=0.01)
    assert 3_000_000 < path.stat().st_size < 4_000_000


@pytest.mark.parametrize("size", [10**7, 10**8, 253 * 10**6, 10**9, 17 * 10**8, 4 * 10**9, 10**10])
@pytest.mark.parametrize("quant", models.QUANTS)
def test_dense_preset_is_near_its_size(size, quant):
    assert models.plan_bytes(models.dense_preset(size, quant)) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("size", [10**8, 10**9, 27 * 10**8, 10**10])
def test_moe_preset_is_near_its_size(size):
    shape = models.moe_preset(size)
    assert (shape.n_experts, shape.n_used) == (64, 4)
    assert models.plan_bytes(shape) == pytest.approx(size, rel=0.04)


@pytest.mark.parametrize("arch", ["qwen2moe", "deepseek", "gpt-oss", "hy_v3"])
def test_other_architectures_are_near_their_size_too(arch):
    assert models.plan_bytes(models.moe_preset(3 * 10**8, arch=arch)) == pytest.approx(3 * 10**8, rel=0.04)


def names_of(path, layer):
    return {
        t.name.removeprefix(f"blk.{layer}.ffn_") for t in gguf.GGUFReader(path).tensors if f".{layer}.ffn" in t.name
    }


def test_what_architectures_have_beside_experts(tmp_path):
    shapes = {
        arch: replace(models.TINY_MOE, arch=arch) for arch in ("llama", "qwen2moe", "deepseek", "gpt-oss", "hy_v3")
    }
    paths = {arch: models.write(tmp_path / f"{arch}.gguf", shape) for arch, shape in shapes.items()}
    experts = {f"{part}_exps.weight" for part in ("gate", "up", "down")} | {"gate_inp.weight"}
    shared = {f"{part}_shexp.weight" for part in ("gate", "up", "down")}
    biases = {f"{part}_exps.bias" for part in ("gate", "up", "down")} | {"gate_inp.bias"}
    assert names_of(paths["llama"], 0) == experts | {"norm.weight"}
    assert names_of(paths["qwen2moe"], 0) == experts | shared | {"norm.weight", "gate_inp_shexp.weight"}
    assert names_of(paths["deepseek"], 0) == {"norm.weight", "gate.weight", "up.weight", "down.weight"}
    assert names_of(paths["deepseek"], 1) == experts | shared | {"norm.weight"}
    assert names_of(paths["gpt-oss"], 0) == experts | biases
    fused = {"gate_up_exps.weight", "down_exps.weight", "gate_inp.weight"}
    assert names_of(paths["hy_v3"], 1) == fused | shared | {"norm.weight"}
    hunyuan = gguf.GGUFReader(paths["hy_v3"])
    assert hunyuan.fields["hy_v3.expert_gating_func"].contents() == 2
    tensors = {tensor.name: list(tensor.shape) for tensor in hunyuan.tensors}
    assert tensors["blk.1.ffn_gate_up_exps.weight"] == [256, 2 * 128, 16]
    assert tensors["blk.1.exp_probs_b"] == [16]
    keys = gguf.GGUFReader(paths["deepseek"]).fields
    assert keys["deepseek.leading_dense_block_count"].contents() == 1
    assert keys["deepseek.feed_forward_length"].contents() == (2 + 2) * 128
    assert keys["deepseek.expert_feed_forward_length"].contents() == 128


def test_a_bias_holds_the_popularity_of_experts(tmp_path):
    shape = replace(models.TINY_MOE, arch="gpt-oss", routing=models.Routing(skew=1.0, topical=0.0))
    tensors = {t.name: t.data for t in gguf.GGUFReader(models.write(tmp_path / "m.gguf", shape)).tensors}
    assert tensors["blk.2.ffn_gate_inp.bias"].std() == pytest.approx(shape.routing.sharpness)
    assert not tensors["blk.2.ffn_gate_inp.weight"].any()


def test_fingerprints_differ_with_what_is_written():
    shapes = [models.TINY_MOE, models.TINY_DENSE, replace(models.TINY_MOE, arch="qwen2moe")]
    shapes.append(replace(models.TINY_MOE, routing=models.Routing(drift=0.31)))
    marks = [models.fingerprint(shape) for shape in shapes]
    assert len(set(marks)) == len(shapes)
    assert marks[0] == models.fingerprint(replace(models.TINY_MOE))
    assert all(len(mark) == 8 and int(mark, 16) >= 0 for mark in marks)


def test_preset_refuses_what_it_cannot_reach():
    with pytest.raises(LlmtracedError, match="no preset is near 1000000 bytes"):
        models.moe_preset(1_000_000)


def test_same_seed_same_file_other_seed_other_file(tmp_path):
    one, two, three = (
        models.write(tmp_path / f"{n}" / "m.gguf", models.TINY_DENSE, seed=s).read_bytes()
        for n, s in enumerate((1, 1, 2))
    )
    assert one == two
    assert one != three


def test_will_not_overwrite_unless_told(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(LlmtracedError, match="already exists, will not overwrite"):
        models.write(path, models.TINY_DENSE)
    assert path.read_bytes() == b"precious"
    models.write(path, models.TINY_DENSE, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_split_model(tmp_path):
    first = models.write(tmp_path / "s.gguf", models.TINY_DENSE, split_max_tensors=11)
    parts = sorted(tmp_path.iterdir())
    assert first == parts[0]
    assert first.name == "s-00001-of-00004.gguf"
    names = [t.name for part in parts for t in gguf.GGUFReader(part).tensors]
    assert names == [p.name for p in models.tensor_plan(models.TINY_DENSE)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant": "Q3_K"}, "quant is Q3_K"),
        ({"n_embd": 100}, "multiples of 32"),
        ({"n_heads": 3}, "n_heads"),
        ({"vocab": 100}, "at least 259"),
        ({"n_experts": 4, "n_used": 5}, "n_used"),
        ({"n_layers": 0}, "positive"),
        ({"arch": "rwkv"}, "arch is rwkv"),
        ({"arch": "qwen2moe"}, "needs experts"),
        ({"arch": "deepseek", "n_experts": 4, "n_used": 2}, "more than deepseek's 1 without experts"),
        ({"n_experts": 4, "n_used": 2, "routing": models.Routing(stickiness=2)}, "stickiness"),
    ],
)
def test_impossible_shapes_are_usage_errors(change, reason):
    base = {"n_layers": 1, "n_embd": 64, "n_ff": 64, "n_heads": 2, "n_kv_heads": 1}
    with pytest.raises(LlmtracedError, match=reason) as caught:
        models.tensor_plan(models.Shape(**{**base, **change}))
    assert caught.value.exit_code == USAGE
