"""Where the live view's snapshots come from: a daemon that answers, one that does not, and a tracer of our own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeTracer, model, target, tensor

from llmtraced import watch
from llmtraced.errors import NO_PERMISSION, USAGE, LlmtracedError
from llmtraced.exposition import exposition
from llmtraced.gguf_map import Model, Shard
from llmtraced.metrics import LlmtracedCollector
from llmtraced.password import hash_password
from llmtraced.recorder import Recorder
from llmtraced.schema import PAGE, Detail, Phase
from llmtraced.serve import Access, MetricsServer
from llmtraced.snapshot import Place, Totals
from llmtraced.store import TraceWriter
from llmtraced.watch import Attached, DaemonSilentError, Scraped, open_source

TENSORS = [tensor("blk.0.a.weight", 0, 2 * PAGE, layer=0, component="a"), tensor("b\x1b", 2 * PAGE, PAGE)]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder(FakeTracer(), 60)  # type: ignore[arg-type]
    for pid in (11, 12):
        made.add(target({"m.gguf": model(TENSORS)}, pid=pid), TraceWriter(None, "s", {}), Detail.FAULTS, Phase.UNKNOWN)
    yield made
    made.close()


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serve a page and return its URL; the page can be changed."""
    pages: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(200 if page is not None else 404)
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def add(page: bytes, path: str = "/metrics") -> str:
        pages[path] = page
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield add
    server.shutdown()
    thread.join()
    server.server_close()


def page_of(recorder: Recorder) -> bytes:
    return exposition(LlmtracedCollector(recorder).collect())


def silent_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/metrics"


def test_scraped(recorder: Recorder, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    url = serve(page_of(recorder))
    with Scraped(url) as source:
        assert sorted(source.snapshot().processes) == [11, 12]
        assert source.origin == f"from {url[7:-8]}"
    with Scraped(url, 12) as source:
        first, second = source.snapshot(), source.snapshot()
        assert list(first.processes) == [12]
        assert first.time < second.time


@pytest.mark.parametrize("page", [b"<html>hello</html>", b"\xff\xfe{", b"node_load1 0.5\n", b"a{b=", b""])
def test_a_page_that_is_not_ours(serve: Any, page: bytes) -> None:
    url = serve(page)
    for made in (lambda: Scraped(url).snapshot(), lambda: open_source(url, None)):
        with pytest.raises(LlmtracedError, match="does not serve llmtraced's metrics") as caught:
            made()
        assert not isinstance(caught.value, DaemonSilentError)


def test_a_page_without_end(serve: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST_BYTES", 1000)
    with pytest.raises(LlmtracedError, match="does not serve"):
        Scraped(serve(page_of(recorder))).snapshot()


def test_nobody_answers(serve: Any) -> None:
    with pytest.raises(
        DaemonSilentError, match=r"no daemon answers at http://127\.0\.0\.1:\d+/metrics \(Conn.* refused"
    ):
        Scraped(silent_url()).snapshot()
    with pytest.raises(DaemonSilentError, match="Not Found"):
        Scraped(serve(b"x").replace("/metrics", "/elsewhere")).snapshot()


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "127.0.0.1:9477", "http://", "ftp://h/x", "http\x1b://h", "http://h:99999/", "http://[::1/"],
)
def test_what_is_no_url_of_metrics(url: str) -> None:
    with pytest.raises(LlmtracedError, match="is not a URL like http://127") as caught:
        Scraped(url)
    assert caught.value.exit_code == USAGE
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("h.local", False)]
)
def test_pids_are_looked_up_on_this_machine_only(host: str, here: bool) -> None:
    assert watch.is_loopback(host) == here


class FakeDaemon:
    """A daemon that a test drives: ``steps`` is called for each step."""

    made: list[FakeDaemon]

    def __init__(self, config: Any, pid: int | None = None) -> None:
        self.config, self.pid = config, pid
        self.recorder = FakeDaemon.the_recorder
        self.stepped = threading.Event()
        self.closed = 0
        FakeDaemon.made.append(self)

    def step(self) -> None:
        if self.stepped.is_set() and FakeDaemon.failure:
            raise FakeDaemon.failure
        self.stepped.set()
        threading.Event().wait(0.001)

    def close(self) -> None:
        self.closed += 1

    the_recorder: Recorder
    failure: Exception | None = None


