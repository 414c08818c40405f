"""The live view: what a screen shows, what keys do, and a terminal that is as it was afterwards."""

from __future__ import annotations

import io
import logging
import os
import pty
import sys
import termios
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from test_snapshot import at, totals

from llmtraced.commands import main
from llmtraced.errors import LlmtracedError
from llmtraced.reporters import terminal as module
from llmtraced.reporters.live import GROUPS, SORTS, View, press, screen, table_rows
from llmtraced.reporters.terminal import Terminal, keys, watch
from llmtraced.snapshot import COUNTERS, History, Place, Snapshot, Totals


def places(layers: int = 3) -> tuple[Place, ...]:
    """Return those of a model: an embedding, two tensors a layer, what is outside."""
    inside = [Place("m.gguf", f"blk.{n}.{c}.weight", n, c) for n in range(layers) for c in ("attn_q", "ffn_up")]
    outside = Place("m.gguf", "", -1, "(outside tensors)")
    return (Place("m.gguf", "token_embd.weight", -1, "token_embd"), *inside, outside)


def process(pid: int = 7, tick: int = 1, layers: int = 3, **fields: Any) -> Totals:
    """Return counters: the tensor number n (from 1) has read n MB a tick, half of it again, and so on."""
    where = places(layers)
    n = np.arange(1.0, len(where) + 1)
    counters = np.stack([n * 1e6, n * 5e5, n * 9e5, n, 10 * n, n[::-1] / 1000], axis=1) * tick
    made = {
        "places": where,
        "counters": counters,
        "causes": np.array([0.2, 0.8, 0, 0, 0]) * counters[:, 0].sum(),
        "tokens": np.array([0, 0, 3.0, 0]) * tick,
        "stall_seconds": 0.25 * tick,
    }
    return totals(pid, **{**made, **fields})


def lived(*processes: Totals, seconds: int = 3, window: float = 5.0) -> History:
    """Return the history of processes that did the same in every second."""
    history = History(window)
    for second in range(1, seconds + 1):
        grown = [
            replace(
                p,
                counters=p.counters * second,
                causes=p.causes * second,
                tokens=p.tokens * second,
                graphs=p.graphs * second,
                stall_seconds=p.stall_seconds * second,
            )
            for p in processes
        ]
        history.add(at(float(second), *grown))
    return history


def plain(history: History, view: View | None = None, width: int = 80, height: int = 24, **more: str) -> list[str]:
    lines = screen(history, view or View(), width, height, **more)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines), [line.plain for line in lines if line.cell_len > width]
    return [line.plain.rstrip() for line in lines]


def test_a_screen() -> None:
    known = {place: (250_000 * i, 1_000_000) for i, place in enumerate(places(2)[:5])}
    assert plain(lived(process(layers=2, resident=known)), height=18, origin="from here") == [
        "m.gguf  pid 7  decode                                                  from here",
        "3.00 tokens/s (prompt 0/s)  stalled  25% ██▌         231 faults/s (21 major)",
        "read 21.0 MB/s, 50% of it again  evicted 18.9 MB/s  in RAM 50% of 5.00 MB",
        "",
        "fault        4.20 MB/s ██          ▂▂",
        "readahead    16.8 MB/s ████████    ██",
        "",
        "tensors             read/s▼  stall/s  faults/s  in RAM  layers, 2 s",
        "(outside tensors)   6.00 MB  1.00 ms        66       -  0                     ▓▓",
        "blk.1.ffn_up        5.00 MB  2.00 ms        55    100%  1                     ██",
        "blk.1.attn_q        4.00 MB  3.00 ms        44     75%  other                 ██",
        "blk.0.ffn_up        3.00 MB  4.00 ms        33     50%  █ 9.00 MB/s a layer",
        "blk.0.attn_q        2.00 MB  5.00 ms        22     25%",
        "token_embd          1.00 MB  6.00 ms        11      0%",
        "",
        "",
        "",
        "tensors layers components  read stall faults resident name  pause quit",
    ]


