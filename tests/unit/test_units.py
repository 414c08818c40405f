"""The units, the example configuration, the manual and the completion: that they are right, current and confined."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from helpers import need

from llmtraced.commands import COMMANDS, _manual, build_parser
from llmtraced.config import Config, read_config

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"


def analyze(*words: str) -> str:
    need(shutil.which("systemd-analyze"), "needs systemd", "e2e")
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that is there, and the server that one of them is for."""
    for unit in UNITS.glob("*.service"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/bin/llmtraced", "/bin/true"))
    (tmp_path / "llama-server.service").write_text("[Service]\nExecStart=/bin/true\n")
    shutil.copy(tmp_path / "llmtraced-prefetch@.service", tmp_path / "llmtraced-prefetch@llama-server.service")
    return tmp_path


@pytest.mark.parametrize("name", ["llmtraced.service", "llmtraced-prefetch@llama-server.service"])
def test_systemd_has_nothing_to_say_against_them(units: Path, name: str) -> None:
    assert analyze("verify", "--man=no", "--recursive-errors=no", str(units / name)) == ""


@pytest.mark.parametrize(("name", "most"), [("llmtraced.service", 35), ("llmtraced-prefetch@.service", 25)])
def test_exposure_is_limited(units: Path, name: str, most: int) -> None:
    """And each point that is left has its reason in docs/security.md."""
    analyze("security", "--offline=true", "--no-pager", f"--threshold={most}", str(units / name))
    table = analyze("security", "--offline=true", "--no-pager", str(units / name))
    left = {line.split()[1] for line in table.splitlines() if line.startswith("✗")}
    explained = (ROOT / "docs/security.md").read_text()
    # The name of a group of capabilities differs between versions of systemd; the documentation names one.
    assert left
    assert "MemoryDenyWriteExecute=" not in left
    assert {n for n in left if re.sub(r"=.*", "", n) not in explained} == set()


def test_the_prefetcher_has_no_right_to_bpf() -> None:
    text = (UNITS / "llmtraced-prefetch@.service").read_text()
    given = re.findall(r"^(?:Ambient|Bounding)?Capabilit\w+=(.*)$", text, re.MULTILINE)
    assert given
    assert not {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN"} & set(" ".join(given).split())


def test_the_example_is_complete_and_says_the_defaults() -> None:
    path = UNITS / "llmtraced.toml"
    assert read_config(path) == Config()
    assert set(tomllib.loads(path.read_text())) == {f.name for f in dataclasses.fields(Config)}
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            assert lines[i - 1].startswith("#"), f"{line} is not explained"


def test_the_manual_has_every_command_and_option() -> None:
    page = _manual.page().replace("\\-", "-")
    for name in COMMANDS:
        assert f".SS {name}\n" in page
    for parser in _manual._parsers(build_parser()):
        for action in parser._actions:
            for flag in action.option_strings:
                assert f"\\fB{flag}\\fR" in page
    assert "%(" not in page
    assert "%%" not in page
    # Lines that begin with a dot are requests, and only ours may be some.
    requests = {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))}
    assert requests == {".TH", ".SH", ".SS", ".TP", ".B", ".I", ".nf", ".fi"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["da"], ["daemon"]),
        (["daemon", "--det"], ["--detail"]),
        (["daemon", "--detail", "o"], ["ops"]),
        (["-v", "prefetch", "--strategy", "p"], ["pin", "pattern"]),
        (["bench", "ev"], ["events"]),
        (["bench", "scrape", "--te"], ["--tensors"]),
        (["bench", "prefetch", "--rou"], ["--rounds"]),
    ],
)
def test_the_shell_completes(words: list[str], wanted: list[str], tmp_path: Path) -> None:
    (tmp_path / "completion").write_text(_manual.completion())
    script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _llmtraced; printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "-c", script, "bash", str(tmp_path / "completion"), "llmtraced", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted
