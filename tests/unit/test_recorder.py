"""Epochs, accounts and files of sessions, without a kernel: what was counted, delivered and dropped adds up."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_ggml import ARENA, MODEL, PLACES, SHAPES, Memory, moe
from fakes import FakeTracer, event, events, model, pages, target, tensor

from llmtraced import recorder as module
from llmtraced import session as session_module
from llmtraced import store as store_module
from llmtraced.analysis.trace import open_trace
from llmtraced.errors import LlmtracedError
from llmtraced.gguf_map import Model
from llmtraced.recorder import Recorder
from llmtraced.schema import EPOCHS, PAGE, TABLES, Detail, Kind, Phase, Probe
from llmtraced.session import Session
from llmtraced.store import METADATA_KEY, ROOM, TraceWriter
from llmtraced.target import Symbol, Target, from_arguments

FAULT = {"a": MODEL + 70, "b": 1000, "c": 70, "d": 0, "code": 1}
SIMPLE = model([tensor("a", 64, 5000)])


@pytest.fixture
def tracer() -> FakeTracer:
    return FakeTracer()


@pytest.fixture
def recorder(tracer: FakeTracer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.05)
    made = Recorder(tracer, 3600)  # type: ignore[arg-type]
    yield made
    tracer.accounts[:] = 0
    made.close()


def add(
    recorder: Recorder,
    trace: Path | None,
    name: str = "s",
    of: Model = SIMPLE,
    detail: Detail = Detail.OPS,
    pid: int = 0,
    phase: Phase = Phase.UNKNOWN,
    base: int | None = MODEL,
) -> Session:
    return recorder.add(target({"m.gguf": of}, pid=pid, base=base), TraceWriter(trace, name, {}), detail, phase)


def counted(recorder: Recorder, slot: int, probe: Probe, n: int, dropped: int = 0, epoch: int | None = None) -> None:
    """Count in the current epoch, as the kernel does before it reserves records."""
    tracer: FakeTracer = recorder.tracer  # type: ignore[assignment]
    cell = tracer.accounts[slot, tracer.epoch if epoch is None else epoch, probe : probe + 1]
    cell["counted"] += n
    cell["dropped"] += dropped


def flushed(recorder: Recorder) -> None:
    recorder.flush()
    recorder.wait()


def removed(recorder: Recorder, session: Session) -> None:
    recorder.remove(session)
    recorder.wait()
    assert recorder.ended() == [session]
    assert recorder.ended() == []


def files(trace: Path, table: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (rows, account) of each file of a table."""
    found = []
    for path in sorted((trace / table).glob("*.parquet")):
        meta = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
        found.append((pq.read_metadata(path).num_rows, meta["account"]))
    return found


def cell(counted: int, delivered: int, dropped: int) -> dict[str, int]:
    return {"counted": counted, "delivered": delivered, "dropped": dropped}


def test_each_file_has_the_account_of_its_rows(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    for n, dropped in ((3, 0), (5, 2)):
        counted(recorder, 0, Probe.FAULTS, n + dropped, dropped)
        tracer.ring_batches.append(events(*(event(Kind.FAULT, i, epoch=tracer.epoch, **FAULT) for i in range(n))))
        flushed(recorder)
    assert files(tmp_path, "faults") == [(3, {"faults": cell(3, 3, 0)}), (5, {"faults": cell(7, 5, 2)})]
    assert session.account == {"faults": cell(10, 8, 2)}
    assert (recorder.unsettled, recorder.events) == (0, 8)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "faults").iterdir())
    assert recorder.bytes_written == on_disk
    assert tracer.flushes >= 2, "the CPUs' runs of pages are asked for"


