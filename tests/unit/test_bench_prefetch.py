"""What ``bench prefetch`` computes and shows, without a kernel."""

from __future__ import annotations

import argparse
import mmap
import os
import time

import pytest

from llmtraced.bench import beside, prefetch, show_prefetch
from llmtraced.bench.beside import (
    Reading,
    Seen,
    Settling,
    bytes_to_lock,
    disk_bytes_per_s,
    parse_metrics,
    sample_of,
)
from llmtraced.bench.figures import machine
from llmtraced.bench.prefetch_figures import (
    bound_ms,
    mixture_bound_ms,
    predictor_rows,
    share_of,
    summed,
    targets,
    together_ms,
)
from llmtraced.commands import bench
from llmtraced.errors import USAGE, LlmtracedError
from llmtraced.prefetch.told import metrics_text
from llmtraced.reporters.text import Style


def measured(ms, number=0, prompt=1000.0, answer="a", **more):
    figures = dict.fromkeys(
        ("server_bytes", "helper_bytes", "major_faults", "server_cpu_s", "helper_cpu_s", "machine_cpu_s"), 1.0
    )
    return {
        "round": number,
        "ms_per_token": ms,
        "tokens_per_s": 1e3 / ms,
        **{f"{name}_per_token": value for name, value in figures.items()},
        "charged_bytes": 10**9,
        "peak_bytes": 10**9,
        "prompt_ms": prompt,
        "prompt_server_bytes": 1.0,
        "prompt_helper_bytes": 1.0,
        "answer": answer,
        "busy_ms_per_token": 60.0,
        "busy_disk_bytes_per_s": 1e9,
        **more,
    }


def condition(memory="85%", kb=128, auto=140.0, rival=500.0, off=1000.0, auto_prompt=1000.0, **runs):
    found = {
        "fits": [measured(50.0, n) for n in range(2)],
        "off": [measured(off, n) for n in range(2)],
        "auto": auto if isinstance(auto, list) else [measured(auto, n, prompt=auto_prompt) for n in range(2)],
        "vmtouch": [measured(rival, n) for n in range(2)],
        "load-none": [{"round": 0, "failed": "killed: out of memory"}],
        **runs,
    }
    summary = summed(found, [2e9, 2e9, 1e9], bytes_per_token=1_600_000_000, fitting_bytes=1_350_000_000)
    return {"memory": memory, "limit_bytes": 1_500_000_000, "own_bytes": 150_000_000, "read_ahead_kb": kb, **summary}


@pytest.fixture
def report():
    conditions = [condition(), condition("110%", 8192, auto=51.0, off=51.0)]
    return {
        "conditions": conditions,
        "identical": True,
        "skipped": {"vmtouch": "not installed"},
        "machine": machine(),
        "settings": {
            "model": "m\x1b[0m.gguf",
            "model_bytes": 1_700_000_000,
            "rounds": 2,
            "tokens": 16,
            "prompt_tokens": 256,
            "threads": 2,
            "pressure": "cgroup",
            "server_options": ["--no-repack"],
        },
        "targets": targets(conditions),
    }


@pytest.mark.parametrize(
    ("compute", "used", "fitting", "rate", "bound"),
    [(50, 1.6e9, 1.4e9, 1e9, 200), (50, 1.6e9, 1.4e9, 8e9, 50), (50, 1.6e9, 2e9, 1e9, 50)],
)
def test_bound_is_the_longer_of_computing_and_reading_what_does_not_fit(compute, used, fitting, rate, bound):
    assert bound_ms(compute, used, fitting, rate) == pytest.approx(bound)


def test_shares_and_sizes():
    assert share_of("85%") == 0.85
    assert share_of("1400M") is None


