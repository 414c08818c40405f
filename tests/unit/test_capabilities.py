"""Which capabilities are read from a status file, and what giving them up does, in a child of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from llmtraced import capabilities


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
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, within, after, kept, child = json.loads(done.stdout)
    assert {"CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"} <= set(before)
    assert within == ["CAP_PERFMON"]
    assert after == before
    assert kept == ["CAP_PERFMON", "CAP_SYS_PTRACE"]
    assert set(child) <= set(kept), "a root that starts a program would get all of them again"
