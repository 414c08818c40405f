"""What is pinned and what is streamed, and when: decisions without system calls."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtraced.prefetch.policy import ABSENT, HELD, READING, READY, Chunk, Stream, divide, lay_out

C = 100  # bytes of a chunk


def key(chunk: Chunk) -> tuple[int, int]:
    return chunk.file, chunk.number


def numbers(chunks: list[Chunk]) -> list[int]:
    return [c.number for c in chunks]


def flat(count: int, start: int = 0) -> list[Chunk]:
    """Return chunks that are used one after the other from step ``start`` on, each in one step."""
    return [Chunk(0, n, C, start + n, start + n) for n in range(count)]


# --- lay_out


def test_a_tensor_covers_each_chunk_it_touches() -> None:
    chunks = lay_out([(0, 0, 150, 200)], [1000], C)
    assert [(c.number, c.nbytes, c.first, c.last) for c in chunks] == [(1, C, 0, 0), (2, C, 0, 0), (3, C, 0, 0)]


def test_a_chunk_of_two_tensors_is_held_from_the_first_to_the_last() -> None:
    chunks = lay_out([(0, 0, 0, 150), (1, 0, 150, 50), (7, 0, 190, 1)], [1000], C)
    assert [(c.number, c.first, c.last) for c in chunks] == [(0, 0, 0), (1, 0, 7)]


def test_the_order_is_that_of_use_not_of_the_file() -> None:
    chunks = lay_out([(0, 0, 500, 100), (1, 1, 0, 100), (2, 0, 0, 100)], [1000, 1000], C)
    assert [key(c) for c in chunks] == [(0, 5), (1, 0), (0, 0)]


def test_the_last_chunk_of_a_file_is_shorter() -> None:
    assert [c.nbytes for c in lay_out([(0, 0, 0, 250)], [250], C)] == [C, C, 50]


def test_a_tensor_that_ends_with_a_chunk_does_not_touch_the_next() -> None:
    assert numbers(lay_out([(0, 0, 100, 100)], [1000], C)) == [1]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2000), st.integers(1, 700)), min_size=1, max_size=30),
    st.integers(1, 300),
)
def test_lay_out_covers_every_byte_once(uses: list[tuple[int, int, int]], chunk: int) -> None:
    sizes = [2700, 2701]
    chunks = lay_out([(step, *use) for step, use in enumerate(uses)], sizes, chunk)
    assert max(Counter(map(key, chunks)).values()) == 1
    touched = {(file, n) for file, at, size in uses for n in range(at // chunk, (at + size - 1) // chunk + 1)}
    assert touched == set(map(key, chunks))
    assert all(c.nbytes == min(chunk, sizes[c.file] - c.number * chunk) for c in chunks)
    for c in chunks:
        steps = [
            step
            for step, (file, offset, size) in enumerate(uses)
            if file == c.file and offset < (c.number + 1) * chunk and offset + size > c.number * chunk
        ]
        assert (c.first, c.last) == (min(steps), max(steps))
    assert [c.first for c in chunks] == sorted(c.first for c in chunks)


# --- divide


def test_all_is_pinned_where_there_is_room() -> None:
    chunks = flat(10)
    assert divide(chunks, 10 * C, 3 * C) == (chunks, [])
    assert divide(chunks, 99 * C, 0) == (chunks, [])


def test_one_byte_less_and_something_is_streamed() -> None:
    pin, stream = divide(flat(10), 10 * C - 1, 3 * C)
    assert len(stream) in (3, 4)  # the window takes its share
    assert len(pin) + len(stream) == 10


@pytest.mark.parametrize("budget", range(0, 41 * C, 137))
@pytest.mark.parametrize("window", [0, 2 * C, 7 * C])
def test_each_budget_is_kept_and_used(budget: int, window: int) -> None:
    pin, stream = divide(flat(40), budget, window)
    assert numbers(sorted([*pin, *stream], key=lambda c: c.number)) == list(range(40))
    if stream:
        pinned = sum(c.nbytes for c in pin)
        assert pinned <= max(budget - window, 0) + C / 2
        assert pinned >= budget - window - C


@pytest.mark.parametrize("pinned", [4, 10, 20, 30, 36])
def test_each_layer_streams_the_same_share(pinned: int) -> None:
    _, stream = divide(flat(40), pinned * C, 0)
    assert len(stream) == 40 - pinned
    per_layer = Counter(n // 10 for n in numbers(stream))
    assert max(per_layer.values()) - min(per_layer[n] for n in range(4)) <= 1
    gaps = [b - a for a, b in zip(numbers(stream), numbers(stream)[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1  # every n-th: the disk works evenly


def test_what_is_held_for_long_is_pinned_first() -> None:
    long = Chunk(0, 99, C, 0, 39)  # a tied matrix: the first and the last thing a token uses
    chunks = sorted([*flat(40), long], key=lambda c: (c.first, c.last))
    for budget in range(C, 41 * C, C // 2):
        pin, stream = divide(chunks, budget, 0)
        assert 99 in numbers(pin), budget
        assert stream
    for budget in (0, C // 4):  # not even one fits
        assert 99 in numbers(divide(chunks, budget, 0)[1])


def test_nothing_fits() -> None:
    chunks = flat(10)
    assert divide(chunks, 0, 3 * C) == ([], chunks)
    assert divide(chunks, 3 * C, 3 * C) == ([], chunks)


def test_no_chunks() -> None:
    assert divide([], 100, 10) == ([], [])


@st.composite
def layouts(draw: st.DrawFn) -> list[Chunk]:
    count = draw(st.integers(1, 60))
    found = []
    for n in range(count):
        first = draw(st.integers(0, 80))
        held = draw(st.one_of(st.just(0), st.integers(0, 2), st.integers(0, 80)))
        nbytes = draw(st.integers(1, C)) if n == count - 1 else C
        found.append(Chunk(0, n, nbytes, first, first + held))
    return sorted(found, key=lambda c: (c.first, c.last, c.file, c.number))


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(0, 70 * C), st.integers(0, 20 * C))
def test_divide_parts_the_chunks_and_keeps_the_budget(chunks: list[Chunk], budget: int, window: int) -> None:
    pin, stream = divide(chunks, budget, window)
    order = {id(c): i for i, c in enumerate(chunks)}
    for part in (pin, stream):
        places = [order[id(c)] for c in part]
        assert places == sorted(places)
    assert sorted(order[id(c)] for c in (*pin, *stream)) == list(range(len(chunks)))
    pinned, total = (sum(c.nbytes for c in part) for part in (pin, chunks))
    if total <= budget:
        assert not stream
    else:
        assert stream
        assert pinned <= max(budget - window, 0) + C / 2  # to half a chunk
        assert pinned >= min(budget - window, total) - 1.5 * C


# --- Stream


def arrive(stream: Stream, chunks: list[int], now: int = 0) -> None:
    for i in chunks:
        stream.arrived(i, now)


def test_it_reads_ahead_before_the_token_begins_and_wraps_around_while_idle() -> None:
    stream = Stream(flat(10, start=1), 3)
    assert stream.move(0, 0) == ([], [0, 1, 2])
    arrive(stream, [0, 1, 2])
    for step in range(1, 11):
        back, read = stream.move(step, 0)
        assert back == ([step - 2] if step > 1 else [])
        assert read == ([(step + 1) % 10] if step > 1 else [])
        arrive(stream, read)
    # The last chunk has been used. The server is idle; what the next token needs first is read.
    back, read = stream.move(11, 0)
    assert (back, read) == ([9], [2])
    arrive(stream, read)
    assert stream.wanted() == [0, 1, 2]
    assert (stream.used, stream.late, stream.missed, stream.wasted) == (10, 0, 0, 0)
    assert stream.move(0, 0) == ([], [])
    stream.move(1, 0)
    assert stream.used == 11


def test_how_a_chunk_was_found_is_counted() -> None:
    stream = Stream(flat(10), 2)
    stream.move(0, 5)  # 0 is met while it is still being asked for: nothing was read ahead of it
    assert (stream.used, stream.late, stream.missed) == (0, 0, 1)
    stream.arrived(1, 10)
    stream.move(1, 25)
    assert (stream.used, stream.ahead_ns) == (1, 15)
    stream.move(2, 30)  # 2 is under way
    assert (stream.used, stream.late, stream.missed) == (1, 1, 1)
    stream.move(7, 40)  # 3 is under way; of 4 to 7 nobody has thought
    assert (stream.used, stream.late, stream.missed) == (1, 2, 5)


def test_a_failed_read_is_asked_for_again() -> None:
    stream = Stream(flat(5), 2)
    assert stream.move(0, 0)[1] == [0, 1]
    assert stream.move(0, 0)[1] == []
    stream.gone(1)
    assert stream.state[1] == ABSENT
    assert stream.move(0, 0)[1] == [1]


def test_wasted_is_exact() -> None:
    stream = Stream(flat(10), 3)
    stream.move(0, 0)
    arrive(stream, [0, 1, 2])
    stream.move(1, 1)  # 0 is given back: it was met while it was asked for (missed), so it came too late to be used
    stream.arrived(3, 1)
    back, _ = stream.move(6, 2)  # jumps: 1 was met; 2 and 3 are met by jumping over them
    assert sorted(back) == [1, 2, 3]
    assert stream.wasted == 1
    arrive(stream, [6, 7, 8], 3)
    back, read = stream.move(0, 4)  # the token was broken off: 7 and 8 are given back without having been met
    assert (sorted(back), read) == ([6, 7, 8], [0, 1, 2])
    # 6 was missed at step 6, and read after that; 7 and 8 were not met at all.
    assert stream.wasted == 1 + 3
    arrive(stream, [0, 1, 2], 5)
    assert sorted(stream.clear()) == [0, 1, 2]
    assert stream.wasted == 1 + 3 + 3
    assert stream.state == [ABSENT] * 10


def test_a_token_begins_again_in_its_middle() -> None:
    stream = Stream(flat(10), 3)
    stream.move(0, 0)
    arrive(stream, [0, 1, 2])
    stream.move(5, 0)
    met = stream.used + stream.late + stream.missed
    assert met == 6
    stream.move(2, 0)  # a new token, which is at its third step already
    assert stream.used + stream.late + stream.missed == met + 3
    assert stream.wanted() == [2, 3, 4]


def test_the_same_step_again_meets_nothing_again() -> None:
    stream = Stream(flat(10), 3)
    for _ in range(3):
        stream.move(4, 0)
    assert stream.used + stream.late + stream.missed == 5


def test_what_is_used_twice_stays_in_between() -> None:
    stream = Stream([Chunk(0, 0, C, 1, 4), *(Chunk(0, n, C, n, n) for n in range(2, 9))], 3)
    where = {c.number: i for i, c in enumerate(stream.chunks)}
    seen = []
    for step in range(9):
        back, read = stream.move(step, 0)
        arrive(stream, read)
        seen.append(where[0] in back)
    assert seen.index(True) == 5  # the step after its last


def test_a_window_larger_than_the_stream() -> None:
    stream = Stream(flat(3), 100)
    assert stream.move(0, 0) == ([], [0, 1, 2])
    arrive(stream, [0, 1, 2])
    for step in (1, 2, 3, 0, 1, 2, 3):
        assert stream.move(step, 0) == ([], [])
    assert stream.missed == 1  # the very first
    assert stream.used == 2 + 3


def test_an_empty_stream() -> None:
    stream = Stream([], 4)
    assert stream.move(3, 0) == ([], [])
    assert stream.wanted() == []
    assert stream.clear() == []


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 100), st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_a_budget_that_changes_costs_nothing(count: int, window: int, before: float, after: float, begins: int) -> None:
    """In the token in which chunks change sides no more are read than in any, and no more are in memory."""
    chunks = flat(count)
    old, _ = divide(chunks, int(before * count) * C, 0)
    new, stays = divide(chunks, int(after * count) * C, 0)
    stream = Stream(chunks, window, held=old)
    held = set(numbers(old))
    memory: set[int] = set()
    for token in range(4):
        reads = 0
        for step in range(count):
            if token == 1 and step == begins % count:
                stream.hold(new)
            back, read = stream.move(step, 0)
            turned = stream.turned()
            arrive(stream, read)
            reads += len(read)
            held = (held - set(back)) | set(turned)
            memory = (memory - set(back) - set(turned)) | set(read)
            assert len(held) + len(memory) <= max(len(old), len(new)) + window + 2
        if token > 0:
            ahead = 2 * window  # what is read ahead belongs to another token
            assert reads <= max(count - len(old), count - len(new)) + ahead
    assert held == set(numbers(new))
    assert [stream.chunks[i] for i in stream.flow] == stays
    assert stream.moving() == stays


def test_what_is_freed_flows_at_once() -> None:
    chunks = flat(10)
    stream = Stream(chunks, 3, held=chunks[:5])
    assert stream.move(0, 0)[1] == [5, 6, 7]
    stream.hold(chunks[2:5])
    stream.free([chunks[1], chunks[4]])
    assert stream.move(0, 0)[1] == [1, 4]
    assert stream.wanted() == [1, 4, 5]
    assert numbers(stream.moving()) == [0, 1, 4, 5, 6, 7, 8, 9]  # 0 is to flow, and does once the server has passed it
    assert stream.missed == 0
    assert stream.move(1, 0)[0] == [0]


def simulate(chunks: list[Chunk], window: int, seed: int, moves: int, at_once: bool, turning: bool = False) -> Stream:
    """Drive a stream with a server that jumps, restarts and repeats, and a disk that is slow, out of order and fails.

    Checks after each move what must always hold. ``turning``: what is held changes now and then.
    ``at_once``: a step has one chunk, which is due when it begins; else chunks of one step are due one
    after the other, and may be counted later than their step begins.
    """
    rng = random.Random(seed)
    target = rng.sample(chunks, rng.randrange(len(chunks) + 1)) if turning else []
    stream = Stream(chunks, window, held=target)
    where = {key(c): i for i, c in enumerate(stream.chunks)}
    locked = {where[key(c)] for c in target}
    end = max(c.last for c in chunks) + 1
    memory: set[int] = set()  # what the disk has delivered and nobody has given back
    under_way: set[int] = set()
    met = step = now = 0
    before = -1  # step of the last move; -1: a token begins
    fetched = 0
    for _ in range(moves):
        now += rng.randrange(1000)
        what = rng.random()
        if what < 0.7:
            step = step + 1 if step < end else 0
        elif what < 0.8:
            step = min(step + rng.randrange(20), end)  # marks were lost
        elif what < 0.85:
            step = 0  # the token was broken off
        elif what < 0.9:
            step = rng.randrange(end + 1)
        for i in rng.sample(sorted(under_way), rng.randrange(len(under_way) + 1)):  # out of order, as threads do
            under_way.discard(i)
            if rng.random() < 0.1:
                stream.gone(i)
            else:
                stream.arrived(i, now)
                memory.add(i)
                fetched += 1
        if turning and rng.random() < 0.1:
            target = rng.sample(chunks, rng.randrange(len(chunks) + 1))
            stream.hold(target)
        if locked and rng.random() < 0.1:
            given = rng.sample(sorted(locked), rng.randrange(1, len(locked) + 1))
            stream.free([stream.chunks[i] for i in given])
            locked -= set(given)
            target = [c for c in target if where[key(c)] not in given]
        held = set(memory)
        reading = set(under_way)
        begin = before if step >= before else -1
        expected = Counter(
            "used" if i in held else "late" if i in reading else "missed"
            for i, c in enumerate(stream.chunks)
            if begin < c.first <= step and i not in locked
        )
        counts = stream.used, stream.late, stream.missed
        back, read = stream.move(step, now)
        met += sum(expected.values())
        after = stream.used, stream.late, stream.missed
        got = [b - a for a, b in zip(counts, after, strict=True)]
        if at_once:
            assert got == [expected[n] for n in ("used", "late", "missed")]
            assert sum(after) == met
        assert min(got) >= 0
        assert sum(after) <= met
        before = step

        wanted = stream.wanted()
        turned = set(stream.turned())
        keep = {where[key(c)] for c in target}
        assert turned <= memory & keep
        assert not (set(back) & locked) & keep
        assert set(back) <= memory | locked  # only what is there can be given back
        assert len(back) == len(set(back))
        assert not (set(back) - locked) & set(wanted)
        assert not set(read) & (memory | under_way)
        assert set(read) <= set(wanted)
        locked = (locked - set(back)) | turned
        memory -= set(back) | turned
        under_way |= set(read)
        assert len(wanted) == len(set(wanted)) == min(window, len(chunks) - len(locked))
        assert not set(wanted) & locked
        assert memory <= set(wanted)
        assert set(wanted) <= memory | under_way
        # Work takes back what has not begun: here all that is not wanted any more, or a part of it.
        for i in sorted(under_way - set(wanted)):
            if rng.random() < 0.7:
                under_way.discard(i)
                stream.gone(i)
        for i in range(len(chunks)):
            assert (stream.state[i] == READY) == (i in memory)
            assert (stream.state[i] == READING) == (i in under_way)
            assert (stream.state[i] == HELD) == (i in locked)
        flow = [i for i in range(len(chunks)) if i not in locked]
        if flow:
            assert wanted[0] == next((i for i in flow if stream.chunks[i].last >= step), flow[0])
    assert stream.ahead_ns >= 0
    assert sorted(stream.clear()) == sorted(memory)
    assert stream.wasted <= fetched
    return stream


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1 << 30))
def test_a_stream_is_true_whatever_the_server_and_the_disk_do(count: int, window: int, seed: int) -> None:
    simulate(flat(count), window, seed, 200, at_once=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1 << 30))
def test_also_while_what_is_held_changes(count: int, window: int, seed: int) -> None:
    simulate(flat(count), window, seed, 200, at_once=True, turning=True)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 12), st.integers(0, 1 << 30))
def test_also_with_chunks_that_are_held(chunks: list[Chunk], window: int, seed: int) -> None:
    simulate(chunks, window, seed, 100, at_once=False)
    simulate(chunks, window, seed, 100, at_once=False, turning=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(9, 60), st.integers(4, 8), st.integers(1, 5))
def test_a_disk_that_is_fast_enough_is_never_late(count: int, window: int, tokens: int) -> None:
    """Each token reads each streamed chunk once and no more, and the server finds all of them there."""
    stream = Stream(flat(count, start=1), window)
    reads: Counter[int] = Counter()
    ahead = stream.move(0, 0)[1]
    arrive(stream, ahead)
    for _ in range(tokens):
        for step in range(count + 2):
            _, read = stream.move(step, 0)
            reads.update(read)
            arrive(stream, read)
    assert (stream.used, stream.late, stream.missed, stream.wasted) == (count * tokens, 0, 0, 0)
    assert set(reads.values()) == {tokens}
    assert sorted(ahead) == list(range(window))
