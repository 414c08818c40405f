"""What a trace says of what it is about: the footers' metadata, the session's name, and the table of tensors."""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

import pyarrow as pa

from llmtraced import __version__, clock
from llmtraced.cgroup import cgroup_of
from llmtraced.errors import printable
from llmtraced.resolve import Resolver
from llmtraced.schema import TABLES, Detail
from llmtraced.target import Target

__all__ = ["session_metadata", "session_name", "tensor_table"]


def session_metadata(target: Target, detail: Detail) -> dict[str, Any]:
    """Return what every footer of a session's trace says about it."""
    cgroup = cgroup_of(target.pid)
    return {
        "tool_version": __version__,
        "boot_id": clock.boot_id(),
        "kernel": os.uname().release,
        "clock": "CLOCK_MONOTONIC",
        "pid": target.pid,
        "comm": printable(target.comm),
        "command": [printable(a) for a in target.command],
        "load_mode": printable(target.load_mode),
        "cgroup_limit_bytes": cgroup.limit if cgroup else None,
        "detail": detail.name.lower(),
        "models": [
            {
                "model": label,
                "path": printable(str(model.shards[0].path), 4096),
                "fingerprint": model.fingerprint,
                "size_bytes": sum(s.size for s in model.shards),
                "mapped_bytes": sum(m.end - m.start for f in target.files if f.label == label for m in f.mappings),
            }
            for label, model in target.models.items()
        ],
    }


def session_name(target: Target) -> str:
    """Return what names this recording for good: boot, pid, the process's start and the recording's (ms)."""
    return f"{clock.boot_id()[:8]}-{target.pid}-{target.start}.{clock.monotonic_ns() // 1_000_000}"


def tensor_table(resolver: Resolver, backed: Container[int], unbacked: Container[int]) -> pa.Table:
    """Return the table ``tensors``, one row a tensor of the resolver, in its order.

    Args:
        resolver: of the session's models.
        backed: numbers of the tensors that the process computes with from the mapping.
        unbacked: numbers of those that it has elsewhere. In neither: not known.
    """
    r, schema = resolver, TABLES["tensors"]
    columns: dict[str, list[Any]] = {
        "model": [r.labels[m] for m in r.model_of],
        "tensor_name": list(r.names),
        "offset_bytes": [t.offset for t in r.tensors],
        "size_bytes": [t.size for t in r.tensors],
        "type": [t.type for t in r.tensors],
        "layer": [t.layer for t in r.tensors],
        "component": [t.component for t in r.tensors],
        "shard": [t.shard for t in r.tensors],
        "n_experts": [t.n_experts for t in r.tensors],
        "expert_bytes": [t.expert_bytes for t in r.tensors],
        "backed": [True if i in backed else False if i in unbacked else None for i in range(len(r.tensors))],
    }
    words = {"model"}  # an Arrow dictionary is made of an array of strings
    arrays = [
        pa.array(columns[f.name]).cast(f.type) if f.name in words else pa.array(columns[f.name], f.type) for f in schema
    ]
    return pa.table(arrays, schema=schema)
