"""A trace as Chrome trace events (JSON), for ui.perfetto.dev, chrome://tracing and speedscope.

Written a few tokens at a time, with strings built by polars, so that memory does not grow with the trace.
The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

import polars as pl

from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.errors import LlmtracedError, printable
from llmtraced.schema import CAUSES

__all__ = ["LIMIT", "trace_events"]

LIMIT: Final = 2_000_000
"""Operators and faults that are written unless more are asked for: about 400 MB of JSON, what viewers still open."""

_ROWS: Final = 250_000  # operators and faults written together
_BINS: Final = 20_000
_TRACKS: Final = {1: "tokens", 2: "layers", 3: "operators", 4: "page faults on the model", 5: "page cache"}
_TOKENS, _LAYERS, _OPS, _FAULTS, _CACHE = _TRACKS


def trace_events(
    trace: Trace, tokens: tuple[int, int] | None = None, limit: int | None = LIMIT, phase: str | None = None
) -> Iterator[bytes]:
    """Return the trace as JSON, in pieces.

    Args:
        trace: an open trace.
        tokens: the first and the last token to write, both included; None: all.
        limit: how many operators and faults may be written; None: any number.
        phase: only what happened in this phase.

    Raises:
        LlmtracedError: there are more than ``limit``. Nothing is left out in silence.
    """
    events = sum(_counts(trace, tokens, phase).values())
    if limit is not None and events > limit:
        raise LlmtracedError(
            f"{events:,} operators and page faults are more than the {limit:,} that viewers open well: choose a range "
            f"of tokens with --token FIRST:LAST, or allow them with --limit {events}"
        )
    return _pieces(trace, tokens, phase)


def _pieces(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> Iterator[bytes]:
    about = {
        "session": trace.session,
        "clock": "CLOCK_MONOTONIC",
        "begins_ns": trace.first_ns or 0,
        "account": verdict(trace.account),
        "notes": list(trace.notes),
    }
    # No displayTimeUnit: Perfetto of 2021 takes "ms" for the unit of ts, which is always microseconds.
    yield f'{{"otherData":{json.dumps(about)},"traceEvents":[\n'.encode()
    yield ",\n".join(_named(trace, tokens, phase)).encode()
    for events in _events(trace, tokens, phase):
        if events.len():
            yield b",\n"
            yield events.str.join(",\n").item().encode()
    yield b"\n]}\n"


def _events(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> Iterator[pl.Series]:
    """Yield every event but the names, as JSON objects."""
    yield _token_events(trace, tokens, phase)
    yield _read_events(trace, tokens, phase)
    counts = pl.Series(list(_counts(trace, tokens, phase).items()), dtype=pl.Array(pl.Int64, 2))
    blocks = pl.DataFrame({"token": counts.arr.first(), "rows": counts.arr.last()}).sort("token")
    blocks = blocks.group_by(pl.col("rows").cum_sum() // _ROWS, maintain_order=True).agg(
        first=pl.col("token").min(), last=pl.col("token").max()
    )
    layers = trace.tensors.lazy().select("model", "tensor_name", "layer").unique(["model", "tensor_name"])
    for first, last in blocks.select("first", "last").iter_rows():
        ops = (
            collect(
                _rows(trace, "ops", (first, last), phase)
                .select("timestamp", "token", "model", "tensor_name", "bytes_accessed", "op", "thread", "duration_ns")
                .with_columns(pl.col("model", "tensor_name", "op").cast(pl.String))
            )
            .lazy()
            .join(layers, on=["model", "tensor_name"], how="left", maintain_order="left")
            .collect()
        )
        yield _op_events(trace, ops)
        yield _layer_events(trace, ops)
        yield _fault_events(trace, collect(_rows(trace, "faults", (first, last), phase)))


def _rows(trace: Trace, table: str, tokens: tuple[int, int] | None, phase: str | None) -> pl.LazyFrame:
    frame = trace.table(table, phase)
    return frame if tokens is None else frame.filter(pl.col("token").is_between(*tokens))


def _counts(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> dict[int, int]:
    """Return how many operators and faults each token has."""
    found = [
        collect(_rows(trace, table, tokens, phase).group_by("token").agg(rows=pl.len().cast(pl.Int64)))
        for table in ("ops", "faults")
    ]
    return dict(pl.concat(found).group_by("token").agg(pl.col("rows").sum()).iter_rows())


def _named(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> Iterator[str]:
    """Yield what the tracks are called."""
    what = f"{trace.meta.get('comm') or 'process'} {trace.meta.get('pid') or ''}, {', '.join(trace.models)}"
    for track, name in _TRACKS.items():
        yield _meta("process_name", track, 0, {"name": f"{name}: {printable(what, 200)}"})
        yield _meta("process_sort_index", track, 0, {"sort_index": track})
    yield _meta("thread_name", _TOKENS, 1, {"name": "tokens"})
    for table, tracks in (("ops", (_LAYERS, _OPS)), ("faults", (_FAULTS,))):
        threads = collect(_rows(trace, table, tokens, phase).select(pl.col("thread").unique()))
        for thread in threads["thread"].drop_nulls().sort():
            for track in tracks:
                yield _meta("thread_name", track, thread, {"name": f"{_TRACKS[track].split()[0]}, thread {thread}"})


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}, separators=(",", ":"))


def _token_events(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> pl.Series:
    rows = collect(_rows(trace, "tokens", tokens, phase).with_columns(pl.col("phase").cast(pl.String)))
    args = ("n_tokens", "stall_ns", "fault_ns", "major_faults", "minor_faults", "bytes_read")
    name = (
        pl.when(pl.col("token") == 0)
        .then(pl.lit("before the first graph"))
        .otherwise(_filled("token {}, {}", pl.col("token"), pl.col("phase")))
    )
    seen = pl.col("end_ns").is_not_null()
    lasts = pl.when(seen).then(pl.col("end_ns") - pl.col("start_ns")).otherwise(0)
    named = name + pl.when(seen).then(pl.lit("")).otherwise(pl.lit(" (its end was not seen)"))
    return _complete(rows, trace, _text(named), "token", pl.col("start_ns"), lasts, _TOKENS, pl.lit(1), args)


def _op_events(trace: Trace, ops: pl.DataFrame) -> pl.Series:
    name = pl.concat_str([pl.col("op"), pl.col("tensor_name")], separator=" ", ignore_nulls=True)
    args = ("token", "tensor_name", "layer", "bytes_accessed")
    return _complete(
        ops, trace, _text(name), "op", pl.col("timestamp"), pl.col("duration_ns"), _OPS, pl.col("thread"), args
    )


def _layer_events(trace: Trace, ops: pl.DataFrame) -> pl.Series:
    """Return one event for the consecutive operators of a thread on weights of one layer."""
    weighted = ops.filter(pl.col("layer").is_not_null()).sort("thread", "timestamp", maintain_order=True)
    ends = pl.col("timestamp") + pl.col("duration_ns").fill_null(0)
    runs = (
        weighted.group_by(pl.struct("thread", "token", "model", "layer").rle_id().alias("run"), maintain_order=True)
        .agg(
            pl.col("thread", "token", "layer", "timestamp").first(),
            ops=pl.len(),
            duration_ns=ends.max() - pl.col("timestamp").first(),
        )
        .with_columns(
            name=pl.when(pl.col("layer") < 0)
            .then(pl.lit("outside the layers"))
            .otherwise(_filled("layer {}", pl.col("layer")))
        )
    )
    return _complete(
        runs,
        trace,
        _text(pl.col("name")),
        "layer",
        pl.col("timestamp"),
        pl.col("duration_ns"),
        _LAYERS,
        pl.col("thread"),
        ("token", "ops"),
    )


def _fault_events(trace: Trace, faults: pl.DataFrame) -> pl.Series:
    rows = faults.with_columns(pl.col("tensor_name").cast(pl.String))
    how = pl.when("major").then(pl.lit("major ")).when(pl.col("major").is_null()).then(pl.lit("unfinished "))
    name = how.otherwise(pl.lit("minor ")) + pl.col("tensor_name").fill_null("outside tensors")
    args = ("token", "tensor_name", "offset_bytes", "expert", "major")
    return _complete(
        rows, trace, _text(name), "fault", pl.col("timestamp"), pl.col("latency_ns"), _FAULTS, pl.col("thread"), args
    )


def _read_events(trace: Trace, tokens: tuple[int, int] | None, phase: str | None) -> pl.Series:
    """Return a counter of the bytes that came into the page cache, by cause, in bins of a millisecond or more."""
    span = (trace.last_ns or 0) - (trace.first_ns or 0)
    width = max(-(-span // _BINS // 1_000_000), 1) * 1_000_000
    at = (pl.col("timestamp") - (trace.first_ns or 0)) // width
    adds = _rows(trace, "pagecache", tokens, phase).filter(pl.col("action") == "add")
    read = collect(adds.group_by(at.alias("bin"), "cause").agg(pl.col("bytes").sum()))
    after = pl.concat([read["bin"], read["bin"] + 1]).unique()  # a counter keeps its value: say where it ends
    sums = [pl.col("bytes").filter(pl.col("cause").cast(pl.String) == cause).sum().alias(cause) for cause in CAUSES]
    counters = (
        pl.DataFrame({"bin": after})
        .join(read.group_by("bin").agg(sums), on="bin", how="left")
        .with_columns(pl.col(CAUSES).fill_null(0))
        .sort("bin")
    )
    name = json.dumps(f"bytes read per {width // 1_000_000} ms, by cause")
    values = ",".join(f'"{cause}":{{}}' for cause in CAUSES)
    text = f'{{"name":{name},"ph":"C","pid":{_CACHE},"tid":0,"ts":{{}},"args":{{{values}}}}}'
    return counters.select(_filled(text, _micros(pl.col("bin") * width), *map(pl.col, CAUSES))).to_series()


def _complete(
    rows: pl.DataFrame,
    trace: Trace,
    name: pl.Expr,
    category: str,
    began: pl.Expr,
    lasted: pl.Expr,
    track: int,
    thread: pl.Expr,
    args: Iterable[str],
) -> pl.Series:
    """Return one complete event a row; ``name`` is JSON already."""
    args = list(args)
    text = (
        f'{{"name":{{}},"cat":"{category}","ph":"X","ts":{{}},"dur":{{}},"pid":{track},"tid":{{}},"args":{{'
        + ",".join(f'"{arg}":{{}}' for arg in args)
        + "}}"
    )
    values = [_text(pl.col(arg)) if rows.schema[arg] == pl.String else _number(arg) for arg in args]
    since = _micros(began - (trace.first_ns or 0))
    rows = rows.with_columns(_lasted(rows, began, lasted, thread))
    return rows.select(_filled(text, name, since, _micros(pl.col("_lasted")), thread.fill_null(0), *values)).to_series()


def _lasted(rows: pl.DataFrame, began: pl.Expr, lasted: pl.Expr, thread: pl.Expr) -> pl.Series:
    """Return the durations, 1 ns shorter where an event ends as the next one of its thread begins.

    Viewers add ``ts`` and ``dur`` as floating-point numbers. Where the sum is a little above the next ``ts``, they
    take the next event to lie within this one, or leave this one open to the end (speedscope 1.25).
    """
    order = ("thread", "began")
    at = rows.select(began.alias("began"), lasted.fill_null(0).alias("_lasted"), thread.fill_null(0).alias("thread"))
    following = pl.col("began").shift(-1).over("thread")
    touches = (pl.col("began") + pl.col("_lasted") == following) & (pl.col("_lasted") > 0)
    sorted_ = at.with_row_index("row").sort(*order, maintain_order=True)
    shorter = sorted_.with_columns(pl.col("_lasted") - touches.fill_null(False).cast(pl.Int64))
    return shorter.sort("row").get_column("_lasted")


def _filled(text: str, *values: pl.Expr) -> pl.Expr:
    """Return ``text`` with ``values`` for its ``{}``; pl.format takes braces in the text differently by version."""
    first, *others = text.split("{}")
    parts = [part for value, other in zip(values, others, strict=True) for part in (value, pl.lit(other))]
    return pl.concat_str([pl.lit(first), *parts])


def _micros(ns: pl.Expr) -> pl.Expr:
    """Return whole ns (0 or more) as µs with three decimals, as text: nothing is lost as it would be in a float."""
    thousandths = (ns % 1000).cast(pl.String).str.zfill(3)
    return pl.concat_str([(ns // 1000).cast(pl.String), pl.lit("."), thousandths])


def _number(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).fill_null("null")


def _text(value: pl.Expr) -> pl.Expr:
    """Return strings as JSON, in ASCII: each different one is encoded once."""
    return value.map_batches(_encoded, return_dtype=pl.String)


def _encoded(values: pl.Series) -> pl.Series:
    different = values.unique()
    return values.replace_strict(different, [json.dumps(value) for value in different], return_dtype=pl.String)
