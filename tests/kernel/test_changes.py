"""What changes under a daemon that runs: models and programs on disk, processes' numbers, names meant to confuse."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from helpers import need, wait_until
from running import Daemon, MadeUp, accounts, build, sums

from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.capture import Capture
from llmtraced.description import session_metadata, session_name
from llmtraced.metrics import tensor_totals
from llmtraced.probes.tracer import Tracer
from llmtraced.recorder import Recorder
from llmtraced.schema import Detail, Phase
from llmtraced.store import TraceWriter
from llmtraced.target import find_target

pytestmark = pytest.mark.kernel

FAULTS = "llmtraced_tensor_faults_total"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("program") / "made-up-llama")


@pytest.fixture
def model(tmp_path: Path, small_model: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copy(small_model, tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all: whatever one test does must not harm the next."""
    folder = tmp_path_factory.mktemp("daemon")
    with Daemon(folder / "trace", folder / "daemon.log") as running:
        yield running


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    tracer = Tracer()
    made = Recorder(tracer, flush_seconds=60)
    yield made
    made.close()
    tracer.close()


def faults(daemon: Daemon, server: MadeUp) -> float:
    return daemon.total(FAULTS, pid=str(server.pid))


def counts(daemon: Daemon, server: MadeUp) -> bool:
    """Tell whether the server's faults are seen."""
    before = faults(daemon, server)
    assert server.do("t")
    return faults(daemon, server) > before


def test_a_model_that_is_replaced_stays_the_one_that_is_mapped(
    daemon: Daemon, program: Path, model: Path, tmp_path: Path
) -> None:
    with MadeUp(program, model) as old:
        daemon.found(old.pid)
        assert counts(daemon, old)
        models.write(tmp_path / "new.gguf", models.TINY_DENSE)
        (tmp_path / "new.gguf").replace(model)
        with MadeUp(program, model) as new:  # another file by the same name
            daemon.found(new.pid)
            assert counts(daemon, old)
            assert counts(daemon, new)
            size = {p: daemon.total("llmtraced_model_bytes", pid=str(p)) for p in (old.pid, new.pid)}
            assert size[new.pid] < size[old.pid]
    wait_until(lambda: daemon.said("end", pid=old.pid) and daemon.said("end", pid=new.pid), 20, "both have ended")


