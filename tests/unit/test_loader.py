"""What the parent makes of its child, the compiler: answers, refusals, and more words than a pipe holds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtraced import headers, schema
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError
from llmtraced.probes import btf, loader


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

    monkeypatch.setattr(loader, "held", lambda: {"CAP_SYS_ADMIN"})
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
reply(b'{"error": "cannot compile with %s", "exit_code": 4}' % tried.encode() if tried < "WORKS" else b'{"names": []}')
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
        assert loader.compile_in_child("module", "argument") == ({"names": []}, [])
        return
    with pytest.raises(LlmtracedError, match=f"^cannot load the BPF programs: cannot compile .*{said}$"):
        loader.compile_in_child("module", "argument")


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "held", lambda: {"CAP_BPF", "CAP_SYS_PTRACE"})
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
