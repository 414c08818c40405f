"""What routers say of inputs: against the weights as the gguf package reads them, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pytest

from llmtraced import router_scores as module
from llmtraced.bench import models
from llmtraced.commands import main
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.gguf_map import Model, Tensor, read_model
from llmtraced.ledger import Ledger
from llmtraced.prefetch.clock import BEGIN, INPUT, Tick
from llmtraced.router_scores import Applied, ScoreRecorder, applied, table
from llmtraced.schema import EVENT, PHASES, TABLES
from llmtraced.store import TraceWriter

WIDTH = 4
ONE = Applied(1, "router", 0, np.arange(12, dtype=np.float32).reshape(3, WIDTH))
DECODE = PHASES.index("decode")


def written(tmp_path: Path, arch: str) -> tuple[Path, Model]:
    shape = models.moe_preset(20_000_000, n_experts=8, n_used=2, arch=arch)
    path = models.write(tmp_path / f"{arch}.gguf", shape)
    return path, read_model(path)


def tick(ts: int, mark: int, *values: float) -> Tick:
    return ts, 1, mark, 0, np.array(values, "<f4").tobytes()


@pytest.mark.parametrize("arch", ["llama", "deepseek", "gpt-oss", "hy_v3"])
def test_routers_are_the_files(tmp_path: Path, arch: str) -> None:
    path, model = written(tmp_path, arch)
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    found = applied(model)
    layers = sorted({t.layer for t in model.tensors if t.n_experts})
    assert set(found) == {f"blk.{n}.{name}.weight" for n in layers for name in ("ffn_gate_inp", "attn_q")}
    norm = "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"
    x = np.random.default_rng(1).standard_normal((3, model.metadata[f"{arch}.embedding_length"])).astype(np.float32)
    for at, layer in enumerate(layers):
        ones = found[f"blk.{layer}.ffn_gate_inp.weight"]
        assert [(one.layer, one.source, one.ahead) for one in ones] == [
            (later, "router", ahead) for ahead, later in enumerate(layers[at : at + 3])
        ]
        for one in (*ones, *found[f"blk.{layer}.attn_q.weight"]):
            router = weights[f"blk.{one.layer}.ffn_gate_inp.weight"]
            before = weights[f"blk.{layer}.{norm if one.source == 'router' else 'attn_norm'}.weight"]
            expected = x / before * weights[f"blk.{one.layer}.{norm}.weight"] @ router.T
            if arch == "gpt-oss":
                expected = expected + weights[f"blk.{one.layer}.ffn_gate_inp.bias"]
            if arch == "hy_v3":
                expected = 1 / (1 + np.exp(-expected)) + weights[f"blk.{one.layer}.exp_probs_b"]
            assert one.scores(x) == pytest.approx(expected, abs=1e-4)


def test_norms_that_differ_are_divided_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All norms of the files that are made here are ones: so one that is not."""
    _, model = written(tmp_path, "llama")
    plain = applied(model)["blk.0.ffn_gate_inp.weight"][1]
    read = module._read

    def other(of: Model, tensor: Tensor) -> Any:
        values = read(of, tensor)
        return values * {"blk.0.ffn_norm.weight": 2, "blk.1.ffn_norm.weight": 3}.get(tensor.name, 1)

    monkeypatch.setattr(module, "_read", other)
    assert applied(model)["blk.0.ffn_gate_inp.weight"][1].matrix == pytest.approx(plain.matrix * 1.5)


def test_without_a_norm_only_the_router_itself_is_applied(tmp_path: Path) -> None:
    _, model = written(tmp_path, "llama")
    bare = replace(model, tensors=tuple(t for t in model.tensors if "ffn_norm" not in t.name))
    found = applied(bare)
    assert {(one.source, one.ahead) for ones in found.values() for one in ones} == {("router", 0)}


