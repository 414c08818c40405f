"""``llmtraced map`` through the program's own main."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest

from llmtraced.commands import main
from llmtraced.gguf_map import read_model

HEADER = "tensor_name,offset_bytes,size_bytes,type,layer,component"
WIDE = HEADER + ",shard,n_experts,expert_bytes,shape"
ODD = 'blk.0.a,"b\n\x1b[31m.weight'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_tensor("token_embd.weight", np.zeros((16, 32), np.float16))
    writer.add_tensor("blk.1.ffn_up_exps.weight", np.zeros((4, 8, 32), np.float32))
    writer.add_tensor(ODD, np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(path: Path) -> list[tuple[str, int, int, str]]:
    return [(t.name, int(t.data_offset), int(t.n_bytes), t.tensor_type.name) for t in gguf.GGUFReader(path).tensors]


def test_csv(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(model)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(HEADER + "\n")
    assert "\r" not in out
    assert "\x1b" not in out, "a name must not command the terminal"
    rows = list(csv.reader(io.StringIO(out)))[1:]
    odd = 'blk.0.a,"b\\n\\x1b[31m.weight'
    names = [odd if name == ODD else name for name, *_ in expected(model)]
    assert [row[0] for row in rows] == names
    assert [(int(row[1]), int(row[2]), row[3]) for row in rows] == [e[1:] for e in expected(model)]
    assert [row[4:] for row in rows] == [["-1", "token_embd"], ["1", "ffn_up_exps"], ["0", 'a,"b\\n\\x1b[31m']]


def test_wide_csv(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--wide", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == WIDE
    assert lines[1].endswith(",-1,token_embd,0,0,0,32x16")
    assert lines[2].endswith(",1,ffn_up_exps,0,4,1024,32x8x4")


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(model), "--format", "json", "--wide"]) == 0
    document = json.loads(capsys.readouterr().out)
    read = read_model(model)
    assert document["model"] == {
        "path": str(model),
        "architecture": "llama",
        "name": "Tiny",
        "fingerprint": read.fingerprint,
        "shards": [
            {"path": str(model), "size_bytes": model.stat().st_size, "data_offset_bytes": read.tensors[0].offset}
        ],
    }
    assert [tuple(t.values())[:4] for t in document["tensors"]] == expected(model)
    assert list(document["tensors"][0]) == WIDE.split(",")
    assert document["tensors"][1]["shape"] == [32, 8, 4]


def test_parquet_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.parquet"
    assert main(["map", str(model), "--format", "parquet", "--wide", "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    table = pq.read_table(out)
    assert table.column_names == WIDE.split(",")
    assert [tuple(row.values())[:4] for row in table.to_pylist()] == expected(model)
    assert main(["map", str(model), "--format", "parquet", "-o", str(tmp_path / "narrow")]) == 0
    assert pq.read_table(tmp_path / "narrow").column_names == HEADER.split(",")


def test_parquet_to_a_terminal_is_refused_and_to_a_pipe_is_written(
    model: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["map", str(model), "--format", "parquet"]) == 0
    assert capfdbinary.readouterr().out[:4] == b"PAR1"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["map", str(model), "--format", "parquet"]) == 2
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"-o FILE" in err


def test_output_is_not_overwritten_without_force(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map.csv"
    out.write_text("mine")
    assert main(["map", str(model), "-o", str(out)]) == 1
    assert "File already exists, will not overwrite without --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    link = tmp_path / "link.csv"
    link.symlink_to(out)
    assert main(["map", str(model), "-o", str(link), "--force"]) == 0
    assert out.read_text().startswith(HEADER)
    assert link.is_symlink()
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_force_spares_devices_and_models(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert main(["map", str(model), "-o", str(model), "--force"]) == 1
    assert "it is a GGUF model" in capsys.readouterr().err
    assert model.read_bytes() == before
    assert main(["map", str(model), "-o", os.devnull, "--force"]) == 1
    assert "not a regular file" in capsys.readouterr().err
    assert Path(os.devnull).is_char_device()


def test_output_folder_that_does_not_exist(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", str(model), "-o", str(tmp_path / "none" / "map.csv")]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_errors_go_to_stderr_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"junk")
    assert main(["map", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"llmtraced: {path}: not a GGUF file (starts with b'junk')\n")


def test_csv_does_not_import_pyarrow(model: Path) -> None:
    code = "import sys; from llmtraced.commands import main; main(sys.argv[1:]); assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "map", str(model)], check=True, stdout=subprocess.DEVNULL)