def test_pages_are_the_unit_of_the_page_cache_s_account(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    counted(recorder, 0, Probe.PAGECACHE, 11, 1)
    counted(recorder, 0, Probe.READS, 1)
    counted(recorder, 0, Probe.TOKENS, 2)
    counted(recorder, 0, Probe.ROUTING, 2)
    tracer.ring_batches.append(
        events(
            event(Kind.ADD, 1, **pages(0, 0, 3)),
            event(Kind.EVICT, 2, **pages(0, 0, 7)),
            event(Kind.READ, 3, **pages(0, 0, 9)),
            event(Kind.TOKEN, 4, 1, b=1 | 1 << 32, c=9),
            event(Kind.ROUTE, 5, 1, code=2),
            event(Kind.ROUTE, 5, 1, code=2, a=1),
            event(Kind.TOKEN_END, 6, 1),
        )
    )
    flushed(recorder)
    assert recorder.unsettled == 0
    assert session.account == {
        "pagecache": cell(11, 10, 1),
        "reads": cell(1, 1, 0),
        "routing": cell(2, 2, 0),
        "tokens": cell(2, 2, 0),
    }
    assert {p.name for p in tmp_path.iterdir()} == {"tensors", "pagecache", "reads", "routing", "tokens"}


def test_each_file_tells_the_time_of_its_own_rows(
    recorder: Recorder,
    tracer: FakeTracer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Over clocks that are set and machines that sleep: the interval ends there, and goes by what held before."""
    caplog.set_level("INFO")
    second = 10**9
    now = [1000 * second]
    monkeypatch.setattr(module.clock, "realtime_offset_ns", lambda: now[0])

    def record(n: int) -> None:
        counted(recorder, 0, Probe.FAULTS, n)
        tracer.ring_batches.append(events(*[event(Kind.FAULT, n, epoch=tracer.epoch, **FAULT)] * n))
        recorder.poll()
        recorder.wait()

    session = add(recorder, tmp_path)
    record(1)
    assert files(tmp_path, "faults") == [], "it is not time yet"
    for n, jump in enumerate((3600 * second, -7200 * second, second // 10), 2):
        now[0] += jump
        record(n)
        assert len(files(tmp_path, "faults")) == min(n - 1, 2), "what is small is made up for when it is time"
    now[0] += second // 10
    flushed(recorder)
    offsets = [
        (pq.read_metadata(path).num_rows, json.loads(pq.read_schema(path).metadata[METADATA_KEY])["realtime_offset_ns"])
        for path in sorted((tmp_path / "faults").iterdir())
    ]
    assert offsets == [(1 + 2, 1000 * second), (3, 4600 * second), (4, -2600 * second)]
    assert caplog.text.count("the clock was set, or the machine suspended: ") == 2
    assert "suspended: +3600.0 s" in caplog.text

    def set_meanwhile(number: int) -> Any:
        now[0] += 60 * second
        return end_epoch(number)

    end_epoch = session.end_epoch
    monkeypatch.setattr(session, "end_epoch", set_meanwhile)
    flushed(recorder)
    assert "suspended: +60.0 s" in caplog.text, "set while an interval ended"
    monkeypatch.undo()
    monkeypatch.setattr(module.clock, "realtime_offset_ns", lambda: now[0])
    removed(recorder, session)
    now[0] = 5 * second  # nobody was looking
    add(recorder, tmp_path, "t")
    recorder.wait()
    (late,) = (tmp_path / "tensors").glob("t-*")
    assert json.loads(pq.read_schema(late).metadata[METADATA_KEY])["realtime_offset_ns"] == 5 * second


def test_records_under_way_are_waited_for(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    add(recorder, tmp_path)
    counted(recorder, 0, Probe.FAULTS, 3)
    one = events(event(Kind.FAULT, 1, **FAULT))
    tracer.ring_batches += [one, one[:0], one[:0], one, one]
    flushed(recorder)
    assert files(tmp_path, "faults") == [(3, {"faults": cell(3, 3, 0)})]
    assert recorder.unsettled == 0


def test_the_next_epoch_s_records_wait_for_their_file(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    counted(recorder, 0, Probe.FAULTS, 1, epoch=0)
    mixed = events(event(Kind.FAULT, 2, epoch=1, **FAULT), event(Kind.FAULT, 1, epoch=0, **FAULT))
    tracer.ring_batches.append(mixed)
    flushed(recorder)
    assert files(tmp_path, "faults") == [(1, {"faults": cell(1, 1, 0)})]
    assert session.buffered == 1
    counted(recorder, 0, Probe.FAULTS, 1, epoch=1)
    flushed(recorder)
    assert len(files(tmp_path, "faults")) == 2
    assert session.buffered == 0


def test_epochs_go_round(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    add(recorder, tmp_path)
    for n in range(1, 2 * EPOCHS + 2):
        counted(recorder, 0, Probe.FAULTS, n)
        tracer.ring_batches.append(events(*[event(Kind.FAULT, n, epoch=tracer.epoch, **FAULT)] * n))
        flushed(recorder)
    assert [rows for rows, _ in files(tmp_path, "faults")] == list(range(1, 2 * EPOCHS + 2))
    assert recorder.unsettled == 0


def test_an_account_that_does_not_add_up_is_reported(
    recorder: Recorder, tracer: FakeTracer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(recorder, tmp_path)
    counted(recorder, 0, Probe.FAULTS, 5, 1)
    tracer.ring_batches.append(events(*[event(Kind.FAULT, 1, **FAULT)] * 3))
    flushed(recorder)
    assert recorder.unsettled == 1
    assert "does not add up yet: +1 faults" in caplog.text
    assert files(tmp_path, "faults") == [(3, {"faults": cell(5, 3, 1)})], "the file says by how much"


def test_missing_and_end_epoch(recorder: Recorder, tracer: FakeTracer) -> None:
    session = add(recorder, None)
    assert session.missing(0) == {}
    counted(recorder, 0, Probe.OPS, 4, 1)
    assert session.missing(0) == {"ops": 3}
    session.take(events(*[event(Kind.OP, 1)] * 2))
    assert session.missing(0) == {"ops": 1}
    session.take(events(event(Kind.OP, 2), event(Kind.OP, 3, epoch=1)))
    assert session.missing(0) == {}
    assert session.missing(1) == {"ops": -1}, "more than was counted is no less wrong"
    assert session.buffered == 4
    taken, account = session.end_epoch(0)
    assert taken["ts"].tolist() == [1, 1, 2]
    assert account == {"ops": cell(4, 3, 1)}
    assert session.buffered == 1
    taken, account = session.end_epoch(0)
    assert (len(taken), taken.dtype) == (0, events().dtype)
    assert account == {"ops": cell(4, 0, 1)}, "what the kernel counted is not forgotten"


def test_nothing_happened_nothing_is_written(recorder: Recorder, tmp_path: Path) -> None:
    add(recorder, tmp_path)
    flushed(recorder)
    flushed(recorder)
    assert {p.name for p in tmp_path.iterdir()} == {"tensors"}


def test_sessions_do_not_mix(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    one, two = add(recorder, tmp_path, "one", pid=1), add(recorder, tmp_path, "two", pid=2)
    assert (one.slot, two.slot) == (0, 1)
    assert (one.files, two.files) == ({("m.gguf", 0): 0}, {("m.gguf", 0): 1})
    counted(recorder, 0, Probe.FAULTS, 1)
    counted(recorder, 1, Probe.FAULTS, 2)
    batch = events(*(event(Kind.FAULT, i, slot=slot, **{**FAULT, "d": slot}) for i, slot in enumerate((1, 0, 1, 5))))
    tracer.ring_batches.append(batch)
    flushed(recorder)
    assert (one.account, two.account) == ({"faults": cell(1, 1, 0)}, {"faults": cell(2, 2, 0)})
    tables = {n: pq.read_table(tmp_path / f"faults/{n}-000000.parquet") for n in ("one", "two")}
    assert [t["timestamp"].to_pylist() for t in tables.values()] == [[1], [0, 2]]
    assert recorder.unsettled == 0


def test_poll_flushes_when_it_is_time_or_much_has_come(
    recorder: Recorder, tracer: FakeTracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(recorder, tmp_path)
    four = events(*[event(Kind.FAULT, 1, **FAULT)] * 4)
    counted(recorder, 0, Probe.FAULTS, 4)
    tracer.ring_batches.append(four)
    assert recorder.poll() == 4
    assert tracer.epoch == 0, "not yet"
    monkeypatch.setattr(module, "_BUFFERED_EVENTS", 3)
    assert recorder.poll() == 0
    assert tracer.epoch == 1
    recorder.flush_seconds = 0
    recorder.poll()
    assert tracer.epoch == 2
    recorder.wait()
    assert [rows for rows, _ in files(tmp_path, "faults")] == [4]


def test_removal_writes_what_is_left(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    counted(recorder, 0, Probe.TOKENS, 1)
    counted(recorder, 0, Probe.FAULTS, 1)
    tracer.ring_batches.append(events(event(Kind.TOKEN, 2**40, 1, b=1, c=9), event(Kind.FAULT, 2**40 + 1, 1, **FAULT)))
    removed(recorder, session)
    assert (tracer.removed, tracer.freed, recorder.sessions) == ([0], [0], {})
    tokens = pq.read_table(tmp_path / "tokens").to_pylist()
    assert [(t["token"], t["start_ns"], t["end_ns"], t["major_faults"]) for t in tokens][1:] == [(1, 2**40, None, 1)]
    assert tokens[0]["end_ns"] == 2**40
    assert files(tmp_path, "faults") == [(1, {"faults": cell(1, 1, 0)})]
    assert pq.read_table(tmp_path / "tensors").num_rows == 1


def test_a_recording_that_was_not_ended_is_told_from_one_that_was(recorder: Recorder, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    fault(recorder)
    flushed(recorder)
    (note,) = open_trace(tmp_path).notes
    assert "has not been ended" in note
    assert "up to 3600 s are missing" in note
    removed(recorder, session)
    assert open_trace(tmp_path).notes == ()


def test_close_ends_all_sessions(tracer: FakeTracer, tmp_path: Path) -> None:
    made = Recorder(tracer, 3600)  # type: ignore[arg-type]
    for n in (1, 2):
        add(made, tmp_path, f"s{n}", pid=n)
    made.close()
    assert tracer.freed == [0, 1]
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == ["s1-000000.parquet", "s2-000000.parquet"]


# --- what fails ---------------------------------------------------------------------------------------------------


def fault(recorder: Recorder, n: int = 1) -> None:
    """Let ``n`` faults happen in the current epoch."""
    tracer: FakeTracer = recorder.tracer  # type: ignore[assignment]
    counted(recorder, 0, Probe.FAULTS, n)
    tracer.ring_batches.append(events(*[event(Kind.FAULT, 1, epoch=tracer.epoch, **FAULT)] * n))


def full(*_args: object, **_options: object) -> None:
    raise LlmtracedError("cannot write: No space left on device")


def test_a_disk_that_is_full_is_counted_and_recording_goes_on(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    session = add(recorder, tmp_path)
    recorder.wait()
    for n, fails in ((3, True), (4, True), (5, False), (2, False)):
        fault(recorder, n)
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(session.writer, "write", full)
            flushed(recorder)
        assert (bool(session.write_error), recorder.paused) == (fails, fails)
    assert recorder.write_errors == 2
    assert session.account == {"faults": cell(14, 7, 7)}
    assert files(tmp_path, "faults") == [(5, {"faults": cell(12, 5, 7)}), (2, {"faults": cell(2, 2, 0)})]
    assert [r.message.partition(": ")[2] for r in caplog.records] == [
        "cannot write: No space left on device; recording pauses, metrics go on",
        "recording goes on; what was missed counts as dropped",
    ]


def test_nothing_is_tried_while_there_is_no_room(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = add(recorder, tmp_path)
    flushed(recorder)
    with monkeypatch.context() as patch:
        patch.setattr(session.writer, "write", full)
        fault(recorder)
        flushed(recorder)
    tried: list[str] = []
    real = session.writer.write
    monkeypatch.setattr(session.writer, "write", lambda name, *rest: (tried.append(name), real(name, *rest)))
    free = os.statvfs(tmp_path)
    scarce = SimpleNamespace(f_bavail=(ROOM - 1) // free.f_frsize, f_frsize=free.f_frsize)
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "statvfs", lambda _path: scarce)
        fault(recorder)
        flushed(recorder)
    assert not tried
    assert recorder.paused
    assert "bytes are free" in session.paused
    fault(recorder)
    flushed(recorder)
    assert tried == ["faults"]
    assert files(tmp_path, "faults") == [(1, {"faults": cell(3, 1, 2)})]
    assert {p.name for p in tmp_path.iterdir()} == {"tensors", "faults"}, "no trial is left"


def test_a_loss_is_told_though_nothing_of_the_kind_comes_after_it(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = add(recorder, tmp_path)
    flushed(recorder)
    with monkeypatch.context() as patch:
        patch.setattr(session.writer, "write", full)
        fault(recorder, 3)
        flushed(recorder)
    removed(recorder, session)
    assert files(tmp_path, "faults") == [(0, {"faults": cell(3, 0, 3)})]


def test_what_is_lost_twice_is_counted_once(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is carried into a file that cannot be written either."""
    session = add(recorder, tmp_path)
    flushed(recorder)
    monkeypatch.setattr(session.writer, "obstacle", lambda: "")
    with monkeypatch.context() as patch:
        patch.setattr(session.writer, "write", full)
        for n in (1, 2):
            fault(recorder, n)
            flushed(recorder)
    assert session.account == {"faults": cell(3, 0, 3)}
    flushed(recorder)
    removed(recorder, session)
    assert session.account == {"faults": cell(3, 0, 3)}
    assert [account for _, account in files(tmp_path, "faults")] == [{"faults": cell(3, 0, 3)}]


def test_a_disk_that_hangs_stops_nobody_but_the_writer(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that wait are bounded, what is too much is lost and counted, and sessions come and go."""
    one = 1000
    monkeypatch.setattr(module, "_QUEUED_BYTES", 2 * one * 64)
    session = add(recorder, tmp_path, pid=7)
    flushed(recorder)
    going = threading.Event()
    real = session.writer.write
    monkeypatch.setattr(session.writer, "write", lambda *args: (going.wait(30), real(*args)))
    for _ in range(9):
        fault(recorder, one)
        recorder.flush()
    assert recorder._queued == 3 * one * 64
    assert recorder.paused
    other = add(recorder, tmp_path, "other", pid=8)
    recorder.remove(session)
    assert recorder.ended() == []
    assert recorder.sessions == {other.slot: other}
    going.set()
    recorder.wait()
    assert recorder.ended() == [session]
    assert recorder._queued == 0
    assert [rows for rows, _ in files(tmp_path, "faults")] == [one] * 3
    sums = [account["faults"] for _, account in files(tmp_path, "faults")]
    assert all(c["counted"] == c["delivered"] + c["dropped"] for c in sums)
    assert sum(c["counted"] for c in sums) == 9 * one
    assert session.account == {"faults": cell(9 * one, 3 * one, 6 * one)}
    assert caplog.text.count("the disk does not keep up; recording pauses") == 1


def test_tensors_are_written_when_there_is_room_again(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "write", full)
        session = add(recorder, tmp_path)
        recorder.wait()
    assert not session.described
    assert recorder.write_errors == 1
    fault(recorder)
    flushed(recorder)
    assert session.described
    assert len(list((tmp_path / "tensors").iterdir())) == 1


def test_one_table_that_cannot_be_written_is_an_error_though_another_can(
    recorder: Recorder, tracer: FakeTracer, tmp_path: Path
) -> None:
    session = add(recorder, tmp_path)
    (tmp_path / "faults").write_text("in the way")
    counted(recorder, 0, Probe.FAULTS, 1)
    counted(recorder, 0, Probe.READS, 1)
    tracer.ring_batches.append(events(event(Kind.FAULT, 1, **FAULT), event(Kind.READ, 1, **pages(0, 0, 1))))
    flushed(recorder)
    assert recorder.write_errors == 1
    assert session.write_error


def test_a_mistake_in_one_interval_does_not_end_the_writer(
    recorder: Recorder, tracer: FakeTracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = add(recorder, tmp_path)
    for fails in (True, False):
        counted(recorder, 0, Probe.FAULTS, 1)
        tracer.ring_batches.append(events(event(Kind.FAULT, 1, epoch=tracer.epoch, **FAULT)))
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(session.rows, "faults", lambda _events: 1 // 0)
            flushed(recorder)
    assert files(tmp_path, "faults") == [(1, {"faults": cell(2, 1, 1)})]


def test_a_process_that_cannot_be_traced_takes_no_slot(
    recorder: Recorder, tracer: FakeTracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_args: object) -> None:
        raise LlmtracedError("no room for 9 more extents")

    monkeypatch.setattr(tracer, "add_file", no_room)
    with pytest.raises(LlmtracedError, match="no room"):
        add(recorder, None)
    assert (tracer.removed, tracer.freed) == ([0], [0])


def test_a_model_that_finds_no_room_later_leaves_the_others(
    recorder: Recorder, tracer: FakeTracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = add(recorder, None)
    shards = model([tensor("b", 0, 100), tensor("c", 0, 100, shard=1)], 2, "large.gguf")
    more = target({"m.gguf": SIMPLE, "large.gguf": shards, "small.gguf": SIMPLE}, base=MODEL)
    real, free = tracer.add_file, iter((True, False, True))

    def add_file(*args: Any) -> None:
        if not next(free):
            raise LlmtracedError("no room for 9 more extents")
        real(*args)

    monkeypatch.setattr(tracer, "add_file", add_file)
    monkeypatch.setattr(session_module, "scan", lambda _pids: [more])
    for text in (b"one", b"two"):
        monkeypatch.setattr(session_module, "maps_text", lambda _pid, text=text: text)
        session.refresh()
    assert set(session.models) == {"m.gguf", "small.gguf"}
    assert tracer.files_removed == [1]
    assert len(tracer.window[0]) == 2
    assert session.problems == ["no room for 9 more extents"]
    assert caplog.text.count("no room") == 1


def test_a_library_that_is_only_asked_is_not_hooked(
    recorder: Recorder, tracer: FakeTracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp loads a library for each kind of processor, one after the other, and keeps the best."""
    x64, zen4 = ({"ggml_graph_compute": Symbol(f"/lib/libggml-cpu-{name}.so", 64)} for name in ("x64", "zen4"))
    now: dict[str, Symbol] = {}

    def look(symbols: dict[str, Symbol], *, stays: bool) -> None:
        monkeypatch.setattr(Target, "has", lambda _self, symbol: stays and symbol == symbols["ggml_graph_compute"])
        now.clear()
        now.update(symbols)
        session.refresh()

    def scan(_pids: object) -> list[Target]:
        made = target({"m.gguf": SIMPLE}, base=None)
        made.symbols = dict(now)  # type: ignore[misc]
        return [made]

    texts = iter(range(99))
    monkeypatch.setattr(session_module, "scan", scan)
    monkeypatch.setattr(session_module, "maps_text", lambda _pid: b"%d" % next(texts))
    session = add(recorder, None, phase=Phase.LOAD, base=None)
    look(x64, stays=False)
    assert not tracer.hooked
    look(zen4, stays=True)
    assert tracer.hooked == {0: zen4}
    look(x64, stays=False)
    assert tracer.hooked == {0: zen4}
    look(x64, stays=True)
    assert tracer.hooked == {0: x64}


def test_a_file_name_that_is_not_utf8(recorder: Recorder, tmp_path: Path, small_model: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.symlink_to(small_model)
    found = from_arguments(os.getpid(), ["llama-server", "-m", str(path)])
    assert found is not None
    recorder.add(found, TraceWriter(tmp_path / "trace", "s", {}), Detail.FAULTS, Phase.UNKNOWN)
    recorder.wait()
    assert set(pq.read_table(tmp_path / "trace" / "tensors")["model"].to_pylist()) == {"\\udcff.gguf"}


# --- graphs -------------------------------------------------------------------------------------------------------

MOE = model(
    [
        tensor(name, PLACES[name] - MODEL, 64, experts=shape[2] if len(shape) == 3 else 0, shape=shape)
        for name, shape in SHAPES.items()
    ]
)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr(session_module, "memory_reader", lambda _pid: made.read)
    return made


def mark(graph: int, token: int, nodes: int = 0, epoch: int = 0) -> dict[str, Any]:
    return event(Kind.TOKEN, token * 100, token, a=graph, b=0, c=nodes, epoch=epoch)


def test_a_graph_gives_layout_weights_and_sizes(
    recorder: Recorder, tracer: FakeTracer, memory: Memory, tmp_path: Path
) -> None:
    session = add(recorder, tmp_path, of=MOE)
    graph = moe(memory, rows=7)
    tracer.slots["token"][session.slot] = 1
    q = memory.arena.index(b"blk.1.attn_q.weight\0") - memory.offsets.name + ARENA
    counted(recorder, 0, Probe.TOKENS, 1)
    counted(recorder, 0, Probe.OPS, 2)
    operators = [event(Kind.OP, 150, 1, a=q, b=0, c=5, d=29), event(Kind.OP, 160, 1, a=1, b=q, c=5, d=31)]
    tracer.ring_batches.append(events(mark(graph, 1), *operators))
    removed(recorder, session)
    slot = tracer.slots[0]
    assert (slot["layout"], slot["tensor_name"], slot["op_mul_mat"], slot["op_mul_mat_id"]) == (1, 256, 29, 30)
    ops = pq.read_table(tmp_path / "ops").to_pylist()
    assert [(o["tensor_name"], o["data_ptr"]) for o in ops] == [
        ("blk.1.attn_q.weight", PLACES["blk.1.attn_q.weight"]),
        ("blk.1.attn_q.weight", PLACES["blk.1.attn_q.weight"]),
    ]
    assert [o["op"] for o in ops] == ["mul_mat", "op_31"]
    tokens = pq.read_table(tmp_path / "tokens").to_pylist()
    assert (tokens[1]["n_tokens"], tokens[1]["n_outputs"], tokens[1]["graph_nodes"]) == (7, 1, 20)
    assert tokens[1]["model"] == session.target.files[0].label
    tensors = pq.read_table(tmp_path / "tensors").to_pylist()
    assert {t["backed"] for t in tensors} == {True}
    assert [t["tensor_name"] for t in tensors] == list(SHAPES)
    assert [(t["n_experts"], t["expert_bytes"]) for t in tensors if t["n_experts"]] == [(8, 8)] * 3
    assert not session.problems


DENSE = model([t for t in MOE.tensors if not t.n_experts])
REPACKED = {n: 0x7D00_0000_0000 + i * 4096 for i, n in enumerate(SHAPES) if "attn_q" in n}


def test_weights_that_are_computed_with_from_elsewhere(recorder: Recorder, memory: Memory, tmp_path: Path) -> None:
    session = add(recorder, tmp_path, of=MOE)
    session.take(events(mark(moe(memory, REPACKED), 1)))
    session.write_tensors()
    backed = {t["tensor_name"]: t["backed"] for t in pq.read_table(tmp_path / "tensors").to_pylist()}
    assert {n for n, b in backed.items() if b is False} == set(REPACKED)
    assert all(b is True for n, b in backed.items() if n not in REPACKED)


def test_a_graph_of_a_known_kind_is_not_read_again(recorder: Recorder, memory: Memory) -> None:
    session = add(recorder, None, of=MOE)
    graph = moe(memory)
    session.take(events(mark(graph, 1)))
    first = session.graph
    session.take(events(mark(graph, 2, nodes=20)))
    assert session.graph is first
    session.take(events(mark(graph, 3, nodes=21)))
    assert session.graph is not first


def test_graphs_at_other_addresses_are_looked_at_for_themselves(
    recorder: Recorder, memory: Memory, tmp_path: Path
) -> None:
    """A model and its draft may have as many nodes as each other, and come in one batch of records."""
    session = add(recorder, tmp_path, of=MOE)
    first, second = moe(memory), moe(memory, REPACKED)
    session.take(events(mark(first, 1)))
    assert not session.unbacked
    session.take(events(mark(second, 2, nodes=20), mark(first, 3, nodes=20)))
    assert {session.resolver.names[n] for n in session.unbacked} == set(REPACKED)


def test_a_batch_size_is_not_taken_from_a_later_graph(
    recorder: Recorder, tracer: FakeTracer, memory: Memory, tmp_path: Path
) -> None:
    session = add(recorder, tmp_path, of=MOE)
    tracer.slots["token"][session.slot] = 2  # the server went on while the first graph was looked at
    counted(recorder, 0, Probe.TOKENS, 1)
    tracer.ring_batches.append(events(mark(moe(memory, rows=7), 1)))
    removed(recorder, session)
    first = pq.read_table(tmp_path / "tokens").to_pylist()[1]
    assert (first["n_tokens"], first["n_outputs"], first["model"]) == (None, None, "m.gguf")


def test_weights_of_a_file_that_is_not_known_are_told_of_once(
    recorder: Recorder, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    session = add(recorder, None, of=model([t for t in MOE.tensors if t.name != "output.weight"]))
    for token, rows in ((1, 1), (2, 7)):
        session.take(events(mark(moe(memory, rows=rows), token, nodes=rows)))
    assert len(session.problems) == 1
    assert (
        "weights of a file that is neither mapped nor named on the command line, such as output.weight" in caplog.text
    )
    assert caplog.text.count("output.weight") == 1


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        ((Kind.OP, Kind.ROUTE), []),
        ((Kind.OP,), ["the experts chosen are not recorded"]),
        ((), ["operators are not recorded", "the experts chosen are not recorded"]),
    ],
)
def test_hooks_that_are_never_called_are_a_problem(
    recorder: Recorder, memory: Memory, heard: tuple[Kind, ...], said: list[str]
) -> None:
    session = add(recorder, None, of=MOE)
    session.take(events(mark(moe(memory), 1)))
    for token in range(1, 100):
        session.take(events(*(event(kind, token) for kind in heard), event(Kind.TOKEN_END, token, token)))
        assert token > 30 or not session.problems
    assert [problem.split(":")[0] for problem in session.problems] == said


def test_what_is_no_graph_is_a_problem_after_some_tries(
    recorder: Recorder, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    session = add(recorder, None, of=MOE)
    memory.put(bytes(512))
    for token in range(1, 20):
        session.take(events(mark(ARENA + 32, token)))
    assert len(session.problems) == 1
    assert session.problems[0].startswith("cannot read this build's compute graph: no graph at its address")
    assert session.problems[0].endswith("tokens have no batch size, operators and experts are not recorded")
    assert caplog.text.count("no graph at its address") == 1
    assert tracer_slots(session)["layout"] == 0


def tracer_slots(session: Session) -> Any:
    return session.tracer.slots[session.slot]


def test_what_cannot_be_attached_is_a_problem_once(recorder: Recorder, tracer: FakeTracer) -> None:
    tracer.lost = ["uprobe ggml_graph_compute: this build has no such symbol; tokens"]
    session = add(recorder, None)
    session.set_detail(Detail.FULL)
    assert session.problems == tracer.lost
    assert tracer.detail[0] == Detail.FULL
    tracer.lost = []
    session.set_detail(Detail.FAULTS)
    assert session.problems == []


def test_the_kernel_is_told_where_the_files_are(recorder: Recorder, tracer: FakeTracer) -> None:
    two = model([tensor("a", 0, 100), tensor("b", 0, 9000, shard=1)], 2)
    session = add(recorder, None, of=two)
    assert session.files == {("m.gguf", 0): 0, ("m.gguf", 1): 1}
    assert tracer.window[0] == [
        (MODEL, MODEL + PAGE, 0, 0),
        (MODEL + 2 * PAGE, MODEL + 5 * PAGE, 0, 1),
    ]
    assert np.concatenate([tracer.extents[n].byte_tensor for n in (0, 1)]).tolist() == [0, -1, 1, -1]
    for number in (0, 1):
        kernel, ours = tracer.extents[number], session.resolver.extents(number)
        assert kernel.byte_starts.tolist() == ours.byte_starts.tolist()
        assert kernel.page_starts.tolist() == ours.page_starts.tolist()


def test_tables_of_a_session_have_their_schemas(recorder: Recorder, tracer: FakeTracer, tmp_path: Path) -> None:
    session = add(recorder, tmp_path)
    rows = [event(kind, 9, token=1, **pages(0, 0, 1)) for kind in Kind if kind not in (Kind.FAULT, Kind.ROUTE)]
    rows += [event(Kind.FAULT, 9, 1, **FAULT), event(Kind.ROUTE, 9, 1, code=1)]
    tracer.ring_batches.append(events(*rows))
    removed(recorder, session)
    found = {path.name: pq.read_schema(next(path.iterdir())).remove_metadata() for path in tmp_path.iterdir()}
    assert found == {name: schema for name, schema in TABLES.items() if name != "router_scores"}, "from its own probe"