def test_a_wide_screen_shows_more_columns() -> None:
    lines = plain(lived(process()), width=160, height=50)
    title = next(line for line in lines if line.startswith("tensors"))
    assert title.split()[:9] == [
        "tensors",
        "read/s▼",
        "stall/s",
        "faults/s",
        "in",
        "RAM",
        "again",
        "evict/s",
        "major/s",
    ]
    assert "size" in title
    row = next(line for line in lines if line.startswith("blk.2.ffn_up"))
    assert row.split()[1:11] == ["7.00", "MB", "2.00", "ms", "77", "-", "50%", "6.30", "MB", "7"]


def test_layers_and_components() -> None:
    history = lived(process())
    for by, names in (
        ("l", ["layer 2", "(outside layers)", "layer 1", "layer 0"]),
        ("c", ["ffn_up", "attn_q", "(outside tensors)", "token_embd"]),
    ):
        recent = history.recent(7)
        rows = table_rows(recent, history.latest(7), View(by=by))
        assert [row["name"] for row in rows] == names
        assert sum(row["read_bytes"] for row in rows) == 36e6  # 1 to 8 MB
    (last,) = [row for row in rows if row["name"] == "ffn_up"]
    assert {c: last[c] for c in COUNTERS} == {
        "read_bytes": 15e6,  # 3, 5 and 7
        "reread_bytes": 7.5e6,
        "evicted_bytes": 13.5e6,
        "major_faults": 15,
        "minor_faults": 150,
        "fault_seconds": pytest.approx(0.012),
    }
    assert last["faults"] == 165


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("r", ["blk.10.b", "blk.2.b", "a"]),
        ("s", ["blk.2.b", "blk.10.b", "a"]),
        ("f", ["a", "blk.10.b", "blk.2.b"]),
        ("e", ["a", "blk.2.b", "blk.10.b"]),
        ("z", ["blk.2.b", "a", "blk.10.b"]),
        ("n", ["a", "blk.2.b", "blk.10.b"]),
    ],
)
def test_sorting(sort: str, names: list[str]) -> None:
    where = tuple(Place("m", f"{n}.weight", 0, n) for n in ("blk.10.b", "a", "blk.2.b"))
    counters = np.array([[3.0, 0, 0, 5, 0, 2], [1.0, 0, 0, 0, 9, 1], [2.0, 0, 0, 1, 1, 3]])
    resident = {where[1]: (10, 10), where[2]: (5, 20)}
    history = lived(totals(places=where, counters=counters, resident=resident))
    assert [r["name"] for r in table_rows(history.recent(7), history.latest(7), View(sort=sort))] == names


def test_places_of_two_models_are_told_apart() -> None:
    where = (Place("m.gguf", "t.weight", 0, "t"), Place("draft.gguf", "t.weight", 0, "t"))
    history = lived(totals(places=where, models={"m.gguf": 10.0, "draft.gguf": 5.0}))
    names = [r["name"] for r in table_rows(history.recent(7), history.latest(7), View())]
    assert names == ["t (m.gguf)", "t (draft.gguf)"]
    assert plain(history)[0].startswith("m.gguf and 1 more  pid 7")


def test_a_large_model_that_is_exported_by_layer_and_component() -> None:
    where = (Place("m.gguf", "", 3, "attn_q"), Place("m.gguf", "", -1, "output"))
    history = lived(totals(places=where))
    assert [r["name"] for r in table_rows(history.recent(7), history.latest(7), View())] == ["layer 3 attn_q", "output"]


