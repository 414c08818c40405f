"""The benchmark's own counts on a real ring: exact with any number of records, and void when one is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from llmtraced.bench import events, patterns
from llmtraced.bench.source import Source, words
from llmtraced.errors import LlmtracedError

pytestmark = pytest.mark.kernel

RING = 1 << 18


@pytest.fixture(scope="module")
def source():
    with Source(RING) as source:
        yield source


@pytest.fixture(scope="module")
def model():
    return events.synthetic_model(40_000_000)


def batches(ring):
    while len(batch := ring.read(limit=500)):
        yield batch


@pytest.mark.parametrize("n", [1, 997, 1024, 1025, RING // 64 - 1])
def test_the_kernel_sends_exactly_what_was_prepared(source, model, n):
    sent = patterns.faults(model, n, "mixed", seed=n)
    source.prepare(sent)
    for _ in range(3):  # the ring's positions wrap around
        assert source.fill() == n
        read = np.concatenate([words(batch) for batch in batches(source.ring)])
        assert np.array_equal(read, words(sent))
        assert source.ring.waiting == 0
        assert source.fill() == n
        calls, seconds = source.drain_with_bcc()
        assert calls == n
        assert seconds > 0
        assert source.ring.waiting == 0


def test_more_than_the_ring_takes_is_refused(source, model):
    with pytest.raises(LlmtracedError, match="1 to 4095 records"):
        source.prepare(patterns.faults(model, RING // 64, "mixed"))


def test_a_ring_that_is_not_empty_is_noticed(source, model):
    source.prepare(patterns.faults(model, RING // 64 - 1, "mixed"))
    source.fill()
    with pytest.raises(LlmtracedError, match="it was not empty"):
        source.fill()
    assert source.drain_with_bcc()[0] == RING // 64 - 1


def test_a_run_counts_every_record_in_every_way(model):
    n = 3989  # prime
    report = events.run(rounds=2, ring_bytes=RING, events=n)
    assert report["verified_events"] == n * (4 * 3 + 3)  # four ways in three rounds, three patterns
    assert report["settings"]["events_per_round"] == n
    for name in ("ring", "bcc_callback", "resolved", "end_to_end"):
        assert len(report["rounds"][name]["values"]) == 2
        assert report[f"{name}_events_per_s"] > 0
    assert set(report["bytes_per_fault_event_by_pattern"]) == set(patterns.PATTERNS)


def test_a_changed_record_voids_the_benchmark(source, model, tmp_path):
    drain = events._Drain(source, model, tmp_path)
    drain.expect(patterns.faults(model, 100, "mixed"))
    for way in (drain.read, drain.store):
        source.fill()
        drain.events = drain.events.copy()
        drain.events["b"][50] += 1
        with pytest.raises(LlmtracedError, match="void"):
            way()
        drain.events["b"][50] -= 1
        assert source.ring.waiting == 0
