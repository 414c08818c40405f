"""What is shown of the metrics, as data: dashboards, their panels, and the queries behind them.

Grafana's JSON (:mod:`.grafana`) and pictures (:mod:`.picture`) are made from this, and the tests ask a live Prometheus
every query here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["DASHBOARDS", "Dashboard", "Panel", "Query", "concrete"]

_M: Final = '{model=~"$model"}'
_BY: Final = "instance, pid, model"
_R: Final = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Query:
    """A query with Grafana's variables ``$model`` and ``$__rate_interval`` in it.

    Attributes:
        expr: PromQL.
        legend: names a series; ``{{label}}`` stands for a label's value.
    """

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel.

    Attributes:
        title, text: what it shows, and how to read it.
        unit: as Grafana names it: ``bytes``, ``Bps``, ``percentunit``, ``s``, ``cps`` (a second), ``short``; and
            ``tokens`` (a second), for which it has no name.
        queries: drawn together.
        kind: ``timeseries``, or ``bargauge``: values of now, the largest first.
        stacked: the series add up to something.
        width: of Grafana's 24 columns.
    """

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    stacked: bool = False
    width: int = 12


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: names it in Grafana, for good.
        title, text: for the reader.
        panels: in reading order.
    """

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]


def concrete(expr: str, window: str, model: str = ".*") -> str:
    """Return a query with values for Grafana's variables.

    Args:
        expr: of a :class:`Query`.
        window: for ``$__rate_interval``, as PromQL writes it: ``30s``.
        model: regular expression for ``$model``.
    """
    return expr.replace("$__rate_interval", window).replace("$model", model)


def _rate(name: str, by: str = _BY, more: str = "") -> str:
    labels = f'{{model=~"$model"{more}}}'
    return f"sum by ({by}) (rate({name}{labels}{_R}))"


_DECODED: Final = _rate("llmtraced_tokens_total", more=',phase="decode"')

_SERVERS: Final = Dashboard(
    "llmtraced-servers",
    "llmtraced: servers",
    "What LLM servers wait for: page faults, reads and evictions of their models, by tensor and layer.",
    (
        Panel(
            "Stall share",
            "Share of the computing time with at least one thread in a page fault on the model. 0: memory is no "
            "problem. Near 1: the server does little else than wait for the disk.",
            "percentunit",
            (
                Query(
                    f"clamp_max({_rate('llmtraced_stall_seconds_total')} / "
                    f"({_rate('llmtraced_eval_seconds_total')} > 0), 1)",
                    "{{model}} ({{pid}})",
                ),
            ),
        ),
        Panel(
            "Tokens",
            "Text tokens evaluated a second. Prompt tokens come in batches, decoded ones one at a time.",
            "tokens",
            (
                Query(
                    _rate("llmtraced_tokens_total", f"{_BY}, phase", ',phase=~"prompt|decode"'), "{{phase}} ({{pid}})"
                ),
            ),
        ),
        Panel(
            "Read from disk, by cause",
            "Bytes of the models brought into the page cache a second: by a fault itself, by readahead around it, by a "
            "prefetcher, by read(2).",
            "Bps",
            (Query(_rate("llmtraced_read_bytes_total", "cause"), "{{cause}}"),),
            stacked=True,
        ),
        Panel(
            "Read for each decoded token",
            "Near the model's size: memory does not hold it, and every token reads it again.",
            "bytes",
            (
                Query(
                    f"{_rate('llmtraced_read_bytes_total')} / ({_DECODED} > 0)",
                    "{{model}} ({{pid}})",
                ),
                Query(f"sum by ({_BY}) (llmtraced_model_bytes{_M})", "size of the model ({{pid}})"),
            ),
        ),
        Panel(
            "Re-read, by layer",
            "Bytes read a second that had been read before, of the ten layers with the most. -1: in no layer.",
            "Bps",
            (Query(f"topk(10, {_rate('llmtraced_tensor_reread_bytes_total', 'model, layer')})", "layer {{layer}}"),),
            kind="bargauge",
        ),
        Panel(
            "Most faults, by tensor",
            "Page faults a second, major and minor, of the ten tensors with the most. Behind a name: layer and "
            "component.",
            "cps",
            (
                Query(
                    f"topk(10, {_rate('llmtraced_tensor_faults_total', 'model, layer, component, tensor')})",
                    "{{tensor}} {{layer}}/{{component}}",
                ),
            ),
            kind="bargauge",
        ),
        Panel(
            "Major faults",
            "Page faults a second that waited for the disk.",
            "cps",
            (Query(_rate("llmtraced_tensor_faults_total", _BY, ',type="major"'), "{{model}} ({{pid}})"),),
        ),
        Panel(
            "Evicted, by component",
            "Bytes of the models that left the page cache a second. Where this follows the reads, memory is too small.",
            "Bps",
            (Query(_rate("llmtraced_tensor_evicted_bytes_total", "component"), "{{component}}"),),
            stacked=True,
        ),
        Panel(
            "Sidecar: precision, and what came late",
            "Precision: of what was read ahead and is done with, the share that the server used. Late: of what it "
            "used, the share that was still under way.",
            "percentunit",
            (
                Query(
                    f"({_rate('llmtraced_prefetch_used_bytes_total')} + {_rate('llmtraced_prefetch_late_bytes_total')})"
                    f" / ({_rate('llmtraced_prefetch_used_bytes_total')} + "
                    f"{_rate('llmtraced_prefetch_late_bytes_total')} + "
                    f"{_rate('llmtraced_prefetch_wasted_bytes_total')} > 0)",
                    "precision ({{pid}})",
                ),
                Query(
                    f"{_rate('llmtraced_prefetch_late_bytes_total')} / "
                    f"({_rate('llmtraced_prefetch_used_bytes_total')} + "
                    f"{_rate('llmtraced_prefetch_late_bytes_total')} > 0)",
                    "late ({{pid}})",
                ),
            ),
        ),
        Panel(
            "Sidecar: memory",
            "Bytes of the model locked in memory, and the most that it may use for the model's pages.",
            "bytes",
            (
                Query(f"llmtraced_prefetch_pinned_bytes{_M}", "pinned ({{pid}})"),
                Query(f"llmtraced_prefetch_budget_bytes{_M}", "budget ({{pid}})"),
            ),
        ),
    ),
)

_TRACER: Final = Dashboard(
    "llmtraced-tracer",
    "llmtraced: the tracer itself",
    "Whether what llmtraced says is complete, and what it costs.",
    (
        Panel(
            "Daemons that answer",
            "1: scraped; 0: not.",
            "short",
            (Query('up{job=~".*llmtraced.*"}', "{{instance}}"),),
        ),
        Panel(
            "Events",
            "Events a second: counted in the kernel, delivered to the trace, dropped because the ring was full. Totals "
            "by tensor do not come from the ring and are exact in any case.",
            "cps",
            (Query(_rate("llmtraced_events_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            "Ring in use",
            "Share of the event buffer that waits to be read. Near 1, events are dropped.",
            "percentunit",
            (Query("llmtraced_ring_waiting_records / llmtraced_ring_capacity_records", "{{instance}}"),),
        ),
        Panel(
            "Trace written",
            "Bytes a second of trace files, and files that could not be written: recording pauses while that is so.",
            "Bps",
            (Query(f"rate(llmtraced_trace_bytes_total{_R})", "{{instance}}"),),
        ),
        Panel(
            "What is wrong",
            "A second: files that could not be written, intervals whose account did not add up, events that programs "
            "missed. All of it should be 0.",
            "cps",
            (
                Query(f"rate(llmtraced_trace_write_errors_total{_R})", "write errors"),
                Query(f"rate(llmtraced_unsettled_total{_R})", "unsettled intervals"),
                Query(f"sum by (instance) (rate(llmtraced_missed_total{_R}))", "missed events"),
                Query("sum by (instance) (llmtraced_problems)", "problems of processes (count)"),
            ),
        ),
        Panel(
            "Processor",
            "Processor seconds a second of the daemon, and of the sidecars.",
            "percentunit",
            (
                Query(f"rate(process_cpu_seconds_total{_R}) and on (job, instance) llmtraced_build_info", "daemon"),
                Query(f"rate(llmtraced_prefetch_cpu_seconds_total{_R})", "sidecar of {{pid}}"),
            ),
        ),
        Panel(
            "Memory",
            "The daemon's resident memory, and the sidecars' own.",
            "bytes",
            (
                Query("process_resident_memory_bytes and on (job, instance) llmtraced_build_info", "daemon"),
                Query("llmtraced_prefetch_anonymous_bytes", "sidecar of {{pid}}"),
            ),
        ),
        Panel(
            "Scrapes",
            "Time to make the series; time of the whole scrape as Prometheus sees it.",
            "s",
            (
                Query("llmtraced_scrape_duration_seconds", "made"),
                Query("scrape_duration_seconds and on (job, instance) llmtraced_build_info", "scraped"),
            ),
        ),
    ),
)

DASHBOARDS: Final[Mapping[str, Dashboard]] = {"servers": _SERVERS, "tracer": _TRACER}
"""All dashboards, by the name that `llmtraced monitoring` takes."""
