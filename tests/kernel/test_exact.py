"""A workload whose faults are known beforehand comes out exactly: by address, by tensor, in bytes, ten times of ten."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from llmtraced import elf
from llmtraced import target as targets
from llmtraced.bench import models
from llmtraced.bench.pressure import MemoryCgroup, ReadAhead, drop_cache, resident_bytes
from llmtraced.bench.touch import Touch, choose_offsets
from llmtraced.capture import Capture
from llmtraced.description import session_metadata, session_name
from llmtraced.gguf_map import read_model
from llmtraced.metrics import tensor_totals
from llmtraced.probes import kernel
from llmtraced.probes.tracer import Tracer
from llmtraced.recorder import Recorder
from llmtraced.schema import PAGE, Detail, Phase
from llmtraced.session import Session
from llmtraced.store import TraceWriter

pytestmark = pytest.mark.kernel

COUNT = 997  # prime: a count that is off by a factor or a batch size cannot come out right by chance


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 24 MB with large tensors, and norms of which several share a page."""
    return models.write(tmp_path_factory.mktemp("models") / "exact.gguf", models.dense_preset(24_000_000))


def table(trace: Path, name: str) -> pl.DataFrame:
    files = sorted((trace / name).glob("*.parquet"))
    return pl.concat([pl.read_parquet(f) for f in files]) if files else pl.DataFrame()


def accounts(trace: Path, name: str) -> list[dict[str, int]]:
    found = []
    for file in sorted((trace / name).glob("*.parquet")):
        metadata = json.loads(pq.read_schema(file).metadata[b"llmtraced"])
        found += [metadata["account"][name]] if name in metadata["account"] else []
    return found


def owners(model: Path, page: int) -> dict[str | None, int]:
    """Return the bytes of each tensor in a page of the file, by brute force; None for what is no tensor's."""
    shares: Counter[str | None] = Counter()
    for tensor in read_model(model).tensors:
        overlap = min(tensor.offset + tensor.size, (page + 1) * PAGE) - max(tensor.offset, page * PAGE)
        if overlap > 0:
            shares[tensor.name] += overlap
    if sum(shares.values()) < PAGE:
        shares[None] += PAGE - sum(shares.values())
    return shares


