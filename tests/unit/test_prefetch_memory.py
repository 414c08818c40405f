"""How much memory there is for the model, from control files of cgroup v1 and v2 that are made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtraced.prefetch.memory import Memory, anonymous_bytes

MIB = 1 << 20
UNLIMITED = {1: "9223372036854771712", 2: "max"}
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.failcnt"),
    2: ("memory.max", "memory.current", "memory.events"),
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {8 << 20} kB\n")  # 8 GiB
    return proc


def group(folder: Path, version: int, limit: int | None, usage: int, hits: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text("")
    names = NAMES[version]
    (folder / names[0]).write_text(f"{UNLIMITED[version] if limit is None else limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    strike(folder, version, hits)
    return folder


def strike(folder: Path, version: int, hits: int) -> None:
    text = f"{hits}\n" if version == 1 else f"low 7\nhigh 0\nmax {hits}\noom 0\noom_kill 5\n"
    (folder / NAMES[version][2]).write_text(text)


def memory(folder: Path | str, version: int, machine: Path) -> Memory:
    return Memory(str(folder), version, 17, str(machine))


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_not_the_model_is_taken_off_the_limit(version: int, tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", version, 1000 * MIB, 900 * MIB)
    m = memory(folder, version, machine)
    assert m.room(resident=700 * MIB, locked=100 * MIB) == 800 * MIB
    assert m.room(resident=950 * MIB, locked=0) == 1000 * MIB  # more resident than charged: charged elsewhere
    assert m.room(resident=0, locked=0) == 100 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_where_residency_is_not_known_the_cgroups_cache_is_the_models(
    version: int, tmp_path: Path, machine: Path
) -> None:
    folder = group(tmp_path / "mnt" / "server", version, 1000 * MIB, 990 * MIB)
    names = ("total_cache", "total_shmem") if version == 1 else ("file", "shmem")
    text = "cache 1\nshmem 1\n" if version == 1 else "anon 1\n"
    (folder / "memory.stat").write_text(f"{text}{names[0]} {760 * MIB}\n{names[1]} {20 * MIB}\npgfault 5\n")
    m = memory(folder, version, machine)
    assert m.room(resident=None, locked=0) == (1000 - 990 + 760 - 20) * MIB
    (folder / "memory.stat").unlink()
    assert memory(folder, version, machine).room(resident=None, locked=0) == 10 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_that_is_changed_is_seen(version: int, tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", version, 1000 * MIB, 900 * MIB)
    m = memory(folder, version, machine)
    (folder / NAMES[version][0]).write_text(f"{500 * MIB}\n")
    assert m.room(700 * MIB, 0) == 300 * MIB
    (folder / NAMES[version][0]).write_text(f"{100 * MIB}\n")
    assert m.room(700 * MIB, 0) == 0  # never negative


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_the_groups_above_count(version: int, tmp_path: Path, machine: Path) -> None:
    root = group(tmp_path / "mnt", version, None, 5000 * MIB)
    middle = group(root / "slice", version, 600 * MIB, 550 * MIB)
    inner = group(middle / "server", version, 1000 * MIB, 500 * MIB)
    m = memory(inner, version, machine)
    assert m.room(resident=400 * MIB, locked=0) == 600 * MIB - 150 * MIB
    (middle / NAMES[version][0]).write_text(UNLIMITED[version])
    assert m.room(resident=400 * MIB, locked=0) == 900 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_means_the_machine(version: int, tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", version, None, 900 * MIB)
    assert memory(folder, version, machine).room(700 * MIB, 100 * MIB) == (8192 + 100) * MIB


def test_no_cgroup_means_the_machine(machine: Path) -> None:
    m = memory("", 2, machine)
    assert m.room(700 * MIB, 100 * MIB) == (8192 + 100) * MIB
    assert m.struck() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_machine_that_is_short_counts_as_well(version: int, tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", version, 1000 * MIB, 900 * MIB)
    (machine / "meminfo").write_text(f"MemAvailable: {50 << 10} kB\n")
    assert memory(folder, version, machine).room(700 * MIB, 100 * MIB) == 150 * MIB


def test_a_group_that_has_gone_leaves_the_machine(tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 2, 1000 * MIB, 900 * MIB)
    m = memory(folder, 2, machine)
    for file in folder.iterdir():
        file.unlink()
    assert m.room(0, 0) == 8192 * MIB
    assert m.struck() == 0


@pytest.mark.parametrize(("high", "room"), [("max", 800), (str(600 * MIB), 400), (str(2000 * MIB), 800)])
def test_memory_high_throttles_and_so_it_is_a_limit(high: str, room: int, tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 2, 1000 * MIB, 900 * MIB)
    (folder / "memory.high").write_text(f"{high}\n")
    assert memory(folder, 2, machine).room(700 * MIB, 0) == room * MIB


def test_memory_high_without_a_limit(tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 2, None, 900 * MIB)
    (folder / "memory.high").write_text(f"{600 * MIB}\n")
    assert memory(folder, 2, machine).room(700 * MIB, 0) == 400 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_runs_into_the_limit_are_counted_from_call_to_call(version: int, tmp_path: Path, machine: Path) -> None:
    root = group(tmp_path / "mnt", version, None, 0, hits=1000)
    folder = group(root / "server", version, 1000 * MIB, 900 * MIB, hits=41)
    m = memory(folder, version, machine)
    assert m.struck() == 0  # what was before does not count
    strike(folder, version, 44)
    assert m.struck() == 3
    assert m.struck() == 0
    strike(root, version, 1001)
    assert m.struck() == 1


def test_of_the_events_of_v2_those_that_hurt_count(tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 2, 1000 * MIB, 900 * MIB)
    m = memory(folder, 2, machine)
    (folder / "memory.events").write_text("low 100\nhigh 2\nmax 3\noom 4\noom_kill 100\n")
    assert m.struck() == 9


PRESSURE = "some avg10=50.00 avg60=1.00 avg300=0.00 total=1\nfull avg10={} avg60=1.00 avg300=0.00 total=1\n"


def test_the_cgroups_own_pressure_is_read(tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 2, 1000 * MIB, 900 * MIB)
    (machine / "pressure").mkdir()
    (machine / "pressure" / "memory").write_text(PRESSURE.format("99.00"))
    m = memory(folder, 2, machine)
    assert m.stalled_share() == pytest.approx(0.99)
    (folder / "memory.pressure").write_text(PRESSURE.format("12.50"))
    assert m.stalled_share() == pytest.approx(0.125)


def test_v1_has_the_machines_pressure(tmp_path: Path, machine: Path) -> None:
    folder = group(tmp_path / "mnt" / "server", 1, 1000 * MIB, 900 * MIB)
    assert memory(folder, 1, machine).stalled_share() == 0.0  # a kernel without PSI
    (machine / "pressure").mkdir()
    (machine / "pressure" / "memory").write_text(PRESSURE.format("3.00"))
    assert memory(folder, 1, machine).stalled_share() == pytest.approx(0.03)


@pytest.mark.parametrize("text", ["", "some avg10=1.00\n", "full\n", "full avg10=x avg60=1\n"])
def test_pressure_that_cannot_be_read_is_none(text: str, machine: Path) -> None:
    (machine / "pressure").mkdir()
    (machine / "pressure" / "memory").write_text(text)
    assert memory("", 2, machine).stalled_share() == 0.0


def test_anonymous_memory(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmRSS:  9 kB\nRssAnon:\t    7312 kB\nRssFile:\t 8 kB\n")
    assert anonymous_bytes(str(status)) == 7312 * 1024
    status.write_text("Name: kthreadd\n")
    assert anonymous_bytes(str(status)) == 0


def test_what_the_server_has_of_its_own(machine: Path) -> None:
    memory = Memory("", 2, 17, str(machine))
    assert memory.anonymous_of_server() == 0  # it has ended
    (machine / "17").mkdir()
    (machine / "17" / "statm").write_text("900 500 420 1 0 80 0\n")
    assert memory.anonymous_of_server() == 80 * 4096
    (machine / "17" / "statm").write_text("")
    assert memory.anonymous_of_server() == 0
