"""The one source of what is recorded: event kinds and codes, the BPF record, the trace tables.

The kernel side includes :func:`c_header` (``#define`` lines made from the enums below), the ring reader views its
batches as :data:`EVENT`, and the trace writer takes its Arrow schemas from :data:`TABLES`. Nothing about the format
is written anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

import numpy as np
import pyarrow as pa

__all__ = [
    "CAUSES",
    "EPOCHS",
    "EVENT",
    "PAGE",
    "PHASES",
    "SCHEMA_VERSION",
    "SLOTS",
    "SOURCES",
    "TABLES",
    "Cause",
    "Detail",
    "Kind",
    "Outcome",
    "Phase",
    "Probe",
    "c_header",
]

SCHEMA_VERSION: Final = 1
"""Rises when a reader of an older trace would misread a newer one."""

PAGE: Final = 4096
"""Bytes in a page of the page cache index (x86-64 and 4 KiB arm64 kernels)."""

SLOTS: Final = 16
"""Processes that can be traced at the same time; the 17th is refused with a message."""

EPOCHS: Final = 4
"""Account generations: records carry theirs, so that each trace file has an exact account (see docs/trace.md)."""


class Kind(IntEnum):
    """What a ring record tells."""

    FAULT = 0
    ADD = 1
    EVICT = 2
    READ = 3
    TOKEN = 4
    TOKEN_END = 5
    OP = 6
    ROUTE = 7


class Probe(IntEnum):
    """The accounts that are kept: kernel-counted = delivered + dropped, each in its own unit."""

    FAULTS = 0
    PAGECACHE = 1
    READS = 2
    TOKENS = 3
    OPS = 4
    ROUTING = 5


class Phase(IntEnum):
    """What the server is doing. ``UNKNOWN``: attached to a running server, no graph seen yet."""

    LOAD = 0
    PROMPT = 1
    DECODE = 2
    UNKNOWN = 3


class Cause(IntEnum):
    """Why a page came into, or went out of, the page cache (see docs/pagecache.md)."""

    FAULT = 0
    READAHEAD = 1
    PREFETCHER = 2
    READ = 3
    OTHER = 4


class Outcome(IntEnum):
    """How a page fault ended. ``UNKNOWN``: its completion was not seen."""

    MINOR = 0
    MAJOR = 1
    UNKNOWN = 2


class Detail(IntEnum):
    """The dial: what is recorded. Tokens always are; totals of faults and pages are kept for the metrics, always."""

    TOTALS = 0
    """Faults, pages and reads are counted, and counted as dropped."""
    FAULTS = 1
    OPS = 2
    FULL = 3


PHASES: Final = tuple(p.name.lower() for p in Phase)
CAUSES: Final = tuple(c.name.lower() for c in Cause)
SOURCES: Final = ("router", "attention")
"""What a mixture's routers are applied to: the input of a router, or of a layer's attention."""

EVENT: Final = np.dtype(
    [
        ("header", "<u4"),  # the ring's own: length, busy bit 31, discard bit 30
        ("pgoff", "<u4"),  # the ring's own
        ("ts", "<u8"),  # CLOCK_MONOTONIC, ns
        ("token", "<u4"),
        ("tid", "<u4"),
        ("pid", "<u4"),
        ("kind", "u1"),  # Kind
        ("code", "u1"),  # Outcome (FAULT), Cause (ADD, EVICT, READ), number of ids (ROUTE)
        ("slot", "u1"),
        ("mark", "u1"),  # Phase in the low, epoch in the high four bits
        ("a", "<u8"),
        ("b", "<u8"),
        ("c", "<u8"),
        ("d", "<u8"),
    ]
)
"""One ring record, 64 bytes with the ring's header: a batch of the ring is an array of these.

======== ======================= ========================== ============================ ==========================
kind     a                       b                          c                            d
======== ======================= ========================== ============================ ==========================
FAULT    address                 latency ns (2^64-1: none)  offset in the file           file number
ADD      page index | file << 48 pages                      comm                         comm
EVICT    page index | file << 48 pages                      comm                         comm
READ     page index | file << 48 pages                      comm                         comm
TOKEN    cgraph address          n_tokens | n_outputs << 32 n_nodes                      stall ns so far
TOKEN_END 0                      duration ns                0                            stall ns so far
OP       address of src[0]       address of src[1]          duration ns (2^64-1: none)   enum ggml_op | rows << 32
ROUTE    position | layer << 32  ids 0-3 (u16)              ids 4-7                      ids 8-11
======== ======================= ========================== ============================ ==========================
"""


def c_header() -> str:
    """Return the ``#define`` lines that the BPF programs are compiled with."""
    lines = [f"#define LT_SLOTS {SLOTS}", f"#define LT_EPOCHS {EPOCHS}"]
    for enum, prefix in (
        (Kind, "KIND"),
        (Probe, "PROBE"),
        (Phase, "PHASE"),
        (Cause, "CAUSE"),
        (Outcome, "OUTCOME"),
        (Detail, "DETAIL"),
    ):
        lines += [f"#define {prefix}_{member.name} {member.value}" for member in enum]
        lines.append(f"#define {prefix}_COUNT {len(enum)}")
    return "\n".join(lines) + "\n"


