"""The sidecar's clock (bpf/ticks.bpf.c, docs/prefetching.md): compiled in a child, attached to one process's ggml."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.ggml_layout import Layout
from llmtraced.probes import compiler, kernel, loader
from llmtraced.probes.image import Image
from llmtraced.probes.points import Uprobe
from llmtraced.schema import Detail
from llmtraced.target import Symbol

__all__ = ["MARKS", "POINTS", "RING_BYTES", "TICK_BEGIN", "TICK_END", "Ticks", "open_ticks"]

MARKS: Final = 16_384
"""Weights at which the clock can tell where the server is."""

RING_BYTES: Final = 1 << 20
TICK_BEGIN: Final = 0xFFFFFFFF
TICK_END: Final = 0xFFFFFFFE
TICK_ROWS, TICK_EXPERTS = 8, 16
"""Which experts are chosen is told of batches of so many tokens at most, and of so many a token."""
WAKE_INPUT, WAKE_EXPERTS = 2, 3
"""What is to be told of an operator besides that it begins: its input; which experts it uses."""

POINTS: Final = (
    Uprobe("on_begin", "ggml_graph_compute", "where the server is must be guessed from its page table", Detail.FAULTS),
    Uprobe("on_end", "ggml_graph_compute", "idle times are not known", Detail.FAULTS, on_return=True),
    Uprobe("on_operator", "ggml_cpu_extra_compute_forward", "multiplications tell where the server is", Detail.OPS),
    Uprobe("on_operator", "ggml_compute_forward_mul_mat", "only graphs tell where the server is", Detail.OPS),
)
"""Of the last two the first that a build has is used; or the last, where only multiplications matter: it takes half as
many traps."""

_PROGRAMS: Final = ("on_begin", "on_end", "on_operator")
_MAPS: Final = ("ticks", "clocks", "marks", "wakes")
_CLOCK: Final = np.dtype(
    [
        (n, "<u8")
        for n in (
            "n_marks",
            "tensor_src",
            "tensor_data",
            "mark",
            "token",
            "lost",
            "graph_nodes",
            "tensor_ne",
            "tensor_nb",
            "graph_n_nodes",
        )
    ]
)


@dataclass(slots=True)
class Ticks:
    """An attached clock.

    Attributes:
        maps: descriptors by name: ``ticks`` (the ring), ``clocks``, ``marks``, ``wakes``.
        links: descriptors that keep it attached.
        lost: what could not be attached, a sentence each.
        operators: whether operators are seen, not only graphs.
        matrices: of these only multiplications by weights that were not repacked.
    """

    maps: dict[str, int]
    links: list[int]
    lost: list[str]
    operators: bool
    matrices: bool = False

    def set_layout(self, layout: Layout, addresses: Sequence[int]) -> None:
        """Say where fields lie, and which weights' data to look for (sorted addresses, at most :data:`MARKS`)."""
        marks = kernel.map_array(self.maps["marks"], np.dtype("<u8"), MARKS)
        marks[: len(addresses)] = addresses
        clock = kernel.map_array(self.maps["clocks"], _CLOCK, 1)
        clock["n_marks"] = len(addresses)
        for name in (
            "graph_nodes",
            "graph_n_nodes",
            "tensor_ne",
            "tensor_nb",
            "tensor_data",
            "tensor_src",
        ):  # the last one switches it on
            clock[name] = getattr(layout, name)

    def descriptors(self) -> list[int]:
        """Return everything that must stay open."""
        return [*self.maps.values(), *self.links]

    def close(self) -> None:
        """Detach and free everything."""
        for fd in self.descriptors():
            os.close(fd)


def open_ticks(
    pid: int, symbols: Mapping[str, Symbol], width: int = 1, ring_bytes: int = RING_BYTES, *, matrices: bool = False
) -> Ticks:
    """Compile the programs and attach them to ``pid``.

    Args:
        pid: the server.
        symbols: ggml's functions in it.
        width: float32 values of the inputs that are told, of a batch of one token.
        ring_bytes: size of the ring, a power of two.
        matrices: multiplications are enough, if they can be seen alone.

    Raises:
        LlmtracedError: no permission, no BCC or headers, or not even graphs can be seen in this build.
    """
    if "ggml_graph_compute" not in symbols:
        raise LlmtracedError(
            "this build has no symbol ggml_graph_compute (stripped?), so its graphs cannot be seen", UNSUPPORTED
        )
    argument = f"{width} {ring_bytes}"
    found = compiler.image(
        "llmtraced.probes.ticks", argument, [_source(), *_flags(width, ring_bytes), *_PROGRAMS, *_MAPS]
    )
    programs, maps, refused = loader.load_image(found, _MAPS)
    ticks = Ticks(maps, [], [], False)
    try:
        for point in POINTS[:2] + (POINTS[:1:-1] if matrices and _alone(symbols) else POINTS[2:]):
            if point.program == "on_operator" and ticks.operators:
                continue
            symbol = symbols.get(point.symbol)
            if symbol is None:
                ticks.lost.append(f"{point}: this build has no such symbol; {point.lost}")
                continue
            if point.program in refused:
                raise LlmtracedError(f"{point}: {refused[point.program]}", UNSUPPORTED)
            program = programs[point.program]
            ticks.links.append(
                kernel.open_uprobe(symbol.library, symbol.offset, pid, program, str(point), on_return=point.on_return)
            )
            ticks.operators |= point.program == "on_operator"
            ticks.matrices |= point is POINTS[-1]
    except BaseException:
        ticks.close()
        raise
    finally:
        for program in programs.values():  # what is attached keeps it
            os.close(program)
    return ticks


def _alone(symbols: Mapping[str, Symbol]) -> bool:
    """Tell whether multiplications can be seen by themselves at less cost than among all operators."""
    symbol = symbols.get(POINTS[-1].symbol)
    return symbol is not None and kernel.emulated(symbol.library, symbol.offset)


def _source() -> str:
    return (loader.bpf_folder() / "ticks.bpf.c").read_text()


def _flags(width: int, ring_bytes: int) -> list[str]:
    flags = {
        "LT_TICK_PAGES": ring_bytes // 4096,
        "LT_MARKS": MARKS,
        "LT_MARK_STEPS": MARKS.bit_length(),
        "TICK_BEGIN": f"{TICK_BEGIN}U",
        "TICK_END": f"{TICK_END}U",
        "TICK_ROWS": TICK_ROWS,
        "TICK_EXPERTS": TICK_EXPERTS,
        "TICK_WIDTH": width,
        "WAKE_INPUT": WAKE_INPUT,
        "WAKE_EXPERTS": WAKE_EXPERTS,
    }
    return [f"-D{name}={value}" for name, value in flags.items()]


def _compile(width: int, ring_bytes: int) -> Image:
    programs = dict.fromkeys(_PROGRAMS, ("KPROBE", 0))
    return compiler.compiled(_source(), _flags(width, ring_bytes), programs, _MAPS)


if __name__ == "__main__":
    compiler.answer(int(sys.argv[1]), lambda: _compile(*map(int, sys.argv[2].split())))