@pytest.mark.parametrize(
    ("tokens", "graphs", "causes", "word"),
    [
        ([0, 5, 0, 0], 1, 0, "prompt"),
        ([0, 5, 5, 0], 1, 0, "prompt+decode"),
        ([0, 0, 0, 9], 1, 0, "computing"),  # graphs that are not understood
        ([0, 0, 0, 0], 0, 10, "reading"),
        ([0, 0, 0, 0], 0, 0, "idle"),
    ],
)
def test_what_the_server_does(tokens: list[int], graphs: int, causes: int, word: str) -> None:
    history = History()
    for second in range(2):
        history.add(
            at(
                float(second),
                process(
                    tokens=np.array(tokens, float) * second,
                    graphs=1.0 + graphs * second,
                    causes=np.full(5, causes * second, float),
                    stall_seconds=0.0,
                ),
            )
        )
    assert plain(history)[0].split("pid 7  ")[1].split("  ")[0].strip() == word


def test_the_heatmap_shows_when_a_layer_was_read() -> None:
    where = tuple(Place("m", f"blk.{n}.w", n, "w") for n in range(4))
    history = History(window=1.0)
    reads = np.zeros((4, len(COUNTERS)))
    history.add(at(0.0, totals(places=where, counters=reads.copy())))
    for second in range(1, 9):
        reads[(second - 1) % 4, 0] += 1e6 * (1 if second <= 4 else 0.5)
        history.add(at(float(second), totals(places=where, counters=reads.copy())))
    lines = plain(history, height=24)
    begin = next(i for i, line in enumerate(lines) if "layers, 8 s" in line)
    cells = [line[56:].ljust(24) for line in lines[begin + 1 : begin + 6]]
    assert [cell[-8:] for cell in cells[:4]] == ["█   ▒   ", " █   ▒  ", "  █   ▒ ", "   █   ▒"]
    assert [cell[0] for cell in cells[:4]] == ["0", "1", "2", "3"]
    assert cells[4].strip() == "█ 1.00 MB/s a layer"


def test_many_layers_share_lines_and_none_is_left_out() -> None:
    history = lived(process(layers=61))
    lines = plain(history)
    labels = [line[56:62].strip() for line in lines[8:-1]]
    spans = [[int(x) for x in label.split("-")] for label in labels if label[:1].isdigit()]
    assert [n for span in spans for n in range(span[0], span[-1] + 1)] == list(range(61))
    assert "other" in labels


def test_scrolling_and_choosing() -> None:
    history = lived(process(7), process(9, layers=20))
    view = View()
    assert "process 1 of 2" in plain(history, view)[0]
    view = press(view, "tab", history)
    assert view.pid == 9
    assert "pid 9" in plain(history, view)[0]
    assert "tab" in plain(history, view)[-1]
    assert press(view, "right", history).pid == press(view, "left", history).pid == 7
    view = press(press(view, "down", history), "pagedown", history)
    assert view.first == 11
    full, scrolled = (plain(history, v, height=60) for v in (replace(view, first=0), view))
    assert scrolled[8].split()[0] == full[19].split()[0]
    for _ in range(9):
        view = press(view, "pagedown", history)
    assert view.first == 41  # 42 tensors: the last stays on the screen
    assert press(replace(view, first=3), "pageup", history).first == 0
    assert press(view, "n", history).first == 0
    history.add(at(9.0, process(7, tick=9)))
    assert "pid 7" in plain(history, view)[0]  # the one that was chosen is gone


def test_keys_that_choose() -> None:
    history = lived(process())
    for key in GROUPS:
        assert press(View(), key, history).by == key
    for key in SORTS:
        assert press(View(), key, history).sort == key
        plain(history, View(sort=key))
    assert not set(GROUPS) & set(SORTS)
    assert press(View(), "p", history).paused
    assert not press(View(paused=True), "p", history).paused
    assert press(View(), "q", history).ended
    assert press(View(), "x", history) == press(View(), "escape", history) == View()
    for key in ("up", "down", "tab", "left"):
        assert press(View(), key, History()) == View()