def test_summary():
    found = condition()
    auto = found["strategies"]["auto"]
    assert found["compute_ms"] == 50
    # Each round's bound is by the rate around it: 250 MB at 2 GB/s, then at 1.5 GB/s.
    assert found["bound_ms"]["values"] == [125, 166.7]
    assert auto["bound_share"]["values"] == [pytest.approx(125 / 140, rel=1e-3), pytest.approx(166.7 / 140, rel=1e-3)]
    assert auto["ratio"]["median"] == pytest.approx(1000 / 140, rel=1e-3)
    assert auto["stall_ms_per_token"]["median"] == 90
    assert found["strategies"]["fits"]["bound_share"] is None
    assert found["strategies"]["load-none"]["failed"] == ["killed: out of memory"]
    assert found["strategies"]["load-none"]["tokens_per_s"] is None
    assert found["answers"] == ["a"]
    assert found["strategies"]["load-none"]["failed_rounds"] == [{"round": 0, "failed": "killed: out of memory"}]


def test_ratios_are_of_the_same_round():
    off = [measured(1000.0, 0), {"round": 1, "failed": "the server ended"}, measured(2000.0, 2)]
    auto = [measured(100.0, 0), measured(100.0, 1), measured(100.0, 2)]
    found = summed({"fits": auto, "off": off, "auto": auto}, [1e9] * 4, bytes_per_token=10, fitting_bytes=0)
    assert found["strategies"]["auto"]["ratio"]["values"] == [10, 20]


def test_what_is_read_while_computing_need_not_be_read_afterwards():
    assert together_ms(60.0, 250e6, 1.5e9, 2e9) == pytest.approx(60 + (250 - 90) / 2)
    assert together_ms(60.0, 50e6, 1.5e9, 2e9) == 60
    found = condition()
    assert (found["busy_ms"], found["busy_disk_bytes_per_s"]) == (60, 1e9)
    assert found["together_ms"]["values"] == pytest.approx([60 + 190 / 2, 60 + 190 / 1.5], rel=1e-3)
    assert found["strategies"]["auto"]["together_share"]["max"] == pytest.approx((60 + 190 / 1.5) / 140, rel=1e-3)
    assert found["strategies"]["fits"]["together_share"] is None


def test_a_sample_is_the_beginning_and_goes(tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(range(256)) * 20_000)
    with sample_of(model) as sample:
        assert sample.read_bytes() == model.read_bytes()
        assert sample.parent == tmp_path
    assert list(tmp_path.iterdir()) == [model]
    model.write_bytes(b"short")
    with pytest.raises(LlmtracedError, match="too small"), sample_of(model):
        pass


def test_what_cannot_be_dropped_does_not_count_as_read(tmp_path):
    """Somebody has it mapped, so it stays in memory: asking for it again reads nothing."""
    path = tmp_path / "mapped"
    path.write_bytes(os.urandom(8 << 20))
    os.sync()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert sum(memory[:: mmap.PAGESIZE]) > 0
        with Reading(path) as reading:
            time.sleep(0.3)
            _, nbytes = reading.so_far()
            assert sum(reading._bytes) > 50 << 20, "it was asked for often"
    assert nbytes < 1 << 20


def test_what_fails_while_reading_is_told(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(bytes(4 << 20))

    def read_on() -> None:
        with Reading(path):
            os.truncate(path, 0)
            time.sleep(0.1)

    with pytest.raises(OSError, match=r"."):
        read_on()


def test_another_answer_is_noticed():
    assert condition(pin=[measured(100.0, answer="b")])["answers"] == ["a", "b"]


def test_targets_that_are_met():
    found = targets([condition(), condition(kb=8192, off=600.0), condition("110%", 128, auto=50.0, off=50.0)])
    assert all(all(target["met"].values()) for target in found.values())
    assert found["speedup_at_128_kb"]["measured"] == {"85% at 128 KB": pytest.approx(1000 / 140, rel=1e-3)}
    assert set(found["prompt"]["met"]) == {"85% at 128 KB", "85% at 8192 KB", "110% at 128 KB"}
    assert set(found["fits"]["met"]) == {"110% at 128 KB"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("speedup_at_128_kb", {"off": 800.0}),
        ("speedup_at_8192_kb", {"off": 450.0, "kb": 8192}),
        ("share_of_bound", {"auto": 200.0}),
        ("share_of_bound", {"auto": 100.0}),  # faster than can be
        ("best_comparator", {"rival": 139.0}),
        ("fits", {"memory": "110%", "off": 138.0}),
        ("prompt", {"auto_prompt": 1030.0}),
    ],
)
def test_targets_that_are_missed(name, changed):
    assert not all(targets([condition(**changed)])[name]["met"].values())


