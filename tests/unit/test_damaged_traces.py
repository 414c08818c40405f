"""Empty, cut off, foreign and newer traces: each form of report says so in one line, and hides nothing."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_analysis_trace import Builder

from llmtraced.commands import main
from llmtraced.commands.report import FORMS
from llmtraced.reporters.questions import QUESTIONS

pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install matplotlib")

ALL = [*QUESTIONS, *FORMS]


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    """A small trace with every table, in a folder with a name to escape."""
    build = Builder(tmp_path / "tr\x1b[31mace")
    build.tensor(("blk.0.ffn_up.weight", 0, 8192), layer=0, component="ffn_up")
    for _ in range(2):
        build.adds(("blk.0.ffn_up.weight", 0, 8192))
    at = {"tensor_name": "blk.0.ffn_up.weight", "token": 1}
    build.write("faults", [at | {"major": True, "latency_ns": 5000, "timestamp": 1000 + n} for n in range(9)])
    build.write("ops", [at | {"duration_ns": 7, "timestamp": 2000 + n} for n in range(9)])
    build.write("tokens", [{"token": n, "start_ns": n * 10**9, "end_ns": n * 10**9 + 10**8} for n in range(1, 4)])
    return build


def run(name: str, folder: Path, file: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and what was said on stderr, without what tells of progress; the report is in ``file``."""
    code = main(["report", name, str(folder), "-o", str(file), "--force"])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    assert "Traceback" not in captured.err
    return code, captured.err


def refused(name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Return the line that says why; no file is left."""
    code, said = run(name, folder, tmp_path / "out", capfd)
    assert code == 1
    assert list(tmp_path.glob("*out*")) == []
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize("name", ALL)
def test_no_trace(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "nothing"
    assert "does not exist" in refused(name, folder, tmp_path, capfd)
    folder.mkdir()
    assert "holds no trace" in refused(name, folder, tmp_path, capfd)
    (folder / "faults").mkdir()
    (folder / "faults" / "x.parquet").write_bytes(b"")
    assert "holds no trace (1 files in it cannot be read" in refused(name, folder, tmp_path, capfd)


@pytest.mark.parametrize("name", ALL)
def test_only_foreign_files(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "foreign"
    (folder / "faults").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), folder / "faults" / "x.parquet")
    assert "not written by llmtraced" in refused(name, folder, tmp_path, capfd)


@pytest.mark.parametrize("name", ALL)
def test_a_newer_format(name: str, trace: Builder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace.write("faults", [{}], schema_version=99, tool_version="9.0\x1b[0m")
    said = refused(name, trace.path, tmp_path, capfd)
    assert "trace format 99" in said
    assert "pip install --upgrade llmtraced" in said


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_read_is_named_and_the_rest_reported(
    name: str,
    trace: Builder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cut = trace.write("faults", [{}] * 50, name="cut.parquet")
    cut.write_bytes(cut.read_bytes()[:-40])
    pq.write_table(pa.table({"a": [1]}), trace.path / "ops" / "foreign.parquet")
    file = tmp_path / "out"
    code, _ = run(name, trace.path, file, capfd)
    assert code == 0
    told = file.read_text()
    if name in FORMS:
        assert sum("left out" in record.getMessage() for record in caplog.records) == 2
    if name == "trace-events":
        told = " ".join(json.loads(told)["otherData"]["notes"])
    for path in ("faults/cut.parquet", "ops/foreign.parquet"):
        assert f"left out {path}" in " ".join(told.split())


@pytest.mark.parametrize("table", ["tensors", "tokens", "faults", "pagecache", "ops"])
@pytest.mark.parametrize("name", ALL)
def test_damaged_data_is_one_line(
    name: str, table: str, trace: Builder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = next((trace.path / table).glob("*.parquet"))
    whole = bytearray(path.read_bytes())
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    whole[4:-footer] = random.Random(1).randbytes(len(whole) - footer - 4)
    path.write_bytes(bytes(whole))
    file = tmp_path / "out"
    code, said = run(name, trace.path, file, capfd)
    assert file.exists() == (code == 0)
    if code:
        assert code == 1
        assert "cannot read the trace's data" in said.splitlines()[-1]
        assert [line for line in said.splitlines()[:-1] if not line.endswith(": done")] == []
