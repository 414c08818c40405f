"""A mixture's experts in the sidecar: what it is told of a model, and what it reads, keeps and gives back for ticks.

The files are real ones, small; the pages are fakes that remember what was asked of them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_ggml import MUL_MAT, MUL_MAT_ID, Offsets
from helpers import wait_until

from llmtraced.bench import models
from llmtraced.errors import LlmtracedError
from llmtraced.ggml_layout import Graph, Node
from llmtraced.gguf_map import Model, read_model
from llmtraced.prefetch import mixture as mixture_module
from llmtraced.prefetch.clock import EXPERTS, INPUT
from llmtraced.prefetch.mixture import Mixture
from llmtraced.prefetch.routing import mixture

LAYOUT = Offsets().layout()
N_EXPERTS, N_USED = 16, 2
USED = (  # of a layer, in the order of the graph
    "attn_q.weight",
    "ffn_gate_inp.weight",
    "ffn_up_exps.weight",
    "ffn_gate_exps.weight",
    "ffn_gate_up_exps.weight",
    "ffn_down_exps.weight",
)


def graph_of(model: Model) -> Graph:
    """Return a graph that multiplies the model's weights, layer by layer; up comes before gate, as in llama.cpp."""
    names = {tensor.name for tensor in model.tensors}
    layers = sorted({tensor.layer for tensor in model.tensors if tensor.layer >= 0})
    order = [f"blk.{n}.{part}" for n in layers for part in USED if f"blk.{n}.{part}" in names]
    nodes = tuple(
        Node(MUL_MAT_ID if "_exps" in name else MUL_MAT, f"n{i}", 1, (i + 1,)) for i, name in enumerate(order)
    )
    return Graph(nodes, {i + 1: (name, 0x1000 * (i + 1)) for i, name in enumerate(order)})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {
        arch: models.write(folder / f"{arch}.gguf", replace(models.TINY_MOE, arch=arch))
        for arch in ("llama", "deepseek", "gpt-oss", "hy_v3")
    }


def told_of(path: Path) -> tuple[Model, dict[str, int], dict[str, Any]]:
    """Return the model, the marks' numbers by weight, and what the sidecar is told."""
    model = read_model(path)
    graph = graph_of(model)
    marks = {name: number for number, (name, _) in enumerate(graph.weights.values())}
    return model, marks, mixture(model, graph, LAYOUT, marks)


@pytest.mark.parametrize("arch", ["llama", "deepseek", "gpt-oss", "hy_v3"])
def test_what_the_sidecar_is_told(paths: dict[str, Path], arch: str) -> None:
    model, marks, told = told_of(paths[arch])
    tensors = {tensor.name: tensor for tensor in model.tensors}
    layers = sorted({t.layer for t in model.tensors if t.n_experts})
    assert (told["n_experts"], told["n_used"], told["n"]) == (N_EXPERTS, N_USED, 256)
    assert len(told["layers"]) == len(layers)
    norm = "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"
    parts = ("gate_up", "down") if arch == "hy_v3" else ("up", "gate", "down")
    for number, one in zip(layers, told["layers"], strict=True):
        merged = [tensors[f"blk.{number}.ffn_{part}_exps.weight"] for part in parts]
        assert one["slices"] == [[0, t.offset, t.expert_bytes] for t in merged], "in the order of use"
        assert one["experts_mark"] == marks[merged[0].name]
        assert one["router_mark"] == marks[f"blk.{number}.ffn_gate_inp.weight"]
        assert one["attention_mark"] == marks[f"blk.{number}.attn_q.weight"]
        assert one["router"] == [0, tensors[f"blk.{number}.ffn_gate_inp.weight"].offset]
        assert one["norm"] == [0, tensors[f"blk.{number}.{norm}.weight"].offset, 256]
        assert one["attention_norm"] == [0, tensors[f"blk.{number}.attn_norm.weight"].offset, 256]
    os.close(told["code"])


def test_routers_that_are_no_float32_are_not_worked_out(paths: dict[str, Path]) -> None:
    model, marks, _ = told_of(paths["llama"])
    other = replace(model, tensors=tuple(replace(t, type="F16") if "gate_inp" in t.name else t for t in model.tensors))
    told = mixture(other, graph_of(model), LAYOUT, marks)
    assert (told["n"], told["code"]) == (0, None)
    assert all(one["router_mark"] is one["router"] is one["attention_mark"] is None for one in told["layers"])
    assert all(one["experts_mark"] is not None for one in told["layers"])