def test_a_sidecar_that_failed_misses():
    one = condition(auto=[{"round": 0, "failed": "the sidecar ended with status 1"}])
    found = targets([one])
    assert found["speedup_at_128_kb"]["measured"] == {"85% at 128 KB": None}
    assert not any(any(target["met"].values()) for target in found.values())
    assert "failed, missed" in "\n".join(show_prefetch._targets(found, Style()))


def test_targets_need_both_sides():
    one = condition()
    del one["strategies"]["auto"]
    found = targets([one])
    assert found["speedup_at_128_kb"] == {"limit": ">= 6 x off at 85%", "measured": {}, "met": {}}


def test_text(report):
    text = show_prefetch.render_prefetch(report, Style(width=200))
    assert "\x1b" not in text
    assert "memory 85%: limit 1.50 GB, of which 150 MB the server's own; readahead 128 KB" in text
    assert "load-none: killed: out of memory" in text
    assert "target speedup_at_128_kb >= 6 x off at 85%: 85% at 128 KB: 7.14, met" in text
    assert "target speedup_at_8192_kb >= 3.5 x off at 85%: not measured" in text
    assert "left out: vmtouch: not installed" in text
    assert "identical" in text
    narrow = show_prefetch.render_prefetch(report, Style(width=80))
    assert max(map(len, narrow.splitlines())) <= 80
    assert "NOT the same" in show_prefetch.render_prefetch({**report, "identical": False}, Style())


@pytest.mark.parametrize("picture", ["png", "svg"])
def test_pictures(report, picture):
    pytest.importorskip("matplotlib")
    begin = b"\x89PNG" if picture == "png" else b"<?xml"
    assert show_prefetch.plot_prefetch(report, picture).startswith(begin)
    one = {**report, "conditions": report["conditions"][:1]}
    assert show_prefetch.plot_prefetch(one, picture).startswith(begin)


def test_metrics_of_the_sidecar_are_understood():
    summary = dict.fromkeys(
        (
            *(
                "pinned_bytes",
                "budget_bytes",
                "window_bytes",
                "prefetched_bytes",
                "used_bytes",
                "late_bytes",
                "wasted_bytes",
            ),
            *("missed_bytes", "tokens", "failed_reads", "ticks_lost", "cpu_s", "anonymous_bytes"),
        ),
        7,
    )
    text = metrics_text({**summary, "state": "engaged"}, 7, 'a "model" {x} 1')
    assert parse_metrics(text, 5) == Seen(5, True, 7, 7)
    assert parse_metrics(text[:200], 5) is None


def test_settled_when_nothing_has_changed_for_some_writes():
    settling = Settling()
    looks = [None, Seen(1, False, 0, 3), Seen(2, True, 10, 6), Seen(3, True, 20, 8)]
    assert not any(settling.settled(look) for look in looks)
    assert not settling.settled(Seen(3, True, 20, 8))  # not written again: no news
    assert [settling.settled(Seen(n, True, 20, 8 + n)) for n in (4, 5, 6)] == [False, False, True]
    assert not settling.settled(Seen(7, True, 30, 20))


def test_nothing_is_settled_before_it_has_decided():
    settling = Settling()
    assert not any(settling.settled(Seen(n, False, 0, 2)) for n in range(20))


def test_locking_memory_leaves_enough():
    assert bytes_to_lock(20 << 30, 3 << 30) == 17 << 30
    with pytest.raises(LlmtracedError, match="least that is safe") as error:
        bytes_to_lock(20 << 30, (2 << 30) - 1)
    assert error.value.exit_code == USAGE
    with pytest.raises(LlmtracedError, match="nothing is left"):
        bytes_to_lock(2 << 30, 3 << 30)


def test_the_disk_is_read_to_its_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * beside.READ_BYTES // 2))
    try:
        rate = disk_bytes_per_s(path)
    except LlmtracedError as error:  # tmpfs before 6.6
        pytest.skip(str(error))
    assert rate > 0


