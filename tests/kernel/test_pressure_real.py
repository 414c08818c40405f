"""The measuring stick itself, on the running kernel: exact faults, a real limit, a cache that is really dropped.

Needs root and nothing of BPF; tests/conftest.py has the switch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from helpers import need

from llmtraced import residency
from llmtraced.bench import models, pressure, touch
from llmtraced.errors import LlmtracedError

pytestmark = pytest.mark.kernel("root")

MIB = 1 << 20


def fail_inside(group, pid):
    with group:
        group.add(pid)
        assert group.pids() == [pid]
        raise ZeroDivisionError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pressure")
    path = models.write(folder / "m.gguf", models.dense_preset(64_000_000))
    need(pressure.drop_cache(path) == 0, f"{folder} is on a file system without a droppable page cache (tmpfs?)")
    return path


@pytest.fixture
def controller():
    try:
        return pressure.memory_controller()
    except LlmtracedError as error:
        need(False, str(error))


def test_touch_makes_exactly_the_faults_it_was_told(model):
    offsets = touch.choose_offsets(model.stat().st_size, 997)
    for _ in range(10):
        assert pressure.drop_cache(model) == 0
        with touch.Touch(model, offsets) as program:
            done = program.go()
        assert (done["majflt"], done["read_bytes"]) == (997, 997 * 4096)
        assert done["minflt"] <= 1


def test_touch_with_threads_and_an_offset_mapping(model):
    offsets = [MIB + offset for offset in touch.choose_offsets(model.stat().st_size - MIB, 499)]
    assert pressure.drop_cache(model) == 0
    with touch.Touch(model, offsets, "--threads", "3", "--map-offset", str(MIB)) as program:
        done = program.go()
    assert (done["majflt"], done["read_bytes"]) == (499, 499 * 4096)
    assert done["minflt"] <= 5


def test_pread_reads_the_same_pages_without_faults(model):
    offsets = touch.choose_offsets(model.stat().st_size, 499)
    assert pressure.drop_cache(model) == 0
    with touch.Touch(model, offsets, "--pread") as program:
        done = program.go()
    assert (done["majflt"], done["read_bytes"]) == (0, 499 * 4096)


def test_flood_makes_exactly_n_minor_faults(model):
    with touch.Touch(model, None, "--flood", "100003") as program:
        done = program.go()
    assert (done["majflt"], done["minflt"], done["read_bytes"]) == (0, 100_003, 0)


def test_drop_cache_drops_and_resident_bytes_sees_it(model):
    size = model.stat().st_size
    model.read_bytes()
    assert pressure.resident_bytes(model) > 0.99 * size  # proactive reclaim may be quick, but not that quick
    assert pressure.drop_cache(model) == 0
    with model.open("rb") as file:
        assert not residency._mincore_pages(file.fileno(), size).any()


def test_the_cgroup_limits_a_processes_page_cache(model, controller):
    limit = 24 * MIB
    code = "import sys; f = open(sys.argv[1], 'rb', 0)\nwhile f.read(65536): pass\nprint('read', flush=True); input()"
    assert pressure.drop_cache(model) == 0
    with pressure.MemoryCgroup(f"llmtraced-test-{os.getpid()}", limit, controller=controller) as group:
        command = group.enter_command([sys.executable, "-c", code, str(model)])
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout.readline() == "read\n"
            assert group.pids() == [child.pid]
            assert group.usage() <= limit
            stat = group.stat()
            assert 4 * MIB < stat["file_bytes"] < limit
            assert stat["pgfault"] > 0
            assert pressure.resident_bytes(model) < limit < model.stat().st_size / 2
            group.set_limit(limit // 2)
            assert group.usage() <= limit // 2
        finally:
            child.communicate("\n")
    assert not group.path.exists()


def test_the_cgroup_is_removed_with_a_process_still_in_it(controller):
    child = subprocess.Popen(["sleep", "60"])
    try:
        group = pressure.MemoryCgroup(f"llmtraced-test-{os.getpid()}", None, controller=controller)
        with pytest.raises(ZeroDivisionError):
            fail_inside(group, child.pid)
        assert not group.path.exists()
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_readahead_setting_governs_a_fault(model):
    """One touch without MADV_RANDOM reads about the readahead that was set (a fault reads around itself)."""
    try:
        file = pressure.read_ahead_file(model)
    except LlmtracedError as error:
        need(False, str(error))
    before = file.read_text()
    read = {}
    for kb in (64, 1024):
        with pressure.ReadAhead(model, kb):
            assert pressure.drop_cache(model) == 0
            with touch.Touch(model, [20 * MIB], "--readahead") as program:
                program.go()
            time.sleep(0.1)  # what was read ahead arrives after the page that was asked for
            read[kb] = pressure.resident_bytes(model)
    assert file.read_text() == before
    assert 4096 < read[64] <= 2 * 64 * 1024
    assert 512 * 1024 <= read[1024] <= 2 * MIB
