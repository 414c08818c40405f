"""Ranges of a file read in large folios, on the running kernel: what comes in, and how, and that nothing follows.

How large folios are is told by /proc/kpageflags. Needs root; tests/conftest.py has the switch.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import need, wait_until
from touching import Server, opened

from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.prefetch.folios import Calls, Folios, limits_of, works
from llmtraced.prefetch.pages import PAGE, Pages

pytestmark = pytest.mark.kernel("root")

SIZE = 96 << 20
EXPERT = 281 * PAGE + 512  # and ends within a page
HEAD, TAIL, READAHEAD = 1 << 15, 1 << 16, 1 << 9  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_RECLAIM: the mark


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folios") / "model.bin"
    block = random.Random(1).randbytes(1 << 20)
    path.write_bytes(b"".join(struct.pack("<Q", i) + block[8:] for i in range(SIZE >> 20)))
    need(drop_cache(path) == 0, f"{path.parent} is on a file system without a droppable page cache (tmpfs?)")
    return path


@pytest.fixture
def server(file: Path) -> Iterator[Server]:
    assert drop_cache(file) == 0
    one = Server(file, ahead=True)
    yield one
    one.end()
    drop_cache(file)


@pytest.fixture
def pages(file: Path, server: Server) -> Iterator[Pages]:
    with opened(file, server) as made:
        yield made


@pytest.fixture
def folios(pages: Pages) -> Iterator[Folios]:
    limits = limits_of(pages.fd)
    need(limits.usable, f"readahead of {limits.ahead} pages")
    made = Folios(Calls(pages), limits)
    pages.read(40, "huge")
    if not pages.comes_huge(41):
        pytest.skip(f"no large folios in this file system on Linux {os.uname().release}")
    pages.drop(40)
    pages.drop(41)
    yield made
    made.close()


def flags(path: Path, offset: int, nbytes: int) -> list[int]:
    """Return /proc/kpageflags of the pages of a range that is in memory, without the kernel noticing a reader."""
    first = offset // PAGE * PAGE
    count = -(-(offset + nbytes - first) // PAGE)
    found = []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), count * PAGE, prot=mmap.PROT_READ, offset=first) as data:
        data.madvise(mmap.MADV_RANDOM)  # comes to a mark without reading on
        sum(data[::PAGE])
        start = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(path.name) and int(line.split()[2], 16) == first and _length(line) == count * PAGE
        )
        with Path("/proc/self/pagemap").open("rb") as pagemap, Path("/proc/kpageflags").open("rb") as kernel:
            pagemap.seek(start // PAGE * 8)
            for (entry,) in struct.iter_unpack("<Q", pagemap.read(8 * count)):
                kernel.seek((entry & (1 << 55) - 1) * 8)
                found.append(struct.unpack("<Q", kernel.read(8))[0])
    return found


def _length(line: str) -> int:
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return end - start


def rounded(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def gone(pages: Pages, offset: int, size: int) -> None:
    """Give back until nothing is there: pages that the kernel is just about to put into a list stay."""

    def nothing() -> bool:
        pages.give_back_range(offset, size, before=True, after=True)
        return pages.resident_range(0, SIZE) == 0

    wait_until(nothing, 5, "it to be given back")


def read(folios: Folios, pages: Pages, offset: int, nbytes: int) -> int:
    folios.keep(offset, nbytes)
    folios.settle(offset, nbytes)
    return folios.ask(offset, nbytes)


def test_ranges_anywhere_come_whole_and_alone_and_a_server_has_nothing_more_read(
    file: Path, server: Server, pages: Pages, folios: Folios
) -> None:
    pick = random.Random(2)
    large = asked = 0
    for _ in range(40):
        offset = pick.randrange(1 << 20, SIZE - (4 << 20)) // 512 * 512
        size = pick.choice([EXPERT, EXPERT, 3 * EXPERT, 120 * PAGE])
        whole = rounded(offset + size) - offset // PAGE * PAGE
        large += read(folios, pages, offset, size)
        asked += size
        assert pages.resident_range(0, SIZE) == pages.resident_range(offset, size) == whole
        server.touch_range(offset, offset + size)
        time.sleep(0.02)
        assert pages.resident_range(0, SIZE) == whole, "a mark was left: the kernel read on for the server"
        gone(pages, offset, size)
    assert large > 0.5 * asked  # small ones, and its first ones, count here too


def test_folios_are_large_and_none_is_marked(file: Path, pages: Pages, folios: Folios) -> None:
    for number in range(8):  # its descriptors get going
        read(folios, pages, (2 + 2 * number) << 20, EXPERT)
    offset = (30 << 20) + 3 * PAGE
    assert read(folios, pages, offset, EXPERT) > 0.9 * EXPERT
    found = flags(file, offset, EXPERT)
    heads = sum(bool(one & HEAD) for one in found)
    small = sum(not one & (HEAD | TAIL) for one in found)
    assert heads + small < 60
    assert small < 24
    assert not any(one & READAHEAD for one in found)
    offset = (60 << 20) + 3 * PAGE
    pages.ask(offset, EXPERT)
    assert not any(one & (HEAD | TAIL) for one in flags(file, offset, EXPERT)), "what readahead(2) makes"


def test_what_stays_is_enough_for_the_next_time(server: Server, pages: Pages, folios: Folios) -> None:
    offsets = [(8 << 20) + i * EXPERT for i in range(6)]
    keep = {offset: folios.anchors(offset, EXPERT) for offset in offsets}
    for offset in offsets:
        folios.keep(offset, EXPERT)
        folios.settle(offset, EXPERT)
    kept = sum(size for one in keep.values() for _, size in one)
    for turn in range(24):
        offset = offsets[turn % 6]
        large = folios.ask(offset, EXPERT)
        assert large > 0.5 * EXPERT or turn < 12
        server.touch_range(offset, offset + EXPERT)

        def gone_but_for_it(offset: int = offset) -> bool:
            pages.give_back_range(offset, EXPERT, keep=keep[offset])
            first, last = -(-offset // PAGE) * PAGE, (offset + EXPERT) // PAGE * PAGE
            if pages.resident_range(first, last - first) > sum(size for _, size in keep[offset]):
                return False  # a page in another processor's batch: next time it would be read by the page
            return kept <= pages.resident_range(0, SIZE) <= kept + 12 * PAGE  # what two have in common stays

        wait_until(gone_but_for_it, 5, "it to be given back")


def test_it_is_read_by_the_page_where_something_is_there(server: Server, pages: Pages, folios: Folios) -> None:
    for place in (0, 3, 100, 280):
        offset = (40 << 20) + PAGE
        folios.keep(offset, EXPERT)
        folios.settle(offset, EXPERT)
        pages.ask(offset + place * PAGE, PAGE)
        folios.ask(offset, EXPERT)
        assert pages.resident_range(0, SIZE) == rounded(EXPERT)
        server.touch_range(offset, offset + EXPERT)
        time.sleep(0.02)
        assert pages.resident_range(0, SIZE) == rounded(EXPERT)
        gone(pages, offset, EXPERT)


def test_it_does_not_wait(pages: Pages, folios: Folios) -> None:
    """All of a range is in the page cache at once: who comes meanwhile waits for the disk and has nothing else read."""
    offset = 50 << 20
    folios.keep(offset, EXPERT)
    folios.settle(offset, EXPERT)
    folios.ask(offset, EXPERT)
    assert pages.resident_range(offset, EXPERT) == rounded(EXPERT)


def test_that_it_works_is_found_out(pages: Pages, folios: Folios, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [((10 + 20 * i) << 20, EXPERT) for i in range(4)]
    assert works(pages, folios, ranges)
    pages.touch(0, SIZE)
    assert works(pages, folios, ranges), "all of the file is in memory, as where much of it fits"
    monkeypatch.setattr(Calls, "comes", lambda *_: None)
    assert not works(pages, folios, ranges), "nothing comes in large folios"
    monkeypatch.undo()
    gone(pages, 0, SIZE)
    comes = Calls.comes

    def leaves_the_mark(self: Calls, fd: int, page: int, asked: int) -> None:
        if asked > 1 or fd == folios._first or page not in ends:
            comes(self, fd, page, asked)

    ends = {piece.window for offset, size in ranges for piece in folios._plan(offset, size)}
    monkeypatch.setattr(Calls, "comes", leaves_the_mark)
    assert not works(pages, folios, ranges), "a mark is left"


def test_at_the_limit_of_a_cgroup_it_is_read_all_the_same(file: Path, pages: Pages, folios: Folios) -> None:
    """Where memory for large folios cannot be had, the kernel takes small ones."""
    with MemoryCgroup(f"folios-{os.getpid()}", 24 << 20) as group:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                group.add(os.getpid())
                for number in range(12):
                    read(folios, pages, (20 + 4 * number) << 20, 2 << 20)
                    pages.touch((20 + 4 * number) << 20, 2 << 20)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    wait_until(lambda: pages.resident_range(64 << 20, 2 << 20) > 0, 5, "the last one to be there")


def test_a_file_that_is_cut_is_an_error_and_no_death(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(8 << 20))
    fd = os.open(path, os.O_RDWR)
    made = Pages(fd, server.pidfd, [])
    folios = Folios(Calls(made), limits_of(fd))
    os.ftruncate(fd, 1 << 20)
    folios.keep(2 << 20, EXPERT)
    folios.settle(2 << 20, EXPERT)
    assert folios.ask(2 << 20, EXPERT) == 0
    folios.close()
    made.close()
    os.close(fd)
