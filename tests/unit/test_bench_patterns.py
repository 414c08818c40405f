"""The faults that benchmarks are fed with: reproducible, inside the tensors, in the order of their ends."""

from __future__ import annotations

import numpy as np
import pytest

from llmtraced.bench import patterns
from llmtraced.bench.events import synthetic_model
from llmtraced.schema import EVENT, PAGE, Kind, Outcome, Phase


@pytest.fixture(scope="module")
def model():
    return synthetic_model(40_000_000)


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_records_are_what_a_server_could_send(model, pattern):
    events = patterns.faults(model, 5003, pattern)
    assert events.dtype == EVENT
    assert len(events) == 5003
    assert (events["kind"] == Kind.FAULT).all()
    assert (events["mark"] & 15 == Phase.DECODE).all()
    assert not events["mark"][events["mark"] >> 4 != 0].size
    assert (events["a"] - events["c"] == patterns.BASE).all()
    assert (np.diff((events["ts"] + events["b"]).astype(np.int64)) >= 0).all()
    assert (np.diff(events["ts"].astype(np.int64)) < 0).any()
    starts = np.array([t.offset for t in model.tensors])
    ends = starts + np.array([t.size for t in model.tensors])
    at = np.searchsorted(starts, events["c"].astype(np.int64), side="right") - 1
    assert (at >= 0).all()
    assert (events["c"].astype(np.int64) < ends[at]).all()
    share = (events["code"] == Outcome.MAJOR).mean()
    assert abs(share - patterns.MAJOR_SHARE) < 0.01


def test_a_thread_is_in_one_fault_at_a_time(model):
    events = patterns.faults(model, 4001, "mixed")
    for thread in np.unique(events["tid"]):
        mine = events[events["tid"] == thread]
        ends = (mine["ts"] + mine["b"]).astype(np.int64)
        gaps = mine["ts"][1:].astype(np.int64) - ends[:-1]
        assert gaps.min() >= patterns.COMPUTE_NS[0]


def test_sequential_walks_each_tensor_in_steps_of_fault_around(model):
    events = patterns.faults(model, 3000, "sequential")
    first = events[(events["token"] == 1) & (events["tid"] == events["tid"].min())]
    offsets = first["c"].astype(np.int64)
    assert (np.diff(offsets) > 0).all()
    starts = {t.offset for t in model.tensors}
    assert all(offset % patterns.FAULT_AROUND == 0 or offset in starts for offset in offsets.tolist())
    assert starts <= set(offsets.tolist())


def test_mixed_strays_to_page_starts_of_the_tensor_at_hand(model):
    mixed, plain = (patterns.faults(model, 2000, name) for name in ("mixed", "sequential"))
    strayed = np.setdiff1d(mixed["c"], plain["c"]).astype(np.int64)
    assert 200 < len(strayed) < 600
    assert (strayed % PAGE == 0).all()


def test_the_seed_decides(model):
    one, same, other = (patterns.faults(model, 500, "random", seed) for seed in (7, 7, 8))
    assert (one == same).all()
    assert (one["c"] != other["c"]).any()


@pytest.mark.parametrize("n", [1, 2, 3, 997])
def test_any_number(model, n):
    assert len(patterns.faults(model, n, "mixed")) == n
