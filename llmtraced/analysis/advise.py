"""What to do about it: plain findings, each with its evidence, the mechanism and the command to act on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import polars as pl

from llmtraced.analysis.facts import Facts, facts
from llmtraced.analysis.finding import (
    OPS,
    SEVERITIES,
    Finding,
    finding,
    least,
    merged,
    names,
    path,
    rate,
    readahead,
    silent,
    size,
    speed,
)
from llmtraced.analysis.trace import Trace, unmapped, verdict
from llmtraced.loading import recorded_mode, why_unmapped

__all__ = ["FINDINGS", "advise"]

_FITS: Final = 0.01  # share of the weights used that a token may read, and yet they are said to fit
_NOTABLE: Final = 0.01  # share of the bytes moved from which on others' doings are noted
_OVER: Final = 1.25  # bytes read over bytes used: LRU with hardly any memory would read them once
_PIECE: Final = 1 << 20  # bytes read for a major fault below which a sequential reader has a small readahead
_SHARE: Final = 0.1  # of the load, or of the time, from which on it is worth a word
_STALLED: Final = 0.5
_KERNEL: Final = ("kswapd", "kdamond", "kcompactd", "khugepaged", "kworker")  # reclaim, not another user of the file
_EXPERTS: Final = "which experts each token uses was not recorded"
_LOAD: Final = "llmtraced record --detail ops -o TRACE -- llama-server …"


def advise(trace: Trace, phase: str | None = None) -> dict[str, Any]:
    """Return the report; docs/reports/advise.md has every field.

    Args:
        trace: an open trace.
        phase: whose tokens are judged; by default decoding.
    """
    known = facts(trace, phase)
    findings = [find(known) for find in FINDINGS.values()]
    findings.sort(key=lambda one: (SEVERITIES.index(one["severity"]), one["unknown"] is not None))
    return {
        "session": trace.session,
        "models": trace.models,
        "phase": phase,
        "judged_phase": known.phase,
        "tokens": known.tokens.height,
        "findings": findings,
        "cgroup_limit_bytes": known.limit,
        "peak_resident_bytes": known.peak_resident_bytes,
        "bytes_read_per_token": known.read_per_token,
        "bytes_used_per_token": known.used_per_token,
        "uses_source": known.uses.source if known.uses else None,
        "replayed_tokens": known.uses.tokens if known.uses else 0,
        "needed_ram_bytes": known.needed_ram,
        "curve": known.curve,
        "account": trace.account,
        "verdict": verdict(trace.account),
        "notes": list(trace.notes),
    }


def _account(it: Facts) -> Finding:
    trace = it.trace
    lost = {kind: sum(probe[kind] for probe in trace.account.values()) for kind in ("dropped", "missed")}
    state = verdict(trace.account)
    why = "Every figure is a sum over what was recorded. What does not fit into the event buffer is counted, not kept."
    evidence = {**lost, "left_out": len(trace.notes), "operator_rows": trace.rows["ops"]}
    if not trace.account:
        title = "Whether everything was recorded is not known"
        return finding("account", "note", title, why, unknown="the trace has no account", evidence=evidence)
    if state != "complete":
        return finding(
            "account",
            "act",
            f"The trace is not complete: {state}",
            why,
            "llmtraced record --ring 64M …   # a larger buffer; or a lower --detail",
            evidence=evidence,
        )
    if not trace.rows["ops"]:
        title = "Everything was recorded, but without operators: which weights a token uses is not known"
        why = "A page that is mapped is used without a fault, so only operators tell all that a token uses."
        return finding("account", "note", title, why, OPS, evidence=evidence)
    return finding("account", "fine", "Everything that the kernel counted was recorded", why, evidence=evidence)


def _fits(it: Facts) -> Finding:
    read, used = it.read_per_token, it.used_per_token
    again = max(it.moved["added"] - int(it.trace.tensors["size_bytes"].sum()), 0)
    evidence = {
        "bytes_read_per_token": read,
        "bytes_used_per_token": used,
        "file_weights_bytes": it.file_bytes,
        "cgroup_limit_bytes": it.limit,
        "peak_resident_bytes": it.peak_resident_bytes,
        "reread_at_least_bytes": again,
    }
    why = (
        "The kernel keeps the file's pages as long as there is memory; what was evicted is read again when it is used."
    )
    if read is None:
        return silent("fits", "Whether the model fits is not known", why, evidence=evidence)
    some = used or it.file_bytes
    if read <= _FITS * some:
        return finding("fits", "fine", f"The model fits: a token reads {size(read)} of it", why, evidence=evidence)
    uses = f"uses {size(used)} of it and " if used else ""
    if not again:
        title = f"A token {uses}reads {size(read)}, but no more than the model was read in all"
        why = "These may be first reads: the cache was not warm when the recording ended."
        return finding("fits", "note", title, why, OPS.replace("60s", "5m"), evidence=evidence)
    known = it.limit is not None and it.file_bytes > it.limit
    limit = f"; the memory limit is {size(it.limit)}, its weights are {size(it.file_bytes)}" if known else ""
    title = f"The model does not fit: each token {uses}reads {size(read)} from disk{limit}"
    command = f"llmtraced report reread {path(it)} --phase {it.phase}"
    return finding("fits", "act", title, why, command, evidence=evidence)


def _ram(it: Facts) -> Finding:
    read, need, peak, limit = it.read_per_token, it.needed_ram, it.peak_resident_bytes, it.limit
    own = limit - peak if limit is not None and peak is not None and limit > peak else None
    at_peak = next((row for row in it.curve if row["ram_bytes"] == peak), None)
    evidence = {
        "needed_ram_bytes": need,
        "peak_resident_bytes": peak,
        "cgroup_limit_bytes": limit,
        "own_memory_at_most_bytes": own,
        "half_ram_bytes": least(it, 0.5),
        "tenth_ram_bytes": least(it, 0.1),
        "lru_bytes_per_token": at_peak and at_peak["lru_bytes_per_token"],
        "pinned_bytes_per_token": at_peak and at_peak["pinned_bytes_per_token"],
        "belady_bytes_per_token": at_peak and at_peak["belady_bytes_per_token"],
        "bytes_read_per_token": read,
    }
    why = (
        "The kernel evicts what was not used for longest. If all weights are used in the same order each time, that is "
        "just what is needed next: memory is of no use until everything fits, while pinned memory helps byte by byte. "
        "The figures are of the model's pages; the server's own memory comes on top."
    )
    if read is None:
        return silent("ram", "How much RAM would end the re-reading is not known", why, evidence=evidence)
    if need is None or it.used_per_token is None:
        title = "How much RAM would end the re-reading is not known"
        lack = "which experts each token uses was not recorded" if merged(it) else "which weights are used is not known"
        return finding("ram", "note", title, why, OPS, unknown=lack, evidence=evidence)
    if read <= _FITS * it.used_per_token:
        title = f"There is enough RAM: the model's pages need {size(need)} at most"
        return finding("ram", "fine", title, why, evidence=evidence)
    if peak is not None and peak >= need:
        title = f"The model's pages had {size(peak)} and need {size(need)}, and yet {size(read)} are read per token"
        why = "Something else than the size of the memory evicts them: see the other findings."
        return finding("ram", "note", title, why, f"llmtraced report cache {path(it)}", evidence=evidence)
    had = "" if peak is None else f" (they had {size(peak)} at least)"
    title = f"Re-reading would end with {size(need)} of RAM for the model's pages{had}"
    half = evidence["half_ram_bytes"]
    if half and half < 0.95 * need:
        title += f", and be halved with {size(half)}"
    if at_peak:
        title += f"; pinned, the RAM that is there would leave {size(at_peak['pinned_bytes_per_token'])} per token"
    total = None if own is None else -(-(need + own) // (1 << 20))
    command = (
        f"sudo systemctl set-property SERVICE MemoryMax={total}M   # the pages, and {size(own)} for all else\n"
        if total
        else f"# give the server {size(need)} more than it needs besides the model's pages\n"
    )
    command += f"# or: a smaller quantisation; weights of {size(peak)} would fit" if peak else ""
    return finding("ram", "act", title, why, command.rstrip("\n"), evidence=evidence)


def _readahead(it: Facts) -> Finding:
    read, used = it.read_per_token, it.used_per_token
    majors = int(it.tokens["major_faults"].sum())
    piece = int(it.tokens["bytes_read"].sum()) / majors if majors else None
    evidence = {
        "bytes_read_per_token": read,
        "bytes_used_per_token": used,
        "read_per_used": read / used if read is not None and used else None,
        "bytes_read_per_major_fault": piece,
        "major_faults_per_token": majors / it.tokens.height if it.tokens.height else None,
        "stall_share": it.stall_share,
    }
    why = (
        "A page that is missing brings in its neighbours. That hides the disk's latency where they are used next, "
        "as in a dense model; where they are other experts, it wastes the disk and evicts pages that are needed."
    )
    if read is None:
        return silent("readahead", "Whether readahead reads too much is not known", why, evidence=evidence)
    if used is not None and read > _OVER * used:
        title = f"Readahead reads too much: {size(read)} a token, {read / used:.1f} times the {size(used)} that it uses"
        return finding("readahead", "act", title, why, readahead(128), evidence=evidence)
    stalled = (it.stall_share or 0) > 0.3
    if not merged(it) and stalled and piece is not None and piece < _PIECE:
        title = (
            f"Readahead is small: {size(piece)} come in for each major fault, {majors // it.tokens.height:,} a token"
        )
        why = (
            "A dense model is read from front to back, so that reading ahead is always right; in small pieces each of "
            "them waits for the disk."
        )
        return finding("readahead", "act", title, why, readahead(8192), evidence=evidence)
    if used is None and stalled and merged(it):
        lack = _EXPERTS
        title = f"Whether the {size(read)} read per token are used is not known"
        return finding("readahead", "note", title, why, OPS, unknown=lack, evidence=evidence)
    title = "Readahead is not what costs time" if used is None else "Readahead does not read more than is used"
    return finding("readahead", "fine", title, why, evidence=evidence)


def _limit(it: Facts) -> Finding:
    rows = it.tokens.drop_nulls("stall_ns")
    time, stall = int(rows["duration_ns"].sum()) / 1e9, int(rows["stall_ns"].sum()) / 1e9
    many, read = int(rows["n_tokens"].sum()), int(rows["bytes_read"].sum())
    compute, share = time - stall, it.stall_share
    evidence = {
        "stall_share": share,
        "tokens_per_second": rate(many, time),
        "tokens_per_second_without_stall": rate(many, compute),
        "tokens_per_second_overlapped": rate(many, max(compute, stall)),
        "compute_seconds_per_token": rate(compute, rows.height),
        "stall_seconds_per_token": rate(stall, rows.height),
        "bytes_per_stall_second": rate(read, stall),
        "bytes_per_second": rate(read, time),
    }
    why = (
        "A token takes the time to compute and the time in which a thread waits for pages. Without waiting only the "
        "first is left; with the same reads behind the computing, the longer of both."
    )
    if share is None:
        return silent("limit", "Whether the disk or the CPU is the limit is not known", why, evidence=evidence)
    speeds = (
        f"{evidence['tokens_per_second']:.3g} tokens/s; without waiting at most "
        f"{speed(evidence['tokens_per_second_without_stall'])}, with reads behind the computing "
        f"{speed(evidence['tokens_per_second_overlapped'])}"
    )
    tokens = f"llmtraced report tokens {path(it)} --phase {it.phase}"
    if share >= _STALLED:
        title = f"The disk is the limit: {share:.0%} of a token is waiting for pages, at {speeds}"
        return finding("limit", "act", title, why, tokens, evidence=evidence)
    if share >= _SHARE:
        title = f"Computing is the limit, and {share:.0%} of a token is waiting for pages, at {speeds}"
        return finding("limit", "note", title, why, tokens, evidence=evidence)
    title = f"The CPU is the limit, not the disk: {share:.0%} of a token is waiting for pages, at {speeds}"
    why = "More memory or a faster disk would change little; threads (-t), quantisation and memory bandwidth count."
    return finding("limit", "fine", title, why, evidence=evidence)


def _repacked(it: Facts) -> Finding:
    read = unmapped(it.trace)
    tensors = it.trace.tensors
    copies = tensors.filter(~pl.col("backed"), ~pl.col("model").is_in(read))
    away, here, unclear = int(copies["size_bytes"].sum()), it.size(True), it.size(None)
    evidence = {
        "repacked_bytes": away,
        "repacked_tensors": copies.height,
        "read_models": ", ".join(read) or None,
        "file_weights_bytes": here,
        "not_known_bytes": unclear,
        "bytes_read_per_token": it.read_per_token,
    }
    mode = recorded_mode(it.trace.meta)
    beside = "; ".join(why_unmapped(model, mode) for model in read)
    if read and not here and not away:
        why = (
            "What was read into the server's own memory cannot be evicted without swap, and is not shared between "
            "servers: it fits, or the server is killed. With --load-mode mmap the weights stay in the page cache."
        )
        act = "llama-server --load-mode mmap …   # then record again and compare tokens/s and bytes read"
        return finding("repacked", "note", beside, why, act, evidence=evidence)
    why = (
        "llama.cpp copies some weights into its own memory in another order, to compute faster. That memory cannot be "
        "evicted without swap: it is as good as pinned, and takes room from the pages of all other weights. Their "
        "pages of the file are read once, for the copy. With --no-repack they stay in the file: evictable, shared "
        "between servers, and slower to compute. Adapters and projectors are always read."
    )
    if not away and not here:
        lack = "no graph was understood, so where the weights are is not known"
        title = "Whether weights are kept outside the file is not known"
        return finding("repacked", "note", title, why, OPS, unknown=lack, evidence=evidence)
    if not away:
        title = f"All other weights that were seen are used from the mapped file; {beside}"
        title = title if read else "All weights that were seen are used from the mapped file"
        return finding("repacked", "fine", title, why, evidence=evidence)
    title = f"{size(away)} of weights are in the server's own memory, not in the mapped file ({size(here)} are)"
    title += f"; {beside}" if read else ""
    command = "llama-server --no-repack …   # then record again and compare tokens/s and bytes read"
    return finding("repacked", "note", title, why, command, evidence=evidence)


def _populate(it: Facts) -> Finding:
    loaded = int(it.loaded["bytes"].sum())
    gone = it.moved["evicted_loading"]
    unused = None if it.unused is None else int(it.unused["bytes"].sum())
    copied = it.trace.tensors.filter(~pl.col("backed")).select("model", "tensor_name")
    evidence = {
        "loaded_bytes": loaded,
        "evicted_while_loading_bytes": gone,
        "unused_bytes": unused,
        "unused_tensors": None
        if it.unused is None
        else it.unused.filter(pl.col("expert") < 0)["tensor_name"].n_unique(),
        "copied_bytes": int(it.loaded.join(copied, on=["model", "tensor_name"])["bytes"].sum()),
    }
    why = (
        "llama.cpp maps the file with MAP_POPULATE and advises WILLNEED: loading reads all of it, whatever fits and "
        "whatever is used, and then the pages compete."
    )
    if not loaded:
        lack = "the recording began after the model was loaded"
        title = "What loading read in vain is not known"
        return finding("populate", "note", title, why, _LOAD, unknown=lack, evidence=evidence)
    parts = [f"{size(gone)} of it were evicted before the first token"] if gone > _SHARE * loaded else []
    if unused is not None and unused > _SHARE * loaded:
        parts.append(f"{size(unused)} were not used by any token since")
    if parts:
        title = f"Loading read {size(loaded)}; " + ", ".join(parts)
        command = f"llmtraced report cache {path(it)} --phase load"
        return finding("populate", "note", title, why, command, evidence=evidence)
    title = f"Loading read {size(loaded)} and little of it in vain"
    if unused is None:
        lack = "without operators it is not known which weights are used"
        title = f"Loading read {size(loaded)}; whether all of it is used is not known"
        return finding("populate", "note", title, why, _LOAD, unknown=lack, evidence=evidence)
    return finding("populate", "fine", title, why, evidence=evidence)


def _idle(it: Facts) -> Finding:
    idle = it.others.filter(~pl.col("added"), "idle")
    total, away = it.moved["evicted"] - it.moved["evicted_loading"], int(idle["bytes"].sum())
    by = names(idle)
    late, others = it.after_gap.get(True), it.after_gap.get(False)
    evidence = {
        "evicted_bytes": total,
        "evicted_idle_bytes": away,
        "idle_share": away / total if total else None,
        "evicted_by": by,
        "tokens_after_pause": late[0] if late else 0,
        "bytes_read_after_pause": late[1] if late else None,
        "bytes_read_otherwise": others[1] if others else None,
    }
    why = (
        "Pages that nobody touches for a while are reclaimed first, by kswapd for others' needs or by DAMON without "
        "any, and an idle server touches none. The next token then reads them again."
    )
    if away <= max(_NOTABLE * it.file_bytes, _SHARE * total):
        title = "Others evicted little while no token was running" if total else "Nothing was evicted"
        return finding("idle", "fine", title, why, evidence=evidence)
    title = f"{size(away)} were evicted while no token was running, {away / total:.0%} of all, by {by}"
    if late and others and late[1] > others[1]:
        title += f"; a token after a pause reads {size(late[1])}, others {size(others[1])}"
    command = f"sudo systemctl set-property SERVICE MemoryLow={-(-it.file_bytes // (1 << 20))}M   # spare it"
    if "kdamond" in by:
        command += (
            "\necho N | sudo tee /sys/module/damon_reclaim/parameters/enabled   # DAMON's own reclaim off"
            "\necho off | sudo tee /sys/kernel/mm/damon/admin/kdamonds/*/state   # a scheme that somebody set up, off"
        )
    return finding("idle", "act" if late else "note", title, why, command, evidence=evidence)


def _foreign(it: Facts) -> Finding:
    others = it.others.filter(~pl.any_horizontal(pl.col("comm").str.starts_with(name) for name in _KERNEL))
    sums = {}
    for kind, total in (("added", it.moved["added"]), ("evicted", it.moved["evicted"])):
        mine = others.filter(pl.col("added") == (kind == "added"))
        part = int(mine["bytes"].sum())
        sums[kind] = part, part / total if total else 0.0, names(mine)
    evidence = {
        f"{kind}_{what}": value
        for kind, (part, share, by) in sums.items()
        for what, value in (("bytes", part), ("share", share), ("by", by))
    }
    why = (
        "The page cache is shared: another process that reads the model brings pages in, and one that needs memory in "
        "the same cgroup (or in all of the machine) evicts them."
    )
    loud = [kind for kind, (_, share, _) in sums.items() if share > _NOTABLE]
    if not loud:
        return finding("foreign", "fine", "No other process moves the model's pages", why, evidence=evidence)
    words = {"added": "brought in", "evicted": "evicted"}
    what = ", ".join(f"{words[k]} {size(sums[k][0])} ({sums[k][1]:.0%}, {sums[k][2]})" for k in loud)
    command = f"llmtraced report cache {path(it)}   # by process; then give the server a memory cgroup of its own"
    return finding("foreign", "note", f"Other processes {what} of the model's pages", why, command, evidence=evidence)


FINDINGS: Final[dict[str, Callable[[Facts], Finding]]] = {
    "account": _account,
    "fits": _fits,
    "ram": _ram,
    "readahead": _readahead,
    "limit": _limit,
    "repacked": _repacked,
    "populate": _populate,
    "idle": _idle,
    "foreign": _foreign,
}
"""What is looked at, in the order in which findings of one severity are told."""
