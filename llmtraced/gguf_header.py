"""Read the header of one GGUF file: metadata and tensor descriptions, whatever the file holds.

Model files are untrusted. Each count and length is checked against what the file still has, and against a limit of
our own, before anything is allocated or looped over, so that :data:`MAX_HEADER` and :data:`MAX_ENTRIES` bound the cost
of a hostile file. Readahead is turned off and at most one window's rest reaches into the tensor data: this is an
instrument that measures the page cache. (Reads, not a mapping: a file cut short meanwhile is an error, not SIGBUS.)

Layout (ggml ``docs/gguf.md``, versions 2 and 3, little-endian; what is refused follows ``ggml/src/gguf.cpp``)::

    "GGUF"  u32 version  u64 n_tensors  u64 n_kv
    n_kv      x  string key, u32 value type, value        (array: u32 element type, u64 length, elements)
    n_tensors x  string name, u32 n_dims, u64 dims[n_dims] (ne0 first), u32 ggml type, u64 offset
    padding to general.alignment (32 unless told), then the data; offsets count from here

A string is a u64 length and that many bytes of UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, Keys

from llmtraced.errors import FAILED, NO_PERMISSION, LlmtracedError, printable

__all__ = ["MAX_ENTRIES", "MAX_HEADER", "MAX_NAME", "Header", "TensorInfo", "is_gguf", "read_header", "refuse"]

MAX_HEADER: Final = 256 << 20
"""Bytes of header that are read at most; a vocabulary of 262,144 tokens with its merges takes about 16 MB."""

MAX_ENTRIES: Final = 1 << 16
"""Metadata values, nested arrays and tensors of one file together; real models have hundreds to some thousands."""

MAX_NAME: Final = 1024
"""Bytes in a key or tensor name; ggml itself stops at 64 for tensors (GGML_MAX_NAME)."""

_MAX_TEXT: Final = 4096  # bytes of a metadata string that is kept; longer ones (chat templates) are summarised
_MAX_DIMS: Final = 4  # GGML_MAX_DIMS
_MAX_DEPTH: Final = 4  # arrays in arrays; the format allows any depth, llama.cpp none
_WINDOW: Final = 64 << 10  # bytes read at a time; holds any name and any text that is kept
_MAGIC: Final = b"GGUF"

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ARRAY: Final = struct.Struct("<IQ")  # element type, length
_COUNTS: Final = struct.Struct("<QQ")  # tensors, metadata values
_EXTENT: Final = struct.Struct("<IQ")  # ggml type, offset

_CODES: Final = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT32": "f",
    "FLOAT64": "d",
    "BOOL": "?",
}
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    int(GGUFValueType[name]): struct.Struct("<" + code) for name, code in _CODES.items()
}
_STRING_TYPE: Final = int(GGUFValueType.STRING)
_ARRAY_TYPE: Final = int(GGUFValueType.ARRAY)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header describes it, unchecked.

    ``shape`` has ne0 first, ``kind`` is the ggml type number, ``offset`` counts from :attr:`Header.data_offset`.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header.

    Attributes:
        path: As it was given.
        size: Bytes in the file.
        data_offset: Where the tensor data begins, in bytes; may lie past the end of a truncated file.
        alignment: What tensor offsets are multiples of, in bytes; a power of two.
        metadata: Scalars, strings of up to 4 KiB, and for all else a summary such as ``STRING[262144]``.
        tensors: In the file's order.
        digest: SHA-256 over the bytes before ``data_offset`` and ``size``.
    """

    path: Path
    size: int
    data_offset: int
    alignment: int
    metadata: Mapping[str, object]
    tensors: Sequence[TensorInfo]
    digest: bytes

    def number(self, key: str) -> int:
        """Return the metadata's integer ``key``, 0 where it is missing."""
        value = self.metadata.get(key, 0)
        return value if isinstance(value, int) else refuse(self.path, f"'{key}' is not an integer")

    def text(self, key: str) -> str:
        """Return the metadata's string ``key``, empty where it is missing or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""


def refuse(path: Path, why: str, exit_code: int = FAILED) -> NoReturn:
    """Raise the error that names the file and says ``why`` it cannot be read."""
    raise LlmtracedError(f"{printable(str(path), 4096)}: {why}", exit_code)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a regular file that begins with GGUF's magic; False too when that cannot be found out."""
    try:
        with _opened(Path(path)) as (fd, _):
            return os.pread(fd, len(_MAGIC), 0) == _MAGIC
    except (LlmtracedError, OSError):
        return False


