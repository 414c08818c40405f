"""The daemon's TOML file: every mistake is named with its line, and none comes out as a traceback."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmtraced.commands import main
from llmtraced.config import Config, read_config
from llmtraced.errors import USAGE, LlmtracedError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "llmtraced.toml"
    path.write_text(text)
    return path


def refused(path: Path | None, changes: dict[str, object] | None = None) -> str:
    with pytest.raises(LlmtracedError) as caught:
        read_config(path, changes)
    assert caught.value.exit_code == USAGE
    return str(caught.value)


def test_defaults() -> None:
    assert read_config(None) == Config()
    assert Config().address == ("127.0.0.1", 9477)


def test_every_key_can_be_set(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'trace = "/t"\nlisten = "[::1]:80"\ndetail = "full"\nflush = 1\nscan = 0.5\nring = 65536\ntensors = 0\n'
        "keep_age = 5\nkeep_size = 0\ncpu = 1\n"
        'sidecars = ""\ntls_cert = "/c"\ntls_key = "/k"\nuser = "u"\npassword_file = "/p"\n',
    )
    config = read_config(path)
    assert config == Config("/t", "[::1]:80", "full", 1, 0.5, 65536, 0, 5, 0, 1, "", "/c", "/k", "u", "/p")
    assert config.address == ("::1", 80)
    text = path.read_text()
    assert [f.name for f in dataclasses.fields(Config) if f.name not in text] == [], "a new key belongs into this test"


def test_human_sizes_and_durations(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, 'ring = "32M"\nflush = "500ms"\nscan = "1m"\n'))
    assert (config.ring, config.flush, config.scan) == (32 << 20, 0.5, 60)
    config = read_config(write(tmp_path, 'keep_age = "7d"\nkeep_size = "1.5G"\n'))
    assert (config.keep_age, config.keep_size) == (7 * 86_400, 3 << 29)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'detail = "ops"\nring = 65536\n')
    assert read_config(path, {"detail": "full", "flush": 3.0}) == Config(detail="full", ring=65536, flush=3.0)


def test_no_listener() -> None:
    assert Config(listen="").address is None
    assert Config(listen="0.0.0.0:0").address == ("0.0.0.0", 0)


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("\n\nflsh = 3\n", "line 3: flsh", "no such key; there are trace, listen, detail"),
        ('flush = "soon"\n', "line 1: flush", "not a duration"),
        ('# a\nring = "many"\n', "line 2: ring", "not a size"),
        ("trace = 5\n", "line 1: trace", "is not a str"),
        ('tensors = "5"\n', "line 1: tensors", "is not a int"),
        ("tensors = true\n", "line 1: tensors", "is not a int"),
        ("tensors = 1.5\n", "line 1: tensors", "is not a int"),
        ("ring = 65536.0\n", "line 1: ring", "is not a int"),
        ("flush = []\n", "line 1: flush", "is not a float"),
        ("[trace]\na = 1\n", "trace", "is not a str"),
        ('"\\u001b[2J" = 1\n', "\\x1b[2J", "no such key"),
        ("flush = \n", "", "line 1"),
        ("flush = 1\nflush = 2\n", "", "line 2"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, where: str, why: str) -> None:
    path = write(tmp_path, text)
    message = refused(path)
    assert message.startswith(str(path))
    assert where in message
    assert why in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"detail": "most"}, "detail: 'most' is none of totals, faults, ops, full"),
        ({"detail": ""}, "none of totals, faults, ops, full"),
        ({"listen": "9477"}, "is not address:port"),
        ({"listen": "localhost:"}, "is not address:port"),
        ({"listen": "localhost:http"}, "is not address:port"),
        ({"listen": "localhost:65536"}, "is not address:port"),
        ({"listen": "localhost:99999"}, "is not address:port"),
        ({"flush": 0.0}, "flush: must be at least 0.1"),
        ({"scan": -1.0}, "scan: must be at least 0.1"),
        ({"flush": float("nan")}, "flush: must be at least 0.1"),
        ({"tensors": -1}, "tensors: must be at least 0"),
        ({"keep_age": -1.0}, "keep_age: must be at least 0"),
        ({"keep_size": -1}, "keep_size: must be at least 0"),
        ({"cpu": float("nan")}, "cpu: must be at least 0"),
        ({"tls_cert": "/c"}, "tls_cert, tls_key: there must be both or neither"),
        ({"tls_key": "/k"}, "tls_cert, tls_key: there must be both or neither"),
        ({"user": "u"}, "user, password_file: there must be both or neither"),
        ({"password_file": "/p"}, "user, password_file: there must be both or neither"),
        ({"user": "a:b", "password_file": "/p"}, "user: must not have a colon"),
        ({"ring": 100_000}, "ring: must be a power of two"),
        ({"ring": 32768}, "ring: must be a power of two of at least 64K"),
    ],
)
def test_bad_values(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    assert why in refused(None, changes)
    path = write(tmp_path, "")
    message = refused(path, changes)
    assert why in message
    assert message.startswith(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml") == f"cannot read {tmp_path}/none.toml: No such file or directory"
    assert "Is a directory" in refused(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert refused(tmp_path / "binary.toml").startswith(f"{tmp_path}/binary.toml: ")


def test_the_command_can_check_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'detail = "ops"\n')
    assert main(["daemon", "--config", str(path), "--ring", "32M", "--check-config"]) == 0
    assert "detail='ops'" in (out := capsys.readouterr().out)
    assert f"ring={32 << 20}" in out
    path.write_text("x = 1\n")
    assert main(["daemon", "--config", str(path), "--check-config"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"llmtraced: {path}, line 1: x: no such key")
