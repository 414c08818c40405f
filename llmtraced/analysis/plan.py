"""Learn the access plan from a trace: which bytes of a model a decode token uses, in order, and when.

The order is that of :func:`llmtraced.analysis.pattern.pattern`, of one model at a time, so that the tokens of a draft
model are not taken for those of the model that it drafts for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import polars as pl

from llmtraced.analysis.accesses import SOURCES
from llmtraced.analysis.pattern import pattern
from llmtraced.analysis.ram import LOOKED_UP
from llmtraced.analysis.trace import Trace
from llmtraced.errors import USAGE, LlmtracedError, printable
from llmtraced.prefetch.plan import Entry, Plan

__all__ = ["learn", "of_model"]

_TABLES: Final = (*SOURCES, "tensors", "reads")
_OUTPUT: Final = "output.weight"
_RECORD: Final = "record decoding with `llmtraced record --detail ops`"


def of_model(trace: Trace, model: str | None = None) -> Trace:
    """Return ``trace`` restricted to the weights of one model.

    Args:
        trace: an open trace.
        model: its label (the file name of its first shard); not needed where there is only one.

    Raises:
        LlmtracedError: no such model, or several and none was named.
    """
    labels = list(dict.fromkeys(trace.tensors["model"].drop_nulls().to_list()))
    named = ", ".join(printable(label) for label in labels)
    if not labels:
        raise LlmtracedError(f"{_at(trace)}: no access plan can be learned: the trace has no tensor map; {_RECORD}")
    if model is None and len(labels) > 1:
        raise LlmtracedError(f"{_at(trace)}: the trace is of several models; name one with --model: {named}", USAGE)
    if model is not None and model not in labels:
        raise LlmtracedError(f"{_at(trace)}: no model {printable(model)} in the trace; it has: {named}", USAGE)
    label = labels[0] if model is None else model
    mine = pl.col("model") == label
    tables = {name: table.filter(mine) if name in _TABLES else table for name, table in trace.tables.items()}
    about = [one for one in trace.meta["models"] if one.get("model") == label]
    meta = {**trace.meta, "models": about or [{"model": label}]}
    return replace(trace, meta=meta, tables=tables, tensors=trace.tensors.filter(mine))


def learn(trace: Trace, model: str | None = None) -> tuple[Plan, str]:
    """Return the plan, and in a sentence how sure it is.

    Of a trace with operators it is the sequence that most decode tokens have, without weights that the server does not
    use from the file; else the order in which weights were first missed (``Plan.source``), each of them once. Where no
    decode token was recorded, all tokens are looked at.

    Args:
        trace: an open trace.
        model: as in :func:`of_model`.

    Raises:
        LlmtracedError: no order can be learned.
    """
    only = of_model(trace, model)
    report = pattern(only)
    refusal = _refusal(report)
    if refusal:
        raise LlmtracedError(f"{_at(trace)}: no access plan can be learned: {refusal}; {_RECORD}")
    elsewhere = set(only.tensors.filter(~pl.col("backed"))["tensor_name"].to_list())
    tied = _OUTPUT not in only.tensors["tensor_name"]
    experts = set(only.tensors.filter(pl.col("n_experts") > 0)["tensor_name"].to_list())
    used = [row for row in report["sequence"] if row["offset_bytes"] is not None]
    used = [row for row in used if row["tensor_name"] not in elsewhere and row["size_bytes"]]
    if not used:
        what = "none of the weights that its tokens use are in the mapped file"
        raise LlmtracedError(f"{_at(trace)}: no access plan can be learned: {what}")
    entries = tuple(
        Entry(
            step=step,
            tensor_name=row["tensor_name"],
            layer=row["layer"],
            component=row["component"],
            shard=row["shard"],
            offset_bytes=row["offset_bytes"],
            size_bytes=row["size_bytes"],
            whole=row["tensor_name"] not in experts and not _looked_up(row, tied),
            when=_when(row["at_share"]),
        )
        for step, row in enumerate(used)
    )
    about = only.meta["models"][0]
    plan = Plan(str(about["model"]), str(about.get("fingerprint") or ""), report["source"], _tokens(report), entries)
    return plan, str(report["answer"])


def _at(trace: Trace) -> str:
    return printable(str(trace.path))


def _refusal(report: Mapping[str, Any]) -> str | None:
    """Return why the report has no order to learn from; None: it has one."""
    if report["source"] is None:
        return "it has no use of a weight within a token (no operators, faults or reads)"
    if report["source"] != "ops" and report["agreement"] is None:
        return "it has no operators, and no token faulted on or read two weights"
    return None


def _tokens(report: Mapping[str, Any]) -> int:
    """Return how many tokens the order was learned from."""
    phase, classes = report["compared_phase"], report["classes"]
    if report["source"] == "ops":
        return int(classes[0]["phases"].get(phase, classes[0]["tokens"]))
    some = [row for row in report["tokens"] if phase is None or row["phase"] == phase]
    return len(some)


def _looked_up(row: Mapping[str, Any], tied: bool) -> bool:
    """Return whether single rows of the tensor are used: by its operator, else by what the table of embeddings is."""
    if row["op"] is not None:
        return str(row["op"]).lower() == "get_rows"
    return not tied and row["tensor_name"] == LOOKED_UP


def _when(share: float | None) -> float | None:
    """Return the share of the token's time; what was seen after the graph's end counts as its end."""
    return None if share is None else round(min(max(share, 0.0), 1.0), 6)
