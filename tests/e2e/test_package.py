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
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "LLMTRACED_CACHE": str(tmp_path),
    }  # nothing is kept there
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(loader.PROGRAMS)


def test_installed_and_uninstalled(tmp_path: Path) -> None:
    """Into a folder, as packages are made; what runs there must not know of that folder."""
    python = "/usr/bin/python3" if sys.base_prefix.startswith(("/root/", "/home/")) else sys.executable
    make = ["make", "-s", "-C", str(ROOT), f"DESTDIR={tmp_path}", "PREFIX=/opt/here", f"PYTHON={python}"]
    subprocess.run([*make, "install"], check=True, timeout=600)
    here = tmp_path / "opt/here"
    found = {str(p.relative_to(here)) for p in here.rglob("*") if "lib/llmtraced/" not in str(p) and not p.is_dir()}
    assert found == {
        "bin/llmtraced",
        "lib/systemd/system/llmtraced-prefetch@.service",
        "lib/systemd/system/llmtraced.service",
        "lib/sysusers.d/llmtraced.conf",
        "share/bash-completion/completions/llmtraced",
        "share/man/man1/llmtraced.1",
        "share/zsh/site-functions/_llmtraced",
    }
    for unit in (here / "lib/systemd/system").iterdir():
        assert "/opt/here/bin/llmtraced" in unit.read_text()
        assert "/usr/local" not in unit.read_text()
    done = subprocess.run([here / "lib/llmtraced/bin/python", "-m", "llmtraced", "--version"], cwd="/", check=False)
    assert done.returncode == 0
    script = (here / "bin/llmtraced").read_text()
    assert script.startswith("#!/opt/here/lib/llmtraced/bin/python")
    assert str(tmp_path) not in script

    (tmp_path / "etc/llmtraced.toml").write_text("# mine\n")
    subprocess.run([*make, "install-files"], check=True)
    subprocess.run([*make, "uninstall"], check=True)
    assert [p for p in here.rglob("*") if not p.is_dir()] == []
    assert (tmp_path / "etc/llmtraced.toml").read_text() == "# mine\n"
