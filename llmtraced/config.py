"""The daemon's configuration: a TOML file, every key of which is an attribute here."""

from __future__ import annotations

import argparse
import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.schema import Detail
from llmtraced.values import duration, size

__all__ = ["Config", "read_config"]


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """What the daemon does.

    Attributes:
        trace: folder for traces; empty: nothing is recorded, metrics only.
        listen: ``address:port`` of ``/metrics``; empty: none.
        detail: ``totals``, ``faults``, ``ops`` or ``full``.
        flush: seconds until a record is on disk.
        scan: seconds between looks for new servers.
        ring: bytes of the event buffer, a power of two.
        tensors: a model with more tensors than this is exported by layer and component.
        keep_age: seconds that files of traces are kept; 0: for ever.
        keep_size: bytes of traces that are kept; 0: any.
        cpu: processor seconds a second that may be used before less is recorded; 0: any.
        sidecars: pattern of the files in which sidecars say what they do, to be exported; empty: none.
        tls_cert, tls_key: PEM files; ``/metrics`` is served over TLS with them.
        user: who may read ``/metrics``; empty: everyone.
        password_file: the hash of the user's password, of ``llmtraced daemon --hash-password``.
    """

    trace: str = "/var/lib/llmtraced"
    listen: str = "127.0.0.1:9477"
    detail: str = "faults"
    flush: float = 10.0
    scan: float = 2.0
    ring: int = 16 << 20
    tensors: int = 2000
    keep_age: float = 30 * 86_400.0
    keep_size: int = 20 << 30
    cpu: float = 0.5
    sidecars: str = "/run/llmtraced-prefetch*/*.prom"
    tls_cert: str = ""
    tls_key: str = ""
    user: str = ""
    password_file: str = ""

    @property
    def address(self) -> tuple[str, int] | None:
        """Where to listen, or None."""
        if not self.listen:
            return None
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    def __post_init__(self) -> None:
        if self.detail not in [d.name.lower() for d in Detail]:
            raise LlmtracedError(f"detail: {printable(self.detail)!r} is none of totals, faults, ops, full", USAGE)
        port = re.fullmatch(r".+:([0-9]{1,5})", self.listen)
        if self.listen and (port is None or int(port[1]) > 65535):
            raise LlmtracedError(f"listen: {printable(self.listen)!r} is not address:port", USAGE)
        for name, low in (("flush", 0.1), ("scan", 0.1), ("tensors", 0), ("keep_age", 0), ("keep_size", 0), ("cpu", 0)):
            if not getattr(self, name) >= low:  # "not a number" is not either
                raise LlmtracedError(f"{name}: must be at least {low}", USAGE)
        for one, other in (("tls_cert", "tls_key"), ("user", "password_file")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise LlmtracedError(f"{one}, {other}: there must be both or neither", USAGE)
        if ":" in self.user:
            raise LlmtracedError("user: must not have a colon", USAGE)
        if self.ring < 1 << 16 or self.ring & (self.ring - 1):
            raise LlmtracedError("ring: must be a power of two of at least 64K", USAGE)


def read_config(path: Path | None, changes: dict[str, Any] | None = None) -> Config:
    """Return the configuration in ``path`` (the defaults without one), with ``changes`` made to it.

    Raises:
        LlmtracedError: unreadable, not TOML, an unknown key or a bad value; the message names the line.
    """
    values: dict[str, Any] = {}
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if path is not None:
        try:
            text = path.read_text()
            values = tomllib.loads(text)
        except OSError as error:
            raise LlmtracedError(f"cannot read {path}: {error.strerror}", USAGE) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise LlmtracedError(f"{path}: {error}", USAGE) from error

        def line(key: str) -> int:
            return next(
                (n for n, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*[\"']?{re.escape(key)}\b", row)), 0
            )

        for key, value in values.items():
            where = f"{path}, line {line(key)}: {printable(key)}"
            if key not in fields:
                raise LlmtracedError(f"{where}: no such key; there are {', '.join(fields)}", USAGE)
            try:
                if key in ("flush", "scan", "keep_age") and isinstance(value, str):
                    values[key] = duration(value)
                elif key in ("ring", "keep_size") and isinstance(value, str):
                    values[key] = size(value)
            except argparse.ArgumentTypeError as error:
                raise LlmtracedError(f"{where}: {error}", USAGE) from error
            default = getattr(Config(), key)
            accepted = (int, float) if isinstance(default, float) else (type(default),)
            if not isinstance(values[key], accepted) or isinstance(values[key], bool):
                raise LlmtracedError(f"{where}: {value!r} is not a {type(default).__name__}", USAGE)
    try:
        return Config(**values | (changes or {}))
    except LlmtracedError as error:
        raise LlmtracedError(f"{path}: {error}" if path else str(error), USAGE) from error
