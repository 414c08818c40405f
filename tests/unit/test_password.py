"""Hashes of passwords."""

from __future__ import annotations

import base64
import hashlib
import io

import pytest

from llmtraced.commands import main
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.password import check_hash, hash_password, password_matches


def test_a_password_matches_its_hash_and_no_other() -> None:
    one, two = hash_password("säsame"), hash_password("säsame")
    assert one != two, "each has a salt of its own"
    assert check_hash(one) == one
    assert password_matches("säsame", one)
    assert password_matches("säsame", two)
    assert not password_matches("sasame", one)
    assert not password_matches("", one)


def test_the_hash_is_scrypt() -> None:
    _, n, r, p, salt, key = hash_password("x").split("$")
    made = hashlib.scrypt(b"x", salt=base64.b64decode(salt), n=int(n), r=int(r), p=int(p), maxmem=64 << 20)
    assert base64.b64encode(made).decode() == key


KEY = base64.b64encode(bytes(64)).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a hash"),
        ("secret", "not a hash"),
        ("$2y$10$X00000000000000000000uXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX", "not a hash"),
        (f"scrypt$9999999$8$5$AAAA${KEY}", "cannot|long"),
        (f"scrypt$1000$8$1$AAAA${KEY}", "computed"),
        (f"scrypt$16384$8$99$AAAA${KEY}", "too long"),
        ("scrypt$16384$8$1$AAAA$AAAA", "too short"),
        (f"scrypt$16384$8$1$A${KEY}", "computed"),
    ],
)
def test_what_is_no_hash_is_refused(text: str, why: str) -> None:
    with pytest.raises(LlmtracedError, match=why) as caught:
        check_hash(text)
    assert caught.value.exit_code == USAGE
    assert "secret" not in str(caught.value), "it may be the password itself"


def test_the_command_makes_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("open sesame\n"))
    assert main(["daemon", "--hash-password"]) == 0
    assert password_matches("open sesame", capsys.readouterr().out.strip())
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["daemon", "--hash-password"]) == USAGE
    assert "there is no password" in capsys.readouterr().err
