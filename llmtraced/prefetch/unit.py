"""The sidecar as a service: what systemd/llmtraced-prefetch@.service runs, one step after another.

The clock takes BPF; joining another unit's cgroup and opening a model that is not everybody's take root. The sidecar
needs none of it once its descriptors are open. So a privileged step opens all of them, puts them into a socket and has
systemd keep that (sd_pid_notify_with_fds(3), FDSTORE); the unprivileged main process takes them out. Nothing has a name
in any file system, and everything is closed when the unit stops, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from llmtraced.cgroup import cgroup_of
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.service import store, stored
from llmtraced.target import scan

__all__ = ["execute", "hand_over", "hold", "is_sidecar", "join", "memory_file", "server_of", "take_over"]

log = logging.getLogger(__name__)

_NAME: Final = "sidecar"
_MOST_FDS: Final = 253  # SCM_MAX_FD: descriptors in one message
_MOST_BYTES: Final = 1 << 14
_OUT_OF_THE_WAY: Final = 512  # above what systemd passes, and what a launcher has open
_LOOK_SECONDS: Final = 0.5
_TELL_SECONDS: Final = 30.0

_CODE: Final = (
    "import sys; sys.path[:0] = sys.argv[2:]; from llmtraced.prefetch.{} import main; "
    "raise SystemExit(main(int(sys.argv[1])))"
)
_SIDECAR, _HOLD = _CODE.format("sidecar"), _CODE.format("hold")


def is_sidecar(command: Sequence[str]) -> bool:
    """Tell whether a process's arguments are those of a sidecar: it has a model mapped, but is no server."""
    return _SIDECAR in command or _HOLD in command


def server_of(unit: str) -> int:
    """Return the process of a unit that has a model mapped, the largest; wait for it while the unit runs.

    Raises:
        LlmtracedError: there is no such unit, or it does not run.
    """
    told = time.monotonic()
    while True:
        shown = _show(unit)
        if shown.get("LoadState") != "loaded":
            raise LlmtracedError(f"there is no unit {printable(unit)}; systemctl list-units names them", USAGE)
        if shown.get("ActiveState") not in ("active", "activating", "reloading"):
            raise LlmtracedError(f"{printable(unit)} is not running; systemctl start {printable(unit)}")
        found = [t for t in scan(_processes(shown["ControlGroup"])) if t.mapped_bytes]
        if found:
            return max(found, key=lambda target: target.mapped_bytes).pid
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            log.info("waiting for %s to map a model", printable(unit))
        time.sleep(_LOOK_SECONDS)


def _show(unit: str) -> dict[str, str]:
    """Return what systemd says of a unit."""
    command = ["systemctl", "show", "-p", "LoadState,ActiveState,ControlGroup", "--", unit]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LlmtracedError(f"cannot run systemctl: {error.strerror}") from error
    if done.returncode:
        raise LlmtracedError(f"systemctl knows nothing of {printable(unit)}: {printable(done.stderr.strip())}")
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _processes(group: str, proc: Path = Path("/proc")) -> list[int]:
    """Return the processes in a cgroup of systemd's hierarchy and in those below it."""
    found = []
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (folder / "cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if group and controllers in ("", "name=systemd") and f"{path}/".startswith(f"{group}/"):
                    found.append(int(folder.name))
                    break
    return found


def hand_over(config_fd: int, descriptors: Sequence[int]) -> None:
    """Have systemd keep the descriptors for :func:`take_over`.

    Args:
        config_fd: the sidecar's configuration; it names the others by their numbers.
        descriptors: the others.

    Raises:
        LlmtracedError: this process is no part of a service.
    """
    fds = [config_fd, *dict.fromkeys(descriptors)]
    if len(fds) > _MOST_FDS:
        raise LlmtracedError(f"a model in {len(fds)} descriptors, more than the {_MOST_FDS} that can be handed over")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        socket.send_fds(ours, [json.dumps({"fds": fds}).encode()], fds)
        if not store(_NAME, theirs.fileno()):
            raise LlmtracedError("there is no systemd to keep descriptors: this is a step of a unit's", USAGE)


def take_over() -> NoReturn:
    """Become the sidecar whose descriptors systemd has kept.

    Raises:
        LlmtracedError: it has kept none for this process.
    """
    kept = stored().get(_NAME)
    if kept is None:
        raise LlmtracedError("systemd has kept no descriptors for this process: this is a step of a unit's", USAGE)
    with socket.socket(fileno=kept) as link:
        message, fds, _, _ = socket.recv_fds(link, _MOST_BYTES, _MOST_FDS)
    told = json.loads(message)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(moved, told["fds"], strict=True):
        os.dup2(fd, number)
    execute(told["fds"][0])


def execute(config_fd: int) -> NoReturn:
    """Turn into the bare sidecar, with everything that is inheritable."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, _command(_SIDECAR, config_fd))  # noqa: S606


def hold(config: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[int, dict[str, int]]:
    """Start what keeps a server's huge pages (prefetch/hold.py).

    Args:
        config: what it is told.
        descriptors: that it names.

    Returns:
        How many bytes it keeps, and what :func:`llmtraced.prefetch.hold.let_go` takes; it ends with this process, too.
    """
    fd = memory_file(config)
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    keep = [fd, *descriptors]
    child = subprocess.Popen(_command(_HOLD, fd), stdin=ours, stdout=subprocess.PIPE, pass_fds=keep)
    os.close(ours)
    os.close(fd)
    assert child.stdout is not None
    with child.stdout:
        told = child.stdout.readline().strip()
    return int(told) if told.isdigit() else 0, {"pipe": theirs, "pidfd": os.pidfd_open(child.pid)}


def memory_file(config: Mapping[str, Any]) -> int:
    """Return a descriptor of a file in memory, at whose beginning the configuration stands."""
    fd = os.memfd_create("llmtraced-sidecar", 0)
    os.write(fd, json.dumps(config).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _command(code: str, fd: int) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, str(fd), str(Path(__file__).resolve().parents[2])]


def join(server: int, process: int) -> None:
    """Move a process into the memory cgroup of the server, so that what it brings in is charged where it belongs."""
    group, own = cgroup_of(server), cgroup_of(process)
    if group is None or (own is not None and own.path == group.path):
        return
    try:
        (group.path / "cgroup.procs").write_text(str(process))
    except OSError as error:
        log.warning(
            "cannot join the server's memory cgroup %s (%s): what is brought in is charged to ours, "
            "so the server gets more memory than its limit says",
            group.path,
            error.strerror,
        )
