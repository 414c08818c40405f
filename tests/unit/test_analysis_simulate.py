"""Simulation: replays and predictions of small traces, worked out by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_analysis_pattern import ops
from test_analysis_trace import Builder

from llmtraced.analysis import simulate as module
from llmtraced.analysis.facts import facts
from llmtraced.analysis.measured import Measured
from llmtraced.analysis.simulate import pages, simulate
from llmtraced.analysis.trace import open_trace
from llmtraced.analysis.twolist import TwoLists
from llmtraced.commands import main
from llmtraced.errors import LlmtracedError
from llmtraced.reporters.simulate import draw, render
from llmtraced.reporters.text import Style

MB = 1 << 20
MS = 1_000_000


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "trace")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay few tokens: a real curve takes seconds."""
    for name, value in {"STARTS": ((0.04, 1),), "PREPARE": 2, "COUNTED": 3}.items():
        monkeypatch.setattr(module, name, value)


def dense(trace: Builder, read: int = 10 * MB, stall: int = 40 * MS) -> None:
    """Write 20 tensors of 1 MiB and six tokens of 50 ms that use all of them, read 10 MiB and stall for 40 ms."""
    trace.tensor(*((f"t{at:02}", at * MB, MB) for at in range(20)))
    rows = []
    for token in range(1, 7):
        start = token * 100 * MS
        one = {"token": token, "start_ns": start, "end_ns": start + 50 * MS, "stall_ns": stall, "major_faults": 5}
        rows.append(one | {"bytes_read": read})
        trace.write("ops", ops(token, *(f"t{at:02}" for at in range(20)), start=start))
        if read:
            trace.adds(("t00", 0, read), token=token, timestamp=start + 1)
    trace.write("tokens", rows)


def run(trace: Builder, *rams: int, **more: Any) -> dict[int, dict[str, Any]]:
    report = simulate(open_trace(trace.path), rams, **more)
    return {row["ram_bytes"]: {one["policy"]: one for one in row["policies"]} | row for row in report["curve"]}


def test_predictions_by_hand(trace: Builder) -> None:
    dense(trace)
    rows = run(trace, 12 * MB, window=2 * MB)
    half = rows[12 * MB]
    assert half["pin"]["bytes_per_token"] == half["pin+stream"]["bytes_per_token"] == 10 * MB  # 20 - (12 - 2)
    assert half["pin"]["ns_per_token"] == 50 * MS  # 10 ms, and 10 MiB at 4 ms each
    # 100 MiB/s was the most in 100 ms: 10 MiB take 100 ms and the bound's 8 MiB take 80 ms
    assert half["pin+stream"]["ns_per_token"] == 100 * MS
    assert half["bound_ns_per_token"] == pytest.approx(80 * MS)
    assert half["belady"]["bytes_per_token"] <= half["pin"]["bytes_per_token"]
    assert half["lru"]["ns_per_token"] == pytest.approx(
        10 * MS + half["lru"]["bytes_per_token"] / MB * 4 * MS, rel=1e-6
    )
    for share in (1.0, 1.1):
        whole = rows[round(20 * MB * share)]
        assert {whole[policy]["bytes_per_token"] for policy in module.POLICIES} == {0}
        assert {whole[policy]["tokens_per_second"] for policy in module.POLICIES} == {100.0}
    for low, high in zip(sorted(rows), sorted(rows)[1:], strict=False):
        assert rows[low]["pin"]["bytes_per_token"] >= rows[high]["pin"]["bytes_per_token"]


def test_the_disk_may_be_given(trace: Builder) -> None:
    dense(trace)
    report = simulate(open_trace(trace.path), (12 * MB,), disk_bandwidth=1000 * MB, window=2 * MB)
    assert (report["disk_source"], report["disk_bytes_per_second"]) == ("given", 1000 * MB)
    row = next(row for row in report["curve"] if row["ram_bytes"] == 12 * MB)
    assert row["policies"][2]["ns_per_token"] == 10 * MS, "10 MiB arrive while it computes"
    assert simulate(open_trace(trace.path))["disk_source"] == "trace"


def test_the_window_is_the_sidecars_own(trace: Builder) -> None:
    dense(trace)
    row = run(trace, 19 * MB)[19 * MB]
    assert row["window_bytes"] == (24 + 8) * MB, "its least window, and what it leaves free at least"
    assert row["pin+stream"]["bytes_per_token"] == 20 * MB


def test_figures_of_a_bench_count_instead_of_the_traces(trace: Builder) -> None:
    dense(trace)
    machine = Measured(20 * MB, 8.0 * MS, 200.0 * MB, 3.0 * MS / MB, exposed=0.75, conditions=1)
    report = simulate(open_trace(trace.path), (12 * MB,), window=2 * MB, machine=machine)
    assert (report["disk_source"], report["disk_bytes_per_second"]) == ("bench", 200 * MB)
    row = next(row for row in report["curve"] if row["ram_bytes"] == 12 * MB)
    lru, pin, stream, belady = row["policies"]
    assert lru["ns_per_token"] == pytest.approx(8 * MS + lru["bytes_per_token"] / MB * 3 * MS, rel=1e-6)
    assert pin["ns_per_token"] == 38 * MS, "8 ms, and 10 MiB at 3 ms each"
    assert stream["ns_per_token"] == 56 * MS, "10 MiB take 50 ms, and 6 of 8 ms of computing are not hidden"
    assert belady["ns_per_token"] < stream["ns_per_token"], "the best possible hides all"
    assert row["bound_ns_per_token"] == pytest.approx(40 * MS)
    assert "leaves 75% of the computing exposed" in render(report, Style(120))
    report = simulate(open_trace(trace.path), machine=machine, disk_bandwidth=50 * MB)
    assert report["disk_source"] == "given"
    with pytest.raises(LlmtracedError, match="another model was measured: a token used 42 bytes there"):
        simulate(open_trace(trace.path), machine=Measured(42.0, 1.0, 1.0, None, 0.0, 1))


