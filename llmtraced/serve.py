"""``/metrics`` over HTTP, for clients that are not trusted.

A client may be slow, many, or hostile; whatever it does costs a thread for some seconds at most, and a request is one
short head. So this is not a web server: one request a connection, GET and HEAD of two paths, no bodies.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.exposition import CONTENT_TYPE
from llmtraced.password import check_hash, password_matches

__all__ = ["Access", "MetricsServer", "is_loopback"]

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 32  # at a time; more wait until one of these has ended
_HEAD_BYTES: Final = 16 << 10
_HEAD_SECONDS: Final = 5.0
_SEND_SECONDS: Final = 15.0
_CLOSE_SECONDS: Final = 1.0
_PIECE: Final = 64 << 10
_FRESH_SECONDS: Final = 0.1  # a text is made ten times a second at most, however many ask
_GUESS_SECONDS: Final = 0.5  # after a wrong password
_TURN_SECONDS: Final = 1.0  # what a password waits while others are checked, at most
_PAGE: Final = b"<!doctype html><title>llmtraced</title><p><a href=/metrics>metrics</a>\n"


@dataclass(frozen=True, slots=True)
class Access:
    """How the metrics are protected.

    Attributes:
        cert, key: PEM files of the certificate (with its chain) and its private key; empty: no TLS.
        user: who may read; empty: everyone.
        password_hash: of :func:`llmtraced.password.hash_password`.
    """

    cert: str = ""
    key: str = ""
    user: str = ""
    password_hash: str = ""

    def __post_init__(self) -> None:
        if self.user:
            check_hash(self.password_hash)


class MetricsServer:
    """Serves a text on ``/metrics``, in threads of its own, until closed.

    Args:
        host, port: where to listen; port 0 chooses one.
        make: returns the text; never called by two threads at a time.
        access: TLS and password.

    Raises:
        OSError: the address is taken or not ours.
        LlmtracedError: the certificate or key cannot be used.
    """

    def __init__(self, host: str, port: int, make: Callable[[], bytes], access: Access | None = None) -> None:
        self._make = make
        access = access or Access()
        self._tls = _Tls(access.cert, access.key) if access.cert else None
        self._gate = _Gate(access.user, access.password_hash) if access.user else None
        self._text, self._made = b"", 0.0
        self._making = threading.Lock()
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        self._closing = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=128)
        self._socket.settimeout(0.5)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Answers under way may go on for some seconds."""
        self._closing = True
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while not self._closing:
            if not self._slots.acquire(timeout=0.5):
                continue
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                self._slots.release()
                if not isinstance(error, TimeoutError):
                    log.warning("cannot take a connection: %s", error)
                    time.sleep(0.1)  # no descriptors left, most likely
                continue
            try:
                threading.Thread(target=self._serve, args=(client,), name="scrape", daemon=True).start()
            except RuntimeError as error:
                client.close()
                self._slots.release()
                log.warning("cannot answer a connection: %s", error)

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError, ssl.SSLError):
                client.settimeout(_HEAD_SECONDS)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pieces do not wait for delayed ACKs
                if self._tls is None:
                    self._answer(client)
                else:
                    with self._tls.context().wrap_socket(client, server_side=True) as secured:
                        self._answer(secured)
        except Exception:
            log.exception("a request for the metrics failed")
        finally:
            self._slots.release()

    def _answer(self, client: socket.socket) -> None:
        head = _head(client)
        if head is None:
            _send(client, 431, b"the request is too long\n")
            return
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            _send(client, 400, b"this is no HTTP/1.1\n")
        elif words[0] not in ("GET", "HEAD"):
            _send(client, 405, b"GET and HEAD only\n", "Allow: GET, HEAD\r\n")
        elif self._gate is not None and not self._gate.opens(fields.get("authorization", "")):
            _send(client, 401, b"a user and a password are needed\n", 'WWW-Authenticate: Basic realm="llmtraced"\r\n')
        else:
            path, bodyless = words[1].partition("?")[0], words[0] == "HEAD"
            if path == "/metrics":
                _send(client, 200, self._fresh(), f"Content-Type: {CONTENT_TYPE}\r\n", bodyless=bodyless)
            elif path == "/":
                _send(client, 200, _PAGE, "Content-Type: text/html; charset=utf-8\r\n", bodyless=bodyless)
            else:
                _send(client, 404, b"there is /metrics\n", bodyless=bodyless)

    def _fresh(self) -> bytes:
        with self._making:
            if time.monotonic() - self._made > _FRESH_SECONDS:
                self._text = self._make()
                self._made = time.monotonic()
            return self._text


