"""The BPF arrays that user space maps, as numpy dtypes. They mirror the structs of the same names in bpf/common.h."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.schema import EVENT, Cause, Phase

__all__ = [
    "ACCOUNT",
    "BOUND",
    "CONFIG",
    "COUNTER",
    "FILE",
    "OP",
    "OP_RECORD",
    "OP_RECORDS",
    "RANGE",
    "SLOT",
    "op_events",
]

SLOT: Final = np.dtype(
    [
        ("token", "<u8"),
        ("window", "<u8"),
        ("phase", "<u4"),
        ("epoch", "<u4"),
        ("process", "<u4"),
        ("detail", "<u4"),
        ("layout", "<u4"),
        ("op_mul_mat", "<u4"),
        ("op_mul_mat_id", "<u4"),
        ("tensor_op", "<u4"),
        ("tensor_ne", "<u4"),
        ("tensor_src", "<u4"),
        ("spare", "<u8"),
        ("in_fault", "<u8"),
        ("stall_since", "<u8"),
        ("stall_ns", "<u8"),
        ("eval_ns", "<u8"),
        ("graph_start", "<u8"),
        ("graph_n_nodes", "<u8"),
        ("graph_nodes", "<u8"),
        ("tensor_nb", "<u8"),
        ("tokens", "<u8", (len(Phase),)),
        ("tensor_data", "<u8"),
        ("tensor_name", "<u8"),
        ("rest", "<u8", (2,)),
    ]
)
RANGE: Final = np.dtype([("start", "<u8"), ("end", "<u8"), ("offset", "<u8"), ("file", "<u8")])
FILE: Final = np.dtype(
    [(n, "<u8") for n in ("slot", "byte_base", "byte_count", "page_base", "page_count", "seen_base", "pages", "spare")]
)
BOUND: Final = np.dtype("<u8")
COUNTER: Final = np.dtype(
    [
        ("minor", "<u8"),
        ("major", "<u8"),
        ("fault_ns", "<u8"),
        ("added", "<u8", (len(Cause),)),
        ("again", "<u8"),
        ("evicted", "<u8"),
    ]
)
OP_RECORDS: Final = 16
"""Operators of a thread that become records together, a power of two."""

OP_RECORD: Final = np.dtype([("event", "V56"), ("header", "<u8")])
OP: Final = np.dtype(
    [
        ("thread", "<u8"),
        ("since", "<u8"),
        ("more", "<u4"),
        ("slot", "<u4"),
        ("done", "<u4"),
        ("epoch", "<u4"),
        ("spares", "<u8", (4,)),
        ("records", OP_RECORD, (OP_RECORDS,)),
    ]
)
ACCOUNT: Final = np.dtype([("counted", "<u8"), ("dropped", "<u8")])
CONFIG: Final = np.dtype("<u8")


def op_events(op: Any) -> NDArray[Any]:
    """Return the operators that wait in an element of :data:`OP`, as records of the ring (dtype schema.EVENT)."""
    n = int(op["done"])
    body = np.ascontiguousarray(op["records"]["event"][:n]).view(np.uint8).reshape(n, OP_RECORD["event"].itemsize)
    rows = np.zeros((n, EVENT.itemsize), np.uint8)
    rows[:, EVENT.itemsize - body.shape[1] :] = body  # behind the ring's own header
    return rows.view(EVENT).reshape(n)
