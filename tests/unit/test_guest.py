"""The kernel for a guest: which packages it is made of, and what becomes of a command that takes too long."""

import stat
import sys
from pathlib import Path

import pytest
from helpers import wait_until

from llmtraced.errors import LlmtracedError

sys.path.append(str(Path(__file__).parents[1] / "guest"))
import boot

DEPENDS = {
    "linux-image-amd64": "linux-image-amd64\n  Depends: linux-image-9.1.0-2-amd64\n",
    "linux-image-9.1-amd64": "linux-image-9.1-amd64\n  Depends: linux-image-9.1.0-2-amd64\n",
    "linux-image-9.1.0-2-amd64": "x\n |Depends: dracut\n  Depends: kmod\n  Depends: linux-modules-9.1.0-2-amd64\n",
    "linux-headers-9.1.0-2-amd64": "x\n  Depends: linux-headers-9.1.0-2-common\n  Depends: linux-kbuild-9.1\n",
}


@pytest.mark.parametrize("package", ["linux-image-amd64", "linux-image-9.1-amd64", "linux-image-9.1.0-2-amd64"])
def test_a_kernel_is_fetched_once_with_all_its_parts(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []

    def output(*command: str, cwd: Path | None = None) -> str:
        ran.append(command)
        if command[0] == "apt-cache":
            return DEPENDS[command[-1]]
        if command[:2] == ("apt-get", "download"):
            assert cwd is not None
            (cwd / "image.deb").touch()
        if command[0] == "dpkg":
            modules = Path(command[3]) / "usr/lib/modules/9.1.0-2-amd64"
            modules.mkdir(parents=True)
            (modules / "vmlinuz").touch()
        return ""

    monkeypatch.setattr(boot, "_output", output)
    kernel = boot.ensure_kernel(package, tmp_path)
    download = next(command for command in ran if command[1] == "download")
    assert set(download[3:]) == {
        "linux-image-9.1.0-2-amd64",
        "linux-modules-9.1.0-2-amd64",
        "linux-headers-9.1.0-2-amd64",
        "linux-headers-9.1.0-2-common",
    }
    assert kernel.image == tmp_path / "kernels/9.1.0-2-amd64/lib/modules/9.1.0-2-amd64/vmlinuz"
    assert [f.name for f in (tmp_path / "kernels").iterdir()] == ["9.1.0-2-amd64"]  # and no half of one
    ran.clear()
    assert boot.ensure_kernel("linux-image-9.1.0-2-amd64", tmp_path) == kernel
    assert ran == []


def test_an_older_kernel_has_its_image_in_boot(tmp_path: Path) -> None:
    assert boot.Kernel(tmp_path, "6.1").image == tmp_path / "boot/vmlinuz-6.1"


def test_a_copied_root_has_each_file_once_and_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tmp_path / "machine"
    for name in ("lib/so", "python/bin/python3", "repo/.venv/bin/pytest", "repo/tests/guest/boot.py", "server/bin/it"):
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(name)
    (machine / "lib64").symlink_to("lib")
    monkeypatch.setattr(boot, "COPIED", tuple(str((machine / name).relative_to("/")) for name in ("lib*", "nowhere*")))
    monkeypatch.setattr(boot, "__file__", str(machine / "repo/tests/guest/boot.py"))
    monkeypatch.setattr(boot.sys, "executable", str(machine / "python/bin/python3"))
    monkeypatch.setattr(boot.sys, "prefix", str(machine / "repo/.venv"))
    (tmp_path / "cache").mkdir()
    with boot._root([machine / "server"], tmp_path / "cache") as root:
        found = root / machine.relative_to("/")
        assert {str(p.relative_to(found)) for p in found.rglob("*") if p.is_file() and not p.is_symlink()} == {
            str(p.relative_to(machine)) for p in machine.rglob("*") if p.is_file() and not p.is_symlink()
        }
        assert (found / "lib64").is_symlink()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_no_kernel_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(boot, "_output", lambda *command, cwd=None: "coreutils\n  Depends: libc6\n")
    with pytest.raises(LlmtracedError, match="coreutils is no package of a kernel"):
        boot.ensure_kernel("coreutils", tmp_path)


@pytest.mark.parametrize(("body", "code"), [("exit 7", 7), ("echo guest; sleep 60 & wait", boot.TIMED_OUT)])
def test_the_exit_code_is_the_commands_and_nothing_outlives_it(
    body: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("vng", f"echo $$ > {tmp_path}/pid\n{body}"), ("qemu-system-x86_64", ""), ("busybox", "")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(boot.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(boot, "_output", lambda *command, cwd=None: "")
    assert boot.run(boot.Kernel(tmp_path, "6.1"), ["true"], minutes=0.05) == code
    group = int((tmp_path / "pid").read_text())
    wait_until(lambda: not [s for s in Path("/proc").glob("[0-9]*/stat") if in_group(s, group)], 10, "all are gone")
    assert list((tmp_path / "cache").iterdir()) == []
    said = capfd.readouterr()
    assert ("killed" in said.err, said.out) == ((True, "guest\n") if code == boot.TIMED_OUT else (False, ""))


def in_group(file: Path, group: int) -> bool:
    try:
        state, _, number = file.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(number) == group and state != "Z"
