"""The page cache's doings against answers worked out by hand, and against a page-by-page account."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_trace import SESSION, Builder

from llmtraced.analysis import columns as batched
from llmtraced.analysis import pages
from llmtraced.analysis.cache import FATES, cache
from llmtraced.analysis.reread import reread
from llmtraced.analysis.spread import Spread
from llmtraced.analysis.trace import open_trace
from llmtraced.errors import LlmtracedError
from llmtraced.reporters import cache as show
from llmtraced.reporters import reread as show_reread
from llmtraced.reporters.text import Style

PAGE = 4096
MB = 1 << 20
BASE = 0x7F00_0000_0000
EVIL = "evil\x1b[2J\n$x_{$"


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


def move(build: Builder, *rows: tuple[int, str, str | None, int, int], **more: Any) -> None:
    """Write page-cache rows: time, action, tensor, first page, pages."""
    columns = ("timestamp", "action", "tensor_name", "offset_bytes", "bytes")
    build.write(
        "pagecache",
        [dict(zip(columns, (*row[:3], row[3] * PAGE, row[4] * PAGE), strict=True)) | more for row in rows],
    )


def fault(build: Builder, *rows: tuple[int, int, int | None], base: int = BASE, **more: Any) -> None:
    """Write faults: time, page, latency."""
    build.write(
        "faults",
        [
            {"timestamp": at, "offset_bytes": page * PAGE, "address": base + page * PAGE, "latency_ns": ns} | more
            for at, page, ns in rows
        ],
    )


def fates(report: Any, cause: str = "fault") -> dict[str, int]:
    """Return pages by fate."""
    (row,) = (row for row in report["causes"] if row["cause"] == cause)
    assert row["added_bytes"] == sum(row[f"{fate}_bytes"] for fate in FATES)
    return {fate: row[f"{fate}_bytes"] // PAGE for fate in FATES if row[f"{fate}_bytes"]}


def of(report: Any, name: str) -> Any:
    (found,) = (tensor for tensor in report["tensors"] if tensor["tensor_name"] == name)
    return found


def test_the_field_names(trace: Builder) -> None:
    trace.tensor(("t", 0, 10))
    report = cache(open_trace(trace.path))
    assert set(report) == {
        *("session", "models", "phase", "model_bytes", "cgroup_limit_bytes", "added_bytes", "used_bytes"),
        *("wasted_bytes", "unknown_bytes", "pending_bytes", "evicted_bytes", "wasted_share", "resident_before_bytes"),
        *("resident_bytes", "peak_resident_bytes", "mean_resident_bytes", "out_of_order_bytes", "causes", "processes"),
        *("phases", "bins", "tensors", "other", "account", "verdict", "notes"),
    }
    assert report["wasted_share"] is None
    assert of(report, "t")["resident_share"] == [0.0]


def test_used_and_wasted_by_the_block_of_the_fault(trace: Builder) -> None:
    trace.tensor(("t", 0, 8 * MB))
    move(trace, (100, "add", "t", 0, 32), (100, "add", "t", 1024, 32), cause="readahead")  # 0 and 4 MiB
    fault(trace, (110, 3, 5))
    move(trace, (200, "evict", "t", 0, 32), (200, "evict", "t", 1024, 32))
    # pages 0-15 share the fault's 64 KiB; 16-31 only its 2 MiB; the others lie further off
    report = cache(open_trace(trace.path))
    assert fates(report, "readahead") == {"used": 16, "unknown": 16, "wasted": 32}
    assert report["wasted_share"] == 0.5
    t = of(report, "t")
    assert (t["added_bytes"], t["evicted_bytes"], t["wasted_bytes"]) == (64 * PAGE, 64 * PAGE, 32 * PAGE)


@pytest.mark.parametrize(
    ("began", "latency", "used"),
    [(90, 9, False), (90, 10, True), (150, None, True), (99, None, False), (200, 0, True), (199, 2, False)],
)
def test_a_fault_counts_when_it_ends_between_add_and_eviction(
    trace: Builder, began: int, latency: int | None, used: bool
) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 1))
    move(trace, (200, "evict", "t", 0, 1), (300, "add", "t", 0, 1), (400, "evict", "t", 0, 1))
    fault(trace, (began, 0, latency))
    assert fates(cache(open_trace(trace.path))) == ({"used": 1, "wasted": 1} if used else {"wasted": 2})


def test_blocks_are_those_of_the_address_space(trace: Builder) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 16), (200, "evict", "t", 0, 16))
    fault(trace, (150, 0, 0), base=BASE + 12 * PAGE)  # pages 0-3 lie in one block of addresses, 4-19 in the next
    assert fates(cache(open_trace(trace.path))) == {"used": 4, "unknown": 12}


def test_large_folios_are_those_of_the_file(trace: Builder) -> None:
    trace.tensor(("t", 0, 8 * MB))
    move(trace, (100, "add", "t", 505, 1), (100, "add", "t", 600, 1))
    fault(trace, (150, 100, 0), base=BASE + 12 * PAGE)  # page 505 lies in the same 2 MiB of the file, not of addresses
    move(trace, (200, "evict", "t", 505, 1), (200, "evict", "t", 600, 1))
    assert fates(cache(open_trace(trace.path))) == {"unknown": 1, "wasted": 1}


def test_a_block_of_two_large_folios_may_be_mapped_with_either(trace: Builder) -> None:
    trace.tensor(("t", 0, 8 * MB))
    move(trace, (100, "add", "t", 502, 12), (100, "add", "t", 2000, 12))
    fault(trace, (150, 700, 0), base=BASE + 12 * PAGE)  # pages 500-515 are a block of addresses
    move(trace, (200, "evict", "t", 502, 12), (200, "evict", "t", 2000, 12))
    assert fates(cache(open_trace(trace.path))) == {"unknown": 12, "wasted": 12}


def test_what_is_in_the_cache_at_the_end_is_used_or_pending(trace: Builder) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 16), (100, "add", "t", 16, 16))
    fault(trace, (150, 0, 0))
    assert fates(cache(open_trace(trace.path))) == {"used": 16, "pending": 16}


def test_an_operator_that_ended_in_between_has_read_its_weight(trace: Builder) -> None:
    names = ("whole", "rows", "late", "early")
    trace.tensor(*((name, i * 4 * MB, 4 * MB) for i, name in enumerate(names)))
    for at, action in ((100, "add"), (200, "evict")):
        move(trace, *((at, action, name, i * 1024, 1024) for i, name in enumerate(names)))
    common = {"duration_ns": 20}
    trace.write(
        "ops",
        [
            {"tensor_name": "early", "timestamp": 70} | common,
            {"tensor_name": "rows", "timestamp": 120, "op": "get_rows"} | common,
            {"tensor_name": "whole", "timestamp": 180} | common,
            {"tensor_name": "late", "timestamp": 181} | common,
        ],
    )
    fault(trace, (1000, 0, 0))
    report = cache(open_trace(trace.path))
    assert {name: of(report, name)["used_bytes"] // PAGE for name in names} == {
        "whole": 1024,
        "rows": 0,
        "late": 0,
        "early": 0,
    }


def test_of_a_merged_tensor_only_the_chosen_experts_are_used(trace: Builder) -> None:
    trace.tensor(("blk.1.ffn_up_exps.weight", 0, 12 * MB), layer=1, n_experts=3, expert_bytes=4 * MB)
    for at, action in ((100, "add"), (200, "evict")):
        for expert in range(3):
            move(trace, (at, action, "blk.1.ffn_up_exps.weight", 1024 * expert, 1024), expert=expert)
    trace.write("ops", [{"tensor_name": "blk.1.ffn_up_exps.weight", "timestamp": 130, "op": "mul_mat_id"}])
    trace.write(
        "routing",
        [
            {"timestamp": 120, "layer": 1, "experts": [2], "position": 0, "phase": "decode"},
            {"timestamp": 130, "layer": 2, "experts": [1], "position": 0, "phase": "decode"},
            {"timestamp": 195, "layer": 1, "experts": [0], "position": 0, "phase": "decode"},
            {"timestamp": 205, "layer": 2, "experts": [1], "position": 0, "phase": "decode"},
        ],
    )
    fault(trace, (1000, 0, 0))
    assert fates(cache(open_trace(trace.path))) == {"used": 1024, "wasted": 2048}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"cause": "readahead", "phase": "load", "token": 0}, "unknown"),  # MAP_POPULATE maps without a fault
        ({"cause": "readahead", "phase": "load", "token": 1}, "wasted"),
        ({"cause": "readahead", "phase": "unknown", "token": 0}, "wasted"),
        ({"cause": "prefetcher"}, "wasted"),
        ({"cause": "read"}, "unknown"),  # a read copies without mapping
        ({"cause": "other"}, "unknown"),
    ],
)
def test_what_faults_cannot_tell_is_unknown(trace: Builder, more: dict[str, Any], expected: str) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 1), **more)
    move(trace, (200, "evict", "t", 0, 1))
    fault(trace, (1000, 0, 0))
    assert fates(cache(open_trace(trace.path)), str(more["cause"])) == {expected: 1}


def test_without_faults_nothing_is_called_wasted(trace: Builder) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 1), (200, "evict", "t", 0, 1))
    report = cache(open_trace(trace.path))
    assert fates(report) == {"unknown": 1}
    assert "no page faults were recorded" in report["notes"][0]


def test_dropped_faults_are_noted(trace: Builder) -> None:
    move(trace, (100, "add", "t", 0, 1))
    trace.write("faults", [{}], account={"faults": {"counted": 2, "delivered": 1, "dropped": 1, "missed": 0}})
    report = cache(open_trace(trace.path))
    assert report["verdict"] == "1 dropped (faults)"
    assert "upper bound" in report["notes"][0]


def test_resident_bytes_over_time(trace: Builder) -> None:
    trace.tensor(("t", 0, 4 * PAGE), ("u", 4 * PAGE, 4 * PAGE), ("never", 8 * PAGE, PAGE))
    move(trace, (0, "add", "t", 0, 2), (500, "evict", "u", 4, 3), (750, "evict", "t", 0, 1))
    trace.write("tokens", [{"start_ns": 0, "end_ns": 1000}])
    report = cache(open_trace(trace.path))
    t, u, never = (of(report, name) for name in ("t", "u", "never"))
    bins = report["bins"]
    assert bins["start_ns"][:2] == [0, 6]  # 1001 ns in bins of 6
    assert len(bins["start_ns"]) == len(t["resident_share"]) == 167
    assert (t["resident_share"][0], t["resident_share"][124], t["resident_share"][125]) == (0.5, 0.5, 0.25)
    assert (u["resident_share"][82], u["resident_share"][83]) == (0.75, 0.0)
    assert set(never["resident_share"]) == {0.0}
    assert (u["resident_before_bytes"], report["resident_before_bytes"]) == (3 * PAGE, 3 * PAGE)
    assert (report["resident_bytes"], report["peak_resident_bytes"]) == (PAGE, 5 * PAGE)
    assert t["mean_resident_share"] == pytest.approx((2 * 750 + 250) / 1000 / 4)
    assert u["mean_resident_share"] == pytest.approx(3 * 500 / 1000 / 4)
    assert report["mean_resident_bytes"] == round(PAGE * (1.75 + 1.5))
    assert bins["resident_bytes"][0] == 5 * PAGE
    assert sum(bins["fault_bytes"]) == 2 * PAGE
    assert (bins["evicted_bytes"][83], bins["evicted_bytes"][125], sum(bins["evicted_bytes"])) == (
        *(3 * PAGE, PAGE),
        4 * PAGE,
    )


def test_moves_out_of_order_are_said_and_do_not_pile_up(trace: Builder) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (100, "add", "t", 0, 1), (200, "add", "t", 0, 1))
    move(trace, (300, "evict", "t", 0, 1), (400, "evict", "t", 0, 1))
    fault(trace, (1000, 100, 0))
    report = cache(open_trace(trace.path))
    assert (report["out_of_order_bytes"], report["resident_bytes"]) == (2 * PAGE, 0)
    assert report["peak_resident_bytes"] == PAGE
    assert fates(report) == {"unknown": 1, "wasted": 1}


def test_causes_phases_and_processes(trace: Builder) -> None:
    trace.tensor(("t", 0, MB))
    move(trace, (1, "add", "t", 0, 2), cause="read", comm="cat", phase="load")
    move(trace, (2, "add", "t", 2, 4), (3, "add", None, 10, 1), cause="readahead")
    move(trace, (4, "evict", "t", 0, 2), cause="other", comm="kswapd0")
    report = cache(open_trace(trace.path))
    assert [(row["comm"], row["added_bytes"] // PAGE, row["evicted_bytes"] // PAGE) for row in report["processes"]] == [
        *(("llama-server", 5, 0), ("cat", 2, 0), ("kswapd0", 0, 2))
    ]
    assert [(row["phase"], row["read_bytes"], row["readahead_bytes"]) for row in report["phases"]] == [
        *(("load", 2 * PAGE, 0), ("decode", 0, 5 * PAGE))
    ]
    assert [row["cause"] for row in report["causes"]] == ["readahead", "read"]
    assert [row["added_bytes"] for row in report["other"]] == [PAGE]
    assert (report["added_bytes"], report["evicted_bytes"]) == (7 * PAGE, 2 * PAGE)


def test_a_phase_follows_its_pages_to_their_end(trace: Builder) -> None:
    trace.tensor(("t", 0, 10 * PAGE))
    move(trace, (100, "add", "t", 0, 3), phase="prompt")
    move(trace, (200, "evict", "t", 0, 1), (300, "add", "t", 0, 1), (400, "evict", "t", 0, 3), phase="decode")
    fault(trace, (5000, 600, 0))
    prompt, decode = (cache(open_trace(trace.path), phase) for phase in ("prompt", "decode"))
    assert (prompt["added_bytes"], prompt["evicted_bytes"]) == (3 * PAGE, 0)
    assert fates(prompt) == {"wasted": 3}
    assert (decode["added_bytes"], decode["evicted_bytes"]) == (PAGE, 4 * PAGE)
    assert fates(decode) == {"wasted": 1}
    assert decode["bins"]["start_ns"][0] == 200
    assert [decode["bins"]["resident_bytes"][i] // PAGE for i in (0, 99, -1)] == [2, 3, 0]
    assert prompt["resident_bytes"] == 3 * PAGE  # what came later than the phase is not in it
    assert cache(open_trace(trace.path), "load")["added_bytes"] == 0


def test_two_models_and_two_shards_are_told_apart(trace: Builder) -> None:
    for model, shard in (("a", 0), ("a", 1), ("b", 0)):
        trace.write(
            "tensors",
            [{"tensor_name": f"t{shard}", "offset_bytes": 0, "size_bytes": MB, "model": model, "shard": shard}],
        )
        move(trace, (100, "add", f"t{shard}", 0, 16), (200, "evict", f"t{shard}", 0, 16), model=model, shard=shard)
    fault(trace, (150, 0, 0), model="a", shard=1)
    report = cache(open_trace(trace.path))
    used = {(row["model"], row["tensor_name"]): row["used_bytes"] // PAGE for row in report["tensors"]}
    assert used == {("a", "t0"): 0, ("a", "t1"): 16, ("b", "t0"): 0}


def test_a_trace_without_a_map_and_an_empty_one(trace: Builder) -> None:
    move(trace, (100, "add", "t", 0, 1))
    report = cache(open_trace(trace.path))
    assert (of(report, "t")["added_bytes"], of(report, "t")["resident_share"]) == (PAGE, None)
    empty = Builder(trace.path.parent / "empty")
    empty.write("faults", [])
    report = cache(open_trace(empty.path))
    assert (report["tensors"], report["causes"], report["resident_bytes"]) == ([], [], 0)


T, U = 10_000, 30_000  # where the tensors of the property test end; the page at their border is in both
events = st.lists(
    st.tuples(
        st.integers(1, 3),  # time passed
        st.sampled_from(["add", "evict"]),
        st.integers(0, 7),  # first page
        st.integers(1, 4),  # pages
        st.sampled_from(["fault", "readahead", "read"]),
        st.sampled_from(["load", "decode"]),
        st.integers(0, 2),  # token
    ),
    max_size=30,
)
touches = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7), st.integers(0, 5)), max_size=6)
operators = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["t", "u"]), st.integers(0, 5)), max_size=4)


def parts(page: int) -> list[tuple[str, int]]:
    """Return the tensors in a page, and their bytes in it."""
    low, high = page * PAGE, (page + 1) * PAGE
    spans = [("t", max(low, 0), min(high, T)), ("u", max(low, T), min(high, U))]
    return [(name, b - a) for name, a, b in spans if b > a]


def page_by_page(rows: Any, faults: Any, ops: Any, last: int, phase: str | None) -> tuple[Any, Any, Any]:
    """Return bytes by (tensor, fate), resident bytes by tensor, and (tensor, time away, tokens, bytes) of returns."""
    fate: Counter[Any] = Counter()
    away: list[Any] = []
    state: dict[int, Any] = {}

    def close(page: int, now: int, unused: str) -> None:
        _, since, cause, loading, counted, _ = state[page]
        hit = any(since <= at + ns <= now for at, _, ns in faults)  # all pages here lie in one block
        for name, nbytes in parts(page):
            read = any(since <= at + ns <= now for at, tensor, ns in ops if tensor == name)
            hidden = unused == "wasted" and (loading or cause == "read" or not faults)
            if counted:
                fate[name, "used" if hit or read else "unknown" if hidden else unused] += nbytes

    for at, action, first, count, cause, row_phase, token in rows:
        for page in range(first, min(first + count, 8)):
            counted = phase in (None, row_phase)
            was = state.get(page)
            if was and was[0] == "add" and action == "evict":
                close(page, at, "wasted")
            elif was and was[0] == "add" and was[4]:
                fate.update({(name, "unknown"): nbytes for name, nbytes in parts(page)})
            elif was and was[0] == "evict" and action == "add" and counted:
                away += [(name, at - was[1], token - was[5], nbytes) for name, nbytes in parts(page)]
            state[page] = (action, at, cause, row_phase == "load" and token == 0, counted, token)
    resident: Counter[Any] = Counter()
    for page, was in state.items():
        if was[0] == "add":
            close(page, last, "pending")
            resident.update(dict(parts(page)))
    return fate, resident, away


@given(events, touches, operators, st.sampled_from([None, "load", "decode"]), st.sampled_from([1, 3, 1 << 16]))
@settings(max_examples=60, deadline=None)
def test_the_reports_agree_with_a_page_by_page_account(
    moves: Any, faults: Any, ops: Any, phase: str | None, chunk: int
) -> None:
    time, rows, written = 0, [], []
    for passed, action, first, count, cause, row_phase, raw_token in moves:
        time += passed
        token = 0 if row_phase == "load" else raw_token
        rows.append((time, action, first, count, cause, row_phase, token))
        low, high = first * PAGE, min((first + count) * PAGE, U)
        for name, a, b in (("t", low, min(high, T)), ("u", max(low, T), high)):
            if b > a:
                columns = {"offset_bytes": a, "bytes": b - a, "tensor_name": name, "cause": cause}
                written.append(columns | {"timestamp": time, "action": action, "phase": row_phase, "token": token})
    faults, ops = sorted(faults), sorted(ops)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_KEPT", chunk)
        patch.setattr(batched, "_ROWS", 1 if chunk == 1 else 1 << 18)
        trace = Builder(Path(folder))
        trace.tensor(("t", 0, T), ("u", T, U - T))
        trace.write("pagecache", written)
        fault(trace, *faults)
        trace.write("ops", [{"timestamp": at, "tensor_name": name, "duration_ns": ns} for at, name, ns in ops])
        opened = open_trace(trace.path)
        report, reads = cache(opened, phase), reread(opened, phase)
    last = opened.last_ns or 0
    fate, resident, away = page_by_page(rows, faults, ops, last, phase)
    for name in ("t", "u"):
        tensor = of(report, name)
        assert {key: tensor[f"{key}_bytes"] for key in FATES} == {key: fate[name, key] for key in FATES}
        assert tensor["added_bytes"] == of(reads, name)["bytes_read"]
        assert tensor["evicted_bytes"] == of(reads, name)["evicted_bytes"]
        if phase is None:
            assert tensor["resident_bytes"] == resident[name]
        back = [one for one in away if one[0] == name]
        assert of(reads, name)["returned_bytes"] == sum(one[3] for one in back)
        for key, column in (("away_ns", 1), ("away_tokens", 2)):
            values = sorted(max(one[column], 0) for one in back for _ in range(one[3]))
            points = of(reads, name)[key]
            assert points == (
                {
                    "min": values[0],
                    "p50": values[-(-len(values) // 2) - 1],
                    "p90": values[-(-len(values) * 9 // 10) - 1],
                }
                if values
                else None
            )
    assert sum(report["bins"]["evicted_bytes"]) == report["evicted_bytes"]


def test_spread_is_within_its_steps() -> None:
    import numpy as np

    spread = Spread(2)
    values = np.array([0, 1, 127, 10**6, 10**12, 1 << 60])
    spread.add(np.zeros(6, np.int64), values, np.array([1, 1, 1, 1, 1, 95]))
    assert spread.points(1) is None
    assert (spread.points(0) or {})["min"] == 0
    for value in (5, 127, 128, 1000, 10**9, 3 * 10**12):
        one = Spread(1)
        one.add(np.zeros(1, np.int64), np.array([value]), np.array([7]))
        found = one.points(0) or {}
        assert found["min"] == value
        assert found["p50"] == value if value < 128 else abs(found["p50"] / value - 1) < 0.016
        assert one.total(None) == 7


def drawn_and_printed(report: Any, reads: Any) -> str:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert show.draw(report, "png").startswith(b"\x89PNG")
    assert show.draw(report, "svg").startswith(b"<?xml")
    assert show.draw(report, "web").startswith(b"<svg")
    assert show_reread.draw(reads, "png").startswith(b"\x89PNG")
    json.dumps([report, reads])
    text = "".join(show.render(report, 2, Style(80)) + show_reread.render(reads, 2, Style(80)))
    assert text.replace("\n", "").isprintable()
    assert max(map(len, show.render(report, 2, Style(100)).splitlines())) <= 120
    return text


def test_text_and_pictures(trace: Builder) -> None:
    trace.tensor((EVIL, 0, 8 * MB), component=EVIL)
    trace.tensor(("a", 8 * MB, MB), ("b", 9 * MB, MB), layer=3, component="ffn_up")
    move(trace, (100, "add", EVIL, 0, 512), (100, "add", EVIL, 1024, 512), cause="readahead", comm=EVIL)
    move(trace, (150, "add", "a", 2048, 2), (160, "add", "b", 2304, 1), (190, "evict", "b", 2305, 1))
    move(trace, (200, "evict", EVIL, 0, 512), (300, "evict", EVIL, 1024, 512))
    move(trace, (2_000_200, "add", EVIL, 0, 512), cause="readahead", token=4)
    fault(trace, (110, 3, 5))
    opened = open_trace(trace.path)
    text = " ".join(drawn_and_printed(cache(opened), reread(opened)).split())
    assert (
        "6.30 MB came into the page cache, 4.20 MB went out; 50.0% of it left without having been used, 48.4% perhaps"
        in text
    )
    assert "… 1 more tensor, 4.10 kB came in (--top N for more)" in text
    assert "plus what was there when the recording began (4.10 kB at least)" in text
    assert "2.10 MB came back after an eviction that was seen: half of it within 2.01 ms (3 tokens)" in text


def test_text_and_pictures_of_nothing(trace: Builder) -> None:
    trace.write("faults", [])
    opened = open_trace(trace.path)
    assert "the page cache did nothing" in drawn_and_printed(cache(opened), reread(opened))


def test_another_session_does_not_count(trace: Builder) -> None:
    move(trace, (100, "add", "t", 0, 1))
    trace.write("pagecache", [{"tensor_name": "t", "offset_bytes": 0, "bytes": 7}], session="aaaaaaaa-1-1")
    assert cache(open_trace(trace.path, SESSION))["added_bytes"] == PAGE


LAST = (1 << 30) + 16 * 100_000 & -PAGE  # bytes of a file that are followed, of a model of 100,000


def test_the_last_page_that_a_file_can_have_is_followed(trace: Builder) -> None:
    last = LAST // PAGE - 1
    move(trace, (10, "add", "blk.0.a", last, 1), (20, "evict", "blk.0.a", last, 1), (30, "add", "blk.0.a", last, 1))
    fault(trace, (12, last, 5))
    report = cache(open_trace(trace.path))
    assert (report["added_bytes"], report["evicted_bytes"], report["resident_bytes"]) == (2 * PAGE, PAGE, PAGE)
    assert fates(report) == {"used": 1, "pending": 1}


@pytest.mark.parametrize(("page", "pages"), [(LAST // PAGE + 1, 1), (1 << 31, 1), (0, 1 << 30), (-1, 1)])
def test_a_page_that_no_file_has_is_said_to_be_damage(trace: Builder, page: int, pages: int) -> None:
    move(trace, (10, "add", "blk.0.a", page, pages))
    for question in (cache, reread):
        with pytest.raises(LlmtracedError, match="pages that no file has"):
            question(open_trace(trace.path))


def test_a_fault_beyond_any_file_counts_for_no_page(trace: Builder) -> None:
    move(trace, (10, "add", "blk.0.a", 0, 1), (20, "evict", "blk.0.a", 0, 1))
    fault(trace, (12, LAST // PAGE, 5))
    assert fates(cache(open_trace(trace.path))) == {"wasted": 1}
