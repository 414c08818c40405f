"""Which bytes of a file are in the page cache, asked in two ways."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llmtraced import residency
from llmtraced.errors import NO_PERMISSION, LlmtracedError
from llmtraced.schema import PAGE


@pytest.fixture(params=["cachestat", "mincore"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "mincore":
        monkeypatch.setattr(residency, "_cachestat_pages", lambda fd, spans: None)
    return str(request.param)


def test_all_of_a_file_that_was_just_written(tmp_path: Path, way: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * PAGE + 5))
    assert residency.resident_bytes(path) == 3 * PAGE + 5
    assert residency.resident_parts(path, [(0, PAGE), (10, 20), (PAGE - 1, 2), (3 * PAGE, 5), (7, 0)]) == [
        PAGE,
        20,
        2,
        5,
        0,
    ]


def test_parts(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole was never read, so its pages are not there: of ten pages the first four are."""
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write(bytes(4 * PAGE))
        file.truncate(10 * PAGE)
    assert residency.resident_bytes(path) == 4 * PAGE
    parts = [(0, 10 * PAGE), (3 * PAGE, 2 * PAGE), (4 * PAGE, 6 * PAGE), (3 * PAGE + 96, PAGE), (20 * PAGE, PAGE)]
    assert residency.resident_parts(path, parts) == [4 * PAGE, PAGE, 0, PAGE // 2, 0]


def test_windows_of_mincore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_MINCORE_WINDOW", 2 * PAGE)
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.seek(3 * PAGE)
        file.write(bytes(PAGE))
        file.truncate(5 * PAGE + 1)
        file.flush()
        with path.open("rb") as same:
            assert residency._mincore_pages(same.fileno(), 5 * PAGE + 1).tolist() == [0, 0, 0, 1, 0, 0]


def test_an_empty_file(tmp_path: Path, way: str) -> None:
    path = tmp_path / "f"
    path.touch()
    assert residency.resident_bytes(path) == 0


def test_a_file_that_the_kernel_will_not_tell_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, spans: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(residency, "_cachestat_pages", refuse)
    path = tmp_path / "f\x1b"
    path.touch()
    with pytest.raises(LlmtracedError, match=r"f\\x1b are cached: Operation not permitted; run as root") as caught:
        residency.resident_bytes(path)
    assert caught.value.exit_code == NO_PERMISSION