def test_a_model_that_is_cut_short_while_mapped_kills_none_but_its_server(
    daemon: Daemon, program: Path, model: Path
) -> None:
    with MadeUp(program, model) as server:
        daemon.found(server.pid)
        assert counts(daemon, server)
        os.truncate(model, model.stat().st_size // 3)
        time.sleep(1.5)  # it is looked at again each second
        assert server.do("g")
        assert daemon.process.poll() is None
        with MadeUp(program, model) as late:  # mapped, but no model any more
            assert late.do("g")
        assert not server.do("t")
        assert server.child.wait(10) < 0  # SIGBUS: nothing that we could do
        wait_until(lambda: daemon.said("end", pid=server.pid), 20, "its end is seen")
    assert "Traceback" not in daemon.log.read_text()


def test_a_program_that_is_replaced_on_disk_is_traced_as_it_runs(
    daemon: Daemon, model: Path, tmp_path: Path, program: Path
) -> None:
    own = Path(shutil.copy(program, tmp_path / "replaced-llama"))
    with MadeUp(own, model) as server:
        own.unlink()
        own.write_text("no program at all")
        daemon.found(server.pid)
        for _ in range(7):
            assert server.do("g")
        wait_until(lambda: daemon.total("llmtraced_graphs_total", pid=str(server.pid)) == 7, 20, "graphs are seen")


def test_a_child_s_faults_are_not_its_parent_s(daemon: Daemon, program: Path, model: Path) -> None:
    with MadeUp(program, model) as server:
        daemon.found(server.pid)
        assert counts(daemon, server)
        before = faults(daemon, server)
        assert server.do("f")
        assert faults(daemon, server) == before
        assert counts(daemon, server)


def test_a_number_that_is_used_again_is_another_process(daemon: Daemon, program: Path, model: Path) -> None:
    knob = Path("/proc/sys/kernel/ns_last_pid")
    need(knob.exists(), "needs CONFIG_CHECKPOINT_RESTORE")
    for _ in range(100):  # others start processes, too
        with MadeUp(program, model) as first:
            daemon.found(first.pid)
            assert counts(daemon, first)
        knob.write_text(str(first.pid - 1))
        with MadeUp(program, model) as second:
            if second.pid != first.pid:
                continue
            wait_until(lambda: len(daemon.said("begin", pid=first.pid)) == 2, 20, "the second one is found")
            assert faults(daemon, second) < 1000  # none of the first one's
            assert counts(daemon, second)
            break
    else:
        pytest.fail("no number could be used again")
    wait_until(lambda: len(daemon.said("end", pid=first.pid)) == 2, 20, "both have ended")
    one, two = (e["session"] for e in daemon.said("end", pid=first.pid))
    assert one != two
    assert {one, two} <= set(open_trace(daemon.trace).sessions)


@pytest.fixture
def on_cpu_1(program: Path, small_model: Path, tmp_path: Path) -> Iterator[tuple[Path, Daemon, MadeUp]]:
    """The switch of the second CPU, which is on again afterwards, and a daemon that sees a server on that CPU."""
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    need(switch.exists(), "needs a second CPU that can be taken offline")
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log") as daemon, MadeUp(program, small_model) as server:
        daemon.found(server.pid)
        os.sched_setaffinity(server.pid, {1})
        assert counts(daemon, server)
        try:
            yield switch, daemon, server
        finally:
            switch.write_text("1")


def test_a_cpu_that_goes_offline_and_comes_back(on_cpu_1: tuple[Path, Daemon, MadeUp]) -> None:
    """What perf attached to a CPU ends with it: faults there must be seen again when it is back."""
    switch, daemon, server = on_cpu_1
    switch.write_text("0")
    assert counts(daemon, server), "on the one that is left"
    wait_until(lambda: "CPU 1 has gone offline" in daemon.log.read_text(), 20, "it is seen to go")
    switch.write_text("1")
    wait_until(lambda: "CPU 1 has come online" in daemon.log.read_text(), 20, "it is seen to come")
    os.sched_setaffinity(server.pid, {1})
    for _ in range(3):
        assert counts(daemon, server)
    seen = faults(daemon, server)
    daemon.end()
    found = sums(accounts(daemon.trace, "faults", server.pid))
    assert found == {"counted": seen, "delivered": seen, "dropped": 0}
    (end,) = daemon.said("end", pid=server.pid)
    rows = open_trace(daemon.trace, end["session"]).table("faults").collect()
    assert rows["major"].null_count() == 0, "each has an end"


def test_a_graph_that_begins_as_its_process_is_removed(
    recorder: Recorder, program: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is taken when nothing is attached any more; what the process has in memory has changed just then."""
    with MadeUp(program, small_model) as server:
        target = find_target(server.pid)
        writer = TraceWriter(tmp_path / "trace", session_name(target), session_metadata(target, Detail.FAULTS))
        session = recorder.add(target, writer, Detail.FAULTS, Phase.UNKNOWN)
        assert session.clocked
        remove = session.detach

        def at_the_last_moment() -> None:
            monkeypatch.setattr(session, "_maps", b"others")
            monkeypatch.setattr(session, "_hooked", {})
            assert server.do("g")
            remove()

        monkeypatch.setattr(session, "detach", at_the_last_moment)
        recorder.remove(session)
    recorder.wait()
    assert session.account["tokens"]["counted"] == session.account["tokens"]["delivered"] > 0


def test_what_ends_while_it_is_looked_at_is_not_judged(
    recorder: Recorder, program: Path, small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its symbols cannot be read any more: that its build has none would be untrue."""
    with MadeUp(program, small_model) as server:
        target = find_target(server.pid)
    assert not target.symbols
    session = recorder.add(target, TraceWriter(None, session_name(target), {}), Detail.FAULTS, Phase.UNKNOWN)
    recorder.remove(session)
    assert "no such symbol" not in caplog.text
    assert not session.problems


def test_a_cpu_was_not_away_because_there_was_nothing_to_trace(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer()
    for _ in range(2):
        slot = tracer.add_process(os.getpid(), Phase.UNKNOWN)
        time.sleep(0.1)
        tracer.follow_cpus()
        tracer.remove_process(slot)
        tracer.free(slot)
    tracer.close()
    assert "offline" not in caplog.text


def test_a_cpu_that_was_away_while_the_daemon_did_not_look(on_cpu_1: tuple[Path, Daemon, MadeUp]) -> None:
    """As all but the first are while the machine is suspended: at each look it is online."""
    switch, daemon, server = on_cpu_1
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        switch.write_text("0")
        switch.write_text("1")
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    os.sched_setaffinity(server.pid, {1})
    wait_until(lambda: "CPU 1 has come online" in daemon.log.read_text(), 20, "it is seen to have been away")
    assert counts(daemon, server)
    assert "CPU 0 has" not in daemon.log.read_text()


def test_old_traces_are_deleted_at_the_start(tmp_path: Path) -> None:
    old = tmp_path / "trace" / "faults" / "host=h" / "model=m" / "date=2020-01-01" / "s-1-000000.parquet"
    recorded = tmp_path / "trace" / "faults" / "s-1-000000.parquet"
    for path in (old, recorded):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    with Daemon(tmp_path / "trace", tmp_path / "daemon.log", "--keep-age", "7d"):
        wait_until(lambda: not old.parent.exists(), 20, "it is gone")
    assert recorded.exists(), "what was recorded by hand stays"


HOSTILE = "\x1b]0;owned\x07\n\"'\\{}=, \u202e"


def test_names_that_are_meant_to_confuse(daemon: Daemon, program: Path, small_model: Path, tmp_path: Path) -> None:
    """Paths, process names and model names with newlines, quotes, escapes and `` (deleted)``: text, and no more."""
    folder = tmp_path / f"f{HOSTILE}\\012 (deleted)"
    folder.mkdir()
    model = Path(shutil.copy(small_model, folder / f"m{HOSTILE} (deleted)"))
    own = Path(shutil.copy(program, folder / f"llama{HOSTILE}"))
    with MadeUp(own, model, "c\n\x1b[2J) R 1 1") as server:  # /proc/PID/stat has this in brackets
        daemon.found(server.pid)
        assert counts(daemon, server)
        labels = [labels for name, labels, _ in daemon.samples() if labels.get("pid") == str(server.pid)]
        # The kernel says (deleted) itself, so that the name ends before it.
        assert {label["model"] for label in labels if "model" in label} == {"m\\x1b]0;owned\\x07\\n\"'\\{}=, \\u202e"}
    wait_until(lambda: daemon.said("end", pid=server.pid), 20, "its end is seen")
    text = daemon.log.read_text()
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert all(line.startswith("llmtraced: ") for line in text.splitlines())
    found = sums(accounts(daemon.trace, "faults", server.pid))
    assert found["counted"] == found["delivered"] > 0
    (end,) = daemon.said("end", pid=server.pid)
    trace = open_trace(daemon.trace, end["session"])
    assert trace.table("faults").select(pl.len()).collect().item() == found["delivered"]


def test_totals_only_is_exact_and_every_record_that_is_spared_is_counted(
    program: Path, small_model: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.FAULTS, flush_seconds=60)
    with MadeUp(program, small_model) as server:
        session = capture.attach(server.pid)
        told = []
        for detail in (Detail.FAULTS, Detail.TOTALS, Detail.FAULTS):
            capture.recorder.flush()
            session.set_detail(detail)
            assert server.do("t")
            assert server.do("g")
            capture.step()
            capture.recorder.flush()
            capture.recorder.wait()
            now = tensor_totals(session)
            told.append((int(now.minor.sum() + now.major.sum()), dict(session.account["faults"])))
        capture.close()
    (first, a), (second, b), (third, c) = told
    assert a == {"counted": first, "delivered": first, "dropped": 0}
    assert second > first
    assert b == {"counted": second, "delivered": first, "dropped": second - first}
    assert c == {"counted": third, "delivered": first + third - second, "dropped": second - first}
    found = accounts(trace, "faults", server.pid)
    assert sums(found) == c
    assert sums(accounts(trace, "tokens", server.pid))["dropped"] == 0
    assert session.account["tokens"] == {"counted": 6, "delivered": 6, "dropped": 0}
