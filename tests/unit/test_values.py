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
        ("999999999999999", 999_999_999_999_999),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1,5G", "1e3", "0x10", "1GG", "1.G", ".5G", "12 34", "inf", "1P", "\n", "\u0661", "9" * 400]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a size.*write it like"):
        size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("500ms", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1.5 M", 90), ("0", 0)],
)
def test_durations(text: str, expected: float) -> None:
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1s", "1w", "1:30", "1m30s", "nan", "inf", "1e2", "\u0661s", "9" * 400])
def test_no_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a duration.*write it like"):
        duration(text)


@given(st.text(max_size=500) | st.from_regex(r"[0-9]{1,400}(\.[0-9]+)?[kmgtKMGT]?", fullmatch=True))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    for parse in (size, duration):
        said = ""
        try:
            value = parse(text)
        except argparse.ArgumentTypeError as error:
            value, said = 0, str(error)
        assert value >= 0
        assert printable(said, 10_000) == said, "what it says is safe for a terminal"


@given(st.integers(0, 10**15 - 1))
def test_whole_bytes_are_exact(n: int) -> None:
    assert size(str(n)) == n
