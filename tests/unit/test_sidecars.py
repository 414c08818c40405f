"""What the daemon hands on of sidecars: what they wrote, if it is fresh; nothing else whatever is in the folder."""

from __future__ import annotations

import fnmatch
import os
import time
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from test_prefetch_told import summary

from llmtraced.config import Config
from llmtraced.exposition import exposition
from llmtraced.prefetch.told import FOLDER, METRICS, metrics_text
from llmtraced.sidecars import sidecar_families


def found(folder: Path) -> dict[tuple[str, str, str], float]:
    text = exposition(sidecar_families(f"{folder}/*.prom")).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    values = {(s.name, s.labels["pid"], s.labels["model"]): s.value for s in samples}
    assert len(values) == len(samples), "Prometheus takes no series twice"
    return values


def write(folder: Path, pid: int, model: str = "m.gguf", **changed: Any) -> Path:
    path = folder / f"{pid}.prom"
    path.write_text(metrics_text(summary(**changed), pid, model))
    return path


def test_two_sidecars_are_handed_on(tmp_path: Path) -> None:
    parts = ("used", "late", "missed", "wasted", "read", "large")
    experts = {f"{part}_bytes": i + 1 for i, part in enumerate(parts)}
    write(tmp_path, 7, used_bytes=70, experts=experts)
    write(tmp_path, 8, used_bytes=80, state="fits")
    values = found(tmp_path)
    assert values["llmtraced_prefetch_used_bytes_total", "7", "m.gguf"] == 70
    assert values["llmtraced_prefetch_used_bytes_total", "8", "m.gguf"] == 80
    assert values["llmtraced_prefetch_engaged", "7", "m.gguf"] == 1
    assert values["llmtraced_prefetch_engaged", "8", "m.gguf"] == 0
    assert len([k for k in values if k[1] == "7"]) == len(METRICS)
    assert len([k for k in values if k[1] == "8"]) == len(METRICS) - len(parts)  # no mixture


def test_names_come_through_as_they_are(tmp_path: Path) -> None:
    for pid, model in enumerate(['say "hi" \\n.gguf', "back\\slash.gguf", "{}=,# .gguf", "ü.gguf"], 1):
        write(tmp_path, pid, model)
        assert ("llmtraced_prefetch_engaged", str(pid), model) in found(tmp_path)


def test_what_a_killed_sidecar_left_is_not_handed_on(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert found(tmp_path)
    for away in (-11, 11, 86_400):  # the clock may have been set back since
        os.utime(path, (time.time() + away,) * 2)
        assert not found(tmp_path)


def test_what_is_not_theirs_is_left_out(tmp_path: Path) -> None:
    ours = write(tmp_path, 7)
    expected = found(tmp_path)
    lines = [
        'node_load1{pid="7",model="m.gguf"} 1',
        "llmtraced_prefetch_engaged 1",
        'llmtraced_prefetch_engaged{pid="x",model="m"} 1',
        'llmtraced_prefetch_engaged{pid="9",model="m"} NaN',
        'llmtraced_prefetch_engaged{pid="9",model="m"} one',
        'llmtraced_prefetch_engaged{pid="9",model="m"',
        'llmtraced_prefetch_engaged{pid="7",model="m.gguf"} 0',  # there already
    ]
    (tmp_path / "other.prom").write_text("\n".join(lines))
    (tmp_path / "binary.prom").write_bytes(os.urandom(10_000))
    (tmp_path / "link.prom").symlink_to(ours)
    (tmp_path / "folder.prom").mkdir()
    os.mkfifo(tmp_path / "pipe.prom")
    (tmp_path / "8.prom.tmp").write_text(ours.read_text().replace('"7"', '"8"'))
    assert found(tmp_path) == expected
    assert found(tmp_path / "nowhere") == {}


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    write(tmp_path, 7, "\x1b[2J\u202e")
    assert {model for _, _, model in found(tmp_path)} == {"\\x1b[2J\\u202e"}


def test_the_daemon_looks_where_sidecars_write() -> None:
    assert fnmatch.fnmatch(f"{FOLDER}/7.prom", Config().sidecars)
    assert fnmatch.fnmatch(f"{FOLDER}-llama-server/metrics.prom", Config().sidecars)  # RuntimeDirectory= of a unit
    assert not fnmatch.fnmatch(f"{FOLDER}/7.prom.tmp", Config().sidecars)
