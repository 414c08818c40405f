"""The BPF arrays that user space maps, as numpy dtypes. They mirror the structs of the same names in bpf/common.h."""

from __future__ import annotations

from typing import Final

import numpy as np

from llmtraced.schema import Cause, Phase

__all__ = ["ACCOUNT", "BOUND", "CONFIG", "COUNTER", "FILE", "RANGE", "SLOT"]

SLOT: Final = np.dtype(
    [
        ("token", "<u8"),
        ("phase", "<u8"),
        ("in_fault", "<u8"),
        ("stall_since", "<u8"),
        ("stall_ns", "<u8"),
        ("eval_ns", "<u8"),
        ("graph_start", "<u8"),
        ("tokens", "<u8", (len(Phase),)),
        ("window", "<u8"),
        ("detail", "<u8"),
        ("layout", "<u8"),
        ("graph_n_nodes", "<u8"),
        ("graph_nodes", "<u8"),
        ("tensor_op", "<u8"),
        ("tensor_ne", "<u8"),
        ("tensor_nb", "<u8"),
        ("tensor_src", "<u8"),
        ("tensor_data", "<u8"),
        ("tensor_name", "<u8"),
        ("op_mul_mat", "<u8"),
        ("op_mul_mat_id", "<u8"),
        ("process", "<u8"),
        ("spare", "<u8", (4,)),
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
ACCOUNT: Final = np.dtype([("counted", "<u8"), ("dropped", "<u8")])
CONFIG: Final = np.dtype("<u8")
