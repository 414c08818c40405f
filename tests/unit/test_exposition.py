"""Our text, read by Prometheus's own parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from llmtraced.exposition import NONE, Family, Labels, exposition


@given(st.text(), st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False)))
def test_values_and_labels_come_through(word: str, value: float) -> None:
    word = word.replace("\r", "")  # the parser splits lines there; names are printable() before they come here
    family = Family("a_total", "Help.", "counter", [(Labels(("x", "y"), (word, "1")), value), (NONE, 2)])
    text = exposition([family]).decode()
    (read,) = text_string_to_metric_families(text)
    assert (read.type, read.documentation) == ("counter", "Help.")
    assert [(s.name, s.labels, s.value) for s in read.samples] == [
        ("a_total", {"x": word, "y": "1"}, value),
        ("a_total", {}, 2),
    ]
    assert [(s.name, s.labels, s.value) for s in family.samples] == [(s.name, s.labels, s.value) for s in read.samples]


def test_a_family_without_series_is_left_out() -> None:
    assert exposition([Family("a", "Help.", "gauge")]) == b"\n"


def test_labels_have_as_many_names_as_values() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Labels(("a", "b"), ("1",))
