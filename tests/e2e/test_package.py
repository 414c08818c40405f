"""What is installed works: from a wheel as from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmtraced.probes import loader

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def test_a_wheel_has_the_bpf_sources_and_loads_them(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("llmtraced-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for source in (ROOT / "bpf").iterdir():
        assert f"llmtraced/bpf/{source.name}" in names
    code = (
        "import llmtraced.probes.loader as l;"
        "assert str(l.bpf_folder()).endswith('site/llmtraced/bpf'), l.bpf_folder();"
        "p = l.load(); assert not p.refused, p.refused; print(len(p.programs))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(loader.PROGRAMS)
