"""Old traces go, by age and by size, and what is left can still be read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtraced import retention
from llmtraced.retention import Keeper, Stored, expired
from llmtraced.schema import TABLES
from llmtraced.store import TraceWriter

DAY = 86_400.0


def stored(session: str, table: str, written: float, size: int = 10) -> Stored:
    return Stored(Path(f"{table}/{session}-{written:g}"), table, session, written, size)


FILES = [
    stored("a", "tensors", 0, 5),
    stored("a", "faults", 1),
    stored("a", "tokens", 2),
    stored("b", "tensors", 2, 5),
    stored("b", "faults", 3),
    stored("b", "faults", 9),
    stored("idle", "tensors", 3, 5),
]


def gone(keep_seconds: float, keep_bytes: int, running: tuple[str, ...] = (), now: float = 10) -> list[str]:
    return [str(f.path) for f in expired(FILES, now, keep_seconds, keep_bytes, running)]


@pytest.mark.parametrize(
    ("keep_seconds", "keep_bytes", "running", "expected"),
    [
        (0, 0, (), []),
        (100, 1000, (), []),
        (8.5, 0, (), ["faults/a-1"]),
        (7.5, 0, (), ["faults/a-1", "tokens/a-2", "tensors/a-0"]),
        (7.5, 0, ("a",), ["faults/a-1", "tokens/a-2"]),
        (6.5, 0, (), ["faults/a-1", "tokens/a-2", "tensors/a-0", "faults/b-3", "tensors/idle-3"]),
        (0, 54, (), ["faults/a-1"]),
        (0, 44, (), ["faults/a-1", "tokens/a-2", "tensors/a-0"]),
        (0, 1, ("b",), ["faults/a-1", "tokens/a-2", "tensors/a-0", "faults/b-3", "faults/b-9", "tensors/idle-3"]),
    ],
)
def test_what_goes(keep_seconds: float, keep_bytes: int, running: tuple[str, ...], expected: list[str]) -> None:
    assert gone(keep_seconds, keep_bytes, running) == expected


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(sorted(TABLES)), st.integers(0, 50), st.integers(0, 100)),
        max_size=30,
        unique_by=lambda f: (f[0], f[1], f[2]),
    ),
    st.integers(0, 50),
    st.integers(0, 500),
)
def test_rows_are_never_left_without_their_tensors(
    described: list[tuple[str, str, int, int]], age: int, size: int
) -> None:
    files = [stored(*f) for f in described]
    doomed = expired(files, 50, age, size)
    left = [f for f in files if f not in doomed]
    assert len(doomed) == len(set(doomed))
    had = {f.session for f in files if f.table == "tensors"}
    rows = [f for f in left if f.table != "tensors"]
    assert {f.session for f in rows} & had <= {f.session for f in left if f.table == "tensors"}
    assert not age or all(50 - f.written <= age for f in rows)
    assert not size or not rows or sum(f.size for f in left) <= size
    newest = max((f.written for f in doomed if f.table != "tensors"), default=-1)
    assert all(f.written >= newest for f in rows), "the oldest go first"


def write(folder: Path, session: str, partition: str, age: float) -> None:
    writer = TraceWriter(folder, session, {}, partition)
    for name in ("tensors", "faults"):
        writer.write(name, pa.table({n: [] for n in TABLES[name].names}, TABLES[name]), name, {})
        for path in (folder / name / partition).glob(f"{session}-*"):
            os.utime(path, (time.time() - age, time.time() - age))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("**/*.parquet")}


def test_only_the_daemon_s_own_files_are_deleted(tmp_path: Path) -> None:
    write(tmp_path, "old", "host=h/model=m/date=1", 9 * DAY)
    write(tmp_path, "new", "host=h/model=m/date=2", 0)
    write(tmp_path, "recorded", "", 9 * DAY)
    (tmp_path / "faults" / "host=h" / "model=m" / "date=1" / "notes.txt").write_text("mine")
    keeper = Keeper(tmp_path, 8 * DAY, 0)
    keeper.prune()
    assert names(tmp_path) == {"new-000000.parquet", "recorded-000000.parquet"}
    assert keeper.deleted == 2
    assert keeper.bytes == sum(p.stat().st_size for p in tmp_path.glob("*/host=*/**/*.parquet"))
    assert not (tmp_path / "tensors" / "host=h" / "model=m" / "date=1").exists(), "empty folders go as well"
    assert (tmp_path / "faults" / "host=h" / "model=m" / "date=1" / "notes.txt").exists()


def test_by_size(tmp_path: Path) -> None:
    for n in range(5):
        write(tmp_path, f"s{n}", "host=h/model=m/date=1", (9 - n) * DAY)
    Keeper(tmp_path, 0, 2 * sum(p.stat().st_size for p in tmp_path.glob("**/s0-*"))).prune()
    assert names(tmp_path) == {"s3-000000.parquet", "s4-000000.parquet"}


@pytest.mark.parametrize("step", [-9 * DAY, -0.9 * DAY, 0.9 * DAY, 9 * DAY, 4e9])
def test_a_clock_that_is_set_deletes_nothing(tmp_path: Path, step: float) -> None:
    wall = [0.0]
    keeper = Keeper(tmp_path, DAY, 0, lambda: time.time() + wall[0])
    for session, age in (("gone", 1.1 * DAY), ("before", 0.9 * DAY)):
        write(tmp_path, session, "host=h/model=m/date=1", age)
    keeper.prune()
    wall[0] = step
    write(tmp_path, "after", "host=h/model=m/date=1", -step)
    keeper.prune()
    assert names(tmp_path) == {"before-000000.parquet", "after-000000.parquet"}


def test_whoever_starts_then_believes_the_clock(tmp_path: Path) -> None:
    write(tmp_path, "s", "host=h/model=m/date=1", 0)
    Keeper(tmp_path, DAY, 0, lambda: 4e9).prune()
    assert names(tmp_path) == set()


def test_age_goes_on_while_the_machine_is_suspended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "s", "host=h/model=m/date=1", 0)
    slept = [0.0]
    boottime = time.clock_gettime
    monkeypatch.setattr(retention.time, "clock_gettime", lambda which: boottime(which) + slept[0])
    keeper = Keeper(tmp_path, DAY, 0, lambda: time.time() + slept[0])
    keeper.prune()
    assert names(tmp_path) == {"s-000000.parquet"}
    slept[0] = 2 * DAY
    keeper.prune()
    assert names(tmp_path) == set()


def test_a_folder_that_may_not_be_changed_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "s", "host=h/model=m/date=1", 9 * DAY)

    def read_only(*_args: object, **_options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    keeper = Keeper(tmp_path, DAY, 0)
    keeper.prune()
    assert keeper.deleted == 0
    assert "Read-only file system" in caplog.text
