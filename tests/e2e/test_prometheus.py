"""Debian's Prometheus scrapes the daemon over TLS with a password, while a server runs short of memory.

A story is told once: a server is idle, decodes, is idle; then the same with a sidecar. Before and after each part the
daemon is scraped by the test itself. What the documented queries and the dashboards' say is then compared with those
counters: rates within what Prometheus extrapolates (its window begins and ends up to a scrape before or after ours),
ratios, in which that cancels out, to a thousandth.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import need, wait_until
from prometheus_client.parser import text_string_to_metric_families
from test_prefetch import HARDLY, LIMIT, PROMPT, SIZE, locked

from llmtraced.bench import models
from llmtraced.bench.engine import Server, free_port, stop
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.commands import main
from llmtraced.monitoring.panels import DASHBOARDS, Panel, concrete
from llmtraced.monitoring.prometheus import Prometheus, Series
from llmtraced.password import hash_password
from llmtraced.prefetch.told import FOLDER

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
RULES = ROOT / "llmtraced" / "monitoring" / "rules.yml"
PASSWORD = "sesame: ü"
EDGES = 3.0
"""Seconds by which Prometheus's samples may miss the beginning and the end of a window: two scrapes and a bit."""
CLOSE = 0.05  # ratios of rates: a counter that was near zero is not extrapolated as far as others, by late scrapes


def program(name: str) -> str:
    """Return Debian's prometheus or promtool, which `make e2e` puts beside this Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need(found, f"{name} is not here (make .venv/.prometheus)", "e2e")
    assert found
    return found


@dataclass(frozen=True)
class Part:
    """A part of the story: two scrapes of ours, and when they were."""

    before: dict[Any, float]
    after: dict[Any, float]
    start: float
    end: float

    @property
    def window(self) -> str:
        return f"{self.end - self.start:.0f}s"

    def increase(self, name: str, **labels: str) -> float:
        """Return by how much the sum of counters grew."""

        def total(scrape: dict[Any, float]) -> float:
            return sum(v for (n, have), v in scrape.items() if n == name and labels.items() <= dict(have).items())

        return total(self.after) - total(self.before)

    def is_rate(self, value: float, increase: float) -> bool:
        """Tell whether a rate is that of an increase in this part."""
        seconds = float(self.window[:-1])
        return increase / seconds * 0.999 <= value <= increase / (seconds - EDGES)


@dataclass
class Story:
    folder: Path
    port: int
    prometheus: Prometheus
    url: str
    pid: str = ""
    label: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    text: str = ""

    def raw(self) -> str:
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}/metrics")
        request.add_header("Authorization", "Basic " + base64.b64encode(f"prometheus:{PASSWORD}".encode()).decode())
        trust = ssl.create_default_context(cafile=str(self.folder / "cert.pem"))
        with urllib.request.urlopen(request, context=trust, timeout=30) as response:
            return str(response.read().decode())

    def scrape(self) -> dict[Any, float]:
        self.text = self.raw()
        samples = [s for family in text_string_to_metric_families(self.text) for s in family.samples]
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}

    def value(self, expr: str, at: float | None = None) -> float | None:
        found = self.prometheus.instant(expr, time.time() if at is None else at)
        return found[0].values[0] if found else None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Scrape before and after what is done in it; Prometheus has seen both, and nothing happens beside."""
        self._seen(time.time())
        before, start = self.scrape(), time.time()
        self._seen(start)
        yield
        self._seen(time.time())
        after, end = self.scrape(), time.time()
        self._seen(end)
        self.parts[name] = Part(before, after, start, end)

    def _seen(self, since: float) -> None:
        """Wait until Prometheus has scraped twice after ``since``."""
        expr = f'timestamp(llmtraced_graphs_total{{pid="{self.pid}"}})'
        wait_until(lambda: (self.value(expr) or 0) > since + 1, 30, "Prometheus scrapes the daemon")


def make_certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=llmtraced"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, cwd=folder)