@pytest.fixture
def daemon(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> type[FakeDaemon]:
    monkeypatch.setattr(watch, "Daemon", FakeDaemon)
    FakeDaemon.made, FakeDaemon.the_recorder, FakeDaemon.failure = [], recorder, None
    return FakeDaemon


def test_attached(daemon: type[FakeDaemon]) -> None:
    with Attached() as source:
        assert sorted(source.snapshot().processes) == [11, 12]
        (made,) = daemon.made
        assert (made.pid, made.config.trace, made.config.listen, made.config.detail) == (None, "", "", "faults")
        assert not made.closed
    assert made.closed == 1


def test_attached_to_one(daemon: type[FakeDaemon], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.targets, "find_target", lambda pid: SimpleNamespace(models={}))
    with Attached(12) as source:
        assert list(source.snapshot().processes) == [12]
    assert daemon.made[0].pid == 12


def test_a_tracer_that_fails_says_so(daemon: type[FakeDaemon]) -> None:
    daemon.failure = LlmtracedError("the ring broke")
    with Attached() as source:
        source._thread.join(5)  # type: ignore[attr-defined]
        with pytest.raises(LlmtracedError, match="the ring broke"):
            source.snapshot()
    assert daemon.made[0].closed == 1


def test_no_such_process(daemon: type[FakeDaemon]) -> None:
    with pytest.raises(LlmtracedError, match="no process 4194304"):
        Attached(1 << 22)
    assert not daemon.made


def test_open_source(daemon: type[FakeDaemon], recorder: Recorder, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "DEFAULT_URL", silent_url())
    assert isinstance(open_source(None, None), Attached)
    with pytest.raises(DaemonSilentError):
        open_source(silent_url(), None)
    monkeypatch.setattr(watch, "DEFAULT_URL", serve(page_of(recorder)))
    assert isinstance(open_source(None, None), Scraped)
    assert len(daemon.made) == 1


def test_without_daemon_and_root_both_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LlmtracedError("loading BPF programs needs root", NO_PERMISSION)

    monkeypatch.setattr(watch, "DEFAULT_URL", silent_url())
    monkeypatch.setattr(watch, "Daemon", refuse)
    with pytest.raises(LlmtracedError, match=r"no daemon answers at .* trace by itself, but: .* needs root") as caught:
        open_source(None, None)
    assert caught.value.exit_code == NO_PERMISSION


def half_cached(tmp_path: Any) -> Model:
    """Return a model of TENSORS in a file of which the first page only is in the page cache: the others are a hole."""
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(bytes(PAGE))
        file.truncate(3 * PAGE)
    of = model(TENSORS)
    return Model((Shard(path, 3 * PAGE, 0),), of.tensors, of.architecture, of.name, of.metadata, of.fingerprint)


def test_resident_by_place(tmp_path: Any) -> None:
    of = target({"m.gguf": half_cached(tmp_path)})
    a, b = Place("m.gguf", "blk.0.a.weight", 0, "a"), Place("m.gguf", "b\\x1b", -1, "b\\x1b")
    outside = Place("m.gguf", "", -1, "(outside tensors)")
    each = watch.resident_by_place(of, Totals(1, places=(a, b, outside)))
    assert each == {a: (PAGE, 2 * PAGE), b: (0, PAGE)}
    grouped = a._replace(tensor=""), b._replace(tensor="")
    assert watch.resident_by_place(of, Totals(1, places=(*grouped, outside))) == {
        grouped[0]: (PAGE, 2 * PAGE),
        grouped[1]: (0, PAGE),
    }
    assert watch.resident_by_place(of, Totals(1, places=(a._replace(model="another"),))) == {}


def test_resident_is_asked_now_and_then(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    a = Place("m.gguf", "blk.0.a.weight", 0, "a")

    def find(pid: int) -> Any:
        asked.append(pid)
        return target({"m.gguf": half_cached(tmp_path)})

    monkeypatch.setattr(watch.targets, "find_target", find)
    clock = iter([100.0, 100.5, 101.0, 111.0, 111.0, 112.0, 112.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    residency = watch._Residency()
    for _ in range(2):  # asking took half a second: not again for ten
        assert residency.of(Totals(5, places=(a,))) == {a: (PAGE, 2 * PAGE)}
    assert asked == [5]
    residency.of(Totals(5, places=(a,)))
    assert asked == [5, 5]
    residency.of(Totals(5, places=(a, a._replace(tensor="x"))))  # another model was mapped
    assert asked == [5, 5, 5]


@pytest.mark.parametrize("error", [LlmtracedError("no permission"), PermissionError(1, "no")])
def test_resident_is_not_known(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def find(pid: int) -> Any:
        raise error

    monkeypatch.setattr(watch.targets, "find_target", find)
    assert watch._Residency().of(Totals(5)) is None


def test_a_daemon_that_asks_for_a_password(recorder: Recorder) -> None:
    collector = LlmtracedCollector(recorder)
    access = Access(user="u", password_hash=hash_password("p@ss/w:rd"))
    server = MetricsServer("127.0.0.1", 0, lambda: exposition(collector.collect()), access)
    try:
        with Scraped(f"http://u:p%40ss%2Fw%3Ard@127.0.0.1:{server.port}/metrics") as source:
            assert sorted(source.snapshot().processes) == [11, 12]
            assert source.origin == f"from 127.0.0.1:{server.port}"
        with pytest.raises(LlmtracedError, match=r"401|nauthorized") as caught:
            Scraped(f"http://u:secret@127.0.0.1:{server.port}/metrics").snapshot()
        assert "secret" not in str(caught.value)
    finally:
        server.close()
