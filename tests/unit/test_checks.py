"""What is concluded from what is found, on machines that are not at hand."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from llmtraced import checks, requirements
from llmtraced.cgroup import Cgroup
from llmtraced.commands import check as command
from llmtraced.commands import main
from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.headers import Headers
from llmtraced.requirements import Check

ALL = "Name:\tpython\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n"
HOST = "         0          0 4294967295\n"


def test_root_with_everything() -> None:
    assert requirements.privileges(0, ALL, HOST).status == "ok"


def test_not_root_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["llmtraced", "check", "--pid", "7"])
    check = requirements.privileges(1000, "CapEff:\t0000000000000000\n", HOST)
    assert (check.status, check.required) == ("missing", True)
    assert check.remedy.startswith("sudo ")
    assert check.remedy.endswith(" -m llmtraced check --pid 7")


def test_root_of_a_container() -> None:
    docker = "CapEff:\t00000000a80425fb\n"
    check = requirements.privileges(0, docker, HOST)
    assert check.status == "missing"
    assert "CAP_SYS_ADMIN" in check.detail
    assert "--privileged" in check.remedy
    enough = requirements.privileges(0, f"CapEff:\t{1 << 38 | 1 << 39:016x}\n", HOST)
    assert enough.status == "degraded"
    assert "CAP_SYS_PTRACE" in enough.detail
    assert "user 7," in requirements.privileges(7, ALL, HOST).detail, "not who it is counts, but what it may"
    rootless = requirements.privileges(0, ALL, "         0       1000          1\n")
    assert rootless.status == "missing"
    assert "rootless" in rootless.detail


@pytest.mark.parametrize(
    ("result", "status", "lockdown", "wanted", "words"),
    [
        (errno.EBADF, "", "", "ok", "works"),
        (errno.EBADF, "", "none [integrity] confidentiality\n", "ok", "[integrity]"),
        (errno.EBADF, "", "none integrity [confidentiality]\n", "missing", "locked down"),
        (errno.EPERM, "Seccomp:\t2\n", "", "missing", "seccomp"),
        (errno.EPERM, "Seccomp:\t0\n", "", "missing", "not permitted"),
        (errno.ENOSYS, "", "", "missing", "no bpf system call"),
    ],
)
def test_the_bpf_system_call(result: int, status: str, lockdown: str, wanted: str, words: str) -> None:
    check = requirements.bpf(result, status, lockdown)
    assert check.status == wanted
    assert words in check.detail
    assert bool(check.remedy) == (wanted != "ok")


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ('PRETTY_NAME="x"\nID=debian\n', "debian"),
        ("ID=ubuntu\nID_LIKE=debian\n", "ubuntu"),
        ("ID=linuxmint\nID_LIKE=ubuntu\n", "ubuntu"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "fedora"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "suse"),
        ("ID=arch\n", "arch"),
        ("ID=nixos\n", ""),
        ("", ""),
    ],
)
def test_distributions(text: str, family: str) -> None:
    assert requirements.distribution(text) == family


def nothing() -> Headers:
    raise LlmtracedError("no kernel headers for 6.1; install them", UNSUPPORTED)


@pytest.mark.parametrize(
    ("here", "words"), [("debian", "linux-headers-amd64"), ("fedora", "dnf install kernel-devel"), ("arch", "pacman")]
)
def test_headers_by_distribution(here: str, words: str) -> None:
    check = requirements.kernel_headers(nothing, here)
    assert (check.status, check.detail) == ("missing", "no kernel headers for 6.1")
    assert words in check.remedy
    assert words in requirements.kernel_headers(nothing, "").remedy


def test_other_kernels_headers_are_fine() -> None:
    found = Headers(Path("/usr/src/linux-headers-6.1"), Path("/usr/src/linux-headers-6.1"), exact=False, in_place=False)
    check = requirements.kernel_headers(lambda: found, "")
    assert check.status == "ok"
    assert "sufficient" in check.detail


def test_bcc_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr("sys.executable", str(python))
    python.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'OSError: libbcc.so.0: cannot open' >&2\nexit 1\n")
    python.chmod(0o755)
    check = requirements.bcc("fedora")
    assert (check.status, check.detail) == ("missing", "OSError: libbcc.so.0: cannot open")
    assert check.remedy == "dnf install python3-bcc"
    assert "python3-bpfcc" in requirements.bcc("").remedy
    python.write_text("#!/bin/sh\necho 0.31.0\n")
    assert requirements.bcc("").detail == "version 0.31.0"


def test_memory() -> None:
    plenty, little = "MemAvailable:   8000000 kB\n", "MemAvailable:   80000 kB\n"
    assert requirements.memory(plenty, None).status == "ok"
    assert requirements.memory(little, None).status == "degraded"
    assert requirements.memory(plenty, Cgroup(2, Path("/x"), 64 << 20)).status == "degraded"


def test_machines_that_lack_something(tmp_path: Path) -> None:
    assert requirements.architecture("aarch64").status == "missing"
    with_it, without = (f"CapEff:\t{1 << 38 if given else 0:016x}\n" for given in (True, False))  # CAP_PERFMON
    assert requirements.perf_events(errno.ENOSYS, "", with_it).status == "missing"
    assert requirements.perf_events(0, "4\n", with_it).status == "ok"
    refused = requirements.perf_events(errno.EACCES, "3\n", with_it)
    assert (refused.status, "CAP_PERFMON is not enough" in refused.detail) == ("missing", True)
    assert "kernel.perf_event_paranoid=2" in refused.remedy
    refused = requirements.perf_events(errno.EACCES, "3\n", without)
    assert (refused.status, refused.remedy) == ("missing", "root, or CAP_PERFMON")
    assert requirements.btf(tmp_path / "vmlinux").status == "missing"
    assert requirements.cgroup(None).status == "degraded"


def test_only_what_is_required_counts() -> None:
    fine = [Check("a", "ok", ""), Check("b", "degraded", "", required=False), Check("c", "missing", "", required=False)]
    assert checks.all_fine(fine)
    assert not checks.all_fine([*fine, Check("d", "missing", "")])
    assert not checks.all_fine([*fine, Check("d", "unknown", "")])


def test_a_look_that_fails_does_not_keep_the_others_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> Check:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(requirements, "btf", refused)
    monkeypatch.setattr(requirements, "bcc", lambda _here: Check("bcc", "ok", ""))
    found = {c.name: c for c in requirements.system()}
    assert found["btf"].status == "unknown"
    assert list(found)[-1] == "memory cgroups"


def test_programs_that_do_not_compile() -> None:
    said = "cannot load the BPF programs: BCC cannot compile them (x)\nIn file included\n/virtual/main.c:3:1: error: oh"
    check = checks.refused(said)
    assert check.detail.endswith("(x) /virtual/main.c:3:1: error: oh")
    assert "-v check" in check.remedy
    assert "lockdown" in checks.refused("cannot load: bpf: Operation not permitted").remedy


def test_a_choice_of_headers_that_leads_nowhere() -> None:
    def find() -> Headers:
        raise LlmtracedError("BCC_KERNEL_SOURCE=/x is no complete tree; unset it")

    assert requirements.kernel_headers(find, "debian").remedy == "unset BCC_KERNEL_SOURCE"


# --- the command


SOME = [
    Check("privileges", "ok", "root"),
    Check("headers", "missing", "none", "apt-get install x"),
    Check("btf", "degraded", "none", required=False),
]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the command is given to print; change it in a test."""
    found = list(SOME)
    monkeypatch.setattr(checks, "run", lambda _pid: iter(found))
    return found


def test_text(told: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["ok", "privileges", "root"]
    assert out[2].strip() == "→ apt-get install x"
    assert out[-1] == "missing: headers"
    assert "\x1b" not in "".join(out)
    assert code in (3, 4)


def test_exit_codes(told: list[Check], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert main(["check"]) == 4
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["check"]) == 3
    told.pop(1)
    assert main(["check"]) == 0


def test_json(told: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["checks"][1] == {
        "name": "headers",
        "status": "missing",
        "detail": "none",
        "remedy": "apt-get install x",
        "required": True,
    }
    assert command.__doc__
