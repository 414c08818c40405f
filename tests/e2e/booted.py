"""A machine with a systemd of its own on this kernel: namespaces, and an overlay on the root that is here.

Its systemd is process 1 of a pid namespace, with cgroups, a network and a root of its own. What it writes goes into
memory and is gone with it; the machine's own systemd, if it has one, never hears of it. It has three more things: the
program at /usr/local/bin/llmtraced as ``make install`` puts it there, a llama-server in /opt/engine, and a folder of a
real disk in /srv/models, because overlays have no page cache of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from helpers import wait_until

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")

# $1: folder for the overlay, $2: the engine, $3: models, $4: the repository, $5: its environment, $6: its Python
BOOT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 machine "$1"
mkdir "$1"/upper "$1"/work "$1"/root "$1"/venv-upper "$1"/venv-work
root=$1/root
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
  mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
else
  mount -t tmpfs -o mode=755 cgroup "$root/sys/fs/cgroup"
  for name in memory pids; do
    mkdir "$root/sys/fs/cgroup/$name"
    mount -t cgroup -o $name cgroup "$root/sys/fs/cgroup/$name"
  done
  mkdir "$root/sys/fs/cgroup/systemd"
  mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
fi
mount -t tmpfs -o mode=755 dev "$root/dev"
mkdir "$root"/dev/shm "$root"/dev/pts
mount -t tmpfs shm "$root/dev/shm"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs tmp "$root/tmp"

mkdir -p "$root/opt/engine" "$root/srv/models" "$root/usr/local/lib/llmtraced"
mount --bind "$2" "$root/opt/engine"
mount --bind "$3" "$root/srv/models"
# What pip would put there, without its minutes.
mount -t overlay -o "lowerdir=$5,upperdir=$1/venv-upper,workdir=$1/venv-work" overlay "$root/usr/local/lib/llmtraced"
mkdir "$root/opt/python"  # it may be in somebody's home, where services have no business
mount --bind "$6" "$root/opt/python"
ln -sf "/opt/python/bin/$(basename "$(realpath "$5/bin/python")")" "$root/usr/local/lib/llmtraced/bin/python3"
sed -i 's|^home = .*|home = /opt/python/bin|' "$root/usr/local/lib/llmtraced/pyvenv.cfg"
for packages in "$root"/usr/local/lib/llmtraced/lib/python3*/site-packages; do
  rm -rf "$packages"/*llmtraced*
  cp -r "$4/llmtraced" "$packages/"
  cp -r "$4/bpf" "$4/systemd" "$packages/llmtraced/"
done
printf '#!/usr/local/lib/llmtraced/bin/python\nimport sys\nfrom llmtraced.commands import main\nsys.exit(main())\n' \
  > "$root/usr/local/lib/llmtraced/bin/llmtraced"
chmod 755 "$root/usr/local/lib/llmtraced/bin/llmtraced"
make -s -C "$4" install-files DESTDIR="$root" MAKER="$5/bin/python"

# Nothing but what is asked for: modules, disks and sysctls are this machine's.
rm -rf "$root"/etc/systemd/system "$root"/etc/systemd/system.conf.d "$root"/lib/systemd/system/*.wants
mkdir -p "$root"/etc/systemd/system
printf '[Unit]\nRequires=systemd-journald.service\nAfter=systemd-journald.service\n' \
  > "$root/etc/systemd/system/machine.target"
echo 0123456789abcdef0123456789abcdef > "$root/etc/machine-id"
: > "$root/etc/fstab"
ip link set lo up
cd "$root"
mkdir -p mnt
pivot_root . mnt
umount -l /mnt
exec chroot . /usr/bin/env -i container=llmtraced-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
  LANG=C.UTF-8 /lib/systemd/systemd --unit=machine.target --log-target=journal --show-status=no
"""


