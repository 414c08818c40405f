"""The sidecar and a real llama-server whose model is larger than its memory.

What is promised: tokens stay the same byte for byte, the server reads less, its memory limit holds, and nothing stays
behind when the sidecar goes, however it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import EMULATED, need, wait_until
from running import Sidecar, asking, read_bytes

from llmtraced.bench import models
from llmtraced.bench.engine import Server
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.errors import LlmtracedError
from llmtraced.gguf_map import read_model
from llmtraced.prefetch import plan as plans
from llmtraced.prefetch.guesses import DEFAULT, SOURCES

pytestmark = pytest.mark.e2e

MB = 1_000_000
MIB = 1 << 20
SIZE, LIMIT = (80 * MB, 84 * MB) if EMULATED else (300 * MB, 225 * MB)  # 20 MB of it are the server's own
PROMPT = list(range(20, 27))
TOKENS = 4 if EMULATED else 16
HARDLY = 2 * MIB
"""Locked memory that is no chunk: the kernel takes pages off its list of locked ones in batches, one a processor."""


def read_per_token(server: Server, expected: str = "") -> float:
    """Return the bytes that the server itself reads for a token, and check what it says."""
    before = read_bytes(server.pid)
    content = server.completion(PROMPT, TOKENS)["content"]
    assert content == expected or not expected
    return (read_bytes(server.pid) - before) / TOKENS


def reads_less(server: Server, expected: str, than: float) -> None:
    """Assert that some answer soon takes fewer bytes a token: beside other load the server overtakes the sidecar."""
    read: list[float] = []
    while not read or min(read) >= than:
        assert len(read) < 10, f"{read} bytes a token, none less than {than}"
        read.append(read_per_token(server, expected))


def locked(group: MemoryCgroup) -> int:
    return group.stat()["unevictable_bytes"]


def let_go(server: Server, group: MemoryCgroup) -> None:
    """Wait until nothing is locked, and nobody else is there: who holds pages ends when its pipe does."""
    wait_until(lambda: locked(group) < HARDLY, 10, "what was locked is let go of")
    wait_until(lambda: {*group.pids()} <= {server.pid}, 10, "nobody else is there")


def answers_stay(server: Server, sidecar: Sidecar, expected: str, times: int, settings: dict[str, Any]) -> None:
    """Have the server answer until the sidecar is engaged, and then some times more: always the same."""
    deadline = time.monotonic() + (300 if EMULATED else 60)
    while not sidecar.metrics().get("engaged"):
        assert time.monotonic() < deadline, sidecar.said()
        assert server.completion(PROMPT, TOKENS, **settings)["content"] == expected
    for _ in range(times):
        assert server.completion(PROMPT, TOKENS, **settings)["content"] == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("prefetch") / "dense.gguf", models.dense_preset(SIZE))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of its own: pages belong to the cgroup that read them first, and one server has the other's mapped."""
    return models.write(tmp_path_factory.mktemp("prefetch") / "another.gguf", models.dense_preset(SIZE))


@pytest.fixture(scope="module")
def start(llama_server: Path, another: Path) -> Callable[..., Any]:
    """Return what starts a server in a memory cgroup of some limit."""

    @contextlib.contextmanager
    def starter(
        limit: int | None, name: str, model: Path = another, ctx: int = 256, extra: tuple[str, ...] = ()
    ) -> Iterator[tuple[Server, MemoryCgroup]]:
        dropped = [drop_cache(file) for file in sorted(model.parent.glob("*.gguf"))]
        need(not sum(dropped), f"{model.parent} has no page cache that can be dropped (tmpfs?)", "e2e")
        with (
            MemoryCgroup(f"llmtraced-prefetch-{name}{os.getpid()}", limit) as group,
            Server(model, binary=llama_server, ctx=ctx, extra=("--no-repack", *extra), cgroup=group) as server,
        ):
            yield server, group
            assert group.stat().get("oom_kill", 0) == 0

    return starter


@pytest.fixture(scope="module")
def pressed(start: Callable[..., Any], model: Path) -> Iterator[tuple[Server, MemoryCgroup]]:
    """A server that has three quarters of what its model needs, shared by tests that leave it as it was."""
    with start(LIMIT, "", model) as (server, group):
        yield server, group


