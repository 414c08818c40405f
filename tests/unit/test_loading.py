"""What a command line says of how a model is loaded."""

from __future__ import annotations

import pytest

from llmtraced.loading import direct_io, why_unmapped


@pytest.mark.parametrize(
    ("words", "direct"),
    [
        ("llama-server -m a.gguf --load-mode dio", True),
        ("llama-server -lm dio -m a.gguf", True),
        ("llama-server --load-mode=dio", True),
        ("llama-server -dio", True),
        ("llama-server --direct-io", True),
        ("llama-server --load-mode none", False),
        ("llama-server --alias dio", False),
        ("dio", False),
        ("", False),
    ],
)
def test_direct_io_is_told_from_other_words(words: str, direct: bool) -> None:
    assert direct_io(words.split()) == direct


def test_what_is_not_seen_depends_on_how_it_was_read() -> None:
    plain, direct = why_unmapped("a\x1b.gguf", ["-lm", "none"]), why_unmapped("a.gguf", ["-lm", "dio"])
    assert "reads of the file are recorded" in plain
    assert "\x1b" not in plain
    assert "neither its reads" in direct
