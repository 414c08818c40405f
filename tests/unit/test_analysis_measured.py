"""What is taken from a report of ``bench prefetch``, worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtraced.analysis.measured import Measured, measured
from llmtraced.commands import main
from llmtraced.errors import LlmtracedError


def strategy(ms: float, server: float, helper: float) -> dict[str, Any]:
    figures = {"ms_per_token": ms, "server_bytes_per_token": server, "helper_bytes_per_token": helper}
    return {name: {"median": value} for name, value in figures.items()}


def condition(auto: Any, off: Any, disk: float = 2e9, compute: float = 50.0) -> dict[str, Any]:
    strategies = {name: one for name, one in (("auto", auto), ("off", off)) if one is not None}
    return {
        "bytes_per_token": 1_000_000_000,
        "compute_ms": compute,
        "disk_bytes_per_s": {"median": disk},
        "strategies": strategies,
    }


def test_medians_of_the_conditions_that_read() -> None:
    report = {
        "conditions": [
            condition(
                strategy(120, 0, 200e6), strategy(450, 800e6, 0)
            ),  # 100 ms of reading, 20 of 50 exposed; 0.5 ns/B
            condition(strategy(250, 20e6, 380e6), strategy(950, 900e6, 0)),  # 200, 50 of 50; 1 ns/B
            condition(strategy(330, 0, 600e6), None),  # 300, 30 of 50
            condition(strategy(50, 0, 0), strategy(50, 0, 0), disk=9e9, compute=9.0),  # it fits
            condition(None, strategy(950, 900e6, 0), disk=9e9, compute=9.0),
            condition(strategy(1, 0, 1) | {"ms_per_token": None}, None, disk=9e9),  # it failed
        ]
    }
    assert measured(report) == Measured(
        bytes_per_token=1e9,
        compute_ns=50e6,
        disk=2e9,
        stall_ns_per_byte=pytest.approx(0.75),
        exposed=pytest.approx(0.6),
        conditions=3,
    )


def test_faster_than_the_disk_hides_everything_and_no_more() -> None:
    assert measured({"conditions": [condition(strategy(90, 0, 200e6), None)]}).exposed == 0


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ([], "not a report of bench prefetch"),
        ({}, "not a report of bench prefetch"),
        ({"conditions": [{"memory": "85%"}]}, "not a report of bench prefetch"),
        ({"conditions": [condition(strategy(50, 0, 0), None)]}, "no condition in which the model did not fit"),
        ({"conditions": [condition(strategy(90, 0, 200e6), None, disk=0)]}, "not a report of bench prefetch"),
    ],
)
def test_what_is_no_such_report_is_refused(report: Any, said: str) -> None:
    with pytest.raises(LlmtracedError, match=said):
        measured(report)


@pytest.mark.parametrize("text", ["", "{", "null", json.dumps({"conditions": 3})])
def test_the_command_names_the_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    assert main(["simulate", str(tmp_path), "--bench", str(path)]) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert main(["simulate", str(tmp_path), "--experts", "--bench", str(path)]) == 2
