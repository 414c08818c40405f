"""Both units under a real systemd: a server comes, is traced, made faster, restarted; everything ends as it should."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import Machine, missing
from helpers import need, wait_until
from prometheus_client.parser import text_string_to_metric_families

from llmtraced import capabilities
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.pressure import drop_cache

pytestmark = pytest.mark.e2e

MB = 1_000_000
SERVER = """[Unit]
Description=a server
[Service]
ExecStart=/opt/engine/llama-server -m /srv/models/${MODEL} --host 127.0.0.1 --port 8080 -t 1 -c 256 --no-repack -np 1
Environment=MODEL=model.gguf LLAMA_ARG_CACHE_RAM=0 LLAMA_ARG_CTX_CHECKPOINTS=0
User=engine
MemoryMax=225M
"""
USERS = "u engine - -\n"
METRICS = "http://127.0.0.1:9477/metrics"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, llama_server: Path) -> Iterator[Machine]:
    need(not missing(), missing(), "e2e")
    folder = tmp_path_factory.mktemp("systemd")
    (folder / "models").mkdir()
    models.write(folder / "models/model.gguf", models.dense_preset(300 * MB))
    models.write(folder / "models/mixture.gguf", models.moe_preset(300 * MB))
    with Machine(folder, llama_server.parent, folder / "models") as booted:
        booted.write("/etc/sysusers.d/engine.conf", USERS)
        booted.run("systemd-sysusers")
        booted.run("chown", "-R", "engine:", "/srv/models")
        booted.run("chmod", "700", "/srv/models")  # neither of our services may read it by its user
        booted.write("/etc/systemd/system/llama-server.service", SERVER)
        booted.write("/etc/systemd/system/llmtraced.service.d/test.conf", "[Service]\nWatchdogSec=5\n")
        booted.run("systemctl", "daemon-reload")
        yield booted


@pytest.fixture(autouse=True)
def journal(machine: Machine) -> Iterator[None]:
    """Print what was said meanwhile; it is shown with a test that failed."""
    yield
    print(machine.run("journalctl", "--no-pager", "-o", "short-monotonic", "_TRANSPORT=stdout", "+", "_PID=1"))


def scrape(machine: Machine) -> dict[str, dict[str, float]]:
    """Return what the daemon serves: metric → pid → sum of its samples."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(machine.http(METRICS)):
        for sample in family.samples:
            of = found.setdefault(sample.name, {})
            of[sample.labels.get("pid", "")] = of.get(sample.labels.get("pid", ""), 0.0) + sample.value
    return found


def traced(machine: Machine, pid: str) -> bool:
    """Tell whether the daemon has found a server."""
    return scrape(machine).get("llmtraced_mapped_bytes", {}).get(pid, 0) > 0


def ask(machine: Machine, tokens: int, seed: int | None = None) -> list[int]:
    """Have the server generate, and return the tokens: the likeliest, or with a seed others."""
    prompt = [random.Random(7).randrange(10, 200) for _ in range(8)]
    body = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "return_tokens": True}
    body |= {"temperature": 0} if seed is None else {"temperature": 1, "seed": seed}
    found: list[int] = json.loads(machine.http("http://127.0.0.1:8080/completion", body))["tokens"]
    assert len(found) == tokens
    return found


def start_server(machine: Machine, model: str = "model.gguf") -> str:
    """(Re)start it, wait until it answers, and return its process."""
    machine.run("systemctl", "stop", "llama-server")
    drop_cache(machine.path(f"/srv/models/{model}"))  # what others brought in is not charged to it
    machine.run("systemctl", "start", "llama-server")
    wait_until(lambda: machine.run("systemctl", "is-active", "llama-server", check=False) == "active", 20, "it runs")

    def healthy() -> bool:
        code = "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=5)"
        return machine.run("sh", "-c", f'python3 -c "{code}" 2>&- && echo yes', check=False) == "yes"

    wait_until(healthy, 60, "the server answers")
    return machine.show("llama-server", "MainPID")[0]


def writable_code(machine: Machine, pid: str) -> list[str]:
    """Return the mappings of a process that can be written and executed."""
    lines = machine.path(f"/proc/{pid}/maps").read_text().splitlines()
    assert lines
    return [line for line in lines if "wx" in line.split()[1]]


def capabilities_of(machine: Machine, pid: str) -> set[str]:
    """Return what any thread of a process may do, of the capabilities that matter to us."""
    tasks = machine.path(f"/proc/{pid}/task").glob("*/status")
    return set().union(*(capabilities.held(task.read_text()) for task in tasks))


