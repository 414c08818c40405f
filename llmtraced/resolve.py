"""File offset → tensor, layer and expert, for whole batches at once.

The files of a process's models are cut into *pieces*: a tensor, an expert's slice of a tensor, or what lies between
(header, padding). Pieces are sorted by ``file << 48 | offset``, so that one binary search serves all files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.gguf_map import Model, Tensor
from llmtraced.schema import PAGE

__all__ = ["Extents", "Resolver", "Rows"]

_FILE_SHIFT: Final = 48


@dataclass(frozen=True, slots=True)
class Rows:
    """Stretches of files, each within one piece.

    Attributes:
        source: int64 (n,), which input stretch a row comes from.
        offset: int64 (n,), bytes from the file's start.
        bytes: int64 (n,).
        piece: int64 (n,), index into the resolver's piece columns.
    """

    source: NDArray[np.int64]
    offset: NDArray[np.int64]
    bytes: NDArray[np.int64]
    piece: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Extents:
    """A file as the kernel counts it.

    Attributes:
        byte_starts: uint64, starts of tensors and of gaps between them; the first is 0.
        byte_tensor: int32, the tensor's number or -1, of each.
        page_starts: uint64, page indices where the set of tensors in a page changes; the first is 0.
        page_bytes: float-free shares, a list for each page segment of (tensor number or -1, bytes in one page); a
            segment with several is a single page or a run of pages with the same whole-page owner.
    """

    byte_starts: NDArray[np.uint64]
    byte_tensor: NDArray[np.int32]
    page_starts: NDArray[np.uint64]
    page_bytes: list[list[tuple[int, int]]]


class Resolver:
    """Resolves offsets in the shards of some models.

    Args:
        models: the models with their labels, in order; the order numbers tensors through all of them.
        files: for each (label, shard) the number that the kernel's records give its file.

    Attributes:
        tensors: every tensor of every model.
        names: their names; ``tensor`` of a piece indexes them.
        labels: model labels; ``model`` of a piece indexes them.
        tensor, expert, model, shard: int32/int16 columns of the pieces; -1 where there is none.
    """

    def __init__(self, models: Mapping[str, Model], files: Mapping[tuple[str, int], int]) -> None:
        self.labels: list[str] = list(models)
        self.tensors: list[Tensor] = [t for m in models.values() for t in m.tensors]
        self.model_of: list[int] = [i for i, m in enumerate(models.values()) for _ in m.tensors]
        self.names: list[str] = [t.name for t in self.tensors]
        keys: list[NDArray[np.uint64]] = []
        columns: list[NDArray[np.int32]] = []
        self._extents: dict[int, Extents] = {}
        base = 0
        for number, (label, model) in enumerate(models.items()):
            for shard in range(len(model.shards)):
                file = files.get((label, shard))
                mine = [(base + i, t) for i, t in enumerate(model.tensors) if t.shard == shard]
                if file is None:
                    continue
                starts, tensor, expert = _pieces(mine)
                keys.append(starts.astype(np.uint64) | np.uint64(file << _FILE_SHIFT))
                fixed = np.full(len(starts), number, np.int32), np.full(len(starts), shard, np.int32)
                columns.append(np.stack([tensor, expert, *fixed]))
                self._extents[file] = _extents(mine)
            base += len(model.tensors)
        order = np.argsort(np.concatenate(keys)) if keys else np.array([], np.int64)
        self._keys = np.concatenate(keys)[order] if keys else np.array([], np.uint64)
        table = np.concatenate(columns, axis=1)[:, order] if columns else np.empty((4, 0), np.int32)
        self.tensor, self.expert, self.model = table[0], table[1], table[2]
        self.shard = table[3].astype(np.int16)

    def extents(self, file: int) -> Extents:
        """Return how the kernel is to count file number ``file``."""
        return self._extents[file]

    def at(self, file: NDArray[np.uint64], offset: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the piece that holds each byte ``offset`` (n,) of ``file`` (n,)."""
        return np.searchsorted(self._keys, file << np.uint64(_FILE_SHIFT) | offset, side="right") - 1

    def split(self, file: NDArray[np.uint64], offset: NDArray[np.uint64], size: NDArray[np.uint64]) -> Rows:
        """Cut stretches ``[offset, offset + size)`` at piece borders, so that bytes per piece are exact.

        Args:
            file: uint64 (n,), file numbers.
            offset: uint64 (n,), bytes.
            size: uint64 (n,), bytes, at least 1.
        """
        first = self.at(file, offset)
        last = self.at(file, offset + size - np.uint64(1))
        counts = last - first + 1
        if not len(counts) or int(counts.max()) == 1:  # nothing to cut, as with most single pages
            whole = np.arange(len(first), dtype=np.int64)
            return Rows(whole, offset.astype(np.int64), size.astype(np.int64), first)
        source = np.repeat(np.arange(len(first), dtype=np.int64), counts)
        begin = np.cumsum(counts) - counts
        piece = first[source] + (np.arange(len(source), dtype=np.int64) - begin[source])
        mask = np.uint64((1 << _FILE_SHIFT) - 1)
        piece_start = (self._keys[piece] & mask).astype(np.int64)
        following = np.minimum(piece + 1, len(self._keys) - 1)
        piece_end = (self._keys[following] & mask).astype(np.int64)
        stretch_end = (offset + size).astype(np.int64)[source]
        piece_end = np.where(piece == last[source], stretch_end, piece_end)
        start = np.maximum(offset.astype(np.int64)[source], piece_start)
        return Rows(source, start, np.minimum(piece_end, stretch_end) - start, piece)


