"""What the parent makes of its child, the compiler: answers, refusals, and more words than a pipe holds."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtraced import headers, schema
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError
from llmtraced.probes import btf, compiler, kernel, loader
from llmtraced.probes.image import Image, taken, used_maps
from llmtraced.probes.kernel import MapInfo


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put Python statements in the compiler's place; ``reply(bytes)`` answers the parent."""
    python = sys.executable

    def becomes(statements: str) -> None:
        script = tmp_path / "child"
        script.write_text(
            f"#!{python}\nimport os, signal, socket, sys\nsignal.alarm(20)\n"
            f"reply = socket.socket(fileno=int(sys.argv[3])).sendall\n{statements}\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    monkeypatch.setattr(compiler, "held", lambda: {"CAP_SYS_ADMIN"})
    monkeypatch.setenv("LLMTRACED_CACHE", str(tmp_path / "kept"))
    return becomes


def test_a_child_that_says_much_holds_nobody_up(child: Callable[[str], None]) -> None:
    child("os.write(1, b'x' * 1_000_000 + b' the end')\nos.write(2, b' of it')")
    with pytest.raises(LlmtracedError, match="ended without an answer") as caught:
        loader.load()
    assert str(caught.value).endswith("x the end of it")
    assert len(str(caught.value)) < 3000
    assert caught.value.exit_code == UNSUPPORTED


def test_a_refusal_keeps_its_exit_code(child: Callable[[str], None]) -> None:
    child("""reply(b'{"error": "no headers", "exit_code": 3}')""")
    with pytest.raises(LlmtracedError) as caught:
        loader.load()
    assert str(caught.value) == "cannot load the BPF programs: no headers"
    assert caught.value.exit_code == NO_PERMISSION


AGAIN = """
tried = os.environ["LLMTRACED_HEADERS_SKIP"]
reply(b'{"error": "cannot compile with %s", "exit_code": 4}' % tried.encode() if tried < "WORKS" else b'an image')
"""


@pytest.mark.parametrize(
    ("there", "works", "said"), [(2, "1", ""), (2, "2", "with 0"), (9, "3", "with 0"), (0, "1", "0")]
)
def test_headers_that_do_not_compile_make_room_for_others(
    child: Callable[[str], None], there: int, works: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates() -> list[headers.Headers]:
        if not there:
            raise LlmtracedError("no kernel headers", UNSUPPORTED)
        return [headers.Headers(Path(), Path(), exact=False, in_place=False)] * there

    monkeypatch.setattr(headers, "candidates", candidates)
    child(AGAIN.replace("WORKS", works))
    if not said:
        assert compiler.compile_in_child("module", "argument") == b"an image"
        return
    with pytest.raises(LlmtracedError, match=f"^cannot load the BPF programs: cannot compile .*{said}$"):
        compiler.compile_in_child("module", "argument")


IMAGE = Image((MapInfo("ring", 27, 0, 0, 4096, 0),), {"p": ("KPROBE", 0, b"\x95" + bytes(7))}, {"headers": "h"})


def test_what_was_compiled_is_kept_for_what_it_depends_on(child: Callable[[str], None], tmp_path: Path) -> None:
    data = IMAGE.encoded()
    child(f"reply({data!r})")
    assert compiler.image("module", "argument", ["source"]) == IMAGE
    child("""reply(b'{"error": "compiled again", "exit_code": 4}')""")
    assert compiler.image("module", "argument", ["source"]) == IMAGE
    for module, argument, depends in (
        ("other", "argument", ["source"]),
        ("module", "other", ["source"]),
        ("module", "argument", ["other"]),
        ("module", "argument", ["sour", "ce"]),
    ):
        with pytest.raises(LlmtracedError, match="compiled again"):
            compiler.image(module, argument, depends)
    with pytest.raises(LlmtracedError, match="compiled again"):
        compiler.image("module", "argument", ["source"], anew=True)
    (path,) = (tmp_path / "kept" / "programs").iterdir()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(LlmtracedError, match="compiled again"):
        compiler.image("module", "argument", ["source"])


def test_what_cannot_be_kept_is_compiled_each_time(child: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    child(f"reply({IMAGE.encoded()!r})")
    for _ in range(2):
        assert compiler.image("module", "argument", []) == IMAGE


def test_another_kernel_needs_another_image(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(f"reply({IMAGE.encoded()!r})")
    types = tmp_path / "vmlinux"
    monkeypatch.setattr(compiler, "_BTF", types)
    for content in (None, b"one", b"two"):
        if content:
            types.write_bytes(content)
        compiler.image("module", "argument", [])
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/elsewhere")
    compiler.image("module", "argument", [])
    assert len(list((tmp_path / "kept" / "programs").iterdir())) == 4


@pytest.mark.parametrize("data", [b"", b"x", b"{}", b"0" * 64 + b"\n{}", IMAGE.encoded()[:-1]])
def test_damaged_images(data: bytes) -> None:
    with pytest.raises(ValueError, match="digest"):
        Image.decoded(data)


def test_an_image_of_something_else() -> None:
    text = b"{}"
    with pytest.raises(ValueError, match="no image"):
        Image.decoded(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def test_maps_are_found_in_the_instructions_that_load_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(source: int, number: int) -> bytes:
        return struct.pack("<BBhiBBhi", 0x18, source << 4 | 1, 0, number, 0, 0, 0, 7)

    plain = struct.pack("<BBhi", 0xB7, 0x10, 0, 5)  # not wide, whatever its number
    # A number that looks like a load of map 5 in the second half of a wide one is none.
    tail = struct.pack("<BBhi", 0x18, 0x11, 0, 5)
    code = wide(1, 5) + plain + wide(0, 5) + wide(2, 9) + struct.pack("<BBhi", 0x18, 1, 0, 5) + tail + wide(1, 5)
    assert used_maps([code]) == [5, 9]
    monkeypatch.setattr(kernel, "map_info", lambda fd, name: MapInfo(name or f"map{fd}", 2, 4, 8, 1, 0))
    image = taken({"p": ("KPROBE", 0, code)}, {9: "named", 3: "unused"}, {})
    assert [one.name for one in image.maps] == ["named", "unused", "map5"]
    moved = image.programs["p"][2]
    assert used_maps([moved]) == [2, 0]
    assert [i for i, (a, b) in enumerate(zip(code, moved, strict=True)) if a != b] == [4, 44, 76]
    made = iter((21, 22, 23))
    monkeypatch.setattr(kernel, "create_map", lambda _: next(made))
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    loaded: list[bytes] = []
    monkeypatch.setattr(kernel, "load_program", lambda name, code, kind, number: loaded.append(code) or 30)
    assert Image.decoded(image.encoded()).load(["named"]) == ({"p": 30}, {"named": 21}, {})
    assert used_maps(loaded) == [23, 21]
    assert closed == [22, 23]


def test_maps_that_cannot_be_made_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(info: MapInfo) -> int:
        if info.name == "second":
            raise OSError(12, "Cannot allocate memory")
        return 41

    closed: list[int] = []
    monkeypatch.setattr(kernel, "create_map", create)
    monkeypatch.setattr(os, "close", closed.append)
    image = Image((MapInfo("first", 2, 4, 8, 1, 0), MapInfo("second", 2, 4, 8, 1, 0)), {}, {})
    with pytest.raises(LlmtracedError, match="Cannot allocate memory"):
        loader.load_image(image, ["first"])
    assert closed == [41]


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "held", lambda: {"CAP_BPF", "CAP_SYS_PTRACE"})
    with pytest.raises(LlmtracedError, match="needs root") as caught:
        loader.load()
    assert caught.value.exit_code == NO_PERMISSION


def test_a_pid_namespace_is_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "namespace").touch()
    status = (tmp_path / "namespace").stat()
    found = loader._pid_namespace(tmp_path / "namespace")
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    assert found == {"LT_PIDNS_DEV": device, "LT_PIDNS_INO": status.st_ino}


def test_flags_fit_the_sizes() -> None:
    sizes = loader.Sizes(ring_bytes=1 << 20, bounds=1000, model_bytes=1 << 30, ranges=64)
    flags = dict(flag.removeprefix("-D").split("=", 1) for flag in loader.compile_flags(sizes, 3, {}))
    assert int(flags["LT_RING_PAGES"]) * schema.PAGE == 1 << 20
    assert int(flags["LT_SEEN_WORDS"]) * 64 * schema.PAGE == 1 << 30
    assert 1 << int(flags["LT_PAGE_SHIFT"]) == schema.PAGE
    assert int(flags["LT_ACCOUNTS"]) == 3 * schema.SLOTS * schema.EPOCHS * len(schema.Probe)
    assert 2 ** int(flags["LT_BOUND_STEPS"]) > 1000, "a binary search over all of them comes to an end"
    assert 2 ** int(flags["LT_RANGE_STEPS"]) > 64
    wake = int(flags["LT_WAKE_EVENTS"])
    assert wake & (wake - 1) == 0, "it is used as a mask"


def test_every_name_that_the_sources_use_is_given() -> None:
    text = loader.source()
    layout = btf.kernel_layout(btf.running())
    given = {flag.removeprefix("-D").split("=")[0] for flag in loader.compile_flags(loader.Sizes(), 2, layout)}
    given |= set(re.findall(r"#define (\w+)", text))
    used = set(re.findall(r"\b(?:LT|SYSCALL)_\w+", re.sub(r"//[^\n]*", "", text)))
    assert used - given == set()
    assert [p for p in loader.PROGRAMS if f"{p}(" not in text] == []
    assert [m for m in loader._MAPS if not re.search(rf"^BPF_\w+\([^;]*\b{m}\b[^;]*\);", text, re.MULTILINE)] == []
