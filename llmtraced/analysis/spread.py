"""Minimum and percentiles of many weighted numbers, by group, in little memory."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.analysis.columns import grown
from llmtraced.analysis.compiled import compiled

__all__ = ["Spread"]

_BITS: Final = 6
_STEPS: Final = 1 << _BITS  # per doubling
_BINS: Final = 52 * _STEPS + 1  # up to 2^52: 52 days of ns
_QUANTILES: Final = (("p50", 50), ("p90", 90))


class Spread:
    """Weights of whole numbers in ``groups`` groups: exact up to 127, above in steps of less than 1.6 %.

    The bin of a number is its exponent and the first six bits of its mantissa, as floating point has them.
    """

    def __init__(self, groups: int) -> None:
        self._weight = np.zeros((groups, _BINS), np.int64)
        self._least = np.full(groups, np.iinfo(np.int64).max)

    def fit(self, groups: int) -> None:
        """Make room for more groups."""
        self._weight = grown(self._weight, (groups, _BINS))
        self._least = np.append(self._least, np.full(max(groups - self._least.size, 0), np.iinfo(np.int64).max))

    def add(self, group: NDArray[np.int64], value: NDArray[np.int64], weight: NDArray[np.int64]) -> None:
        """Add ``weight`` times each ``value`` (negative ones count as 0) to its group."""
        value = np.clip(value, 0, (1 << 52) - 1)
        at = (value.astype(np.float64).view(np.int64) >> (52 - _BITS)) - (1023 << _BITS) + 1
        _add(group, value, np.maximum(at, 0), weight, self._weight, self._least)

    def total(self, group: int | None) -> int:
        """Return the weight in a group; None: in all of them."""
        return int(self._weights(group).sum())

    def points(self, group: int | None) -> dict[str, int] | None:
        """Return ``min`` and the percentiles of a group (None: of all): the number that so much weight is at or below.

        Returns None where nothing was added.
        """
        below = self._weights(group).cumsum()
        if not below.size or not below[-1]:
            return None
        least = int(self._least.min() if group is None else self._least[group])
        found = {name: int(np.searchsorted(below * 100, int(below[-1]) * percent)) for name, percent in _QUANTILES}
        return {"min": least, **{name: max(_middle(at), least) for name, at in found.items()}}

    def _weights(self, group: int | None) -> NDArray[np.int64]:
        weights: NDArray[np.int64] = self._weight.sum(0) if group is None else self._weight[group]
        return weights


@compiled
def _add(
    group: NDArray[np.int64],
    value: NDArray[np.int64],
    at: NDArray[np.int64],
    weight: NDArray[np.int64],
    weights: NDArray[np.int64],
    least: NDArray[np.int64],
) -> None:
    for i in range(group.size):
        weights[group[i], at[i]] += weight[i]
        least[group[i]] = min(least[group[i]], value[i])


def _middle(at: int) -> int:
    """Return the number in the middle of a bin."""
    if not at:
        return 0
    exponent, step = divmod(at - 1, _STEPS)
    low, width = (_STEPS + step) << exponent >> _BITS, 1 << exponent >> _BITS
    return low + max(width - 1, 0) // 2
