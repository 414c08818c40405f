"""Counters in, rates out: golden differences, restarts, and what a metrics page may say."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeTracer, model, target, tensor
from prometheus_client.parser import text_string_to_metric_families

from llmtraced.exposition import exposition
from llmtraced.metrics import LlmtracedCollector
from llmtraced.recorder import Recorder
from llmtraced.schema import CAUSES, PAGE, PHASES, Detail, Phase
from llmtraced.snapshot import COUNTERS, History, Place, Snapshot, Totals, change, snapshot
from llmtraced.store import TraceWriter

A = Place("m.gguf", "blk.0.a.weight", 0, "a")
B = Place("m.gguf", "blk.1.a.weight", 1, "a")
OUT = Place("m.gguf", "", -1, "(outside tensors)")


def totals(pid: int = 7, places: tuple[Place, ...] = (A, B), tick: float = 1.0, **fields: object) -> Totals:
    """Return counters that are ``tick`` times those of the first second."""
    rows = np.array([[100.0, 40, 90, 3, 20, 0.25], [10.0, 0, 0, 1, 2, 0.5]])[: len(places)] * tick
    made = {
        "models": {"m.gguf": 1000.0},
        "graphs": 2 * tick,
        "stall_seconds": 0.5 * tick,
        "tokens": np.array([0, 8, 2, 0]) * tick,
        "causes": np.array([30.0, 80, 0, 0, 0]) * tick,
    }
    return Totals(pid, **{**made, "places": places, "counters": rows, **fields})  # type: ignore[arg-type]


def at(time: float, *processes: Totals) -> Snapshot:
    return Snapshot(time, {p.pid: p for p in processes})


def parse(text: str) -> Snapshot | None:
    return snapshot(text_string_to_metric_families(text), 0.0)


@pytest.mark.parametrize("limit", [2000, 0])
def test_scraped_and_collected_are_the_same(limit: int) -> None:
    recorder = Recorder(FakeTracer(), 60)  # type: ignore[arg-type]
    try:
        tensors = [
            tensor("blk.0.a.weight", 0, PAGE, layer=0, component="a"),
            tensor("blk.0.a.bias", PAGE, PAGE, layer=0, component="a"),
            tensor("x\x1b", 2 * PAGE, PAGE, component="x\x1b"),
        ]
        session = recorder.add(
            target({"m.gguf": model(tensors)}), TraceWriter(None, "s", {}), Detail.FAULTS, Phase.UNKNOWN
        )
        by_byte, by_page = session.tracer.totals[0]  # type: ignore[attr-defined]
        by_byte["major"], by_byte["minor"], by_byte["fault_ns"] = 3, 5, 1_500_000_000
        by_page["added"], by_page["again"], by_page["evicted"] = [1, 2, 0, 0, 4], 6, 7
        slot = session.tracer.slots[session.slot : session.slot + 1]
        slot["tokens"], slot["token"], slot["stall_ns"] = [[0, 10, 20, 0]], 9, 250_000_000
        session.problems.append("no symbols")
        collected = snapshot(LlmtracedCollector(recorder, limit).collect(), 3.5)
        scraped = snapshot(
            text_string_to_metric_families(exposition(LlmtracedCollector(recorder, limit).collect()).decode()), 3.5
        )
    finally:
        recorder.close()
    for found in (collected, scraped):
        assert found is not None
        assert found.time == 3.5
        (process,) = found.processes.values()
        assert process.models == {"m.gguf": 3 * PAGE}
        assert (process.graphs, process.stall_seconds, process.problems) == (9, 0.25, 1)
        assert process.tokens.tolist() == [0, 10, 20, 0]
        rows = dict(zip(process.places, process.counters.tolist(), strict=True))
        if limit:
            assert rows[Place("m.gguf", "blk.0.a.weight", 0, "a")] == [7 * PAGE, 6 * PAGE, 7 * PAGE, 3, 5, 1.5]
            assert Place("m.gguf", "x\\x1b", -1, "x\\x1b") in rows
        else:
            assert rows[Place("m.gguf", "", 0, "a")] == [14 * PAGE, 12 * PAGE, 14 * PAGE, 6, 10, 3]
        assert sum(process.causes) == process.counters[:, 0].sum()
        assert dict(zip(CAUSES, process.causes / process.causes.sum() * 7, strict=True)) == pytest.approx(
            {"fault": 1, "readahead": 2, "prefetcher": 0, "read": 0, "other": 4}
        )


def test_what_is_not_ours_is_told_and_odd_labels_are_left_out() -> None:
    assert parse("# TYPE node_load1 gauge\nnode_load1 0.5\n") is None
    assert parse("") is None
    found = parse(
        'llmtraced_build_info{version="1"} 1\n'
        'llmtraced_graphs_total{pid="x",model="m"} 1\n'
        'llmtraced_graphs_total{pid="5",model="m"} NaN\n'
        'llmtraced_tokens_total{pid="5",model="m",phase="dreaming"} 4\n'
        'llmtraced_read_bytes_total{pid="5",model="m",cause="magic"} 4\n'
        'llmtraced_tensor_faults_total{pid="5",model="m",tensor="t",layer="low",component="t",type="major"} 6\n'
        'llmtraced_tensor_faults_total{pid="5",model="m",tensor="t",layer="low",component="t",type="soft"} 6\n'
        'llmtraced_made_up{pid="5"} 9\n'
    )
    assert found is not None
    (process,) = found.processes.values()
    assert process.pid == 5
    assert process.places == (Place("m", "t", -1, "t"),)
    assert process.counters.tolist() == [[0, 0, 0, 6, 0, 0]]
    assert process.graphs == process.tokens.sum() == process.causes.sum() == 0


def test_change() -> None:
    step = change(totals(), totals(tick=3), 4.0)
    assert step is not None
    assert (step.seconds, step.graphs, step.stall_seconds, step.stall_share) == (4.0, 4, 1.0, 0.25)
    assert dict(zip(PHASES, step.tokens, strict=True)) == {"load": 0, "prompt": 16, "decode": 4, "unknown": 0}
    assert step.causes.tolist() == [60, 160, 0, 0, 0]
    assert dict(zip(COUNTERS, step.counters[0], strict=True)) == {
        "read_bytes": 200,
        "reread_bytes": 80,
        "evicted_bytes": 180,
        "major_faults": 6,
        "minor_faults": 40,
        "fault_seconds": 0.5,
    }


def test_a_stall_that_began_earlier_is_no_more_than_all_of_the_time() -> None:
    step = change(totals(), totals(stall_seconds=5.0), 1.0)
    assert step is not None
    assert step.stall_share == 1


def test_a_place_that_is_new_counted_from_nothing() -> None:
    step = change(totals(places=(A,)), totals(places=(B, A), counters=np.full((2, len(COUNTERS)), 200.0)), 1.0)
    assert step is not None
    assert step.places == (B, A)
    assert step.counters[:, 0].tolist() == [200, 100]
    nothing = change(totals(places=(), counters=np.zeros((0, len(COUNTERS)))), totals(), 1.0)
    assert nothing is not None
    assert nothing.counters[:, 0].tolist() == [100, 10]


@pytest.mark.parametrize(
    "after",
    [
        totals(tick=0.5),
        totals(tick=2, graphs=1.0),
        totals(tick=2, stall_seconds=0.1),
        totals(tick=2, tokens=np.array([0, 7, 100, 0])),
        totals(tick=2, causes=np.array([0, 200, 0, 0, 0])),
        totals(tick=2, counters=np.array([[500.0, 500, 500, 500, 500, 500], [500.0, 500, 500, 0, 500, 500]])),
        totals(tick=2, places=(A,)),
    ],
    ids=["all", "graphs", "stall", "tokens", "causes", "one counter", "a place is gone"],
)
def test_a_restart_is_no_rate(after: Totals) -> None:
    assert change(totals(), after, 1.0) is None


def test_no_time_is_no_rate() -> None:
    assert change(totals(), totals(tick=2), 0.0) is None


def test_history_averages_over_the_window_and_keeps_intervals() -> None:
    history = History(window=2.0, length=3)
    for second, tick in enumerate((1, 2, 4, 4, 8, 9)):
        history.add(at(10.0 + second, totals(tick=tick)))
        if second == 0:
            assert history.recent(7) is None
        if second == 1:
            recent = history.recent(7)
            assert recent is not None
            assert (recent.seconds, recent.causes.sum()) == (1.0, 110)
    recent = history.recent(7)
    assert recent is not None
    assert (recent.seconds, recent.causes.sum()) == (2.0, 5 * 110)  # from 4 to 9
    assert [i.causes.sum() for i in history.intervals(7)] == [0, 4 * 110, 110]
    assert [i.layers for i in history.intervals(7)] == [{0: 0, 1: 0}, {0: 400, 1: 40}, {0: 100, 1: 10}]
    assert history.latest(7).graphs == 18


def test_a_window_is_at_least_one_interval() -> None:
    history = History(window=5.0)
    for second in (0, 60, 120):
        history.add(at(float(second), totals(tick=second + 1)))
    recent = history.recent(7)
    assert recent is not None
    assert recent.seconds == 60


def test_history_over_a_restart_has_no_spike_and_no_negative_rate() -> None:
    history = History()
    for second, tick in enumerate((100, 101, 1)):
        history.add(at(float(second), totals(tick=tick)))
    assert history.recent(7) is None
    history.add(at(3.0, totals(tick=3)))
    recent = history.recent(7)
    assert recent is not None
    assert (recent.seconds, recent.causes.sum()) == (1.0, 220)
    assert [i.causes.sum() for i in history.intervals(7)] == [110, 220]


def test_skipped_time_is_not_counted_and_figures_stay_until_there_are_new_ones() -> None:
    history = History()
    for second, tick in enumerate((1, 2)):
        history.add(at(float(second), totals(tick=tick)))
    history.skip()
    history.add(at(1000.0, totals(tick=500)))
    recent = history.recent(7)
    assert recent is not None
    assert (recent.seconds, recent.causes.sum()) == (1.0, 110)
    history.add(at(1001.0, totals(tick=503)))
    recent = history.recent(7)
    assert recent is not None
    assert (recent.seconds, recent.causes.sum()) == (1.0, 330)
    assert len(history.intervals(7)) == 2


def test_processes_come_and_go() -> None:
    history = History()
    history.add(at(0.0, totals(9), totals(7)))
    assert history.pids == [7, 9]
    history.add(at(1.0, totals(9, tick=2)))
    assert history.pids == [9]
    assert history.recent(9) is not None
    history.add(at(2.0, totals(7, tick=50), totals(9, tick=3)))
    assert history.recent(7) is None  # not since it was last seen


def test_what_is_in_no_layer_is_one_row() -> None:
    history = History()
    other = A._replace(tensor="token_embd.weight", layer=-1)
    for second in (1, 2):
        history.add(at(float(second), totals(places=(other, OUT), tick=second)))
    assert history.intervals(7)[0].layers == {-1: 110}
