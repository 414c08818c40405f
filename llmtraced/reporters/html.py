"""All questions on one page: self-contained, offline, sortable, light and dark, readable on a phone.

The page asks nothing of any network (its content security policy forbids it) and works from a file. Every text that
came from a model file or a process is escaped; pictures are SVG drawn by the reporters.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from llmtraced import __version__
from llmtraced.analysis.trace import Trace
from llmtraced.errors import printable
from llmtraced.reporters.advise import evidence
from llmtraced.reporters.questions import QUESTIONS, Options, Question
from llmtraced.reporters.text import Style, duration, several, size, three, trust

__all__ = ["ROWS", "cell", "page"]

ROWS: Final = 1000
"""Rows of a table that the page holds; it says where it holds fewer than there are."""

_TABLES: Final = {"hot_cold": "experts of each layer, hottest first"}
_PLAIN: Final = Style(width=110)
_SCRIPT: Final = """
document.querySelectorAll('th').forEach(th => th.addEventListener('click', () => {
  const table = th.closest('table'), body = table.tBodies[0], at = th.cellIndex;
  const down = th.getAttribute('aria-sort') !== 'descending';
  table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = row => {
    const of = row.cells[at].dataset.v;
    return of === undefined ? row.cells[at].textContent : of === '' ? -Infinity : +of;
  };
  const rows = [...body.rows].map(row => [value(row), row]);
  rows.sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1));
  body.append(...rows.map(([, row]) => row));
}));
"""
_LOOK: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #667; --line: #d5dae0; --band: #f4f6f8;
  --warn: #9a5b00; --link: #0b62b8 }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --paper: #14171a; --soft: #98a2ad; --line: #333a42;
  --band: #1c2126; --warn: #f0b35a; --link: #7db7f5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { margin: 0; font-size: 1.25rem }
nav { display: flex; flex-wrap: wrap; gap: .25rem .9rem; padding: .6rem 0; border-bottom: 1px solid var(--line) }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
section { padding: 1.2rem 0; border-bottom: 1px solid var(--line) }
.asks { color: var(--soft); margin: 0 0 .6rem } .warn { color: var(--warn) } .answer { white-space: pre-line }
.wide { overflow-x: auto } .wide svg { min-width: 36rem; width: 100%; height: auto; display: block;
  fill: currentColor }
.findings { padding: 0; list-style: none } .findings li { border-left: 4px solid var(--line); padding: .1rem .8rem;
  margin: .7rem 0 } .findings .act { border-color: var(--warn) } .findings p { margin: .3rem 0 }
.findings .why { color: var(--soft) } .findings pre { margin: .4rem 0; white-space: pre-wrap }
pre { overflow-x: auto; background: var(--band); padding: .8rem; font-size: 12.5px; line-height: 1.35 }
summary { cursor: pointer; color: var(--link); margin: .5rem 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th { cursor: pointer; text-align: left; white-space: nowrap; position: sticky; top: 0; background: var(--band) }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); max-width: 24rem; overflow-wrap: break-word }
td[data-v] { text-align: right;
  white-space: nowrap } th[aria-sort=descending]::after { content: ' ▾' } th[aria-sort=ascending]::after {
  content: ' ▴' }
.rows { max-height: 30rem; overflow: auto }
"""


