"""The page: everything on it, nothing from elsewhere, hostile names harmless."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.advise import advise
from llmtraced.analysis.trace import open_trace
from llmtraced.commands import main
from llmtraced.reporters import html
from llmtraced.reporters.questions import QUESTIONS

pytest.importorskip("matplotlib", reason="the page needs matplotlib: pip install matplotlib")

EVIL = '</script><img src=x onerror=alert(1)>\x1b[31m&".weight'


class Seen(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "use", "path", "rect", "image", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.fixture
def trace(tmp_path: Path) -> Builder:
    build = Builder(tmp_path / "trace")
    build.tensor((EVIL, 0, 8192), ("blk.0.ffn_up.weight", 8192, 4096), layer=0, component="ffn_up")
    for _ in range(2):
        build.adds((EVIL, 0, 8192), ("blk.0.ffn_up.weight", 8192, 4096))
    build.write("faults", [{"tensor_name": EVIL, "major": True, "latency_ns": 5_000_000, "token": 1}])
    build.write("tokens", [{"token": n, "start_ns": n * 10**9, "end_ns": n * 10**9 + 10**8} for n in range(1, 4)])
    return build


def parsed(page: str) -> Seen:
    seen = Seen()
    seen.feed(page)
    return seen


def test_every_question_has_its_section_with_a_picture(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    seen = parsed(page)
    sections = [attrs["id"] for tag, attrs in seen.tags if tag == "section"]
    assert sections == list(QUESTIONS)
    assert sum(tag == "svg" for tag, _ in seen.tags) == len(QUESTIONS)
    assert [attrs["href"] for tag, attrs in seen.tags if tag == "a"][: len(QUESTIONS)] == [f"#{n}" for n in QUESTIONS]
    assert not seen.open, "all that was opened is closed"


def test_nothing_comes_from_elsewhere(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    for tag, attrs in parsed(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attrs.get(name) or ""
            assert target.startswith(("#", "data:image/png;base64,")) or not target, (tag, name, target)
    assert "url(http" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_hostile_names_are_text(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    seen = parsed(page)
    assert not [tag for tag, _ in seen.tags if tag == "img"]
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert sum(tag == "script" for tag, _ in seen.tags) == 1
    assert "\x1b" not in page
    assert "&lt;/script&gt;" in page


def test_cells_have_units_and_a_number_to_sort_by() -> None:
    assert html.cell("size_bytes", 1_670_000_000) == '<td data-v="1670000000">1.67 GB</td>'
    assert html.cell("bytes_read", 0) == '<td data-v="0">0 B</td>'
    assert html.cell("stall_ns", 345_000_000) == '<td data-v="345000000">345 ms</td>'
    assert html.cell("share", 0.25) == '<td data-v="0.25">25.0%</td>'
    assert html.cell("major_faults", 12345) == '<td data-v="12345">12,345</td>'
    assert html.cell("backed", False) == "<td>False</td>"
    assert html.cell("layer", None) == '<td data-v="">-</td>'
    assert html.cell("tensor_name", "<b>") == "<td>&lt;b&gt;</td>"


def test_a_long_table_says_what_it_leaves_out(trace: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "ROWS", 2)
    page = "".join(html.page(open_trace(trace.path)))
    assert "tokens: the first 2 of 3 rows; all with llmtraced report tokens --json" in page


def test_pictures_take_the_page_s_ink(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    assert "currentColor" in page
    assert not re.search(r"(fill|stroke): ?#000000", page)
    assert "prefers-color-scheme: dark" in page
    assert re.search(r"\.wide svg \{[^}]*fill: currentColor", page)  # text that has no colour of its own


def test_advice_is_on_the_page_in_full(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    findings = page[page.index('<ul class="findings">') : page.index("</ul>")]
    assert findings.count("<li") == len(advise(open_trace(trace.path))["findings"])
    assert "<pre>" in findings


def test_lines_that_go_on_are_joined_for_the_page_wraps_by_itself(trace: Builder) -> None:
    page = "".join(html.page(open_trace(trace.path)))
    answers = re.findall(r'<p class="answer">(.*?)</p>', page, re.DOTALL)
    assert answers
    assert not [answer for answer in answers if "\n  " in answer]


def test_an_empty_trace_makes_a_page(tmp_path: Path) -> None:
    build = Builder(tmp_path / "trace")
    build.write("faults", [])
    page = "".join(html.page(open_trace(build.path)))
    assert [attrs["id"] for tag, attrs in parsed(page).tags if tag == "section"] == list(QUESTIONS)


def test_the_command(trace: Builder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    assert main(["report", "html", str(trace.path), "-o", str(file)]) == 0
    assert file.read_text().startswith("<!doctype html>")
    assert main(["report", "html", str(trace.path), "-o", str(file)]) == 1
    assert main(["report", "html", str(trace.path), "--json"]) == 2
    assert "neither --json nor --plot" in capfd.readouterr().err
