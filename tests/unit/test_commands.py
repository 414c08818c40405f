"""The program as its users meet it: help that teaches, one-line errors on stderr, exit codes that scripts can use."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtraced import __version__
from llmtraced.commands import COMMANDS, build_parser, main
from llmtraced.errors import LlmtracedError

Capture = pytest.CaptureFixture[str]


def leave(words: list[str]) -> int:
    """Return the exit code of the command line, however it ends."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def help_of(words: list[str], capsys: Capture) -> str:
    assert leave([*words, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parser and those of its sub-commands, to the bottom."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found += parsers(one)
    return found


# --- help ---------------------------------------------------------------------------------------------------------


def test_the_program_s_help(capsys: Capture) -> None:
    text = help_of([], capsys)
    for name, summary in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(summary)}$", text, re.MULTILINE)
    assert "exit codes: 0 fine, 1 failed, 2 usage, 3 no permission, 4 kernel or target" in text
    assert "LLM server" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_s_help(name: str, capsys: Capture) -> None:
    text = help_of([name], capsys)
    assert text.startswith(f"usage: llmtraced {name} ")
    module = importlib.import_module(f"llmtraced.commands.{name}")
    for line in (module.__doc__ or "").strip().splitlines():
        assert line in text, "the docstring is the help, line breaks kept"
    assert len((module.__doc__ or "").strip().splitlines()) >= 4, "what it does, how to call it, what to know"
    assert max(map(len, text.splitlines())) <= 120


def test_every_argument_is_explained() -> None:
    mute = [
        f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
        for parser in parsers(build_parser())
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert mute == []


def test_flags_are_kebab_case_and_reports_speak_json() -> None:
    for parser in parsers(build_parser()):
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert [f for f in flags if not re.fullmatch(r"-[a-z]|--[a-z]+(-[a-z]+)*", f)] == []
    by_name = {p.prog.removeprefix("llmtraced "): p for p in parsers(build_parser())}
    for name in ("check", "record", "report", "bench events", "bench overhead", "bench scrape", "bench query"):
        assert "--json" in by_name[name].format_help()


def test_version(capsys: Capture) -> None:
    assert leave(["--version"]) == 0
    assert capsys.readouterr().out == f"llmtraced {__version__}\n"


def test_only_the_command_asked_for_is_imported() -> None:
    code = (
        "import sys; from llmtraced.commands import build_parser; build_parser(only='check'); "
        "print([m for m in sys.modules if m.startswith('llmtraced.commands.')], "
        "[m for m in ('numpy', 'pyarrow', 'polars', 'bcc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['llmtraced.commands.check'] []\n"


# --- usage --------------------------------------------------------------------------------------------------------


def said(words: list[str], code: int, capsys: Capture) -> str:
    """Run, expect the exit code, nothing on stdout and one line on stderr; return that line."""
    assert leave(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("llmtraced: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    return err.removeprefix("llmtraced: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate' (choose from"),
        (["-v"], "COMMAND"),
        (["map"], "MODEL"),
        (["map", "a", "--format", "xml"], "invalid choice: 'xml'"),
        (["map", "a", "--frob"], "--frob"),
        (["record", "--pid", "1"], "-o"),
        (["record", "--pid", "one", "-o", "t"], "invalid int value: 'one'"),
        (["record", "--pid", "1", "-o", "t", "--detail", "most"], "invalid choice: 'most'"),
        (["record", "--pid", "1", "-o", "t", "--duration", "soon"], "not a duration: 'soon'; write it like 30s or 10m"),
        (["record", "--pid", "1", "-o", "t", "--ring", "much"], "not a size: 'much'; write it like 512M or 1.2G"),
        (["report", "everything", "t"], "invalid choice: 'everything'"),
        (["report", "summary", "t", "--top", "0"], "'0' is not 1 or more"),
        (["bench"], "BENCHMARK"),
        (["bench", "query", "--rows", "many"], "not a number of rows: 'many'; write it like 500000, 20M or 1.5G"),
        (["daemon", "--ring", "-5"], "--ring"),
    ],
)
def test_wrong_usage(words: list[str], why: str, capsys: Capture) -> None:
    assert leave(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: llmtraced")
    assert why in err
    assert "Traceback" not in err


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test begin to trace by mistake."""

    def begun(*_args: object, **_options: object) -> None:
        raise AssertionError("it began to trace")

    monkeypatch.setattr("llmtraced.capture.Capture.__init__", begun)


@pytest.mark.usefixtures("no_capture")
def test_record_wants_one_process(tmp_path: Path, capsys: Capture) -> None:
    trace = str(tmp_path / "t")
    for words in (["record", "-o", trace], ["record", "--pid", "1", "-o", trace, "--", "sleep", "1"]):
        assert said(words, 2, capsys) == "say which process: either --pid PID or -- COMMAND"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_capture")
def test_record_does_not_write_into_what_is_there(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine").write_text("kept")
    message = said(["record", "--pid", "1", "-o", str(tmp_path)], 2, capsys)
    assert message == f"{tmp_path} is not empty, will not write into it without --force"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.usefixtures("no_capture")
def test_record_into_a_file(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine").write_text("kept")
    assert str(tmp_path / "mine") in said(["record", "--pid", "1", "-o", str(tmp_path / "mine")], 2, capsys)


@pytest.fixture
def quiet_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.mark.usefixtures("quiet_signals")
def test_record_checks_the_ring_first(tmp_path: Path, capsys: Capture) -> None:
    message = said(["record", "--pid", "1", "-o", str(tmp_path / "t"), "--ring", "100K"], 2, capsys)
    assert message == "the ring must be a power of two of at least 64K, not 102400 bytes"


@pytest.mark.usefixtures("quiet_signals")
@pytest.mark.parametrize(
    "words",
    [
        ["record", "--pid", "1", "-o", "t"],
        ["record", "-o", "t", "--", "sleep", "9"],
        ["daemon", "--trace", "", "--listen", ""],
        ["bench", "events"],
        ["bench", "overhead", "--json"],
        ["bench", "scrape"],
    ],
)
def test_without_root(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("llmtraced.probes.compiler.held", frozenset)
    assert "root" in said(words, 3, capsys)
    assert list(tmp_path.iterdir()) == []


# --- failures -----------------------------------------------------------------------------------------------------


def test_what_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    nowhere = str(tmp_path / "nowhere\x1b[2J")
    shown = str(tmp_path / "nowhere\\x1b[2J")
    assert shown in said(["map", nowhere], 1, capsys)
    assert shown in said(["report", "summary", nowhere], 1, capsys)
    assert "No such file" in said(["daemon", "--config", str(tmp_path / "none.toml")], 2, capsys)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LlmtracedError("it is so", 4), 4, "llmtraced: it is so\n"),
        (LlmtracedError("it is so"), 1, "llmtraced: it is so\n"),
        (PermissionError(13, "Permission denied", "/x"), 3, "; run the same command as root\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fails(_args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("llmtraced.commands.map.run", fails)
    assert main(["map", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(text)
    assert err.count("\n") == text.count("\n")


def test_a_reader_that_leaves_is_no_error_worth_a_word(small_model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "llmtraced", "map", str(small_model)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("flags", "logged"), [([], "llmtraced: some\n"), (["-v"], "llmtraced: some\nllmtraced: more\n")]
)
def test_data_on_stdout_logs_on_stderr(flags: list[str], logged: str) -> None:
    code = (
        "import logging, sys; from llmtraced.commands import main, map; log = logging.getLogger('llmtraced.x'); "
        "map.run = lambda _: print('data') or log.info('some') or log.debug('more') or 0; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags, "map", "x"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "data\n", logged)
