"""The plan: from a compute graph or a tensor map, to a file and back; files that are none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ggml import SHAPES, Memory, known, moe

from llmtraced.errors import LlmtracedError
from llmtraced.ggml_layout import derive, read_graph
from llmtraced.gguf_map import Model, Shard, Tensor
from llmtraced.prefetch.plan import VERSION, Entry, Plan, c_header, from_graph, from_tensors, load


def model(*names: str) -> Model:
    tensors = []
    for n, name in enumerate(names):
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        experts = 8 if "_exps" in name else 0
        component = name.split(".", 2)[2] if layer >= 0 else name
        shape = SHAPES.get(name, (32, 4))
        tensors.append(Tensor(name, 4096 * n, 4000, "F32", shape, layer, component, 0, experts, 500 * bool(experts)))
    return Model((Shard(Path("m.gguf"), 1 << 20, 4096),), tuple(tensors), "llama", "m", {}, "f" * 32)


def plan(*names: str) -> Plan:
    entries = (Entry(n, name, 0, "ffn_up", 0, 4096 * n, 4000, True, n / 10) for n, name in enumerate(names))
    return Plan("m.gguf", "f" * 32, "ops", 7, tuple(entries))


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = plan("a", "b", "ü\n", "a")
    assert load(written(tmp_path, one.to_json())) == one


def test_unknown_fields_are_of_no_harm(tmp_path: Path) -> None:
    data = plan("a").to_json()
    data["entries"][0]["later"] = data["later"] = 1
    assert load(written(tmp_path, data)) == plan("a")


def test_bytes_per_token_counts_each_tensor_once_and_only_whole_ones() -> None:
    one = plan("a", "b")
    rows = replace(one.entries[1], whole=False, step=2, offset_bytes=9999)
    assert replace(one, entries=(*one.entries, replace(one.entries[0], step=3), rows)).bytes_per_token == 8000
    assert one.to_json()["bytes_per_token"] == 8000


def bad(change: str) -> Any:
    data = plan("a").to_json()
    entry = data["entries"][0]
    if change == "newer":
        data["version"] = VERSION + 1
    elif change == "no version":
        del data["version"]
    elif change == "a version in words":
        data["version"] = "one"
    elif change == "no entries":
        del data["entries"]
    elif change == "entries are a number":
        data["entries"] = 5
    elif change == "an entry is a list":
        data["entries"] = [[1, 2]]
    elif change == "an entry lacks a field":
        del entry["whole"]
    elif change == "a negative offset":
        entry["offset_bytes"] = -1
    elif change == "an empty tensor":
        entry["size_bytes"] = 0
    elif change == "a size in words":
        entry["size_bytes"] = "4000"
    elif change == "half a byte":
        entry["offset_bytes"] = 0.5
    elif change == "a step that is true":
        entry["step"] = True
    elif change == "tokens in words":
        data["tokens"] = "many"
    elif change == "a list":
        return [data]
    elif change == "null":
        return None
    elif change == "not JSON":
        return "{"
    elif change == "empty":
        return ""
    return data


CHANGES = (
    *("newer", "no version", "a version in words", "no entries", "entries are a number", "an entry is a list"),
    *("an entry lacks a field", "a negative offset", "an empty tensor", "a size in words", "half a byte"),
    *("a step that is true", "tokens in words", "a list", "null", "not JSON", "empty"),
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_no_plan_is_one_clear_line(change: str, tmp_path: Path) -> None:
    path = written(tmp_path, bad(change))
    with pytest.raises(LlmtracedError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "plan" in text
    assert "\n" not in text


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00GGUF")
    with pytest.raises(LlmtracedError, match="not a plan"):
        load(path)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LlmtracedError, match=r"none.json: cannot be read: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(LlmtracedError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_a_graph_becomes_a_plan_in_its_order() -> None:
    memory = Memory()
    address = moe(memory)
    layout = derive(memory.read, address, known())
    made = from_graph("m.gguf", model(*SHAPES), read_graph(memory.read, address, layout, known()), layout)
    layers = ("attn_norm", "attn_q", "ffn_gate_inp", "ffn_up_exps")
    names = [f"blk.{n}.{part}.weight" for n in range(3) for part in layers]
    assert [e.tensor_name for e in made.entries] == ["token_embd.weight", *names, "output.weight"]
    assert [e.step for e in made.entries] == list(range(len(made.entries)))
    partly = {e.tensor_name for e in made.entries if not e.whole}
    assert partly == {"token_embd.weight", *(n for n in names if "_exps" in n)}  # rows and experts: which, nobody knows
    assert (made.source, made.tokens, made.fingerprint) == ("graph", 1, "f" * 32)


def test_a_map_becomes_a_plan() -> None:
    made = from_tensors("m.gguf", model("token_embd.weight", "blk.0.ffn_up_exps.weight", "output.weight"))
    assert [(e.tensor_name, e.whole) for e in made.entries] == [
        ("token_embd.weight", False),
        ("blk.0.ffn_up_exps.weight", False),
        ("output.weight", True),
    ]
    assert made.source == "map"


def test_a_tied_matrix_is_used_whole() -> None:
    assert [e.whole for e in from_tensors("m", model("token_embd.weight", "blk.0.attn_q.weight")).entries] == [True] * 2


NASTY = ("plain", 'quo"te', "back\\slash", "new\nline", "what??/", "/* c */", "ü", "\x00nul", "tail\\")


def test_the_c_header_has_each_access() -> None:
    text = c_header(plan("blk.0.attn_q.weight", "output.weight"))
    assert "#define LLMTRACED_ACCESSES 2\n" in text
    assert re.findall(r"^    \{(.*)\},$", text, re.MULTILINE) == [
        '"blk.0.attn_q.weight", 0ULL, 4000ULL',
        '"output.weight", 4096ULL, 4000ULL',
    ]


def test_names_from_a_file_cannot_leave_their_string_or_comment() -> None:
    text = c_header(replace(plan(*NASTY), model="*/ int evil; /*\n.gguf"))
    assert text.splitlines()[0].count("*/") == 1
    assert text.splitlines()[0].endswith("*/")
    for line in text.splitlines():
        assert line.isascii()
        assert line.isprintable()
        assert "??" not in line
    assert len(re.findall(r"^    \{\"", text, re.MULTILINE)) == len(NASTY)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_compiler_takes_the_header_and_has_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "plan.h").write_text(c_header(replace(plan(*NASTY), model="a\\\n*/.gguf")))
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "plan.h"\nint main(void) { for (int i = 0; i < LLMTRACED_ACCESSES; i++) '
        'printf("%s|%d|%d%c", llmtraced_plan[i].name, (int)llmtraced_plan[i].offset, (int)llmtraced_plan[i].size, 0);}'
    )
    program = tmp_path / "main"
    options = ["-std=c99", "-trigraphs", "-Wall", "-Wextra", "-Werror", "-o", str(program)]
    subprocess.run(["cc", *options, str(tmp_path / "main.c")], check=True)
    said = subprocess.run([program], check=True, capture_output=True).stdout.decode().split("\0")[:-1]
    expected = [f"{name.split(chr(0))[0]}|{4096 * n}|4000" for n, name in enumerate(NASTY)]
    assert said == expected