def page(trace: Trace, phase: str | None = None, done: Callable[[str], None] = lambda _name: None) -> Iterator[str]:
    """Yield the page, piece by piece.

    Args:
        trace: an open trace.
        phase: only what happened in this phase.
        done: told the name of each question when it has been answered.
    """
    models = ", ".join(printable(model) for model in trace.models) or "a trace"
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{_text(models)} · llmtraced</title>\n<style>{_LOOK}</style>\n</head>\n<body>\n"
        f"<h1>{_text(models)}: how its memory was used</h1>\n<nav>"
        + "".join(f'<a href="#{name}">{name}</a>' for name in QUESTIONS)
        + "</nav>\n"
    )
    for i, (name, question) in enumerate(QUESTIONS.items()):
        report = question.ask(trace, Options(phase, question.rows))
        if i == 0:
            tint = "" if report["verdict"] == "complete" else ' class="warn"'
            yield from (f"<p{tint}>{_text(line)}</p>\n" for line in _whole(trust(report, _PLAIN)))
        yield from _section(name, question, report)
        done(name)
    yield f"<footer><p>llmtraced {__version__}</p></footer>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def _section(name: str, question: Question, report: Mapping[str, Any]) -> Iterator[str]:
    text = question.render(report, question.rows, _PLAIN)
    yield f'<section id="{name}">\n<h2>{name}</h2>\n<p class="asks">{_text(question.asks)}</p>\n'
    answer = _answer(text, trust(report, _PLAIN))
    if answer:
        yield f'<p class="answer">{_text(answer)}</p>\n'
    yield f'<div class="wide">{question.draw(report, "web", question.rows).decode()}</div>\n'
    if "findings" in report:
        yield from _findings(report["findings"])
    for key in question.tables:
        yield from _table(name, key, report[key])
    yield f"<details><summary>as text</summary><pre>{_text(text)}</pre></details>\n</section>\n"


def _answer(text: str, known: Sequence[str]) -> str:
    """Return the answer in words: a report's first paragraph, without what is said at the head of the page."""
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip() and line not in known]
        if lines:
            return "\n".join(_whole(lines))
    return ""


def _whole(lines: Sequence[str]) -> list[str]:
    """Return the lines with what goes on, which is set in, joined to what it goes on from: the page wraps by itself."""
    found: list[str] = []
    for line in lines:
        if found and line.startswith("  "):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line)
    return found


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what to do, most urgent first, each with its figures and the command."""
    yield '<ul class="findings">\n'
    for one in findings:
        urgent = ' class="act"' if one["severity"] == "act" else ""
        yield f"<li{urgent}><p><b>{_text(printable(one['title'], 2000))}</b></p>"
        if one["unknown"]:
            yield f"<p>cannot be said from this trace: {_text(printable(one['unknown'], 2000))}</p>"
        if one["severity"] != "fine":
            yield f"<p>{_text(evidence(one))}</p>" + f'<p class="why">{_text(one["why"])}</p>'
            if one["command"]:
                lines = (printable(line, 4096) for line in one["command"].splitlines())
                yield f"<pre>{_text(chr(10).join(lines))}</pre>"
        yield "</li>\n"
    yield "</ul>\n"


def _table(name: str, key: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    columns = [column for column in rows[0] if not isinstance(rows[0][column], dict | list)]
    count = several(len(rows), "row")
    if len(rows) > ROWS:
        count = f"the first {ROWS:,} of {count}; all with llmtraced report {name} --json"
    what = _TABLES.get(key, key)
    yield f'<details><summary>{_text(what)}: {count}</summary><div class="rows"><table>\n<thead><tr>'
    yield "".join(f"<th>{_text(_heading(column))}</th>" for column in columns)
    yield "</tr></thead>\n<tbody>\n"
    for row in rows[:ROWS]:
        yield "<tr>" + "".join(cell(column, row.get(column)) for column in columns) + "</tr>\n"
    yield "</tbody></table></div></details>\n"


def _heading(column: str) -> str:
    """Return a column's name without the unit, which its values have."""
    for unit in ("_bytes", "_ns"):
        column = column.removesuffix(unit)
    return column.replace("_", " ")


def cell(column: str, value: object) -> str:
    """Return one table cell: in units for people, with the plain number to sort by."""
    if value is None:
        return '<td data-v="">-</td>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{_text(printable(str(value)))}</td>"
    if column.endswith("bytes") or column.startswith("bytes_"):
        shown = size(value)
    elif column.endswith("_ns"):
        shown = duration(value)
    elif "share" in column:
        shown = f"{value:.1%}"
    elif isinstance(value, float):
        shown = three(value) if value > 0 else f"{value:g}"
    else:
        shown = f"{value:,}"
    return f'<td data-v="{value}">{_text(shown)}</td>'


def _text(words: str) -> str:
    return html.escape(words)
