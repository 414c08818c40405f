"""The sidecar's main thread among the server's: first while it works, and never for long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernel("root")

# In a process of its own: a limit that was lowered stays so.
CODE = """
import json, os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from llmtraced.prefetch.turn import Turn

def policy():
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK

def of_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(policy()))
    thread.start()
    thread.join()
    return found[0]

def spin(seconds):
    end = time.monotonic() + seconds
    while turn.first and time.monotonic() < end:
        pass

turn = Turn()
seen = [policy()]
turn.take()
seen += [policy(), of_a_thread()]
for _ in range(20):
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    time.sleep(0.001)
seen += [turn.demoted, policy()]
spin(5)
seen += [turn.demoted, policy()]
turn.take()
seen.append(policy())
turn.leave()
seen.append(policy())
print(json.dumps(seen))
"""


def test_it_is_first_until_it_works_without_a_pause() -> None:
    done = subprocess.run([sys.executable, "-S", "-E", "-c", CODE, "."], capture_output=True, text=True, check=True)
    ordinary, first = 0, 1
    assert json.loads(done.stdout) == [ordinary, first, ordinary, 0, first, 1, ordinary, first, ordinary]


def test_without_the_right_to_it_stays_an_ordinary_thread() -> None:
    code = (
        CODE.replace("turn = Turn()", "os.setuid(65534)\nturn = Turn()").split("for _ in")[0]
        + "print(json.dumps(seen))"
    )
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code, "."], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, 0, 0]
