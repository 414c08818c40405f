"""Is the access sequence the same for each token: fingerprints, classes of equal ones, why they differ, the sequence.

A token's sequence is the order in which it uses weights: rows of ``ops`` with a tensor name. A trace without operators
shows only what missed, and when each weight first did; then an order is learned from that, and nothing is certain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, Final

import numpy as np
import polars as pl

from llmtraced.analysis.accesses import Ints, Weights, source
from llmtraced.analysis.choices import Choices, choices
from llmtraced.analysis.tokens import per_token
from llmtraced.analysis.trace import Trace, collect, verdict
from llmtraced.schema import PHASES

__all__ = ["CLASSES", "EXAMPLES", "TIMED", "pattern"]

CLASSES: Final = 24
"""Classes that are listed and compared; the rest is counted (``class_count``, ``unlisted_tokens``)."""

TIMED: Final = 2_000
"""Tokens, evenly spread, that the times and bytes of the sequence are medians over."""

EXAMPLES: Final = 8
"""Differing positions that are named for a class; ``missing`` and ``extra`` count them all."""

_SPANS: Final = ("n_tokens", "n_outputs", "graph_nodes", "other_ops", "bytes")
_MOST: Final = 0.9  # the share of tokens from which on they are called mostly deterministic
_NEAR: Final = 65_536  # bytes: a weight that begins this close behind the one before continues the scan


def pattern(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return whether the tokens use the same weights in the same order; docs/reports/pattern.md has every field.

    Args:
        trace: an open trace.
        phase: only tokens of this phase; without it the reference is the sequence that most decode tokens have.
    """
    table = source(trace, phase)
    marks = per_token(trace, phase).select(
        "token", "start_ns", "duration_ns", "n_tokens", "n_outputs", "graph_nodes", marked="phase"
    )
    compared = phase or ("decode" if "decode" in marks["marked"] else None)
    chosen = choices(trace, phase, compared)
    weights = Weights(trace, table or "ops", phase, chosen)
    known = table == "ops"
    learned = None
    if not known:
        some = marks if compared is None else marks.filter(pl.col("marked") == compared)
        learned = _order(weights, some, "weight").sort("at_share", "at_ns", "weight", nulls_last=True)
    bare = trace.table("ops", phase).filter(pl.col("tensor_name").is_null())
    counted = collect(bare.group_by("token").agg(other_ops=pl.len().cast(pl.Int64)))
    rows = (
        weights.per_token(None if learned is None else _ranks(weights, learned))
        .join(marks, on="token", how="left")
        .join(chosen.overlaps, on="token", how="left")
        .join(counted, on="token", how="left")
        .with_columns(pl.col("other_ops").fill_null(0), phase=pl.coalesce("marked", "phase"))
    )
    classes, rows = _classes(rows, compared)
    if known:
        _explain(classes, rows, weights, trace)
    order = _order(weights, rows.filter(pl.col("class") == 0), "position") if learned is None else learned
    sequence = _described(order.sort("position") if known else order, weights, chosen)
    report = {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "source": table,
        "compared_phase": compared,
        "phases": _phases(rows),
        "class_count": rows["fingerprint"].n_unique(),
        "unlisted_tokens": rows["class"].null_count(),
        "classes": classes,
        "agreement": _number(_basis(rows, compared)["agreement"].mean()),
        "unsized_uses": int(rows["unsized"].sum()) if known else None,
        "experts": _experts(chosen),
        "scan": _scan(sequence),
        "sequence": sequence,
        "tokens": _listed(rows),
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }
    kind, answer = _answer(report)
    return {"pattern": kind, "answer": answer, **report}


def _basis(rows: pl.DataFrame, compared: str | None) -> pl.DataFrame:
    """Return the tokens that the reference is chosen among: those of the compared phase, if there are any."""
    some = rows if compared is None else rows.filter(pl.col("phase") == compared)
    return some if some.height else rows


