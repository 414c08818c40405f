"""The page of a long trace: whatever was recorded, it is small enough to be sent."""

from pathlib import Path

import pytest

from llmtraced.analysis.trace import open_trace
from llmtraced.bench.synthetic import write_trace
from llmtraced.reporters import html

pytestmark = pytest.mark.e2e("root")

pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install matplotlib")

ROWS = 13_000_000
"""Of ten minutes of a mixture of experts with 1,003 tensors in half the memory; about 93 MB on disk."""


def test_the_page_of_ten_minutes_is_below_10_mb(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace", ROWS)
    trace = open_trace(tmp_path / "trace")
    assert trace.first_ns is not None
    assert trace.last_ns is not None
    assert trace.last_ns - trace.first_ns > 600 * 10**9
    assert trace.tensors.height > 1000
    page = "".join(html.page(trace)).encode()
    assert len(page) < 10_000_000
    assert b"http-equiv" in page
    assert b"url(http" not in page
