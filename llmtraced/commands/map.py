"""Print the tensor map of a GGUF model: which bytes of the file are which tensor.

  llmtraced map model.gguf                              name, offset, size, type, layer and component as CSV
  llmtraced map model-00001-of-00003.gguf --wide        any shard will do; adds shard, expert and shape columns
  llmtraced map model.gguf --format parquet -o map.parquet

Offsets count from the start of the shard's file. In a merged expert tensor, byte B belongs to expert
(B - offset_bytes) // expert_bytes. Only headers are read, so a model of any size takes well under a second.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from llmtraced.commands._output import add_output_arguments, check_output, write_output
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.gguf_map import Model, Tensor, read_model

__all__ = ["add_arguments", "run"]

Columns = Mapping[str, Callable[[Tensor], object]]

_COLUMNS: Final[Columns] = {
    "tensor_name": lambda t: t.name,
    "offset_bytes": lambda t: t.offset,
    "size_bytes": lambda t: t.size,
    "type": lambda t: t.type,
    "layer": lambda t: t.layer,
    "component": lambda t: t.component,
}
_WIDE: Final[Columns] = {
    **_COLUMNS,
    "shard": lambda t: t.shard,
    "n_experts": lambda t: t.n_experts,
    "expert_bytes": lambda t: t.expert_bytes,
    "shape": lambda t: list(t.shape),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF file, or any shard of a split model")
    parser.add_argument("--wide", action="store_true", help="add shard, n_experts, expert_bytes and shape")
    parser.add_argument("--format", choices=_RENDERERS, default="csv", help="csv (the default), json or parquet")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print or write the map of ``args.model``."""
    check_output(args.output, args.force)
    if args.format == "parquet" and args.output is None and sys.stdout.isatty():
        raise LlmtracedError("Parquet is binary: name a file with -o FILE, or pipe it elsewhere", USAGE)
    model = read_model(args.model)
    write_output(_RENDERERS[args.format](model, _WIDE if args.wide else _COLUMNS), args.output)
    return 0


def _csv(model: Model, columns: Columns) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value(tensor)) for value in columns.values()] for tensor in model.tensors)
    return text.getvalue().encode()


def _cell(value: object) -> object:
    if isinstance(value, str):
        return printable(value, limit=1 << 16)  # names come from the file and end on terminals
    return "x".join(map(str, value)) if isinstance(value, list) else value


def _json(model: Model, columns: Columns) -> bytes:
    shards = [{"path": str(s.path), "size_bytes": s.size, "data_offset_bytes": s.data_offset} for s in model.shards]
    about = {key: getattr(model, key) for key in ("architecture", "name", "fingerprint")}
    tensors = [{name: value(tensor) for name, value in columns.items()} for tensor in model.tensors]
    document = {"model": {"path": shards[0]["path"], **about, "shards": shards}, "tensors": tensors}
    return (json.dumps(document, indent=1) + "\n").encode()


def _parquet(model: Model, columns: Columns) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmtraced.schema import TABLES

    types = {field.name: field.type for field in TABLES["tensors"]} | {"shape": pa.list_(pa.int64())}
    rows = {name: [value(tensor) for tensor in model.tensors] for name, value in columns.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(rows, schema=pa.schema([(name, types[name]) for name in columns])), sink)
    return sink.getvalue()


_RENDERERS: Final[Mapping[str, Callable[[Model, Columns], bytes]]] = {"csv": _csv, "json": _json, "parquet": _parquet}
