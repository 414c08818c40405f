"""The newest form of an attach point is tried first, then what there is otherwise."""

import pytest

from llmtraced.errors import NO_PERMISSION, LlmtracedError
from llmtraced.probes import MATRICES, attach, kernel
from llmtraced.probes.loader import Programs
from llmtraced.probes.points import Kprobe, SoftwareEvent, Tracepoint
from llmtraced.target import Symbol

NEW = Tracepoint("on_read", "mm_new", "reads are not recorded", required=False, otherwise=Kprobe("on_call", "old_read"))
LOADED = {"on_read": 11, "on_call": 12, "on_fault": 13}


def programs(**loaded: int) -> Programs:
    return Programs(loaded, {}, {"on_read": "the verifier said no"}, 0.0, 0, "", "")


def refuse(name: str, program: int, what: str, **_: object) -> int:
    raise LlmtracedError(f"cannot attach to {what}", NO_PERMISSION)


def open_as(number: int):
    def opened(name: str, program: int, what: str, **_: object) -> int:
        calls.append((name, program))
        return number

    calls: list[tuple[str, int]] = []
    return opened, calls


def test_the_newest_form_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, calls = open_as(7)
    monkeypatch.setattr(kernel, "open_tracepoint", opened)
    monkeypatch.setattr(kernel, "open_kprobe", refuse)
    assert attach.attach_point(NEW, programs(**LOADED)) == ("tracepoint mm_new", {-1: 7})
    assert calls == [("mm_new", 11)]


@pytest.mark.parametrize("lost", ["point", "program"])
def test_the_older_form_takes_its_place(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    opened, calls = open_as(8)
    monkeypatch.setattr(kernel, "open_tracepoint", refuse)
    monkeypatch.setattr(kernel, "open_kprobe", opened)
    loaded = programs(**LOADED) if lost == "point" else programs(on_call=12)
    assert attach.attach_point(NEW, loaded) == ("kprobe old_read", {-1: 8})
    assert calls == [("old_read", 12)]


def test_why_neither_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_kprobe", refuse)
    with pytest.raises(LlmtracedError, match="on_read: the verifier said no; cannot attach to kprobe old_read"):
        attach.attach_point(NEW, programs(on_call=12))


def test_what_has_one_form_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_tracepoint", refuse)
    with pytest.raises(LlmtracedError, match="cannot attach to tracepoint mm_old") as caught:
        attach.attach_point(Tracepoint("on_read", "mm_old", ""), programs(**LOADED))
    assert caught.value.exit_code == NO_PERMISSION


def test_a_software_event_is_attached_on_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "online_cpus", lambda: [0, 2])
    monkeypatch.setattr(kernel, "open_software_event", lambda config, cpu, program, what: 100 + cpu)
    name, fds = attach.attach_point(SoftwareEvent("on_fault", "page-faults-min", 5, ""), programs(**LOADED))
    assert (name, fds) == ("software event page-faults-min", {0: 100, 2: 102})


METHOD = "_ZN4ggml3cpu6repack13tensor_traits15compute_forwardEP19ggml_compute_paramsP11ggml_tensor"
PUSH, MOVE = Symbol("cpu.so", 0x1000), Symbol("cpu.so", 0x2000)
REFUSED = {
    "no such symbol": {METHOD: PUSH},
    "no symbols of the methods": {MATRICES.symbol: PUSH, "ggml_graph_compute": PUSH},
    "not in the same library": {MATRICES.symbol: PUSH, METHOD: Symbol("other.so", 0x1000)},
    "single-step": {MATRICES.symbol: PUSH, METHOD: MOVE},
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_set_that_would_not_see_all_is_refused(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "emulated", lambda _, offset: offset == PUSH.offset)
    with pytest.raises(LlmtracedError, match=why):
        attach.open_set(MATRICES, REFUSED[why], 1, programs(on_operator=9), 5)


def test_a_set_tells_methods_from_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(kernel, "emulated", lambda *_: True)
    monkeypatch.setattr(kernel, "open_uprobes", lambda *a: asked.append(a) or 77)
    symbols = {MATRICES.symbol: PUSH, METHOD: MOVE}
    assert attach.open_set(MATRICES, symbols, 1, programs(on_operator=9), 5) == 77
    ((path, cookies, pid, _, _),) = asked
    assert (path, pid) == ("cpu.so", 1)
    assert cookies == {PUSH.offset: 5, MOVE.offset: 5 | kernel.COOKIE_METHOD}