def test_a_choice_by_corrected_probabilities() -> None:
    x = np.array([[1.0, 0, 0, 0]], np.float32)  # logits 0, 4, 8
    correction = np.array([1.0, 0, -1], np.float32)
    sigmoid = replace(ONE, correction=correction, sigmoid=True).scores(x)
    assert sigmoid[0] == pytest.approx([0.5 + 1, 1 / (1 + np.exp(-4)), 1 / (1 + np.exp(-8)) - 1], abs=1e-6)
    softmax = replace(ONE, correction=correction).scores(x)
    likely = np.exp([0.0, 4, 8]) / np.exp([0.0, 4, 8]).sum()
    assert softmax[0] == pytest.approx(likely + correction, rel=1e-5)


def test_experts_of_groups_that_are_not_the_best_are_out_of_the_question() -> None:
    x = np.array([[1.0, 0, 0, 0]], np.float32)
    matrix = np.zeros((6, 4), np.float32)
    matrix[:, 0] = np.log([5.0, 1, 4, 3, 2, 2])  # group sums of probabilities in seventeenths: 6, 7, 4
    one = replace(ONE, matrix=matrix, groups=(3, 2)).scores(x)
    assert one[0, :4] == pytest.approx(np.array([5, 1, 4, 3]) / 17)
    assert np.isneginf(one[0, 4:]).all()
    one = replace(ONE, matrix=matrix, groups=(3, 1), correction=np.array([0, 0, 0, 0, 1, 1], np.float32)).scores(x)
    assert np.isneginf(one[0, :4]).all()
    assert one[0, 4:] == pytest.approx(2 / 17 + 1)


def test_experts_that_do_not_fit_into_their_groups_are_refused(tmp_path: Path) -> None:
    _, model = written(tmp_path, "llama")
    count = next(t.n_experts for t in model.tensors if t.n_experts) - 1
    odd = {f"{model.architecture}.expert_group_count": count, f"{model.architecture}.expert_group_used_count": 1}
    with pytest.raises(LlmtracedError, match=f"cannot be in {count} equal groups"):
        applied(replace(model, metadata={**model.metadata, **odd}))


def test_a_dense_model_has_no_routers(tmp_path: Path) -> None:
    assert applied(read_model(models.write(tmp_path / "d.gguf", models.TINY_DENSE))) == {}


def test_rows_by_hand() -> None:
    later = Applied(2, "router", 1, np.ones((2, WIDTH), np.float32))
    ticks = [tick(250, 7, 1, 0, 0, 0), tick(150, 7, 0, 1, 0, 0), tick(50, 7, 0, 0, 1, 0)]
    rows = table(ticks, {7: [ONE, later], 8: [ONE]}, [(100, 11, DECODE), (200, 12, DECODE)]).to_pylist()
    assert [row["timestamp"] for row in rows] == [50, 50, 150, 150, 250, 250]
    assert [row["token"] for row in rows] == [0, 0, 11, 11, 12, 12]  # before the first graph that was seen: none
    assert [row["phase"] for row in rows] == ["unknown"] * 2 + ["decode"] * 4
    own = [row for row in rows if row["layer"] == 1]
    assert [row["scores"] for row in own] == [[2.0, 6.0, 10.0], [1.0, 5.0, 9.0], [0.0, 4.0, 8.0]]
    assert {(row["source"], row["ahead"]) for row in own} == {("router", 0)}
    assert [row["scores"] for row in rows if row["layer"] == 2] == [[1.0, 1.0]] * 3


def test_nothing_came() -> None:
    assert table([], {7: [ONE]}, []).equals(TABLES["router_scores"].empty_table())


class FakeRing:
    """A ring whose ticks the test puts in; what it is told to wake at is kept."""

    def __init__(self, *_: int) -> None:
        self.ready: list[Tick] = []
        self.woken: dict[int, int] = {}
        self.lost = 0

    def wait(self, _: float) -> list[Tick]:
        found, self.ready = self.ready, []
        return found

    def wake_at(self, marks: dict[int, int]) -> None:
        self.woken = dict(marks)


class FakeProbe:
    """An attached clock, without a kernel."""

    maps = {"ticks": 0, "clocks": 0, "wakes": 0}  # noqa: RUF012 - never changed

    def __init__(self) -> None:
        self.addresses: list[int] = []
        self.closed = False

    def set_layout(self, _layout: object, addresses: list[int]) -> None:
        self.addresses = addresses

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def session(tmp_path: Path) -> SimpleNamespace:
    writer = TraceWriter(tmp_path / "trace", "0badcafe-1-2", {})
    ledger = Ledger(writer, 1)
    return SimpleNamespace(graph=None, layout=None, marks=None, account=ledger.account, ledger=ledger, writer=writer)


