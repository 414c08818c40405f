"""What Prometheus is given: kernel totals by tensor, exact to the byte, in text that its parser takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeTracer, model, target, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llmtraced.exposition import exposition
from llmtraced.gguf_map import Model
from llmtraced.metrics import LlmtracedCollector, tensor_totals
from llmtraced.recorder import Recorder
from llmtraced.schema import CAUSES, PAGE, PHASES, Cause, Detail, Phase, Probe
from llmtraced.session import Session
from llmtraced.store import TraceWriter

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

# Pages: 0: header, norm a, norm b, padding, the beginning of w. 1 and 2: w. 3: w, nothing. 4: exps.
DENSE = [
    tensor("blk.0.a.weight", 64, 40, layer=0, component="a"),
    tensor("blk.0.b.weight", 104, 60, layer=0, component="b"),
    tensor("blk.1.a.weight", 192, 3 * PAGE, layer=1, component="a"),
    tensor("blk.1.exps.weight", 4 * PAGE, PAGE, layer=1, component="exps", experts=4),
]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder(FakeTracer(), 60)  # type: ignore[arg-type]
    yield made
    made.close()


def add(recorder: Recorder, models: dict[str, Model], pid: int = 0) -> Session:
    return recorder.add(target(models, pid=pid), TraceWriter(None, "s", {}), Detail.FAULTS, Phase.UNKNOWN)


def tracer_of(session: Session) -> FakeTracer:
    return session.tracer  # type: ignore[return-value]


def count(session: Session, file: int, offset: int, **counters: int) -> None:
    """Count as the kernel does: faults by byte extent, pages (``added_CAUSE``, ``again``, ``evicted``) by segment."""
    extents, (by_byte, by_page) = tracer_of(session).extents[file], tracer_of(session).totals[file]
    at = int(np.searchsorted(extents.byte_starts, np.uint64(offset), side="right")) - 1
    segment = int(np.searchsorted(extents.page_starts, np.uint64(offset // PAGE), side="right")) - 1
    for name, n in counters.items():
        if name in ("minor", "major", "fault_ns"):
            by_byte[name][at] += n
        elif name.startswith("added_"):
            by_page["added"][segment, Cause[name[6:].upper()]] += n
        else:
            by_page[name][segment] += n


def scrape(recorder: Recorder, limit: int = 2000, **options: dict) -> Samples:  # type: ignore[type-arg]
    text = exposition(LlmtracedCollector(recorder, limit, **options).collect())
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation.strip(), family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice: Prometheus takes neither"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples that have these labels."""
    chosen = [v for (n, ls), v in samples.items() if n == name and labels.items() <= dict(ls).items()]
    assert chosen, (name, labels)
    return sum(chosen)


def test_tensor_totals(recorder: Recorder) -> None:
    session = add(recorder, {"m": model(DENSE)})
    count(session, 0, 64, minor=2, major=3, fault_ns=500)
    count(session, 0, 63, minor=7)
    count(session, 0, 9000, major=11, fault_ns=1)
    count(session, 0, 0, added_readahead=5, again=1, evicted=2)  # the straddling page, five times
    count(session, 0, PAGE, added_fault=4)
    count(session, 0, 3 * PAGE, added_other=1)
    count(session, 0, 4 * PAGE, added_prefetcher=1, added_read=2, evicted=1)
    count(session, 0, 5 * PAGE, added_fault=6)  # what follows the last tensor
    totals = tensor_totals(session)
    assert totals.minor.tolist() == [2, 0, 0, 0, 7]
    assert totals.major.tolist() == [3, 0, 11, 0, 0]
    assert totals.fault_ns.tolist() == [500, 0, 1, 0, 0]
    assert totals.added.tolist() == [
        [0, 40 * 5, 0, 0, 0],
        [0, 60 * 5, 0, 0, 0],
        [4 * PAGE, 3904 * 5, 0, 0, 192],
        [0, 0, PAGE, 2 * PAGE, 0],
        [6 * PAGE, (64 + 28) * 5, 0, 0, PAGE - 192],
    ]
    assert totals.again.tolist() == [40, 60, 3904, 0, 92]
    assert totals.evicted.tolist() == [80, 120, 7808, PAGE, 184]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9000)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(list(Cause)), st.integers(1, 50)), max_size=12),
)
def test_no_byte_is_lost_or_counted_twice(parts: list[tuple[int, int]], added: list[tuple[int, Cause, int]]) -> None:
    tensors, at = [], 0
    for i, (gap, size) in enumerate(parts):
        tensors.append(tensor(f"t{i}", at + gap, size))
        at += gap + size
    session = Session(
        FakeTracer(),  # type: ignore[arg-type]
        target({"m": model(tensors)}),
        TraceWriter(None, "s", {}),
        Detail.FAULTS,
        Phase.UNKNOWN,
    )
    expected: Counter[int] = Counter()
    for page, cause, n in added:
        count(session, 0, page * PAGE, **{f"added_{cause.name.lower()}": n})
        rest = PAGE
        for i, t in enumerate(tensors):
            overlap = max(min(t.offset + t.size, (page + 1) * PAGE) - max(t.offset, page * PAGE), 0)
            expected[i] += overlap * n
            rest -= overlap
        expected[len(tensors)] += rest * n
    totals = tensor_totals(session)
    assert totals.added.sum(axis=1).tolist() == [expected[i] for i in range(len(tensors) + 1)]
    assert int(totals.added.sum()) == PAGE * sum(n for *_, n in added)


