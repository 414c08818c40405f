"""`llmtraced check` as it is run: on this machine, on machines that lack something, and of a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import need

from llmtraced import checks, children
from llmtraced.probes import KERNEL_POINTS, PROCESS_POINTS

pytestmark = pytest.mark.kernel

ENVIRONMENT = children.environment(PYTHONDONTWRITEBYTECODE="1")


def check(*options: str, before: Sequence[str] = (), **how: Any) -> tuple[int, dict[str, dict[str, Any]], bool]:
    """Run it; return its exit code, its checks by name (the last of a name) and its ``ok``."""
    command = [*before, sys.executable, "-m", "llmtraced", "check", "--json", *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **how)
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    return done.returncode, {c["name"]: c for c in answer["checks"]}, answer["ok"]


@pytest.fixture
def user(small_model: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that maps a model and has no ggml in it."""
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
    code += "print('mapped', flush=True); input()"
    command = [sys.executable, "-c", code, str(small_model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "mapped\n"
        yield child
        child.communicate("\n")


def test_everything_is_there() -> None:
    code, found, ok = check()
    assert (code, ok) == (0, True), [c for c in found.values() if c["status"] != "ok"]
    for name in ("privileges", "btf", "bpf", "headers", "bcc", "programs", "ring", "flush", "uprobes"):
        assert found[name]["status"] == "ok", found[name]
    assert {f"attach {p.program}" for p in KERNEL_POINTS} <= found.keys()
    assert all(found[f"attach {p.program}"]["status"] == "ok" for p in KERNEL_POINTS if p.required)
    assert "61 and 61" in found["self-test"]["detail"]


def test_nothing_stays_attached() -> None:
    """What is attached lives as long as its descriptors do."""

    def descriptors() -> list[str]:
        return sorted(str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())

    list(checks.run())
    before = descriptors()
    list(checks.run())
    assert len(descriptors()) == len(before)
    assert not [d for d in descriptors() if "bpf" in d or "perf_event" in d]


def test_a_process_with_a_model_and_without_ggml(user: subprocess.Popen[str], small_model: Path) -> None:
    code, found, ok = check("--pid", str(user.pid))
    assert (code, ok) == (0, True)
    assert found["process"]["detail"].startswith(f"{user.pid}, ")
    assert small_model.name in found["model"]["detail"]
    assert "100%" in found["mapped"]["detail"]
    assert found["library"]["status"] == "degraded"
    for point in PROCESS_POINTS:
        hook = found[f"hook {point}"]
        assert (hook["status"], hook["required"]) == ("degraded", False)
        assert point.lost in hook["detail"]
    assert found["memory limit"]["status"] in ("ok", "degraded")


def test_no_such_process_and_no_model() -> None:
    code, found, ok = check("--pid", str(1 << 22))
    assert (code, ok, found["process"]["status"]) == (4, False, "missing")
    code, found, ok = check("--pid", str(os.getpid()))
    assert (code, ok, found["process"]["status"], found["model"]["status"]) == (4, False, "ok", "missing")
    assert "llmtraced record" in found["model"]["remedy"]


def test_a_machine_without_headers_and_without_bcc() -> None:
    need(shutil.which("unshare"), "needs unshare")
    folders = "/usr/src /lib/modules /usr/lib/python3/dist-packages"
    hide = f'for f in {folders}; do [ ! -d $f ] || mount -t tmpfs t $f; done; exec "$@"'
    code, found, ok = check(before=["unshare", "-m", "sh", "-c", hide, "sh"])
    assert (code, ok) == (4, False)
    for name in ("headers", "bcc"):
        assert found[name]["status"] == "missing"
        assert "install" in found[name]["remedy"] or "pacman" in found[name]["remedy"]
    assert found["memory cgroups"]["status"] in ("ok", "degraded")
    assert "needs headers, bcc" in found["programs"]["detail"]
    assert found["attach on_add"]["status"] == "unknown"


def test_nothing_is_needed_of_tracefs() -> None:
    need(shutil.which("unshare"), "needs unshare")
    script = 'umount -R /sys/kernel/debug/tracing /sys/kernel/tracing 2>/dev/null; exec "$@"'
    code, _, _ = check(before=["unshare", "-m", "sh", "-c", script, "sh"])
    assert code == 0


def test_a_kernel_that_does_not_describe_its_types(tmp_path: Path) -> None:
    need(shutil.which("unshare"), "needs unshare")
    script = 'mount --bind /dev/null /sys/kernel/btf/vmlinux && exec "$@"'
    code, found, _ = check(before=["unshare", "-m", "sh", "-c", script, "sh"])
    assert (code, found["btf"]["status"]) == (4, "missing")
    assert "BTF" in found["btf"]["detail"]
    assert "needs btf" in found["programs"]["detail"]


def test_a_pid_namespace_of_its_own_numbers_processes_anew() -> None:
    """Its first process is 1 there and another one to the kernel: the programs must ask for the number that we know."""
    need(shutil.which("unshare"), "needs unshare")
    code, found, _ = check(before=["unshare", "-pf", "--mount-proc"])
    assert (code, found["self-test"]["status"]) == (0, "ok")


AS_NOBODY = """
import os, sys
import llmtraced.checks, llmtraced.commands.check  # first: this user may not be able to read them
from llmtraced.commands import main
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(["check", "--json", "--pid", "1"]))
"""


def test_without_root() -> None:
    command = [sys.executable, "-c", AS_NOBODY]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    found = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 3
    assert found["privileges"]["remedy"].startswith("sudo ")
    assert found["memory"]["status"] == "ok"
    assert found["programs"]["status"] == "unknown"
    assert found["model"]["remedy"] == "run as root"
