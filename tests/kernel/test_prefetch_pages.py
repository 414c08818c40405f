"""Pages of a file that another process maps: read, locked, given back, on the running kernel. Needs root, nothing of
BPF; tests/conftest.py has the switch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EMULATED, need, wait_until
from running import mounted
from touching import SKIPPED, Server, opened

from llmtraced.bench.pressure import drop_cache
from llmtraced.prefetch import pages as calls
from llmtraced.prefetch import unit
from llmtraced.prefetch.clock import PageTable
from llmtraced.prefetch.hold import Hold, let_go
from llmtraced.prefetch.pages import CHUNK, PATHS, Pages
from llmtraced.prefetch.policy import READY, Chunk, divide
from llmtraced.prefetch.readers import Threads, Uring
from llmtraced.prefetch.work import Work

pytestmark = pytest.mark.kernel("root")

PAGE = 4096
CHUNKS = 6
TAIL = 300_000  # the last chunk is shorter, and no whole number of pages


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "model.bin"
    path.write_bytes(random.Random(1).randbytes(CHUNKS * CHUNK + TAIL))
    need(drop_cache(path) == 0, f"{path.parent} is on a file system without a droppable page cache (tmpfs?)")
    return path


@pytest.fixture
def server(file: Path) -> Iterator[Server]:
    assert drop_cache(file) == 0
    one = Server(file)
    yield one
    one.end()


@pytest.fixture
def pages(file: Path, server: Server) -> Iterator[Pages]:
    with opened(file, server) as made:
        yield made
    drop_cache(file)


def chunks_there(pages: Pages) -> dict[int, int]:
    """Return the resident bytes of each chunk that has any."""
    return {n: there for n in range(pages.chunks) if (there := pages.resident(n))}


def ours(path: Path, field: str = "Rss") -> int:
    """Return bytes of a field of /proc/self/smaps, summed over our mappings of the file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0]:
            inside = line.endswith(path.name)
        elif inside and head[0] == f"{field}:":
            total += int(head[1]) * 1024
    return total


def given_back(pages: Pages, chunk: int) -> None:
    """Give a chunk back, as the sidecar does: again, while pages wait in another processor's batch of new pages.

    Dropping empties these batches, and drops nothing that is mapped.
    """

    def gone() -> bool:
        pages.give_back(chunk)
        pages.drop(chunk)
        return pages.resident(chunk) == 0

    wait_until(gone, 5, f"chunk {chunk} is given back")


