"""What the live view counts when it traces by itself: a workload whose faults are known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtraced.bench import models
from llmtraced.bench.pressure import drop_cache
from llmtraced.bench.touch import Touch, choose_offsets
from llmtraced.schema import PAGE
from llmtraced.snapshot import COUNTERS, History
from llmtraced.watch import Attached

pytestmark = pytest.mark.kernel

COUNT = 499


def test_attached_counts_exactly(tmp_path: Path) -> None:
    model = models.write(tmp_path / "top.gguf", models.dense_preset(24_000_000))
    offsets = choose_offsets(model.stat().st_size - PAGE, COUNT, seed=1)
    assert drop_cache(model) == 0
    history = History()
    with Touch(model, offsets) as touch, Attached(touch.ready["pid"]) as source:
        drop_cache(model)  # what finding the process has read
        history.add(source.snapshot())
        done = touch.go()
        history.add(source.snapshot())
        pid = touch.ready["pid"]
        recent, totals = history.recent(pid), history.latest(pid)
    assert recent is not None
    sums = dict(zip(COUNTERS, recent.counters.sum(axis=0), strict=True))
    assert sums["major_faults"] == done["majflt"] == COUNT
    assert sums["minor_faults"] == sums["evicted_bytes"] == 0
    assert sums["read_bytes"] == recent.causes.sum() == COUNT * PAGE
    assert sums["fault_seconds"] > 0
    assert 0 < recent.stall_share <= 1
    assert totals.resident is not None
    assert sum(size for _, size in totals.resident.values()) <= model.stat().st_size
