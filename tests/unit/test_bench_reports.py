"""What benchmarks compute and show, without a kernel: spreads, limits, verdicts, text and pictures."""

from __future__ import annotations

import argparse
import importlib
import os
import re

import pytest

from llmtraced.bench import events, overhead, scrape, show
from llmtraced.bench.figures import machine, spread
from llmtraced.bench.switch import cpu_seconds
from llmtraced.commands import bench
from llmtraced.errors import NO_PERMISSION, USAGE, LlmtracedError
from llmtraced.reporters.text import Style


def test_spread():
    found = spread([4, 1, 3, 2, 5])
    assert (found["min"], found["p25"], found["median"], found["p75"], found["max"]) == (1, 2, 3, 4, 5)
    assert found["values"] == [4, 1, 3, 2, 5]
    low, high = found["median_ci95"]
    assert 1 <= low <= 3 <= high <= 5
    assert spread([0.123456])["median"] == 0.1235
    assert spread([0.123456])["median_ci95"] == [0.1235, 0.1235]
    assert spread([21_234_567.8])["median"] == 21_230_000


def test_machine_names_what_figures_depend_on():
    assert {"cpu", "cores", "memory_bytes", "kernel", "python", "numpy", "pyarrow"} <= set(machine())


def test_synthetic_model_is_like_a_file():
    model = events.synthetic_model(100_000_000)
    assert abs(model.shards[0].size - 100_000_000) < 3_000_000
    ends = [t.offset + t.size for t in model.tensors]
    assert all(t.offset % 32 == 0 for t in model.tensors)
    assert all(end <= t.offset for end, t in zip(ends, model.tensors[1:], strict=False))
    assert {t.layer for t in model.tensors} >= {-1, 0, 1}
    assert {t.component for t in model.tensors} >= {"token_embd", "attn_q", "ffn_down", "output"}


@pytest.mark.parametrize(
    ("pressure", "limit"), [("none", None), ("70%", 700 + 50), ("300M", 300 << 20), ("0.5%", 5 + 50)]
)
def test_limit(pressure, limit):
    assert overhead.limit_bytes(pressure, 1000, 50) == limit


@pytest.mark.parametrize("pressure", ["", "%", "0%", "-3%", "x%", "lots", "nan%"])
def test_bad_limits(pressure):
    with pytest.raises(LlmtracedError, match="no such pressure") as error:
        overhead.limit_bytes(pressure, 1000, 50)
    assert error.value.exit_code == USAGE


def test_processor_time_of_a_process():
    before = cpu_seconds(os.getpid())
    sum(range(2_000_000))
    assert 0.001 < cpu_seconds(os.getpid()) - before < 10
    with pytest.raises(OSError, match="argument"):
        cpu_seconds(2**22 + 1)


def test_unknown_detail_is_refused_before_anything_is_started():
    with pytest.raises(LlmtracedError, match="no such detail: everything"):
        overhead.run(details=["faults", "everything"])
    with pytest.raises(LlmtracedError, match="no such detail: bare-control"):
        overhead.run(details=["bare-control"])


def test_targets_of_overhead():
    found = overhead.targets({"none": {"control": 0.9, "faults": 0.991, "full": 0.97}, "70%": {"faults": 0.98}})
    assert found["faults"]["met"] == {"none": True, "70%": False}
    assert found["full"]["met"] == {"none": True}
    assert found["ops"]["met"] == {}


def test_targets_of_events():
    good = {
        "ring_events_per_s": 2e7,
        "ratio_ring_to_bcc": 30.0,
        "end_to_end_events_per_s": 2e6,
        "bytes_per_fault_event": 8.0,
    }
    assert all(target["met"] for target in events.targets(good).values())
    for name, value in (("ring_events_per_s", 1.9e7), ("bytes_per_fault_event", 8.1)):
        assert not events.targets(good | {name: value})[name]["met"]


@pytest.fixture
def events_report():
    rates = {"ring": [4e7, 5e7], "bcc_callback": [1e6, 1e6], "resolved": [3e7, 3e7], "end_to_end": [1e6, 2e6]}
    report = {
        **{f"{name}_events_per_s": spread(values)["median"] for name, values in rates.items()},
        "ratio_ring_to_bcc": 45.0,
        "bytes_per_fault_event": 7.1,
        "bytes_per_fault_event_by_pattern": {"sequential": 6.0, "mixed": 7.1, "random": 11.5},
        "rounds": {**{name: spread(values) for name, values in rates.items()}, "ratio_ring_to_bcc": spread([40, 50])},
        "verified_events": 1234567,
        "machine": machine(),
        "settings": {"rounds": 2, "events_per_round": 1000, "cpu": 1},
    }
    return {**report, "targets": events.targets(report)}


