"""Advice: each finding both ways on hand-made traces; the RAM curve against caches simulated page by page."""

import json
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import Builder

from llmtraced.analysis import ram
from llmtraced.analysis.advise import FINDINGS, advise
from llmtraced.analysis.ram import Uses
from llmtraced.analysis.trace import open_trace
from llmtraced.reporters import advise as show
from llmtraced.reporters.text import Style
from llmtraced.schema import PAGE

MS = 1_000_000
SIZE = 1000 * PAGE  # of each weight
A, B, LIMIT = "a.weight", "b.weight", 1200 * PAGE


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def uses_of(sequence: list[list[int]], sizes: list[int]) -> Uses:
    rank = [token for token, units in enumerate(sequence) for _ in units]
    units = [unit for token in sequence for unit in token]
    return Uses("ops", len(sequence), np.array(rank, int), np.array(units, int), np.array(sizes, int))


def map_of(trace: Builder, **more: Any) -> None:
    """Write two weights of 1,000 pages each, one behind the other."""
    trace.tensor((A, 0, SIZE), (B, SIZE, SIZE), **more)


def graphs(trace: Builder, count: int, stall_ms: int = 90, gap_ms: int = 0, **more: Any) -> None:
    """Write tokens of 100 ms each, from 1, one after the other."""
    step = (100 + gap_ms) * MS
    trace.write(
        "tokens",
        [
            {"token": n, "start_ns": n * step, "end_ns": n * step + 100 * MS, "stall_ns": stall_ms * MS} | more
            for n in range(1, count + 1)
        ],
        cgroup_limit_bytes=LIMIT,
    )


def move(n: int, offset: int, size: int, action: str = "add", **more: Any) -> dict[str, Any]:
    """Return a row of the page cache in the middle of token ``n``."""
    name = A if offset < SIZE else B
    when = {"token": n, "timestamp": n * 100 * MS + 50 * MS}
    return {"tensor_name": name, "offset_bytes": offset, "bytes": size, "action": action, "pid": 100} | when | more


def used(n: int, *names: str) -> list[dict[str, Any]]:
    return [
        {"token": n, "timestamp": n * 100 * MS + i, "tensor_name": name, "op": "mul_mat", "bytes_accessed": SIZE}
        for i, name in enumerate(names)
    ]


def pressed(trace: Builder, count: int = 6, read: int = SIZE, **more: Any) -> None:
    """Write a model of 2,000 pages of which every token reads both weights again; 1,000 fit."""
    map_of(trace)
    graphs(trace, count, **more)
    trace.write("ops", [row for n in range(1, count + 1) for row in used(n, A, B)], cgroup_limit_bytes=LIMIT)
    rows = [
        row
        for n in range(1, count + 1)
        for row in (
            *([move(n, SIZE, read, "evict")] if n > 1 else []),
            move(n, 0, read),
            move(n, 0, read, "evict"),
            move(n, SIZE, read),
        )
    ]
    trace.write("pagecache", rows, cgroup_limit_bytes=LIMIT)


def idle(trace: Builder, count: int = 4) -> None:
    """Write tokens that read nothing, of a model that was read once while it was loaded."""
    map_of(trace)
    graphs(trace, count, stall_ms=1)
    counts = {"ops": {"counted": 2 * count, "delivered": 2 * count, "dropped": 0}}
    trace.write("ops", [row for n in range(1, count + 1) for row in used(n, A, B)], account=counts)
    load = {"token": 0, "timestamp": 5, "phase": "load"}
    trace.write("pagecache", [move(0, 0, SIZE, **load), move(0, SIZE, SIZE, **load)])


def findings(trace: Builder, phase: str | None = None) -> dict[str, Any]:
    report = advise(open_trace(trace.path), phase)
    json.dumps(report, allow_nan=False)
    return {one["finding"]: one for one in report["findings"]} | {"report": report}