def test_before_there_is_anything() -> None:
    assert plain(History(), origin="from here")[:2] == ["no process is traced: none uses a GGUF model", "from here"]
    once = lived(process(), seconds=1)
    assert "measuring …" in plain(once)
    assert press(View(), "down", once) == View()
    assert table_rows(None, once.latest(7), View()) == []


def test_nothing_happens() -> None:
    history = lived(process(tick=0, graphs=0.0))
    lines = plain(history)
    assert "idle" in lines[0]
    assert "read 0 B/s, - of it again" in lines[2]
    assert any("nothing was read" in line for line in lines)


def test_causes_that_there_were_not_take_no_line() -> None:
    assert not any(line.startswith("prefetcher") for line in plain(lived(process())))
    long_ago = np.array([1.0, 1, 9e9, 0, 0])
    history = History()
    for second in range(3):
        history.add(at(float(second), process(tick=second + 1, causes=long_ago)))
    assert not any(line.startswith("prefetcher") for line in plain(history))
    assert any(line.startswith("prefetcher") for line in plain(lived(process(causes=np.ones(5)))))


def test_problems_status_and_pause_are_said() -> None:
    history = lived(process(problems=2.0))
    assert plain(history, width=120)[2].endswith("2 problems: see the log")
    assert plain(history, status="no daemon\x1b[2J")[-1] == "no daemon\\x1b[2J"
    assert plain(history, View(paused=True))[0].endswith("paused")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 60),
    st.lists(st.text(max_size=40), min_size=1, max_size=6),
    st.sampled_from(list(GROUPS)),
    st.integers(0, 8),
)
def test_any_screen_fits_whatever_names_are(width: int, height: int, names: list[str], by: str, first: int) -> None:
    where = tuple(Place(names[0], name, i - 1, name) for i, name in enumerate(dict.fromkeys(names)))
    of = Totals(
        7,
        places=where,
        counters=np.ones((len(where), len(COUNTERS))),
        causes=np.ones(5),
        models=dict.fromkeys(names, 10.0),
    )
    for line in plain(lived(of), View(by=by, first=first), width, height, origin="o", status=names[-1][:10]):
        assert not any(ord(c) < 32 or ord(c) == 127 for c in line)


def test_a_thousand_tensors_are_quick() -> None:
    import time

    history = lived(process(layers=500))
    begin = time.process_time()
    plain(history)
    assert time.process_time() - begin < 2  # some 10 ms


