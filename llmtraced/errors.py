"""The one error that users see.

Everything that can go wrong for a reason outside this program is raised as an :class:`LlmtracedError`: its text says
what failed, on what, why, and what to run next; its ``exit_code`` is what the program ends with. Only
:mod:`llmtraced.commands` prints it.
"""

__all__ = ["FAILED", "NO_PERMISSION", "UNSUPPORTED", "USAGE", "LlmtracedError", "printable"]

FAILED = 1
USAGE = 2
NO_PERMISSION = 3
UNSUPPORTED = 4


class LlmtracedError(Exception):
    """A failure with a message for the user and the exit code that goes with it."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str, limit: int = 200) -> str:
    r"""Return ``text`` safe for a terminal, a log line or a label, cut to ``limit`` characters.

    Tensor names, metadata, paths and process names come from files and processes that we do not trust; control
    characters (terminal escapes among them) and lone surrogates are written as ``\\xNN`` or ``\\uNNNN``.
    """
    out = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return out if len(out) <= limit else out[: limit - 1] + "…"
