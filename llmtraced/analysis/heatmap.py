"""Where and when: a matrix of tensors by tokens, or of file offsets by time, of accesses, bytes read or stall.

Both matrices are complete: their cells add up to the total of all rows, whatever the number of bins.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.axes import Files, Ints, pieces, sizes, time_bins, tokens_at
from llmtraced.analysis.trace import Trace, collect, verdict

__all__ = ["AXES", "ORDERS", "VALUES", "heatmap"]

VALUES: Final = ("bytes", "stall", "accesses")
"""What a cell holds: bytes added to the page cache; latencies of page faults, ns; faults and operators, a number."""

AXES: Final = ("token", "time")
"""``token``: tensors by tokens; ``time``: file offsets by time."""

ORDERS: Final = ("file", "layer")
"""Order of the tensors: as in the file, or by layer and component."""

_UNITS: Final = {"bytes": "bytes", "stall": "ns", "accesses": "accesses"}
_TENSOR: Final = ("model", "tensor_name")


def heatmap(
    trace: Trace,
    phase: str | None = None,
    value: str = "bytes",
    by: str = "token",
    order: str = "file",
    bins: int = 400,
    rows: int = 200,
) -> dict[str, Any]:
    """Return a matrix of ``value`` (one of :data:`VALUES`), dense, one list of integers a row.

    Args:
        trace: the trace.
        phase: only rows of this phase.
        value: ``bytes``, ``stall`` or ``accesses``.
        by: ``token``: a row a tensor (and one for bytes outside tensors), a column a bin of consecutive tokens.
            ``time``: a row a bin of file offsets, a column a bin of time; ``accesses`` are page faults only there,
            because an operator is at no offset.
        order: of the tensors, ``file`` or ``layer``.
        bins: columns at most; token 0 has one of its own beside them.
        rows: bins of file offsets, about; of ``by="time"`` only.

    Returns:
        ``columns`` (``first_token, last_token`` or ``first_ns, last_ns, token, phase``), ``rows`` (what they are,
        ``total``, ``values``), ``total`` and ``unplaced`` (in no model file: in no row), the common fields.
    """
    if value not in VALUES or by not in AXES or order not in ORDERS:
        raise ValueError(f"no such heatmap: value {value!r}, by {by!r}, order {order!r}")
    make = _by_token if by == "token" else _by_time
    columns, found, matrix, unplaced = make(trace, phase, value, order, bins, rows)
    totals = matrix.sum(axis=1).tolist()
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "value": value,
        "unit": _UNITS[value],
        "by": by,
        "order": order if by == "token" else "file",
        "total": sum(totals) + unplaced,
        "unplaced": unplaced,
        "columns": columns,
        "rows": [
            {**row, "total": total, "values": values}
            for row, total, values in zip(found, totals, matrix.tolist(), strict=True)
        ],
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def _sources(value: str, by: str) -> dict[str, tuple[pl.Expr, pl.Expr]]:
    """Return, by table, which rows count and how much."""
    one = pl.lit(1, pl.Int64)
    if value == "bytes":
        return {"pagecache": (pl.col("action") == "add", pl.col("bytes"))}
    if value == "stall":
        return {"faults": (pl.col("latency_ns").is_not_null(), pl.col("latency_ns"))}
    ops = {"ops": (pl.col("tensor_name").is_not_null(), one)}
    return {"faults": (pl.lit(True), one)} | (ops if by == "token" else {})


_Made = tuple[list[dict[str, Any]], list[dict[str, Any]], Ints, int]


def _by_token(trace: Trace, phase: str | None, value: str, order: str, bins: int, _: int) -> _Made:
    sources = _sources(value, "token")
    seen = [trace.table(name, phase).filter(which).select("token") for name, (which, _) in sources.items()]
    token = pl.col("token")
    spans = [
        collect(frame.select(zero=(token <= 0).any(), low=token.filter(token > 0).min(), high=token.max()))
        for frame in [*seen, trace.table("tokens", phase).select("token")]
    ]
    span = pl.concat(spans)
    zero, low, high = int(bool(span["zero"].any())), span["low"].min(), span["high"].max()
    columns = [{"first_token": 0, "last_token": 0}] * zero
    width = 1
    if isinstance(low, int) and isinstance(high, int):
        width = -(-(high - low + 1) // bins)
        columns += [
            {"first_token": first, "last_token": min(first + width - 1, high)} for first in range(low, high + 1, width)
        ]
    start = low if isinstance(low, int) else 1
    column = pl.when(token <= 0).then(0).otherwise((token - start) // width + zero).cast(pl.Int32).alias("column")
    keys = (*_TENSOR, "column")
    folded: list[pl.DataFrame] = []
    for name, (which, amount) in sources.items():
        for piece in trace.slices(name, phase):
            rows = piece.filter(which).select(*_TENSOR, column, amount=amount)
            sums = rows.group_by(keys).agg(pl.col("amount").sum()).with_columns(pl.col(_TENSOR).cast(pl.String))
            folded.append(collect(sums))
            if len(folded) > 4:
                folded = [pl.concat(folded).group_by(keys).agg(pl.col("amount").sum())]
    cells = pl.concat(folded)
    found = _tensors(trace, cells, order)
    numbered = found.select(*_TENSOR).with_row_index("row")
    at = cells.join(numbered, on=_TENSOR, how="left", nulls_equal=True)
    matrix = np.zeros((found.height, len(columns)), np.int64)
    np.add.at(matrix, (at["row"].to_numpy(), at["column"].to_numpy()), at["amount"].to_numpy())
    return columns, found.to_dicts(), matrix, 0


def _tensors(trace: Trace, cells: pl.DataFrame, order: str) -> pl.DataFrame:
    """Return every tensor of the map, and whatever else has cells, in ``order``; what is in no tensor comes last."""
    known = trace.tensors.select(*_TENSOR, "shard", "layer", "component", "offset_bytes", "size_bytes", "backed")
    extra = cells.select(*_TENSOR).unique().join(known, on=_TENSOR, how="anti", nulls_equal=True).sort(_TENSOR)
    layer = pl.col("layer")
    outside = pl.when(pl.col("component").str.starts_with("output")).then(pl.lit(2**31 - 1)).otherwise(-1)
    by_layer = ("model", pl.when(layer < 0).then(outside).otherwise(layer), "component", "offset_bytes")
    by_file = ("model", "shard", "offset_bytes")
    known = known.sort(by_layer if order == "layer" else by_file, maintain_order=True)
    return pl.concat([known, extra.sort(pl.col("tensor_name").is_null(), maintain_order=True)], how="diagonal")


def _by_time(trace: Trace, phase: str | None, value: str, _: str, bins: int, rows: int) -> _Made:
    ((table, (which, amount)),) = _sources(value, "time").items()
    reads = table == "pagecache"
    when, offset = pl.col("timestamp"), pl.col("offset_bytes")
    spans = collect(
        trace.table(table, phase)
        .filter(which if reads else True)
        .group_by("model", "shard")
        .agg(
            first=when.min(), last=when.max(), end=(offset + (pl.col("bytes") if reads else pl.lit(1, pl.Int64))).max()
        )
    ).with_columns(pl.col("model").cast(pl.String))
    files = Files.of(sizes(trace, spans), rows)
    start, width, count = time_bins(spans, bins)
    matrix = np.zeros((files.count, count), np.int64)
    bases = np.array([base for _, _, base, _ in files.files] or [0])
    column = ((when - start) // width).alias("column")
    unplaced = 0
    for piece in trace.slices(table, phase):
        some = piece.filter(which)
        if reads:
            data = collect(some.select(files.number(), column, at=offset, amount=amount))
        else:  # each at one byte, so they can be added up first
            cells = some.select(files.number(), column, at=offset // files.width, amount=amount)
            data = collect(cells.group_by("file", "column", "at").agg(pl.col("amount").sum()))
        unplaced += int(data.filter(pl.col("file").is_null())["amount"].sum())
        data = data.filter(pl.col("file").is_not_null())
        base, columns_of, at, much = (data[n].to_numpy() for n in ("file", "column", "at", "amount"))
        base = bases[base]
        if reads:
            for index, stretch, part in pieces(at, much, files.width):
                cell = (base[index] + stretch) * count + columns_of[index]
                sums = np.bincount(cell, part, minlength=matrix.size)  # exact: a slice holds less than 2^53 bytes
                matrix += sums.astype(np.int64).reshape(matrix.shape)
        else:
            np.add.at(matrix, (base + at, columns_of), much)
    first = start + np.arange(count) * width
    tokens, phases = tokens_at(trace, first)
    columns = [
        {"first_ns": at, "last_ns": at + width - 1, "token": token, "phase": name}
        for at, token, name in zip(first.tolist(), tokens, phases, strict=True)
    ]
    return columns, files.bins(trace.tensors), matrix, unplaced
