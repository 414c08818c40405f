"""The tensor map against what wrote the file (gguf.GGUFWriter) and an independent reader (gguf.GGUFReader)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import bounded
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmtraced import gguf_header
from llmtraced.errors import NO_PERMISSION, LlmtracedError
from llmtraced.gguf_header import MAX_ENTRIES, MAX_HEADER, MAX_NAME
from llmtraced.gguf_map import Model, is_gguf, read_model

FUZZ = int(os.environ.get("LLMTRACED_FUZZ", "300"))
"""Examples of the mutation test; set LLMTRACED_FUZZ to some 100,000 for a long run."""

U32, STRING, ARRAY = int(gguf.GGUFValueType.UINT32), int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.ARRAY)
F32, Q4_0 = int(gguf.GGMLQuantizationType.F32), int(gguf.GGMLQuantizationType.Q4_0)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def info(name: str | bytes, shape: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(
    values: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: bytes = bytes(4096),
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file by hand, for what GGUFWriter refuses to write."""
    tensors, pairs = counts or (len(infos), len(values))
    head = magic + struct.pack("<IQQ", version, tensors, pairs) + b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def put(tmp_path: Path):
    def put(data: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return put


def refused(path: Path) -> str:
    with pytest.raises(LlmtracedError) as caught:
        read_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}"[:200])
    assert message.isprintable(), "one line, no control characters"
    assert caught.value.exit_code == 1
    return message


def write(path: Path, tensors: dict[str, np.ndarray], kinds: dict[str, gguf.GGMLQuantizationType] | None = None, **kw):
    writer = gguf.GGUFWriter(path, "llama", **{k: v for k, v in kw.items() if k.startswith("split")})
    writer.add_name("A model")
    if "alignment" in kw:
        writer.add_custom_alignment(kw["alignment"])
    writer.add_array("tokenizer.ggml.tokens", [f"tok{i}" for i in range(2000)])
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_as_reader(model: Model) -> None:
    """Every tensor's name, offset, size, type and shape as gguf.GGUFReader has them."""
    theirs = {
        (shard, t.name, int(t.data_offset), int(t.n_bytes), t.tensor_type.name, tuple(int(n) for n in t.shape))
        for shard, file in enumerate(model.shards)
        for t in gguf.GGUFReader(file.path).tensors
    }
    ours = [(t.shard, t.name, t.offset, t.size, t.type, t.shape) for t in model.tensors]
    assert set(ours) == theirs
    assert len(ours) == len(theirs) > 0
    assert [(t.shard, t.offset) for t in model.tensors] == sorted((t.shard, t.offset) for t in model.tensors)


