"""Where `llmtraced top` has its snapshots from: a daemon's ``/metrics``, or a tracer of its own."""

from __future__ import annotations

import base64
import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from types import TracebackType
from typing import Final, Protocol, Self
from urllib.parse import unquote, urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from llmtraced import target as targets
from llmtraced.config import Config
from llmtraced.daemon import Daemon
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.metrics import LlmtracedCollector
from llmtraced.residency import resident_parts
from llmtraced.serve import is_loopback
from llmtraced.snapshot import Place, Snapshot, Totals, snapshot

__all__ = ["Attached", "DaemonSilentError", "Scraped", "Source", "open_source"]

log = logging.getLogger(__name__)

DEFAULT_URL: Final = f"http://{Config().listen}/metrics"

_TIMEOUT_SECONDS: Final = 3.0
_MOST_BYTES: Final = 64 << 20
_MOST_TENSORS: Final = 20_000  # shown one by one; of an export, the daemon's configuration decides
_SCAN_SECONDS: Final = 1.0
_RESIDENT_SECONDS: Final = 5.0
_RESIDENT_COST: Final = 20  # of the time, at most a twentieth is spent on asking what is resident


class Source(Protocol):
    """What gives snapshots."""

    origin: str
    """Where the figures come from."""

    def snapshot(self) -> Snapshot:
        """Return the counters now.

        Raises:
            LlmtracedError: they cannot be had, for now.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End what was begun."""


class DaemonSilentError(LlmtracedError):
    """Nobody answers at the address."""


def open_source(url: str | None, pid: int | None) -> Source:
    """Return what to look at: the daemon at ``url``; else the one at the default address; else a tracer of our own.

    Args:
        url: of a daemon's metrics; None: wherever there are some.
        pid: show this process only.

    Raises:
        LlmtracedError: the daemon at ``url`` does not answer, or we cannot trace (no permission, no such process).
    """
    scraped = Scraped(url or DEFAULT_URL, pid)
    try:
        scraped.snapshot()
    except DaemonSilentError as silent:
        if url is not None:
            raise
        try:
            return Attached(pid)
        except LlmtracedError as error:
            raise LlmtracedError(
                f"{silent}, so `llmtraced top` would trace by itself, but: {error}", error.exit_code
            ) from error
    return scraped


class Scraped:
    """A daemon's metrics.

    Args:
        url: of them; with ``USER:PASSWORD@`` before the host where a password is asked for.
        pid: of the only process to show, or None.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname  # a bad port raises
            self.origin = f"from {printable(parts.netloc.rpartition('@')[2])}"
        except ValueError:
            known = None
        if not known:
            raise LlmtracedError(f"{printable(url)!r} is not a URL like {DEFAULT_URL}", USAGE)
        place, _, host = parts.netloc.rpartition("@")
        self._url = urlunsplit(parts._replace(netloc=host))
        self._login = base64.b64encode(unquote(place).encode()).decode() if place else ""
        self._pid = pid
        self._resident = _Residency() if is_loopback(known) else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is not for proxies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def snapshot(self) -> Snapshot:
        """Scrape once."""
        try:
            request = urllib.request.Request(self._url)  # noqa: S310 (http or https)
            if self._login:
                request.add_header("Authorization", f"Basic {self._login}")
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                body = response.read(_MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise DaemonSilentError(f"no daemon answers at {printable(self._url)} ({printable(text)})") from error
        now = time.monotonic()
        found = None
        if len(body) <= _MOST_BYTES:
            try:
                found = snapshot(text_string_to_metric_families(body.decode("utf-8", "replace")), now)
            except (ValueError, KeyError, IndexError):
                log.debug("not Prometheus text", exc_info=True)
        if found is None:
            raise LlmtracedError(
                f"{printable(self._url)} does not serve llmtraced's metrics; is it the daemon's address?"
            )
        return _finish(found, self._pid, self._resident)


class Attached:
    """A tracer of our own, which finds servers as the daemon does; nothing is recorded, nothing is served.

    Args:
        pid: of the only process to trace, or None for all that use models.

    Raises:
        LlmtracedError: no permission, no such process, or it uses no model.
    """

    origin = "traced by this program"

    def __init__(self, pid: int | None = None) -> None:
        if pid is not None:
            targets.find_target(pid)  # it says what is the matter where there is no tracing that process
        log.info("compiling the probes")
        self._daemon = Daemon(Config(trace="", listen="", scan=_SCAN_SECONDS), pid=pid)
        self._collector = LlmtracedCollector(self._daemon.recorder, _MOST_TENSORS)
        self._pid = pid
        self._resident = _Residency()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._daemon.step()  # so that there are processes from the first snapshot
        except BaseException:
            self._daemon.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._daemon.step()
        except Exception as error:
            self._failure = error
        finally:
            self._daemon.close()

    def snapshot(self) -> Snapshot:
        """Read the kernel's totals."""
        if self._failure is not None:
            raise self._failure
        found = snapshot(self._collector.collect(), time.monotonic())
        assert found is not None
        return _finish(found, self._pid, self._resident)


def _finish(found: Snapshot, pid: int | None, resident: _Residency | None) -> Snapshot:
    """Return the snapshot with ``pid`` only, and with what is resident."""
    processes = {p: totals for p, totals in found.processes.items() if pid in (None, p)}
    if resident:
        processes = {p: replace(totals, resident=resident.of(totals)) for p, totals in processes.items()}
    return Snapshot(found.time, processes)


class _Residency:
    """What is in the page cache of processes' models; asked now and then only, for that walks the page cache."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, tuple[Place, ...], dict[Place, tuple[int, int]] | None]] = {}

    def of(self, totals: Totals) -> dict[Place, tuple[int, int]] | None:
        """Return (resident bytes, size) by place; None where the files are not ours to see."""
        until, places, known = self._known.get(totals.pid, (0.0, (), None))
        begin = time.monotonic()
        if begin < until and places == totals.places:
            return known
        try:
            found: dict[Place, tuple[int, int]] | None = resident_by_place(targets.find_target(totals.pid), totals)
        except (LlmtracedError, OSError) as error:
            log.debug("process %d: resident bytes are not known: %s", totals.pid, error)
            found = None
        end = time.monotonic()
        self._known[totals.pid] = end + max(_RESIDENT_SECONDS, _RESIDENT_COST * (end - begin)), totals.places, found
        return found


def resident_by_place(target: targets.Target, totals: Totals) -> dict[Place, tuple[int, int]]:
    """Return (resident bytes, size) of each place of ``totals`` that is in the target's models.

    Raises:
        LlmtracedError, OSError: the kernel will not tell.
    """
    wanted = set(totals.places)
    found: dict[Place, tuple[int, int]] = {}
    for label, model in target.models.items():
        for number, shard in enumerate(model.shards):
            tensors = [t for t in model.tensors if t.shard == number]
            parts = resident_parts(shard.path, [(t.offset, t.size) for t in tensors])
            for tensor, here in zip(tensors, parts, strict=True):
                place = Place(printable(label), printable(tensor.name), tensor.layer, printable(tensor.component))
                if place not in wanted:
                    place = place._replace(tensor="")  # a large model is counted by layer and component
                if place in wanted:
                    resident, size = found.get(place, (0, 0))
                    found[place] = resident + here, size + tensor.size
    return found