def test_the_daemon_from_start_to_stop(machine: Machine) -> None:
    machine.run("systemctl", "start", "llmtraced")  # returns when it is ready
    assert machine.show("llmtraced", "ActiveState", "NRestarts") == ["active", "0"]
    daemon = machine.show("llmtraced", "MainPID")[0]
    status = machine.path(f"/proc/{daemon}/status").read_text()
    uid = machine.run("id", "-u", "llmtraced")
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
    assert capabilities_of(machine, daemon) == {
        *("CAP_PERFMON", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_CHECKPOINT_RESTORE"),
    }, "CAP_BPF is given up once everything is loaded, by every thread"

    assert machine.show("llmtraced", "MemoryDenyWriteExecute") == ["yes"]  # for the child that compiled, too
    assert writable_code(machine, daemon) == []

    first = start_server(machine)
    wait_until(lambda: traced(machine, first), 20, "the server is found")
    ask(machine, 4)
    found = scrape(machine)
    assert found["llmtraced_tokens_total"][first] >= 3  # the first one is of the prompt
    assert found["llmtraced_tensor_faults_total"][first] > 100
    assert found["llmtraced_tensor_read_bytes_total"][first] > 300 * MB, "more than memory holds"
    assert f"tracing {first}, detail faults" in machine.run("systemctl", "status", "llmtraced")

    second = start_server(machine)
    assert second != first
    wait_until(lambda: traced(machine, second), 20, "the next one is found")
    ask(machine, 3)
    assert not traced(machine, first)

    machine.run("systemctl", "stop", "llmtraced")
    assert machine.show("llmtraced", "ActiveState") == ["inactive"]
    said = machine.journal("llmtraced")
    assert f"tracing process {first} (llama-server) with model.gguf" in said
    assert f"process {first} has ended" in said
    assert said.index("everything is on disk") < said.index("llmtraced.service: Deactivated successfully")
    folder = machine.path("/var/lib/llmtraced")
    assert (folder.stat().st_mode & 0o777, folder.stat().st_uid) == (0o750, int(uid))
    sessions = [str(s) for s in open_trace(folder).sessions]
    for pid in (first, second):
        (session,) = [s for s in sessions if f"-{pid}-" in s]
        trace = open_trace(folder, session)
        assert trace.table("faults").collect().height > 100
        assert trace.table("tokens").collect()["n_tokens"].sum() >= 10  # the prompt's 8, and more

    (image,) = machine.path("/var/cache/llmtraced/programs").iterdir()
    compiled = image.stat()
    assert (compiled.st_mode & 0o777, compiled.st_uid) == (0o600, int(uid))
    machine.run("systemctl", "start", "llmtraced")
    assert image.stat().st_mtime_ns == compiled.st_mtime_ns, "it was not compiled again"
    machine.run("systemctl", "stop", "llmtraced")


def test_a_daemon_that_hangs_is_started_again(machine: Machine) -> None:
    machine.run("systemctl", "start", "llmtraced")
    server = start_server(machine)
    before = machine.show("llmtraced", "MainPID")[0]
    wait_until(lambda: traced(machine, server), 20, "the server is found")
    os.kill(machine.here(int(before)), signal.SIGSTOP)
    wait_until(lambda: machine.show("llmtraced", "NRestarts")[0] == "1", 60, "the watchdog bites")
    wait_until(lambda: machine.show("llmtraced", "ActiveState")[0] == "active", 60, "it is up again")
    assert machine.show("llmtraced", "MainPID")[0] != before
    assert "Watchdog timeout" in machine.journal("llmtraced")
    wait_until(lambda: traced(machine, server), 20, "the server is found again")
    ask(machine, 2)
    assert machine.show("llama-server", "MainPID", "NRestarts") == [server, "0"]
    machine.run("systemctl", "stop", "llmtraced")


def test_a_wrong_configuration_is_said_once(machine: Machine) -> None:
    path = machine.path("/etc/llmtraced.toml")
    text = path.read_text()
    machine.write("/etc/llmtraced.toml", text + "flsh = 3\n")
    try:
        machine.run("systemctl", "start", "llmtraced", check=False)
        assert machine.show("llmtraced", "ActiveState", "Result", "ExecMainStatus", "NRestarts") == [
            *("failed", "exit-code", "2", "0"),
        ]
        line = len(text.splitlines()) + 1
        assert f"/etc/llmtraced.toml, line {line}: flsh: no such key" in machine.journal("llmtraced")
    finally:
        machine.write("/etc/llmtraced.toml", text)
        machine.run("systemctl", "reset-failed", "llmtraced")


UNIT = "llmtraced-prefetch@llama-server"


def engaged(machine: Machine) -> bool:
    """Have the server do something, and tell whether its prefetcher works."""
    ask(machine, 1)
    return "engaged" in machine.show(UNIT, "StatusText")[0]


def test_the_prefetcher_comes_and_goes_with_its_server(machine: Machine) -> None:
    machine.run("systemctl", "enable", UNIT)
    server = start_server(machine)
    assert machine.show(UNIT, "ActiveState", "SubState") == ["activating", "start-pre"], "it waits for a token"
    plain = ask(machine, 6)
    wait_until(lambda: ask(machine, 1) and machine.show(UNIT, "ActiveState")[0] == "active", 60, "it is active")
    wait_until(lambda: engaged(machine), 60, "it works")
    assert ask(machine, 6) == plain
    sidecar = machine.show(UNIT, "MainPID")[0]
    status = machine.path(f"/proc/{sidecar}/status").read_text()
    uid = int(status.split("Uid:")[1].split()[0])
    assert 61184 <= uid <= 65519, "a user made for it"
    assert not capabilities_of(machine, sidecar) & {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"}
    wait_until(lambda: memory_cgroup(machine, sidecar) == memory_cgroup(machine, server), 10, "the server pays for it")
    wait_until(lambda: metric(machine, "pinned_bytes") > 50 * MB, 20, "it pins")

    again = start_server(machine)
    assert again != server
    wait_until(lambda: ask(machine, 1) and machine.show(UNIT, "ActiveState")[0] == "active", 60, "it has come again")
    assert machine.show(UNIT, "MainPID")[0] != sidecar
    machine.run("systemctl", "stop", UNIT)
    assert machine.show(UNIT, "ActiveState") == ["inactive"]
    assert machine.journal(UNIT).count("Deactivated successfully") == 2  # with the first server, and now
    assert machine.show("llama-server", "MainPID", "ActiveState") == [again, "active"]
    assert ask(machine, 6) == plain


def test_the_prefetcher_works_out_routers_where_no_code_may_be_made(machine: Machine) -> None:
    """Its code comes in a file that is mapped to be read and executed, which MemoryDenyWriteExecute= allows."""
    settings = {
        "llama-server.service": "MODEL=mixture.gguf",
        "llmtraced-prefetch@.service": '"OPTIONS=--strategy moe --trial 0"',
    }
    paths = {unit: f"/etc/systemd/system/{unit}.d/mixture.conf" for unit in settings}
    try:
        for unit, value in settings.items():
            machine.write(paths[unit], f"[Service]\nEnvironment={value}\n")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "enable", UNIT)
        start_server(machine, "mixture.gguf")
        expected = ask(machine, 6, seed=7)
        wait_until(lambda: ask(machine, 1) and machine.show(UNIT, "ActiveState")[0] == "active", 60, "it is active")
        wait_until(lambda: engaged(machine), 60, "it works")
        seeds = iter(range(1000))  # other tokens use other experts, which are not in memory

        def used() -> bool:
            ask(machine, 6, next(seeds))
            return metric(machine, "expert_used_bytes_total") > 0

        wait_until(used, 60, "it has fetched experts that were then used")
        assert ask(machine, 6, seed=7) == expected
        assert machine.show(UNIT, "MemoryDenyWriteExecute", "NRestarts") == ["yes", "0"]
        sidecar = machine.show(UNIT, "MainPID")[0]
        maps = machine.path(f"/proc/{sidecar}/maps").read_text().splitlines()
        assert [line.split()[1] for line in maps if "memfd:llmtraced-router" in line] == ["r-xp"]
        assert writable_code(machine, sidecar) == []
    finally:
        print(machine.run("cat", "/run/llmtraced-prefetch-llama-server/metrics.prom", check=False))
        machine.run("systemctl", "stop", UNIT, "llama-server")
        for path in paths.values():
            machine.path(path).unlink()
        machine.run("systemctl", "daemon-reload")


def memory_cgroup(machine: Machine, pid: str) -> str:
    """Return the memory cgroup of a process: that of version 1 where there is one."""
    lines = machine.path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next((line for line in lines if ":memory:" in line), lines[-1])


def metric(machine: Machine, name: str) -> float:
    """Return what the sidecar last wrote of itself."""
    text = machine.path("/run/llmtraced-prefetch-llama-server/metrics.prom").read_text()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return next(s.value for s in samples if s.name == f"llmtraced_prefetch_{name}")
