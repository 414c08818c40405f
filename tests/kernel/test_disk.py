"""What the daemon does where its disk is full, read-only or hangs: metrics go on, it recovers, losses are counted."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import need, wait_until
from running import Daemon, MadeUp, accounts, build, mounted, sums

from llmtraced.schema import PAGE

pytestmark = pytest.mark.kernel

MIB = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("program") / "made-up-llama")


@contextmanager
def touching(server: MadeUp) -> Iterator[None]:
    """Have the server fault all the time."""
    over = threading.Event()

    def touch() -> None:
        while not over.is_set():
            assert server.do("t")
            over.wait(0.02)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def whole(daemon: Daemon, server: MadeUp) -> dict[str, int]:
    """End the daemon; return the account of the faults, which is the same on disk, in its words, and in its metrics."""
    faults = daemon.total("llmtraced_tensor_faults_total", pid=str(server.pid))
    daemon.end()
    (told,) = daemon.said("end", pid=server.pid)
    found = sums(accounts(daemon.trace, "faults", server.pid))
    assert found == told["account"]["faults"]
    assert found["counted"] == faults
    assert not list(daemon.trace.glob("**/.tmp-*"))
    return found


def hindered(daemon: Daemon, server: MadeUp, words: str) -> None:
    """Wait until recording pauses, and see that metrics go on."""
    wait_until(lambda: daemon.total("llmtraced_recording_paused") == 1, 20, "recording pauses")
    before = daemon.total("llmtraced_tensor_faults_total", pid=str(server.pid))
    wait_until(
        lambda: daemon.total("llmtraced_tensor_faults_total", pid=str(server.pid)) > before + 100, 20, "metrics go on"
    )
    lost = {"probe": "faults", "outcome": "dropped"}  # later than the pause: what was on its way may still be written
    wait_until(lambda: daemon.total("llmtraced_events_total", **lost) > 0, 20, "what is missed counts as dropped")
    text = daemon.log.read_text()
    assert words in text
    assert text.count(f"process {server.pid}: ") - text.count("uprobe") - text.count("uretprobe") <= 2, text


def recovered(daemon: Daemon) -> None:
    wait_until(lambda: daemon.total("llmtraced_recording_paused") == 0, 20, "recording goes on")
    assert "recording goes on; what was missed counts as dropped" in daemon.log.read_text()


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_cannot_be_written(trouble: str, program: Path, small_model: Path, tmp_path: Path) -> None:
    with (
        mounted("tmpfs", "tmpfs", tmp_path / "disk", "size=40m") as disk,
        MadeUp(program, small_model) as server,
        Daemon(disk / "trace", tmp_path / "daemon.log") as daemon,
    ):
        daemon.found(server.pid)
        with touching(server):
            wait_until(lambda: accounts(daemon.trace, "faults", server.pid), 20, "something is recorded")
            ballast = disk / "ballast"
            if trouble == "full":
                filled = subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], check=False)
                assert filled.returncode == 1
                hindered(daemon, server, "No space left on device; recording pauses, metrics go on")
                ballast.unlink()
            else:
                # Where a file is open for writing just then, it is asked again.
                wait_until(
                    lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode == 0,
                    20,
                    "it is made read-only",
                )
                hindered(daemon, server, "Read-only file system; recording pauses, metrics go on")
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            recovered(daemon)
        found = whole(daemon, server)
    assert found["dropped"] > 0
    assert found["delivered"] > 0


def test_a_disk_that_hangs(program: Path, small_model: Path, tmp_path: Path) -> None:
    """A frozen file system takes no write until it is thawed: nobody but the writer waits for it."""
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    loop = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=False)
    need(loop.returncode == 0, "needs a loop device")
    frozen = False
    with (
        mounted("ext4", str(image), tmp_path / "disk", "loop") as disk,
        MadeUp(program, small_model) as server,
        MadeUp(program, small_model) as leaving,
        Daemon(disk / "trace", tmp_path / "daemon.log") as daemon,
    ):
        try:
            daemon.found(server.pid)
            daemon.found(leaving.pid)
            with touching(server):
                wait_until(lambda: accounts(daemon.trace, "faults", server.pid), 20, "something is recorded")
                frozen = subprocess.run(["fsfreeze", "-f", disk], check=True).returncode == 0
                leaving.do("g")
                leaving.child.kill()
                leaving.child.wait()  # its end is seen though its files cannot be written
                seen = lambda: daemon.total("llmtraced_mapped_bytes", pid=str(leaving.pid))  # noqa: E731
                wait_until(lambda: seen() == 0, 20, "a server that ends is let go of")
                with MadeUp(program, small_model) as late:
                    daemon.found(late.pid)
                before = daemon.total("llmtraced_records_total")
                wait_until(lambda: daemon.total("llmtraced_records_total") > before + 1000, 20, "the ring is read")
                assert not daemon.said("end")
                subprocess.run(["fsfreeze", "-u", disk], check=True)
                frozen = False
                wait_until(lambda: daemon.said("end", pid=leaving.pid), 20, "what waited is written")
            found = whole(daemon, server)
            assert daemon.said("end", pid=late.pid)
        finally:
            if frozen:
                subprocess.run(["fsfreeze", "-u", disk], check=True)
    assert found["dropped"] == 0, "a moment's records fit into memory"
    assert found["counted"] * PAGE > small_model.stat().st_size
