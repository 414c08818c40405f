"""The experiment's levels, models and sums, and how its matrix is shown; nothing is started here."""

from pathlib import Path
from typing import Any

import pytest

from llmtraced.bench import experiment, models, show_experiment
from llmtraced.bench.experiment import Prompt, limit_of, model_path
from llmtraced.commands import main
from llmtraced.errors import LlmtracedError
from llmtraced.reporters.text import Style


def run(speed: float, read: int, amplification: float | None, sequential: float | None = 0.75) -> dict[str, Any]:
    one = {"tokens_per_second": speed, "bytes_per_token": read, "stall_share": 0.5, "sequential_byte_share": sequential}
    return {
        "limit_bytes": 1000,
        "phases": {"prompt": one, "decode": one},
        "decode_unique_bytes": 500,
        "amplification": amplification,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    cells = [
        {"model": "e\x1b[2Jvil", "model_bytes": 10**9, "level": level}
        | experiment._summed([run(2.0, 100, 3.0), run(4.0, 300, 5.0), run(3.0, 200, None)])
        for level in ("fits", "70%")
    ]
    machine = {"cpu": "a cpu", "cores": 2, "kernel": "6.18"}
    return {"cells": cells, "machine": machine, "settings": {"rounds": 3, "read_ahead_kb": 128, "threads": 2}}


def test_levels() -> None:
    assert limit_of("fits", 1000, 50) is None
    assert limit_of("70%", 1000, 50) == 750
    assert limit_of("110%", 1000, 50) == 1150
    for word in ("most", "0%", "-5%", "300M", "0.5%", "none"):
        with pytest.raises(LlmtracedError):
            limit_of(word, 1000, 50)


def test_a_model_is_named_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert model_path(str(file)) == ("mine", file)
    with pytest.raises(LlmtracedError, match="of gemma, dense, moe"):
        model_path("nothing")


def test_a_model_that_was_written_otherwise_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path))
    monkeypatch.setattr(experiment, "MODELS", {"moe": models.TINY_MOE})
    (tmp_path / "experiment-moe.gguf").write_bytes(b"of before")
    first = model_path("moe")[1]
    assert first.read_bytes()[:4] == b"GGUF"
    written = first.stat().st_mtime_ns
    assert model_path("moe")[1].stat().st_mtime_ns == written, "what is there is used"
    monkeypatch.setattr(models, "_EDITION", models._EDITION + 1)
    assert model_path("moe")[1] != first


def test_the_prompt_is_the_same_for_every_model() -> None:
    ids = Prompt(n_prompt=200).ids
    assert len(ids) == 200
    assert ids == Prompt(n_prompt=300).ids[:200]
    assert 5 <= min(ids) < max(ids) < 256 + 5, "token ids that the smallest vocabulary has"


def test_medians_over_the_rounds(report: dict[str, Any]) -> None:
    cell = report["cells"][0]
    assert cell["tokens_per_second"]["median"] == 3.0
    assert (cell["tokens_per_second"]["min"], cell["tokens_per_second"]["max"]) == (2.0, 4.0)
    assert (cell["bytes_per_token"], cell["unique_bytes"], cell["amplification"]) == (200, 500, 4.0)
    assert len(cell["rounds"]) == 3


def test_the_table(report: dict[str, Any]) -> None:
    text = show_experiment.render(report, Style(140))
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if " 70% " in line)
    assert [word in line for word in ("3.00", "2.00 to 4.00", "200 B", "4.00", "50.0%", "75.0%")] == [True] * 6
    assert "medians of 3 rounds; readahead 128 KB, 2 threads; a cpu, 2 cores, kernel 6.18" in text


def test_the_picture(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert show_experiment.draw(report, "png").startswith(b"\x89PNG")
    assert b"<svg" in show_experiment.draw(report, "svg")


def test_a_folder_with_something_in_it_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert main(["experiment", "-o", str(tmp_path)]) == 2
    assert "is not empty, will not write into it without --force" in capfd.readouterr().err
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["experiment", "-o", str(tmp_path / "new")]) == 3
