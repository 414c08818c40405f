"""The metrics' server and clients of all kinds: Prometheus, slow ones, many, hostile ones, some without a password."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until

from llmtraced import serve
from llmtraced.errors import LlmtracedError
from llmtraced.password import hash_password
from llmtraced.serve import Access, MetricsServer, is_loopback

TEXT = b"# HELP a A.\n# TYPE a gauge\na 1\n"


@contextlib.contextmanager
def served(access: Access | None = None, text: bytes = TEXT) -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0, lambda: text, access)
    try:
        yield server
    finally:
        server.close()


def ask(
    port: int,
    path: str = "/metrics",
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    login: str | None = None,
    body: bytes | None = None,
) -> tuple[int, dict[str, str], bytes]:
    connection = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        if tls is None
        else http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=tls)
    )
    headers = {} if login is None else {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        return answer


def certificate(folder: Path, name: str = "one") -> tuple[str, str]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return str(cert), str(key)


def test_the_metrics_and_the_page_before_them() -> None:
    with served() as server:
        status, fields, body = ask(server.port)
        assert (status, body) == (200, TEXT)
        assert fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert ask(server.port, "/metrics?x=1")[2] == TEXT
        status, fields, body = ask(server.port, method="HEAD")
        assert (status, fields["Content-Length"], body) == (200, str(len(TEXT)), b"")
        assert b"href=/metrics" in ask(server.port, "/")[2]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metricss HTTP/1.1\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", 431),
        (b"GET /" + b"m" * 100_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n:\r\nx\r\n: y\r\n\xff\xfe: \x00\r\n\r\n", 200),
    ],
)
def test_requests_of_all_kinds(request_: bytes, status: int) -> None:
    with served() as server:
        assert raw(server.port, request_).startswith(f"HTTP/1.1 {status} ".encode())
        assert ask(server.port)[0] == 200


def test_a_slow_client_is_cut_off_and_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 0.6)
    with served() as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        begin = time.monotonic()
        gone = False
        while not gone and time.monotonic() - begin < 20:  # a byte now and then does not buy time
            try:
                slow.sendall(b"G")
                slow.settimeout(0.1)
                gone = slow.recv(1) == b""
            except TimeoutError:
                assert ask(server.port)[0] == 200
            except OSError:
                gone = True
        assert gone
        assert time.monotonic() - begin < 10


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_SEND_SECONDS", 0.6)
    with (
        served(text=b"x" * 30_000_000) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as lazy,
    ):
        lazy.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wait_until(lambda: scrapes() == 1, 20, "the answer is begun")
        wait_until(lambda: scrapes() == 0, 20, "the answer is given up")
        assert len(lazy.recv(1000)) == 1000


def scrapes() -> int:
    return sum(thread.name == "scrape" for thread in threading.enumerate())


def test_connections_are_bounded_and_served_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_HEAD_SECONDS", 2.0)
    with served() as server, contextlib.ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        wait_until(lambda: scrapes() == serve._CONNECTIONS, 20, "as many as may be are taken")
        assert scrapes() <= serve._CONNECTIONS
    with served() as server:
        assert ask(server.port)[0] == 200


def test_however_many_ask_a_text_is_made_ten_times_a_second_at_most() -> None:
    made = []

    def make() -> bytes:
        made.append(time.monotonic())
        return TEXT

    server = MetricsServer("127.0.0.1", 0, make)
    try:
        begin = time.monotonic()
        threads = [threading.Thread(target=lambda: [ask(server.port) for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(made) <= (time.monotonic() - begin) / 0.1 + 1
        wait_until(lambda: time.monotonic() - made[-1] > 0.1, 5, "the text is old")
        before = len(made)
        ask(server.port)
        assert len(made) == before + 1
    finally:
        server.close()


def test_a_text_that_cannot_be_made_ends_one_answer_only(caplog: pytest.LogCaptureFixture) -> None:
    answers = [RuntimeError("boom"), TEXT]

    def make() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    server = MetricsServer("127.0.0.1", 0, make)
    try:
        assert raw(server.port, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        wait_until(lambda: "boom" in caplog.text, 5, "the log says why")
        assert ask(server.port)[2] == TEXT
    finally:
        server.close()


def test_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_GUESS_SECONDS", 0.0)
    with served(Access(user="prometheus", password_hash=hash_password("sesame:ü"))) as server:
        status, fields, body = ask(server.port)
        assert (status, fields["WWW-Authenticate"]) == (401, 'Basic realm="llmtraced"')
        assert b"a 1" not in body
        assert ask(server.port, "/")[0] == 401
        assert ask(server.port, login="prometheus:sesame:ü")[0] == 200
        for wrong in ("prometheus:sesame", "prometheus:", "other:sesame:ü", "prometheus", ":sesame:ü", ""):
            assert ask(server.port, login=wrong)[0] == 401
        with monkeypatch.context() as without:  # after the wrong ones, without computing
            without.setattr(serve, "password_matches", None)
            assert ask(server.port, login="prometheus:sesame:ü")[0] == 200
        for field in (b"Bearer x", b"Basic", b"Basic \xff", b"Basic %%%", b"basic AAAA"):
            answer = raw(server.port, b"GET /metrics HTTP/1.1\r\nAuthorization: " + field + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ")


def test_guesses_are_slow_and_do_not_keep_the_right_one_out() -> None:
    with served(Access(user="u", password_hash=hash_password("right"))) as server:
        assert ask(server.port, login="u:right")[0] == 200
        answers: list[int] = []
        begin = time.monotonic()
        threads = [
            threading.Thread(target=lambda n=n: answers.append(ask(server.port, login=f"u:{n}")[0])) for n in range(10)
        ]
        for thread in threads:
            thread.start()
        assert ask(server.port, login="u:right")[0] == 200
        for thread in threads:
            thread.join()
        assert answers == [401] * 10
        assert time.monotonic() - begin > serve._GUESS_SECONDS


def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with served(Access(cert, key)) as server:
        trust = ssl.create_default_context(cafile=cert)
        assert ask(server.port, tls=trust)[2] == TEXT
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(server.port, tls=ssl.create_default_context())
        with contextlib.suppress(OSError):  # plain text is no handshake
            assert b"a 1" not in raw(server.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        old = ssl.create_default_context(cafile=cert)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError, match=r"."):
            ask(server.port, tls=old)
        assert ask(server.port, tls=trust)[2] == TEXT


def test_a_large_text_arrives_whole_over_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    text = b"".join(b'a{n="%d"} 1\n' % n for n in range(300_000))
    with served(Access(cert, key), text) as server:
        assert ask(server.port, tls=ssl.create_default_context(cafile=cert))[2] == text


def test_a_new_certificate_is_taken_and_a_broken_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = certificate(tmp_path)
    with served(Access(cert, key)) as server:
        first = ssl.create_default_context(cafile=cert)
        assert ask(server.port, tls=first)[0] == 200
        broken = Path(key).read_bytes()
        Path(key).write_bytes(b"nothing")
        assert ask(server.port, tls=first)[0] == 200
        assert "the one before is used further" in caplog.text
        Path(key).write_bytes(broken)
        new_cert, new_key = certificate(tmp_path, "two")
        Path(new_key).replace(key)
        Path(new_cert).replace(cert)
        assert ask(server.port, tls=ssl.create_default_context(cafile=cert))[0] == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(server.port, tls=first)


def test_what_cannot_be_served_is_said(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    _, other = certificate(tmp_path, "other")
    for pair in ((str(tmp_path / "none.pem"), key), (cert, str(tmp_path / "none.key")), (cert, other), (key, cert)):
        with pytest.raises(LlmtracedError, match="cannot use the certificate and key"):
            MetricsServer("127.0.0.1", 0, lambda: TEXT, Access(*pair))
    with pytest.raises(LlmtracedError, match="not a hash"):
        Access(user="u", password_hash="secret")
    with served() as server, pytest.raises(OSError, match="in use"):
        MetricsServer("127.0.0.1", server.port, lambda: TEXT)


def test_ipv6() -> None:
    server = MetricsServer("::1", 0, lambda: TEXT)
    try:
        connection = http.client.HTTPConnection("::1", server.port, timeout=20)
        connection.request("GET", "/metrics")
        assert connection.getresponse().read() == TEXT
        connection.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("127.5.5.5", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_loopback(host: str, here: bool) -> None:
    assert is_loopback(host) == here
