"""What ``bench prefetch`` computes from its measurements: bounds, summaries, targets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from llmtraced.bench.figures import spread

__all__ = [
    "BEST",
    "COMPARATORS",
    "FITS",
    "MOST_BOUND_SHARE",
    "OFF",
    "bound_ms",
    "condition_name",
    "mixture_bound_ms",
    "predictor_rows",
    "share_of",
    "summed",
    "targets",
    "together_ms",
]

OFF: Final = "off"
BEST: Final = "auto"
FITS: Final = "fits"
COMPARATORS: Final = ("readahead", "vmtouch", "load-none", "load-dio")
"""What a user would try instead of the sidecar; ``readahead`` is followed by its KB."""

SPEEDUP_BY_READ_AHEAD: Final = {128: 6.0, 8192: 3.5}
LEAST_BOUND_SHARE: Final = 0.85
MOST_BOUND_SHARE: Final = 1.05
"""More than noise explains: the bound was measured wrongly, so nothing is met."""
LEAST_RATIO_FITTING: Final = 0.99
MOST_PROMPT_RATIO: Final = 1.02
"""Of the time of a prompt with the sidecar : without; 2 % are left for noise."""
_TARGET_SHARE: Final = 0.85
_FITTING_SHARE: Final = 1.1

_SPREAD: Final = (
    "tokens_per_s",
    "ms_per_token",
    "stall_ms_per_token",
    "server_bytes_per_token",
    "helper_bytes_per_token",
    "major_faults_per_token",
    "server_cpu_s_per_token",
    "helper_cpu_s_per_token",
    "machine_cpu_s_per_token",
    "charged_bytes",
    "peak_bytes",
    "bound_share",
    "together_share",
    "mixture_bound_share",
    "missing_bytes_per_token",
    "prompt_ms",
    "prompt_server_bytes",
    "prompt_helper_bytes",
)


def bound_ms(compute_ms: float, bytes_per_token: float, fitting_bytes: float, bytes_per_s: float) -> float:
    """Return the least that a token can take, ms: its computing, or reading what does not fit; whichever is longer.

    Args:
        compute_ms: of a token while the model fits.
        bytes_per_token: of the model that a token uses.
        fitting_bytes: of them that memory holds.
        bytes_per_s: that the disk gives.
    """
    return max(compute_ms, max(bytes_per_token - fitting_bytes, 0.0) / bytes_per_s * 1e3)


def mixture_bound_ms(compute_ms: float, missing_bytes: float, recall: float, bytes_per_s: float) -> float:
    """Return the least that a token of a mixture can take, ms.

    What was guessed is read while the server computes; what was not is read while it waits.

    Args:
        compute_ms: of a token while the model fits.
        missing_bytes: of experts that a token chooses and memory does not hold.
        recall: share of them that was guessed.
        bytes_per_s: that the disk gives.
    """
    reading = missing_bytes / bytes_per_s * 1e3
    return max(compute_ms + (1 - recall) * reading, reading)


def together_ms(busy_ms: float, needed_bytes: float, busy_bytes_per_s: float, bytes_per_s: float) -> float:
    """Return the least that a token can take where computing and reading slow each other down, ms.

    While the server computes the disk gives less, and a token takes longer. What has not been read by then is read
    while the server waits, at the disk's full rate.

    Args:
        busy_ms: of a token that is computed while the disk is read.
        needed_bytes: that do not fit.
        busy_bytes_per_s: that the disk gives meanwhile.
        bytes_per_s: that it gives while nothing is computed.
    """
    left = max(needed_bytes - busy_ms / 1e3 * busy_bytes_per_s, 0.0)
    return busy_ms + left / bytes_per_s * 1e3


def share_of(memory: str) -> float | None:
    """Return ``0.85`` of ``85%``; None of a size."""
    return float(memory[:-1]) / 100 if memory.endswith("%") else None


def condition_name(condition: Mapping[str, Any]) -> str:
    """Return what a condition is called in ``targets``: ``85% at 128 KB``."""
    return f"{condition['memory']} at {condition['read_ahead_kb']} KB"


def _paired(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the ratios run : base of the same rounds."""
    by_round = {one["round"]: one[key] for one in base if one.get(key)}
    return [one[key] / by_round[one["round"]] for one in runs if one.get(key) and one["round"] in by_round]


def summed(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    disk: Sequence[float],
    *,
    bytes_per_token: int,
    fitting_bytes: int,
) -> dict[str, Any]:
    """Return what the rounds of a condition say.

    Args:
        runs: by strategy (among them :data:`FITS`), the measurements of each round that has one; one that failed has
            ``failed`` instead of figures.
        disk: bytes/s, before the first round and after each: one more than there are rounds.
        bytes_per_token: of the model that a token uses.
        fitting_bytes: memory for them.

    Returns:
        ``compute_ms``, ``disk_bytes_per_s``, ``bound_ms`` (by round), ``busy_ms``, ``busy_disk_bytes_per_s``,
        ``together_ms`` (by round; :func:`together_ms`), ``answers`` (digests of what was answered; one,
        if all were the same) and ``strategies``: each with spreads over the rounds (None: not measured), ``ratio`` and
        ``prompt_ratio`` to ``off`` (paired by round), ``failed`` (why, each once), ``rounds``, ``failed_rounds``.
    """
    compute = median(one["ms_per_token"] for one in runs[FITS])
    rounds = len(disk) - 1
    around = [(disk[i] + disk[i + 1]) / 2 for i in range(rounds)]
    bounds = [bound_ms(compute, bytes_per_token, fitting_bytes, rate) for rate in around]
    busy_ms = median(one["busy_ms_per_token"] for one in runs[FITS])
    busy_rate = median(one["busy_disk_bytes_per_s"] for one in runs[FITS])
    needed = max(bytes_per_token - fitting_bytes, 0)
    together = [together_ms(busy_ms, needed, min(busy_rate, rate), rate) for rate in around]
    off = [one for one in runs.get(OFF, ()) if "failed" not in one]
    strategies: dict[str, dict[str, Any]] = {}
    answers = set()
    for name, found in runs.items():
        good = [dict(one) for one in found if "failed" not in one]
        answers |= {one["answer"] for one in good}
        for one in good:
            one["stall_ms_per_token"] = max(one["ms_per_token"] - compute, 0.0)
            for key, values in (("bound_share", bounds), ("together_share", together)):
                one[key] = None if name == FITS else values[one["round"]] / one["ms_per_token"]
            one |= _mixture(one, compute, around[one["round"]])
        ratios, prompts = _paired(good, off, "tokens_per_s"), _paired(good, off, "prompt_ms")
        strategies[name] = {
            **{key: _spread([one[key] for one in good if one.get(key) is not None]) for key in _SPREAD},
            "ratio": _spread(ratios),
            "prompt_ratio": _spread(prompts),
            "failed": list(dict.fromkeys(one["failed"] for one in found if "failed" in one)),
            "rounds": good,
            "failed_rounds": [dict(one) for one in found if "failed" in one],
        }
    return {
        "compute_ms": compute,
        "disk_bytes_per_s": spread(disk),
        "bound_ms": spread(bounds),
        "busy_ms": busy_ms,
        "busy_disk_bytes_per_s": busy_rate,
        "together_ms": spread(together),
        "bytes_per_token": bytes_per_token,
        "fitting_bytes": fitting_bytes,
        "answers": sorted(answers),
        "strategies": strategies,
    }


