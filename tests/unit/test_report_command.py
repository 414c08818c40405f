"""``llmtraced report``: output, files, hostile names; and the text and plot reporters behind it."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_analysis_trace import Builder

from llmtraced.commands import main
from llmtraced.reporters.questions import QUESTIONS
from llmtraced.reporters.text import Column, Style, bar, duration, size, table

EVIL = "evil\x1b]0;owned\x07\x9b31m\u202e$x_{$\n.weight"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    build = Builder(tmp_path / "trace")
    build.tensor((EVIL, 0, 1_670_000_000), layer=0)
    build.tensor(("blk.0.ffn_up.weight", 1_670_000_000, 1000), ("unread", 1_670_001_000, 10), layer=1)
    build.tensor(("copied", 1_670_002_000, 10), backed=False)
    for _ in range(2):
        build.adds((EVIL, 0, 1_670_000_000), ("blk.0.ffn_up.weight", 1_670_000_000, 1000), comm="e\x1b[2Jil")
    build.write(
        "faults",
        [{"tensor_name": EVIL, "major": True, "latency_ns": 345_000_000, "timestamp": 10**9}],
        command=["llama-server", "-m", "a b\x1b.gguf"],
        cgroup_limit_bytes=1_400_000_000,
    )
    build.write(
        "tokens",
        [
            {"token": 1, "start_ns": 0, "end_ns": 10**9, "stall_ns": 345_000_000},
            {"token": 2, "start_ns": 10**9, "end_ns": 60 * 10**9, "phase": "prompt"},
        ],
        account={"tokens": {"counted": 3, "delivered": 2, "dropped": 1, "missed": 0}},
    )
    return str(build.path)


def out(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_report_as_text_and_json(folder: str, capfd: pytest.CaptureFixture[str], name: str) -> None:
    text = out(capfd, name, folder)
    assert "1 dropped (tokens)" in text
    assert "\x1b" not in text  # not a terminal: no colour, and no escape from a name
    assert text.replace("\n", "").isprintable()
    raw = out(capfd, name, folder, "--json")
    assert raw.isascii()
    assert "\x1b" not in raw
    report = json.loads(raw)
    assert report["verdict"] == "1 dropped (tokens)"
    assert {"account", "notes", "phase", "session", "models"} <= set(report)


def test_reread_text(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = out(capfd, "reread", folder)
    assert "3.34 GB read from disk: 1.67 GB once, 1.67 GB again; each byte 2.00 times on average" in text
    assert "345 ms" in text
    assert "not read from disk: 1 tensor, 10 B" in text
    assert "not visible here: 1 tensor, 10 B" in text
    assert "1 more tensor, 2.00 kB read" in out(capfd, "reread", folder, "--top", "1")


def test_json_keeps_names_exactly_and_every_tensor(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    report = json.loads(out(capfd, "reread", folder, "--json", "--top", "1"))
    assert report["tensors"][0]["tensor_name"] == EVIL
    assert len(report["tensors"]) == 4


def test_summary_text(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = out(capfd, "summary", folder)
    assert r"llama-server -m 'a b\x1b.gguf' (pid 100)" in text
    assert "1.40 GB" in text
    assert "1 major, 0 minor; threads waited 345 ms in them" in text


def test_top_names_that_many_in_the_summary(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    report = json.loads(out(capfd, "summary", folder, "--json", "--top", "1"))
    assert len(report["top_by_bytes_read"]) == 1
    assert report["bytes_by_process"] == {"e\x1b[2Jil": 2 * 1_670_001_000}


def test_phase(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nothing was read from disk" in out(capfd, "reread", folder, "--phase", "load")


def test_output_file_is_not_overwritten_without_force(
    folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    assert out(capfd, "reread", folder, "--json", "-o", str(file)) == ""
    first = file.read_text()
    assert json.loads(first)["total_bytes_read"] == 2 * 1_670_001_000
    assert main(["report", "tokens", folder, "-o", str(file)]) == 1
    assert "already exists, will not overwrite without --force" in capfd.readouterr().err
    assert file.read_text() == first
    assert out(capfd, "tokens", folder, "-o", str(file), "--force") == ""
    assert "slowest" in file.read_text()


def test_failures_are_one_line_and_an_exit_code(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "reread", str(tmp_path / "none")]) == 1
    assert main(["report", "reread", folder, "--session", "nope"]) == 1
    for words in (["nonsense", folder], ["reread", folder, "--top", "0"], ["reread", folder, "--phase", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["report", *words])
        assert caught.value.code == 2
    assert "Traceback" not in capfd.readouterr().err


def test_plot_needs_a_known_picture_format(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "reread", folder, "--plot", str(tmp_path / "p.bmp")]) == 2
    assert ".png or .svg" in capfd.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(
    folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["report", "reread", folder, "--plot", str(tmp_path / "p.png")]) == 1
    captured = capfd.readouterr()
    assert "pip install matplotlib" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("name", QUESTIONS)
def test_plots(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib: pip install matplotlib")
    png, svg = tmp_path / "p.png", tmp_path / "p.svg"
    out(capfd, name, folder, "--plot", str(png))
    assert png.read_bytes().startswith(b"\x89PNG")
    out(capfd, name, folder, "--plot", str(svg))
    assert "<svg" in svg.read_text()
    before = png.read_bytes()
    png.write_bytes(b"mine")
    assert main(["report", name, folder, "--plot", str(png)]) == 1
    assert png.read_bytes() == b"mine"
    out(capfd, name, folder, "--plot", str(png), "--force")
    assert png.read_bytes() == before


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_empty_trace_is_reported_and_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    build = Builder(tmp_path / "trace")
    build.write("faults", [])
    out(capfd, name, str(build.path))
    out(capfd, name, str(build.path), "--json")
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib: pip install matplotlib")
    out(capfd, name, str(build.path), "--plot", str(tmp_path / "p.png"))


def test_two_sessions_are_noted(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    Builder(Path(folder)).write(
        "tokens", [{"token": 1, "start_ns": 10**12, "end_ns": 10**12 + 1}], session="ffffffff-1-1"
    )
    text = out(capfd, "tokens", folder)
    assert "note: the trace holds 2 sessions" in text
    assert json.loads(out(capfd, "tokens", folder, "--json"))["session"] == "ffffffff-1-1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (4096, "4.10 kB"), (999_999, "1.00 MB")),
        *((1_670_000_000, "1.67 GB"), (16_700_000, "16.7 MB"), (167e12, "167 TB"), (5e18, "5000 PB")),
    ],
)
def test_size(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        *((None, "-"), (0, "0 s"), (45, "45 ns"), (12_300, "12.3 µs"), (345e6, "345 ms"), (999.9e6, "1.00 s")),
        *((119e9, "119 s"), (125e9, "2 min 05 s"), (3_720e9, "1 h 02 min")),
    ],
)
def test_duration(ns: float | None, text: str) -> None:
    assert duration(ns) == text


def test_bar() -> None:
    assert bar(0, 4) == "    "
    assert bar(1e-9, 4) == "▏   "
    assert bar(0.5, 4) == "██  "
    assert bar(7, 4) == "████"


def test_tables_fit_the_width() -> None:
    columns = [
        Column("name", lambda row: row["name"], name=True),
        Column("n", lambda row: "12345678"),
        Column("extra", lambda row: "x" * 10, spare=True),
    ]
    rows = [{"name": "blk.0.some.long.tensor.name.weight"}]
    wide, fits, narrow = (table(rows, columns, Style(width)) for width in (80, 45, 30))
    assert "x" in wide[1]
    assert fits[1] == "blk.0.some.long.tensor.name.weight  12345678"
    assert narrow[1] == "blk.0.som…ame.weight  12345678"
    assert max(map(len, narrow)) <= 30
    assert "\x1b[1m" in table(rows, columns, Style(80, colour=True))[0]


def test_an_option_of_another_report_is_refused(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "tokens", folder, "--value", "stall"]) == 2
    assert "report tokens has no option --value" in capfd.readouterr().err
    assert json.loads(out(capfd, "heatmap", folder, "--value", "stall", "--json"))["value"] == "stall"
    assert json.loads(out(capfd, "timeline", folder, "--small-gap", "64K", "--json"))["small_gap_limit_bytes"] == 65536


def test_trace_events(folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events = json.loads(out(capfd, "trace-events", folder))["traceEvents"]
    assert [e for e in events if e["ph"] == "X"]
    few = json.loads(out(capfd, "trace-events", folder, "--token", "2:2"))["traceEvents"]
    assert 0 < len(few) < len(events)
    with pytest.raises(SystemExit):
        main(["report", "trace-events", folder, "--token", "5:2"])
