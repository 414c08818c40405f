"""Headers that are not the running kernel's: BCC takes them, and nothing of the machine changes for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import need

from llmtraced import children, headers

pytestmark = pytest.mark.kernel

LOAD = """
import json, os
from llmtraced.probes import loader
programs = loader.load()
print(json.dumps({"refused": programs.refused, "headers": programs.headers}))
"""


def test_programs_compile_with_a_tree_in_one_piece(tmp_path: Path) -> None:
    """Ubuntu's and Fedora's layout, made of whatever headers are here by links."""
    found = headers.find()
    need(found.build.is_dir(), "needs headers in a folder")
    whole = tmp_path / "whole"
    for half in dict.fromkeys((found.source.resolve(), found.build.resolve())):
        subprocess.run(["cp", "-as", "--update", f"{half}/.", str(whole)], check=True)
    env = children.environment(BCC_KERNEL_SOURCE=str(whole))
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert str(whole) in answer["headers"]
    assert not answer["refused"]


def test_halves_are_merged_and_nothing_is_left(tmp_path: Path) -> None:
    """Debian's layout, in a folder that no kernel's name leads to, without the right to mount anything."""
    found = headers.find()
    need(found.build.is_dir(), "needs headers in a folder")
    env = children.environment(TMPDIR=str(tmp_path))
    mounts, modules = Path("/proc/self/mountinfo").read_text(), sorted(Path("/lib/modules").glob("*/*"))
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["refused"]
    assert (Path("/proc/self/mountinfo").read_text(), sorted(Path("/lib/modules").glob("*/*"))) == (mounts, modules)
    assert list(tmp_path.iterdir()) == []
