"""Where fields lie by a witness that llmtraced had no part in: ggml's own functions.

``python ggml_functions.py LIBGGML_BASE LAYOUT`` compares a layout (JSON, the fields of
:class:`llmtraced.ggml_layout.Layout`) with what the library's functions make and return, and prints what differs, a
line each. It is a process of its own since a library of another build cannot be loaded beside one.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["unlike_its_functions"]

_F32: Final = 0
_SHAPES: Final = ((7, 11), (7, 13))  # ggml_mul_mat of these is 11 by 13


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def unlike_its_functions(library: Path, layout: Mapping[str, int]) -> list[str]:
    """Return in what a layout differs from what ``libggml-base`` itself does with its structures, a line each."""
    command = [sys.executable, __file__, str(library), json.dumps(dict(layout))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return [f"its functions could not be called: {done.stderr.strip()[-300:]}"]
    return done.stdout.splitlines()


def _compare(library: str, layout: Mapping[str, int]) -> Iterator[str]:
    ggml = ctypes.CDLL(library)
    function = _functions(ggml)
    context = function("ggml_init", ctypes.c_void_p)(_Parameters(16 << 20, None, False))
    new = function("ggml_new_tensor_2d", ctypes.c_void_p)
    pointer = ctypes.c_void_p
    first, second = (new(pointer(context), _F32, *map(ctypes.c_int64, shape)) for shape in _SHAPES)
    third = function("ggml_mul_mat", pointer)(pointer(context), pointer(first), pointer(second))
    rms_norm = function("ggml_rms_norm", pointer)
    norm = rms_norm(pointer(context), pointer(third), ctypes.c_float(1e-5))
    last = rms_norm(pointer(context), pointer(norm), ctypes.c_float(1e-5))  # so there are more nodes than leaves
    graph = function("ggml_new_graph", pointer)(pointer(context))
    function("ggml_build_forward_expand", None)(pointer(graph), pointer(last))

    def read(kind: Any, address: int, field: str, element: int = 0) -> int:
        return int(kind.from_address(address + layout[field] + element * ctypes.sizeof(kind)).value or 0)

    word, number = ctypes.c_uint64, ctypes.c_int32
    ops = _operators(function("ggml_op_name", ctypes.c_char_p))
    same: list[tuple[str, object, object]] = [
        ("tensor_name", first + layout["tensor_name"], function("ggml_get_name", pointer)(pointer(first))),
        ("tensor_data", read(word, second, "tensor_data"), function("ggml_get_data", pointer)(pointer(second))),
        ("tensor_ne", [read(word, third, "tensor_ne", i) for i in range(4)], [11, 13, 1, 1]),
        ("tensor_nb", [read(word, third, "tensor_nb", i) for i in range(4)], [4, 44, 572, 572]),
        ("tensor_src", [read(word, third, "tensor_src", i) for i in range(3)], [first, second, 0]),
        ("tensor_op", [read(number, t, "tensor_op") for t in (third, norm)], [ops["MUL_MAT"], ops["RMS_NORM"]]),
        ("op_mul_mat", layout["op_mul_mat"], ops["MUL_MAT"]),
        ("op_mul_mat_id", layout["op_mul_mat_id"], ops["MUL_MAT_ID"]),
        ("graph_n_nodes", read(number, graph, "graph_n_nodes"), 3),
        ("graph_nodes", read(word, graph, "graph_nodes"), function("ggml_graph_nodes", pointer)(pointer(graph))),
    ]
    assert {field for field, _, _ in same} == layout.keys(), "a field is not compared"
    for field, found, expected in same:
        if found != expected:
            yield f"{field} at {layout[field]}: {found} is there, and ggml says {expected}"


def _functions(library: ctypes.CDLL) -> Callable[[str, Any], Callable[..., Any]]:
    def function(name: str, result: Any) -> Callable[..., Any]:
        found = getattr(library, name)
        found.restype = result
        return found  # type: ignore[no-any-return]

    return function


def _operators(name_of: Callable[[int], bytes]) -> dict[str, int]:
    """Return operators' numbers, by name; ``ggml_op_name`` is asked for no number beyond those looked for."""
    numbers: dict[str, int] = {}
    while not {"MUL_MAT", "MUL_MAT_ID", "RMS_NORM"} <= numbers.keys():
        numbers[name_of(len(numbers)).decode()] = len(numbers)
    return numbers


if __name__ == "__main__":
    print(*_compare(sys.argv[1], json.loads(sys.argv[2])), sep="\n", end="")
