"""Where each tensor of a GGUF model lies: file(s) in, byte extents out.

:mod:`llmtraced.gguf_header` reads the headers; here tensor descriptions become checked extents (inside the file, clear
of each other), names become layers and components, merged expert tensors are divided, and the shards of a split model
are found. The rules are those of ggml ``docs/gguf.md`` and llama.cpp's ``gguf.cpp`` and ``llama_split_path``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NoReturn

from gguf.constants import GGML_QUANT_SIZES, Keys

from llmtraced.errors import LlmtracedError, printable
from llmtraced.gguf_header import Header, TensorInfo, is_gguf, read_header, refuse

__all__ = ["Model", "Shard", "Tensor", "is_gguf", "read_model"]

_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    int(kind): (str(kind.name), int(block), int(size)) for kind, (block, size) in GGML_QUANT_SIZES.items()
}
"""ggml type number → name, elements in a block, bytes in a block."""

_NUMBER: Final = Keys.Split.LLM_KV_SPLIT_NO
_COUNT: Final = Keys.Split.LLM_KV_SPLIT_COUNT
_TOTAL: Final = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT

_BLOCK: Final = re.compile(r"(?:^|(?<=\.))blk\.([0-9]{1,9})\.")
_SHARD_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tensor:
    r"""One tensor's place.

    Attributes:
        name: As in the file; untrusted, may hold control characters (bytes that are not UTF-8 read ``\xNN``).
        offset: Bytes from the start of its shard's file.
        size: Bytes, without padding.
        type: Name of a ``gguf.GGMLQuantizationType``, such as ``Q4_K``.
        shape: Elements in ggml's order, ne0 (the contiguous one) first.
        layer: N of ``blk.N.``, -1 outside the layers.
        component: The name without ``blk.N.`` and without a final ``.weight`` or ``.bias``.
        shard: Index into :attr:`Model.shards`.
        n_experts: Experts in a merged expert tensor, 0 for any other.
        expert_bytes: Bytes of each expert; expert = (offset in the file - ``offset``) // ``expert_bytes``.
    """

    name: str
    offset: int
    size: int
    type: str
    shape: tuple[int, ...]
    layer: int
    component: str
    shard: int
    n_experts: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a model: its ``size`` in bytes, and where its tensor data begins (``data_offset``, bytes)."""

    path: Path
    size: int
    data_offset: int


@dataclass(frozen=True)
class Model:
    """A model's files and tensors, the latter sorted by shard and offset.

    ``metadata`` is the first shard's: scalars, strings up to 4 KiB, and for all else a summary such as
    ``STRING[262144]``. ``fingerprint`` (32 hex digits of SHA-256) covers every shard's header and size, not its data
    and not its path.
    """

    shards: tuple[Shard, ...]
    tensors: tuple[Tensor, ...]
    architecture: str
    name: str
    metadata: Mapping[str, object] = field(repr=False)
    fingerprint: str


def read_model(path: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]] = ()) -> Model:
    """Read the tensor map of a model.

    Args:
        path: The model, or any shard of a split one; the other shards are looked for beside it by their names.
        others: Files to take shards from where ``path`` has no shard name, as in a Hugging Face cache, whose files
            are named by their hashes (a process's other model mappings are the natural choice).

    Raises:
        LlmtracedError: Not a GGUF file, truncated, inconsistent, a shard missing, or not readable.
    """
    given = read_header(Path(path))
    headers = (given,) if given.number(_COUNT) <= 1 else _siblings(given, others)
    tensors = tuple(tensor for shard, header in enumerate(headers) for tensor in _extents(header, shard))
    _check_whole(headers, tensors)
    first = headers[0]
    match = _SHARD_NAME.fullmatch(first.path.name) if len(headers) > 1 else None
    return Model(
        shards=tuple(Shard(header.path, header.size, header.data_offset) for header in headers),
        tensors=tensors,
        architecture=first.text(Keys.General.ARCHITECTURE) or "unknown",
        name=first.text(Keys.General.NAME) or (match["stem"] if match else first.path.stem),
        metadata=first.metadata,
        fingerprint=hashlib.sha256(b"".join(header.digest for header in headers)).hexdigest()[:32],
    )


def _extents(header: Header, shard: int) -> list[Tensor]:
    """Return a file's tensors sorted by offset, each checked to lie inside the file and clear of the others."""
    tensors = sorted((_extent(header, info, shard) for info in header.tensors), key=lambda t: (t.offset, t.size))
    for before, after in pairwise(tensors):
        if before.offset + before.size > after.offset:
            names = f"'{printable(before.name)}' and '{printable(after.name)}'"
            refuse(header.path, f"tensors {names} overlap at byte {after.offset}")
    return tensors


