"""Dashboards as Grafana imports them."""

from __future__ import annotations

from typing import Any, Final

from llmtraced.monitoring.panels import Dashboard, Panel

__all__ = ["grafana"]

_COLUMNS: Final = 24
_HEIGHT: Final = 8
_UNITS: Final = {"tokens": "suffix: tokens/s"}
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA_VERSION: Final = 39  # Grafana 10 and 11 write it; later ones migrate it


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard's JSON. It asks which Prometheus to use by a variable, so it fits anywhere."""
    panels: list[dict[str, Any]] = []
    x = y = 0
    for number, panel in enumerate(dashboard.panels, 1):
        if x + panel.width > _COLUMNS:
            x, y = 0, y + _HEIGHT
        panels.append(_panel(panel, number) | {"gridPos": {"h": _HEIGHT, "w": panel.width, "x": x, "y": y}})
        x += panel.width
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    ]
    if any("$model" in query.expr for panel in dashboard.panels for query in panel.queries):
        variables.append(
            {
                "name": "model",
                "label": "Model",
                "type": "query",
                "datasource": _SOURCE,
                "query": "label_values(llmtraced_model_bytes, model)",
                "refresh": 2,  # whenever the time range changes
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["llmtraced"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": _SCHEMA_VERSION,
        "templating": {"list": variables},
        "panels": panels,
    }


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    bars = panel.kind == "bargauge"
    custom: dict[str, Any] = {"fillOpacity": 60 if panel.stacked else 0, "lineWidth": 1}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    defaults: dict[str, Any] = {"unit": _UNITS.get(panel.unit, panel.unit), "min": 0}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    options: dict[str, Any] = (
        {"displayMode": "basic", "orientation": "horizontal", "reduceOptions": {"calcs": ["lastNotNull"]}}
        if bars
        else {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    )
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": bars,
                "range": not bars,
            }
            for i, query in enumerate(panel.queries)
        ],
        "options": options,
        "fieldConfig": {"defaults": defaults if bars else {**defaults, "custom": custom}, "overrides": []},
    }
