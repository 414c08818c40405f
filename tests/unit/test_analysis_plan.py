"""The plan learned from a trace: order, whole or not, when, of which model; as JSON and as a C array."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_analysis_pattern import marks, ops
from test_analysis_trace import Builder

from llmtraced.analysis.plan import learn
from llmtraced.analysis.trace import open_trace
from llmtraced.commands import main
from llmtraced.errors import LlmtracedError
from llmtraced.prefetch.plan import load

EVIL = ('q"); system("x', "back\\slash\\", "new\nline\x1b[2J", "tri??/graph??=", "ü\t*/", "%s\0nul", "1" * 1024)


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def dense(trace: Builder, *names: str, **more: Any) -> None:
    """Write 100-byte tensors and three decode tokens that use them backwards, and a prompt that does not."""
    trace.tensor(*((name, 100 * at, 100) for at, name in enumerate(names)), **more)
    trace.write("tokens", [*marks(1, phase="prompt", n_tokens=9), *marks(2, 3, 4)])
    trace.write("ops", ops(1, names[0], start=1000, phase="prompt"))
    for token in (2, 3, 4):
        trace.write("ops", ops(token, *reversed(names), start=1000 * token))


def test_the_sequence_of_decode_tokens(trace: Builder) -> None:
    dense(trace, "a", "b", "c", layer=3, component="x", shard=0)
    plan, answer = learn(open_trace(trace.path))
    assert [entry.tensor_name for entry in plan.entries] == ["c", "b", "a"]
    assert [entry.when for entry in plan.entries] == [0.1, 0.2, 0.3]
    assert [entry.step for entry in plan.entries] == [0, 1, 2]
    c = plan.entries[0]
    assert (c.layer, c.component, c.shard, c.offset_bytes, c.size_bytes, c.whole) == (3, "x", 0, 200, 100, True)
    assert (plan.model, plan.fingerprint, plan.source, plan.tokens) == ("m.gguf", "f", "ops", 3)
    assert plan.bytes_per_token == 300
    assert answer.startswith("deterministic: 3 of 3 decode tokens")


def test_experts_and_looked_up_rows_are_not_whole(trace: Builder) -> None:
    trace.tensor(("token_embd.weight", 0, 50), ("d", 50, 10), ("output.weight", 60, 10))
    trace.tensor(("e", 100, 80), n_experts=8, expert_bytes=10, layer=0)
    trace.tensor(("away", 200, 80), backed=False)
    trace.write("tokens", marks(1, 2))
    for token in (1, 2):
        trace.write("ops", ops(token, "token_embd.weight", start=1000 * token, op="GET_ROWS"))
        trace.write("ops", ops(token, "d", "away", "e", "output.weight", start=1000 * token + 10))
    plan, _ = learn(open_trace(trace.path))
    whole = {entry.tensor_name: entry.whole for entry in plan.entries}
    assert whole == {"token_embd.weight": False, "d": True, "e": False, "output.weight": True}, "not what is elsewhere"
    assert plan.bytes_per_token == 20


def test_shards_keep_their_own_offsets(trace: Builder) -> None:
    trace.tensor(("a", 64, 10), shard=0)
    trace.tensor(("b", 64, 20), shard=1)
    trace.write("tokens", marks(1, 2))
    for token in (1, 2):
        trace.write("ops", ops(token, "b", "a", start=1000 * token))
    plan, _ = learn(open_trace(trace.path))
    assert [(e.tensor_name, e.shard, e.offset_bytes) for e in plan.entries] == [("b", 1, 64), ("a", 0, 64)]
    assert plan.bytes_per_token == 30


@pytest.mark.parametrize("table", ["faults", "pagecache"])
def test_without_operators_the_order_is_what_was_missed(trace: Builder, table: str) -> None:
    trace.tensor(("token_embd.weight", 0, 10), ("a", 10, 10), ("b", 20, 10), ("output.weight", 30, 10))
    trace.write("tokens", marks(1, 2, 3))
    order = ("token_embd.weight", "b", "a", "output.weight")
    for token in (1, 2, 3):
        rows = [{"token": token, "timestamp": 1000 * token + 10 * i, "tensor_name": n} for i, n in enumerate(order)]
        trace.write(table, [row | ({"bytes": 10} if table == "pagecache" else {}) for row in rows])
    plan, answer = learn(open_trace(trace.path))
    assert (plan.source, plan.tokens) == (table, 3)
    assert [entry.tensor_name for entry in plan.entries] == list(order)
    assert [entry.whole for entry in plan.entries] == [False, True, True, True]
    assert "the trace has no operators" in answer


def test_of_several_models_one_is_named(trace: Builder) -> None:
    both = [{"model": "m.gguf", "fingerprint": "f"}, {"model": "draft.gguf", "fingerprint": "d"}]
    for model, name in (("m.gguf", "big"), ("draft.gguf", "small")):
        trace.write("tensors", [{"tensor_name": name, "offset_bytes": 0, "size_bytes": 9, "model": model}], models=both)
    trace.write("tokens", marks(1, 2, 3, 4), models=both)
    trace.write("ops", ops(1, "big", start=1000) + ops(4, "big", start=4000), models=both)
    trace.write("ops", ops(2, "small", start=2000, model="draft.gguf"), models=both)
    trace.write("ops", ops(3, "small", start=3000, model="draft.gguf"), models=both)
    opened = open_trace(trace.path)
    for label, name, fingerprint in (("m.gguf", "big", "f"), ("draft.gguf", "small", "d")):
        plan, _ = learn(opened, label)
        assert (plan.model, plan.fingerprint, plan.tokens) == (label, fingerprint, 2)
        assert [entry.tensor_name for entry in plan.entries] == [name]
    with pytest.raises(LlmtracedError, match=r"name one with --model: draft.gguf, m.gguf"):
        learn(opened)
    with pytest.raises(LlmtracedError, match="no model other"):
        learn(opened, "other")


def test_a_trace_without_an_order_is_refused_in_one_line(trace: Builder, capsys: Any, tmp_path: Path) -> None:
    trace.tensor(("a", 0, 10))
    trace.write("tokens", marks(1, 2))
    target = tmp_path / "plan.json"
    assert main(["plan", str(trace.path), "-o", str(target)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no access plan can be learned: it has no use of a weight within a token" in said
    trace.write("faults", [{"token": 1, "tensor_name": "a"}])
    assert main(["plan", str(trace.path), "-o", str(target)]) == 1
    assert "no token faulted on or read two weights" in capsys.readouterr().err
    assert not target.exists()


def test_the_file_can_be_read_again_and_is_not_overwritten(trace: Builder, tmp_path: Path, capsys: Any) -> None:
    dense(trace, "a", "b")
    target = tmp_path / "plan.json"
    assert main(["plan", str(trace.path), "-o", str(target)]) == 0
    assert load(target) == learn(open_trace(trace.path))[0]
    assert main(["plan", str(trace.path), "-o", str(target)]) == 1
    assert "will not overwrite without --force" in capsys.readouterr().err
    assert main(["plan", str(trace.path), "-o", str(target), "--force"]) == 0
    assert json.loads(target.read_text())["version"] == 1


def test_the_c_header_compiles_and_is_the_map(trace: Builder, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc: apt-get install gcc")
    dense(trace, "plain.weight", *EVIL)
    assert main(["plan", str(trace.path), "--format", "c-header", "-o", str(tmp_path / "plan.h")]) == 0
    (tmp_path / "main.c").write_text(
        '#include "plan.h"\n#include "plan.h"\n#include <stdio.h>\n#include <string.h>\n'
        "int main(void) { int i; for (i = 0; i < LLMTRACED_ACCESSES; i++) {\n"
        "  const unsigned char *p = (const unsigned char *)llmtraced_plan[i].name;\n"
        '  for (; *p; p++) printf("%02x", *p);\n'
        '  printf(" %lu %lu\\n", (unsigned long)llmtraced_plan[i].offset, (unsigned long)llmtraced_plan[i].size); }\n'
        "  return sizeof(llmtraced_plan) / sizeof(*llmtraced_plan) != LLMTRACED_ACCESSES; }\n"
    )
    compiler = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "main.c", "-o", "main"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout.splitlines()
    tensors = open_trace(trace.path).tensors
    known = tensors.select("tensor_name", "offset_bytes", "size_bytes").rows()
    expected = [f"{name.encode().partition(bytes(1))[0].hex()} {offset} {size}" for name, offset, size in known]
    assert said == expected[::-1]
