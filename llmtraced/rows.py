"""Ring records → rows of the trace's tables: whole batches, no Python for a single record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmtraced.resolve import Resolver
from llmtraced.schema import CAUSES, EVENT, PAGE, PHASES, TABLES, Kind, Outcome, Phase

__all__ = ["RowMaker", "TokenBook", "as_prompts", "join", "pick"]

_FILE_SHIFT: Final = np.uint64(48)
_INDEX: Final = np.uint64((1 << 48) - 1)
_LOW32: Final = np.uint64(0xFFFFFFFF)
_NONE: Final = np.uint64(2**64 - 1)
_PAGE: Final = np.uint64(PAGE)
_ACTIONS: Final = ("add", "evict")

Events = NDArray[Any]


def pick(events: Events, index: NDArray[Any]) -> Events:
    """Return ``events[index]``, for positions or a mask.

    numpy copies structured elements field by field; the same bytes as opaque ones go five to nine times faster.
    """
    picked: Events = events.view(f"V{EVENT.itemsize}")[index].view(EVENT)
    return picked


def join(batches: Sequence[Events]) -> Events:
    """Return the batches of schema.EVENT as one array, six times faster than numpy joins structured ones."""
    whole = np.concatenate([batch.view(f"V{EVENT.itemsize}") for batch in batches]) if batches else np.empty(0, EVENT)
    joined: Events = whole.view(EVENT)
    return joined


def _dictionary(codes: NDArray[Any], values: list[str] | tuple[str, ...], *, width: Any = np.int8) -> pa.Array:
    """Return dictionary-encoded strings; codes below 0 are null."""
    codes = codes.astype(width, copy=False)
    negative = codes < 0
    indices = pa.array(codes, mask=negative if negative.any() else None)
    return pa.DictionaryArray.from_arrays(indices, pa.array(values, pa.string()))


def _int(values: NDArray[Any], kind: Any = np.int64, mask: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(values.astype(kind, copy=False), mask=mask)


def as_prompts(events: Events, graphs: Collection[int], before: int) -> tuple[Events, int]:
    """Return the records with those of some graphs marked as prompts without tokens: what a projector evaluates.

    Args:
        events: records of any kinds.
        graphs: addresses of such graphs.
        before: the token of the last such graph in earlier records, 0: none.

    Returns:
        The records, copied where they are changed, and what is ``before`` for the next ones.
    """
    begins = events["kind"] == Kind.TOKEN
    theirs = begins & np.isin(events["a"], np.array(list(graphs), np.uint64))
    tokens = np.append(events["token"][theirs], np.uint32(before))
    chosen = np.isin(events["token"], tokens[tokens > 0]) & (events["mark"] & 15 != Phase.LOAD)
    if chosen.any():
        events = events.copy()
        events["mark"][chosen] = events["mark"][chosen] & 0xF0 | Phase.PROMPT
        events["b"][theirs] = 0
    newest = events["token"][begins].max(initial=before)
    return events, int(newest) if int(newest) in tokens else 0


class RowMaker:
    """Makes rows of one process's events.

    Args:
        resolver: of its models.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        # Arrow dictionaries are made once: names of tensors in file order, models, phases, causes.
        self._names = pa.array(resolver.names, pa.string())
        self._labels = resolver.labels

    def _when(self, events: Events) -> dict[str, pa.Array]:
        return {
            "timestamp": _int(events["ts"]),
            "token": _int(events["token"], np.int32),
            "phase": _dictionary(events["mark"] & 15, PHASES),
        }

    def _where(self, piece: NDArray[np.int64]) -> dict[str, pa.Array]:
        r = self._resolver
        tensor = r.tensor[piece]
        outside = tensor < 0
        codes = pa.array(tensor, mask=outside if outside.any() else None)
        return {
            "model": _dictionary(r.model[piece], self._labels),
            "shard": _int(r.shard[piece], np.int16),
            "tensor_name": pa.DictionaryArray.from_arrays(codes, self._names),
            "expert": _int(r.expert[piece], np.int32),
        }

    def faults(self, events: Events) -> pa.Table:
        """Return rows of table ``faults`` for FAULT records, one each, in time order."""
        events = _in_time(events)
        piece = self._resolver.at(events["d"], events["c"])
        unknown = events["code"] == Outcome.UNKNOWN
        untimed = events["b"] == _NONE
        columns = {
            **self._when(events),
            "thread": _int(events["tid"], np.int32),
            "address": _int(events["a"]),
            "offset_bytes": _int(events["c"]),
            **self._where(piece),
            "major": pa.array(events["code"] == Outcome.MAJOR, mask=unknown if unknown.any() else None),
            "latency_ns": _int(events["b"], mask=untimed if untimed.any() else None),
        }
        return _table("faults", columns)

    def pagecache(self, events: Events) -> pa.Table:
        """Return rows of table ``pagecache`` for ADD and EVICT records, cut at the borders of tensors and experts."""
        events, columns = self._stretches(events)
        columns |= {
            "action": _dictionary(events["kind"] - Kind.ADD, _ACTIONS),
            "cause": _dictionary(events["code"], CAUSES),
        }
        return _table("pagecache", columns)

    def reads(self, events: Events) -> pa.Table:
        """Return rows of table ``reads`` for READ records, cut at the borders of tensors and experts."""
        return _table("reads", self._stretches(events)[1])

    def _stretches(self, events: Events) -> tuple[Events, dict[str, pa.Array]]:
        """Return records of page runs, one for each row that they become, and the columns that all such tables have."""
        events = _in_time(events)
        pages = events["b"] & _LOW32
        rows = self._resolver.split(events["a"] >> _FILE_SHIFT, (events["a"] & _INDEX) * _PAGE, pages * _PAGE)
        events = pick(events, rows.source)
        columns = {
            **self._when(events),
            "offset_bytes": _int(rows.offset),
            "bytes": _int(rows.bytes),
            **self._where(rows.piece),
            **_who(events),
        }
        return events, columns

    def ops(
        self, events: Events, routes: Events, weights: dict[int, tuple[int, int]], op_names: dict[int, str]
    ) -> pa.Table:
        """Return rows of table ``ops`` for OP records.

        Args:
            events: of kind OP.
            routes: of kind ROUTE, of the same tokens: they tell how many experts of a merged tensor were used.
            weights: address of a ``ggml_tensor`` → (tensor number, address of its data).
            op_names: by value of ``enum ggml_op``.
        """
        events = _in_time(events)
        known = np.array(sorted(weights), np.uint64)
        facts = np.array([weights[int(a)] for a in known], np.int64).reshape(-1, 2)
        found = np.full(len(events), -1, np.int64)
        for column in ("b", "a"):  # the first source wins: it is the matrix; the second is a norm's or a bias's vector
            at = np.searchsorted(known, events[column]) if len(known) else np.zeros(len(events), np.int64)
            at = np.minimum(at, max(len(known) - 1, 0))
            hit = known[at] == events[column] if len(known) else np.zeros(len(events), bool)
            found = np.where(hit, at, found)
        outside = found < 0
        tensor = np.where(outside, -1, facts[found, 0]) if len(facts) else found
        data = np.where(outside, 0, facts[found, 1]) if len(facts) else found
        r = self._resolver
        model = np.array(r.model_of or [0], np.int32)
        numbers = (events["d"] & _LOW32).astype(np.int64)
        used, codes = np.unique(numbers, return_inverse=True)
        untimed = events["c"] == _NONE
        columns = {
            **self._when(events),
            "model": _dictionary(np.where(outside, -1, model[tensor]), self._labels),
            "tensor_name": pa.DictionaryArray.from_arrays(pa.array(tensor.astype(np.int32), mask=outside), self._names),
            "data_ptr": _int(data, mask=outside),
            "bytes_accessed": self._bytes_accessed(events, np.where(outside, 0, tensor), outside, routes),
            "op": _dictionary(codes, [op_names.get(int(n), f"op_{n}") for n in used], width=np.int32),
            "thread": _int(events["tid"], np.int32),
            "duration_ns": _int(events["c"], mask=untimed if untimed.any() else None),
        }
        return _table("ops", columns)

    def _bytes_accessed(
        self, events: Events, tensor: NDArray[np.int64], outside: NDArray[np.bool_], routes: Events
    ) -> pa.Array:
        """Return the bytes of the weights read: all of a tensor, or of the different experts chosen in that layer."""
        tensors = self._resolver.tensors
        sizes = np.array([t.size for t in tensors] or [0], np.int64)
        each = np.array([t.expert_bytes if t.n_experts else 0 for t in tensors] or [0], np.int64)
        layer = np.array([t.layer for t in tensors] or [0], np.int64)
        size = np.where(outside, 0, sizes[tensor])
        merged = ~outside & (each[tensor] > 0)
        if not merged.any():
            return _int(size)
        experts, counts = _expert_ids(routes)
        layers = np.repeat((routes["a"] >> np.uint64(32)).astype(np.int64), counts)
        tokens = np.repeat(routes["token"].astype(np.int64), counts)
        chosen = np.unique(tokens << 32 | layers << 16 | experts)  # a batch's positions may choose the same expert
        keys, distinct = np.unique(chosen >> 16, return_counts=True)
        wanted = events["token"].astype(np.int64) << 16 | layer[tensor]
        at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        found = keys[at] == wanted if len(keys) else np.zeros(len(events), bool)
        used = np.where(found, distinct[at], 0) if len(keys) else np.zeros(len(events), np.int64)
        unknown = merged & ~found
        return _int(np.where(merged, used * each[tensor], size), mask=unknown if unknown.any() else None)

    def routing(self, events: Events) -> pa.Table:
        """Return rows of table ``routing`` for ROUTE records: one a layer and position, several records joined."""
        events = _in_time(events)
        flat, counts = _expert_ids(events)
        # A choice of more than 12 experts comes as several records with the same time, layer and position.
        same = np.zeros(len(events), bool)
        if len(events) > 1:
            same[1:] = (events["a"][1:] == events["a"][:-1]) & (events["ts"][1:] == events["ts"][:-1])
        first = np.flatnonzero(~same)
        before = np.cumsum(counts) - counts
        offsets = np.append(before[first], counts.sum()).astype(np.int32)
        events = pick(events, first)
        columns = {
            **self._when(events),
            "layer": _int(events["a"] >> np.uint64(32), np.int32),
            "experts": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(np.int32))),
            "position": _int(events["a"] & _LOW32, np.int32),
        }
        return _table("routing", columns)