def _classes(rows: pl.DataFrame, compared: str | None) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Return the classes (the reference first, then by size), and the tokens in order with ``class``."""
    basis = _basis(rows, compared).group_by("fingerprint").agg(basis=pl.len())
    classes = (
        rows.group_by("fingerprint")
        .agg(
            tokens=pl.len(),
            length=pl.col("length").first(),
            first_token=pl.col("token").min(),
            last_token=pl.col("token").max(),
            **{name: pl.concat_list(pl.col(name).min(), pl.col(name).max()) for name in _SPANS},
            **{f"in_{name}": (pl.col("phase") == name).sum() for name in PHASES},
        )
        .join(basis, on="fingerprint", how="left")
        .sort("basis", "tokens", "length", "first_token", descending=[True, True, True, False], nulls_last=True)
    )
    others = classes.slice(1).sort("tokens", "first_token", descending=[True, False])
    listed = pl.concat([classes.head(1), others.head(CLASSES - 1)]).with_row_index("class")
    number = listed.select("fingerprint", pl.col("class").cast(pl.Int64))
    found = [
        {
            **{name: row[name] for name in ("class", "fingerprint", "tokens", "length", "first_token", "last_token")},
            "fingerprint": f"{row['fingerprint']:016x}",
            "phases": {name: row[f"in_{name}"] for name in PHASES if row[f"in_{name}"]},
            **{name: row[name] for name in _SPANS},
            **dict.fromkeys(("identical", "missing", "extra")),
            "examples": [],
            "reasons": [],
        }
        for row in listed.iter_rows(named=True)
    ]
    return found, rows.join(number, on="fingerprint", how="left").sort("token")


def _explain(classes: list[dict[str, Any]], rows: pl.DataFrame, weights: Weights, trace: Trace) -> None:
    """Compare each class's sequence with the reference's (the first's), and say why they differ."""
    sequences: dict[int, list[int]] = {}
    for some in weights.rows([one["first_token"] for one in classes]):
        sequences.update(some.group_by("token").agg("weight").iter_rows())
    names = weights.names()
    ends = [int(token) for token in rows["token"].gather([0, -1])] if rows.height else []
    lost = trace.account.get("ops", {})
    for one in classes:
        its, mine = sequences[classes[0]["first_token"]], sequences[one["first_token"]]
        identical, missing, extra = 0, [], []
        for tag, a, b, c, d in SequenceMatcher(None, its, mine, autojunk=False).get_opcodes():
            identical += b - a if tag == "equal" else 0
            if tag != "equal":
                missing += [(at, its[at]) for at in range(a, b)]
                extra += [(at, mine[at]) for at in range(c, d)]
        examples = [
            {"kind": kind, "position": at, "tensor_name": names[number][1]}
            for kind, some in (("missing", missing), ("extra", extra))
            for at, number in some[:EXAMPLES]
        ]
        one.update(identical=identical, missing=len(missing), extra=len(extra), examples=examples)
        if one is not classes[0]:
            reasons = _cut(one, mine, its, ends) or _properties(one, classes[0])
            models = {str(names[number][0]) for number in mine}
            if not models & {str(names[number][0]) for number in its}:
                reasons.append(("another model", ", ".join(sorted(models))))
            if not extra and (lost.get("dropped") or lost.get("missed")):
                reasons.append(
                    ("records lost", "operators are missing in the trace, and here only weights are missing")
                )
            if not reasons:
                shuffled = Counter(mine) == Counter(its)
                reasons.append(("unexplained", "the same weights in another order" if shuffled else ""))
            one["reasons"] = [{"reason": reason, "evidence": evidence} for reason, evidence in reasons]


def _cut(one: Mapping[str, Any], mine: list[int], its: list[int], ends: Sequence[int]) -> list[tuple[str, str]]:
    """Return whether it is the first or last token, of which a part was recorded."""
    lost = len(its) - len(mine)
    count = f"{lost:,} weight{'' if lost == 1 else 's'}"
    if one["tokens"] == 1 and lost > 0:
        if one["first_token"] == ends[0] and mine == its[lost:]:
            return [("cut", f"the first token: its first {count} had passed when the recording of operators began")]
        if one["first_token"] == ends[1] and mine == its[: len(mine)]:
            return [("cut", f"the last token: the recording ended before its last {count}")]
    return []


def _properties(one: Mapping[str, Any], reference: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the reasons that hold for every token of the class and for none of the reference's."""
    reasons = []
    spans = {name: (one[name], reference[name]) for name in _SPANS}
    (few, many), (_, usual) = spans["n_tokens"]
    if few is not None and usual is not None and few > 1 and usual <= 1:
        reasons.append(("prompt batch", f"{_span([few, many])} text tokens in it, the reference has {usual}"))
    (_, most), (least, _) = spans["n_outputs"]
    if most == 0 and least is not None and least > 0:
        reasons.append(("no outputs", "nothing is sampled from it, so what only outputs need is left out"))
    for name, what in (("graph_nodes", "nodes"), ("other_ops", "operators without a weight")):
        (low, high), (least, most) = spans[name]
        if None not in (low, high, least, most) and (high < least or low > most):
            reasons.append(("another graph", f"{_span([low, high])} {what}, the reference {_span([least, most])}"))
            break
    return reasons


def _span(of: Sequence[int]) -> str:
    return f"{of[0]:,}" if of[0] == of[1] else f"{of[0]:,} to {of[1]:,}"


def _order(weights: Weights, tokens: pl.DataFrame, by: str) -> pl.DataFrame:
    """Return the medians over up to :data:`TIMED` of these tokens by ``position`` in the sequence, or by ``weight``.

    Columns: position, weight, op, bytes, at_ns (since the token's start), at_share (of its duration), seen_share (of
    the tokens).
    """
    some = tokens.gather(
        np.unique(np.linspace(0, max(tokens.height - 1, 0), min(TIMED, tokens.height), dtype=np.int64))
    )
    clock = some.select("token", "start_ns", "duration_ns")
    parts = []
    for rows in weights.rows(some["token"].to_list()) if some.height else ():
        used = rows if "op" in rows.columns else rows.with_columns(op=pl.lit(None), bytes=pl.lit(None, pl.Int64))
        parts.append(
            used.join(clock, on="token", how="left")
            .with_columns(at_ns=pl.col("timestamp") - pl.col("start_ns"), position=pl.int_range(pl.len()).over("token"))
            .select(
                *(pl.col(name).cast(pl.Int64) for name in ("token", "position", "weight", "bytes", "at_ns")),
                pl.col("op").cast(pl.String),
                at_share=pl.when(pl.col("duration_ns") > 0).then(pl.col("at_ns") / pl.col("duration_ns")),
            )
        )
    return (
        pl.concat([_ORDER, *parts])
        .group_by(by)
        .agg(
            *(pl.col(name).first() for name in ("position", "weight", "op") if name != by),
            *(pl.col(name).median() for name in ("bytes", "at_ns", "at_share")),
            seen_share=pl.col("token").n_unique() / max(some.height, 1),
        )
    )


_ORDER: Final = pl.DataFrame(
    schema={
        **dict.fromkeys(("token", "position", "weight", "bytes", "at_ns"), pl.Int64),
        "op": pl.String,
        "at_share": pl.Float64,
    }
)


def _ranks(weights: Weights, learned: pl.DataFrame) -> Ints:
    ranks = np.full(len(weights.names()), -1)
    ranks[learned["weight"].to_numpy()] = np.arange(learned.height)
    return ranks


def _described(order: pl.DataFrame, weights: Weights, chosen: Choices) -> list[dict[str, Any]]:
    """Return the sequence: one entry a position."""
    moving = {
        one["layer"] for one in chosen.layers if one["identical_share"] is not None and one["identical_share"] < 1
    }
    compared = {one["layer"] for one in chosen.layers if one["pairs"]}
    found = []
    facts = weights.facts(order["weight"].to_list())
    for position, (row, fact) in enumerate(zip(order.iter_rows(named=True), facts, strict=True)):
        merged = bool(fact["n_experts"])
        known = fact["layer"] in compared
        found.append(
            {
                "position": position,
                **{name: fact[name] for name in ("tensor_name", "model", "layer", "component")},
                "op": row["op"],
                "bytes": None if row["bytes"] is None else round(row["bytes"]),
                **{name: fact[name] for name in ("size_bytes", "shard", "offset_bytes")},
                "at_ns": None if row["at_ns"] is None else round(row["at_ns"]),
                "at_share": row["at_share"],
                "seen_share": row["seen_share"],
                "experts_vary": (fact["layer"] in moving if known else None) if merged else False,
            }
        )
    return found


def _scan(sequence: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how the sequence moves through the file: steps to what follows at once, ahead, back; to another file."""
    steps = {"adjacent_steps": 0, "forward_steps": 0, "backward_steps": 0, "file_steps": 0}
    for last, now in pairwise(sequence):
        if last["offset_bytes"] is None or now["offset_bytes"] is None:
            continue
        gap = now["offset_bytes"] - last["offset_bytes"] - last["size_bytes"]
        if (now["model"], now["shard"]) != (last["model"], last["shard"]):
            steps["file_steps"] += 1
        elif 0 <= gap <= _NEAR:
            steps["adjacent_steps"] += 1
        else:
            steps["forward_steps" if gap > 0 else "backward_steps"] += 1
    return steps


def _experts(chosen: Choices) -> dict[str, Any] | None:
    """Return how the choices of successive tokens compare, over all layers and for each; None: there are none."""
    layers = [one for one in chosen.layers if one["pairs"]]
    pairs = sum(one["pairs"] for one in layers)
    if not chosen.layers:
        return None

    def mean(name: str) -> float | None:
        values = [(one[name], one["pairs"]) for one in layers if one[name] is not None]  # type: ignore[literal-required]
        return sum(value * n for value, n in values) / pairs if values and pairs else None

    return {
        "pairs": pairs,
        **{name: mean(name) for name in ("chosen", "n_experts", "overlap", "identical_share", "chance_overlap")},
        "layers": chosen.layers,
    }


def _phases(rows: pl.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name in PHASES:
        some = rows.filter(pl.col("phase") == name)
        if some.height:
            found.append(
                {
                    "phase": name,
                    "tokens": some.height,
                    "identical": int((some["class"] == 0).sum()),
                    "classes": some["fingerprint"].n_unique(),
                    "length": _number(some["length"].median()),
                    "bytes": _number(some["bytes"].median()),
                }
            )
    return found


def _listed(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the tokens: JSON has no 64-bit numbers, so fingerprints are hexadecimal."""
    wanted = ("token", "phase", "n_tokens", "n_outputs", "graph_nodes", "other_ops", "length", "bytes", "class")
    listed = rows.select(*wanted, "expert_overlap", "agreement").to_dicts()
    for row, fingerprint in zip(listed, rows["fingerprint"], strict=True):
        row["fingerprint"] = f"{fingerprint:016x}"
    return listed


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _answer(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of pattern, and the answer in a sentence with its evidence."""
    if report["source"] is None:
        return "unknown", "not known: the trace has no use of a weight within a token (no operators, faults or reads)"
    if report["source"] != "ops":
        return "unknown", _guess(report)
    reference, experts = report["classes"][0], report["experts"]
    phase = report["compared_phase"] if report["compared_phase"] in {one["phase"] for one in report["phases"]} else None
    count = next((one["tokens"] for one in report["phases"] if one["phase"] == phase), len(report["tokens"]))
    same = reference["phases"].get(phase, reference["tokens"])
    of = f"{same:,} of {count:,} {phase + ' ' if phase else ''}tokens"
    how = f"use the same {reference['length']:,} weights in the same order"
    if count < 2:
        return (
            "unknown",
            f"not known: only {count} {phase or ''} token was recorded, there is nothing to compare it with",
        )
    if same / count < _MOST:
        kind = "not deterministic"
        return kind, f"{kind}: no more than {of} {how}; there are {report['class_count']:,} different sequences"
    merged = any(row["experts_vary"] is not False for row in report["sequence"])
    kind = ("" if same == count else "mostly ") + "deterministic"
    if not merged or (experts and experts["identical_share"] == 1):
        return kind, f"{kind}: {of} {how}"
    if not experts or experts["overlap"] is None:
        return kind, f"{kind}: {of} {how}; which experts they use of each was not recorded"
    kind += " but for the experts"
    chance = "" if experts["chance_overlap"] is None else f", {experts['chance_overlap']:.0%} by chance"
    total = "" if experts["n_experts"] is None else f" of {experts['n_experts']:.0f}"
    chose = f"{experts['chosen']:.0f}{total} experts in each layer, which overlap by {experts['overlap']:.0%}"
    return kind, f"{kind}: {of} {how}; they choose {chose} with the token before's{chance}"


def _guess(report: Mapping[str, Any]) -> str:
    """Return what a trace without operators can say."""
    what = "faulted on" if report["source"] == "faults" else "read from disk"
    why = f"not known for certain: the trace has no operators, only what was {what}"
    agreement = report["agreement"]
    if agreement is None:
        return f"{why}; no token shows two weights"
    seen = sum(row["length"] for row in report["tokens"]) / max(len(report["tokens"]), 1)
    return (
        f"{why}, a token shows {seen:.0f} weights of {len(report['sequence']):,}; "
        f"{agreement:.0%} of those that follow each other do so in one order (chance: 50%)"
    )
