"""Series as Prometheus reads them: its text format, written fast.

A scrape has thousands of series whose labels are the same every time, so their text is made once and kept.
https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

__all__ = ["CONTENT_TYPE", "NONE", "Family", "Labels", "Sample", "exposition"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Labels:
    """What tells a series from its siblings.

    Args:
        names, values: of the labels, in the order in which they are written.

    Attributes:
        text: as it stands between name and value, braces included; empty without labels.
    """

    __slots__ = ("names", "text", "values")

    def __init__(self, names: Sequence[str] = (), values: Sequence[str] = ()) -> None:
        self.names, self.values = tuple(names), tuple(values)
        pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
        self.text = f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


NONE: Final = Labels()


class Sample(NamedTuple):
    """A series' value, as prometheus_client's parser returns it, too."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(slots=True)
class Family:
    """A metric: series of one name.

    Attributes:
        name: as it is written; a counter's ends in ``_total``.
        text: its help, a sentence.
        kind: ``counter`` or ``gauge``.
        series: labels and values.
    """

    name: str
    text: str
    kind: str
    series: list[tuple[Labels, float]] = field(default_factory=list)

    def add(self, labels: Labels, value: float) -> None:
        """Add a series."""
        self.series.append((labels, value))

    @property
    def samples(self) -> Iterator[Sample]:
        """The series with their labels by name."""
        for labels, value in self.series:
            yield Sample(self.name, dict(zip(labels.names, labels.values, strict=True)), value)


def exposition(families: Iterable[Family]) -> bytes:
    """Return the families in Prometheus's text format; one without series is left out."""
    lines: list[str] = []
    for family in families:
        if family.series:
            name = family.name
            lines += (f"# HELP {name} {family.text}", f"# TYPE {name} {family.kind}")
            lines += [f"{name}{labels.text} {value}" for labels, value in family.series]
    return ("\n".join(lines) + "\n").encode()
