"""Headers are shown to one process: the system's /lib/modules stays as it is, and nothing is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import need

from llmtraced import headers

pytestmark = pytest.mark.kernel("root")

CHILD = """
import json, os, sys
from pathlib import Path
from llmtraced import headers
build, source = map(Path, sys.argv[1:3])
headers.present(headers.Headers(build, source, exact=False, in_place=False))
here = Path("/lib/modules", os.uname().release)
print(json.dumps({
    "autoconf": (here / "build/include/generated/autoconf.h").read_text(),
    "kconfig": (here / "source/include/linux/kconfig.h").read_text(),
    "inside": (here / "build/arch").resolve() == (build / "arch").resolve(),
    "seen": sorted(str(p) for p in Path("/lib/modules").glob("*/*")),
    "environment": os.environ.get("BCC_KERNEL_SOURCE", ""),
    "child_sees": __import__("subprocess").check_output(["ls", str(here)], text=True).split(),
}))
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def halves(folder: Path) -> tuple[Path, Path]:
    build, source = folder / "build", folder / "source"
    write(build / "include/generated/autoconf.h", "generated")
    (build / "arch/x86/include/generated").mkdir(parents=True)
    write(source / "include/linux/kconfig.h", "plain")
    return build, source


def listing() -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_ino) for p in Path("/lib/modules").glob("*"))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_only_the_child_sees_them(tmp_path: Path, scratch: Path) -> None:
    need(Path("/lib/modules").is_dir(), "needs a /lib/modules")
    build, source = halves(tmp_path / "headers")
    before, mounts = listing(), Path("/proc/self/mountinfo").read_text()
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(build), str(source)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["autoconf"], seen["kconfig"], seen["inside"]) == ("generated", "plain", True)
    assert seen["environment"] == ""
    assert seen["child_sees"] == ["build", "source"]
    others = {str(p) for p in Path("/lib/modules").glob("*/*") if p.parent.name != os.uname().release}
    assert others <= set(seen["seen"]), "other kernels' folders must stay within reach"

    assert listing() == before
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert list(scratch.iterdir()) == []


def test_headers_inside_the_folder_that_is_covered(tmp_path: Path, scratch: Path) -> None:
    """They are in /lib/modules/OTHER/build: what is mounted on /lib/modules must not hide them."""
    need(Path("/lib/modules").is_dir(), "needs a /lib/modules")
    build, source = halves(tmp_path / "headers")
    script = (
        'mount -t tmpfs none /lib/modules && mkdir /lib/modules/other && cp -r "$1" "$2" /lib/modules/other && shift 2'
    )
    command = ["unshare", "-m", "sh", "-c", script + ' && exec "$@"', "sh", str(build), str(source)]
    command += [sys.executable, "-c", CHILD, "/lib/modules/other/build", "/lib/modules/other/source"]
    before = listing()
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["autoconf"], seen["kconfig"], seen["inside"]) == ("generated", "plain", True)
    assert "/lib/modules/other/build" in seen["seen"]
    assert listing() == before
    assert list(scratch.iterdir()) == []


LOAD = """
import json, os
from llmtraced.probes import loader
programs = loader.load()
print(json.dumps({"refused": programs.refused, "headers": programs.headers}))
"""


@pytest.mark.kernel
def test_programs_compile_with_a_tree_in_one_piece(tmp_path: Path) -> None:
    """Ubuntu's and Fedora's layout, made of whatever headers are here by links."""
    found = headers.find()
    need(found.build.is_dir(), "needs headers in a folder")
    whole = tmp_path / "whole"
    for half in dict.fromkeys((found.source.resolve(), found.build.resolve())):
        subprocess.run(["cp", "-as", "--update", f"{half}/.", str(whole)], check=True)
    env = {**os.environ, "BCC_KERNEL_SOURCE": str(whole), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert str(whole) in answer["headers"]
    assert not answer["refused"]
