"""Dashboards, their pictures, and the command that writes them."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as schema

from llmtraced.commands import main
from llmtraced.errors import USAGE
from llmtraced.monitoring.grafana import grafana
from llmtraced.monitoring.panels import DASHBOARDS, concrete

EXPRS = [q.expr for d in DASHBOARDS.values() for p in d.panels for q in p.queries]


def kept(ours: Any, theirs: Any, where: str = "$") -> None:
    """Fail unless all that is in ``ours`` is in ``theirs``, with the same value."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert key in theirs, f"{where}.{key} is not in Grafana's schema"
            kept(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            kept(one, other, f"{where}[{number}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_knows_every_key(name: str) -> None:
    """Grafana's own types, made from its schema, take it in and give all of it back: no key is misspelt."""
    register_default_plugins()
    made = grafana(DASHBOARDS[name])
    read = schema.Dashboard.from_json(json.loads(json.dumps(made)))
    kept(made, json.loads(JSONEncoder().encode(read)))
    misspelt = json.loads(json.dumps(made))
    misspelt["panels"][0]["targets"][0]["legendFromat"] = "x"
    with pytest.raises(AssertionError, match="legendFromat is not in Grafana's schema"):
        kept(misspelt, json.loads(JSONEncoder().encode(schema.Dashboard.from_json(misspelt))))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_fill_the_grid_and_none_lies_on_another(name: str) -> None:
    made = grafana(DASHBOARDS[name])
    cells = [
        (x, y)
        for p in made["panels"]
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert [p["id"] for p in made["panels"]] == list(range(1, len(made["panels"]) + 1))
    names = {v["name"] for v in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(made)))
    assert used - {"__rate_interval", "__all"} == names


def test_titles_and_units_are_there() -> None:
    assert len({d.uid for d in DASHBOARDS.values()}) == len(DASHBOARDS)
    for one in DASHBOARDS.values():
        assert 8 <= len(one.uid) <= 40
        assert len({p.title for p in one.panels}) == len(one.panels)
        for panel in one.panels:
            assert panel.text.endswith(".")
            assert panel.kind in ("timeseries", "bargauge")


@pytest.mark.parametrize("expr", EXPRS)
def test_no_variable_is_left(expr: str) -> None:
    assert "$" not in concrete(expr, "30s")
    assert "$" not in concrete(expr, "30s", "m.*")


def answer(url: str) -> dict[str, Any]:
    """Return an answer as Prometheus would: two series for a query of precision, one of NaN for stalls, else one."""
    asked = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    query = asked["query"][0]
    if "nothing" in query:
        return {"status": "success", "data": {"result": []}}
    if "(component)" in query:
        many = [({"component": f"c{n}"}, str(n)) for n in range(10)]
        result = [{"metric": labels, "values": [[float(asked["start"][0]), value]]} for labels, value in many]
        return {"status": "success", "data": {"result": result}}
    if "wrong" in query:
        return {"status": "error", "error": "parse error \x1b[2J"}
    labels = {"model": "m\x1b$x$.gguf", "pid": "7", "layer": "3", "cause": "fault", "tensor": "blk.3.ffn_gate.weight"}
    if "start" in asked:
        start, end, step = (float(asked[k][0]) for k in ("start", "end", "step"))
        times = [start + i * step for i in range(int((end - start) / step) + 1)]
        value = "NaN" if "stall" in query else "0.5"
        result = [{"metric": labels, "values": [[at, value] for at in times]}]
    else:
        result = [{"metric": labels | {"layer": str(n)}, "value": [5.0, str(n * 1e6)]} for n in range(3)]
    return {"status": "success", "data": {"result": result}}


@pytest.fixture
def prometheus() -> Iterator[str]:
    """A Prometheus that has the same answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer(self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", DASHBOARDS)
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture(tmp_path: Path, prometheus: str, name: str, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    words = ["monitoring", name, "--prometheus", prometheus + "/", "--plot", str(path), "--since", "10m"]
    assert main(words) == 0
    assert path.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg" and name == "servers":
        drawn = set(re.findall(r"<!-- (.*?) -->", path.read_text()))
        assert {"c9", "c4", "3 more", "no data", "Stall share", "layer 2"} <= drawn  # c0 is nothing
        assert not {"c3", "c0"} & drawn
    assert main(words) == 1  # it is there
    assert main([*words, "--force"]) == 0


def test_what_a_picture_cannot_be_made_of(
    tmp_path: Path, prometheus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> str:
        assert main(["monitoring", *words]) in (1, USAGE)
        return capsys.readouterr().err

    plot = ["--plot", str(tmp_path / "x.png")]
    assert "--plot needs --prometheus" in said("servers", *plot)
    assert "--plot needs --prometheus" in said("servers", "--prometheus", prometheus)
    assert "rules cannot be drawn" in said("rules", *plot, "--prometheus", prometheus)
    assert "is not a URL" in said("servers", *plot, "--prometheus", "127.0.0.1:9090")
    assert "no Prometheus answers" in said("servers", *plot, "--prometheus", "http://127.0.0.1:1")
    monkeypatch.setattr("llmtraced.monitoring.picture.concrete", lambda *_: "nothing")
    assert "does it scrape a daemon?" in said("servers", *plot, "--prometheus", prometheus)
    monkeypatch.setattr("llmtraced.monitoring.picture.concrete", lambda *_: "wrong")
    assert "parse error \\x1b[2J" in said("servers", *plot, "--prometheus", prometheus)


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in DASHBOARDS:
        assert main(["monitoring", name]) == 0
        assert json.loads(capsys.readouterr().out)["uid"] == DASHBOARDS[name].uid
    assert main(["monitoring", "rules", "-o", str(tmp_path / "rules.yml")]) == 0
    assert "alert: LlmtracedDown" in (tmp_path / "rules.yml").read_text()
