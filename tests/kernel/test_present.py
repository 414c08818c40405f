"""Headers that are not the running kernel's: BCC takes them, and nothing of the machine changes for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import need

from llmtraced import children, headers
from llmtraced.probes import compiler, kernel, loader

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
    env = children.environment(BCC_KERNEL_SOURCE=str(whole), LLMTRACED_CACHE=str(tmp_path / "kept"))
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert str(whole) in answer["headers"]
    assert not answer["refused"]


def test_halves_are_merged_and_nothing_is_left(tmp_path: Path) -> None:
    """Debian's layout, in a folder that no kernel's name leads to, without the right to mount anything."""
    found = headers.find()
    need(found.build.is_dir(), "needs headers in a folder")
    (tmp_path / "cache").mkdir()
    env = children.environment(TMPDIR=str(tmp_path), LLMTRACED_CACHE=str(tmp_path / "cache"))
    mounts, modules = Path("/proc/self/mountinfo").read_text(), sorted(Path("/lib/modules").glob("*/*"))
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["refused"]
    assert (Path("/proc/self/mountinfo").read_text(), sorted(Path("/lib/modules").glob("*/*"))) == (mounts, modules)
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_the_next_time_neither_compiler_nor_headers_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept counts as exactly as what was compiled: the other tests here run on it."""
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path))
    first = loader.load()
    first.close()

    def no_compiler(module: str, argument: str) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "compile_in_child", no_compiler)
    again = loader.load()
    try:
        assert set(again.programs) == set(first.refused) ^ set(loader.PROGRAMS)
        assert again.refused == first.refused
        assert (again.headers, again.bcc_version, again.needs_admin) == (
            first.headers,
            first.bcc_version,
            first.needs_admin,
        )
        assert kernel.map_info(again.maps["ring"], "ring").entries == again.sizes.ring_bytes
        assert again.compile_seconds < first.compile_seconds
    finally:
        again.close()
    with pytest.raises(AssertionError, match="compiled again"):
        loader.load(anew=True)
    with pytest.raises(AssertionError, match="compiled again"):
        loader.load(loader.Sizes(ring_bytes=1 << 20))
