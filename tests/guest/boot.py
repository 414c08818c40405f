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
in the overlay, for page caches are a disk's. There is cgroup v2 with the memory controller (``--cgroup 1``: that of
version 1 instead). ``--server`` sees to a llama-server that runs there: the usual one is built for this processor only.
The command begins in the repository, with ``.venv/bin`` first in PATH; tests fail there where they lack something
(LLMTRACED_KERNEL, LLMTRACED_E2E), and are patient (LLMTRACED_EMULATED). Its output is ours, and so is its exit code. A
guest that takes longer than ``--minutes`` is killed, with status 124.

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
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from llmtraced.bench.fetch import default_cache_dir, ensure_portable_llama_server
from llmtraced.errors import LlmtracedError, printable

__all__ = ["Kernel", "ensure_kernel", "main", "run"]

TIMED_OUT: Final = 124  # as timeout(1) has it
DISK_BYTES: Final = 8 << 30  # sparse
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
    if not re.fullmatch(r"linux-image-\d\S*", package):
        found = _depends(package, r"linux-image-\d\S*")
        if not found:
            raise LlmtracedError(f"{printable(package)} is no package of a kernel")
        package = found[0]
    release = package.removeprefix("linux-image-")
    kernel = Kernel((cache or default_cache_dir()) / "kernels" / release, release)
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


def run(kernel: Kernel, command: Sequence[str], *, cgroup: int = 2, memory: str = "4G", minutes: float = 30) -> int:
    """Run a command in a guest; return its exit code, or 124 if it was not done in time.

    Args:
        kernel: to boot.
        command: and its arguments.
        cgroup: version of the memory controller.
        memory: of the guest, as QEMU has it.
        minutes: after which the guest is killed.

    Raises:
        LlmtracedError: a program that is needed is not installed.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    vng = shutil.which("vng", path=path)
    if vng is None:
        raise LlmtracedError("virtme-ng is not installed; pip install '.[guest]'")
    if not (shutil.which("qemu-system-x86_64") and shutil.which("busybox")):
        raise LlmtracedError("apt-get install qemu-system-x86 busybox-static kmod udev e2fsprogs")
    inside = ["sh", str(INSIDE), str(kernel.folder), kernel.release, str(cgroup), str(Path(__file__).parents[2])]
    with tempfile.NamedTemporaryFile(prefix="llmtraced-guest-", suffix=".img", dir=default_cache_dir()) as disk:
        disk.truncate(DISK_BYTES)
        _output("/sbin/mkfs.ext4", "-q", "-F", disk.name)
        guest = [vng, "--run", str(kernel.image), "--disable-kvm", "--user", "root", "--cpus", "2", "--memory", memory]
        guest += [f"--qemu-opts={SHARE} -drive file={disk.name},format=raw,if=virtio,cache=none"]
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
        try:
            return child.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            print(f"not done after {minutes:g} minutes: the guest is killed", file=sys.stderr)
            return TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            printing.join()


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
    parser.add_argument("--server", action="store_true", help="have a llama-server for it, built if there is none yet")
    parser.add_argument("command", nargs="+", help="and its arguments, after --")
    chosen = parser.parse_args(argv)
    try:
        kernel = ensure_kernel(chosen.kernel)
        command = chosen.command
        if chosen.server:
            command = ["env", f"LLMTRACED_LLAMA_SERVER={ensure_portable_llama_server()}", *command]
        return run(kernel, command, cgroup=chosen.cgroup, memory=chosen.memory, minutes=chosen.minutes)
    except LlmtracedError as error:
        print(f"boot.py: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
