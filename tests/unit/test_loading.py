"""What a command line and an environment say of how a model is loaded."""

from __future__ import annotations

import pytest

from llmtraced.loading import load_mode, recorded_mode, why_unmapped


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("llama-server -m a.gguf --load-mode dio", "dio"),
        ("llama-server -lm dio -m a.gguf", "dio"),
        ("llama-server --load-mode=dio", "dio"),
        ("llama-server -dio", "dio"),
        ("llama-server --direct-io", "dio"),
        ("llama-server --load-mode none", "none"),
        ("llama-server -lm dio -lm mmap", "mmap"),
        ("llama-server --alias dio", ""),
        ("dio", ""),
        ("", ""),
    ],
)
def test_the_mode_is_told_from_other_words(words: str, mode: str) -> None:
    assert load_mode(words.split()) == mode


def test_the_command_line_counts_before_the_environment() -> None:
    environment = {"LLAMA_ARG_LOAD_MODE": "dio", "LLAMA_ARG_ALIAS": "x"}
    assert load_mode(["llama-server", "-m", "a.gguf"], environment) == "dio"
    assert load_mode(["llama-server", "-lm", "none"], environment) == "none"


def test_older_traces_have_the_command_line_only() -> None:
    assert recorded_mode({"command": ["llama-server", "-dio"]}) == "dio"
    assert recorded_mode({"command": "llama-server -lm none"}) == "none"
    assert recorded_mode({"command": ["llama-server", "-dio"], "load_mode": "mmap"}) == "mmap"
    assert recorded_mode({"command": None}) == ""


def test_what_is_not_seen_depends_on_how_it_was_read() -> None:
    plain, direct = why_unmapped("a\x1b.gguf", "none"), why_unmapped("a.gguf", "dio")
    assert "reads of the file are recorded" in plain
    assert "\x1b" not in plain
    assert "neither its reads" in direct
