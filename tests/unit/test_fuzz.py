"""A hundred thousand mutated GGUF files, a million tensors, and names that are code elsewhere."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from fuzz import Fuzz, check, seeds
from helpers import bounded

from llmtraced.errors import LlmtracedError
from llmtraced.gguf_map import Model, read_model

CASES = int(os.environ.get("LLMTRACED_FUZZ_CASES", "100000"))


@pytest.fixture
def memory_file() -> Path:
    """A file that is in memory where there is such a thing."""
    return Path(f"/dev/shm/llmtraced-fuzz-{os.getpid()}")


def test_mutated_files_are_maps_or_refused(memory_file: Path) -> None:
    fuzz = Fuzz(int(os.environ.get("LLMTRACED_FUZZ_SEED", "6")), memory_file)
    try:
        fuzz.run(CASES)
    finally:
        memory_file.unlink(missing_ok=True)
    print(fuzz.cases, fuzz.maps, len(fuzz.behaviours), fuzz.slowest)
    assert fuzz.cases == CASES
    assert fuzz.maps > CASES / 100, "most must not fail at the magic"
    assert len(fuzz.behaviours) > 40, sorted(fuzz.behaviours)


def test_the_fuzz_finds_what_is_wrong(tmp_path: Path) -> None:
    """A reader that takes extents as the file says them is found out within some thousand files."""

    def trusting(path: Path) -> Model:
        model = read_model(path)
        if len(model.tensors) == 2 and model.architecture not in ("llama", "unknown"):
            object.__setattr__(model.tensors[0], "offset", model.shards[0].size)
        return model

    with pytest.raises(AssertionError):
        Fuzz(1, tmp_path / "f").run(20_000, trusting)


def test_seeds_are_valid(tmp_path: Path) -> None:
    for number, data in enumerate(seeds()):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        check(read_model(path))


def test_a_million_tensors_are_refused_before_they_are_read(tmp_path: Path) -> None:
    one = struct.pack("<Q8sIQIQ", 8, b"t0000000", 1, 8, 0, 0)
    path = tmp_path / "million.gguf"
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 0))
        for number in range(0, 1_000_000, 1000):
            stream.write(b"".join(one[:8] + b"t%07d" % n + one[16:] for n in range(number, number + 1000)))

    def refused() -> None:
        with pytest.raises(LlmtracedError, match="1000000 tensors: more than 65536 entries in a header are not read"):
            read_model(path)

    bounded(refused, seconds=1, memory=1 << 20)