def whole(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def test_the_last_chunk_is_what_is_left(pages: Pages) -> None:
    assert pages.chunks == CHUNKS + 1
    assert [pages.length(n) for n in range(pages.chunks)] == [CHUNK] * CHUNKS + [TAIL]


def test_what_is_cached_is_known_without_cachestat_too(
    file: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_NR_CACHESTAT", 1 << 20)  # as on kernels before 6.5: no such call
    fd = os.open(file, os.O_RDONLY)
    older = Pages(fd, server.pidfd, server.maps)
    assert not older.counted
    assert older.resident(0, older.chunks) == 0
    older.pin(1)
    older.read(CHUNKS, "readahead")
    assert chunks_there(older) == {1: CHUNK, CHUNKS: whole(TAIL)}
    assert older.resident(0, older.chunks) == CHUNK + whole(TAIL)
    assert ours(file) == CHUNK  # asking maps nothing
    older.close()
    os.close(fd)


def test_where_the_server_has_a_chunk(pages: Pages, server: Server) -> None:
    start = server.maps[0][0]
    assert pages.server_ranges(0) == [(start, CHUNK - SKIPPED)]
    assert pages.server_ranges(1) == [(start + CHUNK - SKIPPED, CHUNK)]
    assert pages.server_ranges(CHUNKS) == [(start + CHUNKS * CHUNK - SKIPPED, TAIL)]
    parts = [(1 << 40, (1 << 40) + 8 * PAGE, 0), (1 << 41, (1 << 41) + CHUNK, CHUNK - 8 * PAGE)]
    pages.maps = parts
    assert pages.server_ranges(0) == [(1 << 40, 8 * PAGE), (1 << 41, 8 * PAGE)]
    assert pages.server_ranges(2) == []


@pytest.mark.parametrize("chunk", [2, CHUNKS])
@pytest.mark.parametrize("path", PATHS)
def test_exactly_the_chunk_is_read_and_it_is_not_mapped_here(path: str, chunk: int, file: Path, pages: Pages) -> None:
    before = ours(file)
    pages.read(chunk, path, bytearray(CHUNK))
    there = chunks_there(pages)
    assert there.pop(chunk) == whole(pages.length(chunk))
    # What the device reads in one request may go over an edge by some pages, but no chunk beside it is read. Only of
    # what follows a read(2) do kernels read as much as they like (6.1: most of a chunk).
    assert sum(there.values()) <= (CHUNK if path == "pread" else CHUNK // 8)
    assert ours(file) == before == 0


@pytest.mark.parametrize("path", PATHS)
def test_the_server_has_no_major_fault_on_what_was_read(path: str, pages: Pages, server: Server) -> None:
    pages.read(3, path, bytearray(CHUNK))

    def majors() -> int:
        return int(Path(f"/proc/{server.child.pid}/stat").read_text().rsplit(")", 1)[1].split()[9])

    before = majors()
    server.touch(3)
    assert majors() == before


def test_a_pinned_chunk_is_locked_until_it_is_let_go(file: Path, pages: Pages) -> None:
    pages.pin(1)
    pages.pin(CHUNKS)
    assert ours(file, "Locked") == CHUNK + whole(TAIL)
    assert chunks_there(pages).keys() >= {1, CHUNKS}
    pages.drop(1)
    pages.give_back(1)
    assert pages.resident(1) == CHUNK
    pages.unpin(1)
    assert ours(file, "Locked") == whole(TAIL)
    assert ours(file) == whole(TAIL)
    assert pages.resident(1) == CHUNK  # for the time being
    pages.drop(1)
    assert pages.resident(1) == 0


def test_nothing_stays_locked_after_closing(file: Path, server: Server) -> None:
    fd = os.open(file, os.O_RDONLY)
    made = Pages(fd, server.pidfd, server.maps)
    made.pin(0)
    made.close()
    assert ours(file, "Locked") == ours(file) == 0
    os.close(fd)
    assert drop_cache(file) == 0


def test_what_the_server_has_mapped_is_given_back(pages: Pages, server: Server) -> None:
    table = PageTable(server.child.pid)
    server.touch(2, 2)
    assert pages.resident(2, 2) == 2 * CHUNK
    assert table.mapped(server.address(2))
    pages.drop(2)
    assert pages.resident(2) == CHUNK  # POSIX_FADV_DONTNEED leaves what is mapped
    given_back(pages, 2)
    assert not table.mapped(server.address(2))
    assert pages.resident(3) == CHUNK
    assert table.mapped(server.address(3))
    server.touch(2)  # and it can have them again
    assert pages.resident(2) == CHUNK
    table.close()


def test_what_a_third_process_maps_stays(file: Path, pages: Pages, server: Server) -> None:
    third = Server(file)
    try:
        for one in (server, third):
            one.touch(2)
        server.touch(4)
        given_back(pages, 4)
        pages.give_back(2)
        pages.drop(2)
        pages.give_back(2)
        assert pages.resident(2) == CHUNK
    finally:
        third.end()
    server.touch(2)
    given_back(pages, 2)


def test_what_we_have_mapped_ourselves_stays_until_it_is_untouched(pages: Pages, server: Server) -> None:
    pages.pin(2)
    server.touch(2)
    pages.give_back(2)
    assert pages.resident(2) == CHUNK
    pages.unpin(2)
    server.touch(2)
    given_back(pages, 2)


def test_mapped_is_what_the_server_has_touched(pages: Pages, server: Server) -> None:
    table = PageTable(server.child.pid)
    pages.read(1, "huge")
    assert not table.mapped(server.address(1))  # read, and not used yet
    server.touch(1)
    assert table.mapped(server.address(1))
    assert not table.mapped(server.address(4))
    table.close()


def huge_chunks(pages: Pages, server: Server, wanted: set[int]) -> set[int]:
    """Have chunks come in as huge pages and the server touch them; return which it has mapped by huge pages."""
    for chunk in sorted(wanted):
        pages.read(chunk, "huge")
    for chunk in sorted(wanted):
        server.touch(chunk)
    table = PageTable(server.child.pid)
    found = pages.mapped_huge(table)
    table.close()
    if not found:
        pytest.skip("no huge folios on this file system (or memory is in pieces)")
    return found


def test_a_page_table_of_small_pages_stays_for_good(pages: Pages, server: Server) -> None:
    """Why huge pages are worth keeping: whatever comes later is mapped in small pages, however it was read."""
    assert huge_chunks(pages, server, {1, 2, 4}) == {1, 2, 4}
    given_back(pages, 1)
    assert huge_chunks(pages, server, {1}) == {1, 2, 4}  # given back, and a huge page again
    server.touch(3)  # read by the kernel itself, in small pages
    given_back(pages, 3)
    assert pages.comes_huge(3)
    server.touch(3)
    assert huge_chunks(pages, server, set()) == {1, 2, 4}


class Bound:
    """A memory of so many bytes; ``left`` of it when it is asked what is short."""

    def __init__(self, room: int) -> None:
        self._room, self.left = room, 1 << 40

    def room(self, resident: int | None, locked: int) -> int:
        assert resident is not None
        assert locked == 0
        return self._room

    def short(self, needed: int) -> int:
        return needed - self.left


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtraced.prefetch.hold.LEAST_WINDOW", CHUNK)
    monkeypatch.setattr("llmtraced.prefetch.policy.LEAST_WINDOW", CHUNK)


def locked() -> int:
    """Return the bytes that this process has locked: unlike smaps' "Locked", whoever else maps them."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmLck:"))


@contextlib.contextmanager
def holding(file: Path, server: Server, bound: Bound, budget: int | None = None) -> Iterator[Hold]:
    fd = os.open(file, os.O_RDONLY)
    mine = Pages(fd, server.pidfd, server.maps)
    entries = [(0, 0, 0, file.stat().st_size)]
    try:
        yield Hold(server.child.pid, [mine], entries, bound, 4096, budget)  # type: ignore[arg-type]
    finally:
        mine.close()
        os.close(fd)
    assert locked() == 0


@pytest.mark.usefixtures("small_windows")
def test_huge_pages_are_held_as_far_as_the_memory_goes(file: Path, pages: Pages, server: Server) -> None:
    assert huge_chunks(pages, server, {1, 2, 4, 5}) == {1, 2, 4, 5}
    server.touch(3)
    bound = Bound(4 * CHUNK + 4096)  # a window, as much again left free, and the slack
    with holding(file, server, bound) as hold:
        assert hold.nbytes == locked() == 2 * CHUNK
        for chunk in (1, 2):
            pages.give_back(chunk)
            pages.drop(chunk)
            assert pages.resident(chunk) == CHUNK
        given_back(pages, 3)  # what is in small pages is not worth it
    server.touch(1, 2)
    with holding(file, server, bound, budget=3 * CHUNK) as hold:
        assert hold.nbytes == CHUNK


@pytest.mark.usefixtures("small_windows")
def test_nothing_is_held_where_nothing_would_be_lost(file: Path, pages: Pages, server: Server) -> None:
    for chunk in range(1, 5):
        server.touch(chunk)
    with holding(file, server, Bound(5 * CHUNK)) as hold:
        assert hold.nbytes == 0  # all in small pages
    assert huge_chunks(pages, server, {5}) == {5}
    with holding(file, server, Bound(5 * CHUNK)) as hold:
        assert hold.nbytes == 0  # too little of it to matter
    with holding(file, server, Bound(100 * CHUNK)) as hold:
        assert hold.nbytes == 0  # all of it fits


@pytest.mark.usefixtures("small_windows")
def test_what_is_held_is_affordable_while_a_window_is_left(file: Path, pages: Pages, server: Server) -> None:
    assert huge_chunks(pages, server, {1, 2, 4, 5}) == {1, 2, 4, 5}
    bound = Bound(5 * CHUNK)
    with holding(file, server, bound) as hold:
        assert hold.nbytes == 2 * CHUNK
        bound.left = CHUNK + 4096
        assert hold.affordable()
        bound.left -= 1
        assert not hold.affordable()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.bin"
    path.write_bytes(random.Random(2).randbytes(36 * CHUNK))
    return path


@pytest.fixture
def loaded(large: Path) -> Iterator[tuple[Server, Pages, dict[str, Any], list[int]]]:
    """A server with 14 of 36 chunks in huge pages, and what tells to hold the 11 that a byte less leaves room for."""
    assert drop_cache(large) == 0
    server = Server(large)
    try:
        with opened(large, server) as pages:
            assert huge_chunks(pages, server, set(range(1, 15))) == set(range(1, 15))
            config = {
                "pid": server.child.pid,
                "pidfd": server.pidfd,
                "files": [{"fd": pages.fd, "maps": server.maps}],
                "entries": [[0, 0, 0, pages.size]],
                "procs": "",
                "cgroup": {"folder": "", "version": 2},
                "slack": 4096,
                "budget": pages.size - 1,
            }
            yield server, pages, config, [server.pidfd, pages.fd]
    finally:
        server.end()


def test_a_process_holds_until_it_is_told_to_let_go(
    loaded: tuple[Server, Pages, dict[str, Any], list[int]],
) -> None:
    _, pages, config, fds = loaded
    nbytes, process = unit.hold(config, fds)
    assert nbytes == 11 * CHUNK
    (child,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1:]
    command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
    assert unit.is_sidecar(command), "it has the model mapped, and is no server to the daemon"
    assert int(Path(f"/proc/{child}/oom_score_adj").read_text()) == 1000
    pages.give_back(1)
    pages.drop(1)
    assert pages.resident(1) == CHUNK
    given_back(pages, 12)
    let_go(**process)
    given_back(pages, 1)


@pytest.mark.parametrize("how", ["pipe", "server"])
def test_who_holds_ends_with_its_launcher_and_with_the_server(
    how: str, loaded: tuple[Server, Pages, dict[str, Any], list[int]]
) -> None:
    server, _, config, fds = loaded
    nbytes, process = unit.hold(config, fds)
    assert nbytes == 11 * CHUNK
    if how == "pipe":
        os.close(process["pipe"])
    else:
        server.child.kill()
        server.child.wait()
    gone = select.poll()
    gone.register(process["pidfd"], select.POLLIN)
    assert gone.poll(5000)
    os.waitid(os.P_PIDFD, process["pidfd"], os.WEXITED)
    os.close(process["pidfd"])


@pytest.mark.parametrize("wrong", [{"procs": "/nowhere/cgroup.procs"}, {"budget": 24 * CHUNK}, {"pid": 4_194_304}])
def test_where_nothing_can_be_held_that_is_told(
    wrong: dict[str, Any], loaded: tuple[Server, Pages, dict[str, Any], list[int]]
) -> None:
    _, _, config, fds = loaded
    nbytes, process = unit.hold(config | wrong, fds)
    assert nbytes == 0
    let_go(**process)


def test_what_the_server_has_in_huge_pages_is_locked_as_it_is(file: Path, pages: Pages, server: Server) -> None:
    assert huge_chunks(pages, server, {2, 4}) == {2, 4}
    server.touch(3)
    pages.drop(3)  # drops nothing that is mapped, and empties the processors' batches of new pages
    table = PageTable(server.child.pid)
    chunks = [Chunk(0, n, CHUNK, n, n) for n in (2, 3, 4)]
    strategy = {"pin": True, "stream": False, "evict": True}
    work = Work([pages], table, chunks, strategy, "huge", 0, 1, lambda _: None)
    work.divide(3 * CHUNK, -1)
    wait_until(lambda: not work.pinning, 5, "all is pinned")
    assert work.pinned_bytes == 3 * CHUNK
    assert list(work.pinned) == [(0, 2), (0, 4), (0, 3)]  # before it is driven out by what has to be read
    assert pages.mapped_huge(table) == {2, 4}, "the server has not touched them since, and has them as before"
    assert not table.mapped(server.address(3)), "what was in small pages was read anew"
    work.release()
    table.close()


STRATEGY = {"pin": True, "stream": True, "evict": True}


def passed(work: Work, step: int) -> None:
    """Have the server come to a step, and wait until all that is wanted then has been read."""

    def there() -> bool:
        work.move(step, 0)
        return work.stream is not None and all(work.stream.state[i] == READY for i in work.stream.wanted())

    wait_until(there, 5, "what is wanted is there")


def test_what_is_pinned_changes_sides_as_the_server_passes_and_nothing_is_read_for_it(
    pages: Pages, server: Server
) -> None:
    table = PageTable(server.child.pid)
    chunks = [Chunk(0, n, CHUNK, n, n) for n in range(CHUNKS)]
    work = Work([pages], table, chunks, STRATEGY, "readahead", 2 * CHUNK, 1, lambda _: None)

    def token() -> float:
        """Return the chunks read while the server passes all of them."""
        before = work.totals["read_bytes"]
        for step in range(CHUNKS):
            passed(work, step)
            server.touch(step)
        return (work.totals["read_bytes"] - before) / CHUNK

    for budget in (5, 3, 4):
        work.divide(budget * CHUNK, 0)
        wait_until(lambda: not work.pinning, 5, "what is pinned at once is")
        most = max(CHUNKS - len(work.pinned), CHUNKS - budget + 2)
        assert token() <= most + 2, "and of the window what the next token needs first"
        token()  # the last of them flowed until its end
        pin, stream = divide(chunks, budget * CHUNK, 2 * CHUNK)
        assert {number for _, number in work.pinned} == {c.number for c in pin}
        assert locked() == len(pin) * CHUNK
        assert token() == len(stream)
    assert work.relieve(1) == CHUNK
    token()
    assert token() == len(stream) + 1, "what was given up is streamed"
    assert locked() == (len(pin) - 1) * CHUNK
    assert work.totals["failed"] == 0
    work.release()
    assert locked() == 0
    table.close()


def test_what_cannot_be_locked_is_streamed(pages: Pages, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    table = PageTable(server.child.pid)
    chunks = [Chunk(0, n, CHUNK, n, n) for n in range(CHUNKS)]
    said: list[str] = []
    work = Work([pages], table, chunks, STRATEGY, "readahead", 2 * CHUNK, 1, said.append)
    pin = pages.pin

    def limited(number: int) -> None:
        if len(work.pinned) == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        pin(number)

    monkeypatch.setattr(pages, "pin", limited)
    for _ in range(2):  # the second time as the server passes
        work.divide(5 * CHUNK, 0)
        wait_until(lambda: not work.pinning, 5, "as much is locked as can be")
        work.sweep()
        assert work.stream is not None
        for step in (*range(CHUNKS), 0):
            passed(work, step)
        assert len(work.pinned) == 1
        assert len(work.stream.flow) == CHUNKS - 1
    assert sum("cannot lock more than 2 MB" in line for line in said) == 2, "once a division"
    work.release()
    table.close()


def lacks(what: str) -> None:
    """Skip what a guest of another kernel cannot have."""
    if EMULATED:
        pytest.skip(f"this guest has no {what}")
    need(False, f"needs {what}")


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Path]:
    """A file system with blocks of 64 KiB, so that its pages come and go sixteen at a time."""
    if not shutil.which("mkfs.xfs"):
        lacks("mkfs.xfs")
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(512 << 20)  # sparse
    subprocess.run(["mkfs.xfs", "-q", "-b", "size=65536", image], check=True)
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted("xfs", str(image), tmp_path / "disk", "loop"))
        except subprocess.CalledProcessError:
            lacks("blocks larger than a page (Linux 6.12)")
        yield disk


def test_blocks_larger_than_a_page_are_given_back_whole_or_not_at_all(coarse: Path) -> None:
    file = coarse / "model.bin"
    file.write_bytes(random.Random(3).randbytes(4 * CHUNK))
    assert drop_cache(file) == 0
    block, first, second, end = 65536, CHUNK + 10_000, CHUNK + 1_000_000, CHUNK + 1_900_000  # two, side by side
    borders = [first // block * block, second // block * block, -(-end // block) * block]
    with contextlib.ExitStack() as stack:
        server = Server(file)
        stack.callback(server.end)
        fd = os.open(file, os.O_RDONLY)
        stack.callback(os.close, fd)
        pages = Pages(fd, server.pidfd, server.maps)
        stack.callback(pages.close)
        there = lambda at=0, to=4 * CHUNK: pages.resident_range(at, to - at)  # noqa: E731
        assert pages.block == block
        pages.ask(first, end - first)
        server.touch_range(first, end)
        assert there() == there(borders[0], borders[2]) == borders[2] - borders[0]
        pages.give_back_range(first, second - first)
        assert there(borders[0] + block, borders[1]) == 0
        assert there() == borders[2] - borders[1] + block, "both blocks that it has in common with what is beside it"
        pages.give_back_range(first, second - first, before=True)
        assert there() == borders[2] - borders[1], "all of the second one"
        pages.give_back_range(second, end - second, before=True, after=True)
        assert there() == 0


def kernel_counter(name: str) -> int:
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), -1)


def test_a_chunk_comes_in_as_one_huge_page(file: Path, pages: Pages, server: Server) -> None:
    before = kernel_counter("thp_file_mapped")
    need(before >= 0 and pages.huge, "needs a kernel with huge pages")
    pages.read(1, "huge")
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(file)], capture_output=True, text=True, check=True).stdout
    if kernel_counter("thp_file_mapped") == before:
        pytest.skip(f"no huge folios on this {kind.strip()} of Linux {os.uname().release} (or memory is in pieces)")
    pages.pin(2)
    assert ours(file, "FilePmdMapped") == CHUNK


@pytest.fixture
def huge(file: Path, pages: Pages) -> Pages:
    if not pages.comes_huge(1):
        pytest.skip(f"no huge folios on this file system of Linux {os.uname().release} (or memory is in pieces)")
    assert drop_cache(file) == 0
    return pages


MANY = 150  # and more than the 100 misses after which newer kernels read a page at a time


def test_chunks_come_in_as_huge_pages_however_many_are_read(huge: Pages) -> None:
    before = kernel_counter("thp_file_mapped")
    for number in range(MANY):
        huge.read(number % CHUNKS, "huge")
        huge.drop(number % CHUNKS)
    assert kernel_counter("thp_file_mapped") - before == MANY


def test_chunks_are_pinned_as_huge_pages_however_many_are(file: Path, huge: Pages) -> None:
    for number in range(MANY):
        huge.pin(number % CHUNKS)
        assert ours(file, "FilePmdMapped") == CHUNK
        huge.unpin(number % CHUNKS)
        huge.drop(number % CHUNKS)


@pytest.mark.parametrize("kind", [lambda pages: Threads([pages], "huge", 2), lambda pages: Uring([pages], 3)])
def test_readers_have_huge_pages_read_however_many_are(
    kind: Callable[[Pages], Threads | Uring], file: Path, huge: Pages
) -> None:
    before, turns = kernel_counter("thp_file_mapped"), MANY // CHUNKS
    reader = kind(huge)
    for _ in range(turns):
        reader.submit([(number, 0, number) for number in range(CHUNKS)])
        ended: list[tuple[int, str]] = []
        wait_until(lambda ended=ended: ended.extend(reader.collect()) or len(ended) == CHUNKS, 10, "all are read")  # type: ignore[misc]
        assert sorted(ended) == [(number, "") for number in range(CHUNKS)]
        assert huge.resident(0, CHUNKS) == CHUNKS * CHUNK
        assert drop_cache(file) == 0, "mapped by nobody here"
    assert kernel_counter("thp_file_mapped") - before == CHUNKS * turns
    reader.close()


def test_the_file_is_opened_anew_now_and_then_and_nothing_of_that_stays(
    file: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the 100 misses, on kernels that count none, too: these pass the tests above without it."""
    mapped = lambda: sum(file.name in line for line in Path("/proc/self/maps").read_text().splitlines())  # noqa: E731
    fds = lambda: len([*Path("/proc/self/fd").iterdir()])  # noqa: E731
    before, held = fds(), mapped()
    opened: list[str] = []

    def noting(path: str, *rest: int) -> int:
        opened.append(path)
        return plain(path, *rest)

    plain = os.open
    monkeypatch.setattr(calls.os, "open", noting)
    for number in range(80):
        pages.read(number % CHUNKS, "huge")
    assert opened == [f"/proc/self/fd/{pages.fd}"] * 3
    assert mapped() <= held + 4  # two mappings, which may have a tail apart
    assert fds() == before


def test_a_file_that_may_not_be_opened_again_is_not_read_by_huge_pages(
    huge: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(calls.os, "open", refused)
        another = Pages(huge.fd, huge.pidfd, huge.maps)
        assert not another.comes_huge(1)
        another.read(2, "readahead")
        another.close()
    assert huge.resident(2) == CHUNK


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("next_one", ["read", "pinned", "none"])
def test_a_server_that_touches_a_chunk_makes_the_kernel_read_nothing(path: str, next_one: str, file: Path) -> None:
    assert drop_cache(file) == 0
    server = Server(file, ahead=True)
    fd = os.open(file, os.O_RDONLY)
    pages = Pages(fd, server.pidfd, server.maps)
    try:
        chunk = CHUNKS if next_one == "none" else 1
        {"read": lambda: pages.read(2, "huge"), "pinned": lambda: pages.pin(2), "none": lambda: None}[next_one]()
        before = chunks_there(pages)
        pages.read(chunk, path, bytearray(CHUNK))
        there = chunks_there(pages)
        # What a read(2) reads ahead, and marks, is the kernel's affair.
        assert path == "pread" or there == before | {chunk: whole(pages.length(chunk))}
        server.touch(chunk)
        time.sleep(0.2)
        assert chunks_there(pages) == there
    finally:
        pages.close()
        os.close(fd)
        server.end()
        drop_cache(file)


def test_a_file_that_is_cut_is_an_error_and_no_death(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(3 * CHUNK))
    fd = os.open(path, os.O_RDWR)
    made = Pages(fd, server.pidfd, [])
    os.ftruncate(fd, CHUNK)
    for way in ("huge", "readahead", "fadvise", "willneed"):
        with pytest.raises(OSError, match=r".+"):
            made.read(1, way)
    with pytest.raises(OSError, match=r".+"):
        made.pin(1)
    assert ours(path, "Locked") == 0
    made.read(0, "huge")
    made.close()
    os.close(fd)


def test_a_lock_that_is_refused_leaves_nothing(file: Path) -> None:
    """Without CAP_IPC_LOCK and with no RLIMIT_MEMLOCK: in a child, which can give both up."""
    code = """
import os, resource, sys
from llmtraced.prefetch.pages import Pages
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))
fd = os.open(sys.argv[1], os.O_RDONLY)
made = Pages(fd, os.pidfd_open(os.getpid()), [])
os.setgid(65534), os.setuid(65534)
try:
    made.pin(0)
except OSError as error:
    print(error.errno)
else:
    print(0)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(status["VmLck"].strip())
"""
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert int(first) in (11, 12)  # EAGAIN, ENOMEM
    assert second == "0 kB"


@pytest.mark.parametrize("kind", ["threads", "uring"])
def test_a_reader_brings_all_in_and_leaves_nothing_mapped(kind: str, file: Path, pages: Pages) -> None:
    reader = Threads([pages], "huge", 3) if kind == "threads" else Uring([pages], 3)
    reader.submit((10 + n, 0, n) for n in (4, 0, 5, 1, CHUNKS))
    found: list[tuple[int, str]] = []
    while len(found) < 5:
        found += reader.collect()
    assert sorted(found) == [(n, "") for n in (10, 11, 14, 15, 10 + CHUNKS)]
    reader.close()
    assert chunks_there(pages) == {n: whole(pages.length(n)) for n in (0, 1, 4, 5, CHUNKS)}
    assert ours(file) == 0


def test_advice_to_a_process_that_has_ended_is_an_error(pages: Pages, server: Server) -> None:
    server.touch(1)
    server.child.kill()
    server.child.wait()
    with pytest.raises(ProcessLookupError):
        pages.give_back(1)