# --- valid files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda k: k.name)
def test_every_type_as_the_reader_has_it(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "m.gguf"
    odd = np.zeros((3, 5 * size), np.uint8)  # 5 blocks a row: sizes that are no multiple of the alignment
    write(path, {"a.weight": odd, "b.weight": odd, "c": np.ones(7, np.float32)}, {"a.weight": kind, "b.weight": kind})
    model = read_model(path)
    assert_as_reader(model)
    a = next(t for t in model.tensors if t.name == "a.weight")
    assert (a.type, a.shape, a.size) == (kind.name, (5 * block, 3), 15 * size)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    write(tmp_path / "m.gguf", {"a": np.ones(3, np.float32), "b": np.ones(5, np.float32)}, alignment=alignment)
    model = read_model(tmp_path / "m.gguf")
    assert_as_reader(model)
    assert all(t.offset % alignment == 0 for t in model.tensors)


@pytest.mark.parametrize(
    ("name", "layer", "component"),
    [
        ("blk.3.attn_q.weight", 3, "attn_q"),
        ("blk.3.attn_q.bias", 3, "attn_q"),
        ("blk.0.ssm_a", 0, "ssm_a"),
        ("blk.127.ffn_gate_exps.weight", 127, "ffn_gate_exps"),
        ("enc.blk.0.attn_q.weight", 0, "enc.attn_q"),
        ("dec.blk.12.cross_attn_k.weight", 12, "dec.cross_attn_k"),
        ("v.blk.7.ln1.bias", 7, "v.ln1"),
        ("v.sam.blk.7.attn.qkv.weight", 7, "v.sam.attn.qkv"),
        ("token_embd.weight", -1, "token_embd"),
        ("output_norm.weight", -1, "output_norm"),
        ("rope_freqs.weight", -1, "rope_freqs"),
        ("blk.0.scale.bias.weight", 0, "scale.bias"),
        ("myblk.3.attn_q.weight", -1, "myblk.3.attn_q"),
        ("blk.x.attn_q.weight", -1, "blk.x.attn_q"),
        ("blk.99999999999.attn_q.weight", -1, "blk.99999999999.attn_q"),
        ("blk.٣.attn_q.weight", -1, "blk.٣.attn_q"),  # a digit, but not one of ours
        (".weight", -1, ""),
    ],
)
def test_layer_and_component(put, name: str, layer: int, component: str) -> None:
    (tensor,) = read_model(put(build(infos=(info(name),)))).tensors
    assert (tensor.layer, tensor.component) == (layer, component)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "n_experts", "expert_bytes"),
    [
        ("blk.0.ffn_gate_exps.weight", (32, 4, 6), Q4_0, 6, 4 * 18),
        ("blk.0.ffn_gate_up_exps.weight", (32, 8, 5), F32, 5, 32 * 8 * 4),
        ("blk.0.ffn_down_chexps.weight", (2, 3, 4), F32, 4, 24),
        ("blk.0.ffn_gate_up_exps.bias", (16, 5), F32, 5, 64),
        ("blk.0.ffn_norm_exps.weight", (16,), F32, 0, 0),
        ("blk.0.ffn_gate_shexp.weight", (16, 5, 3), F32, 0, 0),
        ("blk.0.ffn_gate_inp.weight", (16, 5), F32, 0, 0),
        ("blk.0.ffn_up_exps.weight", (32, 4, 0), F32, 0, 0),
    ],
)
def test_experts(put, name: str, shape: tuple[int, ...], kind: int, n_experts: int, expert_bytes: int) -> None:
    (tensor,) = read_model(put(build(infos=(info(name, shape, kind),), data=bytes(8192)))).tensors
    assert (tensor.n_experts, tensor.expert_bytes) == (n_experts, expert_bytes)
    assert tensor.n_experts == 0 or tensor.n_experts * tensor.expert_bytes == tensor.size


def test_metadata_is_scalars_short_strings_and_summaries(put) -> None:
    scalars = {
        "b": (gguf.GGUFValueType.BOOL, "?", True),
        "i8": (gguf.GGUFValueType.INT8, "b", -3),
        "u16": (gguf.GGUFValueType.UINT16, "H", 65535),
        "i32": (gguf.GGUFValueType.INT32, "i", -70000),
        "u64": (gguf.GGUFValueType.UINT64, "Q", 2**64 - 1),
        "i64": (gguf.GGUFValueType.INT64, "q", -(2**63)),
        "f32": (gguf.GGUFValueType.FLOAT32, "f", 0.5),
        "f64": (gguf.GGUFValueType.FLOAT64, "d", 1e300),
    }
    nested = array(ARRAY, 2, array(STRING, 1, string("x")) + array(U32, 3, bytes(12)))
    model = read_model(
        put(
            build(
                (
                    *(value(key, int(kind), struct.pack("<" + form, v)) for key, (kind, form, v) in scalars.items()),
                    value("text", STRING, string("héllo")),
                    value("long", STRING, string("x" * 200_000)),
                    value("list", ARRAY, array(STRING, 3, string("a") + string("") + string("b" * 300_000))),
                    value("nested", ARRAY, nested),
                    value("last", U32, struct.pack("<I", 7)),
                ),
            ),
            "plain.gguf",
        )
    )
    assert model.metadata == {key: v for key, (_, _, v) in scalars.items()} | {
        "text": "héllo",
        "long": "STRING of 200000 bytes",
        "list": "STRING[3]",
        "nested": "ARRAY[2]",
        "last": 7,
    }
    assert (model.architecture, model.name, model.tensors) == ("unknown", "plain", ())