def write_configuration(folder: Path, port: int) -> None:
    """Write prometheus.yml: the daemon, and once more with a wrong password."""

    def job(name: str, password: str) -> dict[str, Any]:
        return {
            "job_name": name,
            "scheme": "https",
            "tls_config": {"ca_file": str(folder / "cert.pem")},
            "basic_auth": {"username": "prometheus", "password": password},
            "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
        }

    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            job("llmtraced", PASSWORD),
            # A wrong password is answered after a pause.
            job("guesses", "wrong") | {"scrape_interval": "10s", "scrape_timeout": "10s"},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        stop(child, 30)


@pytest.fixture(scope="module")
def story(llama_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("prometheus")
    server, port, own = program("prometheus"), free_port(), free_port()
    make_certificate(folder)
    (folder / "hash").write_text(hash_password(PASSWORD))
    write_configuration(folder, port)
    model = models.write(folder / "dense.gguf", models.dense_preset(SIZE))
    need(not drop_cache(model), f"{folder} has no page cache that can be dropped (tmpfs?)", "e2e")
    daemon = [sys.executable, "-m", "llmtraced", "daemon", "--trace", str(folder / "trace"), "--flush", "1s"]
    daemon += ["--listen", f"127.0.0.1:{port}", "--scan", "200ms", "--user", "prometheus"]
    daemon += ["--password-file", str(folder / "hash"), "--tls-cert", str(folder / "cert.pem")]
    daemon += ["--tls-key", str(folder / "key.pem")]
    prometheus = [server, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    prometheus += [f"--web.listen-address=127.0.0.1:{own}"]
    url = f"http://127.0.0.1:{own}"
    told = Story(folder, port, Prometheus(url), url, label=model.name)
    with (
        running(daemon, folder / "daemon.log") as traced,
        running(prometheus, folder / "prometheus.log"),
        MemoryCgroup(f"llmtraced-prometheus-{os.getpid()}", LIMIT) as group,
    ):

        def up() -> bool:
            assert traced.poll() is None, (folder / "daemon.log").read_text()
            with contextlib.suppress(Exception):
                return told.value('up{job="llmtraced"}') == 1
            return False

        wait_until(up, 60, "Prometheus scrapes the daemon")
        with Server(model, binary=llama_server, ctx=256, extra=("--no-repack",), cgroup=group) as engine:
            told.pid = str(engine.pid)
            engine.completion(PROMPT, 8)
            with told.part("plain"):
                for _ in range(3):
                    engine.completion(PROMPT, 8)
            with sidecar(told, engine, group):
                with told.part("sidecar"):
                    for _ in range(6):
                        engine.completion(PROMPT, 16)
                yield told


@contextlib.contextmanager
def sidecar(told: Story, engine: Server, group: MemoryCgroup) -> Iterator[None]:
    """A sidecar that tells of itself where the daemon looks by default; there is nothing of it there in the end."""
    command = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(engine.pid), "--trial", "0"]
    path = Path(FOLDER) / f"{engine.pid}.prom"
    with running(command, told.folder / "sidecar.log") as child:

        def streams() -> bool:
            assert child.poll() is None, (told.folder / "sidecar.log").read_text()
            engine.completion(PROMPT, 8)
            return (told.value(f'llmtraced_prefetch_used_bytes_total{{pid="{told.pid}"}}') or 0) > 0

        wait_until(streams, 90, "the sidecar's figures reach Prometheus")
        yield
        assert path.exists()
        assert {dict(have).get("pid") for _, have in told.scrape()} >= {told.pid}
        assert not [k for k in told.scrape() if ("pid", str(child.pid)) in k[1]], "a sidecar is not a server"
    assert not path.exists()
    wait_until(lambda: locked(group) < HARDLY, 10, "what was locked is let go of")


def documented() -> dict[str, str]:
    """Return the queries of docs/prometheus.md by the comment before each."""
    text = (ROOT / "docs" / "prometheus.md").read_text()
    blocks = "\n\n".join(re.findall(r"```promql\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"^# (.+)\n((?:(?!#).+\n?)+)", blocks, re.MULTILINE)
    return {name: query.strip() for name, query in found}


def ask(story: Story, name: str, part: Part) -> list[Series]:
    """Ask a documented query over a part of the story, of our server."""
    query = documented()[name].replace("[5m]", f"[{part.window}]")
    query = re.sub(r"(llmtraced_\w+)(?:\{(.*?)\})?", rf'\1{{pid="{story.pid}",\2}}', query)  # others may run, too
    found = story.prometheus.instant(query, part.end)
    assert found, query
    return found


def test_nothing_documented_is_left_out() -> None:
    tested = re.findall(r'^\s+(?:found|\(one,\)) = ask\(story, "(.+)", ', Path(__file__).read_text(), re.MULTILINE)
    assert sorted(tested) == sorted(documented())


def test_tls_and_password_are_asked_for(story: Story) -> None:
    assert story.value('up{job="llmtraced"}') == 1
    wait_until(lambda: story.value('up{job="guesses"}') == 0, 30, "a wrong password is no scrape")

    def refused() -> bool:
        targets = story.prometheus.ask("targets")["activeTargets"]
        (wrong,) = [t for t in targets if t["labels"]["job"] == "guesses"]
        return "401 Unauthorized" in wrong["lastError"]

    wait_until(refused, 30, "it is refused")


def test_promtool_finds_nothing_wrong_with_the_metrics(story: Story) -> None:
    story.scrape()
    command = [program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=story.text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "llmtraced_prefetch_used_bytes_total" in story.text
    broken = story.text.replace("llmtraced_graphs_total", "llmtraced_graphs")
    assert subprocess.run(command, input=broken, capture_output=True, text=True, check=False).returncode != 0


def test_fault_rate(story: Story) -> None:
    part = story.parts["plain"]
    found = ask(story, "page faults a second, of the ten tensors with the most", part)
    rates = {s.labels["tensor"]: s.values[0] for s in found}
    assert 0 < len(rates) <= 10
    tensors = {dict(have)["tensor"] for name, have in part.after if name == "llmtraced_tensor_faults_total"}
    faults = {t: part.increase("llmtraced_tensor_faults_total", pid=story.pid, tensor=t) for t in tensors}
    for tensor, rate in rates.items():
        assert part.is_rate(rate, faults[tensor]), (tensor, rate, faults[tensor], part.window)
    assert max(faults, key=lambda t: faults[t]) in rates


def test_stall_share(story: Story) -> None:
    part = story.parts["plain"]
    (one,) = ask(story, "share of the computing time with a thread in a page fault on the model", part)
    stalled = part.increase("llmtraced_stall_seconds_total", pid=story.pid)
    share = stalled / part.increase("llmtraced_eval_seconds_total", pid=story.pid)
    assert one.values[0] == pytest.approx(min(share, 1), rel=CLOSE)
    assert share > 0.05, "this server waits for its model"


def test_reread_by_layer(story: Story) -> None:
    part = story.parts["plain"]
    found = ask(story, "bytes a second that are read again, by layer", part)
    layers = {s.labels["layer"]: s.values[0] for s in found}
    assert len(layers) > 2
    for layer, rate in layers.items():
        again = part.increase("llmtraced_tensor_reread_bytes_total", pid=story.pid, layer=layer)
        assert part.is_rate(rate, again), (layer, rate, again, part.window)
    assert sum(layers.values()) > 0


def test_read_by_cause(story: Story) -> None:
    part = story.parts["plain"]
    found = ask(story, "bytes a second brought into the page cache, by cause", part)
    for series in found:
        cause = series.labels["cause"]
        assert part.is_rate(series.values[0], part.increase("llmtraced_read_bytes_total", pid=story.pid, cause=cause))
    assert sum(s.values[0] for s in found) > 0


def test_read_for_each_token(story: Story) -> None:
    part = story.parts["plain"]
    (one,) = ask(story, "bytes read for each decoded token", part)
    tokens = part.increase("llmtraced_tokens_total", pid=story.pid, phase="decode")
    assert 3 * 7 <= tokens <= 3 * 8
    read = part.increase("llmtraced_read_bytes_total", pid=story.pid)
    assert one.values[0] == pytest.approx(read / tokens, rel=CLOSE)
    (one,) = ask(story, "share of the model that is read again for each decoded token", part)
    again = part.increase("llmtraced_tensor_reread_bytes_total", pid=story.pid)
    size = part.after["llmtraced_model_bytes", (("model", story.label), ("pid", story.pid))]
    assert one.values[0] == pytest.approx(again / tokens / size, rel=CLOSE)


def test_lost_events(story: Story) -> None:
    part = story.parts["plain"]
    found = ask(story, "events that were dropped, of each 1000", part)
    shares = {s.labels["probe"]: s.values[0] for s in found}
    assert {"faults", "pagecache", "tokens"} <= shares.keys()
    for probe, share in shares.items():
        dropped = part.increase("llmtraced_events_total", pid=story.pid, probe=probe, outcome="dropped")
        counted = part.increase("llmtraced_events_total", pid=story.pid, probe=probe, outcome="counted")
        assert share == pytest.approx(1000 * dropped / counted, rel=CLOSE)


def test_prefetch_precision(story: Story) -> None:
    part = story.parts["sidecar"]
    used, late, missed, wasted = (
        part.increase(f"llmtraced_prefetch_{name}_bytes_total", pid=story.pid)
        for name in ("used", "late", "missed", "wasted")
    )
    assert used > 0
    assert part.increase("llmtraced_read_bytes_total", pid=story.pid, cause="prefetcher") > 0
    (one,) = ask(story, "prefetch precision", part)
    assert one.values[0] == pytest.approx((used + late) / (used + late + wasted), rel=0.01)
    (one,) = ask(story, "prefetch recall", part)
    assert one.values[0] == pytest.approx((used + late) / (used + late + missed), rel=0.01)
    (one,) = ask(story, "share of what was prefetched and used that came late", part)
    assert one.values[0] == pytest.approx(late / (used + late), rel=0.05, abs=1e-3)


def test_rules_are_evaluated(story: Story) -> None:
    groups = story.prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == RULES.read_text().count("expr:") == 13
    assert {(r["name"], r["health"], r.get("lastError", "")) for r in rules if r["health"] != "ok"} == set()
    assert story.value(f'instance_pid_model:llmtraced_stall:share5m{{pid="{story.pid}"}}') is not None
    assert {r["state"] for r in rules if r["name"] in ("LlmtracedDown", "LlmtracedRecordingPaused")} == {"inactive"}


@pytest.mark.parametrize(
    "panel", [pytest.param(p, id=f"{n}-{p.title}") for n, d in DASHBOARDS.items() for p in d.panels]
)
def test_every_panel_has_data(story: Story, panel: Panel) -> None:
    part = story.parts["sidecar"]
    for query in panel.queries:
        found = story.prometheus.instant(concrete(query.expr, part.window, story.label), part.end)
        assert found, query.expr
        names = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
        assert names <= {name for s in found for name in s.labels}, query.legend
        if panel.unit == "percentunit" and "cpu" not in query.expr:
            assert all(0 <= s.values[0] <= 1 for s in found)


def test_a_picture_of_it(story: Story) -> None:
    for name in DASHBOARDS:
        path = story.folder / f"{name}.png"
        words = ["monitoring", name, "--prometheus", story.url, "--plot", str(path), "--since", "2m", "--window", "10s"]
        assert main(words) == 0
        assert path.stat().st_size > 50_000


def test_promtool_and_the_rules() -> None:
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(ROOT / "tests/prometheus/rules_test.yml")]):
        done = subprocess.run([program("promtool"), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout
