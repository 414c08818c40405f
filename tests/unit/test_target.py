"""What is read from /proc, which other processes write: hostile names and paths included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmtraced import elf, target
from llmtraced.bench import models
from llmtraced.cgroup import Cgroup, cgroup_of
from llmtraced.probes.points import Uprobe
from llmtraced.schema import Detail

LINE = b"7f0000001000-7f0000003000 r--s 00002000 fe:01 131 "


def one(path: bytes) -> target.Mapping:
    (found,) = target.parse_maps(LINE + b"                      " + path + b"\n")
    return found


def test_a_model_mapping() -> None:
    assert one(b"/models/m.gguf") == target.Mapping(
        0x7F0000001000, 0x7F0000003000, "r--s", 0x2000, 0xFE << 20 | 1, 131, "/models/m.gguf", False
    )


@pytest.mark.parametrize(
    ("raw", "path", "deleted"),
    [
        (b"/a b  c/m.gguf", "/a b  c/m.gguf", False),
        (b"/trailing ", "/trailing ", False),
        (b"/m.gguf (deleted)", "/m.gguf", True),
        (b"/m (deleted).gguf", "/m (deleted).gguf", False),
        (rb"/new\012line", "/new\nline", False),
        (rb"/tab\011 stays", r"/tab\011 stays", False),  # the kernel escapes newlines alone
        (rb"/back\134slash\040", r"/back\134slash\040", False),
        (b"/carriage\rreturn", "/carriage\rreturn", False),
        (b"/form\x0c\x1b[31mfeed", "/form\x0c\x1b[31mfeed", False),
        (b"/not utf-8 \xff\xfe", os.fsdecode(b"/not utf-8 \xff\xfe"), False),
        (b"/7f0000001000-7f0000003000 r--s 0 fe:01 7 /x", "/7f0000001000-7f0000003000 r--s 0 fe:01 7 /x", False),
    ],
)
def test_paths_come_out_as_they_are(raw: bytes, path: str, deleted: bool) -> None:
    found = one(raw)
    assert (found.path, found.deleted, found.inode) == (path, deleted, 131)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"garbage",
        b"7f00-7f01 rw-p 00000000 00:00 0 ",
        b"7f00-7f01 rw-p 00000000 00:00 0                          [heap]",
        b"7f00-7f01 r--p 00000000 00:0e 12                         anon_inode:[perf_event]",
        b"7f00-7f01 r--p 00000000 fe:01 0                          /no/inode",
        b"7f00-7f01 r--",
        b"XXXX-7f01 r--p 00000000 fe:01 12                         /m",
        b"\xff\xff\xff",
    ],
)
def test_what_is_no_file_is_left_out(line: bytes) -> None:
    assert target.parse_maps(line + b"\n" + LINE + b"/m\n" + line) == [one(b"/m")]


def test_large_numbers() -> None:
    line = b"ffffffffff600000-ffffffffff601000 --xp ffffffff000 103:00005 18446744073709551615 /m"
    (found,) = target.parse_maps(line)
    assert (found.device, found.inode) == (0x103 << 20 | 5, (1 << 64) - 1)


def test_a_newline_in_a_real_path_is_found_again(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "a\nb \\134 (x).gguf"
    path.write_bytes(bytes(8192))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 8192, prot=mmap.PROT_READ):
        (found,) = [m for m in target.maps(os.getpid()) if m.inode == path.stat().st_ino]
        assert found.path == str(path)
        assert target.reachable(os.getpid(), found) == str(path)
        path.unlink()
        (found,) = [m for m in target.maps(os.getpid()) if m.path == str(path)]
        assert found.deleted
        assert "/map_files/" in target.reachable(os.getpid(), found)


def test_a_process_that_is_not_there() -> None:
    assert target.maps(1 << 30) == []
    with pytest.raises(ProcessLookupError):
        target.start_ticks(1 << 30)


def test_a_process_whose_name_looks_like_its_numbers() -> None:
    """The name in /proc/PID/stat stands in parentheses, and may hold some itself."""
    code = "open('/proc/self/comm', 'w').write(') R 1 (x) 9'); print('named', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "named\n"
        ours, theirs = target.start_ticks(os.getpid()), target.start_ticks(child.pid)
        child.communicate("\n")
    uptime = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
    assert ours <= theirs <= uptime


def test_what_has_ended_is_not_alive() -> None:
    """Neither as a zombie, nor when its parent has taken notice."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        one = target.Target(child.pid, target.start_ticks(child.pid), "cat", ["cat"])
        assert one.alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert target.start_ticks(child.pid) == one.start
        assert not one.alive
    assert not one.alive
    assert not target.Target(os.getpid(), one.start, "python", ["python"]).alive, "another with its number"


def test_whether_it_is_alive_can_be_asked_at_any_moment_of_its_end() -> None:
    for _ in range(200):
        with subprocess.Popen(["true"]) as child:
            one = target.Target(child.pid, target.start_ticks(child.pid), "true", ["true"])
            ends = threading.Thread(target=child.wait)
            ends.start()
            while one.alive:
                pass
            ends.join()


# --- symbols


def test_functions_are_those_that_nm_lists() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm: apt-get install binutils")
    libc = next(m.path for m in target.maps(os.getpid()) if "x" in m.permissions and "libc.so" in m.path)
    listed = subprocess.run([nm, "-D", "--defined-only", libc], capture_output=True, text=True, check=True).stdout
    wanted = {}
    for line in listed.splitlines():
        address, kind, name = line.split(maxsplit=2)
        if kind in "TtW" and name.startswith("get"):
            wanted[name.partition("@")[0]] = int(address, 16)
    found = elf.functions(libc, b"get")
    assert len(wanted) > 50
    assert wanted.keys() <= found.keys()
    # In libc's text the address and the offset in the file are the same, or differ by the same amount throughout.
    assert len({wanted[name] - found[name] for name in wanted}) == 1


def test_what_is_no_elf_file_is_refused(tmp_path: Path) -> None:
    from elftools.common.exceptions import ELFError

    path = tmp_path / "script"
    path.write_bytes(b"#!/bin/sh\n" * 100)
    with pytest.raises((ELFError, OSError, ValueError)):
        elf.functions(str(path), b"ggml_")


def library(folder: Path, name: str, *functions: str) -> Path:
    """Compile a library with functions of these names, which may have dots in them, as optimisers give them."""
    code = [f'int f{n}(void) __asm__("{one}"); int f{n}(void) {{ return {n}; }}\n' for n, one in enumerate(functions)]
    (folder / f"{name}.c").write_text("".join(code))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / f"{name}.so", folder / f"{name}.c"], check=True)
    return folder / f"{name}.so"


def look(*libraries: Path) -> target.Target:
    """Look at a process that has loaded these libraries."""
    code = "import ctypes, sys; held = [ctypes.CDLL(p) for p in sys.argv[1:]]; print('loaded', flush=True); input()"
    command = [sys.executable, "-c", code, *map(str, libraries)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loaded\n"
        found = target.Target(child.pid, 0, "python", command)
        assert found.symbols
        child.communicate("\n")
    return found


def test_hooks_are_all_of_one_library(tmp_path: Path) -> None:
    """Of several that evaluate graphs the last one loaded is taken, whole; what is in none of them, from elsewhere."""
    base = library(tmp_path, "libggml-base", "ggml_other", "ggml_get_rows")
    first = library(tmp_path, "libggml-cpu-x64", "ggml_graph_compute", "ggml_mul_mat", "ggml_only_here")
    last = library(tmp_path, "libggml-cpu-zen4", "ggml_graph_compute", "ggml_mul_mat")

    alone = look(base, first)
    where = {name: symbol.library for name, symbol in alone.symbols.items() if name.startswith("ggml_")}
    assert where == dict.fromkeys(("ggml_graph_compute", "ggml_mul_mat", "ggml_only_here"), str(first)) | dict.fromkeys(
        ("ggml_other", "ggml_get_rows"), str(base)
    )
    assert not alone.rivalry
    both = look(base, first, last)
    where = {name: symbol.library for name, symbol in both.symbols.items() if name.startswith("ggml_")}
    assert where == dict.fromkeys(("ggml_graph_compute", "ggml_mul_mat"), str(last)) | dict.fromkeys(
        ("ggml_other", "ggml_get_rows"), str(base)
    )
    assert both.rivals == [str(first)]
    assert "libggml-cpu-x64.so" in both.rivalry


EXTRA, DISPATCH, FUSED = (f"ggml_{name}" for name in ("cpu_extra_compute_forward", "compute_forward", "fused"))


def test_a_function_that_was_inlined_has_a_stand_in(tmp_path: Path) -> None:
    name = "libggml-cpu"
    inlined = look(library(tmp_path, name, "ggml_graph_compute", f"{DISPATCH}.lto_priv.0")).symbols
    assert inlined[EXTRA].instead == DISPATCH
    assert inlined[EXTRA].offset == inlined[DISPATCH].offset
    plain = look(library(tmp_path, name, "ggml_graph_compute", DISPATCH, f"{EXTRA}.lto_priv.3")).symbols
    assert plain[EXTRA].instead == ""
    assert plain[EXTRA].offset != plain[DISPATCH].offset


@pytest.mark.parametrize("names", [(f"{DISPATCH}.lto_priv.0", f"{DISPATCH}.lto_priv.1"), (f"{DISPATCH}.isra.0",), ()])
def test_what_may_be_another_function_is_no_stand_in(tmp_path: Path, names: tuple[str, ...]) -> None:
    symbols = look(library(tmp_path, "libggml-cpu", "ggml_graph_compute", *names)).symbols
    assert symbols.keys().isdisjoint({EXTRA, DISPATCH})


def test_what_a_build_lacks_is_missed_only_where_it_may_have_been_inlined() -> None:
    point = Uprobe("program", FUSED, "lost", Detail.FULL, beside=EXTRA)
    there, inlined = target.Symbol("library", 1), target.Symbol("library", 1, DISPATCH)
    assert point.is_needed({EXTRA: there, FUSED: there})
    assert point.is_needed({EXTRA: inlined})
    assert not point.is_needed({EXTRA: there})
    assert not point.is_needed({FUSED: there})


# --- arguments


def test_arguments_that_name_models(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    inside = models.write(tmp_path / "a=b" / "m.gguf", models.TINY_DENSE)
    plain = models.write(tmp_path / "plain.gguf", models.TINY_DENSE)
    (tmp_path / "fake.gguf").write_text("not a model")
    words = ["llama-server", "-m", str(inside), f"--model={plain}", "--x=fake.gguf", "missing.gguf", str(plain), "-v"]
    assert target.gguf_arguments(words, cwd=str(tmp_path)) == [str(inside), str(plain)]
    assert target.gguf_arguments(["-m", "plain.gguf"], cwd=str(tmp_path)) == [str(plain)]
    assert target.gguf_arguments(["-m", "/plain.gguf"], root=str(tmp_path)) == [str(plain)]
    assert target.gguf_arguments([]) == []
    scaled = ["--lora-scaled", "plain.gguf:0.5,a=b/m.gguf:2,absent.gguf:1"]
    assert target.gguf_arguments(scaled, cwd=str(tmp_path)) == [str(plain), str(inside)]
    assert target.gguf_arguments(["--lora=plain.gguf,plain.gguf:2"], cwd=str(tmp_path)) == [str(plain)]


def test_a_path_with_commas_and_colons_is_not_taken_apart(tmp_path: Path) -> None:
    plain = models.write(tmp_path / "plain.gguf", models.TINY_DENSE)
    odd = Path(shutil.copy(plain, tmp_path / "plain.gguf:1,b.gguf"))
    assert target.gguf_arguments(["--lora", odd.name], cwd=str(tmp_path)) == [str(odd)]


# --- memory cgroups


def proc(folder: Path, cgroup: str, mountinfo: str) -> Path:
    for name, text in (("42/cgroup", cgroup), ("self/mountinfo", mountinfo)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_version_1(tmp_path: Path) -> None:
    group = tmp_path / "memory/app/one"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1468006400\n")
    kinds = ((30, "cpu"), (31, "memory"))
    mounts = "".join(f"{n} 20 0:{n} / {tmp_path}/{kind} rw - cgroup cgroup rw,{kind}\n" for n, kind in kinds)
    fake = proc(tmp_path / "proc", "5:cpu:/app/one\n4:memory:/app/one\n0::/\n", mounts)
    assert cgroup_of(42, fake) == Cgroup(1, group, 1468006400)
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_of(42, fake) == Cgroup(1, group, None)


def test_version_2(tmp_path: Path) -> None:
    group = tmp_path / "cg/system.slice/llama:x.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    fake = proc(
        tmp_path / "proc", "0::/system.slice/llama:x.service\n", f"31 20 0:27 / {tmp_path}/cg rw - cgroup2 none rw\n"
    )
    assert cgroup_of(42, fake) == Cgroup(2, group, None)
    (group / "memory.max").write_text("4096\n")
    assert cgroup_of(42, fake) == Cgroup(2, group, 4096)


def test_the_root_of_version_2_has_no_limit(tmp_path: Path) -> None:
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg/cgroup.controllers").write_text("cpu memory\n")
    fake = proc(tmp_path / "proc", "0::/\n", f"31 20 0:27 / {tmp_path}/cg rw - cgroup2 none rw\n")
    assert cgroup_of(42, fake) == Cgroup(2, tmp_path / "cg", None)
    (tmp_path / "cg/cgroup.controllers").write_text("cpu\n")
    assert cgroup_of(42, fake) is None


def test_no_memory_controller(tmp_path: Path) -> None:
    assert cgroup_of(42, proc(tmp_path / "proc", "0::/\n", "")) is None
    assert cgroup_of(43, tmp_path / "proc") is None