def _pieces(
    tensors: Sequence[tuple[int, Tensor]],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Return starts, tensor numbers and experts of a shard's pieces; gaps have tensor -1."""
    starts, numbers, experts, end = [], [], [], 0
    for number, tensor in tensors:
        if tensor.size == 0:
            continue
        if tensor.offset > end:
            starts.append(np.array([end]))
            numbers.append(np.array([-1]))
            experts.append(np.array([-1]))
        n = max(tensor.n_experts, 1)
        each = tensor.expert_bytes if tensor.n_experts else tensor.size
        starts.append(tensor.offset + each * np.arange(n))
        numbers.append(np.full(n, number))
        experts.append(np.arange(n) if tensor.n_experts else np.array([-1]))
        end = tensor.offset + tensor.size
    starts.append(np.array([end]))  # padding, and what the last page holds beyond the end of the file
    numbers.append(np.array([-1]))
    experts.append(np.array([-1]))
    columns = [np.concatenate(parts) for parts in (starts, numbers, experts)]
    return columns[0].astype(np.int64), columns[1].astype(np.int32), columns[2].astype(np.int32)


def _extents(tensors: Sequence[tuple[int, Tensor]]) -> Extents:
    """Return the kernel's byte extents and page segments of a shard."""
    starts, owners, end = [0], [-1], 0
    cuts = {0}
    for number, tensor in tensors:
        if tensor.size == 0:
            continue
        if tensor.offset > end:
            starts, owners = [*starts, end], [*owners, -1]
        starts.append(tensor.offset)
        owners.append(number)
        end = tensor.offset + tensor.size
        for border in (tensor.offset, end):  # a page with a border in it is a segment of its own
            cuts |= {border // PAGE, -(-border // PAGE)}
    starts.append(end)
    owners.append(-1)
    byte_starts, kept = np.unique(np.array(starts[::-1], np.uint64), return_index=True)  # the last of equal starts wins
    byte_tensor = np.array(owners[::-1], np.int32)[kept]
    page_starts = np.array(sorted(cuts), np.uint64)
    shares: list[list[tuple[int, int]]] = []
    edges = np.append(byte_starts, np.uint64(1 << 62)).astype(np.int64)
    for page in page_starts.astype(np.int64):
        low, high = int(page) * PAGE, int(page + 1) * PAGE
        i = int(np.searchsorted(edges, low, side="right")) - 1
        share: list[tuple[int, int]] = []
        while edges[i] < high:
            share.append((int(byte_tensor[i]), int(min(high, edges[i + 1]) - max(low, edges[i]))))
            i += 1
        shares.append(share)
    return Extents(byte_starts, byte_tensor, page_starts, shares)
