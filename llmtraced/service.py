"""What a service and systemd say to each other: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Standard library only, and no more of it than is needed: the sidecar speaks it too. Without systemd nothing happens.
"""

from __future__ import annotations

import array
import os
import time
from collections.abc import Mapping

__all__ = ["Watchdog", "notify", "store", "stored"]

_FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(state: str, fd: int | None = None) -> bool:
    """Tell systemd, and give it a descriptor if there is one; return whether it has been told."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return False
    import socket  # half a megabyte that a sidecar without systemd does not need

    address = "\0" + path[1:] if path.startswith("@") else path
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as systemd:
            systemd.sendmsg([state.encode()], rights, 0, address)
    except OSError:
        return False
    return True


class Watchdog:
    """Keeps systemd's watchdog from biting for as long as :meth:`alive` is called.

    Args:
        environment: has WATCHDOG_USEC and WATCHDOG_PID where there is a watchdog.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        meant = environment.get("WATCHDOG_PID") in (None, str(os.getpid()))
        timeout = environment.get("WATCHDOG_USEC", "") if meant else ""
        self.seconds = int(timeout) / 4e6 if timeout.isdigit() else 0.0
        """Between two words; 0: there is no watchdog."""
        self._told = 0.0

    def alive(self) -> None:
        """Say so, if it is time: a loop calls this once a round."""
        now = time.monotonic()
        if self.seconds and now - self._told >= self.seconds:
            self._told = now
            notify("WATCHDOG=1")


def store(name: str, fd: int) -> bool:
    """Have systemd keep a descriptor for the service's main process, in place of the one that had this name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
    # FDPOLL=0: it would drop one that poll(2) has something to say of
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)


def stored(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return the descriptors that systemd has passed on to this process, by their names."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    return {name: _FIRST_FD + i for i, name in enumerate(environment["LISTEN_FDNAMES"].split(":"))}