def test_a_model_that_does_not_fit(trace: Builder) -> None:
    pressed(trace)
    found = findings(trace)
    fits = found["fits"]
    assert fits["severity"] == "act"
    assert fits["evidence"] == {
        "bytes_read_per_token": 2 * SIZE,
        "bytes_used_per_token": 2 * SIZE,
        "file_weights_bytes": 2 * SIZE,
        "cgroup_limit_bytes": LIMIT,
        "peak_resident_bytes": SIZE,
        "reread_at_least_bytes": 10 * SIZE,
    }
    assert "the memory limit is 4.92 MB, its weights are 8.19 MB" in fits["title"]


def test_a_model_that_fits(trace: Builder) -> None:
    idle(trace)
    found = findings(trace)
    assert found["fits"]["severity"] == "fine"
    assert found["fits"]["title"] == "The model fits: a token reads 0 B of it"
    assert found["ram"]["severity"] == "fine"
    assert all(found[name]["severity"] == "fine" for name in FINDINGS)


def test_first_reads_are_not_taken_for_reading_again(trace: Builder) -> None:
    map_of(trace)
    graphs(trace, 2)
    trace.write("pagecache", [move(1, 0, SIZE), move(2, SIZE, SIZE)])
    fits = findings(trace)["fits"]
    assert fits["severity"] == "note"
    assert fits["evidence"]["reread_at_least_bytes"] == 0
    assert "no more than the model was read in all" in fits["title"]


def test_a_cache_that_was_cold_when_the_recording_began(trace: Builder) -> None:
    map_of(trace)
    graphs(trace, 4)
    trace.write("pagecache", [move(n, at, SIZE) for n in (1, 2) for at in (0, SIZE)])
    assert findings(trace)["fits"]["severity"] == "fine"
    assert findings(trace)["fits"]["evidence"]["bytes_read_per_token"] == 0


def test_what_was_in_the_cache_when_the_recording_began(trace: Builder) -> None:
    map_of(trace)
    graphs(trace, 2)
    swap = [move(1, SIZE, SIZE), move(1, 0, SIZE, "evict"), move(2, 0, SIZE), move(2, SIZE, SIZE, "evict")]
    trace.write("pagecache", swap)
    assert findings(trace)["report"]["peak_resident_bytes"] == SIZE
    lost = {"pagecache": {"counted": 5000, "delivered": 4000, "dropped": 1000}}
    trace.write("pagecache", [], account=lost)
    assert findings(trace)["report"]["peak_resident_bytes"] is None


def test_the_ram_that_ends_it(trace: Builder) -> None:
    pressed(trace)
    one = findings(trace)["ram"]
    evidence = one["evidence"]
    assert one["severity"] == "act"
    assert evidence["needed_ram_bytes"] == 2 * SIZE
    assert evidence["own_memory_at_most_bytes"] == 200 * PAGE
    assert (evidence["lru_bytes_per_token"], evidence["pinned_bytes_per_token"]) == (2 * SIZE, SIZE)
    assert evidence["belady_bytes_per_token"] == SIZE
    assert "MemoryMax=9M" in one["command"]  # 2,200 pages are 8.6 MiB


def test_no_limit_no_figure_to_set(trace: Builder) -> None:
    map_of(trace)
    trace.write("tokens", [{"token": n, "start_ns": n * 100, "end_ns": n * 100 + 50} for n in range(1, 4)])
    trace.write("pagecache", [move(n, at, SIZE, timestamp=n) for n in range(1, 4) for at in (0, SIZE)])
    one = findings(trace)["ram"]
    assert one["evidence"]["cgroup_limit_bytes"] is None
    assert "MemoryMax" not in one["command"]
    assert findings(trace)["report"]["uses_source"] == "map"


def test_enough_ram_and_yet_reads(trace: Builder) -> None:
    pressed(trace)
    load = {"token": 0, "timestamp": 5, "phase": "load"}
    trace.write("pagecache", [move(0, 0, SIZE, **load), move(0, SIZE, SIZE, **load)], cgroup_limit_bytes=LIMIT)
    one = findings(trace)["ram"]
    assert one["severity"] == "note"
    assert "Something else" in one["why"]