@pytest.fixture(scope="module")
def expected(pressed: tuple[Server, MemoryCgroup]) -> str:
    """What the server says without a sidecar."""
    content: str = pressed[0].completion(PROMPT, TOKENS)["content"]
    assert content
    return content


@pytest.fixture(scope="module")
def unaided(pressed: tuple[Server, MemoryCgroup], expected: str) -> float:
    """Bytes that the server reads for a token without a sidecar: the middle of five answers, 207 to 300 MB each."""
    nbytes = statistics.median(read_per_token(pressed[0], expected) for _ in range(5))
    assert nbytes > 0.2 * SIZE, "the limit is no pressure"
    return nbytes


def test_tokens_stay_the_same_and_reads_fall(
    pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    with Sidecar(server.pid, tmp_path) as sidecar:
        with asking(server, expected):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
            most = 0
            for _ in range(20):
                most = max(most, group.usage())
                time.sleep(0.05)
        assert most <= LIMIT
        reads_less(server, expected, unaided / 2)
        time.sleep(1.2)
        metrics = sidecar.metrics()
        assert metrics["engaged"] == 1
        assert 0 < metrics["pinned_bytes"] <= LIMIT
        assert locked(group) == pytest.approx(metrics["pinned_bytes"], abs=HARDLY)

        # It is small, has none of the launcher's libraries, and is charged where the server is.
        assert sidecar.bare()
        proc = Path(f"/proc/{sidecar.child.pid}")
        anonymous = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("RssAnon"))
        assert int(anonymous.split()[1]) <= 25 * 1024
        mapped = {
            Path(fields[5]).name
            for line in (proc / "maps").read_text().splitlines()
            if len(fields := line.split(maxsplit=5)) == 6
        }
        assert any("python" in name or "libc" in name for name in mapped)
        assert not [
            name for name in mapped for word in ("numpy", "bcc", "LLVM", "pyarrow", "polars", "gguf.") if word in name
        ]
        assert sidecar.child.pid in group.pids()
        wait_until(sidecar.first, 20, "all of its threads go before the server's")

        summary = sidecar.end()
    assert summary["state"] == "engaged"
    assert summary["pinned_bytes"] == metrics["pinned_bytes"]  # until it let go
    assert summary["clock"] == "ticks"
    assert summary["ticks_lost"] < summary["tokens"]  # told, not hidden
    assert summary["failed_reads"] == 0
    assert summary["used_bytes"] > 0
    let_go(server, group)
    assert not proc.exists()
    assert read_per_token(server, expected) > unaided / 2  # as before: nothing was left behind


