"""Which capabilities are read from a status file, and what giving them up does, in a child of this process."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmtraced import capabilities, children, daemon
from llmtraced.config import Config
from llmtraced.errors import NO_PERMISSION, LlmtracedError
from llmtraced.probes import kernel


def test_names_from_bits() -> None:
    status = f"CapPrm:\t{1 << 21:016x}\nCapEff:\t{1 << 39 | 1 << 38 | 1 << 5:016x}\nCapBnd:\t{1 << 19:016x}\n"
    assert capabilities.held(status) == {"CAP_BPF", "CAP_PERFMON"}
    assert capabilities.held("Name:\tno such line\n") == frozenset()


def test_what_loading_takes() -> None:
    assert capabilities.can_load({"CAP_SYS_ADMIN"})
    assert capabilities.can_load({"CAP_BPF", "CAP_PERFMON"})
    assert not capabilities.can_load({"CAP_BPF", "CAP_SYS_PTRACE"})


CHILD = """
import json, subprocess, sys
from llmtraced import capabilities as c
words = [sorted(c.held())]
with c.without_all_but({"CAP_PERFMON"}):
    words.append(sorted(c.held()))
words.append(sorted(c.held()))
c.give_up_all_but({"CAP_PERFMON", "CAP_SYS_PTRACE"})
words.append(sorted(c.held()))
status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
words.append(sorted(c.held(status)))
print(json.dumps(words))
"""


@pytest.mark.kernel("root")
def test_what_is_given_up_is_gone_for_children_too() -> None:
    env = children.environment()
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, within, after, kept, child = json.loads(done.stdout)
    assert {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"} <= set(before)
    assert within == ["CAP_PERFMON"]
    assert after == before
    assert kept == ["CAP_PERFMON", "CAP_SYS_PTRACE"]
    assert set(child) <= set(kept), "a root that starts a program would get all of them again"


def test_perf_events_that_take_more_than_cap_perfmon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's kernels refuse them by a sysctl: the daemon keeps what they take, or says what to do."""
    holding = {"CAP_PERFMON", "CAP_BPF", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}
    given_up: list[set[str]] = []
    doing_without: list[frozenset[str]] = []

    @contextlib.contextmanager
    def without_all_but(names: frozenset[str]) -> Iterator[None]:
        doing_without.append(frozenset(names))
        yield
        doing_without.pop()

    def refused() -> int:
        return 0 if "CAP_SYS_ADMIN" in (doing_without[-1] if doing_without else holding) else errno.EACCES

    monkeypatch.setattr(capabilities, "held", lambda status=None: frozenset(holding))
    monkeypatch.setattr(capabilities, "without_all_but", without_all_but)
    monkeypatch.setattr(capabilities, "give_up_all_but", lambda names: given_up.append(set(names)))
    monkeypatch.setattr(kernel, "try_bpf", lambda: errno.EBADF)
    monkeypatch.setattr(kernel, "try_software_event", refused)
    daemon._confine(needs_admin=False)
    assert given_up == [{"CAP_PERFMON", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}]

    holding.discard("CAP_SYS_ADMIN")
    with pytest.raises(LlmtracedError, match=r"kernel\.perf_event_paranoid is above 2") as caught:
        daemon.Daemon(Config())
    assert caught.value.exit_code == NO_PERMISSION

    monkeypatch.setattr(kernel, "try_software_event", lambda: 0)
    daemon._confine(needs_admin=False)
    assert given_up[1:] == [{"CAP_PERFMON", "CAP_SYS_PTRACE"}]
