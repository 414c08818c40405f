"""What is kept for the next time: taken back only if nobody else could have written it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtraced import kept


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LLMTRACED_CACHE": "/a", "CACHE_DIRECTORY": "/b", "XDG_CACHE_HOME": "/c", "HOME": "/d"}, "/a"),
        ({"CACHE_DIRECTORY": "/b", "XDG_CACHE_HOME": "/c", "HOME": "/d"}, "/b"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/d"}, "/c/llmtraced"),
        ({"HOME": "/d"}, "/d/.cache/llmtraced"),
    ],
)
def test_where(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("LLMTRACED_CACHE", "CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert kept.folder() == Path(expected)


def test_a_service_without_a_home_has_that_of_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMTRACED_CACHE", "CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    without = kept.folder()
    monkeypatch.setenv("HOME", "/")
    assert kept.folder() == without
    assert without.parts[-2:] == (".cache", "llmtraced")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "one.kind"
    kept.write(path, b"data", most=3)
    assert kept.read(path) == b"data"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_what_others_could_have_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.kind"
    assert kept.read(path) is None
    kept.write(path, b"data", most=3)
    for mode in (0o620, 0o602):
        path.chmod(mode)
        assert kept.read(path) is None
    path.chmod(0o644)
    assert kept.read(path) == b"data"
    link = tmp_path / "link.kind"
    link.symlink_to(path)
    assert kept.read(link) is None
    os.mkfifo(tmp_path / "fifo.kind")
    assert kept.read(tmp_path / "fifo.kind") is None, "and nothing is waited for"
    with path.open("r+b") as stream:
        stream.truncate(17 << 20)
    assert kept.read(path) is None
    path.write_bytes(b"data")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert kept.read(path) is None


def test_the_newest_stay(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    for number in range(5):
        path = tmp_path / f"{number}.kind"
        kept.write(path, b"data", most=3)
        os.utime(path, (number, number + 1))
    assert {one.name for one in tmp_path.iterdir()} == {"2.kind", "3.kind", "4.kind", "other"}


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.kind"
    kept.write(path, b"old", most=3)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        kept.write(path, b"new", most=3)
    assert kept.read(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]