@pytest.fixture
def overhead_report():
    level = {
        "median_ratio": 0.985,
        "ratio": spread([0.98, 0.99]),
        "tokens_per_s_without": spread([80, 82]),
        "tokens_per_s_with": spread([79, 81]),
    }
    traced = {"recorder_cpu": spread([0.01]), "recorder_rss_bytes": 150_000_000, "events_per_token": 90.0, "dropped": 0}
    idle = {"detail": "faults", "seconds": 10.0, "recorder_cpu": 0.004, "recorder_cpu_before_first_graph": 0.01}
    idle |= {"rss_bytes": 1, "peak_rss_bytes": 2}
    condition = {"limit_bytes": None, "tokens": 64, "details": {"control": level, "ops": {**level, **traced}}}
    medians = {p: {"control": 0.985, "ops": 0.985} for p in ("none", "70%")}
    return {
        "median_ratio": medians,
        "conditions": [{"pressure": p, **condition, "idle": idle} for p in medians],
        "machine": machine(),
        "settings": {"pairs": 2, "threads": 2, "model": "m\x1b[0m.gguf", "model_bytes": 253e6, "read_ahead_kb": 128},
        "targets": overhead.targets(medians),
    }


def test_events_as_text(events_report):
    text = show.render_events(events_report, Style())
    assert "45.00 M" in text
    assert "ring : BCC = 45 (40 to 50)" in text
    assert "target end_to_end_events_per_s >= 2e+06: missed" in text
    assert "target bytes_per_fault_event <= 8: met" in text


def test_overhead_as_text(overhead_report):
    text = show.render_overhead(overhead_report, Style())
    assert "0.9850" in text
    assert "target ops >= 0.98: met" in text
    assert "\x1b" not in text


@pytest.fixture
def scrape_report():
    one = {"made_seconds": spread([0.005]), "cpu_seconds": spread([0.008]), "bytes": spread([1_612_345], digits=9)}
    one |= {"tensors": 2000, "series": 12_060}
    scrapes = {
        "2000 idle": {**one, "load": "idle", "seconds": spread([0.011, 0.013])},
        "2000 flood": {**one, "load": "flood", "seconds": spread([0.2]), "faults_per_s": spread([170_000])},
    }
    settings = {"tensors": [2000], "rounds": 2, "model_bytes": scrape.MODEL_BYTES}
    return {"scrapes": scrapes, "targets": scrape.targets(scrapes), "machine": machine(), "settings": settings}


def test_targets_of_scrape():
    scrapes = {str(s): {"seconds": spread([s])} for s in (0.1, 0.101)}
    assert scrape.targets(scrapes) == {"seconds": {"limit": "<= 0.1", "met": {"0.1": True, "0.101": False}}}


def test_scrape_as_text(scrape_report):
    text = show.render_scrape(scrape_report, Style())
    assert re.search(r"2,000 +idle +12.0 +11.0 to 13.0 +5.0 +8.0 +12,060 +1,612,345 +0$", text, re.MULTILINE)
    assert re.search(r"2,000 +flood +200.0 .* 170,000$", text, re.MULTILINE)
    assert "target seconds <= 0.1: missed (2000 flood)" in text


@pytest.mark.parametrize("picture", ["png", "svg"])
def test_pictures(events_report, overhead_report, scrape_report, picture):
    pytest.importorskip("matplotlib")
    begin = b"\x89PNG" if picture == "png" else b"<?xml"
    assert show.plot_scrape(scrape_report, picture).startswith(begin)
    assert show.plot_events(events_report, picture).startswith(begin)
    assert show.plot_overhead(overhead_report, picture).startswith(begin)


def parse(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def test_arguments():
    args = parse("overhead", "--pairs", "12", "--detail", "faults,ops", "--pressure", "none,300M", "--json")
    assert (args.benchmark, args.pairs, args.detail, args.json) == ("overhead", 12, "faults,ops", True)
    assert parse("overhead").pressure == "none,70%"
    assert parse("events", "--ring", "1M").ring == 1 << 20
    assert parse("scrape", "--tensors", "2000,7").tensors == (2000, 7)
    for words in (
        ["events", "--rounds", "0"],
        ["scrape", "--tensors", "7,x"],
        ["overhead", "--pairs", "x"],
        ["nothing"],
        [],
    ):
        with pytest.raises(SystemExit):
            parse(*words)


def test_without_root_it_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LlmtracedError, match="as root") as error:
        bench.run(parse("events"))
    assert error.value.exit_code == NO_PERMISSION


def test_every_benchmark_can_be_shown():
    for name, benchmark in bench.BENCHMARKS.items():
        shown = importlib.import_module(f"llmtraced.bench.{benchmark.shown}")
        assert callable(getattr(shown, f"render_{name}"))
        assert callable(getattr(shown, f"plot_{name}"))