_name = pa.dictionary(pa.int32(), pa.string())
_enum = pa.dictionary(pa.int8(), pa.string())

_when = [("timestamp", pa.int64()), ("token", pa.int32()), ("phase", _enum)]
_where = [("model", _enum), ("shard", pa.int16())]

LATER: Final[Mapping[str, frozenset[str]]] = {"tokens": frozenset({"model"})}
"""Columns that traces of the same schema version may lack, because they were added later: they are null there."""

TABLES: Final[Mapping[str, pa.Schema]] = {
    "tensors": pa.schema(
        [
            ("model", _enum),
            ("tensor_name", pa.string()),
            ("offset_bytes", pa.int64()),
            ("size_bytes", pa.int64()),
            ("type", pa.string()),
            ("layer", pa.int32()),
            ("component", pa.string()),
            ("shard", pa.int16()),
            ("n_experts", pa.int32()),
            ("expert_bytes", pa.int64()),
            ("backed", pa.bool_()),
        ]
    ),
    "tokens": pa.schema(
        [
            ("token", pa.int32()),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("n_tokens", pa.int32()),
            ("n_outputs", pa.int32()),
            ("phase", _enum),
            ("stall_ns", pa.int64()),
            ("fault_ns", pa.int64()),
            ("major_faults", pa.int64()),
            ("minor_faults", pa.int64()),
            ("bytes_read", pa.int64()),
            ("graph_nodes", pa.int32()),
            ("model", _enum),
        ]
    ),
    "ops": pa.schema(
        [
            *_when,
            ("model", _enum),
            ("tensor_name", _name),
            ("data_ptr", pa.int64()),
            ("bytes_accessed", pa.int64()),
            ("op", _name),
            ("thread", pa.int32()),
            ("duration_ns", pa.int64()),
        ]
    ),
    "faults": pa.schema(
        [
            *_when,
            ("thread", pa.int32()),
            ("address", pa.int64()),
            ("offset_bytes", pa.int64()),
            *_where,
            ("tensor_name", _name),
            ("expert", pa.int32()),
            ("major", pa.bool_()),
            ("latency_ns", pa.int64()),
        ]
    ),
    "pagecache": pa.schema(
        [
            *_when,
            ("action", _enum),
            ("offset_bytes", pa.int64()),
            ("bytes", pa.int64()),
            *_where,
            ("tensor_name", _name),
            ("expert", pa.int32()),
            ("cause", _enum),
            ("pid", pa.int32()),
            ("comm", _name),
        ]
    ),
    "reads": pa.schema(
        [
            *_when,
            ("offset_bytes", pa.int64()),
            ("bytes", pa.int64()),
            *_where,
            ("tensor_name", _name),
            ("expert", pa.int32()),
            ("pid", pa.int32()),
            ("comm", _name),
        ]
    ),
    "routing": pa.schema(
        [
            ("timestamp", pa.int64()),
            ("token", pa.int32()),
            ("phase", _enum),
            ("layer", pa.int32()),
            ("experts", pa.list_(pa.int32())),
            ("position", pa.int32()),
        ]
    ),
    "router_scores": pa.schema(
        [
            *_when,
            ("layer", pa.int32()),
            ("source", _enum),
            ("ahead", pa.int32()),
            ("scores", pa.list_(pa.float32())),
        ]
    ),
}
"""The trace's tables. Times are CLOCK_MONOTONIC nanoseconds (the footer says how to turn them into wall-clock time);
``token`` is the number of the graph evaluation, 0 before the first; ``offset_bytes`` is absolute in the shard's file;
``tensor_name`` is null for bytes that belong to no tensor (header, padding); ``expert`` is -1 where there is none;
``major`` and ``latency_ns`` are null where a fault's completion was not seen."""