def _mixture(one: Mapping[str, Any], compute_ms: float, bytes_per_s: float) -> dict[str, float | None]:
    """Return what a round's sidecar says of experts, per token, and the bound that follows."""
    experts = (one.get("helper") or {}).get("experts") or {}
    if not experts.get("tokens"):
        return {"missing_bytes_per_token": None, "mixture_bound_share": None}
    whole = experts["missing_bytes"]
    missing, recall = whole / experts["tokens"], 1 - experts["missed_bytes"] / whole if whole else 1.0
    bound = mixture_bound_ms(compute_ms, missing, recall, bytes_per_s)
    return {"missing_bytes_per_token": missing, "mixture_bound_share": bound / one["ms_per_token"]}


def predictor_rows(condition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how good the guesses were of what each strategy guessed a mixture's experts by; medians over rounds."""
    rows = []
    for strategy, found in condition["strategies"].items():
        told = [((one.get("helper") or {}).get("experts") or {}).get("predictors") or {} for one in found["rounds"]]
        for source in dict.fromkeys(name for one in told for name in one):
            figures = [one[source] for one in told if source in one]
            row = {"strategy": strategy, "predictor": source}
            for key in ("right", "recall", "precision", "mean_ahead_s"):
                values = [one[key] for one in figures if one[key] is not None]
                row[key] = median(values) if values else None
            rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    return spread(values) if values else None


def _middle(condition: Mapping[str, Any], strategy: str, key: str) -> float | None:
    found = condition["strategies"].get(strategy, {}).get(key)
    return None if found is None else float(found["median"])


def targets(conditions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each target its limit, what was measured, and where (of the conditions that count) it is met.

    ``met`` and ``measured`` are by :func:`condition_name`; empty where no such condition was measured. A condition in
    which the strategy failed has ``measured`` None and misses.
    """
    found: dict[str, dict[str, Any]] = {}

    def add(target: str, limit: str, condition: Mapping[str, Any], value: float | None, met: bool) -> None:
        one = found.setdefault(target, {"limit": limit, "measured": {}, "met": {}})
        one["measured"][condition_name(condition)] = value
        one["met"][condition_name(condition)] = value is not None and met

    for kb, least in SPEEDUP_BY_READ_AHEAD.items():
        found[f"speedup_at_{kb}_kb"] = {"limit": f">= {least:g} x off at 85%", "measured": {}, "met": {}}
    for condition in conditions:
        if not {BEST, OFF} <= set(condition["strategies"]):
            continue
        share, kb = share_of(condition["memory"]), condition["read_ahead_kb"]
        ratio = _middle(condition, BEST, "ratio")
        if share == _TARGET_SHARE:
            if kb in SPEEDUP_BY_READ_AHEAD:
                least = SPEEDUP_BY_READ_AHEAD[kb]
                add(f"speedup_at_{kb}_kb", "", condition, ratio, (ratio or 0) >= least)
            value = _middle(condition, BEST, "bound_share")
            limit = f">= {LEAST_BOUND_SHARE:g} of the bound at 85%"
            add("share_of_bound", limit, condition, value, LEAST_BOUND_SHARE <= (value or 0) <= MOST_BOUND_SHARE)
            rivals = [
                speed
                for name in condition["strategies"]
                if name.split()[0] in COMPARATORS and (speed := _middle(condition, name, "tokens_per_s"))
            ]
            own = _middle(condition, BEST, "tokens_per_s")
            if rivals:
                value = own / max(rivals) if own else None
                add("best_comparator", "> 1 x the fastest comparator at 85%", condition, value, (value or 0) > 1)
        if share is not None and share >= _FITTING_SHARE:
            limit = f">= {LEAST_RATIO_FITTING:g} x off where the model fits"
            add("fits", limit, condition, ratio, (ratio or 0) >= LEAST_RATIO_FITTING)
        if _middle(condition, OFF, "prompt_ms"):
            value = _middle(condition, BEST, "prompt_ratio")
            limit = f"<= {MOST_PROMPT_RATIO:g} x the time of off"
            add("prompt", limit, condition, value, (value or 9) <= MOST_PROMPT_RATIO)
    return found
