"""Traces of any length, made up: what a server without enough memory would leave, with totals that are known.

Reports have to be measured on traces of 100 million rows, which would take a server hours to make. What is used, comes
and goes is computed (:mod:`llmtraced.bench.workload`); the product's own writer makes the files, as many as a recording
of that many events has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmtraced import __version__
from llmtraced.bench.workload import (
    DATA_OFFSET,
    N_USED,
    PROMPT_EVERY,
    Cache,
    Ints,
    Layout,
    Router,
    Runs,
    Use,
    lay_out,
    shape_of,
    touched,
    use_of,
)
from llmtraced.gguf_map import Model
from llmtraced.schema import CAUSES, PAGE, PHASES, TABLES, Cause, Phase
from llmtraced.store import TraceWriter

__all__ = ["FILE_ROWS", "write_trace"]

FILE_ROWS: Final = 1 << 17
"""Records that the recorder keeps before it writes its files (recorder._BUFFERED_EVENTS)."""
FAULT_SHARE: Final = 0.55
ADDS_PER_OP: Final = 15 / 13
"""So that of 100 rows 55 are faults, about 30 of the page cache, 13 operators and 2 routing."""
MEMORY_SHARE: Final = 0.5
"""A page goes after this share of the model has been used since its last use."""

_MODEL_NAME: Final = "synthetic.gguf"
_SESSION: Final = "00000000-4711-100.1000"
_BEGIN_NS: Final = 3_600_000_000_000
_GAP_NS: Final = 300_000  # between two graphs
_NS_PER_BYTE: Final = 0.1  # computing
_LOAD_NS_PER_BYTE: Final = 0.6
_BASE: Final = 0x7F3A_4000_0000
_WINDOW: Final = 64 << 10  # a fault maps what follows up to the next such border
_PID: Final = 4711
_COMMS: Final = ("llama-server", "kswapd0")


class _Writer:
    """Turns positions of the access stream into rows, writes them, and keeps the totals."""

    def __init__(self, folder: Path, model: Model, moe: bool, random: np.random.Generator) -> None:
        self.layout = Layout(model)
        self.random = random
        self.model_bytes = model.shards[0].size
        self.trace = TraceWriter(folder, _SESSION, _metadata(model, int(MEMORY_SHARE * self.model_bytes)))
        self.router = Router(self.layout, random) if moe else None
        self.cache = Cache(len(self.layout.size), int(MEMORY_SHARE * self.model_bytes))
        self.names = pa.array([t.name for t in model.tensors])
        self.ops = np.array([t.n_experts > 0 for t in model.tensors], np.int8)
        slow = np.exp(random.normal(math.log(4_000), 1.1, 1 << 16))
        slow[: len(slow) // 20] *= 400  # the major ones
        self.latency = slow.astype(np.int64)
        self.position, self.now, self.token = 0, _BEGIN_NS, 0
        self.sums = {name: np.zeros(len(model.tensors) + 1) for name in _BY_TENSOR}
        self.by_cause = np.zeros(len(CAUSES))
        self.unknown = 0

    @property
    def rows(self) -> int:
        return sum(self.trace.rows.values())

    def tensors(self) -> None:
        tensors = self.layout.tensors
        columns: dict[str, Any] = {
            "model": [_MODEL_NAME] * len(tensors),
            **{name: [getattr(t, field) for t in tensors] for name, field in _TENSOR_FIELDS.items()},
            "backed": [True] * len(tensors),
        }
        schema = TABLES["tensors"]
        arrays = [pa.array(columns[f.name], f.type if f.name != "model" else None) for f in schema]
        self.trace.write("tensors", pa.table(arrays, names=schema.names).cast(schema), "", {})

    def load(self) -> None:
        """Read the whole file once, in its order, before the first graph."""
        pieces = np.roll(np.arange(len(self.layout.size)), 1)  # the header first
        nothing = np.zeros(len(pieces), np.int64)
        self.block(Use(pieces, nothing, nothing, np.zeros((0, 0), np.int32), np.zeros(1, np.int64)), 0, load=True)

    def block(self, use: Use, faults: int | Callable[[int], int], *, load: bool = False) -> None:
        """Write the files of some tokens.

        Args:
            use: what they use.
            faults: how many faults they make; or a function that returns it, given the rows of the other tables.
            load: this is the time before the first graph.
        """
        layout, count = self.layout, len(use.positions)
        size = layout.size[use.piece]
        at = self.position + np.cumsum(size) - size
        end = self.position + int(size.sum())
        begins = np.append(at[np.searchsorted(use.token, np.arange(count))], end)
        added, evicted = self.cache.use(use.piece, at, self.position, end)
        ops = 0 if load else count * int(layout.is_op.sum())
        wanted = len(added[0]) if load else ops * ADDS_PER_OP
        adds, evictions = (Runs(layout, *moved, wanted, self.random) for moved in (added, evicted))
        others = ops + len(use.routing) + len(adds.piece) + len(evictions.piece) + count
        many = faults if isinstance(faults, int) else faults(others)

        piece, within, where = touched(layout, added, (use.piece, at), many, self.random)
        fault_token = np.searchsorted(begins, where, "right") - 1
        drawn = self.random.integers(0, len(self.latency), many, dtype=np.uint16)
        fault_ns = np.bincount(fault_token, self.latency[drawn] * (drawn > 0), count).astype(np.int64)
        speed = _LOAD_NS_PER_BYTE if load else _NS_PER_BYTE
        computing = np.diff(begins) * speed * (1 + 0.1 * self.random.random(count))
        duration = computing.astype(np.int64) + fault_ns // 2  # two threads wait at the same time
        starts = self.now + np.cumsum(duration + _GAP_NS) - (duration + _GAP_NS)
        clock = _Clock(begins, starts, duration, self.token, load)

        bytes_read = self._pagecache(adds, evictions, clock)
        if many:
            self._faults(piece, within, where, drawn, clock)
        outcome = [np.bincount(fault_token[chosen], minlength=count) for chosen in self._outcomes(drawn)]
        if not load:
            self._ops(use, at, clock)
            self._routing(use, starts, clock)
        phases = clock.phase(np.arange(count))
        stall = None if load else fault_ns // 2
        tokens = {
            "token": self.token + np.arange(count),
            "start_ns": starts,
            "end_ns": starts + duration,
            "n_tokens": None if load else use.positions,
            "n_outputs": None if load else np.ones(count),
            "phase": _coded(phases, PHASES),
            "stall_ns": stall,
            "fault_ns": fault_ns,
            "major_faults": outcome[0],
            "minor_faults": outcome[1],
            "bytes_read": bytes_read,
            "graph_nodes": None if load else np.full(count, 31 * layout.layers),
            "model": None if load else _coded(np.zeros(count), (_MODEL_NAME,)),
        }
        self._write("tokens", tokens, count, 2 * count)
        self.position, self.now, self.token = end, int(starts[-1] + duration[-1]) + _GAP_NS, self.token + count

    @staticmethod
    def _outcomes(drawn: NDArray[np.uint16]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which faults are major and which minor; of the others (drawn 0) the end was not seen."""
        return (drawn > 0) & (drawn < (1 << 16) // 20), drawn >= (1 << 16) // 20

    def _pagecache(self, adds: Runs, evictions: Runs, clock: _Clock) -> Ints:
        """Write the page cache's rows; return the bytes added in each token."""
        # What is added comes page by page. Evictions first: a page goes before it comes again.
        came = adds.position + adds.offset - self.layout.start[adds.piece]
        position = np.concatenate([evictions.position, came])
        action = np.repeat([1, 0], [len(evictions.piece), len(came)])
        both = [np.concatenate(pair) for pair in zip(evictions.columns(), adds.columns(), strict=True)]
        order = np.argsort(position, kind="stable")
        position, action, piece, offset, size = (column[order] for column in (position, action, *both))
        tensor = self.layout.tensor[piece]
        token = clock.token(position)
        drawn = self.random.integers(0, 16, len(piece), dtype=np.uint8)
        fault = (action == 0) & (drawn < 1) & (not clock.load)
        kernel = (action == 1) & (drawn < 2)
        cause = np.where(fault, Cause.FAULT, np.where(kernel, Cause.OTHER, Cause.READAHEAD))
        add = action == 0
        self._sum("bytes_read", tensor[add], size[add])
        self._sum("read_count", tensor[add])
        self._sum("evicted_bytes", tensor[~add], size[~add])
        self.by_cause += np.bincount(cause[add], size[add], len(CAUSES))
        columns = {
            **clock.columns(position, token),
            "action": _coded(action, ("add", "evict")),
            "offset_bytes": offset,
            "bytes": size,
            **self._where(piece, tensor),
            "cause": _coded(cause, CAUSES),
            "pid": np.where(kernel, 87, _PID),
            "comm": _coded(kernel.astype(np.int32), _COMMS),
        }
        self._write("pagecache", columns, len(piece), int((size // PAGE).sum()))
        return np.bincount(token[add], size[add], len(clock.starts)).astype(np.int64)

    def _faults(self, piece: Ints, within: Ints, where: Ints, drawn: NDArray[np.uint16], clock: _Clock) -> None:
        start = self.layout.start[piece]
        byte = start + within
        border = byte // _WINDOW * _WINDOW
        offset = np.where(drawn % 3 > 0, np.maximum(border, start), byte)
        tensor = self.layout.tensor[piece]
        major, minor = self._outcomes(drawn)
        unknown = drawn == 0
        latency = self.latency[drawn]
        for name, chosen in (("major_faults", major), ("minor_faults", minor)):
            self._sum(name, tensor[chosen])
        self._sum("stall_ns", tensor[~unknown], latency[~unknown])
        self._sum("access_count", tensor)
        self.unknown += int(unknown.sum())
        columns = {
            **clock.columns(where, clock.token(where)),
            "thread": _PID + 7 * (drawn & 1).astype(np.int32),
            "address": _BASE + offset,
            "offset_bytes": offset,
            **self._where(piece, tensor),
            "major": pa.array(major, mask=unknown),
            "latency_ns": pa.array(latency, mask=unknown),
        }
        self._write("faults", columns, len(where), len(where))

    def _ops(self, use: Use, at: Ints, clock: _Clock) -> None:
        layout = self.layout
        key = use.token * len(layout.steps) + use.step
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
        used = np.diff(np.append(starts, len(key)))
        step = use.step[starts]
        chosen = layout.is_op[step]
        starts, used, step = starts[chosen], used[chosen], step[chosen]
        tensor = layout.steps[step]
        token = use.token[starts]
        size = layout.size[use.piece[starts]] * used
        begin = clock.time(at[starts], token)
        ended = clock.time(at[starts] + size, token)
        self._sum("access_count", tensor)
        columns = {
            **clock.columns(at[starts], token),
            "timestamp": begin,
            "model": _coded(np.zeros(len(step)), (_MODEL_NAME,)),
            "tensor_name": self._named(tensor),
            "data_ptr": _BASE + layout.start[layout.first[tensor]],
            "bytes_accessed": size,
            "op": _coded(self.ops[tensor].astype(np.int32), ("mul_mat", "mul_mat_id")),
            "thread": np.full(len(step), _PID),
            "duration_ns": ended - begin,
        }
        self._write("ops", columns, len(step), len(step))

    def _routing(self, use: Use, starts: Ints, clock: _Clock) -> None:
        layers, rows = self.layout.layers, len(use.routing)
        if not rows:
            return
        token = np.repeat(np.arange(len(use.positions)), use.positions)
        position = np.arange(len(token)) - np.repeat(np.cumsum(use.positions) - use.positions, use.positions)
        # In time order: all positions of a layer are chosen together. Sorted by token, layer, position.
        token, position = np.repeat(token, layers), np.repeat(position, layers)
        layer = np.tile(np.arange(layers), rows // layers)
        order = np.lexsort((position, layer, token))
        token, position, layer = token[order], position[order], layer[order]
        share = clock.duration[token] * layer // layers
        columns = {
            "timestamp": starts[token] + share,
            "token": clock.first + token,
            "phase": _coded(clock.phase(token), PHASES),
            "layer": layer,
            "experts": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1, dtype=np.int32) * N_USED), pa.array(use.routing[order].ravel())
            ),
            "position": position,
        }
        self._write("routing", columns, rows, rows)

    def _named(self, tensor: Ints) -> pa.DictionaryArray:
        outside = tensor >= len(self.names)
        codes = pa.array(tensor.astype(np.int32), mask=outside if outside.any() else None)
        return pa.DictionaryArray.from_arrays(codes, self.names)

    def _where(self, piece: Ints, tensor: Ints) -> dict[str, Any]:
        zeros = np.zeros(len(piece))
        return {
            "model": _coded(zeros, (_MODEL_NAME,)),
            "shard": zeros,
            "tensor_name": self._named(tensor),
            "expert": self.layout.expert[piece],
        }

    def _sum(self, name: str, tensor: Ints, amount: Ints | None = None) -> None:
        self.sums[name] += np.bincount(tensor, amount, len(self.sums[name]))  # float64: exact below 2^53

    def _write(self, name: str, columns: Mapping[str, Any], rows: int, counted: int) -> None:
        schema = TABLES[name]
        arrays = []
        for field in schema:
            column = columns[field.name]
            if column is None:
                column = pa.nulls(rows, field.type)
            elif isinstance(column, np.ndarray):
                column = pa.array(column.astype(field.type.to_pandas_dtype(), copy=False))
            arrays.append(column)
        account = {name: {"counted": counted, "delivered": counted, "dropped": 0}}
        self.trace.write(name, pa.table(arrays, schema=schema), name, account)

    def totals(self) -> dict[str, Any]:
        """Return what is known about the trace; see :func:`write_trace`."""
        sums = {name: values.astype(np.int64) for name, values in self.sums.items()}
        sizes = [t.size for t in self.layout.tensors]
        return {
            "rows": dict(self.trace.rows),
            "disk_bytes": dict(self.trace.bytes),
            "tokens": self.token - 1 if self.token else 0,
            "total_bytes_read": int(sums["bytes_read"].sum()),
            "unique_bytes": sum(sizes) + DATA_OFFSET if self.token else 0,
            "evicted_bytes": int(sums["evicted_bytes"].sum()),
            "bytes_by_cause": {c: int(n) for c, n in zip(CAUSES, self.by_cause, strict=True) if n},
            "faults": {
                "major": int(sums["major_faults"].sum()),
                "minor": int(sums["minor_faults"].sum()),
                "unknown": self.unknown,
                "stall_ns": int(sums["stall_ns"].sum()),
            },
            "tensors": {
                str(name): {"unique_bytes": sizes[i] if self.token else 0, **{k: int(v[i]) for k, v in sums.items()}}
                for i, name in enumerate(self.names.to_pylist())
            },
        }


_BY_TENSOR: Final = (
    "bytes_read",
    "read_count",
    "evicted_bytes",
    "access_count",
    "major_faults",
    "minor_faults",
    "stall_ns",
)
_TENSOR_FIELDS: Final = {
    "tensor_name": "name",
    "offset_bytes": "offset",
    "size_bytes": "size",
    **{name: name for name in ("type", "layer", "component", "shard", "n_experts", "expert_bytes")},
}


class _Clock:
    """When a position of the access stream is used, in which token, and in which phase."""

    def __init__(self, begins: Ints, starts: Ints, duration: Ints, first: int, load: bool) -> None:
        self.begins, self.starts, self.duration, self.first, self.load = begins, starts, duration, first, load
        self._pace = duration / np.maximum(np.diff(begins), 1)

    def token(self, position: Ints) -> Ints:
        return np.clip(np.searchsorted(self.begins, position, "right") - 1, 0, len(self.starts) - 1)

    def time(self, position: Ints, token: Ints) -> Ints:
        return self.starts[token] + ((position - self.begins[token]) * self._pace[token]).astype(np.int64)

    def phase(self, token: Ints) -> NDArray[np.int8]:
        if self.load:
            return np.full(len(token), Phase.LOAD, np.int8)
        prompt = (self.first + token - 1) % PROMPT_EVERY == 0
        return np.where(prompt, Phase.PROMPT, Phase.DECODE).astype(np.int8)

    def columns(self, position: Ints, token: Ints) -> dict[str, Any]:
        return {
            "timestamp": self.time(position, token),
            "token": self.first + token,
            "phase": _coded(self.phase(token), PHASES),
        }


def _coded(codes: NDArray[Any], names: tuple[str, ...]) -> pa.DictionaryArray:
    """Return an Arrow dictionary array; int32 codes stay, all others become int8 (as schema.TABLES has them)."""
    kept = codes if codes.dtype == np.int32 else codes.astype(np.int8)
    return pa.DictionaryArray.from_arrays(pa.array(kept), pa.array(names))


def _metadata(model: Model, limit: int) -> dict[str, Any]:
    return {
        "tool_version": __version__,
        "boot_id": "00000000-0000-0000-0000-000000000000",
        "kernel": os.uname().release,
        "clock": "CLOCK_MONOTONIC",
        "realtime_offset_ns": 1_700_000_000_000_000_000,
        "pid": _PID,
        "comm": _COMMS[0],
        "command": ["llama-server", "-m", _MODEL_NAME],
        "cgroup_limit_bytes": limit,
        "detail": "ops",
        "models": [
            {
                "model": _MODEL_NAME,
                "path": f"/models/{_MODEL_NAME}",
                "fingerprint": model.fingerprint,
                "size_bytes": model.shards[0].size,
            }
        ],
    }


def write_trace(
    folder: Path,
    rows: int,
    *,
    n_tensors: int = 1000,
    model_bytes: int = 4_000_000_000,
    moe: bool = True,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a trace of about ``rows`` rows (all tables together) and return what is known about it.

    A model that is loaded and then decodes, with a prompt of 8 text tokens every 512 graphs, and memory for about half
    of it: a dense model is read again for every token, of a mixture of experts the experts that were not used of late.
    More tensors make fewer, longer tokens. A page is added only when it is not there and evicted only when it is; runs
    are cut at random pages, so that ranges seldom repeat exactly, as in recordings.

    Args:
        folder: the trace; must not hold one.
        rows: 0: only the tensor map. Below what loading and one token take (some thousands, with the default model
            22,000) there are more than that.
        n_tensors: of the model, at least (up to 9 more).
        model_bytes: its size, about.
        moe: 64 experts, 4 used, instead of a dense model.
        seed: the same one gives the same trace.
        progress: called with the rows written so far, every second or so.

    Returns:
        ``rows`` and ``disk_bytes`` by table, ``tokens`` (graphs), ``total_bytes_read``, ``unique_bytes``,
        ``evicted_bytes``, ``bytes_by_cause``, ``faults`` (major, minor, unknown, stall_ns) and ``tensors``: by name
        ``unique_bytes``, ``bytes_read``, ``read_count``, ``evicted_bytes``, ``access_count``, ``major_faults``,
        ``minor_faults``, ``stall_ns``; the names are those of the reports.
    """
    model = lay_out(shape_of(n_tensors, model_bytes, moe))
    writer = _Writer(folder, model, moe, np.random.Generator(np.random.SFC64(seed)))
    writer.tensors()
    if rows <= 0:
        return writer.totals()
    writer.load()
    most = (1 - FAULT_SHARE) * rows
    # Rows of a token besides its faults: what is aimed at, until it is known.
    per_token = float(writer.layout.is_op.sum() * (1 + 2 * ADDS_PER_OP) + writer.layout.layers)
    while True:
        others = writer.rows - writer.trace.rows["faults"]
        left = max(most - others, 1) * (1 if writer.token > 1 else 0.25)
        count = int(min(FILE_ROWS * (1 - FAULT_SHARE), left) / per_token) or 1
        graphs = writer.token - 1

        def faults(more: int, before: int = others) -> int:
            reached = before + more
            wanted = rows - reached if reached >= most else reached * FAULT_SHARE / (1 - FAULT_SHARE)
            return max(0, round(wanted) - writer.trace.rows["faults"])

        writer.block(use_of(writer.layout, writer.router, writer.token, count), faults)
        if progress is not None:
            progress(writer.rows)
        others = writer.rows - writer.trace.rows["faults"]
        per_token = (others - writer.trace.rows["tensors"]) / (graphs + count)
        if others >= most:
            return writer.totals()