def read_header(path: Path) -> Header:
    """Read a file's header; whether its tensors make sense is for the caller to check.

    Raises:
        LlmtracedError: Not a GGUF file, not readable, truncated within the header, inconsistent or out of bounds.
    """
    try:
        with _opened(path) as (fd, size):
            return _parse(_Cursor(fd, path, size))
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror or error}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file without ever blocking; yield its descriptor and its size in bytes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except PermissionError:
        refuse(path, "permission denied; run the same command as root", NO_PERMISSION)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        refuse(path, getattr(error, "strerror", None) or str(error))
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "a directory, not a GGUF file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: it would pull tensor data into the page cache
        yield fd, status.st_size
    finally:
        os.close(fd)


class _Cursor:
    """A forward reader of a header that refuses to pass its end and holds one window of it in memory."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.fd, self.path, self.size, self.position = fd, path, size, 0
        self._start, self._window = 0, b""
        self._entries = MAX_ENTRIES

    def need(self, length: int, what: str) -> None:
        """Refuse the file unless it has ``length`` more bytes."""
        end = self.position + length
        if end > self.size:
            refuse(self.path, f"truncated: {what} would end at byte {end}, the file has {self.size}")
        if end > MAX_HEADER:
            refuse(self.path, f"{what} would end at byte {end}; headers of more than {MAX_HEADER} bytes are not read")

    def entries(self, count: int, least: int, what: str) -> range:
        """Return ``range(count)`` if the file can hold that many entries of at least ``least`` bytes each."""
        self.need(count * least, f"{count} {what}")
        self._entries -= count
        if self._entries < 0:
            refuse(self.path, f"{count} {what}: more than {MAX_ENTRIES} entries in a header are not read")
        return range(count)

    def unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        """Return the fields of ``form`` and step over them."""
        self.need(form.size, what)
        at = self._load(form.size)
        self.position += form.size
        return form.unpack_from(self._window, at)

    def string(self, limit: int, what: str) -> str | int:
        """Return the string here; where it is longer than ``limit`` bytes, its length."""
        (length,) = self.unpack(_U64, what)
        self.need(length, what)
        text: str | int = int(length)
        if length <= limit:
            at = self._load(length)
            text = self._window[at : at + length].decode("utf-8", "backslashreplace")
        self.position += length
        return text

    def name(self, what: str) -> str:
        """Return the key or tensor name here."""
        name = self.string(MAX_NAME, what)
        if isinstance(name, int):
            refuse(self.path, f"{what} has {name} bytes; at most {MAX_NAME} are read")
        return name

    def skip(self, length: int, what: str) -> None:
        """Step over ``length`` bytes without reading them."""
        self.need(length, what)
        self.position += length

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings, at about 0.1 us each."""
        self.need(count * _U64.size, what)
        unpack = _U64.unpack_from
        while count:
            self.need(_U64.size, what)
            at = self._load(_U64.size)
            window, last = self._window, len(self._window) - _U64.size
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.position = self._start + at
        self.need(0, what)

    def _load(self, length: int) -> int:
        """Have ``length`` bytes (a window at most) from the position in the window; return where they begin in it."""
        at = self.position - self._start
        if at + length > len(self._window):
            self._window = os.pread(self.fd, _WINDOW, self.position)
            self._start, at = self.position, 0
            if len(self._window) < length:
                refuse(self.path, "became shorter while it was read")
        return at


