"""The made-up trace is what it claims to be, and what is measured on it is what it says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced.analysis.reread import reread
from llmtraced.analysis.tokens import tokens
from llmtraced.analysis.trace import Trace, open_trace, verdict
from llmtraced.bench import peak, query, show_query
from llmtraced.bench.synthetic import write_trace
from llmtraced.bench.workload import Cache, Layout, cut, lay_out, shape_of
from llmtraced.commands import bench, main
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.reporters.text import Style
from llmtraced.schema import PAGE

SMALL: dict[str, Any] = {"n_tensors": 33, "model_bytes": 30_000_000}


@pytest.fixture(scope="module", params=[True, False], ids=["moe", "dense"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made") / "trace"
    return folder, write_trace(folder, 60_000, moe=request.param, **SMALL)


@pytest.fixture
def trace(made: tuple[Path, dict[str, Any]]) -> Trace:
    return open_trace(made[0])


@pytest.fixture
def known(made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return made[1]


def rows_of(trace: Trace, name: str) -> pl.DataFrame:
    return trace.table(name).collect()


# --- the trace ----------------------------------------------------------------------------------------------------


def test_it_is_a_whole_trace_of_that_many_rows(trace: Trace, known: dict[str, Any]) -> None:
    assert trace.notes == ()
    assert verdict(trace.account) == "complete"
    assert sum(trace.rows.values()) == pytest.approx(60_000, rel=0.03)
    assert known["rows"] == dict(trace.rows)
    assert trace.tensors.height >= SMALL["n_tensors"]
    assert trace.rows["faults"] == pytest.approx(0.55 * 60_000, rel=0.05)
    files = list(trace.path.rglob("*.parquet"))
    assert sum(f.stat().st_size for f in files) == sum(known["disk_bytes"].values())


def test_the_routing_is_there_if_and_only_if_there_are_experts(trace: Trace) -> None:
    experts = trace.tensors["n_experts"].max()
    assert (trace.rows["routing"] > 0) == (experts == 64)


def test_rows_are_in_time_order_over_all_files_and_in_their_token(trace: Trace) -> None:
    spans = rows_of(trace, "tokens").select("token", "start_ns", "end_ns")
    assert spans["token"].to_list() == list(range(spans.height))
    assert (spans["start_ns"][1:] > spans["end_ns"][:-1]).all()
    for name in ("faults", "pagecache", "ops", "routing"):
        rows = rows_of(trace, name).join(spans, on="token", how="left")
        assert rows["timestamp"].is_sorted(), name
        inside = (rows["timestamp"] >= rows["start_ns"]) & (rows["timestamp"] <= rows["end_ns"])
        assert inside.all(), name


def test_a_page_comes_when_it_is_away_and_goes_when_it_is_there(trace: Trace) -> None:
    there: set[tuple[Any, ...]] = set()
    for row in rows_of(trace, "pagecache").iter_rows(named=True):
        first, last = row["offset_bytes"] // PAGE, (row["offset_bytes"] + row["bytes"] - 1) // PAGE
        pages = {(row["tensor_name"], row["expert"], page) for page in range(first, last + 1)}
        if row["action"] == "add":
            assert not pages & there
            there |= pages
        else:
            assert pages <= there
            there -= pages
    size = trace.meta["models"][0]["size_bytes"]
    assert 0.2 * size < len(there) * PAGE < 0.9 * size


def test_rows_lie_in_their_tensor_and_expert(trace: Trace) -> None:
    tensors = trace.tensors.select("tensor_name", "n_experts", "expert_bytes", "size_bytes", start="offset_bytes")
    for name in ("pagecache", "faults"):
        rows = rows_of(trace, name).with_columns(pl.col("tensor_name").cast(pl.String))
        if name == "faults":
            rows = rows.with_columns(bytes=1)
        named = rows.join(tensors, on="tensor_name")
        assert named.height == rows["tensor_name"].drop_nulls().len() > 100
        merged = pl.col("n_experts") > 0
        low = pl.col("start") + pl.when(merged).then(pl.col("expert") * pl.col("expert_bytes")).otherwise(0)
        high = low + pl.when(merged).then(pl.col("expert_bytes")).otherwise(pl.col("size_bytes"))
        good = (pl.col("offset_bytes") >= low) & (pl.col("offset_bytes") + pl.col("bytes") <= high)
        assert named.select((good & ((pl.col("expert") >= 0) == merged)).all()).item()


def test_every_token_has_the_same_operators(trace: Trace) -> None:
    ops = rows_of(trace, "ops").with_columns(pl.col("tensor_name").cast(pl.String))
    sequences = ops.group_by("token", maintain_order=True).agg("tensor_name")["tensor_name"].to_list()
    assert len(sequences) == trace.rows["tokens"] - 1
    assert len(sequences[0]) > 15
    assert all(sequence == sequences[0] for sequence in sequences)
    assert "token_embd.weight" not in sequences[0]


@pytest.mark.parametrize("made", [True], ids=["moe"], indirect=True)
def test_the_experts_chosen_are_those_touched(trace: Trace) -> None:
    routing = rows_of(trace, "routing")
    assert routing["experts"].list.n_unique().unique().to_list() == [4]
    prompt = routing.filter(pl.col("token") == 1)
    assert prompt["position"].unique().sort().to_list() == list(range(8))
    chosen = routing.explode("experts").select("token", "layer", expert="experts").unique()
    layers = trace.tensors.select("tensor_name", "layer")
    used = rows_of(trace, "faults").filter(pl.col("expert") >= 0).with_columns(pl.col("tensor_name").cast(pl.String))
    used = used.join(layers, on="tensor_name").select("token", "layer", "expert").unique()
    assert used.height > 100
    assert used.join(chosen, on=["token", "layer", "expert"], how="anti").is_empty()
    sizes = rows_of(trace, "ops").filter(pl.col("op") == "mul_mat_id").with_columns(pl.col("tensor_name").cast(str))
    sizes = (
        sizes.join(trace.tensors, on="tensor_name")
        .group_by("token", "layer")
        .agg(pl.col("bytes_accessed").first(), pl.col("expert_bytes").first())
    )
    counts = chosen.group_by("token", "layer").len().join(sizes, on=["token", "layer"])
    assert counts.select((pl.col("len") * pl.col("expert_bytes") == pl.col("bytes_accessed")).all()).item()


@pytest.mark.parametrize("made", [False], ids=["dense"], indirect=True)
def test_a_dense_model_is_read_again_for_every_token(trace: Trace) -> None:
    each = trace.tensors.filter(pl.col("tensor_name") != "token_embd.weight")["size_bytes"].sum()
    read = rows_of(trace, "tokens").filter(pl.col("token") > 0)["bytes_read"]
    assert read.to_list() == [each] * read.len()


def test_the_totals_are_those_of_the_reports(trace: Trace, known: dict[str, Any]) -> None:
    report = reread(trace)
    assert report["total_bytes_read"] == known["total_bytes_read"]
    assert report["unique_bytes"] == known["unique_bytes"] == trace.meta["models"][0]["size_bytes"]
    for tensor in report["tensors"]:
        figures = known["tensors"][tensor["tensor_name"]]
        assert {key: tensor[key] for key in figures} == figures  # type: ignore[literal-required]
    assert len(report["tensors"]) == len(known["tensors"])
    assert len(tokens(trace)["tokens"]) == known["tokens"]


def test_the_totals_are_those_of_the_rows(trace: Trace, known: dict[str, Any]) -> None:
    adds = rows_of(trace, "pagecache").filter(pl.col("action") == "add")
    by_cause = adds.group_by(pl.col("cause").cast(pl.String)).agg(pl.col("bytes").sum())
    assert dict(by_cause.iter_rows()) == known["bytes_by_cause"]
    faults = rows_of(trace, "faults")
    assert known["faults"] == {
        "major": faults["major"].sum(),
        "minor": (~faults["major"]).sum(),
        "unknown": faults["major"].null_count(),
        "stall_ns": faults["latency_ns"].sum(),
    }
    per_token = faults.group_by("token").agg(pl.col("latency_ns").sum()).sort("token")
    of_tokens = rows_of(trace, "tokens").join(per_token, on="token")
    assert of_tokens["fault_ns"].to_list() == of_tokens["latency_ns"].to_list()


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.parquet")):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_trace(tmp_path / name, 20_000, seed=seed, **SMALL)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_files_are_as_many_as_a_recording_has(tmp_path: Path) -> None:
    seen: list[int] = []
    write_trace(tmp_path / "t", 500_000, progress=seen.append, **SMALL)
    assert 4 <= len(list((tmp_path / "t" / "faults").iterdir())) <= 8  # the recorder writes each 131,072 records
    assert seen == sorted(seen)
    assert len(seen) >= 4


def test_no_rows_is_an_empty_trace(tmp_path: Path) -> None:
    known = write_trace(tmp_path / "t", 0, **SMALL)
    trace = open_trace(tmp_path / "t")
    assert [name for name, rows in trace.rows.items() if rows] == ["tensors"]
    assert reread(trace)["total_bytes_read"] == known["total_bytes_read"] == known["unique_bytes"] == 0


# --- its parts ----------------------------------------------------------------------------------------------------


@given(
    stretches=st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=12), min_size=1),
    window=st.integers(0, 40),
)
def test_the_cache_against_one_byte_after_the_other(stretches: list[list[tuple[int, int]]], window: int) -> None:
    cache = Cache(5, window)
    last: dict[int, int] = {}
    at = 0
    for stretch in stretches:
        begin, pieces, positions = at, [], []
        added, evicted = set(), set()
        for piece, size in stretch:
            for now in range(at, at + size):  # at each position those go whose time is over, then this one is used
                evicted |= {(p, last.pop(p) + window) for p, used in list(last.items()) if used + window < now}
                if now == at:
                    if piece not in last:
                        added.add((piece, now))
                    last[piece] = now
            pieces.append(piece)
            positions.append(at)
            at += size
        evicted |= {(p, last.pop(p) + window) for p, used in list(last.items()) if used + window < at}
        got = cache.use(np.array(pieces), np.array(positions), begin, at)
        assert sorted(zip(*(a.tolist() for a in got[0]), strict=True)) == sorted(added)
        assert sorted(zip(*(a.tolist() for a in got[1]), strict=True)) == sorted(evicted)


@settings(deadline=None)
@given(wanted=st.integers(1, 5000), seed=st.integers(0, 99), moe=st.booleans())
def test_runs_tile_what_they_are_cut_from(wanted: int, seed: int, moe: bool) -> None:
    layout = Layout(lay_out(shape_of(13, 40_000_000, moe)))
    pieces = np.arange(len(layout.size))
    piece, offset, size = cut(layout, pieces, wanted, np.random.default_rng(seed))
    assert size.min() > 0
    assert size.max() <= 1025 * PAGE
    assert np.array_equal(np.minimum.reduceat(offset, np.searchsorted(piece, pieces)), layout.start)
    assert np.array_equal(np.bincount(piece, size), layout.size)
    same = piece[1:] == piece[:-1]
    assert np.array_equal(offset[1:][same], (offset + size)[:-1][same])
    assert (offset[1:][same] % PAGE == 0).all()  # pages are not cut


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1000, 4_000_000_000), (110, 2_000_000_000), (33, 30_000_000)])
def test_shapes(n: int, size: int, moe: bool) -> None:
    model = lay_out(shape_of(n, size, moe))
    assert n <= len(model.tensors) < n + 10
    assert model.shards[0].size == pytest.approx(size, rel=0.1)
    assert {t.n_experts for t in model.tensors} == ({0, 64} if moe else {0})
    assert all(t.expert_bytes * t.n_experts == t.size for t in model.tensors if t.n_experts)


# --- what is measured ---------------------------------------------------------------------------------------------


def measured(*command: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-I", "-S", peak.__file__, *command], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_peak_is_that_of_the_command_alone() -> None:
    ours = np.ones(40_000_000)  # 320 MB in this process are not the child's
    python = (sys.executable, "-I", "-S", "-c")
    small = measured(*python, "print('not JSON')")
    large = measured(*python, "x = b'1' * 200_000_000; y = sum(range(2_000_000)); raise SystemExit(3)")
    assert len(ours)
    assert (small["code"], large["code"]) == (0, 3)
    assert small["peak_rss_bytes"] < 60e6
    assert 200e6 < large["peak_rss_bytes"] < 260e6
    assert 0.005 < large["cpu_seconds"] < large["seconds"] * 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kept = tmp_path_factory.mktemp("bench") / "kept"
    return query.run(rows=30_000, reports=["reread", "tokens", "reread"], rounds=2, trace=kept, **SMALL)


def test_figures(report: dict[str, Any]) -> None:
    json.dumps(report)
    assert list(report["reports"]) == ["reread", "tokens"]
    for figures in report["reports"].values():
        for key in ("seconds", "peak_rss_bytes"):
            assert len(figures[key]["values"]) == len(figures["empty"][key]["values"]) == 2
        assert 0.05 < figures["seconds"]["median"] < 60
        assert 50e6 < figures["empty"]["peak_rss_bytes"]["median"] < figures["peak_rss_bytes"]["median"] < 1e9
        more = figures["peak_rss_bytes"]["median"] - figures["empty"]["peak_rss_bytes"]["median"]
        assert figures["state_bytes_per_row"] == pytest.approx(more / report["trace"]["rows"], abs=0.001)
        assert figures["json_bytes"] > 1000
    assert report["targets"]["seconds"]["met"] == {"reread": True, "tokens": True}
    assert report["trace"]["rows"] == sum(report["trace"]["rows_by_table"].values()) == pytest.approx(30_000, rel=0.03)
    assert report["verified"] == ["reread", "tokens"]
    assert {"polars", "cores", "cpu"} <= set(report["machine"])
    assert report["settings"]["rounds"] == 2


def test_a_kept_trace_is_used_again_and_another_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first = query.run(rows=20_000, reports=["reread"], rounds=1, trace=kept, **SMALL)
    before = digest(kept)
    second = query.run(rows=20_000, reports=["reread"], rounds=1, trace=kept, **SMALL)
    assert first["trace"]["write_seconds"] is not None
    assert second["trace"]["write_seconds"] is None
    assert second["trace"] | {"write_seconds": 0} == first["trace"] | {"write_seconds": 0}
    with pytest.raises(LlmtracedError, match="holds something else") as error:
        query.run(rows=20_001, reports=["reread"], rounds=1, trace=kept, **SMALL)
    assert error.value.exit_code == USAGE
    assert digest(kept) == before


def test_a_report_with_wrong_figures_has_failed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    query.run(rows=20_000, reports=["tokens"], rounds=1, trace=kept, **SMALL)
    note = json.loads((kept / "synthetic.json").read_text())
    note["known"]["tensors"]["output.weight"]["minor_faults"] += 1
    (kept / "synthetic.json").write_text(json.dumps(note))
    found = query.run(rows=20_000, reports=["reread", "tokens"], rounds=2, trace=kept, **SMALL)
    assert set(found["reports"]["reread"]) == {"failed"}
    assert "tensors.output.weight.minor_faults is" in found["reports"]["reread"]["failed"]
    assert found["targets"]["seconds"]["met"] == {"reread": False, "tokens": True}


def test_a_report_that_breaks_down_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "QUESTIONS", {"nonsense": None, "tokens": None})
    found = query.run(rows=20_000, rounds=1, **SMALL)
    assert "exit code 2" in found["reports"]["nonsense"]["failed"]
    assert found["reports"]["tokens"]["seconds"]["median"] > 0
    assert found["targets"]["peak_rss_bytes"]["met"] == {"nonsense": False, "tokens": True}
    text = show_query.render_query(found, Style())
    assert "nonsense: exit code 2" in text
    assert "missed (nonsense)" in text


def test_a_report_without_an_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "_DEADLINE_SECONDS", 0.05)
    found = query.run(rows=20_000, reports=["reread"], rounds=2, **SMALL)
    assert found["reports"]["reread"]["failed"].startswith("no answer within")


def test_unknown_reports_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(LlmtracedError, match=r"no such report: every\\x1bthing; there are summary") as error:
        query.run(rows=20_000, reports=["reread", "every\x1bthing"], trace=tmp_path / "t")
    assert error.value.exit_code == USAGE
    assert list(tmp_path.iterdir()) == []


def test_goals() -> None:
    def figures(seconds: float, rss: float) -> dict[str, Any]:
        return {"seconds": {"median": seconds}, "peak_rss_bytes": {"median": rss}}

    found = query.targets({"a": figures(10.0, 2.1e9), "b": figures(10.1, 2e9), "c": {"failed": "so"}})
    assert found["seconds"] == {"limit": "<= 10", "met": {"a": True, "b": False, "c": False}}
    assert found["peak_rss_bytes"]["met"] == {"a": False, "b": True, "c": False}


# --- how it is asked for and shown --------------------------------------------------------------------------------


def test_text(report: dict[str, Any]) -> None:
    text = show_query.render_query(report, Style(200))
    assert "mixture of experts" in text
    assert "target seconds <= 10: met" in text
    assert "the targets are for 100,000,000 rows" in text
    row = next(line for line in text.splitlines() if line.startswith("tokens"))
    assert f"{report['reports']['tokens']['seconds']['median']:.2f}" in row
    assert max(map(len, show_query.render_query(report, Style(80)).splitlines()[6:])) <= 80


@pytest.mark.parametrize("picture", ["png", "svg"])
def test_picture(report: dict[str, Any], picture: str) -> None:
    pytest.importorskip("matplotlib")
    begin = b"\x89PNG" if picture == "png" else b"<?xml"
    assert show_query.plot_query(report, picture).startswith(begin)
    nothing = report | {"reports": {"reread": {"failed": "exit code 1"}}}
    assert show_query.plot_query(nothing, picture).startswith(begin)


@pytest.mark.parametrize(
    ("word", "rows"), [("100M", 10**8), ("1.5g", 1_500_000_000), ("20k", 20_000), ("7", 7), ("0.5M", 500_000)]
)
def test_numbers_of_rows(word: str, rows: int) -> None:
    assert bench._rows(word) == rows


@pytest.mark.parametrize("word", ["", "0", "-5", "M", "5MB", "1e6", "0.1"])
def test_what_is_no_number_of_rows(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "query", f"--rows={word}"]) == 2
    assert "not a number of rows" in capsys.readouterr().err


def run_cli(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_the_command_needs_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(**wanted: Any) -> dict[str, Any]:
        asked.update(wanted)
        return {"reports": {}}

    monkeypatch.setattr(query, "run", run)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    words = ["bench", "query", "--rows", "2M", "--rounds", "5", "--report", "tokens", "--report", "reread"]
    words += ["--tensors", "110", "--dense", "--trace", str(tmp_path / "t"), "--json", "-o", str(tmp_path / "out")]
    assert run_cli(words) == 0
    assert asked == {
        "rows": 2_000_000,
        "rounds": 5,
        "reports": ["tokens", "reread"],
        "trace": tmp_path / "t",
        "n_tensors": 110,
        "moe": False,
    }
    assert json.loads((tmp_path / "out").read_text()) == {"reports": {}}
