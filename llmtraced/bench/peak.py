"""Run a command and say what it took, as one line of JSON: ``peak.py COMMAND …``.

Fields: ``code`` (exit code), ``seconds`` (wall clock), ``cpu_seconds``, ``peak_rss_bytes``. The kernel counts into a
child's peak what its parent had when it was started (``ru_maxrss`` outlives exec), so a large process cannot measure a
small one. This one, run with ``-I -S``, has 10 MB.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> int:
    """Run the command of our own arguments; its stdout goes to our stderr."""
    start = time.monotonic()
    child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - start
    took = {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}
    took |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024}
    print(json.dumps(took))
    return 0


if __name__ == "__main__":
    sys.exit(main())