def _head(client: socket.socket) -> bytes | None:
    """Return a request's head; None if it is too long.

    Raises:
        OSError: the client went away, or took too long.
    """
    deadline, head = time.monotonic() + _HEAD_SECONDS, b""
    while (end := head.find(b"\r\n\r\n")) < 0:
        if len(head) > _HEAD_BYTES:
            return None
        client.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = client.recv(4096)
        if not piece:
            raise ConnectionResetError
        head += piece
    return head[:end]


def _send(client: socket.socket, status: int, body: bytes, fields: str = "", *, bodyless: bool = False) -> None:
    """Send an answer; one that the client does not take in time is cut off."""
    reasons = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed"}
    if "Content-Type" not in fields:
        fields += "Content-Type: text/plain; charset=utf-8\r\n"
    head = f"HTTP/1.1 {status} {reasons.get(status, 'Request Header Fields Too Large')}\r\n{fields}"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\nX-Content-Type-Options: nosniff\r\n\r\n"
    deadline = time.monotonic() + _SEND_SECONDS
    rest = memoryview(head.encode() + (b"" if bodyless else body))
    while rest:
        client.settimeout(max(deadline - time.monotonic(), 0.001))
        rest = rest[client.send(rest[:_PIECE]) :]
    with contextlib.suppress(OSError):
        client.settimeout(_CLOSE_SECONDS)
        plain = client.unwrap() if isinstance(client, ssl.SSLSocket) else client
        plain.shutdown(socket.SHUT_WR)
        plain.recv(_PIECE)  # bytes that nobody has read would make the kernel reset the connection, answer and all


class _Gate:
    """Asks for the password. Guesses are checked one at a time, with a pause after each wrong one."""

    def __init__(self, user: str, password_hash: str) -> None:
        self._user, self._hash = user.encode(), password_hash
        self._secret = os.urandom(32)
        self._known = b""
        self._guessing = threading.Lock()

    def opens(self, field: str) -> bool:
        """Tell whether an Authorization field has the right user and password."""
        mark = hmac.digest(self._secret, field.encode(), "sha256")
        if hmac.compare_digest(mark, self._known):
            return True  # scrypt has seen it: scrapes come every few seconds
        scheme, _, word = field.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(word.strip(), validate=True).partition(b":")
            text = password.decode()
        except (binascii.Error, ValueError):
            return False
        if not self._guessing.acquire(timeout=_TURN_SECONDS):
            return False
        try:
            right = password_matches(text, self._hash)
            right &= hmac.compare_digest(_digest(user), _digest(self._user))
            if right:
                self._known = mark
            else:
                time.sleep(_GUESS_SECONDS)
            return right
        finally:
            self._guessing.release()


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class _Tls:
    """A certificate that is read again when its file changes."""

    def __init__(self, cert: str, key: str) -> None:
        self._cert, self._key = cert, key
        self._lock = threading.Lock()
        self._seen = self._state()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the context to use now."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._context = self._load()
                    log.info("the certificate has changed")
                except LlmtracedError as error:
                    log.error("%s; the one before is used further", error)
            return self._context

    def _state(self) -> list[tuple[int, int]]:
        found = []
        for path in (self._cert, self._key):
            with contextlib.suppress(OSError):
                stat = Path(path).stat()
                found.append((stat.st_ino, stat.st_mtime_ns))
        return found

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # An encrypted key would make OpenSSL ask on the terminal.
            context.load_cert_chain(self._cert, self._key, password=lambda: b"")
        except (OSError, ValueError) as error:
            where = f"{printable(self._cert)}, {printable(self._key)}"
            reason = getattr(error, "strerror", None) or str(error)
            raise LlmtracedError(f"cannot use the certificate and key {where}: {reason}", USAGE) from error
        return context


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