def test_a_trace_that_read_nothing_needs_the_disk_to_be_given(trace: Builder) -> None:
    dense(trace, read=0, stall=0)
    without = run(trace, 12 * MB)[12 * MB]
    assert [without[policy]["ns_per_token"] for policy in module.POLICIES] == [None] * 4
    with_it = run(trace, 12 * MB, disk_bandwidth=100 * MB, window=2 * MB)[12 * MB]
    assert with_it["pin"]["ns_per_token"] == 150 * MS
    text = render(simulate(open_trace(trace.path)), Style(80))
    assert "the disk's speed is not known: --disk-bandwidth" in text


def test_what_cannot_be_simulated_is_refused(trace: Builder) -> None:
    trace.tensor(("e", 0, 80), n_experts=8, expert_bytes=10, layer=0)
    trace.write("tokens", [{"token": 1, "start_ns": 0, "end_ns": 10}])
    with pytest.raises(LlmtracedError, match="which weights or experts its tokens use was not recorded"):
        simulate(open_trace(trace.path))


def test_pieces_are_where_the_experts_lie(trace: Builder) -> None:
    two = {"n_experts": 2, "expert_bytes": MB, "layer": 0}
    trace.tensor(("up", 0, 2 * MB), ("down", 4 * MB, 2 * MB), **two)
    trace.tensor(("d", 2 * MB, 2 * MB))
    trace.write("tokens", [{"token": t, "start_ns": 100 * t, "end_ns": 100 * t + 50} for t in (1, 2, 3)])
    for t in (1, 2, 3):
        trace.write("ops", ops(t, "d", start=100 * t))
        trace.write("routing", [{"token": t, "timestamp": 100 * t + 30, "layer": 0, "experts": [1], "position": 0}])
    used = facts(open_trace(trace.path)).uses
    assert used is not None
    sizes, tokens = pages(used, MB)
    assert sizes == [256] * 6  # up 0, up 1, d, d, down 0, down 1
    assert tokens == [[2, 3, 1, 5]] * 3


def test_everything_fits(trace: Builder) -> None:
    lists = TwoLists([256] * 10, room=2560, window=4, active=1)
    for piece in range(10):
        lists.touch(piece)
    assert lists.read == 0


def test_a_scan_of_more_than_fits_reads_nearly_all_of_it_each_time() -> None:
    lists = TwoLists([256] * 40, room=20 * 256, window=1, active=0)
    for _ in range(6):
        lists.refresh()
        lists.read = 0
        for piece in range(40):
            lists.touch(piece)
    assert lists.read >= 38 * 256


def test_the_active_list_stays_while_it_is_the_smaller_one() -> None:
    lists = TwoLists([256] * 100, room=60 * 256, window=1, active=10)
    for _ in range(6):
        lists.refresh()
        lists.read = 0
        for piece in range(100):
            lists.touch(piece)
    assert lists.read <= 90 * 256, "the ten pieces on it are never read"


def test_lists_hold_what_they_say_and_no_more_than_fits() -> None:
    dice = random.Random(1)
    sizes = [dice.randint(1, 300) for _ in range(60)]
    lists = TwoLists(sizes, room=sum(sizes) // 2, window=5, active=7)
    for _ in range(3000):
        if dice.random() < 0.02:
            lists.refresh()
        piece = dice.randrange(60)
        lists.touch(piece)
        assert lists._where[piece] != 0
        for where, held in ((1, lists._inactive), (2, lists._active)):
            assert lists._pages[where] == sum(sizes[at] for at in held)
            assert all(lists._where[at] == where for at in held)
        assert sum(lists._pages) <= sum(sizes) // 2 + max(sizes)


def test_text_json_and_picture(trace: Builder, tmp_path: Path, capsys: Any) -> None:
    dense(trace)
    folder = str(trace.path)
    assert main(["simulate", folder, "--ram", "12M", "--disk-bandwidth", "100M/s"]) == 0
    text = capsys.readouterr().out
    assert "each token uses 21.0 MB of 21.0 MB" in text
    assert "disk: 105 MB/s, as given" in text
    out = tmp_path / "out.json"
    assert main(["simulate", folder, "--json", "-o", str(out)]) == 0
    assert len(json.loads(out.read_text())["curve"]) >= len(module.SHARES)
    assert main(["simulate", folder, "--json", "-o", str(out)]) == 1, "it exists"
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert main(["simulate", folder, "--plot", str(tmp_path / "x.svg"), "-o", str(tmp_path / "t")]) == 0
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    assert draw(simulate(open_trace(trace.path)), "png").startswith(b"\x89PNG")
    for width in (80, 120):
        assert max(map(len, render(simulate(open_trace(trace.path)), Style(width)).splitlines())) <= width


@pytest.mark.parametrize("bad", [["--ram", "0"], ["--ram", "-1"], ["--disk-bandwidth", "fast"], ["--window", "0"]])
def test_usage(trace: Builder, bad: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", str(trace.path), *bad])
    assert stopped.value.code == 2
