"""Bare programs, the least that the overhead benchmark compares with: entered at every fault and page, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtraced.bench.pressure import drop_cache
from llmtraced.bench.switch import Switch, counting
from llmtraced.bench.touch import Touch
from llmtraced.schema import Detail

pytestmark = pytest.mark.kernel

FAULTS = 4001


@pytest.mark.parametrize("bare", [False, True])
def test_bare_programs_are_entered_and_count_nothing(bare: bool, small_model: Path, tmp_path: Path) -> None:
    drop_cache(small_model)
    with (
        Touch(small_model, None, "--flood", str(FAULTS)) as touch,
        Switch(touch.ready["pid"], tmp_path, bare=bare) as s,
    ):
        s.on(Detail.FAULTS)
        with counting():
            touch.go()
            runs, _ = s.program_runs()
        account = s.off()["account"]
    assert runs >= 2 * FAULTS
    assert (not account) if bare else account["faults"]["counted"] == FAULTS