def test_exposition(recorder: Recorder) -> None:
    session = add(recorder, {"m.gguf": model(DENSE, tail=100)}, pid=0)
    count(session, 0, 64, minor=2, major=3, fault_ns=1_500_000_000)
    count(session, 0, 0, added_readahead=5, again=1, evicted=2)
    slot = tracer_of(session).slots[session.slot : session.slot + 1]
    slot["tokens"] = [[1, 20, 300, 4000]]
    slot["token"], slot["eval_ns"], slot["stall_ns"] = 12, 2_000_000_000, 250_000_000
    session.account["faults"] = {"counted": 12, "delivered": 10, "dropped": 2}
    session.problems.append("no symbols")
    recorder.unsettled, recorder.events, recorder.bytes_written, recorder.write_errors = 4, 77, 9999, 1
    found = scrape(recorder, gauges={"llmtraced_extra": ("More.", lambda: 0.5)})  # type: ignore[arg-type]
    main = {"pid": str(session.target.pid), "model": "m.gguf"}
    a = {**main, "tensor": "blk.0.a.weight", "layer": "0", "component": "a"}
    assert value(found, "llmtraced_tensor_faults_total", **a, type="major") == 3
    assert value(found, "llmtraced_tensor_faults_total", **a, type="minor") == 2
    assert value(found, "llmtraced_tensor_fault_seconds_total", **a) == 1.5
    assert value(found, "llmtraced_tensor_read_bytes_total", **a) == 200
    assert value(found, "llmtraced_tensor_reread_bytes_total", **a) == 40
    assert value(found, "llmtraced_tensor_evicted_bytes_total", **a) == 80
    outside = {**main, "tensor": "", "layer": "-1", "component": "(outside tensors)"}
    assert value(found, "llmtraced_tensor_read_bytes_total", **outside) == 92 * 5
    assert value(found, "llmtraced_tensor_read_bytes_total") == 5 * PAGE
    assert {c: value(found, "llmtraced_read_bytes_total", **main, cause=c) for c in CAUSES} == {
        **dict.fromkeys(CAUSES, 0),
        "readahead": 5 * PAGE,
    }
    tokens = [value(found, "llmtraced_tokens_total", **main, phase=p) for p in PHASES]
    assert tokens == [1, 20, 300, 4000]
    assert value(found, "llmtraced_graphs_total", **main) == 12
    assert value(found, "llmtraced_eval_seconds_total", **main) == 2
    assert value(found, "llmtraced_stall_seconds_total", **main) == 0.25
    account = [value(found, "llmtraced_events_total", probe="faults", outcome=o) for o in session.account["faults"]]
    assert account == [12, 10, 2]
    assert value(found, "llmtraced_events_total", probe="ops") == 0
    assert len([k for k in found if k[0] == "llmtraced_events_total"]) == 3 * len(Probe)
    assert value(found, "llmtraced_model_bytes", **main) == 5 * PAGE + 100
    assert value(found, "llmtraced_mapped_bytes", pid=main["pid"]) == 6 * PAGE
    assert value(found, "llmtraced_problems", pid=main["pid"]) == 1
    assert value(found, "llmtraced_detail", pid=main["pid"]) == Detail.FAULTS
    assert value(found, "llmtraced_recording_paused") == 0
    session.lose({}, "no room")
    assert value(scrape(recorder), "llmtraced_recording_paused") == 1
    own = {
        "llmtraced_records_total": 77,
        "llmtraced_unplaced_pages_total": 3,
        "llmtraced_unsettled_total": 4,
        "llmtraced_trace_bytes_total": 9999,
        "llmtraced_trace_write_errors_total": 1,
        "llmtraced_ring_waiting_records": 5,
        "llmtraced_ring_capacity_records": 64,
        "llmtraced_compile_seconds": 1.5,
        "llmtraced_extra": 0.5,
        "llmtraced_build_info": 1,
    }
    assert {n: value(found, n) for n in own} == own
    assert value(found, "llmtraced_missed_total", program="on_add") == 2
    assert value(found, "llmtraced_attached", point="tracepoint page_fault_user") == 1
    assert value(found, "llmtraced_attached", point="tracepoint mm_filemap_get_pages") == 0
    assert 0 < value(found, "llmtraced_scrape_duration_seconds") < 5


