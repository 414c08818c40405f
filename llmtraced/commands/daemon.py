"""Find servers as they come and go, trace them, export metrics: what systemd runs.

  llmtraced daemon --trace /var/lib/llmtraced --listen 127.0.0.1:9477
  llmtraced daemon --config /etc/llmtraced.toml

Every process that maps a GGUF model is traced from when it is seen to when it ends. SIGTERM and Ctrl-C end the daemon
with everything on disk; the servers never notice.
"""

from __future__ import annotations

import argparse
import getpass
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.values import duration, size

log = logging.getLogger(__name__)

_CHANGES = (
    *("trace", "listen", "detail", "flush", "scan", "ring", "tensors", "keep_age", "keep_size", "cpu"),
    *("sidecars", "tls_cert", "tls_key", "user", "password_file"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file; the flags below override it")
    parser.add_argument("--trace", metavar="DIR", help="folder for traces; '' for metrics only (/var/lib/llmtraced)")
    parser.add_argument(
        "--listen", metavar="ADDR:PORT", help="where to serve /metrics; '' for nowhere (127.0.0.1:9477)"
    )
    parser.add_argument("--detail", choices=("faults", "ops", "full"), help="what to record (faults)")
    parser.add_argument("--flush", type=duration, metavar="S", help="seconds until a record is on disk (10s)")
    parser.add_argument("--scan", type=duration, metavar="S", help="seconds between looks for new servers (2s)")
    parser.add_argument("--ring", type=size, metavar="SIZE", help="event buffer, a power of two (16M)")
    parser.add_argument("--tensors", type=int, metavar="N", help="most tensors to export one by one (2000)")
    parser.add_argument("--keep-age", type=duration, metavar="S", help="delete older traces; 0: never (30d)")
    parser.add_argument("--keep-size", type=size, metavar="SIZE", help="delete the oldest beyond this; 0: never (20G)")
    parser.add_argument(
        "--cpu",
        type=float,
        metavar="X",
        help="record less where this much of a processor is not enough; 0: never (0.5)",
    )
    parser.add_argument("--sidecars", metavar="PATTERN", help="files in which sidecars say what they do; '' for none")
    parser.add_argument("--tls-cert", metavar="FILE", help="serve /metrics over TLS: certificate, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    parser.add_argument("--user", metavar="NAME", help="ask for this user and a password")
    parser.add_argument("--password-file", metavar="FILE", help="the hash of the password")
    parser.add_argument("--hash-password", action="store_true", help="ask for a password, print its hash, and end")
    parser.add_argument("--json", action="store_true", help="say on stdout what happens, a JSON object a line")
    parser.add_argument("--check-config", action="store_true", help="read the configuration, print it, and end")


def run(args: argparse.Namespace) -> int:
    """Run until a signal comes."""
    if args.hash_password:
        return _hash_password()
    # Threads that libraries start when they are imported would keep what this one gives up.
    os.environ.update(OPENBLAS_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false")
    from llmtraced.config import read_config

    config = read_config(args.config, {n: v for n in _CHANGES if (v := getattr(args, n)) is not None})
    if args.check_config:
        print(config)
        return 0
    from llmtraced.daemon import Daemon

    def say(event: dict[str, Any]) -> None:
        try:
            print(json.dumps(event), flush=True)
        except OSError as error:  # whoever listened has gone, or its disk is full: no reason to stop
            log.warning("nobody hears what is said on stdout any more: %s", error.strerror)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stop.append(received))
    log.info("compiling the probes")
    Daemon(config, say if args.json else lambda _: None, confine=True).run(lambda: bool(stop))
    log.info("stopped; everything is on disk")
    return 0


def _hash_password() -> int:
    from llmtraced.password import hash_password

    typed = getpass.getpass("password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if not typed:
        raise LlmtracedError("there is no password on the input", USAGE)
    print(hash_password(typed))
    return 0
