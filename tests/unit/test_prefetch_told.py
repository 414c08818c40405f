"""The sidecar's metrics, read back with Prometheus's own parser, and its summary in words."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmtraced.prefetch.told import metrics_text, words


def summary(**changed: Any) -> dict[str, Any]:
    return {
        "state": "engaged",
        "why": "tokens read 5 bytes",
        "seconds": 12.0,
        "tokens": 40,
        "pinned_bytes": 1_000_000,
        "window_bytes": 33_554_432,
        "budget_bytes": 1_100_000,
        "prefetched_bytes": 2_000_000_000,
        "used_bytes": 3,
        "late_bytes": 4,
        "wasted_bytes": 5_000_000,
        "missed_bytes": 6,
        "recall": 0.975,
        "in_time_share": 0.9,
        "failed_reads": 1,
        "ticks_lost": 2,
        "token_s_without": 0.5,
        "token_s_with": 0.25,
        "anonymous_bytes": 9_000_000,
        "cpu_s": 1.5,
        **changed,
    }


@pytest.mark.parametrize(
    "model", ["a.gguf", 'say "hi".gguf', "back\\slash\\n.gguf", "new\nline.gguf", "ü{}=,.gguf", ""]
)
def test_prometheus_reads_the_metrics(model: str) -> None:
    text = metrics_text(summary(), 77, model)
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    samples = [sample for family in families for sample in family.samples]
    assert len(families) == len(samples) == len({s.name for s in samples})
    for family in families:
        assert family.documentation
        assert family.type in ("gauge", "counter")
        assert (family.type == "counter") == family.samples[0].name.endswith("_total")
    assert {tuple(s.labels.items()) for s in samples} == {(("pid", "77"), ("model", model))}
    values = {s.name: s.value for s in samples}
    assert all(name.startswith("llmtraced_prefetch_") for name in values)
    assert values["llmtraced_prefetch_pinned_bytes"] == 1_000_000
    assert values["llmtraced_prefetch_prefetched_bytes_total"] == 2_000_000_000
    assert values["llmtraced_prefetch_cpu_seconds_total"] == 1.5
    assert values["llmtraced_prefetch_missed_bytes_total"] == 6


@pytest.mark.parametrize(("state", "value"), [("engaged", 1), ("fits", 0), ("watching", 0), ("backed off", 0)])
def test_engaged_is_a_number(state: str, value: int) -> None:
    assert f'llmtraced_prefetch_engaged{{pid="5",model="m"}} {value}\n' in metrics_text(summary(state=state), 5, "m")


def test_the_summary_in_words() -> None:
    text = words(summary())
    assert text.startswith("engaged after 40 graphs in 12 s (tokens read 5 bytes): 2.00 GB read ahead")
    assert "found 90.0% of it there, 7.5% under way, read 2.5% itself; 5 MB were wasted" in text
    assert text.endswith("\na token took 500 ms without, 250 ms with it")


def test_nothing_to_compare_and_nothing_streamed() -> None:
    text = words(summary(recall=None, in_time_share=None, token_s_with=None))
    assert text.endswith("nothing was streamed")


def test_experts_are_told_of_a_mixture_only() -> None:
    assert "expert" not in metrics_text(summary(), 5, "m")
    experts = {"used_bytes": 11, "late_bytes": 12, "missed_bytes": 13, "wasted_bytes": 14, "hit_share": None}
    text = metrics_text(summary(experts=experts), 5, "m")
    found = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if "expert" in s.name}
    assert found == {
        f"llmtraced_prefetch_expert_{name}_bytes_total": n
        for name, n in (("used", 11), ("late", 12), ("missed", 13), ("wasted", 14))
    }
