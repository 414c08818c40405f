"""The sidecar's steps as a service: which process a unit's server is, and descriptors on their way between two."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmtraced import children
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.prefetch import unit


def process(proc: Path, pid: int, cgroup: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text(cgroup)


def test_processes_of_a_unit(tmp_path: Path) -> None:
    group = "/system.slice/llama-server.service"
    process(tmp_path, 10, f"5:memory:/elsewhere\n1:name=systemd:{group}\n0::/\n")
    process(tmp_path, 11, f"0::{group}\n")
    process(tmp_path, 12, f"0::{group}/workers\n")
    process(tmp_path, 13, f"0::{group}2\n")
    process(tmp_path, 14, f"5:memory:{group}\n0::/\n")
    (tmp_path / "15").mkdir()  # ended meanwhile
    (tmp_path / "self").mkdir()
    assert sorted(unit._processes(group, tmp_path)) == [10, 11, 12]
    assert unit._processes("", tmp_path) == [], "a unit that does not run has no group, and not all processes"


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "there is no unit x\\x1b"),
        ({"LoadState": "loaded", "ActiveState": "failed"}, "is not running; systemctl start"),
    ],
)
def test_a_unit_without_a_server(shown: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "_show", lambda _: shown)
    with pytest.raises(LlmtracedError) as caught:
        unit.server_of("x\x1b")
    assert why in str(caught.value)
    assert "\x1b" not in str(caught.value)


CHILD = """
import os, sys
from llmtraced.prefetch import unit
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="sidecar")
os.dup2(int(sys.argv[1]), 3)
def execute(config):
    print([(n, os.pread(n, 99, 0).decode(), os.get_inheritable(n)) for n in [config, *map(int, sys.argv[2:])]])
unit.execute = execute
unit.take_over()
"""


def test_descriptors_arrive_under_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for name in ("config", "one", "two"):
            (tmp_path / name).write_text(name)
        opened = [os.open(tmp_path / name, os.O_RDONLY) for name in ("config", "one", "two")]
        # The lowest numbers are those that systemd passes descriptors under: they must not be in each other's way.
        config, one, two = opened
        unit.hand_over(config, [one, two, one])
        for fd in opened:
            os.close(fd)
        assert systemd.recv(99).startswith(b"FDSTOREREMOVE=1")
        text, ancillary, _, _ = systemd.recvmsg(99, socket.CMSG_SPACE(4))
        assert b"FDNAME=sidecar" in text
        (kept,) = array.array("i", ancillary[0][2])
    env = children.environment()
    command = [sys.executable, "-c", CHILD, str(kept), str(one), str(two)]
    done = subprocess.run(command, pass_fds=[kept], env=env, capture_output=True, text=True, check=False)
    os.close(kept)
    assert done.returncode == 0, done.stderr
    expected = [(config, "config", True), (one, "one", True), (two, "two", True)]
    assert done.stdout == f"{expected}\n"


def test_steps_outside_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("LISTEN_PID", raising=False)
    for step in (lambda: unit.hand_over(0, []), unit.take_over):
        with pytest.raises(LlmtracedError, match="a step of a unit's") as caught:
            step()
        assert caught.value.exit_code == USAGE
    with pytest.raises(LlmtracedError, match="more than the 253"):
        unit.hand_over(0, list(range(1, 300)))


def test_joining_the_group_of_a_server_that_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    unit.join(1 << 22, os.getpid())
    assert caplog.messages == []
