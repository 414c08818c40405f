"""Sizes and durations as people write them."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtraced.errors import printable
from llmtraced.values import duration, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("0", 0),
        ("64K", 65536),
        ("64k", 65536),
        ("16M", 16 << 20),
        ("1.5G", 3 << 29),
        ("1.2G", 1288490188),
        ("1.2GiB", 1288490188),
        ("2 TB", 2 << 40),
        (" 7kib ", 7168),
        ("512B", 512),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1,5G", "1e3", "0x10", "1GG", "1.G", ".5G", "12 34", "inf", "1P", "\n"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a size.*write it like"):
        size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("500ms", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1.5 M", 90), ("0", 0)],
)
def test_durations(text: str, expected: float) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "1:30", "1m30s", "nan", "inf", "1e2"])
def test_no_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a duration.*write it like"):
        duration(text)


@given(st.text(max_size=500) | st.from_regex(r"\d{1,400}(\.\d+)?[kmgtKMGT]?", fullmatch=True))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (size, duration):
        try:
            value = parse(text)
        except argparse.ArgumentTypeError as error:
            assert printable(str(error), 10_000) == str(error), "what it says is safe for a terminal"
        else:
            assert value >= 0


@given(st.integers(0, 1 << 70))
def test_whole_bytes_are_exact(n: int) -> None:
    assert size(str(n)) == n
