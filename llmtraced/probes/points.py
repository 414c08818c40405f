"""Attach points, declared as data: what is attached to what, whether it must be, and what is lost without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtraced.schema import Detail
from llmtraced.target import Symbol

__all__ = ["Kprobe", "Point", "SoftwareEvent", "Tracepoint", "Uprobe", "UprobeSet"]


@dataclass(frozen=True, slots=True)
class Kprobe:
    """The entry of a kernel function: for kernels that have no tracepoint of the same."""

    program: str
    name: str

    def __str__(self) -> str:
        return f"kprobe {self.name}"


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """A kernel tracepoint, attached raw: the program gets its arguments, no record is made.

    ``typed``: the verifier knows the types of its arguments (BTF), so that reading their fields is a plain load.
    ``otherwise``: what is attached where this cannot be.
    """

    program: str
    name: str
    lost: str
    required: bool = True
    typed: bool = False
    otherwise: Kprobe | None = None

    def __str__(self) -> str:
        return f"tracepoint {self.name}"


@dataclass(frozen=True, slots=True)
class SoftwareEvent:
    """A perf software event on every CPU; ``config`` is its number in enum perf_sw_ids."""

    program: str
    name: str
    config: int
    lost: str
    required: bool = True

    def __str__(self) -> str:
        return f"software event {self.name}"


@dataclass(frozen=True, slots=True)
class Uprobe:
    """A function of the traced process's ggml, from ``detail`` on. Never required: faults need none of them.

    ``instead_of_ops``: where a build has it, it takes the place of the probes on single operators. ``beside``: the
    symbol beside whose probe it is needed; a build that lacks its own does not do what it is for, and loses nothing.
    """

    program: str
    symbol: str
    lost: str
    detail: Detail
    on_return: bool = False
    instead_of_ops: bool = False
    beside: str = ""

    @property
    def required(self) -> bool:
        """Whether tracing is refused without it."""
        return False

    def is_needed(self, symbols: Mapping[str, Symbol]) -> bool:
        """Whether a build with these symbols may do what it is for: where one was inlined, this may be, too."""
        if not self.beside:
            return True
        other = symbols.get(self.beside)
        return other is not None and (self.symbol in symbols or bool(other.instead))

    def __str__(self) -> str:
        return f"{'uretprobe' if self.on_return else 'uprobe'} {self.symbol}"


@dataclass(frozen=True, slots=True)
class UprobeSet:
    """Functions of the traced process's ggml, all at once, for what single :class:`Uprobe` would see too.

    One link for all (Linux 6.6). ``symbol`` is a function, ``methods`` a regular expression of C++ methods that take
    the same arguments after their ``this``. Only where a build has both, and the hook for all operators, is it known
    that they see all. ``ends`` are functions that are not recorded themselves, and end what came before them.
    """

    program: str
    symbol: str
    methods: str
    ends: tuple[str, ...]
    lost: str
    detail: Detail

    @property
    def required(self) -> bool:
        """Whether tracing is refused without it."""
        return False

    def __str__(self) -> str:
        return f"uprobe {self.symbol} and methods"


Point = Tracepoint | SoftwareEvent | Uprobe