def _parse(cursor: _Cursor) -> Header:
    path, size = cursor.path, cursor.size
    _check_start(cursor, os.pread(cursor.fd, len(_MAGIC), 0))
    n_tensors, n_values = cursor.unpack(_COUNTS, "the header")
    metadata: dict[str, object] = {}
    for _ in cursor.entries(n_values, 13, "metadata values"):  # 13: length of the key, type, a value of one byte
        key = cursor.name("a metadata key")
        if key in metadata:
            refuse(path, f"metadata key '{printable(key)}' occurs twice")
        metadata[key] = _read_value(cursor, f"metadata '{printable(key)}'")
    alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        refuse(path, f"general.alignment is {printable(str(alignment))}, not a power of two")
    tensors = [_read_info(cursor) for _ in cursor.entries(n_tensors, 24, "tensors")]  # 24: no name, no dimensions
    data_offset = cursor.position
    if tensors:  # as llama.cpp: without tensors there is no padding
        data_offset = -(-data_offset // alignment) * alignment
    digest = _digest(cursor.fd, min(data_offset, size, MAX_HEADER), size)
    return Header(path, size, data_offset, alignment, metadata, tensors, digest)


def _check_start(cursor: _Cursor, start: bytes) -> None:
    """Refuse what is not GGUF, or of a version or byte order that cannot be read; else step over magic and version."""
    if start != _MAGIC:
        refuse(cursor.path, f"not a GGUF file ({f'starts with {start!r}' if start else 'it is empty'})")
    cursor.skip(len(_MAGIC), "the header")
    (version,) = cursor.unpack(_U32, "the header")
    if version and version & 0xFFFF == 0:
        refuse(cursor.path, "a big-endian GGUF file; only little-endian ones can be read")
    if version not in (2, 3):
        refuse(cursor.path, f"GGUF version {version}; only 2 and 3 can be read")


def _read_value(cursor: _Cursor, what: str) -> object:
    """Return the metadata value here: a scalar, a string, or the summary of what is too long to keep."""
    (kind,) = cursor.unpack(_U32, what)
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind], what)[0]
    if kind == _STRING_TYPE:
        text = cursor.string(_MAX_TEXT, what)
        return text if isinstance(text, str) else f"STRING of {text} bytes"
    if kind == _ARRAY_TYPE:
        return _skip_array(cursor, what, depth=1)
    refuse(cursor.path, f"{what} has the unknown value type {kind}")


def _skip_array(cursor: _Cursor, what: str, depth: int) -> str:
    """Step over an array and return its summary: type and length."""
    if depth > _MAX_DEPTH:
        refuse(cursor.path, f"{what} has arrays nested deeper than {_MAX_DEPTH}")
    kind, count = cursor.unpack(_ARRAY, what)
    if kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind].size, what)
    elif kind == _STRING_TYPE:
        cursor.skip_strings(count, what)
    elif kind == _ARRAY_TYPE:
        for _ in cursor.entries(count, _ARRAY.size, f"arrays in {what}"):
            _skip_array(cursor, what, depth + 1)
    else:
        refuse(cursor.path, f"{what} has the unknown element type {kind}")
    return f"{GGUFValueType(kind).name}[{count}]"


def _read_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.name("a tensor's name")
    what = f"the description of tensor '{printable(name)}'"
    (n_dims,) = cursor.unpack(_U32, what)
    if n_dims > _MAX_DIMS:
        refuse(cursor.path, f"tensor '{printable(name)}' has {n_dims} dimensions; ggml has at most {_MAX_DIMS}")
    shape = tuple(cursor.unpack(_U64, what)[0] for _ in range(n_dims))
    kind, offset = cursor.unpack(_EXTENT, what)
    return TensorInfo(name, shape, kind, offset)


def _digest(fd: int, length: int, size: int) -> bytes:
    """Return SHA-256 over the file's first ``length`` bytes and its ``size`` (u64)."""
    digest = hashlib.sha256()
    for start in range(0, length, _WINDOW):
        digest.update(os.pread(fd, min(_WINDOW, length - start), start))
    digest.update(_U64.pack(size))
    return digest.digest()