def offsets_with_straddles(model: Path, seed: int) -> list[int]:
    """Return COUNT offsets in different pages, among them pages with several tensors in them."""
    data = read_model(model)
    size = model.stat().st_size
    straddling = {t.offset // PAGE for t in data.tensors if t.offset % PAGE} - {0}
    chosen = {page: page * PAGE + 100 for page in sorted(straddling)[:50]}
    assert len(chosen) >= 10, "the model has no pages with several tensors in them"
    for offset in choose_offsets(size - PAGE, COUNT, seed=seed):
        if len(chosen) == COUNT:
            break
        chosen.setdefault(offset // PAGE, offset)
    assert len(chosen) == COUNT
    values = list(chosen.values())
    np.random.default_rng(seed).shuffle(values)
    return values


@pytest.mark.parametrize("attempt", range(10))
def test_major_faults_and_adds_are_exact_ten_times_of_ten(model: Path, attempt: int, tmp_path: Path) -> None:
    tensors = read_model(model).tensors
    trace = tmp_path / "trace"
    wanted = offsets_with_straddles(model, attempt)
    assert drop_cache(model) == 0
    capture = Capture(trace, Detail.FAULTS, flush_seconds=60)
    with Touch(model, wanted) as touch:
        session = capture.attach(touch.ready["pid"])
        session.refresh()  # its first look again reads the model's header; later ones only if the process maps more
        assert drop_cache(model) == 0  # what finding the target has read
        before = totals(capture)
        done = touch.go()
        capture.step()
        after = totals(capture)
    account = capture.close()["account"]
    base = touch.ready["address"]

    faults = table(trace, "faults")
    assert done["majflt"] == COUNT
    assert sorted(faults["address"].to_list()) == sorted(base + o for o in wanted)
    assert sorted(faults["offset_bytes"].to_list()) == sorted(wanted)
    assert faults["major"].to_list() == [True] * COUNT
    assert faults["latency_ns"].null_count() == 0
    assert faults["latency_ns"].min() > 0
    by_tensor = Counter(next((t.name for t in tensors if t.offset <= o < t.offset + t.size), None) for o in wanted)
    assert Counter(faults["tensor_name"].to_list()) == by_tensor

    adds = table(trace, "pagecache").filter(
        (pl.col("action") == "add")
        & (pl.col("timestamp") >= done["start_ns"])
        & (pl.col("timestamp") <= done["end_ns"])
    )
    assert adds["bytes"].sum() == COUNT * PAGE == done["read_bytes"]
    assert set(adds["cause"].to_list()) == {"fault"}
    assert set(adds["pid"].to_list()) == {touch.ready["pid"]}
    shares: Counter[str | None] = Counter()
    for offset in wanted:
        shares.update(owners(model, offset // PAGE))
    measured = dict(adds.group_by("tensor_name").agg(pl.col("bytes").sum()).iter_rows())
    assert {k: v for k, v in measured.items() if v} == {k: v for k, v in shares.items() if v}

    # The kernel's own totals (what Prometheus gets) say the same as the event stream.
    assert after["major"] - before["major"] == COUNT
    assert after["minor"] - before["minor"] == 0
    assert after["pages"] - before["pages"] == COUNT

    for name in ("faults", "pagecache"):
        assert account[name]["dropped"] == 0
        for cell in accounts(trace, name):
            assert cell["counted"] == cell["delivered"] + cell["dropped"]
    assert account["faults"]["counted"] == COUNT
    assert not session.write_error


def test_the_cgroup_counts_the_same(model: Path, tmp_path: Path) -> None:
    """Inside a memory cgroup too small for the model: its counters, the process's and ours agree."""
    wanted = offsets_with_straddles(model, 5)
    drop_cache(model)
    capture = Capture(tmp_path / "trace", Detail.FAULTS, flush_seconds=60)
    with (
        MemoryCgroup(f"llmtraced-exact-{os.getpid()}", 64 << 20) as cgroup,
        Touch(model, wanted, wrap=cgroup.enter_command) as touch,
    ):
        capture.attach(touch.ready["pid"])
        drop_cache(model)
        before = cgroup.stat()
        done = touch.go()
        after = cgroup.stat()
        capture.step()
    account = capture.close()["account"]["faults"]
    ours = table(tmp_path / "trace", "faults")
    assert ours["major"].sum() == done["majflt"] == after["pgmajfault"] - before["pgmajfault"] == COUNT
    assert account["counted"] == done["majflt"] + done["minflt"] == after["pgfault"] - before["pgfault"]


def totals(capture: Capture) -> dict[str, int]:
    assert capture.session is not None
    (file,) = capture.session.files.values()
    capture.tracer.flush()
    by_byte, by_page = capture.tracer.counters(file)
    return {
        "major": int(by_byte["major"].sum()),
        "minor": int(by_byte["minor"].sum()),
        "pages": int(by_page["added"].sum()),
        "again": int(by_page["again"].sum()),
        "evicted": int(by_page["evicted"].sum()),
    }


def test_reading_again_is_told_from_reading_once(model: Path, tmp_path: Path) -> None:
    wanted = offsets_with_straddles(model, 77)
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.FAULTS, flush_seconds=60)
    for _ in range(3):
        drop_cache(model)
        with Touch(model, wanted) as touch:
            if capture.session is None:
                capture.attach(touch.ready["pid"])
                drop_cache(model)
                before = totals(capture)
            touch.go()
        drop_cache(model)
    after = totals(capture)
    capture.close()
    # The second and third process are not the traced one, but what they read of its model is counted all the same.
    assert after["pages"] - before["pages"] == 3 * COUNT
    assert after["again"] - before["again"] == 2 * COUNT
    assert after["evicted"] - before["evicted"] == 3 * COUNT


def test_causes_are_told_apart(model: Path, tmp_path: Path) -> None:
    """Readahead by a fault, reads by another process, and a prefetcher's calls each carry their cause."""
    trace = tmp_path / "trace"
    drop_cache(model)
    capture = Capture(trace, Detail.FAULTS, flush_seconds=60)
    with ReadAhead(model, 128), Touch(model, [8 * 1024 * 1024], "--readahead") as touch:
        capture.attach(touch.ready["pid"])
        drop_cache(model)
        touched = touch.go()
        capture.step()
        drop_cache(model)
        with model.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            read = os.pread(stream.fileno(), 5 * PAGE, 4 * PAGE)
            drop_cache(model)
            os.posix_fadvise(stream.fileno(), 0, 7 * PAGE, os.POSIX_FADV_WILLNEED)
            time.sleep(0.2)  # where there is no cachestat, only what has been read counts
            before = resident_bytes(model)
            with contextlib.suppress(BlockingIOError):  # it asks for the pages, and does not wait for them
                os.preadv(stream.fileno(), [bytearray(3 * PAGE)], 900 * PAGE, os.RWF_NOWAIT)
            time.sleep(0.2)
            came = resident_bytes(model) - before
        capture.step()
    capture.close()
    assert len(read) == 5 * PAGE
    adds = table(trace, "pagecache").filter(pl.col("action") == "add")
    mine = adds.filter(
        (pl.col("pid") == touch.ready["pid"])
        & (pl.col("timestamp") >= touched["start_ns"])
        & (pl.col("timestamp") <= touched["end_ns"])
    )
    assert mine.filter(pl.col("cause") == "fault")["bytes"].sum() == PAGE
    assert mine.filter(pl.col("cause") == "readahead")["bytes"].sum() == touched["read_bytes"] - PAGE > 0
    others = adds.filter((pl.col("pid") != touch.ready["pid"]) & (pl.col("timestamp") > touched["end_ns"]))
    assert others.filter(pl.col("cause") == "read")["bytes"].sum() == 5 * PAGE
    asked = others.filter(pl.col("cause") == "prefetcher")
    assert asked.filter(pl.col("offset_bytes") < 899 * PAGE)["bytes"].sum() >= 7 * PAGE
    assert came in (0, 3 * PAGE)  # on older kernels (6.1) such a read does not begin anything
    assert asked.filter(pl.col("offset_bytes") >= 899 * PAGE)["bytes"].sum() == came
    reads = table(trace, "reads").filter(pl.col("timestamp") > touched["end_ns"])
    assert reads["bytes"].sum() == 5 * PAGE
    assert reads["offset_bytes"].min() == 4 * PAGE


def test_two_processes_on_one_model_are_told_apart(model: Path, tmp_path: Path) -> None:
    """Each has its own faults and its own reads; when the first leaves, the second keeps what is its."""
    drop_cache(model)
    tracer = Tracer()
    recorder = Recorder(tracer, flush_seconds=60)
    wanted = offsets_with_straddles(model, 3)
    mine, yours = wanted[:500], wanted[500:]
    sessions: list[Session] = []
    with Touch(model, mine) as first, Touch(model, yours) as second:
        for touch in (first, second):
            target = targets.find_target(touch.ready["pid"])
            writer = TraceWriter(tmp_path / "trace", session_name(target), session_metadata(target, Detail.FAULTS))
            sessions.append(recorder.add(target, writer, Detail.FAULTS, Phase.UNKNOWN))
        drop_cache(model)
        first.go()
        recorder.poll()
        recorder.remove(sessions[0])
        second.go()
    drop_cache(model)  # the processes have ended: nothing holds the pages any more
    recorder.poll()
    numbers = [tensor_totals(s) for s in sessions[1:]]
    recorder.close()
    tracer.close()
    for session, touched in zip(sessions, (mine, yours), strict=True):
        assert session.account["faults"]["counted"] == len(touched)
        files = [
            f for f in (tmp_path / "trace" / "pagecache").glob("*.parquet") if f.name.startswith(session.writer.session)
        ]
        adds = pl.concat([pl.read_parquet(f) for f in files]).filter(pl.col("action") == "add")
        assert adds.filter(pl.col("pid") == session.target.pid)["bytes"].sum() == len(touched) * PAGE
    assert numbers[0].major.sum() == len(yours)
    assert numbers[0].added.sum() == len(yours) * PAGE
    # The pages of both were dropped by us, after the first had left: they are the second's to hear of.
    evicted = pl.concat([pl.read_parquet(f) for f in files]).filter(pl.col("action") == "evict")
    assert evicted["bytes"].sum() == numbers[0].evicted.sum() == (len(mine) + len(yours)) * PAGE


def test_a_flood_is_accounted_for_to_the_last_fault(model: Path, tmp_path: Path) -> None:
    """A million minor faults in seconds: kernel-counted = delivered + dropped in every file, and the count is right."""
    n = 1_000_003
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.FAULTS, flush_seconds=1)
    with Touch(model, None, "--flood", str(n)) as touch:
        capture.attach(touch.ready["pid"])
        result: dict[str, int] = {}
        worker = threading.Thread(target=lambda: result.update(touch.go()))
        worker.start()
        while worker.is_alive():
            capture.step()
        worker.join()
        capture.step()
        after = totals(capture)
    account = capture.close()["account"]["faults"]
    cells = accounts(trace, "faults")
    assert len(cells) > 1
    assert all(c["counted"] == c["delivered"] + c["dropped"] for c in cells)
    assert sum(c["counted"] for c in cells) == account["counted"] == result["minflt"] + result["majflt"]
    assert after["minor"] + after["major"] == account["counted"]
    assert table(trace, "faults").height == account["delivered"]


def test_a_ring_that_is_too_small_loses_events_and_says_how_many(model: Path, tmp_path: Path) -> None:
    n = 100_003
    trace = tmp_path / "trace"
    capture = Capture(trace, Detail.FAULTS, flush_seconds=60, ring_bytes=1 << 16)
    with Touch(model, None, "--flood", str(n)) as touch:
        capture.attach(touch.ready["pid"])
        done = touch.go()  # nobody reads meanwhile
        capture.step()
    account = capture.close()["account"]["faults"]
    assert account["counted"] == done["minflt"] + done["majflt"]
    assert account["dropped"] > n / 2
    assert account["counted"] == account["delivered"] + account["dropped"]
    assert table(trace, "faults").height == account["delivered"]


PLAIN = 'int ggml_graph_compute(int *p) { __asm__ volatile("" ::: "memory"); return *p; }'
REALIGNED = """
int ggml_graph_compute(int *p);
__asm__(".globl ggml_graph_compute\\n.type ggml_graph_compute,@function\\nggml_graph_compute: endbr64\\n"
        "lea 8(%rsp),%r10\\n and $-64,%rsp\\n push -8(%r10)\\n push %rbp\\n mov %rsp,%rbp\\n push %r10\\n"
        "mov (%rdi),%eax\\n pop %r10\\n pop %rbp\\n lea -8(%r10),%rsp\\n ret\\n"
        ".size ggml_graph_compute,.-ggml_graph_compute");
"""


@pytest.mark.parametrize("function", [f"__attribute__((noinline)) {PLAIN}", REALIGNED])
def test_uprobes_behind_what_the_kernel_would_single_step_are_exact(tmp_path: Path, function: str) -> None:
    """Functions begin with endbr64, or align their stack: the probe goes behind it, missing nothing."""
    source, program = tmp_path / "calls.c", tmp_path / "calls"
    source.write_text(
        "#include <stdio.h>\n"
        f"{function}\n"
        "int main(void) { int one = 1, sum = 0; getchar();\n"
        "  for (int i = 0; i < 997; i++) sum += ggml_graph_compute(&one);\n"
        '  printf("%d\\n", sum); fflush(stdout); getchar(); return 0; }\n'
    )
    subprocess.run(["cc", "-O1", "-fcf-protection=full", "-o", program, source], check=True)
    offset = elf.functions(str(program), b"ggml_graph")["ggml_graph_compute"]
    assert program.read_bytes()[offset : offset + 4] == b"\xf3\x0f\x1e\xfa"
    if function == REALIGNED:
        assert kernel.emulated(str(program), offset)
    tracer = Tracer()
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        slot = tracer.add_process(child.pid, Phase.UNKNOWN)
        symbols = {"ggml_graph_compute": targets.Symbol(str(program), offset)}
        lost = tracer.set_detail(slot, Detail.FAULTS, symbols)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "997\n"
        seen = int(tracer.slots["token"][slot])
        records = sum(len(batch) for batch in tracer.read())
        child.stdin.write("\n")
    tracer.close()
    assert not lost
    assert seen == 997
    assert records == 2 * 997


def test_what_a_build_without_the_hook_for_all_operators_loses_is_said(tmp_path: Path) -> None:
    """mul_mat by its own symbol is seen then; that repacked weights and experts are not, is not kept quiet."""
    libc = next(m.path for m in targets.maps(os.getpid()) if "/libc.so" in m.path or "/libc-" in m.path)
    symbol = targets.Symbol(libc, elf.functions(libc, b"getpid")["getpid"])
    symbols = dict.fromkeys(
        ("ggml_graph_compute", "ggml_compute_forward_get_rows", "ggml_compute_forward_mul_mat"), symbol
    )
    tracer = Tracer()
    slot = tracer.add_process(os.getpid(), Phase.UNKNOWN)
    lost = tracer.set_detail(slot, Detail.OPS, symbols)
    attached = set(tracer.uprobes(slot))
    tracer.close()
    assert "uprobe ggml_compute_forward_mul_mat" in attached
    assert len(lost) == 1
    assert "only mul_mat is seen, and not repacked" in lost[0]