def test_version_2_is_read(put) -> None:
    assert read_model(put(build(infos=(info("a"),), version=2))).tensors[0].name == "a"


def test_zero_elements_and_no_dimensions(put) -> None:
    infos = (info("empty", (0, 3)), info("scalar", ()), info("after", (8,), offset=32))
    tensors = read_model(put(build(infos=infos))).tensors
    assert [(t.name, t.size) for t in tensors] == [("empty", 0), ("scalar", 4), ("after", 32)]


def test_names_that_are_not_utf8(put) -> None:
    (tensor,) = read_model(put(build(infos=(info(b"a\xff\x1b"),)))).tensors
    assert tensor.name == "a\\xff\x1b"
    tensor.name.encode()  # Arrow and JSON take it


def test_fingerprint_is_of_the_header_and_the_size(put) -> None:
    base = build((value("k", U32, bytes(4)),), (info("a"),))
    fingerprint = read_model(put(base)).fingerprint
    assert len(fingerprint) == 32
    assert int(fingerprint, 16)
    assert read_model(put(base, "copy.gguf")).fingerprint == fingerprint
    assert read_model(put(base[:-1] + b"x")).fingerprint == fingerprint, "tensor data is not read"
    assert read_model(put(base + b"x")).fingerprint != fingerprint
    assert read_model(put(build((value("k", U32, b"\1\0\0\0"),), (info("a"),)))).fingerprint != fingerprint


def test_is_gguf(put, tmp_path: Path) -> None:
    assert is_gguf(put(build()))
    os.mkfifo(tmp_path / "fifo")
    for path in (put(b"GGU", "short"), put(b"", "empty"), tmp_path, tmp_path / "fifo", tmp_path / "none", "a\0b"):
        assert not is_gguf(path)


def test_tensor_data_stays_out_of_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(build(infos=(info("a", (4 << 20,)),), data=bytes(16 << 20)))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("the temporary folder's file system keeps files in memory; set --basetemp to one on a disk")
    read_model(path)
    assert 0 < resident(path) * 4096 <= 128 << 10