# --- the terminal


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (b"q", ["q"]),
        (b"rs\t", ["r", "s", "tab"]),
        (b"\x1b[A\x1b[B\x1bOC\x1bOD", ["up", "down", "right", "left"]),
        (b"\x1b[Z\x1b[5~\x1b[6~", ["backtab", "pageup", "pagedown"]),
        (b"\x1b[1;5Aq", ["q"]),
        (b"\x1b[200~t", ["t"]),
        (b"\x1b", []),
        ("é\x00\x7f".encode(), []),
    ],
)
def test_keys(typed: bytes, expected: list[str]) -> None:
    assert keys(typed) == expected


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    """A terminal of 80 by 24: our end, the program's end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def drain(fd: int) -> str:
    os.set_blocking(fd, False)
    found = b""
    try:
        while part := os.read(fd, 65536):
            found += part
    except BlockingIOError:
        pass
    finally:
        os.set_blocking(fd, True)
    return found.decode()


def on(theirs: int, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    file = os.fdopen(os.dup(theirs), "r+b", buffering=0)
    monkeypatch.setattr(sys, "stdin", file)
    out = io.TextIOWrapper(os.fdopen(os.dup(theirs), "wb"), write_through=True)
    return Terminal(Console(file=out, width=80, height=24, force_terminal=True, color_system="standard"))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_the_terminal_is_as_it_was(
    tty: tuple[int, int], monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    ours, theirs = tty
    before, handlers = termios.tcgetattr(theirs), logging.root.handlers[:]
    made = on(theirs, monkeypatch)
    try:
        with made as terminal:
            during = termios.tcgetattr(theirs)
            assert not during[3] & (termios.ECHO | termios.ICANON)
            assert during[3] & termios.ISIG
            assert during[6][termios.VSUSP] == b"\0"
            logging.getLogger("llmtraced.x").warning("a probe is %s", "gone")
            assert (terminal.take_log(), terminal.take_log()) == ("a probe is gone", "")
            terminal.draw([Text("hello")])
            os.write(ours, b"\x1b[Aq")
            assert terminal.keys(1) == ["up", "q"]
            assert terminal.keys(0) == []
            assert terminal.size == (80, 24)
            if error:
                raise error
    except (KeyboardInterrupt, ZeroDivisionError):
        pass
    after = termios.tcgetattr(theirs)
    assert after == before
    assert logging.root.handlers == handlers
    shown = drain(ours)
    assert "hello" in shown
    assert "gone" not in shown
    assert shown.index("\x1b[?1049h") < shown.index("hello") < shown.index("\x1b[?1049l")
    assert shown.rindex("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor is back


def test_a_terminal_that_is_gone(tty: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with on(tty[1], monkeypatch) as terminal:
        reader, writer = os.pipe()
        os.close(writer)
        monkeypatch.setattr(terminal, "_input", reader)
        assert terminal.keys(1) is None
        monkeypatch.setattr(terminal, "_input", tty[1])
        os.close(reader)


class FakeTerminal:
    """Types what it is told: an item a call of ``keys``, and keeps what is drawn."""

    def __init__(self, *typed: list[str] | None, log: str = "") -> None:
        self.typed = list(typed)
        self.drawn: list[list[str]] = []
        self.size = (80, 24)
        self.log = log

    def take_log(self) -> str:
        line, self.log = self.log, ""
        return line

    def draw(self, lines: list[Text]) -> None:
        self.drawn.append([line.plain for line in lines])

    def keys(self, seconds: float) -> list[str] | None:
        return self.typed.pop(0)


class Clock:
    """A second passes at every look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float = 1.0) -> None:
        self.now = 0.0
        self.step = step
        monkeypatch.setattr(module.time, "monotonic", self)

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def growing() -> Iterator[Snapshot]:
    tick = 0
    while True:
        tick += 1
        yield at(float(tick), process(tick=tick))


def run(terminal: FakeTerminal, take: Any, interval: float = 1.0) -> History:
    history = History()
    watch(take, terminal, history, View(), interval, "o")  # type: ignore[arg-type]
    return history


def test_watch_draws_and_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    terminal = FakeTerminal([], [], ["l"], ["q"], log="tracing process 7")
    source = growing()
    run(terminal, lambda: next(source))
    assert terminal.drawn[0][-1] == "tracing process 7"
    assert any("tensors" in line for line in terminal.drawn[1])
    assert any(line.startswith("layer 2") for line in terminal.drawn[-1])


def test_watch_ends_with_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    source = growing()
    terminal = FakeTerminal([], None)
    run(terminal, lambda: next(source))
    assert not terminal.typed


def test_a_key_draws_at_once_and_a_new_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 0.001)
    terminal = FakeTerminal([], [], ["l"], [], ["q"])
    source = growing()
    run(terminal, lambda: next(source), interval=1000)
    assert len(terminal.drawn) == 2
    terminal = FakeTerminal([], [], [], ["q"])
    keys_before = terminal.keys

    def resized(seconds: float) -> list[str] | None:
        terminal.size = (100, 24) if len(terminal.typed) <= 3 else terminal.size
        return keys_before(seconds)

    terminal.keys = resized  # type: ignore[method-assign]
    run(terminal, lambda: next(source), interval=1000)
    assert len(terminal.drawn) == 2


