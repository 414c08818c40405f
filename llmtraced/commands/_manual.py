"""The manual page and the shell's completion, from the parser itself: ``python -m llmtraced.commands._manual``.

``make install`` writes them; they are nowhere else, so they cannot be out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from typing import Final

from llmtraced import __version__
from llmtraced.commands import build_parser

__all__ = ["completion", "main", "page"]

_FILES: Final = """.SH FILES
.TP
.I /etc/llmtraced.toml
what the daemon does; every key is explained in it
.TP
.I /var/lib/llmtraced
traces of the daemon
.SH EXIT STATUS
0 fine, 1 failed, 2 usage, 3 no permission, 4 kernel or target unsupported
.SH OVERHEAD
.B daemon
attaches while a process has a model mapped and only then: some microseconds a page fault, a tenth of one for each page
of the model that comes or goes.
.B \\-\\-detail ops
and
.B full
add microseconds an operator.
"""


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and those of its commands, in their order."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _parsers(sub)


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    skip = argparse._SubParsersAction
    return [a for a in parser._actions if a.help != argparse.SUPPRESS and not isinstance(a, skip)]


def _explained(parser: argparse.ArgumentParser) -> Iterator[str]:
    width = argparse.HelpFormatter(parser.prog)
    for action in _options(parser):
        yield ".TP\n"
        value = width._format_args(action, width._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        names = [f"\\fB{_roff(name)}\\fR" for name in action.option_strings] or [f"\\fI{_roff(value)}\\fR"]
        yield ", ".join(names) + (f" \\fI{_roff(value)}\\fR" if value and action.option_strings else "") + "\n"
        yield _roff(width._expand_help(action) if action.help else "") + "\n"


def page() -> str:
    """Return the manual page, roff."""
    first, *others = _parsers(build_parser())
    parts = [f'.TH LLMTRACED 1 "" "llmtraced {__version__}"\n.SH NAME\n']
    parts.append("llmtraced \\- which tensor an LLM server waits for, and making it wait less\n")
    parts.append(".SH SYNOPSIS\n.B llmtraced\n[\\fIoptions\\fR] \\fIcommand\\fR ...\n.SH DESCRIPTION\n")
    parts.append(_roff(first.description or "") + "\n.SH OPTIONS\n")
    parts += _explained(first)
    parts.append(".SH COMMANDS\n")
    for parser in others:
        parts.append(f".SS {_roff(parser.prog.removeprefix('llmtraced '))}\n")
        parts.append(f".nf\n{_roff((parser.description or '').strip())}\n.fi\n")
        parts += _explained(parser)
    return "".join(parts) + _FILES


def completion() -> str:
    """Return the completion for bash; zsh reads it through bashcompinit."""
    cases, values = [], []
    for parser in _parsers(build_parser()):
        words = [name for action in _options(parser) for name in action.option_strings]
        for action in parser._actions:
            chosen = [str(choice) for choice in action.choices or ()]
            if isinstance(action, argparse._SubParsersAction) or not action.option_strings:
                words += chosen
            else:
                values += [
                    f'    "{parser.prog} {name}") words="{" ".join(chosen)}" ;;'
                    for name in action.option_strings
                    if chosen
                ]
        cases.append(f'    "{parser.prog}") words="{" ".join(words)}" ;;')
    nested = [p.prog for p in _parsers(build_parser()) if " " in p.prog]
    return f"""# bash completion of llmtraced {__version__}, made from its parser
_llmtraced() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=llmtraced words= word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "|{"|".join(nested)}|" in *"|$command $word|"*) command="$command $word" ;; esac
  done
  case "$command $before" in
{chr(10).join(values)}
  esac
  [ -n "$words" ] || case "$command" in
{chr(10).join(cases)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _llmtraced llmtraced
"""


_WRITTEN: Final[dict[str, Callable[[], str]]] = {
    "man": page,
    "bash": completion,
    "zsh": lambda: "#compdef llmtraced\nautoload -U +X bashcompinit && bashcompinit\n" + completion(),
}


def main() -> int:
    """Write what is asked for to stdout."""
    sys.stdout.write(_WRITTEN[sys.argv[1]]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