def moe(trace: Builder, per_token: int, routing: bool = True) -> None:
    """Write a layer of 4 experts of 250 pages; token n chooses expert n % 4."""
    trace.tensor((A, 0, SIZE), layer=0, n_experts=4, expert_bytes=SIZE // 4)
    graphs(trace, 8, stall_ms=95)
    trace.write("ops", [row | {"op": "mul_mat_id"} for n in range(1, 9) for row in used(n, A)])
    if routing:
        rows = [{"token": n, "timestamp": n, "phase": "decode", "layer": 0, "experts": [n % 4], "position": 0}
                for n in range(1, 9)]  # fmt: skip
        trace.write("routing", rows)
    rows = [row for n in range(1, 9) for row in (move(n, 0, per_token), move(n, 0, per_token, "evict"))]
    trace.write("pagecache", rows)


def test_readahead_reads_experts_that_nobody_chose(trace: Builder) -> None:
    moe(trace, per_token=SIZE)
    one = findings(trace)["readahead"]
    assert one["severity"] == "act"
    assert one["evidence"]["read_per_used"] == 4
    assert "echo 128 " in one["command"]


def test_readahead_reads_what_is_chosen(trace: Builder) -> None:
    moe(trace, per_token=SIZE // 4)
    one = findings(trace)["readahead"]
    assert one["severity"] == "fine"
    assert one["evidence"]["read_per_used"] == 1


def test_without_routing_the_experts_are_not_known(trace: Builder) -> None:
    moe(trace, per_token=SIZE, routing=False)
    found = findings(trace)
    for name in ("ram", "readahead"):
        assert found[name]["unknown"] == "which experts each token uses was not recorded"
        assert "--detail ops" in found[name]["command"]


@pytest.mark.parametrize(("majors", "severity"), [(1000, "act"), (2, "fine")])
def test_a_dense_model_with_small_readahead(trace: Builder, majors: int, severity: str) -> None:
    pressed(trace, major_faults=majors)
    one = findings(trace)["readahead"]
    assert one["severity"] == severity
    assert one["evidence"]["bytes_read_per_major_fault"] == 2 * SIZE / majors
    assert ("echo 8192 " in (one["command"] or "")) is (severity == "act")


@pytest.mark.parametrize(
    ("stall_ms", "severity", "words"),
    [(90, "act", "The disk is the limit"), (20, "note", "Computing is the limit"), (5, "fine", "The CPU is the limit")],
)
def test_disk_or_cpu(trace: Builder, stall_ms: int, severity: str, words: str) -> None:
    pressed(trace, stall_ms=stall_ms)
    one = findings(trace)["limit"]
    assert one["severity"] == severity
    assert one["title"].startswith(words)
    evidence = one["evidence"]
    assert evidence["tokens_per_second"] == pytest.approx(10)
    assert evidence["tokens_per_second_without_stall"] == pytest.approx(1000 / (100 - stall_ms))
    assert evidence["tokens_per_second_overlapped"] == pytest.approx(1000 / max(100 - stall_ms, stall_ms))
    assert evidence["bytes_per_stall_second"] == pytest.approx(2 * SIZE / (stall_ms / 1000))


def test_stall_that_is_not_known(trace: Builder) -> None:
    pressed(trace, stall_ns=None)
    assert findings(trace)["limit"]["unknown"]


@pytest.mark.parametrize(
    ("backed", "severity", "unknown"), [(True, "fine", False), (False, "note", False), (None, "note", True)]
)
def test_repacked(trace: Builder, backed: bool | None, severity: str, unknown: bool) -> None:
    map_of(trace, backed=backed)
    graphs(trace, 2)
    one = findings(trace)["repacked"]
    assert one["severity"] == severity
    assert (one["unknown"] is not None) is unknown
    assert one["evidence"]["repacked_bytes"] == (2 * SIZE if backed is False else 0)
    assert ("--no-repack" in (one["command"] or "")) is (backed is False)


def test_loading_evicts_what_it_loaded(trace: Builder) -> None:
    idle(trace)
    load = {"token": 0, "timestamp": 6, "phase": "load"}
    trace.write("pagecache", [move(0, 0, SIZE // 2, "evict", **load)])
    one = findings(trace)["populate"]
    assert one["severity"] == "note"
    assert one["evidence"]["loaded_bytes"] == 2 * SIZE
    assert one["evidence"]["evicted_while_loading_bytes"] == SIZE // 2
    assert one["evidence"]["unused_bytes"] == 0


def test_loading_reads_what_no_graph_uses(trace: Builder) -> None:
    idle(trace)
    trace.tensor(("vision.weight", 2 * SIZE, SIZE), backed=None)
    load = {"token": 0, "timestamp": 5, "phase": "load", "tensor_name": "vision.weight"}
    trace.write("pagecache", [move(0, 2 * SIZE, SIZE, **load)])
    one = findings(trace)["populate"]
    assert one["evidence"]["unused_bytes"] == SIZE
    assert one["evidence"]["unused_tensors"] == 1
    assert "4.1 MB were not used" in one["title"]
    trace.write("faults", [{"token": 2, "timestamp": 200 * MS, "tensor_name": "vision.weight"}])
    assert findings(trace)["populate"]["evidence"]["unused_bytes"] == 0


def test_loading_reads_experts_that_are_never_chosen(trace: Builder) -> None:
    moe(trace, per_token=0)
    trace.write("routing", [])
    load = {"token": 0, "timestamp": 5, "phase": "load"}
    trace.write("pagecache", [move(0, expert * SIZE // 4, SIZE // 4, expert=expert, **load) for expert in range(4)])
    assert findings(trace)["populate"]["evidence"]["unused_bytes"] == 0
    path = next((trace.path / "routing").glob("*000000.parquet"))
    path.unlink()
    rows = [
        {"token": n, "timestamp": n, "phase": "decode", "layer": 0, "experts": [1, 2], "position": 0} for n in (1, 2)
    ]
    trace.write("routing", rows)
    assert findings(trace)["populate"]["evidence"]["unused_bytes"] == SIZE // 2


def test_loading_that_was_not_recorded(trace: Builder) -> None:
    pressed(trace)
    one = findings(trace)["populate"]
    assert one["unknown"] == "the recording began after the model was loaded"


@pytest.mark.parametrize(("comm", "pid", "severity"), [("kdamond.0", 77, "act"), ("llama-server", 100, "fine")])
def test_reclaimed_while_idle(trace: Builder, comm: str, pid: int, severity: str) -> None:
    map_of(trace)
    graphs(trace, 4, gap_ms=2000)
    after = 2100 * MS + 500 * MS  # token 1 ended at 2,200 ms
    rows = [
        {"tensor_name": A, "offset_bytes": 0, "bytes": SIZE, "pid": pid, "comm": comm, "token": 1} | more
        for more in (
            {"action": "evict", "timestamp": after},
            {"action": "add", "timestamp": after + 2000 * MS, "token": 2, "pid": 100, "comm": "llama-server"},
        )
    ]
    trace.write("pagecache", rows)
    one = findings(trace)["idle"]
    assert one["severity"] == severity
    assert one["evidence"]["evicted_idle_bytes"] == (SIZE if severity == "act" else 0)
    assert one["evidence"]["tokens_after_pause"] == 3
    assert ("damon_reclaim" in (one["command"] or "")) is (severity == "act")


def test_evicted_during_a_token_is_not_idle(trace: Builder) -> None:
    map_of(trace)
    graphs(trace, 2)
    trace.write("pagecache", [move(1, 0, SIZE, "evict", pid=77, comm="kswapd0")])
    found = findings(trace)
    assert found["idle"]["severity"] == "fine"
    assert found["foreign"]["severity"] == "fine"  # the kernel's threads are nobody else


def test_others_in_the_page_cache(trace: Builder) -> None:
    pressed(trace)
    trace.write("pagecache", [move(6, 0, SIZE, pid=7, comm="back\x1bup"), move(6, 0, SIZE, "evict", pid=8, comm="cp")])
    report = findings(trace)
    one = report["foreign"]
    assert one["severity"] == "note"
    assert one["evidence"]["added_bytes"] == SIZE
    assert one["evidence"]["added_share"] == pytest.approx(1 / 13)
    assert one["evidence"]["added_by"] == "back\\x1bup 4.1 MB"
    assert one["evidence"]["evicted_by"] == "cp 4.1 MB"
    assert "\x1b" not in show.render(report["report"], 5, Style())


def test_lost_records_come_first(trace: Builder) -> None:
    pressed(trace)
    trace.write("ops", [], account={"ops": {"counted": 5, "delivered": 3, "dropped": 2}})
    report = advise(open_trace(trace.path))
    assert report["findings"][0]["finding"] == "account"
    assert report["findings"][0]["severity"] == "act"
    assert report["findings"][0]["evidence"]["dropped"] == 2
    assert "--ring" in report["findings"][0]["command"]


def test_without_operators(trace: Builder) -> None:
    map_of(trace)
    graphs(trace, 2)
    trace.write("pagecache", [move(1, 0, SIZE)], account={"pagecache": {"counted": 1, "delivered": 1, "dropped": 0}})
    one = findings(trace)["account"]
    assert one["severity"] == "note"
    assert "--detail ops" in one["command"]


def test_the_phase_that_is_judged(trace: Builder) -> None:
    pressed(trace)
    assert findings(trace)["report"]["judged_phase"] == "decode"
    other = findings(trace, "prompt")
    assert other["report"]["tokens"] == 0
    assert all(other[name]["unknown"] for name in ("fits", "ram", "readahead", "limit"))


def test_severity_sorts_and_what_is_unknown_comes_after_what_is_known(trace: Builder) -> None:
    pressed(trace)
    order = [(one["severity"], one["unknown"] is not None) for one in advise(open_trace(trace.path))["findings"]]
    rank = [("act", "note", "fine").index(severity) * 2 + unknown for severity, unknown in order]
    assert rank == sorted(rank)
    assert {one["finding"] for one in advise(open_trace(trace.path))["findings"]} == set(FINDINGS)


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", ["png", "svg", "web"])
def test_render_and_draw(trace: Builder, empty: bool, kind: str) -> None:
    if empty:
        map_of(trace)
    else:
        pressed(trace)
    report = advise(open_trace(trace.path))
    text = show.render(report, 6, Style(80))
    assert max(len(line) for line in text.splitlines() if "$ " not in line) <= 80
    assert ("$ sudo systemctl set-property" in text) is not empty
    assert ("best possible" in text) is not empty
    assert text.splitlines()[0].startswith("nothing to act on; " if empty else "The model does not fit")
    picture = show.draw(report, kind)
    assert picture.startswith(b"\x89PNG") if kind == "png" else b"<svg" in picture


def test_a_tensor_used_twice_and_look_ups_and_the_choice_of_tokens(trace: Builder) -> None:
    pressed(trace, count=5)
    twice = [*used(3, A), *used(3, B)]
    trace.tensor(("token_embd.weight", 2 * SIZE, SIZE))
    look_up = [row | {"op": "get_rows"} for row in used(4, "token_embd.weight")]
    trace.write("ops", [*twice, *look_up])
    one = ram.uses(open_trace(trace.path), [1, 2, 3, 4, 5])
    assert one is not None
    assert (one.tokens, one.sizes.tolist()) == (5, [SIZE, SIZE])
    assert one.units.tolist() == [0, 1] * 5
    assert ram.uses(open_trace(trace.path), []) is None


def test_the_window_lies_in_the_middle(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "ACCESSES", 6)
    pressed(trace, count=9)
    one = ram.uses(open_trace(trace.path), list(range(1, 10)))
    assert one is not None
    assert (one.tokens, one.warm, one.units.tolist()) == (3, 1, [0, 1] * 3)


def test_input_embeddings_are_looked_up_where_there_is_an_output_matrix(trace: Builder) -> None:
    trace.tensor(("token_embd.weight", 0, 5), ("output.weight", 5, 7))
    one = ram.uses(open_trace(trace.path), [1])
    assert one is not None
    assert (one.source, one.sizes.tolist(), one.bytes_per_token) == ("map", [7], 7)


def lru_misses(pages: list[tuple[int, int]], start: list[int], size: int, counted: list[bool]) -> int:
    stack = start[:size]
    missed = 0
    for (page, _), count in zip(pages, counted, strict=True):
        missed += count and page not in stack
        stack = [page, *(other for other in stack if other != page)][:size]
    return missed


def best_misses(pages: list[int], n: int, size: int) -> int:
    """The fewest misses of any policy that may begin with any pages and drop a page at once; by trying them all."""

    @cache
    def least(at: int, held: frozenset[int]) -> int:
        if at == len(pages):
            return 0
        page = pages[at]
        have = held | {page}
        options = [have] if len(have) <= size else [have - {out} for out in have]
        return (page not in held) + min(least(at + 1, option) for option in options)

    if size >= n:
        return 0
    return min(least(0, frozenset(some)) for some in combinations(range(n), size))


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.data(), SIZES)
def test_lru_page_by_page(data: st.DataObject, sizes: list[int]) -> None:
    token = st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=5, unique=True)
    sequence = data.draw(st.lists(token, min_size=1, max_size=8))
    one = uses_of(sequence, sizes)
    starts = np.cumsum([0, *sizes])
    pages, counted = [], []
    for unit, counts in zip(one.units.tolist(), one.counted.tolist(), strict=True):
        pages += [(int(starts[unit]) + i, unit) for i in range(sizes[unit])]
        counted += [counts] * sizes[unit]
    before = list(range(sum(sizes)))[::-1]
    for row in ram.curve(one, more=range(sum(sizes) + 1)):
        expected = lru_misses(pages, before, row["ram_bytes"], counted)
        assert row["lru_bytes_per_token"] == round(expected / (one.tokens - one.warm))
        assert row["belady_bytes_per_token"] <= min(row["lru_bytes_per_token"], row["pinned_bytes_per_token"])


@settings(deadline=None, max_examples=60)
@given(st.data(), st.lists(st.integers(1, 2), min_size=1, max_size=3))
def test_nothing_beats_belady_and_it_can_be_done(data: st.DataObject, sizes: list[int]) -> None:
    sequence = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=8))
    one = uses_of([sequence], sizes)  # one token: nothing but counts
    starts = np.cumsum([0, *sizes]).tolist()
    pages = [starts[unit] + i for unit in sequence for i in range(sizes[unit])]
    for size in range(1, sum(sizes) + 1):
        assert ram.belady_bytes(one, size) == best_misses(pages, sum(sizes), size)


def test_longer_than_a_chunk() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 50, 40).tolist()
    sequence = [rng.permutation(40)[:25].tolist() for _ in range(30)]
    one = uses_of(sequence, sizes)
    order = list(range(40))[::-1]
    expected = []
    for token, units in enumerate(sequence):
        for unit in units:
            at = order.index(unit)
            if token >= one.warm:
                expected.append(sum(sizes[other] for other in order[: at + 1]))
            order = [unit, *order[:at], *order[at + 1 :]]
    assert ram.needed_ram(one).tolist() == expected


def test_pinned_is_learned_from_the_first_tokens() -> None:
    one = uses_of([[0, 1], [1], [1], [0, 1], [0, 1], [0, 1]], [10, 20])  # two prepare: 1 was used twice, 0 once
    assert ram.pinned_bytes(one, 20) == 3 * 10
    assert ram.pinned_bytes(one, 25) == 3 * 5
    assert ram.pinned_bytes(one, 0) == 4 * 20 + 3 * 10


def test_a_model_that_was_read_is_told_of_and_is_not_repacked(tmp_path: Path) -> None:
    trace = Builder(tmp_path / "trace")
    read = {"model": "m.gguf", "path": "/m.gguf", "fingerprint": "f", "size_bytes": 100_000, "mapped_bytes": 0}
    about: dict[str, Any] = {"models": [read], "command": ["llama-server", "--load-mode", "dio"]}
    tensor = {"tensor_name": "a", "offset_bytes": 0, "size_bytes": 4096, "backed": False}
    trace.write("tensors", [tensor], **about)
    trace.write("tokens", [{"token": 1, "start_ns": 10**9, "end_ns": 2 * 10**9, "phase": "decode"}], **about)
    report = advise(open_trace(trace.path))
    found = next(one for one in report["findings"] if one["finding"] == "repacked")
    assert found["title"].startswith("m.gguf was read with direct I/O")
    assert (found["evidence"]["read_models"], found["evidence"]["repacked_bytes"]) == ("m.gguf", 0)
    assert "--load-mode mmap" in show.render(report, 5, Style())