def marks(*rows: tuple[int, int]) -> np.ndarray:
    made = np.zeros(len(rows), EVENT)
    made["ts"], made["token"] = zip(*rows, strict=True)
    made["mark"] = DECODE | 3 << 4
    return made


def everything(tmp_path: Path) -> list[dict[str, Any]]:
    files = sorted((tmp_path / "trace" / "router_scores").iterdir())
    return [row for file in files for row in pa.parquet.read_table(file).to_pylist()]


def test_a_recording_from_the_first_look_to_the_last_file(
    session: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TickRing", FakeRing)
    now = [1000]
    monkeypatch.setattr(module.clock, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(module, "_LATE_NS", 0)
    probe = FakeProbe()
    recorder = ScoreRecorder(session, probe, {"router": [ONE]}, 60)  # type: ignore[arg-type]
    ring: FakeRing = recorder._ring  # type: ignore[assignment]
    ring.ready = [tick(1, 0, 1, 0, 0, 0)]
    recorder.poll()  # the layout is not known: what marks are is not either
    session.layout = "layout"
    session.graph = SimpleNamespace(weights={1: ("other", 0x100), 2: ("router", 0x200), 3: ("router", 0x200)})
    recorder.poll()
    assert probe.addresses == [0x200]
    assert ring.woken == {0: INPUT}
    session.marks.append(marks((1100, 1), (1200, 2)))
    ring.ready = [(1100, 1, BEGIN, 1, b""), tick(1150, 0, 1, 0, 0, 0), (1160, 1, 0, 5, b"")]  # the last: a batch
    now[0] = 1155
    recorder.poll()
    recorder.flush()  # it is not yet time
    assert not (tmp_path / "trace").exists()
    recorder.write()
    # Token 2 had begun when the file was written, but its input had not been read; token 1's neither, quite
    ring.ready = [tick(1180, 0, 0, 1, 0, 0), tick(1250, 0, 0, 0, 1, 0)]
    ring.lost = 3
    now[0] = 1300
    recorder.stop()
    assert probe.closed
    session.marks.append(marks((1290, 3)))
    recorder.write()
    assert [(row["timestamp"], row["token"], row["phase"]) for row in everything(tmp_path)] == [
        (1150, 1, "decode"),
        (1180, 1, "decode"),
        (1250, 2, "decode"),
    ]
    assert session.account["router_scores"] == {"counted": 6, "delivered": 3, "dropped": 3}


def test_a_file_that_cannot_be_written_is_not_the_end(
    session: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TickRing", FakeRing)
    recorder = ScoreRecorder(session, FakeProbe(), {"router": [ONE]}, 60)  # type: ignore[arg-type]
    session.layout, session.graph = "layout", SimpleNamespace(weights={1: ("router", 0x200)})
    recorder.poll()
    recorder._ring.ready = [tick(1, 0, 1, 0, 0, 0)]  # type: ignore[attr-defined]
    recorder.poll()

    def full(*_: object) -> None:
        raise LlmtracedError("cannot write: No space left on device")

    monkeypatch.setattr(session.writer, "write", full)
    recorder.write()
    assert "No space left" in caplog.text
    assert session.account["router_scores"] == {"counted": 1, "delivered": 0, "dropped": 1}


def test_what_has_no_routers_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    model = read_model(models.write(tmp_path / "d.gguf", models.TINY_DENSE))
    dense: Any = SimpleNamespace(models={"d": model}, problems=[], target=SimpleNamespace(pid=1, symbols={}))
    assert ScoreRecorder.open(dense, 5) is None
    assert dense.problems == ["router scores: the model has no routers of float32, all of the same width"]


def test_scores_need_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--pid", "1", "--router-scores", "-o", str(tmp_path / "t")]) == USAGE
    assert "--router-scores needs --detail ops" in capsys.readouterr().err
