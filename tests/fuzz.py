"""Fuzz the tensor map: mutated GGUF files become a map that lies within the file, or a refusal, in bounded time.

What a mutant is refused for tells which branch it took, so mutants that are refused for something new, or get further
than any before, are mutated again: guidance by behaviour. `python tests/fuzz.py CASES [SEED]`, or `make fuzz`.
"""

from __future__ import annotations

import os
import random
import re
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmtraced.errors import LlmtracedError
from llmtraced.gguf_map import Model, read_model

__all__ = ["Fuzz", "check", "seeds"]

SLOWEST_SECONDS = 1.0
_INTERESTING = (0, 1, 2, 3, 4, 8, 9, 13, 31, 32, 33, 255, 256, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**62, 2**63)
_TOKENS = (
    *(b"general.alignment", b"general.architecture", b"split.count", b"split.no", b"split.tensors.count", b"GGUF"),
    *(b"blk.0.ffn_gate_exps.weight", b"blk.999999999.x.weight", b"\x1b[31m", b"\n", b'"', b"\xff\xfe", b"\0"),
)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(key: bytes, kind: int, body: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + body


def _tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + struct.pack("<IQ", kind, offset)


def _file(values: list[bytes], tensors: list[bytes], data: int) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def seeds() -> list[bytes]:
    """Return small valid files that between them use all that the format has."""
    text = _value(b"general.architecture", 8, _string(b"llama"))
    scalars = [_value(b"k%d" % kind, kind, bytes(n)) for kind, n in ((0, 1), (2, 2), (4, 4), (6, 4), (10, 8), (12, 8))]
    array = struct.pack("<IQ", 4, 3) + bytes(12)
    strings = struct.pack("<IQ", 8, 2) + _string(b"a") + _string(b"bc")
    nested = struct.pack("<IQ", 9, 2) + array * 2
    arrays = [_value(b"a", 9, array), _value(b"s", 9, strings), _value(b"n", 9, nested)]
    aligned = _value(b"general.alignment", 4, struct.pack("<I", 64))
    shard = [_value(b"split.count", 2, struct.pack("<H", 1)), _value(b"split.no", 2, struct.pack("<H", 0))]
    dense = [_tensor(b"token_embd.weight", (32, 4), 0, 0), _tensor(b"blk.0.attn_q.weight", (32, 2), 8, 512)]
    merged = [_tensor(b"blk.3.ffn_down_exps.weight", (32, 2, 4), 2, 0), _tensor(b"blk.3.norm.bias", (8,), 1, 160)]
    return [
        _file([text], dense, 1024),
        _file([text, *scalars, *arrays], merged, 256),
        _file([text, aligned, *shard], dense, 1024),
        _file([], [], 0),
    ]


def check(model: Model) -> None:
    """Hold a map to what it promises: extents within the file, in order, clear of each other, experts exact."""
    names = set()
    for number, shard in enumerate(model.shards):
        end = 0
        for tensor in (t for t in model.tensors if t.shard == number):
            assert end <= tensor.offset, tensor
            end = tensor.offset + tensor.size
            assert end <= shard.size, tensor
            assert tensor.n_experts * tensor.expert_bytes in (0, tensor.size), tensor
            assert tensor.layer >= -1, tensor
            assert tensor.name not in names, tensor
            names.add(tensor.name)


@dataclass
class Fuzz:
    """A run.

    Args:
        seed: of the random choices.
        path: a file that may be written to, best one in memory.

    Attributes:
        behaviours: what was met: refusals without their numbers and names, and how many tensors a map has.
        cases, maps: files that were tried, and those that became a map.
        slowest: processor seconds that a file took at most.
    """

    seed: int
    path: Path
    behaviours: set[str] = field(default_factory=set)
    cases: int = 0
    maps: int = 0
    slowest: float = 0.0

    def run(self, cases: int, read: Callable[[Path], Model] = read_model) -> None:
        """Try ``cases`` files.

        Raises:
            AssertionError: a map that lies, or a file that takes too long.
            Exception: whatever else comes out than LlmtracedError.
        """
        rng = random.Random(self.seed)
        corpus = seeds()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for _ in range(cases):
                data = _mutant(rng, corpus)
                os.ftruncate(file, 0)
                os.pwrite(file, data, 0)
                begin = time.process_time()
                try:
                    behaviour = self._once(read)
                except BaseException:
                    print(f"seed {self.seed}, case {self.cases}: {data.hex()}", file=sys.stderr)
                    raise
                took = time.process_time() - begin
                self.slowest = max(self.slowest, took)
                assert took < SLOWEST_SECONDS, data.hex()
                self.cases += 1
                if behaviour not in self.behaviours:
                    self.behaviours.add(behaviour)
                    corpus.append(data)
        finally:
            os.close(file)

    def _once(self, read: Callable[[Path], Model]) -> str:
        try:
            model = read(self.path)
        except LlmtracedError as error:
            text = str(error)
            assert text.isprintable(), text
            assert len(text) < 10_000
            return re.sub(r"'.*'|\".*\"|-?[0-9]+", "#", text.removeprefix(f"{self.path}: "))
        check(model)
        self.maps += 1
        return f"{len(model.tensors)} tensors, {len(model.metadata)} values"


def _mutant(rng: random.Random, corpus: list[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        least = 0 if rng.random() < 0.01 or len(data) < 8 else 8  # what fails at the magic and version teaches little
        at = rng.randrange(least, len(data) + 1)
        how = rng.randrange(8)
        if how == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif how == 1 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif how in (2, 3):
            form = rng.choice(("<Q", "<I", "<H"))
            value = rng.choice(_INTERESTING) & (1 << 8 * struct.calcsize(form)) - 1
            data[at : at + struct.calcsize(form)] = struct.pack(form, value)
        elif how == 4:
            token = rng.choice(_TOKENS)
            data[at : at + len(token) * rng.randrange(2)] = token
        elif how == 5:
            del data[at : at + rng.randrange(64)]
        elif how == 6:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            data[at:at] = other[start : start + rng.randrange(128)]
        else:
            del data[at:]
    return bytes(data[:65_536])


if __name__ == "__main__":
    run = Fuzz(
        int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns(), Path(f"/dev/shm/llmtraced-fuzz-{os.getpid()}")
    )
    started = time.monotonic()
    try:
        run.run(int(sys.argv[1]))
    finally:
        run.path.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    print(
        f"seed {run.seed}: {run.cases} files in {seconds:.0f} s, {run.maps} of them maps, {len(run.behaviours)} "
        f"behaviours, the slowest took {run.slowest * 1000:.1f} ms"
    )