def test_the_other_readahead():
    assert [prefetch.other_read_ahead(kb) for kb in (128, 4096, 8192, 16384, None)] == [8192, 8192, 128, 128, 128]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategies": ["off", "magic"]}, "no such strategy: magic"),
        ({"memory": ["none"]}, "--memory none"),
        ({"memory": ["lots"]}, "no such pressure"),
        ({"tokens": 1}, "at least 2"),
        ({"pressure": "x"}, "no such pressure: x"),
        ({"model": "/nowhere.gguf"}, "no such model"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_started(settings, message):
    with pytest.raises(LlmtracedError, match=message):
        prefetch.run(**settings)


def test_arguments():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["prefetch", "--memory", "50%,1400M", "--read-ahead-kb", "128,8192"])
    assert (args.memory, args.read_ahead_kb, args.rounds, args.tokens) == ("50%,1400M", (128, 8192), 5, 16)
    assert parser.parse_args(["prefetch"]).read_ahead_kb == ()


def test_a_mixtures_bound_by_hand():
    # 60 MB are missing: 30 ms of a disk of 2 GB/s. Nobody guesses: after 10 ms of computing; all guessed: meanwhile
    assert mixture_bound_ms(10.0, 60e6, 0.0, 2e9) == 40
    assert mixture_bound_ms(10.0, 60e6, 1.0, 2e9) == 30
    assert mixture_bound_ms(10.0, 60e6, 0.5, 2e9) == 30
    assert mixture_bound_ms(40.0, 60e6, 0.9, 2e9) == pytest.approx(43)


def mixed(ms, number, missed, right):
    tally = {"right": right, "read_bytes": 10, "precision": 0.5, "recall": 1 - missed / 400e6, "mean_ahead_s": 0.002}
    predictors = {"router": tally, "last": dict.fromkeys(tally)}
    experts = {"tokens": 10, "missing_bytes": 400e6, "missed_bytes": missed, "predictors": predictors}
    return measured(ms, number, helper={"experts": experts})


def test_what_the_sidecar_guessed_is_in_the_report(report):
    # 40 MB a token are missing, 20 to 27 ms of the disk; a quarter of them was not guessed
    rounds = [mixed(100.0, n, missed=100e6, right=right) for n, right in enumerate((0.8, 0.9))]
    found = condition(**{"moe:last+router": rounds})
    one = found["strategies"]["moe:last+router"]
    assert one["missing_bytes_per_token"]["median"] == 40e6
    assert one["mixture_bound_share"]["values"] == pytest.approx([0.55, 0.5 + 40 / 1.5 / 4 / 100], abs=1e-4)
    assert found["strategies"]["vmtouch"]["mixture_bound_share"] is None
    rows = predictor_rows(found)
    assert [(row["strategy"], row["predictor"]) for row in rows] == [
        ("moe:last+router", "router"),
        ("moe:last+router", "last"),
    ]
    assert (rows[0]["right"], rows[0]["recall"], rows[0]["mean_ahead_s"]) == (pytest.approx(0.85), 0.75, 0.002)
    assert rows[1]["recall"] is None
    text = show_prefetch.render_prefetch({**report, "conditions": [found]}, Style(200))
    assert "of experts' bound" in text
    assert "85.0%   75.0%      50.0%  2.00 ms" in text
    assert "of experts' bound" not in show_prefetch.render_prefetch(report, Style(200))


@pytest.mark.parametrize("name", ["moe:", "moe:luck", "auto:router", "moe:router+luck", "moe:router,last"])
def test_sources_that_there_are_not(name):
    with pytest.raises(LlmtracedError, match="no such strategy") as caught:
        prefetch.run(strategies=(name,))
    assert caught.value.exit_code == USAGE


def test_sources_are_handed_to_the_sidecar(tmp_path):
    argv = beside.Sidecar(1, "moe:attention+router", tmp_path)._argv
    at = argv.index("--strategy")
    assert argv[at : at + 4] == ["--strategy", "moe", "--predict", "attention,router"]
    assert "--predict" not in beside.Sidecar(1, "moe", tmp_path)._argv


def test_a_model_without_experts_leaves_them_out():
    names, skipped = prefetch._available(["moe:none", "moe", "pin"], mixture=False)
    assert set(skipped) == {"moe:none", "moe"}
    assert "pin" in names
