"""The scrape benchmark on a real daemon: every series is there, faults come in, and what it says of both is true."""

from __future__ import annotations

import pytest

from llmtraced.bench import scrape
from llmtraced.errors import LlmtracedError

pytestmark = pytest.mark.kernel


def test_a_run_finds_every_series_at_rest_and_in_a_flood() -> None:
    report = scrape.run(tensors=(41, 7), rounds=2)
    assert list(report["scrapes"]) == ["41 idle", "41 flood", "7 idle", "7 flood"]
    for found in report["scrapes"].values():
        assert len(found["seconds"]["values"]) == 2
        assert 0 < found["made_seconds"]["max"] < found["seconds"]["max"]
        assert found["cpu_seconds"]["min"] > 0
        assert ("faults_per_s" in found) == (found["load"] == "flood")
    many, few = (report["scrapes"][f"{n} idle"] for n in (41, 7))
    assert many["series"] - few["series"] == 6 * (41 - 7)
    assert many["bytes"]["median"] > few["bytes"]["median"]
    assert report["scrapes"]["41 flood"]["faults_per_s"]["min"] > 1000


def test_an_answer_without_every_series_voids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = scrape.write_model
    monkeypatch.setattr(scrape, "write_model", lambda path, n: written(path, n - 1))
    with pytest.raises(LlmtracedError, match="the benchmark is void: 82 series, 88 expected"):
        scrape.run(tensors=(8,), rounds=1)
