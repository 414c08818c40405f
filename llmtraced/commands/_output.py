"""Where a command's result goes: stdout, or a file that is never half written and never overwritten by accident."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from llmtraced.errors import LlmtracedError, printable

__all__ = ["add_output_arguments", "check_output", "write_output"]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``-o FILE`` and ``--force``."""
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write here instead of to stdout")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")


def check_output(path: Path | None, force: bool) -> None:
    """Refuse, before any work is done, a file that exists (without ``force``), a device or folder, and a model."""
    if path is None or not path.exists():
        return
    if not force:
        raise LlmtracedError(f"{printable(str(path))}: File already exists, will not overwrite without --force")
    from llmtraced.gguf_map import is_gguf  # a tenth of a second, and seldom asked

    if not path.is_file() or is_gguf(path):
        what = "a GGUF model" if path.is_file() else "not a regular file"
        raise LlmtracedError(f"{printable(str(path))}: will not overwrite: it is {what}")


def write_output(data: bytes | Iterable[bytes], path: Path | None) -> None:
    """Write ``data`` to stdout, or under a temporary name beside ``path`` which is then renamed.

    Pieces are written one by one, so that a large output need not be in memory.
    """
    pieces = (data,) if isinstance(data, bytes) else data
    if path is None:
        sys.stdout.flush()
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    path = Path(os.path.realpath(path))  # through a symbolic link, as a shell's redirection would
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.writelines(pieces)
        temporary.replace(path)
    except OSError as error:
        raise LlmtracedError(f"{printable(str(path))}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