def mapped_huge(server: Server) -> int:
    lines = Path(f"/proc/{server.pid}/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("FilePmdMapped:"))


def test_huge_pages_of_a_server_that_has_just_started_are_kept(start: Callable[..., Any], tmp_path: Path) -> None:
    """Each token that finds some of the model gone costs huge pages, for good: so nothing is watched before."""
    with start(None, "huge-") as (server, group):
        group.set_limit(LIMIT)  # a model that is as small as this one is driven through all of it before it is up
        begun = mapped_huge(server)
        if begun < SIZE // 3:
            pytest.skip(f"only {begun} bytes of the model are mapped by huge pages here")
        with Sidecar(server.pid, tmp_path) as sidecar:
            wait_until(lambda: "waiting for process" in sidecar.said(), 60, "the clock runs")
            assert "in huge pages" in sidecar.said()
            assert begun // 2 < locked(group) <= begun
            answers = set()
            with asking(server):
                wait_until(sidecar.settled, 60, "the sidecar is engaged")
            for _ in range(3):
                answers.add(server.completion(PROMPT, TOKENS)["content"])
            assert sidecar.metrics()["pinned_bytes"] == pytest.approx(locked(group), abs=HARDLY)
            kept = mapped_huge(server)
            summary = sidecar.end()
        assert summary["state"] == "engaged"
        assert "huge pages" in summary["why"]
        let_go(server, group)
        for _ in range(3):
            answers.add(server.completion(PROMPT, TOKENS)["content"])
        assert len(answers) == 1
        assert kept > begun // 4  # some go while the launcher becomes the sidecar; the window is 24 MB
        assert mapped_huge(server) < kept // 4, "without it they go"


GROW = """
import time
grown = []
for _ in range(60):
    grown.append(bytearray(b"x") * (2 << 20))
    time.sleep(0.02)
print("grown", flush=True)
time.sleep(60)
"""


def test_what_is_kept_goes_at_once_when_the_memory_is_needed(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(None, "needed-") as (server, group):
        group.set_limit(LIMIT)
        if mapped_huge(server) < SIZE // 3:
            pytest.skip("too little of the model is mapped by huge pages here")
        with Sidecar(server.pid, tmp_path) as sidecar:
            wait_until(lambda: "waiting for process" in sidecar.said(), 60, "the clock runs")
            assert locked(group) > SIZE // 4
            with subprocess.Popen([sys.executable, "-S", "-c", GROW], stdout=subprocess.PIPE, text=True) as other:
                try:
                    group.add(other.pid)
                    assert other.stdout is not None
                    assert other.stdout.readline() == "grown\n"
                    assert locked(group) < HARDLY
                finally:
                    other.kill()
            assert not sidecar.bare()  # it waits for a token, as before
            assert server.completion(PROMPT, TOKENS)["content"]
            sidecar.end()


def test_off_changes_nothing(
    pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    with Sidecar(server.pid, tmp_path, "--strategy", "off") as sidecar:
        with asking(server, expected):
            wait_until(lambda: sidecar.metrics().get("tokens_total", 0) > 5, 60, "tokens are seen")
        assert read_per_token(server, expected) > unaided / 2
        assert locked(group) < HARDLY
        summary = sidecar.end(signal.SIGINT)
    assert summary["state"] == "watching"
    assert (summary["pinned_bytes"], summary["prefetched_bytes"]) == (0, 0)
    assert summary["model_bytes"] > 0.9 * SIZE  # what would be managed


def test_the_page_table_is_a_clock_as_well(
    pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    with Sidecar(server.pid, tmp_path, "--clock", "pagetable") as sidecar:
        with asking(server, expected):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
        reads_less(server, expected, unaided / 2)
        summary = sidecar.end()
    assert summary["clock"] == "page table"
    assert summary["failed_reads"] == 0
    let_go(server, group)


@pytest.mark.parametrize("strategy", ["pin", "pattern", "uring"])
def test_each_strategy_works(
    strategy: str, pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    with Sidecar(server.pid, tmp_path, "--strategy", strategy, "--trial", "0") as sidecar:
        with asking(server, expected):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
        if strategy == "pin":
            reads_less(server, expected, unaided * 0.8)  # 146 to 181 MB each: a third is not pinned
        summary = sidecar.end()
    assert (summary["prefetched_bytes"] == 0) == (strategy == "pin")
    assert summary["failed_reads"] == 0
    assert summary["path"] == {"pin": "huge", "pattern": "readahead", "uring": "uring"}[strategy]
    let_go(server, group)


def test_a_plan_of_another_model_is_refused(pressed: tuple[Server, MemoryCgroup], tmp_path: Path) -> None:
    other = read_model(models.write(tmp_path / "other.gguf", models.TINY_DENSE))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plans.from_tensors("other.gguf", other).to_json()))
    command = Sidecar(pressed[0].pid, tmp_path, "--plan", str(path)).command
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "is a plan of other.gguf" in done.stderr
    assert other.fingerprint in done.stderr


def test_a_plan_of_this_model_is_followed(
    pressed: tuple[Server, MemoryCgroup], model: Path, expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plans.from_tensors(model.name, read_model(model)).to_json()))
    with Sidecar(server.pid, tmp_path, "--plan", str(path), "--trial", "0") as sidecar:
        with asking(server, expected):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
        reads_less(server, expected, unaided / 2)
        sidecar.end()
    let_go(server, group)


def test_a_model_that_fits_is_left_alone(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(None, "fits-") as (server, group):
        with Sidecar(server.pid, tmp_path) as sidecar:
            with asking(server):
                wait_until(lambda: sidecar.metrics().get("tokens_total", 0) > 10, 60, "tokens are seen")
                time.sleep(1.2)
            metrics = sidecar.metrics()
            assert (metrics["engaged"], metrics["pinned_bytes"], metrics["prefetched_bytes_total"]) == (0, 0, 0)
            assert locked(group) < HARDLY
            summary = sidecar.end()
        assert summary["state"] == "fits"


def test_it_ends_with_the_server(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(LIMIT, "ends-") as (server, group), Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
        with asking(server):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
        server.close()
        summary = sidecar.summary()
        assert summary["used_bytes"] > 0
        assert f"process {server.pid} has ended" in sidecar.said()
        assert "Traceback" not in sidecar.said()
        let_go(server, group)


def test_it_ends_with_a_server_that_is_killed_in_a_token(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(LIMIT, "killed-") as (server, _), Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
        with asking(server):
            wait_until(sidecar.settled, 60, "the sidecar is engaged")

        def ask() -> None:
            with contextlib.suppress(LlmtracedError):
                server.completion(PROMPT, 200)

        client = threading.Thread(target=ask)
        client.start()
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGKILL)
        client.join()
        sidecar.summary()
        assert "Traceback" not in sidecar.said()


def test_it_follows_the_limit(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(LIMIT, "limit-") as (server, group):
        expected = server.completion(PROMPT, TOKENS)["content"]
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
            with asking(server, expected):
                wait_until(sidecar.settled, 60, "the sidecar is engaged")
                before = sidecar.metrics()["pinned_bytes"]
                # By more than the 24 MB that it may learn meanwhile to leave free (sidecar._adapt).
                lower = LIMIT - 60 * MB
                # As an administrator would: the kernel refuses (v1) or kills (v2) where too much is locked at once.
                for limit in range(LIMIT - 5 * MB, lower - 1, -5 * MB):
                    group.set_limit(limit)
                    time.sleep(0.6)
                wait_until(
                    lambda: sidecar.settled() and sidecar.metrics()["pinned_bytes"] <= before - 20 * MB,
                    30,
                    "less is pinned",
                )
                less = sidecar.metrics()["pinned_bytes"]
                assert group.usage() <= lower
                group.set_limit(LIMIT)
                wait_until(
                    lambda: sidecar.settled() and sidecar.metrics()["pinned_bytes"] >= less + 20 * MB,
                    30,
                    "more is pinned",
                )
                assert group.usage() <= LIMIT
            sidecar.end()
        let_go(server, group)


def test_a_prompt_that_needs_memory_has_no_more_read_for_it(start: Callable[..., Any], tmp_path: Path) -> None:
    with start(LIMIT, "prompt-", ctx=512) as (server, group):
        server.completion([5], 4)  # each of its graphs is one token: it has touched no buffers of a batch yet
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
            with asking(server, prompt=[5], tokens=4):
                wait_until(sidecar.settled, 60, "the sidecar is engaged")
            before, pinned = read_bytes(sidecar.child.pid), sidecar.metrics()["pinned_bytes"]
            server.completion([20 + i % 90 for i in range(256)], 1)
            time.sleep(1.2)
            after = sidecar.metrics()["pinned_bytes"]
            assert after < pinned, "the prompt needed no memory"
            read = read_bytes(sidecar.child.pid) - before
            streamed = sidecar.end()["model_bytes"] - after
            print(f"{read} bytes read for the prompt, {streamed} are streamed")
            assert read <= 1.1 * streamed + 24 * MIB  # of the window: what the next token needs first
        let_go(server, group)


def test_slots_prompts_shifted_contexts_and_idle_times(start: Callable[..., Any], tmp_path: Path) -> None:
    slots = ("--parallel", "2", "--context-shift")
    with start(LIMIT + 16 * MIB, "slots-", ctx=512, extra=slots) as (server, group):
        expected = server.completion(PROMPT, TOKENS)["content"]
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
            with asking(server, expected):
                wait_until(sidecar.settled, 60, "the sidecar is engaged")
            before, tokens = read_bytes(server.pid), sidecar.metrics()["tokens_total"]
            lengths: list[int] = []

            def ask(prompt: list[int], count: int) -> None:
                lengths.append(server.completion(prompt, count)["tokens_predicted"])

            # Each slot has 256 tokens of context: the first runs over it while the second begins with a long prompt.
            clients = [threading.Thread(target=ask, args=(PROMPT, 270))]
            clients += [threading.Thread(target=ask, args=([20 + i % 90 for i in range(150)], 40)) for _ in range(2)]
            for client in clients:
                client.start()
                time.sleep(0.5)
            for client in clients:
                client.join()
            assert sorted(lengths) == [40, 40, 270]
            time.sleep(3)
            assert server.completion(PROMPT, TOKENS)["content"] == expected
            time.sleep(1.2)
            graphs = sidecar.metrics()["tokens_total"] - tokens
            assert graphs >= 270
            assert (read_bytes(server.pid) - before) / graphs < SIZE / 2  # without: three quarters
            summary = sidecar.end()
        assert summary["state"] == "engaged"
        assert summary["ticks_lost"] < summary["tokens"]  # told, not hidden
        assert summary["recall"] > 0.5
        let_go(server, group)


def test_a_split_model(start: Callable[..., Any], tmp_path: Path) -> None:
    shape = models.dense_preset(SIZE)
    first = models.write(tmp_path / "split.gguf", shape, split_max_tensors=len(models.tensor_plan(shape)) // 3 + 1)
    assert len(list(tmp_path.glob("split-*.gguf"))) == 3
    with start(LIMIT, "split-", model=first) as (server, group):
        expected = server.completion(PROMPT, TOKENS)["content"]
        unaided = read_per_token(server, expected)
        with Sidecar(server.pid, tmp_path / "sidecar") as sidecar:
            with asking(server, expected):
                wait_until(sidecar.settled, 60, "the sidecar is engaged")
            reads_less(server, expected, unaided / 2)
            summary = sidecar.end()
        assert summary["model_bytes"] > 0.9 * SIZE
        let_go(server, group)


NURSERY = """
import json, os, signal, sys, time
from pathlib import Path
from llmtraced.prefetch import launch

def become_and_be_killed(config, target, options):
    for seconds in json.loads(sys.argv[2]):
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            really(config, target, options)
        time.sleep(seconds)
        early, status = os.waitpid(child, os.WNOHANG)
        if early:
            raise SystemExit(f"ended by itself: {status}")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
    os._exit(0)

really, launch.become = launch.become, become_and_be_killed
launch.run(int(sys.argv[1]), launch.Options(trial=0))
"""
"""Prepares once, and becomes the sidecar in one child after the other, each of which is killed after some time."""

KILLED_YOUNG, KILLED_WHOLE = 85, 15


def test_a_kill_leaves_nothing_pinned(
    pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar, asking(server, expected):
        wait_until(sidecar.settled, 60, "the sidecar is engaged")
        assert locked(group) > 3 * HARDLY
        sidecar.child.kill()
        sidecar.child.wait()
        let_go(server, group)
    assert group.stat().get("oom_kill", 0) == 0
    assert read_per_token(server, expected) > unaided / 2


def test_a_hundred_kills_change_no_byte(
    pressed: tuple[Server, MemoryCgroup], expected: str, unaided: float, tmp_path: Path
) -> None:
    server, group = pressed
    rng = random.Random(20)
    with asking(server, expected) as answers:
        lives = json.dumps([rng.uniform(0, 1.5) for _ in range(KILLED_YOUNG)])
        done = subprocess.run(
            [sys.executable, "-c", NURSERY, str(server.pid), lives], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split().count("killed") == KILLED_YOUNG
        for n in range(KILLED_WHOLE):  # while it compiles, attaches, learns, joins, pins, streams
            options = ("--trial", "0", *(() if n % 3 else ("--clock", "pagetable")))
            with Sidecar(server.pid, tmp_path, *options) as sidecar:
                time.sleep(rng.uniform(0, 4))
                assert sidecar.child.poll() is None, sidecar.said()
                sidecar.child.kill()
        let_go(server, group)
        known = len(answers)
        wait_until(lambda: len(answers) > known, 60, "the server goes on")
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:  # nothing of its forerunners is in its way
            wait_until(sidecar.settled, 60, "the sidecar is engaged")
            sidecar.end()
    let_go(server, group)
    assert group.stat().get("oom_kill", 0) == 0
    assert read_per_token(server, expected) > unaided / 2


@pytest.mark.parametrize(
    ("arch", "groups"), [("llama", (1, 1)), ("gpt-oss", (1, 1)), ("hy_v3", (8, 4))]
)  # no bias; of the logits; of the probabilities, and experts in groups
def test_a_mixtures_choices_are_known_before_they_are_made(
    tmp_path: Path, llama_server: Path, arch: str, groups: tuple[int, int]
) -> None:
    """Tokens stay the same; what the sidecar works out from a router's input is what the server then says it uses."""
    shape = models.moe_preset(120 * MB, arch=arch, groups=groups)
    path = models.write(tmp_path / "moe.gguf", shape)
    drop_cache(path)
    limit, group = 100 * MIB, MemoryCgroup(f"llmtraced-test-mixture-{os.getpid()}", 100 * MIB)
    with group, Server(path, binary=llama_server, threads=2, ctx=512, extra=("--no-repack",), cgroup=group) as server:
        varied = {"temperature": 1.0, "seed": 7}
        expected = server.completion(PROMPT, TOKENS, **varied)["content"]
        # Of one of them everything is guessed that can be.
        options = ("auto", "--predict", ",".join(SOURCES)) if arch == "llama" else ("moe",)
        with Sidecar(server.pid, tmp_path, "--trial", "0", "--strategy", *options) as sidecar:
            answers_stay(server, sidecar, expected, 3, varied)
            wait_until(sidecar.first, 20, "all of its threads go before the server's")
            assert group.usage() <= limit
            summary = sidecar.end()
        told = summary["experts"]
        # Experts of less than 384 KiB a matrix are; fused gates are larger.
        by_page = os.statvfs(path).f_bsize <= 4096 and not told["large_bytes"]
        assert ("experts are read by the page" in sidecar.said()) == by_page
        assert told["chosen"] >= 2 * TOKENS * shape.n_layers
        assert told["router_checked"] > told["chosen"] / 4
        assert told["router_surprises"] <= told["router_checked"] / 500  # two that are as good as equal
        guesses = told["predictors"]
        assert set(guesses) == set(SOURCES if arch == "llama" else DEFAULT)
        for source, figures in guesses.items():
            # What begins with the layer itself is often too late to be a guess.
            assert figures["layers"] >= (0 if source == "attention" else TOKENS), (source, guesses)
            least = 0.1 if source in ("last", "coactivation") else 0.5  # 4 of 64 by chance: 0.06
            assert figures["layers"] < TOKENS or figures["right"] > least, (source, guesses)
        if arch == "llama":
            by_time = ("router", "attention", "router-1", "router-2", "last")
            ahead = [guesses[source]["mean_ahead_s"] for source in by_time if guesses[source]["layers"] >= TOKENS]
            assert ahead == sorted(ahead), guesses
        assert told["read_bytes"] > 0
        assert told["failed_reads"] == 0
        assert 0 < told["held_bytes"] <= told["capacity_bytes"] <= limit
        let_go(server, group)
        assert server.completion(PROMPT, TOKENS, **varied)["content"] == expected


def test_a_mixtures_experts_come_in_large_folios(tmp_path: Path, llama_server: Path) -> None:
    path = models.write(tmp_path / "moe.gguf", models.moe_preset(180 * MB, n_experts=16, n_used=2))
    drop_cache(path)
    group = MemoryCgroup(f"llmtraced-test-folios-{os.getpid()}", 130 * MIB)
    with group, Server(path, binary=llama_server, threads=2, ctx=512, extra=("--no-repack",), cgroup=group) as server:
        varied = {"temperature": 1.0, "seed": 7}
        expected = server.completion(PROMPT, TOKENS, **varied)["content"]
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
            answers_stay(server, sidecar, expected, 4, varied)
            assert group.usage() <= 130 * MIB
            summary = sidecar.end()
        if summary["path"] != "huge":
            pytest.skip(f"no large folios in this file system on Linux {os.uname().release}")
        assert "experts are read by the page" not in sidecar.said()
        told = summary["experts"]
        assert told["read_bytes"] > 20 << 20
        assert told["large_bytes"] > 0.5 * told["read_bytes"]
        assert told["failed_reads"] == 0
        let_go(server, group)
        assert server.completion(PROMPT, TOKENS, **varied)["content"] == expected


def test_a_dense_model_is_no_mixture(pressed: tuple[Server, MemoryCgroup], tmp_path: Path) -> None:
    server, _ = pressed
    with Sidecar(server.pid, tmp_path, "--strategy", "moe") as sidecar:
        assert sidecar.child.wait(60) == 4
        assert "not a mixture of experts" in sidecar.said()
