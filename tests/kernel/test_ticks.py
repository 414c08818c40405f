"""The sidecar's clock on a real engine: each graph, each batch, each weight in the order of the compute graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtraced import ggml_layout
from llmtraced.bench import models
from llmtraced.bench.engine import SyncEngine
from llmtraced.prefetch import launch
from llmtraced.prefetch.clock import BEGIN, END, Tick, TickRing, decoded
from llmtraced.probes import ticks as probes
from llmtraced.probes.ticks import Ticks, open_ticks
from llmtraced.target import Target, find_target

pytestmark = pytest.mark.kernel

PROMPT = list(range(10, 27))  # 17 tokens
N = 7


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncEngine]:
    model = models.write(tmp_path_factory.mktemp("ticks") / "tiny.gguf", models.TINY_DENSE)
    with SyncEngine(model, threads=2, ctx=128, repack=False) as one:
        yield one


@pytest.fixture(scope="module")
def target(engine: SyncEngine) -> Target:
    return find_target(engine.pid)


@pytest.fixture(scope="module", params=["all operators", "matrices"])
def clock(target: Target, request: pytest.FixtureRequest) -> Iterator[Ticks]:
    ticks = open_ticks(target.pid, target.symbols, matrices=request.param == "matrices")
    assert (ticks.operators, ticks.matrices) == (True, request.param == "matrices")
    yield ticks
    ticks.close()


@pytest.fixture(scope="module")
def ring(clock: Ticks) -> TickRing:
    return TickRing(clock.maps["ticks"], clock.maps["clocks"], clock.maps["wakes"], probes.RING_BYTES, probes.MARKS)


@pytest.fixture(scope="module")
def sequence(engine: SyncEngine, target: Target, clock: Ticks, ring: TickRing) -> list[int]:
    """Teach the clock the layout; return the marks of a token in the order of its graph's multiplications."""
    weights = launch.known_weights(target)
    read = ggml_layout.memory_reader(target.pid)
    ring.wait(0)
    engine.generate([5], 1)
    address = next(value for _, _, mark, value, _ in ring.wait(5) if mark == BEGIN)
    layout = ggml_layout.derive(read, address, weights)
    graph = ggml_layout.read_graph(read, address, layout, weights)
    data = dict(graph.weights.values())
    names = graph.sequence([layout.op_mul_mat])
    addresses = sorted({data[name] for name in names})
    clock.set_layout(layout, addresses)
    return [addresses.index(data[name]) for name in names]


def ticks_of(engine: SyncEngine, ring: TickRing, prompt: list[int], n: int) -> list[Tick]:
    """Return the ticks of a generation; they are taken while it runs, as the ring holds some thousand."""
    ring.wait(0)
    engine.generate(prompt, n)
    found = ring.wait(0.2)
    while more := ring.wait(0.1):
        found += more
    return found


def test_without_a_layout_a_graphs_address_is_told(engine: SyncEngine, clock: Ticks, ring: TickRing) -> None:
    found = ticks_of(engine, ring, [5, 6], 2)
    assert [mark for _, _, mark, *_ in found] == [BEGIN, END] * 2
    assert all(value > 1 << 32 for _, _, mark, value, _ in found if mark == BEGIN)


def test_graphs_and_their_batches_are_counted(engine: SyncEngine, ring: TickRing, sequence: list[int]) -> None:
    ring.wake_at({})
    found = ticks_of(engine, ring, PROMPT, N)
    assert [mark for _, _, mark, *_ in found] == [BEGIN, END] * N  # and nothing of operators
    assert [value & 0xFFFFFFFF for _, _, mark, value, _ in found if mark == BEGIN] == [len(PROMPT), *[1] * (N - 1)]
    assert [decoded(value) for _, _, mark, value, _ in found if mark == BEGIN] == [0, *[1] * (N - 1)]
    assert [value for _, _, mark, value, _ in found if mark == END] == [len(sequence)] * N  # weights that were met
    numbers = [token for _, token, mark, *_ in found if mark == BEGIN]
    assert numbers == list(range(numbers[0], numbers[0] + N))
    times = [ts for ts, *_ in found]
    assert times == sorted(times)
    assert ring.lost == 0


def test_each_weight_is_told_in_the_order_of_the_graph(engine: SyncEngine, ring: TickRing, sequence: list[int]) -> None:
    assert len(sequence) == 4 * 7 + 1  # layers of q k v output gate up down, and the output matrix
    ring.wake_at(dict.fromkeys(sequence, 1))
    found = ticks_of(engine, ring, PROMPT, N)
    tokens = sorted({token for _, token, *_ in found})
    assert len(tokens) == N
    for token in tokens:
        marks = [mark for _, t, mark, *_ in found if t == token]
        assert marks == [BEGIN, *sequence, END]
    assert ring.lost == 0


def test_only_the_weights_asked_for_are_told(engine: SyncEngine, ring: TickRing, sequence: list[int]) -> None:
    some = sorted({sequence[0], sequence[9], sequence[-1]})
    ring.wake_at(dict.fromkeys(some, 1))
    found = ticks_of(engine, ring, PROMPT, N)
    assert [mark for _, _, mark, *_ in found] == [BEGIN, *[m for m in sequence if m in some], END] * N


def test_what_has_no_room_is_counted(engine: SyncEngine, ring: TickRing, sequence: list[int]) -> None:
    ring.wake_at(dict.fromkeys(sequence, 1))
    before, room = ring.lost, probes.RING_BYTES // 32
    once = 60
    graphs = (room // (len(sequence) + 2) // once + 1) * once
    ring.wait(0)
    for _ in range(graphs // once):
        engine.generate([5], once)  # nobody reads meanwhile
    found = ring.wait(1)
    lost = ring.lost - before
    assert lost > 0
    assert len(found) + lost == graphs * (len(sequence) + 2)
    ring.wake_at({})


def test_a_clock_that_is_closed_leaves_the_engine_as_it_was(engine: SyncEngine, target: Target) -> None:
    before = engine.generate(PROMPT, N)["tokens"]
    for _ in range(2):
        open_ticks(target.pid, target.symbols).close()
    assert engine.generate(PROMPT, N)["tokens"] == before
    assert Path(f"/proc/{target.pid}").exists()
