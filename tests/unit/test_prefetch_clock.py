"""Ticks out of a ring that is made by hand, as kernel/bpf/ringbuf.c would have left it; the page table of ourselves."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from llmtraced.prefetch import clock
from llmtraced.prefetch.clock import BEGIN, END, EXPERTS, INPUT, PageTable, TickRing, choices, decoded, next_step

PAGE = 4096
RING = 8192
BUSY, DISCARD = 1 << 31, 1 << 30
RECORD = 24
SPACE = 8 + RECORD


class Ring:
    """A file in the ring's layout: consumer, producer, the data twice. Positions rise for ever, as in the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, marks: int = 1000) -> None:
        self.fd, self.clocks, self.wakes = (os.memfd_create(n) for n in ("ring", "clocks", "wakes"))
        os.ftruncate(self.fd, 2 * PAGE + 2 * RING)
        os.ftruncate(self.clocks, PAGE)
        os.ftruncate(self.wakes, 2 * PAGE)
        monkeypatch.setattr(clock.select, "epoll", lambda: self)
        self.waited: list[float] = []
        self.on_poll = lambda: None
        self.ring = TickRing(self.fd, self.clocks, self.wakes, RING, marks)

    def register(self, fd: int, events: int) -> None:
        assert fd == self.fd

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        self.waited.append(seconds)
        self.on_poll()
        return [(self.fd, 1)] if self.produced() > self.consumed() else []

    def consumed(self) -> int:
        return int(struct.unpack("<Q", os.pread(self.fd, 8, 0))[0])

    def produced(self) -> int:
        return int(struct.unpack("<Q", os.pread(self.fd, 8, PAGE))[0])

    def set_positions(self, at: int) -> None:
        os.pwrite(self.fd, struct.pack("<Q", at), 0)
        os.pwrite(self.fd, struct.pack("<Q", at), PAGE)

    def put(self, ts: int, token: int = 1, mark: int = 5, value: int = 0, flags: int = 0) -> int:
        """Append a record and return its position."""
        at = self.produced()
        self.write(at, struct.pack("<IIQIIQ", RECORD | flags, 0, ts, token, mark, value))
        os.pwrite(self.fd, struct.pack("<Q", at + SPACE), PAGE)
        return at

    def write(self, at: int, data: bytes) -> None:
        """Write at a position: into both images of the data, as they are the same memory in the kernel."""
        for i, byte in enumerate(data):
            place = (at + i) % RING
            for image in (0, RING):
                os.pwrite(self.fd, bytes([byte]), 2 * PAGE + image + place)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    made = Ring(monkeypatch)
    yield made
    for fd in (made.fd, made.clocks, made.wakes):
        os.close(fd)


def test_ticks_come_in_order_and_once(ring: Ring) -> None:
    ring.put(100, 1, BEGIN, 7)
    ring.put(200, 1, 5)
    ring.put(300, 1, END)
    assert ring.ring.wait(1.0) == [(100, 1, BEGIN, 7, b""), (200, 1, 5, 0, b""), (300, 1, END, 0, b"")]
    assert ring.consumed() == ring.produced() == 3 * SPACE
    assert ring.waited == []
    assert ring.ring.wait(0.25) == []
    assert ring.waited == [0.25]


def test_it_waits_for_the_first(ring: Ring) -> None:
    ring.on_poll = lambda: ring.put(9)
    assert ring.ring.wait(0.5) == [(9, 1, 5, 0, b"")]


def test_a_record_that_is_being_written_is_waited_for_and_all_behind_it(ring: Ring) -> None:
    ring.put(1)
    busy = ring.put(2, flags=BUSY)
    ring.put(3)
    assert [t[0] for t in ring.ring.wait(0)] == [1]
    assert ring.consumed() == busy
    assert ring.ring.wait(0) == []
    ring.write(busy, struct.pack("<I", RECORD))
    assert [t[0] for t in ring.ring.wait(0)] == [2, 3]


def test_a_record_that_was_given_up_is_skipped(ring: Ring) -> None:
    ring.put(1)
    ring.put(2, flags=DISCARD)
    ring.put(3)
    assert [t[0] for t in ring.ring.wait(0)] == [1, 3]
    assert ring.consumed() == ring.produced()


@pytest.mark.parametrize("short", [8, 16, 24])
def test_a_record_across_the_end_of_the_ring(ring: Ring, short: int) -> None:
    ring.set_positions(5 * RING - short)
    ring.put(1)
    ring.put(2)
    assert [t[0] for t in ring.ring.wait(0)] == [1, 2]