def test_names_and_units(recorder: Recorder) -> None:
    """The rules that `promtool check metrics` holds."""
    add(recorder, {"m": model(DENSE)})
    for family in text_string_to_metric_families(exposition(LlmtracedCollector(recorder).collect()).decode()):
        assert family.name.startswith("llmtraced_")
        assert family.documentation.endswith(".")
        assert family.name == family.name.lower()
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert not sample.name.endswith(("_ns", "_ms", "_kb", "_milliseconds"))


def test_nothing_traced(recorder: Recorder) -> None:
    found = scrape(recorder)
    assert value(found, "llmtraced_build_info") == 1
    assert not [name for name, _ in found if name.startswith("llmtraced_tensor")]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_more_tensors_than_the_limit_are_grouped(recorder: Recorder, limit: int) -> None:
    """The sums are the same, by layer and component."""
    session = add(recorder, {"m": model([*DENSE, tensor("blk.1.a.bias", 5 * PAGE, 50, layer=1, component="a")])})
    for page in range(7):
        count(session, 0, page * PAGE, added_fault=page + 1, again=page, evicted=1)
    for t in session.resolver.tensors:
        count(session, 0, t.offset, major=t.size, minor=1, fault_ns=t.size * 10**9)
    each, grouped = scrape(recorder, limit=5), scrape(recorder, limit=limit)
    names = {n for n, _ in each if n.startswith("llmtraced_tensor_")}
    assert len(names) == 5
    for name in names:
        sums: list[dict[tuple[str, ...], float]] = []
        for found in (each, grouped):
            by_group: dict[tuple[str, ...], float] = defaultdict(float)
            for (n, labels), v in found.items():
                if n == name:
                    by_group[tuple(dict(labels).get(k, "") for k in ("layer", "component", "type"))] += v
            sums.append(dict(by_group))
        assert sums[0] == sums[1]
    assert {dict(labels)["tensor"] for n, labels in grouped if n in names} == {""}
    assert len([n for n, _ in grouped if n == "llmtraced_tensor_read_bytes_total"]) == 4 + 1
    assert len([n for n, _ in each if n == "llmtraced_tensor_read_bytes_total"]) == 5 + 1


EVIL = [
    'a"} 1\nllmtraced_up 1',
    "\x1b[2J\x07",
    "back\\slash",
    "new\nline",
    "\u202eright",
    "",
    "ü",
    "x" * 5000,
    "{}=,",
]


