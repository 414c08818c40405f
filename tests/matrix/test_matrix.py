"""Each build of llama.cpp in the table, each cell of it (``make test-matrix``); docs/compatibility.md shows the result.

``LLMTRACED_MATRIX`` chooses builds by name, with commas between them, or ``all``. Unset, only the slice that CI runs is
chosen, which needs no compiler. Results go to ``CACHE/builds/matrix.json`` and ``matrix.md``; those of other builds
stay in them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from builds import BUILDS, CI, Build
from cells import CELLS, Models, make_models

from llmtraced import kept

pytestmark = pytest.mark.e2e

CHOSEN = os.environ.get("LLMTRACED_MATRIX", "")
RESULTS = kept.folder() / "builds" / "matrix.json"


def chosen() -> list[Build]:
    names = {b.name for b in BUILDS} if CHOSEN == "all" else set(CHOSEN.split(",")) if CHOSEN else CI
    unknown = names - {b.name for b in BUILDS}
    assert not unknown, f"LLMTRACED_MATRIX names no builds: {unknown}"
    return [b for b in BUILDS if b.name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("build", chosen(), ids=lambda build: build.name)
def test_build(build: Build, cell: str, files: Models, tmp_path: Path) -> None:
    build.get()
    result = CELLS[cell](build, files, tmp_path / "trace")
    if CHOSEN:
        note(build, cell, result.text, result.wrong)
    assert not result.wrong, f"{build.name}, {cell}: {result.text}\n" + "\n".join(result.wrong)


def note(build: Build, cell: str, text: str, wrong: list[str]) -> None:
    """Add a result to those of other runs, and write the table anew."""
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    row = known.setdefault(build.name, {})
    row |= {
        "date": f"{datetime.date.today()}",
        "kernel": platform.release(),
        cell: ("" if not wrong else "**wrong**: ") + text,
    }
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    lines = [f"| build | {' | '.join(CELLS)} | date |", "|---" * (len(CELLS) + 2) + "|"]
    for one in (b for b in BUILDS if b.name in known):
        row = known[one.name]
        lines.append(f"| {one.name} | {' | '.join(row.get(c, 'not run') for c in CELLS)} | {row['date']} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