def _extent(header: Header, info: TensorInfo, shard: int) -> Tensor:
    def no(why: str) -> NoReturn:
        refuse(header.path, f"tensor '{printable(info.name)}' {why}")

    if info.kind not in _TYPES:
        no(f"has type number {info.kind}, which the installed gguf package does not know; a newer one may")
    kind, block, block_bytes = _TYPES[info.kind]
    row = info.shape[0] if info.shape else 1
    if row % block:
        no(f"has rows of {row} elements, not a multiple of the {block} in a block of {kind}")
    elements = math.prod(info.shape)
    size = elements // block * block_bytes
    if max(elements, size, *info.shape, info.offset) >= 1 << 63:
        no(f"is too large: {' x '.join(map(str, info.shape))} elements at offset {info.offset}")
    if info.offset % header.alignment:
        no(f"begins at offset {info.offset}, not a multiple of the alignment {header.alignment}")
    offset = header.data_offset + info.offset
    if offset + size > header.size:
        ends = f"tensor '{printable(info.name)}' ends at byte {offset + size}"
        refuse(header.path, f"truncated: {ends}, the file has {header.size}")
    layer, component = _place(info.name)
    n_experts = _experts(component, info)
    expert_bytes = size // n_experts if n_experts else 0  # exact, as rows are whole blocks
    return Tensor(info.name, offset, size, kind, info.shape, layer, component, shard, n_experts, expert_bytes)


def _place(name: str) -> tuple[int, str]:
    """Return layer and component: ``enc.blk.3.attn_q.weight`` → 3, ``enc.attn_q``."""
    match = _BLOCK.search(name)
    rest = name[: match.start()] + name[match.end() :] if match else name
    end = next((end for end in (".weight", ".bias") if rest.endswith(end)), "")
    return int(match[1]) if match else -1, rest.removesuffix(end)


def _experts(component: str, info: TensorInfo) -> int:
    """Return the experts merged in a tensor: the last of three dimensions (weights) or of two (biases), else 0.

    ``blk.N.ffn_norm_exps.weight`` (Arctic) has one dimension: a norm before the experts, not a merged tensor.
    """
    least = 2 if info.name.endswith(".bias") else 3
    return info.shape[-1] if component.endswith("exps") and len(info.shape) >= least else 0


def _siblings(given: Header, others: Iterable[str | os.PathLike[str]]) -> tuple[Header, ...]:
    """Return every file of the split model that ``given`` is a shard of, in order."""
    number, count = _split(given)
    if not 0 <= number < count <= 0xFFFF:  # llama.cpp keeps both in 16 bits
        refuse(given.path, f"says that it is shard {number + 1} of {count}")
    find = _by_name(given) or _by_content(given, others)
    headers = tuple(given if n == number else find(n) for n in range(count))
    for n, header in enumerate(headers):
        if _split(header) != (n, count):
            no, of = _split(header)
            refuse(header.path, f"says that it is shard {no + 1} of {of}, expected {n + 1} of {count}")
    return headers


def _split(header: Header) -> tuple[int, int]:
    """Return the shard's number, from 0, and how many there are."""
    return header.number(_NUMBER), header.number(_COUNT)


def _by_name(given: Header) -> Callable[[int], Header] | None:
    """Return what reads shard n by its name, as ``llama_split_path`` spells it; None if ``given`` has no such name."""
    number, count = _split(given)
    match = _SHARD_NAME.fullmatch(given.path.name)
    if not match or (int(match["number"]), int(match["count"])) != (number + 1, count):
        return None

    def find(n: int) -> Header:
        path = given.path.with_name(f"{match['stem']}-{n + 1:05d}-of-{count:05d}.gguf")
        return read_header(path) if path.exists() else refuse(path, f"shard {n + 1} of {count} is missing")

    return find


def _by_content(given: Header, others: Iterable[str | os.PathLike[str]]) -> Callable[[int], Header]:
    """Return what finds shard n among ``others`` by what their headers say."""
    number, count = _split(given)
    found: dict[int, Header] = {}
    for other in others:
        try:
            header = read_header(Path(other))
            same = all(header.number(key) == given.number(key) for key in (_COUNT, _TOTAL))
        except LlmtracedError:
            continue  # not a shard of this model
        if same:
            found.setdefault(_split(header)[0], header)

    def find(n: int) -> Header:
        here = f"shard {number + 1} of {count}, but not named …-{number + 1:05d}-of-{count:05d}.gguf"
        return found.get(n) or refuse(given.path, f"{here}, so shard {n + 1} cannot be found")

    return find


def _check_whole(headers: Sequence[Header], tensors: Sequence[Tensor]) -> None:
    """Refuse duplicate names, and a split model that has not the tensors it promises."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            refuse(headers[tensor.shard].path, f"tensor '{printable(tensor.name)}' occurs twice")
        seen.add(tensor.name)
    promised = headers[0].number(_TOTAL)
    if len(headers) > 1 and promised and promised != len(tensors):
        refuse(headers[0].path, f"promises {promised} tensors, its {len(headers)} shards have {len(tensors)}")