def test_a_daemon_that_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did in between is not told as if it had been done in one interval."""
    Clock(monkeypatch)
    answers: list[Any] = [at(1.0, process(tick=1)), at(2.0, process(tick=2)), LlmtracedError("no daemon answers")]
    answers += [at(100.0, process(tick=900)), at(101.0, process(tick=902))]

    def take() -> Snapshot:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    terminal = FakeTerminal([], [], [], [], ["q"])
    history = run(terminal, take)
    assert terminal.drawn[2][-1] == "no daemon answers"
    assert any("3.00 tokens/s" in line for line in terminal.drawn[2])
    recent = history.recent(7)
    assert recent is not None
    assert (recent.seconds, recent.tokens[2]) == (1.0, 6)


def test_a_pause_takes_no_snapshots_and_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    taken = 0
    source = growing()

    def take() -> Snapshot:
        nonlocal taken
        taken += 1
        return next(source)

    terminal = FakeTerminal([], ["p"], [], [], ["s"], ["p"], [], ["q"])
    history = run(terminal, take)
    assert taken == 2 + 2
    assert any("paused" in line for line in terminal.drawn[2])
    assert any("stall/s▼" in line for line in terminal.drawn[-3])  # sorting goes on
    assert len(history.intervals(7)) == 2


def test_another_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def take() -> Snapshot:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(FakeTerminal(), take)


# --- the command


def test_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a page to the screen, by the command itself; without a terminal it is once anyway."""
    from fakes import FakeTracer, model, target
    from test_watch import TENSORS

    from llmtraced.exposition import exposition
    from llmtraced.metrics import LlmtracedCollector
    from llmtraced.recorder import Recorder
    from llmtraced.schema import Detail, Phase
    from llmtraced.serve import MetricsServer
    from llmtraced.store import TraceWriter

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "20")
    recorder = Recorder(FakeTracer(), 60)  # type: ignore[arg-type]
    recorder.add(target({"m.gguf": model(TENSORS)}, pid=11), TraceWriter(None, "s", {}), Detail.FAULTS, Phase.UNKNOWN)
    collector = LlmtracedCollector(recorder)
    server = MetricsServer("127.0.0.1", 0, lambda: exposition(collector.collect()))
    try:
        url = f"http://127.0.0.1:{server.port}/metrics"
        for words in (["--once"], []):
            assert main(["top", "--url", url, "--interval", "100ms", *words]) == 0
            printed = capsys.readouterr().out.splitlines()
            assert len(printed) == 19
            assert printed[0].startswith("m.gguf  pid 11  idle")
            assert printed[0].endswith(f"from 127.0.0.1:{server.port}")
            assert any(line.startswith("blk.0.a ") for line in printed)
            assert "\x1b" not in "".join(printed)
        assert main(["top", "--url", url, "--interval", "100ms", "--pid", "12"]) == 0
        assert capsys.readouterr().out.startswith("no process is traced")
    finally:
        server.close()
        recorder.close()


@pytest.mark.parametrize("word", ["0", "99ms", "2h", "soon"])
def test_intervals_that_are_none(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", word])
    assert "--interval" in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--url", "http://127.0.0.1:1/metrics"]) == 1
    assert capsys.readouterr().err.startswith("llmtraced: no daemon answers at http://127.0.0.1:1/metrics")


def test_the_column_that_it_is_sorted_by_is_always_there() -> None:
    for key, title in SORTS.items():
        heading = next(
            line.plain for line in screen(lived(process()), View(sort=key), 80, 24) if line.plain.startswith("tensors")
        )
        assert f"{'tensors' if key == 'n' else title}{'▲' if key == 'n' else '▼'}" in heading


def test_figures_are_whole_at_80_columns() -> None:
    busy = process(tokens=np.array([0, 12.0, 31.0, 0]))
    busy = replace(busy, counters=busy.counters * [1, 1, 1, 40, 90, 1], stall_seconds=0.69)
    second = screen(lived(busy), View(), 80, 24)[1].plain
    assert second.rstrip().endswith("major)")
    assert len(second) == 80
