"""What is said to systemd and what it hands over, with a socket in its place."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtraced import service


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield heard


def received(systemd: socket.socket) -> tuple[str, list[int]]:
    text, ancillary, _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(4 * 300))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    return text.decode(), list(fds)


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert service.notify("READY=1") is False
    assert service.store("x", 0) is False
    assert service.stored({}) == {}


def test_words_and_descriptors_arrive(systemd: socket.socket, tmp_path: Path) -> None:
    assert service.notify("READY=1\nSTATUS=waiting")
    assert received(systemd) == ("READY=1\nSTATUS=waiting", [])
    with (tmp_path / "file").open("wb") as stream:
        assert service.store("sidecar", stream.fileno())
        assert received(systemd)[0] == "FDSTOREREMOVE=1\nFDNAME=sidecar", "the one of a run before goes first"
        text, (fd,) = received(systemd)
        assert text == "FDSTORE=1\nFDNAME=sidecar\nFDPOLL=0"
        assert os.path.samestat(os.fstat(fd), os.fstat(stream.fileno()))
        os.close(fd)


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0llmtraced-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@llmtraced-test-{os.getpid()}")
        assert service.notify("STOPPING=1")
        assert received(heard) == ("STOPPING=1", [])


def test_nobody_listens_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert service.notify("READY=1") is False


def test_the_watchdog_hears_of_rounds_and_of_nothing_else(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(service.time, "monotonic", lambda: clock[0])
    watchdog = service.Watchdog({"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": str(os.getpid())})
    with pytest.raises(BlockingIOError):
        received(systemd)
    watchdog.alive()
    assert received(systemd) == ("WATCHDOG=1", [])
    clock[0] += 1.9
    watchdog.alive()
    with pytest.raises(BlockingIOError):
        received(systemd)
    clock[0] += 0.2
    watchdog.alive()
    assert received(systemd) == ("WATCHDOG=1", [])


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "none"}]
)
def test_a_watchdog_that_is_not_ours(environment: dict[str, str], systemd: socket.socket) -> None:
    service.Watchdog(environment).alive()
    with pytest.raises(BlockingIOError):
        received(systemd)


def test_descriptors_are_found_by_name() -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    assert service.stored(environment) == {"a": 3, "b": 4}
    assert service.stored(environment | {"LISTEN_PID": "1"}) == {}, "they are another process's"
