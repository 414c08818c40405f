"""What the sidecar tells of itself: a summary in words, metrics in Prometheus's text format. Standard library only."""

from __future__ import annotations

from typing import Any

__all__ = ["FOLDER", "LABELS", "METRICS", "NAME", "metrics_text", "words"]

FOLDER = "/run/llmtraced-prefetch"
"""Where the daemon looks for metrics (llmtraced.config), among other places."""

NAME = "llmtraced_prefetch_"
LABELS = ("pid", "model")
METRICS = (
    ("pinned_bytes", "gauge", "pinned_bytes", "Bytes of the model locked in memory."),
    ("window_bytes", "gauge", "window_bytes", "Bytes of memory that the stream may take."),
    ("prefetched_bytes_total", "counter", "prefetched_bytes", "Bytes read ahead of the server."),
    ("used_bytes_total", "counter", "used_bytes", "Of these: there when the server came."),
    ("late_bytes_total", "counter", "late_bytes", "Of these: still under way when the server came."),
    ("wasted_bytes_total", "counter", "wasted_bytes", "Of these: given back unused."),
    ("missed_bytes_total", "counter", "missed_bytes", "Bytes of the stream that the server had to read itself."),
    ("tokens_total", "counter", "tokens", "Graph evaluations seen."),
    ("failed_reads_total", "counter", "failed_reads", "Chunks that could not be read."),
    ("ticks_lost_total", "counter", "ticks_lost", "Ticks of the clock for which there was no room."),
    ("cpu_seconds_total", "counter", "cpu_s", "Processor time of the sidecar."),
    ("anonymous_bytes", "gauge", "anonymous_bytes", "The sidecar's own memory."),
    ("budget_bytes", "gauge", "budget_bytes", "Bytes of memory for the model's pages."),
    ("engaged", "gauge", "engaged", "1 while it works, 0 while it stands aside."),
    ("expert_read_bytes_total", "counter", "expert_read_bytes", "Bytes of experts read ahead of the server."),
    (
        "expert_large_bytes_total",
        "counter",
        "expert_large_bytes",
        "Of these: in folios larger than a page.",
    ),
    ("expert_used_bytes_total", "counter", "expert_used_bytes", "Bytes of experts: there when chosen."),
    ("expert_late_bytes_total", "counter", "expert_late_bytes", "Bytes of experts: under way when chosen."),
    ("expert_missed_bytes_total", "counter", "expert_missed_bytes", "Bytes of experts: not there when chosen."),
    ("expert_wasted_bytes_total", "counter", "expert_wasted_bytes", "Bytes of experts: given back unused."),
)


def metrics_text(summary: dict[str, Any], pid: int, model: str) -> str:
    """Return a summary in Prometheus's text format.

    Args:
        summary: of the sidecar.
        pid: of the server.
        model: that it manages.
    """
    label = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    experts = {f"expert_{key}": value for key, value in (summary.get("experts") or {}).items()}
    values = {**summary, **experts, "engaged": int(summary["state"] == "engaged")}
    lines = []
    for name, kind, key, text in METRICS:
        if values.get(key) is not None:
            full = f"{NAME}{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
            lines.append(f'{full}{{pid="{pid}",model="{label}"}} {values[key]}')
    return "\n".join(lines) + "\n"


def words(s: dict[str, Any]) -> str:
    """Return the summary in words."""
    share = (
        "nothing was streamed"
        if s["recall"] is None
        else (
            f"{s['prefetched_bytes'] / 1e9:.2f} GB read ahead; the server found {s['in_time_share']:.1%} of it there, "
            f"{s['recall'] - s['in_time_share']:.1%} under way, read {1 - s['recall']:.1%} itself; "
            f"{s['wasted_bytes'] / 1e6:.0f} MB were wasted"
        )
    )
    speed = (
        ""
        if not s["token_s_with"] or not s["token_s_without"]
        else (f"\na token took {s['token_s_without'] * 1e3:.0f} ms without, {s['token_s_with'] * 1e3:.0f} ms with it")
    )
    return f"{s['state']} after {s['tokens']} graphs in {s['seconds']:.0f} s ({s['why']}): {share}{speed}"