def test_evil_names_are_escaped(recorder: Recorder) -> None:
    tensors = [tensor(n, i * PAGE, PAGE, component=n, layer=i) for i, n in enumerate(EVIL)]
    session = add(recorder, {'m"\n\x1b.gguf': model(tensors)})
    count(session, 0, 0, major=9)
    text = exposition(LlmtracedCollector(recorder).collect()).decode()
    assert all(c == "\n" or c.isprintable() for c in text)
    assert max(map(len, text.splitlines())) < 1000
    found = scrape(recorder)
    assert value(found, "llmtraced_tensor_faults_total", type="major", layer="0") == 9
    assert not [n for n, _ in found if n == "llmtraced_up"]
    assert len({ls for n, ls in found if n == "llmtraced_tensor_read_bytes_total"}) == len(EVIL) + 1


def test_several_models_and_processes_do_not_mix(recorder: Recorder) -> None:
    first = add(recorder, {"main": model(DENSE), "draft": model(DENSE[:2])}, pid=1)
    second = add(recorder, {"main": model(DENSE)}, pid=2)
    numbers = first.files["main", 0], first.files["draft", 0], second.files["main", 0]
    for n, (session, file) in enumerate(zip((first, first, second), numbers, strict=True)):
        count(session, file, 64, major=10**n)
        count(session, file, 0, added_fault=10**n)
    found = scrape(recorder)
    for pid, label, n in (("1", "main", 1), ("1", "draft", 10), ("2", "main", 100)):
        labels = {"pid": pid, "model": label}
        assert value(found, "llmtraced_tensor_faults_total", **labels, tensor="blk.0.a.weight") == n
        assert value(found, "llmtraced_tensor_read_bytes_total", **labels, tensor="blk.0.b.weight") == 60 * n
    for pid, pages in (("1", 11), ("2", 100)):
        assert value(found, "llmtraced_read_bytes_total", pid=pid) == pages * PAGE


def test_a_session_that_ends_takes_its_series_along(recorder: Recorder) -> None:
    session = add(recorder, {"m": model(DENSE)})
    assert [n for n, _ in scrape(recorder) if n == "llmtraced_tensor_read_bytes_total"]
    recorder.remove(session)
    assert not [n for n, ls in scrape(recorder) if "pid" in dict(ls)]


@pytest.mark.parametrize(("n", "limit"), [(1, 2000), (30, 2000), (30, 0)])
def test_the_number_of_series_is_what_docs_metrics_md_says(recorder: Recorder, n: int, limit: int) -> None:
    before = len(scrape(recorder, limit))
    tensors = [tensor(f"blk.{i // 3}.{i % 3}", i * PAGE, PAGE, layer=i // 3, component=str(i % 3)) for i in range(n)]
    add(recorder, {"main": model(tensors), "draft": model(tensors[:1])})
    groups = n + 1  # by tensor, or as many pairs of layer and component
    assert len(scrape(recorder, limit)) - before == 6 * (groups + 1) + 6 * 2 + 28
    assert before == 1 + 2 + 1 + 10  # build, attached, missed; and the rest


def test_names_that_are_the_same_once_they_are_cut_are_one_series(recorder: Recorder) -> None:
    session = add(recorder, {"m": model([tensor("x" * 300 + end, i * PAGE, PAGE) for i, end in enumerate("ab")])})
    count(session, 0, 0, added_fault=1)
    count(session, 0, PAGE, added_fault=2)
    found = scrape(recorder)
    (name,) = {dict(labels)["tensor"] for n, labels in found if n == "llmtraced_tensor_read_bytes_total"} - {""}
    assert value(found, "llmtraced_tensor_read_bytes_total", tensor=name) == 3 * PAGE


def test_each_of_2000_tensors_has_its_series(recorder: Recorder) -> None:
    tensors = [tensor(f"blk.{i // 9}.ffn_{i % 9}.weight", i * 9000, 9000, layer=i // 9) for i in range(2000)]
    add(recorder, {"m.gguf": model(tensors)})
    text = exposition(LlmtracedCollector(recorder).collect())
    assert text.count(b"llmtraced_tensor_faults_total{") == 2 * 2001


def test_sidecars_are_handed_on(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "7.prom").write_text('llmtraced_prefetch_engaged{pid="7",model="m"} 1\n')
    found = scrape(recorder, sidecars=f"{tmp_path}/*.prom")  # type: ignore[arg-type]
    assert value(found, "llmtraced_prefetch_engaged", pid="7", model="m") == 1
    assert not [name for name, _ in scrape(recorder) if "prefetch" in name]
