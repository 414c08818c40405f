"""The table of operators' names, found in made-up memory by what is in it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llmtraced.operator_names import find_table

STRINGS, DATA = 0x10000, 0x20000
NAMES = ["NONE", "DUP", "ADD", "MUL_MAT", "MUL_MAT_ID", "ROPE"]


def memory(names: Sequence[str], before: bytes = b"", after: bytes = b"", gap: int = 0) -> list[tuple[int, bytes]]:
    """Return two stretches: strings, in another order than in the table, and the table between other data."""
    strings, places = b"\0x+y\0none\0", {}
    for name in sorted(names):
        strings += b"GGML_OP_" * (name == "NONE")  # a linker stores a string that ends another one inside it
        places[name] = STRINGS + len(strings)
        strings += name.encode() + b"\0"
    table = b"".join(struct.pack("<Q", places[name]) for name in names)
    return [(STRINGS, strings), (DATA, bytes(gap) + before + table + after)]


def test_the_table_is_found_and_ends_where_other_strings_begin() -> None:
    symbols = struct.pack("<2Q", STRINGS + 5, STRINGS + 1)  # "none", "x+y": of the table of symbols behind it
    found = find_table(memory(NAMES, before=bytes(24), after=symbols))
    assert found == dict(enumerate(name.lower() for name in NAMES))


def test_an_array_of_other_strings_is_none() -> None:
    assert find_table(memory(["NONE", "ABS", "NEG"])) == {}
    assert find_table(memory(["F32", "NONE"])) == {}
    assert find_table([]) == {}


def test_pointers_are_aligned() -> None:
    assert find_table(memory(NAMES, gap=4)) == {}


def test_a_pointer_that_leads_nowhere_ends_it() -> None:
    (strings, (start, table)) = memory(NAMES)
    cut = table[:24] + struct.pack("<Q", 8) + table[32:]
    assert find_table([strings, (start, cut)]) == {0: "none", 1: "dup", 2: "add"}


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_any_memory_is_searched(contents: list[bytes]) -> None:
    find_table([(STRINGS + (n << 12), content + b"\0NONE\0DUP\0") for n, content in enumerate(contents)])
