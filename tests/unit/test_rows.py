"""Records in, rows out: tables with known answers, and the token book against one that goes event by event."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import NONE, event, events, model, pages, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmtraced.resolve import Resolver
from llmtraced.rows import RowMaker, TokenBook, as_prompts, join, pick
from llmtraced.schema import EVENT, PAGE, TABLES, Cause, Kind, Outcome, Phase

# File 3: header, embd (64..5000), exps (8192..16384, 4 experts of half a page). File 9, a second model: embd alone.
RESOLVER = Resolver(
    {
        "main": model([tensor("embd", 64, 4936), tensor("exps", 8192, 8192, experts=4)]),
        "draft": model([tensor("embd", 0, 100)]),
    },
    {("main", 0): 3, ("draft", 0): 9},
)


@pytest.fixture
def make() -> RowMaker:
    return RowMaker(RESOLVER)


def rows(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[n].to_pylist() for n in names), strict=True))


def test_faults(make: RowMaker) -> None:
    table = make.faults(
        events(
            event(Kind.FAULT, 30, 2, code=Outcome.MINOR, tid=7, a=0x7F0000000040, b=10, c=64, d=3, phase=Phase.PROMPT),
            event(Kind.FAULT, 10, 1, code=Outcome.MAJOR, tid=8, a=0x7F0000002800, b=9000, c=10240, d=3, epoch=3),
            event(Kind.FAULT, 20, 1, code=Outcome.UNKNOWN, tid=9, a=0x7F0000001388, b=NONE, c=5000, d=3),
            event(Kind.FAULT, 40, 2, code=Outcome.MAJOR, tid=9, a=0x7E0000000063, b=NONE, c=99, d=9),
        )
    )
    assert table.schema == TABLES["faults"]
    assert rows(table, "timestamp", "token", "phase", "thread", "address", "offset_bytes") == [
        (10, 1, "decode", 8, 0x7F0000002800, 10240),
        (20, 1, "decode", 9, 0x7F0000001388, 5000),
        (30, 2, "prompt", 7, 0x7F0000000040, 64),
        (40, 2, "decode", 9, 0x7E0000000063, 99),
    ]
    assert rows(table, "model", "shard", "tensor_name", "expert", "major", "latency_ns") == [
        ("main", 0, "exps", 1, True, 9000),
        ("main", 0, None, -1, None, None),
        ("main", 0, "embd", -1, False, 10),
        ("draft", 0, "embd", -1, True, None),
    ]


def test_pagecache_runs_are_cut_at_tensors_and_experts(make: RowMaker) -> None:
    table = make.pagecache(
        events(
            event(Kind.EVICT, 9, 4, code=Cause.OTHER, pid=2, **pages(3, 2, 2, b"kswapd0")),
            event(Kind.ADD, 5, 3, code=Cause.READAHEAD, pid=1, **pages(3, 0, 3)),
            event(Kind.ADD, 6, 3, code=Cause.PREFETCHER, pid=1, **pages(9, 0, 1, b"sixteen bytes ok")),
        )
    )
    assert table.schema == TABLES["pagecache"]
    assert rows(table, "timestamp", "action", "offset_bytes", "bytes", "tensor_name", "expert") == [
        (5, "add", 0, 64, None, -1),
        (5, "add", 64, 4936, "embd", -1),
        (5, "add", 5000, 3192, None, -1),
        (5, "add", 8192, 2048, "exps", 0),
        (5, "add", 10240, 2048, "exps", 1),
        (6, "add", 0, 100, "embd", -1),
        (6, "add", 100, 3996, None, -1),
        (9, "evict", 8192, 2048, "exps", 0),
        (9, "evict", 10240, 2048, "exps", 1),
        (9, "evict", 12288, 2048, "exps", 2),
        (9, "evict", 14336, 2048, "exps", 3),
    ]
    assert rows(table, "cause", "pid", "comm", "model", "token") == [
        *[("readahead", 1, "llama-server", "main", 3)] * 5,
        *[("prefetcher", 1, "sixteen bytes ok", "draft", 3)] * 2,
        *[("other", 2, "kswapd0", "main", 4)] * 4,
    ]


def test_pagecache_whole_runs_within_a_piece(make: RowMaker) -> None:
    """Where nothing is to be cut another path is taken."""
    table = make.pagecache(
        events(event(Kind.ADD, 5, code=Cause.FAULT, **pages(3, 4, 2)), event(Kind.EVICT, 6, **pages(9, 1, 1)))
    )
    assert rows(table, "action", "offset_bytes", "bytes", "tensor_name", "cause", "model") == [
        ("add", 16384, 8192, None, "fault", "main"),
        ("evict", 4096, 4096, None, "fault", "draft"),
    ]


def test_reads(make: RowMaker) -> None:
    table = make.reads(events(event(Kind.READ, 5, 1, code=Cause.READ, pid=4, **pages(3, 2, 1, b"dd"))))
    assert table.schema == TABLES["reads"]
    assert rows(
        table, "timestamp", "token", "offset_bytes", "bytes", "tensor_name", "expert", "pid", "comm", "model"
    ) == [
        (5, 1, 8192, 2048, "exps", 0, 4, "dd", "main"),
        (5, 1, 10240, 2048, "exps", 1, 4, "dd", "main"),
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=16), min_size=1, max_size=6))
def test_any_comm_is_text(comms: list[bytes]) -> None:
    table = RowMaker(RESOLVER).reads(events(*(event(Kind.READ, **pages(9, 1, 1, c)) for c in comms)))
    assert table["comm"].to_pylist() == [c.split(b"\0")[0].decode("utf-8", "replace") for c in comms]


def test_ops(make: RowMaker) -> None:
    weights = {0x1000: (1, 0x7F00), 0x2000: (0, 0x7E00), 0x3000: (2, 0x7D00)}

    def op(ts: int, a: int, b: int, c: int, number: int) -> dict[str, Any]:
        return event(Kind.OP, ts, 1, tid=5, a=a, b=b, c=c, d=number | 512 << 32)

    table = make.ops(
        events(
            op(2, 0x1000, 0x2000, 50, 29),  # both are weights: the matrix comes first
            op(1, 0x1001, 0x2000, NONE, 29),  # only the second is known
            op(3, 0x3000, 0, 5, 30),
            op(4, 0x4000, 0x5000, 6, 7),  # neither
        ),
        events(),
        weights,
        {29: "MUL_MAT", 30: "MUL_MAT_ID"},
    )
    assert table.schema == TABLES["ops"]
    assert rows(table, "timestamp", "model", "tensor_name", "data_ptr", "op", "thread", "duration_ns") == [
        (1, "main", "embd", 0x7E00, "MUL_MAT", 5, None),
        (2, "main", "exps", 0x7F00, "MUL_MAT", 5, 50),
        (3, "draft", "embd", 0x7D00, "MUL_MAT_ID", 5, 5),
        (4, None, None, None, "op_7", 5, 6),
    ]
    assert table["bytes_accessed"].to_pylist()[0] == 4936
    assert table["bytes_accessed"].to_pylist()[3] == 0
    unknown = make.ops(events(op(1, 0x1000, 0, 5, 29)), events(), {}, {})
    assert rows(unknown, "model", "tensor_name", "data_ptr", "bytes_accessed", "op") == [(None, None, None, 0, "op_29")]


def test_bytes_of_merged_tensors_are_those_of_the_experts_chosen() -> None:
    layer = 2
    plain, exps = tensor("embd", 64, 4936), tensor("exps", 8192, 8192, experts=4)
    make = RowMaker(Resolver({"moe": model([plain, dataclasses.replace(exps, layer=layer)])}, {("moe", 0): 1}))
    merged = event(Kind.OP, 50, 7, a=0x1000, d=30)
    choices = [*route(40, layer, 0, [0, 2], token=7), *route(40, layer, 1, [2, 3], token=7)]
    elsewhere = [*route(41, layer + 1, 0, [1], token=7), *route(41, layer, 0, [1], token=8)]
    weights = {0x1000: (1, 0x7F00)}
    table = make.ops(events(merged), events(*choices, *elsewhere), weights, {})
    assert table["bytes_accessed"].to_pylist() == [3 * 2048], "experts 0, 2 and 3; 2 counts once"
    assert make.ops(events(merged), events(*elsewhere), weights, {})["bytes_accessed"].to_pylist() == [None]


def route(ts: int, layer: int, position: int, ids: list[int], **fields: Any) -> list[dict[str, Any]]:
    """Return the records of one choice, as bpf/ggml.bpf.c writes them: 12 ids a record."""
    found = []
    for i in range(0, len(ids), 12):
        packed = np.zeros(12, "<u2")
        packed[: len(ids[i : i + 12])] = ids[i : i + 12]
        b, c, d = (int(w) for w in packed.view("<u8"))
        found.append(
            event(Kind.ROUTE, ts, code=len(ids[i : i + 12]), a=position | layer << 32, b=b, c=c, d=d, **fields)
        )
    return found


def test_routing(make: RowMaker) -> None:
    many = [300 - i for i in range(30)]  # three records
    records = [
        *route(10, 0, 0, [3, 1], token=1),
        *route(10, 0, 1, [2, 7], token=1),  # same time, next position
        *route(12, 1, 0, many, token=1),
        *route(12, 2, 0, many[:12], token=1),
        *route(15, 0, 0, [3, 1], token=2, phase=Phase.PROMPT),
        *route(16, 0, 0, [3, 1], token=3),  # the same choice, later
    ]
    table = make.routing(events(*records))
    assert table.schema == TABLES["routing"]
    assert rows(table, "timestamp", "token", "phase", "layer", "position", "experts") == [
        (10, 1, "decode", 0, 0, [3, 1]),
        (10, 1, "decode", 0, 1, [2, 7]),
        (12, 1, "decode", 1, 0, many),
        (12, 1, "decode", 2, 0, many[:12]),
        (15, 2, "prompt", 0, 0, [3, 1]),
        (16, 3, "decode", 0, 0, [3, 1]),
    ]


@pytest.mark.parametrize("name", ["faults", "pagecache", "reads", "ops", "routing"])
def test_nothing_gives_an_empty_table_with_the_schema(make: RowMaker, name: str) -> None:
    none = np.empty(0, EVENT)
    table = make.ops(none, none[:0], {1: (0, 0)}, {}) if name == "ops" else getattr(make, name)(none)
    assert table.num_rows == 0
    assert table.schema == TABLES[name]
    bare = RowMaker(Resolver({}, {}))
    table = bare.ops(none, none[:0], {}, {}) if name == "ops" else getattr(bare, name)(none)
    assert table.schema == TABLES[name]


@pytest.mark.parametrize("name", ["faults", "pagecache", "reads", "ops", "routing"])
def test_rows_are_in_time_order_and_equal_times_keep_theirs(make: RowMaker, name: str) -> None:
    kind = {"faults": Kind.FAULT, "pagecache": Kind.ADD, "reads": Kind.READ, "ops": Kind.OP, "routing": Kind.ROUTE}[
        name
    ]
    other = {"c": 0, "d": 9} if name == "faults" else {} if name in ("ops", "routing") else pages(9, 1, 1)
    times = [5, 3, 9, 3, 3, 1, 9, 0] * 25
    batch = events(*(event(kind, ts, token=i, code=0, **other) for i, ts in enumerate(times)))
    if name == "routing":
        batch["a"] = np.arange(len(batch))  # as many positions
    table = make.ops(batch, batch[:0], {}, {}) if name == "ops" else getattr(make, name)(batch)
    order = sorted(range(len(times)), key=lambda i: times[i])
    assert rows(table, "timestamp", "token") == [(times[i], i) for i in order]


def test_pick_and_join_are_numpy_s_own() -> None:
    array = np.frombuffer(np.random.default_rng(1).bytes(20 * EVENT.itemsize), EVENT)
    index = np.array([3, 3, 0, 19])
    assert pick(array, index).tobytes() == array[index].tobytes()
    mask = array["kind"] > 100
    assert pick(array, mask).tobytes() == array[mask].tobytes()
    assert join([array[:7], array[7:7], array[7:]]).tobytes() == array.tobytes()
    assert join([]).dtype == EVENT
    assert len(join([])) == 0
    assert join([array])["ts"].tolist() == array["ts"].tolist()


# --- the token book -----------------------------------------------------------------------------------------------

Row = dict[str, Any]
_FIELDS = TABLES["tokens"].names


def reference(batches: list[NDArray[Any]], sizes: dict[int, tuple[int, int, int]], start: int, end: int) -> list[Row]:
    """Return the table ``tokens``, event by event, with every record at hand."""
    empty: Row = dict.fromkeys(_FIELDS) | dict.fromkeys(("fault_ns", "major_faults", "minor_faults", "bytes_read"), 0)
    found: dict[int, Row] = {0: {**empty, "token": 0, "start_ns": start, "phase": "unknown"}}
    stalls: dict[int, list[int | None]] = {}
    for e in (e for batch in batches for e in batch):
        token = int(e["token"])
        row = found.setdefault(token, {**empty, "token": token})
        stall = stalls.setdefault(token, [None, None])
        b, kind = int(e["b"]), int(e["kind"])
        if kind == Kind.TOKEN:
            row["start_ns"], row["n_tokens"], row["n_outputs"] = int(e["ts"]), b & 0xFFFFFFFF, b >> 32
            row["graph_nodes"], row["phase"] = int(e["c"]), Phase(int(e["mark"]) & 15).name.lower()
            stall[0] = int(e["d"])
            if not row["graph_nodes"]:  # the layout was not known: there is nothing, or what was found afterwards
                row["n_tokens"], row["n_outputs"], row["graph_nodes"] = sizes.get(token, (None, None, None))
        elif kind == Kind.TOKEN_END:
            row["end_ns"], stall[1] = int(e["ts"]), int(e["d"])
        elif kind == Kind.FAULT:
            row["fault_ns"] += 0 if b == NONE else b
            row["major_faults"] += int(e["code"] == Outcome.MAJOR)
            row["minor_faults"] += int(e["code"] == Outcome.MINOR)
        elif kind == Kind.ADD:
            row["bytes_read"] += (b & 0xFFFFFFFF) * PAGE
    for token, (begin, finish) in stalls.items():
        if begin is not None and finish is not None:
            found[token]["stall_ns"] = finish - begin
    ordered = [found[t] for t in sorted(found)]
    ordered[0]["end_ns"] = ordered[1]["start_ns"] if len(ordered) > 1 else end
    return ordered


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[NDArray[Any]], dict[int, tuple[int, int, int]]]:
    """Draw records in batches: in the order of tokens, marks lost here and there, shuffled within a batch."""
    records: list[dict[str, Any]] = []
    clock, stall = 1000, 0
    sizes: dict[int, tuple[int, int, int]] = {}
    for token in range(draw(st.integers(0, 5)) + 1):
        clock += 100
        if token and draw(st.integers(0, 9)):
            nodes = draw(st.sampled_from([0, 700]))
            batch = draw(st.integers(0, 600)) | draw(st.integers(0, 9)) << 32
            phase = draw(st.sampled_from(list(Phase)))
            records.append(event(Kind.TOKEN, clock, token, a=1, b=batch, c=nodes, d=stall, phase=phase))
            if draw(st.booleans()):
                sizes[token] = 512, 1, 705
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from([Kind.FAULT, Kind.ADD, Kind.EVICT, Kind.READ, Kind.OP, Kind.ROUTE]))
            b = draw(st.sampled_from([0, 1, 12345, NONE])) if kind == Kind.FAULT else draw(st.integers(1, 99)) | 9 << 32
            code = draw(st.sampled_from(list(Outcome)))
            records.append(event(kind, clock + 1, token, code=code, b=b))
        stall += draw(st.integers(0, 50))
        if token and draw(st.integers(0, 9)):
            records.append(event(Kind.TOKEN_END, clock + 50, token, b=50, d=stall))
    cuts = sorted(draw(st.lists(st.integers(0, len(records)), max_size=4)))
    batches = []
    for start, end in zip([0, *cuts], [*cuts, len(records)], strict=True):
        batches.append(events(*draw(st.permutations(records[start:end]))))
    return batches, sizes


@settings(max_examples=150, deadline=None)
@given(streams())
def test_token_book_over_any_batches(drawn: tuple[list[NDArray[Any]], dict[int, tuple[int, int, int]]]) -> None:
    batches, sizes = drawn
    book = TokenBook(500, Phase.UNKNOWN)
    tables = [book.add(batch, sizes) for batch in batches]
    tables.append(book.close(99_999))
    assert all(t.schema == TABLES["tokens"] for t in tables)
    assert pa.concat_tables(tables).to_pylist() == reference(batches, sizes, 500, 99_999)


def mark(token: int, ts: int, n: int = 1, stall: int = 0, nodes: int = 700) -> dict[str, Any]:
    return event(Kind.TOKEN, ts, token, b=n | n << 32, c=nodes, d=stall)


def end(token: int, ts: int, stall: int = 0) -> dict[str, Any]:
    return event(Kind.TOKEN_END, ts, token, d=stall)


def test_a_token_is_finished_when_the_next_begins() -> None:
    book = TokenBook(100, Phase.LOAD)
    fault = event(Kind.FAULT, 250, 1, code=Outcome.MAJOR, b=40)
    first = book.add(events(mark(1, 200, stall=7), fault), {})
    assert rows(first, "token", "start_ns", "end_ns", "phase", "stall_ns", "n_tokens") == [
        (0, 100, 200, "load", None, None)
    ]
    assert book.add(events(fault, end(1, 300, stall=57)), {}).num_rows == 0, "its records may still come"
    second = book.add(events(mark(2, 400)), {})
    assert rows(second, "token", "start_ns", "end_ns", "stall_ns", "fault_ns", "major_faults", "phase") == [
        (1, 200, 300, 50, 80, 2, "decode")
    ]
    assert book.add(np.empty(0, EVENT), {}).num_rows == 0


def test_a_graph_is_of_the_model_that_its_address_stands_for() -> None:
    book = TokenBook(100, Phase.LOAD)
    batch = events(*(mark(n, 100 * n + 100) | {"a": graph} for n, graph in enumerate((0x10, 0x20, 0x10, 0x30), 1)))
    table = pa.concat_tables([book.add(batch, {}, {0x10: 1, 0x20: 0}, ["draft", "main"]), book.close(900)])
    assert rows(table, "token", "model") == [(0, None), (1, "main"), (2, "draft"), (3, "main"), (4, None)]


def test_a_projectors_graph_is_a_prompt_without_tokens() -> None:
    """Its rows are patches; and it may go on in the next batch of records."""
    decode, load = int(Phase.DECODE), int(Phase.LOAD)
    first = events(
        *(mark(n, n * 10, n=5) | {"a": graph, "mark": phase} for n, graph, phase in ((1, 7, load), (2, 8, decode))),
        mark(3, 30, n=5) | {"a": 7, "mark": 3 << 4 | decode},
        event(Kind.FAULT, 35, 3) | {"mark": 3 << 4 | decode},
    )
    untouched = first.copy()
    done, last = as_prompts(first, [7], 0)
    assert (first == untouched).all()
    assert last == 3
    assert (done["mark"] & 15).tolist() == [load, decode, Phase.PROMPT, Phase.PROMPT]
    assert (done["mark"] >> 4).tolist() == [0, 0, 3, 3]
    assert (done["b"][:3] & 0xFFFFFFFF).tolist() == [0, 5, 0]
    later = events(event(Kind.FAULT, 38, 3) | {"mark": decode}, mark(4, 40) | {"a": 8, "mark": decode})
    done, last = as_prompts(later, [7], last)
    assert (done["mark"] & 15).tolist() == [Phase.PROMPT, decode]
    assert last == 0


def test_the_sizes_that_the_kernel_could_not_read() -> None:
    book = TokenBook(100, Phase.LOAD)
    batch = events(mark(1, 200, n=0, nodes=0), mark(2, 300, n=5), mark(3, 400, n=0, nodes=0))
    table = book.add(batch, {1: (512, 1, 705), 2: (9, 9, 9), 77: (1, 1, 1)})
    assert rows(table, "token", "n_tokens", "n_outputs", "graph_nodes") == [
        (0, None, None, None),
        (1, 512, 1, 705),
        (2, 5, 5, 700),
    ]
    assert rows(book.close(900), "token", "n_tokens", "graph_nodes") == [(3, None, None)]


def test_what_is_open_at_the_end() -> None:
    alone = TokenBook(100, Phase.UNKNOWN)
    alone.add(events(event(Kind.ADD, 150, 0, b=2)), {})
    assert rows(alone.close(900), "token", "start_ns", "end_ns", "bytes_read") == [(0, 100, 900, 2 * PAGE)]
    cut_off = TokenBook(100, Phase.UNKNOWN)
    cut_off.add(events(mark(1, 200)), {})
    assert rows(cut_off.close(900), "token", "start_ns", "end_ns", "stall_ns") == [(1, 200, None, None)]


def test_token_0_has_no_end_where_the_first_mark_was_lost() -> None:
    """However the records came: the end of the recording would be far too late."""
    stray = event(Kind.ADD, 150, 1, b=2)
    for batches in ([[stray]], [[stray], [stray]], [[stray], []]):
        book = TokenBook(100, Phase.UNKNOWN)
        tables = [book.add(events(*batch), {}) for batch in batches] + [book.close(900)]
        assert rows(pa.concat_tables(tables), "token", "start_ns", "end_ns") == [(0, 100, None), (1, None, None)]