class Machine:
    """A booted machine.

    Args:
        folder: for what it needs outside, a log among it.
        engine: folder of a llama-server.
        models: folder on a real disk.
    """

    def __init__(self, folder: Path, engine: Path, models: Path) -> None:
        self._folder, self._engine, self._models = folder, engine, models
        self._cgroups: list[Path] = []
        self.pid = 0
        """Of its systemd, here."""

    def __enter__(self) -> Self:
        (self._folder / "machine").mkdir()
        name = f"llmtraced-systemd-{os.getpid()}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, tail = line.partition(" - ")
            if tail.split()[0] in ("cgroup", "cgroup2") and "cpuset" not in tail.split()[-1].split(","):
                self._cgroups.append(Path(fields.split()[4]) / name)
        for cgroup in self._cgroups:
            cgroup.mkdir()
        enter = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
        command = ["sh", "-c", enter, "sh", *map(str, self._cgroups), "--"]
        command += [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--uts",
            "--ipc",
            "--cgroup",
            "--net",
            "sh",
            "-c",
        ]
        inside = (self._folder / "machine", self._engine, self._models, ROOT, sys.prefix, sys.base_prefix)
        command += [BOOT, "boot", *map(str, inside)]
        self.log = self._folder / "machine.log"
        try:
            with self.log.open("wb") as out:
                self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            wait_until(self._up, 60, "systemd is up")
        except BaseException:
            self._end()
            raise
        return self

    def _up(self) -> bool:
        assert self._child.poll() is None, self.log.read_text()
        children = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text().split()
        if not children:
            return False
        self.pid = int(children[0])
        if Path(f"/proc/{self.pid}/comm").read_text() != "systemd\n":
            return False
        return self.run("systemctl", "is-active", "machine.target", check=False) == "active"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            print(self.log.read_text())
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError, AttributeError):
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)  # and with it all that is in its pid namespace
            self._child.kill()
            self._child.wait()
        deadline = time.monotonic() + 20
        for cgroup in self._cgroups:
            while cgroup.exists():
                for folder, _, _ in os.walk(cgroup, topdown=False):
                    with contextlib.suppress(OSError):
                        Path(folder).rmdir()
                assert time.monotonic() < deadline, f"{cgroup} cannot be removed"
                time.sleep(0.02)

    def path(self, inside: str) -> Path:
        """Return a path here for one of the machine's."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def run(self, *command: str, check: bool = True, seconds: float = 60) -> str:
        """Run a command in the machine and return what it says."""
        entered = ["nsenter", "-t", str(self.pid), "-a", "--", *command]
        done = subprocess.run(entered, capture_output=True, text=True, check=False, timeout=seconds)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def show(self, unit: str, *names: str) -> Sequence[str]:
        """Return properties of a unit."""
        lines = self.run("systemctl", "show", unit, "-p", ",".join(names)).splitlines()
        found = dict(line.split("=", 1) for line in lines)
        return [found[name] for name in names]

    def journal(self, unit: str) -> str:
        """Return what a unit has said and what was said of it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit)

    def write(self, path: str, text: str) -> None:
        """Write a file of the machine."""
        there = self.path(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(text)

    def http(self, url: str, body: Mapping[str, Any] | None = None, seconds: float = 120) -> str:
        """Ask for a page in the machine's network, with a JSON body if there is one."""
        code = (
            "import sys, urllib.request as u; r = u.Request(sys.argv[1], sys.argv[2].encode() or None, "
            "{'Content-Type': 'application/json'}); print(u.urlopen(r, timeout=float(sys.argv[3])).read().decode())"
        )
        text = "" if body is None else json.dumps(body)
        return self.run("/usr/bin/python3", "-c", code, url, text, str(seconds), seconds=seconds + 10)

    def here(self, pid: int) -> int:
        """Return what a process of the machine is called here."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                numbers = (folder / "status").read_text().split("NSpid:", 1)[1].splitlines()[0].split()
                same = (folder / "ns/pid").stat().st_ino == Path(f"/proc/{self.pid}/ns/pid").stat().st_ino
                if same and int(numbers[-1]) == pid:
                    return int(folder.name)
        raise AssertionError(f"no process {pid} in the machine")


def missing() -> str:
    """Return what this machine lacks for booting another one; empty: nothing."""
    lacking = [t for t in ("unshare", "nsenter", "ip", "make", "pivot_root") if shutil.which(t) is None]
    return "" if SYSTEMD.exists() and not lacking else f"needs systemd, iproute2 and make: {lacking or SYSTEMD}"