def test_many_rounds_of_the_ring(ring: Ring) -> None:
    sent = 0
    for _ in range(20):
        for _ in range(RING // SPACE // 2 + 3):
            sent += 1
            ring.put(sent)
        got = ring.ring.wait(0)
        assert got[-1][0] == sent
        assert len(got) == RING // SPACE // 2 + 3


def test_wakes_are_exactly_those_asked_for(ring: Ring) -> None:
    def wakes() -> dict[int, int]:
        words = struct.unpack("<1000Q", os.pread(ring.wakes, 8000, 0))
        return {i: word for i, word in enumerate(words) if word}

    for wanted in ({0: 1, 7: INPUT, 999: EXPERTS}, {8: 1}, {}):
        ring.ring.wake_at(wanted)
        assert wakes() == wanted


def test_lost_ticks_are_read_from_the_clock(ring: Ring) -> None:
    from llmtraced.probes.ticks import _CLOCK

    assert _CLOCK.fields is not None
    os.pwrite(ring.clocks, struct.pack("<Q", 12), _CLOCK.fields["lost"][1])
    assert ring.ring.lost == 12


def test_marks_are_those_of_the_probes() -> None:
    from llmtraced.probes import ticks

    assert (BEGIN, END) == (ticks.TICK_BEGIN, ticks.TICK_END)


@pytest.mark.parametrize(
    ("steps", "before", "now"),
    [([5], -1, 5), ([5], 5, 5), ([5], 9, 5), ([3, 90], -1, 3), ([3, 90], 3, 90), ([3, 90], 50, 90), ([3, 90], 90, 3)],
)
def test_where_the_server_is_when_it_comes_to_a_weight(steps: list[int], before: int, now: int) -> None:
    assert next_step(steps, before) == now


def test_the_page_table_says_what_is_mapped() -> None:
    import ctypes

    table = PageTable(os.getpid())
    with mmap.mmap(-1, 4 * PAGE) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert not table.mapped(address + 2 * PAGE)
        memory[2 * PAGE] = 1
        assert table.mapped(address + 2 * PAGE)
        assert table.mapped(address + 3 * PAGE - 1)
        assert not table.mapped(address + 3 * PAGE)
    assert not table.mapped(1 << 60)  # beyond all addresses
    table.close()


def test_the_page_table_says_what_is_mapped_by_huge_pages() -> None:
    import ctypes

    huge, chunks = 2 << 20, 600  # every other one: more regions than one call returns
    table = PageTable(os.getpid())
    with mmap.mmap(-1, (chunks + 2) * huge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        first = -(-begin // huge) * huge
        for n in range(0, chunks, 2):
            at = first + n * huge - begin
            memory.madvise(mmap.MADV_HUGEPAGE, at // PAGE * PAGE, huge)
            memory[at] = 1
        memory[first + huge - begin] = 1  # in a small page
        try:
            found = table.huge(first, first + chunks * huge)
        except OSError as error:
            pytest.skip(f"no PAGEMAP_SCAN in this kernel: {error}")
        if not found:
            pytest.skip("no huge pages to be had here")
        places = {(low - first) // huge for low, _ in found}
        assert all(low % huge == 0 and high - low == huge for low, high in found)
        assert places <= set(range(0, chunks, 2))
        assert table.huge(first + huge, first + 2 * huge) == []
        if len(found) < chunks // 2:
            pytest.skip(f"only {len(found)} of {chunks // 2} huge pages to be had")
    table.close()


def test_a_process_that_is_gone() -> None:
    with pytest.raises(OSError, match="No such file"):
        PageTable(4_194_305)


def test_what_comes_with_a_tick_is_handed_on(ring: Ring) -> None:
    rows = [(3, 9), (1, 0), (63, 2)]
    told = b"".join(struct.pack("<2i", *row).ljust(64, b"\xff") for row in rows).ljust(512, b"\xff")
    at = ring.produced()
    ring.write(at, struct.pack("<II", RECORD + len(told), 0) + struct.pack("<QIIQ", 1, 1, 5, 2 | 3 << 32) + told)
    os.pwrite(ring.fd, struct.pack("<Q", at + SPACE + len(told)), PAGE)
    ((_, _, _, value, found),) = ring.ring.wait(0)
    assert found == told
    assert choices(value, found) == rows


def test_a_prompts_choices_are_not_told() -> None:
    assert choices(4 | 300 << 32, b"") == []


@pytest.mark.parametrize(("tokens", "outputs", "batch"), [(1, 1, 1), (4, 4, 4), (7, 1, 0), (512, 0, 0), (0, 0, 0)])
def test_a_batch_is_decoded_if_all_its_tokens_have_outputs(tokens: int, outputs: int, batch: int) -> None:
    assert decoded(tokens | outputs << 32) == batch