def resident(path: Path) -> int:
    """Pages of a file in the page cache."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as view,
    ):
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(len(view)), pages)
        del start
        assert not failed
        return sum(page & 1 for page in pages)


# --- split models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    tensors = {f"blk.{i}.ffn_up.weight": np.full((4, 32), i, np.float32) for i in range(6)}
    write(tmp_path / "big.gguf", tensors, split_max_tensors=2)
    paths = sorted(tmp_path.glob("big-*.gguf"))
    assert [p.name for p in paths] == [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return paths


@pytest.mark.parametrize("given", range(3))
def test_any_shard_gives_the_whole_model(shards: list[Path], given: int) -> None:
    model = read_model(shards[given])
    assert [s.path for s in model.shards] == shards
    assert_as_reader(model)
    assert [(t.layer, t.shard) for t in model.tensors] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert (model.architecture, model.name) == ("llama", "A model")
    assert model.fingerprint == read_model(shards[0]).fingerprint
    with shards[2].open("ab") as file:
        file.write(b"x")
    assert model.fingerprint != read_model(shards[0]).fingerprint, "the fingerprint covers every shard"


def test_a_missing_shard_is_named(shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(LlmtracedError, match=r"big-00002-of-00003.gguf: shard 2 of 3 is missing"):
        read_model(shards[0])


def test_shards_in_the_wrong_order(shards: list[Path]) -> None:
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(LlmtracedError, match=r"00003-of-00003.gguf: says that it is shard 2 of 3, expected 3 of 3"):
        read_model(shards[0])


def test_shards_that_hold_fewer_tensors_than_promised(shards: list[Path]) -> None:
    tensors = {"other.weight": np.ones(4, np.float32)}
    shards[2].unlink()
    write(
        shards[2].parent / "x.gguf", {f"{n}{i}": t for i in range(3) for n, t in tensors.items()}, split_max_tensors=1
    )
    (shards[2].parent / "x-00003-of-00003.gguf").rename(shards[2])
    assert "promises 6 tensors, its 3 shards have 5" in refused(shards[0])


def test_a_tensor_in_two_shards(shards: list[Path]) -> None:
    data = shards[1].read_bytes()
    shards[1].write_bytes(data.replace(b"blk.2.ffn_up", b"blk.1.ffn_up"))
    with pytest.raises(LlmtracedError, match=r"00002-of-00003.gguf: tensor 'blk.1.ffn_up.weight' occurs twice"):
        read_model(shards[0])


def test_shards_without_shard_names_are_found_among_others(shards: list[Path], put) -> None:
    """A Hugging Face cache names files by their hashes, and /proc/PID/maps shows those names."""
    blobs = [shard.rename(shard.with_name(f"blob{i}")) for i, shard in enumerate(shards)]
    stranger = put(build(infos=(info("a"),)), "stranger")
    model = read_model(blobs[1], others=[stranger, put(b"junk", "junk"), *blobs])
    assert [s.path for s in model.shards] == blobs
    assert_as_reader(model)
    assert "shard 1 of 3, but not named …-00001-of-00003.gguf, so shard 2 cannot be found" in refused(blobs[0])


def test_a_split_name_alone_does_not_make_a_split_model(put) -> None:
    model = read_model(put(build(infos=(info("a"),)), "m-00001-of-00002.gguf"))
    assert (len(model.shards), model.name) == (1, "m-00001-of-00002")


def test_split_numbers_that_make_no_sense(put) -> None:
    def split(number: int, count: int) -> bytes:
        return build(
            (value("split.no", U32, struct.pack("<I", number)), value("split.count", U32, struct.pack("<I", count)))
        )

    assert "shard 4 of 3" in refused(put(split(3, 3)))
    assert "shard 1 of 4000000000" in refused(put(split(0, 4_000_000_000)))
    assert "'split.count' is not an integer" in refused(put(build((value("split.count", STRING, string("2")),))))


# --- hostile files --------------------------------------------------------------------------------------------------


def small() -> bytes:
    """A small valid file with every kind of header field; the tensor data ends where the file does."""
    values = (
        value("general.architecture", STRING, string("llama")),
        value("general.alignment", U32, struct.pack("<I", 32)),
        value("tokens", ARRAY, array(STRING, 3, string("a") + string("bc") + string(""))),
        value("scores", ARRAY, array(U32, 2, bytes(8))),
        value("nested", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4)))),
    )
    infos = (info("token_embd.weight", (32, 2), Q4_0), info("blk.0.ffn_up_exps.weight", (2, 2, 2), F32, 64))
    return build(values, infos, data=bytes(96))


def test_truncation_at_every_byte(put) -> None:
    whole = small()
    assert len(read_model(put(whole)).tensors) == 2
    for length in range(len(whole)):
        message = refused(put(whole[:length]))
        if length >= 4:
            assert "truncated" in message, f"{length} bytes: {message}"


HUGE = 2**63
OUTSIDE = {
    "not GGUF": (b"PK\x03\x04" + bytes(100), "not a GGUF file (starts with b'PK\\x03\\x04')"),
    "empty": (b"", "not a GGUF file (it is empty)"),
    "version 1": (build(version=1), "GGUF version 1; only 2 and 3 can be read"),
    "version 4": (build(version=4), "GGUF version 4"),
    "version 0": (build(version=0), "GGUF version 0"),
    "big-endian": (build(version=0x03000000), "big-endian"),
    "tensor count": (build(counts=(HUGE, 0)), f"truncated: {HUGE} tensors"),
    "value count": (build(counts=(0, HUGE)), f"truncated: {HUGE} metadata values"),
    "many entries": (build(counts=(MAX_ENTRIES + 1, 0), data=bytes(24 * MAX_ENTRIES + 64)), f"more than {MAX_ENTRIES}"),
    "string length": (build((value("k", STRING, struct.pack("<Q", 2**62)),)), "truncated: metadata 'k'"),
    "key length": (build((struct.pack("<Q", 2**64 - 1),)), "truncated: a metadata key"),
    "long key": (build((value("k" * 5000, U32, bytes(4)),)), f"a metadata key has 5000 bytes; at most {MAX_NAME}"),
    "long name": (build(infos=(info("n" * 1025),)), f"a tensor's name has 1025 bytes; at most {MAX_NAME}"),
    "array length": (build((value("k", ARRAY, array(U32, 2**60)),)), "truncated: metadata 'k'"),
    "string array length": (build((value("k", ARRAY, array(STRING, 2**60)),)), "truncated: metadata 'k'"),
    "array's string": (build((value("k", ARRAY, array(STRING, 1, b"\xff" * 8)),)), "truncated: metadata 'k'"),
    "nested array length": (build((value("k", ARRAY, array(ARRAY, 2**60)),)), "arrays in metadata 'k'"),
    "deep arrays": (build((value("k", ARRAY, array(ARRAY, 1) * 5000),)), "arrays nested deeper than 4"),
    "value type": (build((value("k", 13, bytes(8)),)), "metadata 'k' has the unknown value type 13"),
    "element type": (build((value("k", ARRAY, array(99, 1, bytes(8))),)), "unknown element type 99"),
    "same key": (build((value("k", U32, bytes(4)),) * 2), "metadata key 'k' occurs twice"),
    "alignment 0": (build((value("general.alignment", U32, bytes(4)),)), "general.alignment is 0, not a power of two"),
    "alignment 3": (build((value("general.alignment", U32, b"\3\0\0\0"),)), "general.alignment is 3, not a power"),
    "alignment text": (build((value("general.alignment", STRING, string("32")),)), "not a power of two"),
    "huge alignment": (build((value("general.alignment", U32, b"\0\0\0\x80"),), (info("a"),)), "truncated: tensor 'a'"),
    "overlap": (build(infos=(info("a", (16,)), info("b", offset=32))), "tensors 'a' and 'b' overlap at byte"),
    "same place": (build(infos=(info("a"), info("b"))), "tensors 'a' and 'b' overlap"),
    "same name": (build(infos=(info("a"), info("a", offset=32))), "tensor 'a' occurs twice"),
    "odd offset": (build(infos=(info("a", offset=31),)), "begins at offset 31, not a multiple of the alignment 32"),
    "far offset": (build(infos=(info("a", offset=2**64 - 32),)), "too large"),
    "past the end": (build(infos=(info("a", (1025,)),)), "truncated: tensor 'a' ends at byte"),
    "dimensions overflow": (build(infos=(info("a", (2**32, 2**32)),)), "is too large"),
    "wraps to small": (build(infos=(info("a", (2**63, 2, 2**63, 2)),)), "is too large"),
    "wraps to zero": (build(infos=(info("a", (2**63, 0)),)), "is too large"),
    "5 dimensions": (build(infos=(info("a", (1,) * 5),)), "tensor 'a' has 5 dimensions; ggml has at most 4"),
    "2^32 - 1 dimensions": (build(infos=(string("a") + b"\xff" * 4,)), "4294967295 dimensions"),
    "unknown type": (build(infos=(info("a", kind=999),)), "tensor 'a' has type number 999"),
    "removed type": (build(infos=(info("a", kind=4),)), "tensor 'a' has type number 4"),  # Q4_2
    "half a block": (build(infos=(info("a", (33,), Q4_0),)), "rows of 33 elements, not a multiple of the 32"),
    "half a block a row": (build(infos=(info("a", (16, 2), Q4_0),)), "rows of 16 elements"),
    "escapes in a key": (build((value("\x1b]0;x\x07", 77, b""),)), "metadata '\\x1b]0;x\\x07'"),
    "escapes in a name": (build(infos=(info("\x1b[31m\n", kind=999),)), "tensor '\\x1b[31m\\n'"),
}


@pytest.mark.parametrize(("data", "message"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_hostile_header(put, data: bytes, message: str) -> None:
    path = put(data)
    assert message in bounded(lambda: refused(path), seconds=2, memory=2 << 20)


@pytest.mark.parametrize(
    ("values", "counts", "message"),
    [
        ((value("k", STRING, struct.pack("<Q", 1 << 38)),), (0, 1), "headers of more than"),
        ((struct.pack("<Q", 1 << 38),), (0, 1), "headers of more than"),
        ((value("k", ARRAY, array(U32, 1 << 36)),), (0, 1), "headers of more than"),
        ((value("k", ARRAY, array(STRING, 1 << 35)),), (0, 1), "headers of more than"),
        ((value("k", ARRAY, array(STRING, 1 << 19)),), (0, 3), "key '' occurs twice"),  # 4 MB of empty strings
        ((value("k", ARRAY, array(ARRAY, 1 << 30)),), (0, 1), "headers of more than"),
        ((value("k", ARRAY, array(ARRAY, MAX_ENTRIES)),), (0, 1), f"more than {MAX_ENTRIES} entries"),
        ((), (1 << 30, 0), "headers of more than"),
        ((), (MAX_ENTRIES, 0), "overlap|occurs twice"),
    ],
    ids=["string", "key", "array", "strings", "empty strings", "arrays", "many arrays", "tensors", "many tensors"],
)
def test_time_and_memory_are_bounded_where_the_file_is_huge(
    put, values: tuple[bytes, ...], counts: tuple[int, int], message: str
) -> None:
    """A sparse terabyte backs any count, so only our own limits stand between a header and the machine."""
    path = put(build(values, counts=counts))
    os.truncate(path, 1 << 40)
    assert re.search(message, bounded(lambda: refused(path), seconds=5, memory=MAX_ENTRIES * 1024))  # 0.7 s at most


def test_header_limit_is_far_above_real_headers() -> None:
    assert MAX_HEADER > 10 * 16_000_000


def test_files_that_are_not_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(tmp_path / "fifo")  # opening it must not wait for a writer
    assert "a directory, not a GGUF file" in refused(tmp_path)
    assert "not a regular file" in refused(Path("/dev/zero"))
    assert "No such file" in refused(tmp_path / "none.gguf")
    with pytest.raises(LlmtracedError, match="null byte"):
        read_model("a\0b")


def test_no_permission(put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(small())

    def denied(*_args: object, **_kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gguf_header.os, "open", denied)  # root may open anything, so mode 0 would not do
    with pytest.raises(LlmtracedError, match="run the same command as root") as caught:
        read_model(path)
    assert caught.value.exit_code == NO_PERMISSION


def test_read_errors_and_shrinking_files(put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(small())
    real = os.pread
    monkeypatch.setattr(gguf_header.os, "pread", lambda fd, n, at: real(fd, min(n, 4), at))
    assert "became shorter while it was read" in refused(path)

    def broken(fd: int, n: int, at: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gguf_header.os, "pread", broken)
    assert "cannot be read: Input/output error" in refused(path)
    assert not is_gguf(path)


SMALL = small()


@settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SMALL) - 1),
            st.sampled_from([b"\0", b"\xff", b"\x7f", b"\1", b"\x80" * 8]) | st.binary(max_size=9),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, len(SMALL)) | st.just(len(SMALL)),
)
@example([(8, b"\xff" * 8)], len(SMALL))
def test_mutated_files_parse_or_are_refused(tmp_path: Path, changes: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(SMALL)
    for at, new in changes:
        data[at : at + len(new)] = new
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data[:length])
    started = time.process_time()
    try:
        model = read_model(path)
    except LlmtracedError:
        return
    finally:
        assert time.process_time() - started < 5  # a millisecond or so, and now and then a collection of garbage
    end = 0
    for tensor in model.tensors:
        assert end <= tensor.offset
        end = tensor.offset + tensor.size
        assert end <= model.shards[0].size
        assert tensor.n_experts * tensor.expert_bytes in (0, tensor.size)
