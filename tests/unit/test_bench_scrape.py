"""What the scrape benchmark writes and reads, without a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtraced.bench import scrape
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.gguf_map import read_model

TEXT = """# HELP llmtraced_tensor_faults_total Page faults on the tensor's pages.
# TYPE llmtraced_tensor_faults_total counter
llmtraced_tensor_faults_total{pid="17",model="m",tensor="a b",type="major"} 3
llmtraced_tensor_faults_total{pid="17",model="m",tensor="a b",type="minor"} 0
llmtraced_tensor_faults_total{pid="170",model="m",tensor="a b",type="major"} 5
llmtraced_mapped_bytes{pid="17"} 4096
llmtraced_records_total 9
"""


def test_series_of_a_process_are_counted_by_name() -> None:
    mine, total = scrape.series_of(TEXT, 17)
    assert mine == {"llmtraced_tensor_faults_total": 2, "llmtraced_mapped_bytes": 1}
    assert total == 5
    assert scrape.series_of(TEXT, 1) == ({}, 5)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_the_model_has_so_many_tensors_and_always_the_same_bytes(n: int, tmp_path: Path) -> None:
    scrape.write_model(tmp_path / "m.gguf", n)
    model = read_model(tmp_path / "m.gguf")
    assert len(model.tensors) == n
    assert sum(t.size for t in model.tensors) == pytest.approx(scrape.MODEL_BYTES, rel=0.001)


@pytest.mark.parametrize("tensors", [(7, 7), (scrape.MODEL_BYTES,)])
def test_numbers_of_tensors_that_cannot_be_are_refused(tensors: tuple[int, ...]) -> None:
    with pytest.raises(LlmtracedError, match="--tensors: different numbers of 1 to") as error:
        scrape.run(tensors=tensors)
    assert error.value.exit_code == USAGE