def test_a_clock_that_cannot_tell_operators(paths: dict[str, Path]) -> None:
    model, _, _ = told_of(paths["llama"])
    told = mixture(model, graph_of(model), LAYOUT, {})
    assert all(one["experts_mark"] is None for one in told["layers"])
    os.close(told["code"])


@pytest.mark.parametrize("wrong", ["count", "layers"])
def test_a_file_that_does_not_say_enough(paths: dict[str, Path], wrong: str) -> None:
    model, marks, _ = told_of(paths["llama"])
    if wrong == "count":
        other = replace(model, metadata={k: v for k, v in model.metadata.items() if "used_count" not in k})
    else:
        other = replace(
            model,
            tensors=tuple(replace(t, n_experts=8) if t.n_experts and t.layer == 1 else t for t in model.tensors),
        )
    with pytest.raises(LlmtracedError, match="different numbers of experts, or it does not say how many"):
        mixture(other, graph_of(model), LAYOUT, marks)


class FakePages:
    """A file whose pages nobody has: remembers what was asked for, locked and given back, by offset and size."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self._memory = ctypes.create_string_buffer(data, len(data))
        self._lock = threading.Lock()
        self.resident: set[tuple[int, int]] = set()
        self.asked: list[tuple[int, int]] = []
        self.given_back: list[tuple[int, int]] = []
        self.ends: dict[tuple[int, int], tuple[bool, bool]] = {}
        self.block = 64  # its experts are small
        self.fails = False

    def address(self, offset: int) -> int:
        return ctypes.addressof(self._memory) + offset

    def ask(self, offset: int, size: int) -> None:
        if self.fails:
            raise OSError(5, "Input/output error")
        with self._lock:
            self.asked.append((offset, size))
            self.resident.add((offset, size))

    def resident_range(self, offset: int, size: int, *, wait: bool = True) -> int:
        with self._lock:
            return size if any(at <= offset and offset + size <= at + n for at, n in self.resident) else 0

    def give_back_range(
        self, offset: int, size: int, *, before: bool, after: bool, keep: Sequence[tuple[int, int]]
    ) -> None:
        assert keep == [], "nothing stays of what is read by the page"
        with self._lock:
            self.ends[offset, size] = before, after
            self.resident.discard((offset, size))
            self.given_back.append((offset, size))


class Rig:
    """A mixture on fake pages, and a server that chooses what the test says."""

    def __init__(self, path: Path, predict: Sequence[str] = ("router-1", "attention", "router")) -> None:
        self.model, self.marks, told = told_of(path)
        self.pages = FakePages(path)
        self.said: list[str] = []
        self.mixture = Mixture(os.getpid(), [self.pages], told, predict, self.said.append)  # type: ignore[list-item]
        os.close(told["code"])
        self.told = told
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        self.routers = [tensors[f"blk.{n}.ffn_gate_inp.weight"] for n in range(len(told["layers"]))]

    def slices(self, layer: int, *experts: int) -> set[tuple[int, int]]:
        return {(first + e * size, size) for _, first, size in self.told["layers"][layer]["slices"] for e in experts}

    def here(self, layer: int, *experts: int) -> bool:
        self.mixture.collect()
        return {layer * N_EXPERTS + e for e in experts} <= set(self.mixture.residency.present())

    def chosen(self, layer: int, x: np.ndarray) -> set[int]:
        return set(np.argsort(-(self.routers[layer] @ x))[:N_USED].tolist())

    def input(self, layer: int, x: np.ndarray, mark: str = "router_mark") -> bool:
        told = x.astype("<f4").tobytes()
        return self.mixture.tick(time.monotonic_ns(), self.told["layers"][layer][mark], 1 << 48, told)

    def use(self, layer: int, *experts: int) -> bool:
        told = struct.pack("<16i", *experts, *[-1] * (16 - len(experts))) + bytes(7 * 64)
        return self.mixture.tick(
            time.monotonic_ns(), self.told["layers"][layer]["experts_mark"], len(experts) | 1 << 32, told
        )


@pytest.fixture
def rig(paths: dict[str, Path]) -> Iterator[Rig]:
    one = Rig(paths["llama"])
    yield one
    one.mixture.release()


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(256).astype(np.float32)


def test_it_asks_for_inputs_and_choices(rig: Rig) -> None:
    wakes = rig.mixture.wakes()
    for one in rig.told["layers"]:
        assert wakes[one["experts_mark"]] == EXPERTS
        assert wakes[one["router_mark"]] == wakes[one["attention_mark"]] == INPUT
    assert len(wakes) == 3 * len(rig.told["layers"])


def test_marks_of_others_are_not_its_own(rig: Rig) -> None:
    assert not rig.mixture.tick(time.monotonic_ns(), 9999, 0, b"")
    assert rig.pages.asked == []


def test_a_routers_input_has_exactly_the_chosen_read(rig: Rig) -> None:
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    x = vector(1)
    assert rig.input(0, x)
    chosen = rig.chosen(0, x)
    ahead = rig.chosen(1, x)  # all norms are ones here, so the next layer's router gets the same
    wanted = rig.slices(0, *chosen) | rig.slices(1, *ahead)
    wait_until(lambda: wanted <= rig.pages.resident, 10, "what is chosen, and probably next, to be read")
    assert rig.pages.resident == wanted
    assert len(rig.pages.asked) == len(wanted), "nothing twice"
    assert set(rig.pages.asked[:N_USED]) == {(o, s) for o, s in rig.slices(0, *chosen) if o in first_of(rig, 0)}
    assert rig.use(0, *chosen)
    summary = rig.mixture.summary()
    assert (summary["router_checked"], summary["router_surprises"], summary["chosen"]) == (N_USED, 0, N_USED)
    assert summary["failed_reads"] == 0


def first_of(rig: Rig, layer: int) -> range:
    """Return where the slices of the matrix lie that a layer uses first."""
    _, first, size = rig.told["layers"][layer]["slices"][0]
    return range(first, first + N_EXPERTS * size)


def test_the_servers_word_counts_where_the_guess_was_wrong(rig: Rig) -> None:
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    x = vector(2)
    guess = rig.chosen(2, x)
    rig.input(2, x, "attention_mark")
    other = next(e for e in range(N_EXPERTS) if e not in guess)
    rig.use(2, min(guess), other)
    wanted = rig.slices(2, *guess, other)
    wait_until(lambda: wanted <= rig.pages.resident, 10, "the expert that had not been guessed to be read")
    summary = rig.mixture.summary()
    assert summary["predictors"]["attention"]["right"] == 1 / N_USED
    each = sum(size for _, _, size in rig.told["layers"][2]["slices"])
    assert summary["missing_bytes"] == 2 * each, "one that was guessed, one that was not"
    assert summary["predictors"]["attention"]["recall"] == 0.5
    assert summary["predictors"]["attention"]["precision"] == 1 / N_USED
    assert summary["missed_bytes"] > 0
    assert summary["router_checked"] == 0, "no input of the router itself was seen"


def test_the_coldest_go_when_the_memory_is_full(rig: Rig) -> None:
    each = sum(size for _, _, size in rig.told["layers"][0]["slices"])
    rig.mixture.hold(4 * each)
    for token in range(12):
        rig.mixture.begin()
        rig.use(0, 0, 1 + token % 8)  # 0 is used each time
        wait_until(lambda: rig.here(0, 0, 1 + token % 8), 10, "reads to end")  # noqa: B023 - waited for here
    wait_until(lambda: len(rig.pages.resident) <= 4 * 3, 10, "experts to be given back")
    assert rig.slices(0, 0) <= rig.pages.resident, "the hot one stays"
    assert rig.mixture.residency.held <= 4 * each
    assert rig.pages.given_back
    assert rig.slices(0, 0).isdisjoint(rig.pages.given_back)


def test_what_two_have_in_common_goes_with_the_last_of_them(rig: Rig) -> None:
    """A block of the file system at a border of experts stays while one of them is kept, and no longer."""
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(0, 0, 1)
    rig.use(1, 5)
    wait_until(lambda: rig.here(0, 0, 1) and rig.here(1, 5), 10, "three experts to be read")
    rig.mixture.begin()
    rig.use(0, 1)
    rig.mixture.relieve(rig.mixture.residency.held - 1)  # all but what this token uses
    wait_until(lambda: rig.slices(0, 1) == rig.pages.resident, 10, "two of them to be given back")
    for slice_ in rig.slices(0, 0):
        assert rig.pages.ends[slice_] == (False, False), "before it is another matrix, behind it an expert that is kept"
    for slice_ in rig.slices(1, 5):
        assert rig.pages.ends[slice_] == (True, True)
    rig.mixture.begin()
    rig.mixture.relieve(rig.mixture.residency.held)
    wait_until(lambda: not rig.pages.resident, 10, "the last one to be given back")
    for slice_ in rig.slices(0, 1):
        assert rig.pages.ends[slice_] == (True, True)


def test_whole_blocks_are_what_memory_holds(rig: Rig) -> None:
    slices = rig.told["layers"][0]["slices"]
    each = sum(size for _, _, size in slices)
    rig.pages.block = 65536
    other = Mixture(os.getpid(), [rig.pages], rig.told | {"code": None}, (), rig.said.append)  # type: ignore[list-item]
    for mixture_, block in ((rig.mixture, 64), (other, 65536)):
        mixture_.hold(8 * (each + len(slices) * block))
        assert 7 * each < mixture_.residency.capacity <= 8 * each
        mixture_.hold(8 * each)
        assert mixture_.residency.capacity < 8 * each
    other.release()


@pytest.mark.parametrize("room", [False, True])
def test_what_the_server_has_read_by_itself_is_looked_for_around_what_was_late(rig: Rig, *, room: bool) -> None:
    """It is kept where there is room for it, else it goes; and where nothing was read, nobody looks."""
    each = sum(size for _, _, size in rig.told["layers"][0]["slices"])
    rig.mixture.hold(rig.mixture.total if room else 2 * each)
    stray = rig.slices(2, 7)
    rig.pages.resident |= stray
    rig.mixture.begin()
    rig.use(2, 3)  # in a layer that is not the first to be swept
    wait_until(lambda: rig.here(2, 3), 10, "an expert to be read")
    rig.mixture.begin()
    rig.use(2, 4)
    rig.mixture.ended(0)
    assert not rig.mixture.movers.looking
    rig.mixture.begin()
    rig.use(2, 5)
    rig.mixture.ended(16 << 20)
    if room:
        wait_until(lambda: rig.here(2, 7), 10, "what is there to be known")
    else:
        wait_until(lambda: rig.here(2) and stray.isdisjoint(rig.pages.resident), 10, "it to be given back")
    assert (stray <= rig.pages.resident) == room


def test_the_last_layers_are_looked_at_where_layers_do_not_divide(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "_SWEEPS", 2)
    told = rig.told | {"code": None, "layers": rig.told["layers"][:3]}
    one = Mixture(os.getpid(), [rig.pages], told, (), rig.said.append)  # type: ignore[list-item]
    for first, last in ((0, 2), (2, 3)):
        one.sweep()
        assert list(one.movers._doubted.lines[0]) == list(range(first * N_EXPERTS, last * N_EXPERTS))
        one.movers._doubted.lines[0].clear()


def test_what_has_gone_is_noted_by_and_by(rig: Rig) -> None:
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(1, 6)
    rig.use(2, 6)
    wait_until(lambda: rig.here(1, 6) and rig.here(2, 6), 10, "two experts to be read")
    rig.pages.resident.clear()
    for _ in rig.told["layers"]:
        rig.mixture.sweep()
        wait_until(lambda: not rig.mixture.movers.looking, 10, "some layers to be looked at")
    wait_until(lambda: not rig.here(1, 6) and not rig.here(2, 6), 10, "it to be known")
    assert rig.mixture.residency.held == 0


def test_memory_that_is_wanted_back_is_given(rig: Rig) -> None:
    each = sum(size for _, _, size in rig.told["layers"][0]["slices"])
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(0, 3, 4)
    rig.use(1, 5, 6)
    wait_until(lambda: rig.here(0, 3, 4) and rig.here(1, 5, 6), 10, "four experts to be read")
    rig.mixture.begin()  # they are in no use any more
    assert rig.mixture.relieve(2 * each) >= 2 * each
    wait_until(lambda: len(rig.pages.resident) <= 2 * 3, 10, "two of them to be given back")


def test_reads_that_fail_are_counted(rig: Rig) -> None:
    rig.pages.fails = True
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(0, 3)
    wait_until(lambda: rig.mixture.summary()["failed_reads"] == 3, 10, "three slices to fail")
    assert rig.mixture.summary()["read_bytes"] == 0


def test_what_the_kernel_has_taken_is_read_again(rig: Rig) -> None:
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(0, 3)
    wait_until(lambda: rig.here(0, 3), 10, "an expert to be read")
    rig.mixture.begin()
    rig.use(0, 3)
    gone = min(rig.slices(0, 3))
    rig.pages.resident.discard(gone)
    rig.use(0, 3)
    assert rig.mixture.summary()["lost"] == 0, "it is looked at once a token"
    rig.mixture.begin()
    rig.use(0, 3)
    wait_until(lambda: gone in rig.pages.resident, 10, "it to be read again")
    assert rig.mixture.summary()["lost"] == 1


def test_nothing_is_given_back_at_the_end(paths: dict[str, Path]) -> None:
    rig = Rig(paths["llama"])
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    rig.use(0, 3, 4)
    wait_until(lambda: rig.here(0, 3, 4), 10, "what is used to be read")
    rig.mixture.release()
    assert rig.pages.given_back == [], "the kernel takes it when it wants"


@pytest.mark.parametrize(
    ("predict", "marks"),
    [((), ()), (("last", "coactivation"), ()), (("attention",), ("attention",)), (("router-2",), ("router",))],
)
def test_inputs_are_asked_for_by_whom_they_are_needed(
    paths: dict[str, Path], predict: Sequence[str], marks: Sequence[str]
) -> None:
    rig = Rig(paths["llama"], predict)
    wakes = rig.mixture.wakes()
    assert {mark for mark, what in wakes.items() if what == INPUT} == {
        one[f"{mark}_mark"] for one in rig.told["layers"] for mark in marks
    }
    assert {mark for mark, what in wakes.items() if what == EXPERTS} == {
        one["experts_mark"] for one in rig.told["layers"]
    }
    rig.mixture.release()


def test_two_layers_ahead_and_no_nearer(paths: dict[str, Path]) -> None:
    rig = Rig(paths["llama"], ("router-2",))
    rig.mixture.hold(rig.mixture.total)
    rig.mixture.begin()
    x = vector(3)
    rig.input(0, x)
    ahead = rig.slices(2, *rig.chosen(2, x))
    wait_until(lambda: ahead <= rig.pages.resident, 10, "what is probably used two layers on to be read")
    assert rig.pages.resident == ahead
    rig.use(2, *rig.chosen(2, x))
    told = rig.mixture.summary()["predictors"]["router-2"]
    assert (told["right"], told["recall"], told["precision"]) == (1, 1, 1)
    assert 0 < told["mean_ahead_s"] < 10
    rig.mixture.release()


def test_what_the_past_says_is_read_early(paths: dict[str, Path]) -> None:
    """Token after token uses 3 and 4 in layer 0, 5 and 6 in layer 1; then layer 0 alone says what layer 1 will use."""
    rig = Rig(paths["llama"], ("last", "coactivation"))
    rig.mixture.hold(rig.mixture.total)
    for _ in range(3):
        rig.mixture.begin()
        rig.use(0, 3, 4)
        rig.use(1, 5, 6)
    told = rig.mixture.summary()["predictors"]
    assert (told["last"]["right"], told["coactivation"]["right"]) == (1, 1)
    wait_until(lambda: rig.here(0, 3, 4) and rig.here(1, 5, 6), 10, "four experts to be read")
    rig.mixture.begin()  # none of them is in use any more
    rig.mixture.relieve(rig.mixture.residency.held)
    wait_until(lambda: not rig.pages.resident, 10, "all of them to be given back")
    rig.mixture.hold(rig.mixture.total)
    rig.use(0, 3, 4)
    wait_until(lambda: rig.slices(1, 5, 6) <= rig.pages.resident, 10, "layer 1's to be read before it uses them")
    rig.mixture.release()
