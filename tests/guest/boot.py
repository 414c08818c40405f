"""Run a command under another kernel: Debian's stock one, in QEMU without KVM, on this machine's own files.

::

    .venv/bin/python tests/guest/boot.py -- llmtraced check
    .venv/bin/python tests/guest/boot.py --cgroup 1 -- pytest tests/kernel/test_pressure_real.py

The kernel and its headers come from the distribution by ``apt-get download``, and are unpacked into the cache directory
(``~/.cache/llmtraced/kernels``, or ``$LLMTRACED_CACHE/kernels``): nothing is installed, the machine's ``/lib/modules``
is not touched. ``--kernel`` names another package, of any suite that apt knows. It needs Debian or one that is like it,
and ``apt-get install qemu-system-x86 busybox-static kmod udev e2fsprogs`` and ``pip install '.[guest]'`` (virtme-ng).

The guest has this machine's root, which QEMU itself keeps read-only, under an overlay on an ext4 disk that is gone when
the guest is: a command in it may write and break what it likes. The folder for temporary files is on that disk and not
in the overlay, for page caches are a disk's. A guest that was suspended cannot open the machine's files any more (9p
does not come back): with ``--copy`` its root is a copy of programs, libraries and the repository, on the disk, and its
power button is pressed now and then, for nothing else wakes it from suspension to idle.

There is cgroup v2 with the memory controller (``--cgroup 1``: that of version 1 instead). ``--server`` sees to a
llama-server that runs there: the usual one is built for this processor only. The command begins in the repository, with
``.venv/bin`` first in PATH; tests fail there where they lack something (LLMTRACED_KERNEL, LLMTRACED_E2E), and are
patient (LLMTRACED_EMULATED). Its output is ours, and so is its exit code. A guest that takes longer than ``--minutes``
is killed, with status 124.

Without KVM a processor is 10 to 20 times slower: compiling the BPF programs takes 40 s, and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from llmtraced import kept
from llmtraced.bench.fetch import ensure_portable_llama_server
from llmtraced.errors import LlmtracedError, printable

__all__ = ["Kernel", "ensure_kernel", "main", "run"]

TIMED_OUT: Final = 124  # as timeout(1) has it
DISK_BYTES: Final = 8 << 30  # sparse
COPIED: Final = (
    *("bin", "sbin", "lib", "lib64", "etc", "usr/bin", "usr/sbin", "usr/include", "usr/libexec"),
    *("usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib/gcc", "usr/lib/python3*", "usr/lib/locale"),
    *("usr/lib/llvm-*/lib/*.so*", "usr/lib/os-release"),
)
"""Below the root, besides Python's own folder and the repository: what compiles, and what is loaded."""
MONITOR: Final = "-mon chardev=monitor,mode=readline -chardev socket,id=monitor,server=on,wait=off,"
PRESS_SECONDS: Final = 60.0
"""Between two presses of the power button, where the guest may be suspended: one keeps it from falling asleep, too."""
KERNEL: Final = r"linux-image-\d+\.\d+\.\d\S*"
"""A package that has a kernel; linux-image-amd64 and linux-image-6.12-amd64 depend on one."""
INSIDE: Final = Path(__file__).with_name("inside.sh")
# The whole root once more: virtme-ng mounts its own without a cache, and every import is a hundred round trips then.
SHARE: Final = (
    "-fsdev local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap "
    "-device virtio-9p-pci,fsdev=machine,mount_tag=machine"
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is unpacked in ``folder``: what ``uname -r`` will say, and the file to boot."""

    folder: Path
    release: str

    @property
    def image(self) -> Path:
        """The file to boot; newer packages have it beside the modules."""
        beside = self.folder / "lib/modules" / self.release / "vmlinuz"
        return beside if beside.exists() else self.folder / "boot" / f"vmlinuz-{self.release}"


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise LlmtracedError(f"{shlex.join(command)} failed: {printable(done.stderr.strip()[-500:])}")
    return done.stdout


def _depends(package: str, pattern: str) -> list[str]:
    """Return the packages that ``package`` depends on and whose names are of ``pattern``."""
    return re.findall(rf"Depends: ({pattern})$", _output("apt-cache", "depends", "--important", package), re.MULTILINE)


def ensure_kernel(package: str = "linux-image-amd64", cache: Path | None = None) -> Kernel:
    """Return the kernel of a package, with its modules and headers; fetched and unpacked if it is not in the cache.

    Args:
        package: ``linux-image-RELEASE``, or one that depends on it.
        cache: the cache directory.

    Raises:
        LlmtracedError: apt does not know it, or cannot fetch it.
    """
    if not re.fullmatch(KERNEL, package):
        found = _depends(package, KERNEL)
        if not found:
            raise LlmtracedError(f"{printable(package)} is no package of a kernel")
        package = found[0]
    release = package.removeprefix("linux-image-")
    kernel = Kernel((cache or kept.folder()) / "kernels" / release, release)
    if kernel.folder.is_dir():
        return kernel
    # Newer ones have their modules, and all have half of their headers, in packages of their own.
    wanted = [package, f"linux-headers-{release}"]
    parts = rf"linux-\S*{re.escape(release.rpartition('-')[0])}\S*"
    packages = dict.fromkeys([*wanted, *(part for one in wanted for part in _depends(one, parts))])
    kernel.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=kernel.folder.parent) as name:
        folder, unpacked = Path(name), Path(name) / "root"
        _output("apt-get", "download", "--quiet", *packages, cwd=folder)
        for archive in sorted(folder.glob("*.deb")):
            _output("dpkg", "-x", str(archive), str(unpacked))
        if not (unpacked / "lib").is_dir():
            (unpacked / "lib").symlink_to("usr/lib")  # where Debian 13 and later have the modules
        _output("/sbin/depmod", "--basedir", str(unpacked), release)
        unpacked.rename(kernel.folder)
    return kernel


@contextlib.contextmanager
def _root(files: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Make a folder in ``folder`` that has :data:`COPIED` and more files, each where it is on this machine."""
    python = Path(sys.executable).resolve().parents[1]
    repository = Path(__file__).parents[2]
    wanted = [found for name in COPIED for found in Path("/").glob(name)]
    wanted += [*([python] if python != Path("/usr") else []), Path(sys.prefix).resolve(), repository, *files]
    with tempfile.TemporaryDirectory(prefix=".root-", dir=folder) as name:
        names = {str(path.relative_to("/")) for path in wanted if not {*path.parents} & {*wanted}}
        _output("cp", "--archive", "--parents", *names, name, cwd=Path("/"))
        yield Path(name)


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    cgroup: int = 2,
    memory: str = "4G",
    minutes: float = 30,
    copy: Sequence[Path] | None = None,
) -> int:
    """Run a command in a guest; return its exit code, or 124 if it was not done in time.

    Args:
        kernel: to boot.
        command: and its arguments.
        cgroup: version of the memory controller.
        memory: of the guest, as QEMU has it.
        minutes: after which the guest is killed.
        copy: have a copy for root, with these files, that does not need the machine's after the guest was suspended.

    Raises:
        LlmtracedError: a program that is needed is not installed.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    vng = shutil.which("vng", path=path)
    if vng is None:
        raise LlmtracedError("virtme-ng is not installed; pip install '.[guest]'")
    if not (shutil.which("qemu-system-x86_64") and shutil.which("busybox")):
        raise LlmtracedError("apt-get install qemu-system-x86 busybox-static kmod udev e2fsprogs")
    may_sleep = copy is not None
    inside = ["sh", str(INSIDE), str(kernel.folder), kernel.release, str(cgroup), "copy" if may_sleep else "overlay"]
    inside += [str(Path(__file__).parents[2])]
    with tempfile.NamedTemporaryFile(prefix="llmtraced-guest-", suffix=".img", dir=kept.folder()) as disk:
        disk.truncate(DISK_BYTES)
        with _root(copy, kept.folder()) if copy is not None else contextlib.nullcontext() as root:
            _output("/sbin/mkfs.ext4", "-q", "-F", *(("-d", str(root)) if root else ()), disk.name)
        guest = [vng, "--run", str(kernel.image), "--disable-kvm", "--user", "root", "--cpus", "2", "--memory", memory]
        monitor = f" {MONITOR}path={disk.name}.monitor" if may_sleep else ""
        guest += [f"--qemu-opts={SHARE} -drive file={disk.name},format=raw,if=virtio,cache=none{monitor}"]
        # In a session of its own, so that what is killed is this guest and nothing else.
        child = subprocess.Popen(
            [*guest, "--", shlex.join([*inside, *command])],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # a file would be emptied by each port that QEMU opens it for
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert child.stdout
        printing = threading.Thread(target=_print, args=(child.stdout,))
        printing.start()
        over = threading.Event()
        if may_sleep:
            threading.Thread(target=_press, args=(f"{disk.name}.monitor", over)).start()
        try:
            return child.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            print(f"not done after {minutes:g} minutes: the guest is killed", file=sys.stderr)
            return TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            over.set()
            printing.join()
            Path(f"{disk.name}.monitor").unlink(missing_ok=True)


def _press(monitor: str, over: threading.Event) -> None:
    """Press the guest's power button now and then: QEMU's clock wakes it from suspension to memory only."""
    while not over.wait(PRESS_SECONDS):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as commands:
            commands.settimeout(PRESS_SECONDS)
            commands.connect(monitor)
            for command in (b"system_powerdown\n", b""):  # of a command that nobody waits for it reads half
                answer = b""
                while not answer.endswith(b"\r\n(qemu) ") and (more := commands.recv(4096)):
                    answer += more
                commands.sendall(command)


def _print(stream: IO[bytes]) -> None:
    """Print what comes, as it comes."""
    while piece := os.read(stream.fileno(), 1 << 16):
        os.write(sys.stdout.fileno(), piece)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", default="linux-image-amd64", metavar="PACKAGE", help="default: %(default)s")
    parser.add_argument("--cgroup", type=int, choices=(1, 2), default=2, help="version of the memory controller")
    parser.add_argument("--memory", default="4G", help="of the guest (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="after which it is killed (default: %(default)g)")
    parser.add_argument("--copy", action="store_true", help="needs no file of this machine after it was suspended")
    parser.add_argument("--server", action="store_true", help="have a llama-server for it, built if there is none yet")
    parser.add_argument("command", nargs="+", help="and its arguments, after --")
    chosen = parser.parse_args(argv)
    try:
        kernel = ensure_kernel(chosen.kernel)
        command = chosen.command
        files = []
        if chosen.server:
            server = ensure_portable_llama_server()
            command = ["env", f"LLMTRACED_LLAMA_SERVER={server}", *command]
            files = [server.parents[1]]
        settings = {"cgroup": chosen.cgroup, "memory": chosen.memory, "minutes": chosen.minutes}
        return run(kernel, command, **settings, copy=files if chosen.copy else None)
    except LlmtracedError as error:
        print(f"boot.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
