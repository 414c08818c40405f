"""Colours that stand beside each other in a picture can be told apart, by the colour-blind too."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from llmtraced.reporters import advise, cache, experts, pattern, plots, timeline, tokens

SIGHT = {
    "full": np.eye(3),
    # Machado, Oliveira, Fernandes 2009: severity 1, of linear RGB
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
BESIDE: dict[str, Sequence[str]] = {
    "where time went": [colour for colour, _ in tokens._PARTS.values()],
    "read for": list(tokens._CAUSES.values()),
    "classes of reads": timeline._COLOURS,
    "came in for": list(cache._COLOURS.values()),
    "fates": [colour for *_, colour in cache._FATES],
    "policies": [colour for _, _, colour, _ in experts._POLICIES],
    "sequences": [*pattern._COLOURS, plots.REST],
    "once and again": [plots.ONCE, plots.AGAIN],
    "curves": [colour for _, colour, _, _ in advise._CURVES],
}


def seen(colour: str, sight: str) -> np.ndarray:  # type: ignore[type-arg]
    """Return a colour in CIE L*a*b*."""
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (
        np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in np.array(to_xyz) @ linear / [0.9505, 1, 1.089]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("where", BESIDE)
def test_colours_beside_each_other_differ(where: str, sight: str) -> None:
    for one, other in combinations(BESIDE[where], 2):
        assert np.linalg.norm(seen(one, sight) - seen(other, sight)) > 12, (one, other)
