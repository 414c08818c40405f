"""Made-up models, events, processes and a tracer without a kernel, for the tests of the core."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtraced import target as targets
from llmtraced.gguf_map import Model, Shard, Tensor
from llmtraced.probes.shared import ACCOUNT, COUNTER, SLOT
from llmtraced.resolve import Extents
from llmtraced.schema import EPOCHS, EVENT, SLOTS, Detail, Phase, Probe
from llmtraced.target import ModelFile, Symbol, Target

NONE = 2**64 - 1


def tensor(name: str, offset: int, size: int, *, shard: int = 0, experts: int = 0, **other: Any) -> Tensor:
    """Return a tensor; with ``experts``, ``size`` is a multiple of it."""
    fields: dict[str, Any] = {"type": "F32", "shape": (max(size // 4, 1),), "layer": -1, "component": name} | other
    return Tensor(name, offset, size, shard=shard, n_experts=experts, expert_bytes=size // max(experts, 1), **fields)


def model(tensors: Sequence[Tensor], shards: int = 1, name: str = "m.gguf", tail: int = 0) -> Model:
    """Return a model whose files end ``tail`` bytes after their last tensor."""
    ends = [max((t.offset + t.size for t in tensors if t.shard == n), default=0) + tail for n in range(shards)]
    files = tuple(Shard(Path(f"/nowhere/{n}-{name}"), end, 0) for n, end in enumerate(ends))
    ordered = tuple(sorted(tensors, key=lambda t: (t.shard, t.offset, t.size)))
    return Model(files, ordered, "llama", name, {}, "f" * 32)


def event(kind: int, ts: int = 0, token: int = 0, **fields: Any) -> dict[str, Any]:
    """Return a record's fields; ``phase`` and ``epoch`` make its mark."""
    mark = int(fields.pop("phase", Phase.DECODE)) | int(fields.pop("epoch", 0)) << 4
    return {"kind": int(kind), "ts": ts, "token": token, "mark": mark, **fields}


def events(*rows: dict[str, Any]) -> NDArray[Any]:
    """Return the records as the ring gives them."""
    array = np.zeros(len(rows), EVENT)
    for i, row in enumerate(rows):
        for name, value in row.items():
            array[name][i] = value
    return array


def pages(file: int, first: int, count: int, comm: bytes = b"llama-server") -> dict[str, int]:
    """Return fields a to d of an ADD, EVICT or READ record."""
    words = np.frombuffer(comm.ljust(16, b"\0"), "<u8")
    return {"a": file << 48 | first, "b": count | 7 << 32, "c": int(words[0]), "d": int(words[1])}


class Living(Target):
    """A process that has not ended, whoever has its number."""

    alive = True  # type: ignore[assignment]


def target(models: dict[str, Model], *, pid: int = 0, base: int | None = 0x7F00_0000_0000) -> Target:
    """Return a target whose files are mapped one after the other from ``base`` (None: nowhere)."""
    files, at = [], base
    for label, one in models.items():
        for number, shard in enumerate(one.shards):
            inode = 1000 + len(files)
            where: tuple[targets.Mapping, ...] = ()
            if at is not None:
                length = -(-max(shard.size, 1) // 4096) * 4096
                where = (targets.Mapping(at, at + length, "r--s", 0, 8 << 20, inode, str(shard.path), False),)
                at += length + 4096
            files.append(ModelFile(label, number, 8 << 20, inode, where))
    made = Living(pid or os.getpid(), 1, "llama-server", ["llama-server"], dict(models), files)
    made.symbols = {}  # type: ignore[misc]  # nothing of ours is ggml
    return made


class FakeTracer:
    """Keeps what it is told; the test puts records in ``ring_batches`` and counts in ``accounts`` and ``totals``."""

    def __init__(self) -> None:
        self.slots = np.zeros(SLOTS, SLOT)
        self.accounts = np.zeros((SLOTS, EPOCHS, len(Probe)), ACCOUNT)
        self.extents: dict[int, Extents] = {}
        self.totals: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        self.window: dict[int, list[tuple[int, int, int, int]]] = {}
        self.ring_batches: list[NDArray[Any]] = []
        self.detail: dict[int, Detail] = {}
        self.hooked: dict[int, dict[str, Symbol]] = {}
        self.lost: list[str] = []
        self.removed: list[int] = []
        self.files_removed: list[int] = []
        self.freed: list[int] = []
        self.epoch = 0
        self.unplaced = 3
        self.flushes = 0
        self.attached = ["tracepoint page_fault_user"]
        self.missing = {"tracepoint mm_filemap_get_pages": ("no such", "reads")}
        self.programs = SimpleNamespace(bcc_version="0.0", compile_seconds=1.5)
        self.ring = SimpleNamespace(waiting=5, capacity=64)

    def add_process(self, pid: int, phase: Phase) -> int:
        slot = next(n for n in range(SLOTS) if n not in self.detail)
        self.detail[slot] = Detail.FAULTS
        return slot

    def remove_process(self, slot: int) -> None:
        self.removed.append(slot)

    def free(self, slot: int) -> None:
        self.freed.append(slot)

    def next_file(self) -> int:
        return len(self.extents)

    def add_file(self, number: int, slot: int, device: int, inode: int, size: int, extents: Extents) -> None:
        self.extents[number] = extents
        self.totals[number] = np.zeros(len(extents.byte_starts), COUNTER), np.zeros(len(extents.page_starts), COUNTER)

    def remove_file(self, number: int) -> None:
        self.files_removed.append(number)

    def counters(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.totals[number]

    def set_ranges(self, slot: int, ranges: list[tuple[int, int, int, int]]) -> None:
        self.window[slot] = ranges

    def set_detail(self, slot: int, detail: Detail, symbols: Mapping[str, Symbol], **_settings: object) -> list[str]:
        self.detail[slot] = detail
        self.hooked[slot] = dict(symbols)
        return list(self.lost)

    def uprobes(self, slot: int) -> dict[str, Symbol]:
        return self.hooked.get(slot, {})

    def account(self, slot: int, epoch: int) -> NDArray[Any]:
        return self.accounts[slot, epoch].copy()

    def next_epoch(self) -> int:
        before, self.epoch = self.epoch, (self.epoch + 1) % EPOCHS
        self.accounts[:, self.epoch] = 0
        return before

    def follow_cpus(self) -> None:
        pass

    def flush(self) -> None:
        self.flushes += 1

    def read(self) -> list[NDArray[Any]]:
        """Return one batch a call, so that a test decides when a record comes."""
        return [self.ring_batches.pop(0)] if self.ring_batches else []

    def misses(self) -> dict[str, int]:
        return {"on_add": 2}