def _expert_ids(routes: Events) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the experts in ROUTE records, one after the other, and how many each record has."""
    ids = np.stack([routes["b"], routes["c"], routes["d"]], axis=1)
    experts = np.ascontiguousarray(ids).view("<u2").reshape(len(routes), 12)
    counts = routes["code"].astype(np.int64)
    return experts[np.arange(12) < counts[:, None]].astype(np.int64), counts


def _in_time(events: Events) -> Events:
    """Return the events sorted by time; CPUs reserve records slightly out of order."""
    ts = events["ts"]
    if len(ts) < 2 or bool((ts[1:] >= ts[:-1]).all()):
        return events
    return pick(events, np.argsort(ts, kind="stable"))


def _table(name: str, columns: dict[str, pa.Array]) -> pa.Table:
    schema = TABLES[name]
    return pa.table([columns[n].cast(schema.field(n).type) for n in schema.names], schema=schema)


def _who(events: Events) -> dict[str, pa.Array]:
    """Return pid and comm columns. A comm is 16 bytes in two words; a trace sees a handful of different ones."""
    pairs = np.ascontiguousarray(np.stack([events["c"], events["d"]], axis=1)).view("V16").reshape(-1)
    used, codes = np.unique(pairs, return_inverse=True)
    names = [bytes(u).split(b"\0", 1)[0].decode("utf-8", "replace") for u in used]
    return {"pid": _int(events["pid"], np.int32), "comm": _dictionary(codes, names, width=np.int32)}


_TOKEN_ROW: Final = np.dtype(
    [
        ("token", "<i8"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("n_tokens", "<i8"),
        ("n_outputs", "<i8"),
        ("phase", "<i8"),
        ("stall_begin", "<i8"),
        ("stall_end", "<i8"),
        ("fault_ns", "<i8"),
        ("major_faults", "<i8"),
        ("minor_faults", "<i8"),
        ("bytes_read", "<i8"),
        ("graph_nodes", "<i8"),
        ("model", "<i8"),
    ]
)
_SUMMED: Final = ("fault_ns", "major_faults", "minor_faults", "bytes_read")
_UNSET: Final = -1


class TokenBook:
    """Collects the rows of table ``tokens`` from all kinds of records, over several batches.

    A token's row is finished when the next token begins. Times and stall come from the kernel's marks, sums from the
    records (so they are short by what was dropped).

    Args:
        start_ns: when tracing began: token 0 is what happens from then to the first graph.
        phase: of token 0.
    """

    def __init__(self, start_ns: int, phase: int) -> None:
        self._open = np.zeros(1, _TOKEN_ROW)
        for name in _TOKEN_ROW.names or ():
            self._open[name] = 0 if name in _SUMMED else _UNSET
        self._open["token"], self._open["start_ns"], self._open["phase"] = 0, start_ns, phase
        self._labels: list[str] = []

    def add(
        self,
        events: Events,
        batch_sizes: Mapping[int, tuple[int, int, int]],
        models: Mapping[int, int] = MappingProxyType({}),
        labels: Sequence[str] = (),
    ) -> pa.Table:
        """Take records of any kinds and return the rows that they finish.

        Args:
            events: records.
            batch_sizes: token → (n_tokens, n_outputs, n_nodes) where the kernel could not read them yet.
            models: address of a graph → number of the model that it evaluates.
            labels: of the models.
        """
        self._labels = list(labels)
        tokens = np.unique(np.concatenate([self._open["token"], events["token"].astype(np.int64)]))
        rows = np.zeros(len(tokens), _TOKEN_ROW)
        for name in _TOKEN_ROW.names or ():
            rows[name] = 0 if name in _SUMMED else _UNSET
        rows["token"] = tokens
        rows[np.searchsorted(tokens, self._open["token"])] = self._open
        kind = events["kind"]
        at = np.searchsorted(tokens, events["token"].astype(np.int64))

        def total(name: str, chosen: NDArray[np.bool_], amount: NDArray[Any]) -> None:
            sums = np.zeros(len(tokens), np.int64)
            np.add.at(sums, at[chosen], amount.astype(np.int64))
            rows[name] += sums

        fault = kind == Kind.FAULT
        timed = fault & (events["b"] != _NONE)
        total("fault_ns", timed, events["b"][timed])
        for name, outcome in (("major_faults", Outcome.MAJOR), ("minor_faults", Outcome.MINOR)):
            chosen = fault & (events["code"] == outcome)
            total(name, chosen, np.ones(int(chosen.sum()), np.int64))
        added = kind == Kind.ADD
        total("bytes_read", added, (events["b"][added] & _LOW32) * _PAGE)

        begins, ends = np.flatnonzero(kind == Kind.TOKEN), np.flatnonzero(kind == Kind.TOKEN_END)
        row = at[begins]
        rows["start_ns"][row] = events["ts"][begins]
        rows["n_tokens"][row] = events["b"][begins] & _LOW32
        rows["n_outputs"][row] = events["b"][begins] >> np.uint64(32)
        rows["graph_nodes"][row] = events["c"][begins]
        rows["phase"][row] = events["mark"][begins] & 15
        rows["stall_begin"][row] = events["d"][begins]
        known, which = np.unique(events["a"][begins], return_inverse=True)
        rows["model"][row] = np.array([models.get(int(graph), _UNSET) for graph in known], np.int64)[which]
        rows["end_ns"][at[ends]] = events["ts"][ends]
        rows["stall_end"][at[ends]] = events["d"][ends]
        for token, (n_tokens, n_outputs, n_nodes) in batch_sizes.items():
            i = int(np.searchsorted(tokens, token))
            if i < len(tokens) and tokens[i] == token and rows["graph_nodes"][i] == 0:
                rows["n_tokens"][i], rows["n_outputs"][i], rows["graph_nodes"][i] = n_tokens, n_outputs, n_nodes
        newest = int(tokens[row].max()) if len(row) else int(self._open["token"].max())
        finished = tokens < newest
        self._open = rows[~finished]
        return self._rows(rows[finished])

    def close(self, end_ns: int) -> pa.Table:
        """Return the rows that are still open; token 0 ends at ``end_ns``, a token that was cut off has no end."""
        rows = self._open
        if len(rows) == 1 and rows["token"][0] == 0:  # no graph was seen; else token 0 ends where the next begins
            rows["end_ns"] = end_ns
        self._open = rows[:0]
        return self._rows(rows)

    def _rows(self, rows: NDArray[Any]) -> pa.Table:
        if len(rows) and rows["token"][0] == 0 and rows["end_ns"][0] == _UNSET:
            following = rows["start_ns"][1:2] if len(rows) > 1 else self._open["start_ns"][:1]
            rows["end_ns"][0] = following[0] if len(following) else _UNSET
        unread = rows["graph_nodes"] <= 0  # the graph's layout was not known yet
        stalled = (rows["stall_begin"] >= 0) & (rows["stall_end"] >= 0)

        def number(name: str, kind: Any = np.int64) -> pa.Array:
            return _int(rows[name], kind, rows[name] == _UNSET)

        columns = {
            "token": _int(rows["token"], np.int32),
            "start_ns": number("start_ns"),
            "end_ns": number("end_ns"),
            "n_tokens": _int(rows["n_tokens"], np.int32, unread),
            "n_outputs": _int(rows["n_outputs"], np.int32, unread),
            "phase": _dictionary(rows["phase"], PHASES),
            "stall_ns": _int(rows["stall_end"] - rows["stall_begin"], mask=~stalled),
            **{name: _int(rows[name]) for name in _SUMMED},
            "graph_nodes": _int(rows["graph_nodes"], np.int32, unread),
            "model": _dictionary(rows["model"], self._labels),
        }
        return _table("tokens", columns)
