"""Loops as machine code."""

import numpy as np
import pytest

from llmtraced.analysis import compiled as module
from llmtraced.analysis.compiled import compiled


def last_of(values: np.ndarray) -> int:
    found = -1
    for i in range(values.size):
        found = values[i]
    return found


def test_it_is_the_same_function() -> None:
    machine = compiled(last_of)
    assert machine.__name__ == "last_of"
    assert machine(np.arange(5)) == 4
    assert machine(np.arange(0)) == -1


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        __import__("numba").njit(last_of, cache=True)
    assert module.compiled(last_of)(np.arange(3)) == 2
