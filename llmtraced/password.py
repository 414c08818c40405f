"""Passwords as they are kept: scrypt hashes (RFC 7914), so that who reads the file cannot log in with it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from typing import Final

from llmtraced.errors import USAGE, LlmtracedError

__all__ = ["check_hash", "hash_password", "password_matches"]

# One of OWASP's choices: 16 MB and about 0.2 s a guess. Its first takes 128 MB, which a server short of memory misses.
_N: Final = 1 << 14
_R: Final = 8
_P: Final = 5
_MOST_BYTES: Final = 64 << 20
_HASH: Final = re.compile(r"scrypt\$([0-9]{1,7})\$([0-9]{1,2})\$([0-9]{1,2})\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)")


def hash_password(password: str) -> str:
    """Return ``scrypt$N$r$p$SALT$KEY`` of a password, with a new salt; salt and key are in base64."""
    salt = os.urandom(16)
    key = hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=_MOST_BYTES)
    return "$".join(["scrypt", str(_N), str(_R), str(_P), *(base64.b64encode(part).decode() for part in (salt, key))])


def check_hash(text: str) -> str:
    """Return ``text`` if it is a hash made by :func:`hash_password`.

    Raises:
        LlmtracedError: it is not, or would take more than 64 MB to compute.
    """
    found = _HASH.fullmatch(text)
    if found is None:
        raise LlmtracedError("not a hash: make one with `llmtraced daemon --hash-password`", USAGE)
    try:
        _derive("", found)
    except (ValueError, binascii.Error) as error:
        raise LlmtracedError(f"not a hash that can be computed: {error}", USAGE) from error
    return text


def password_matches(password: str, text: str) -> bool:
    """Tell whether ``text`` is the hash of ``password``; takes as long either way."""
    found = _HASH.fullmatch(text)
    return found is not None and hmac.compare_digest(_derive(password, found), base64.b64decode(found[5]))


def _derive(password: str, found: re.Match[str]) -> bytes:
    n, r, p = int(found[1]), int(found[2]), int(found[3])
    salt, key = (base64.b64decode(found[i], validate=True) for i in (4, 5))
    if p * r * n > _P * _R * _N * 4 or len(key) < 16:
        raise ValueError("it would take too long" if len(key) >= 16 else "its key is too short")
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=_MOST_BYTES, dklen=len(key))
