"""What `llmtraced bench prefetch --json` measured of a machine, as :mod:`llmtraced.analysis.simulate` needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from llmtraced.errors import LlmtracedError

__all__ = ["Measured", "measured"]

_LEAST_SHARE: Final = 0.01  # of what a token uses, that must have been read


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine with one model, medians over the conditions in which it did not fit.

    Attributes:
        bytes_per_token: of the model that a token uses.
        compute_ns: of a token that reads nothing.
        disk: bytes/s.
        stall_ns_per_byte: of what a server without a sidecar reads; None: not measured.
        exposed: share of the computing that reading ahead does not hide, 0 where it hides all: a token with the sidecar
            takes reading at the disk's full rate and this share of computing.
        conditions: how many there were.
    """

    bytes_per_token: float
    compute_ns: float
    disk: float
    stall_ns_per_byte: float | None
    exposed: float
    conditions: int


def measured(report: Mapping[str, Any]) -> Measured:
    """Return what a report of ``bench prefetch`` says of ``off`` and ``auto``.

    Raises:
        LlmtracedError: it is not such a report, or has no condition in which ``auto`` read anything.
    """
    try:
        found = [one for condition in report["conditions"] if (one := _condition(condition)) is not None]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise LlmtracedError(f"not a report of bench prefetch --json: {type(error).__name__}: {error}") from None
    if not found:
        raise LlmtracedError("no condition in which the model did not fit and auto was measured")
    names = ("bytes_per_token", "compute_ns", "disk", "exposed")
    middle = {name: median(one[name] for one in found) for name in names}
    costs = [one["stall"] for one in found if one["stall"] is not None]
    return Measured(**middle, stall_ns_per_byte=median(costs) if costs else None, conditions=len(found))


def _condition(condition: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the figures of one condition; None: nothing was read in it, or not measured."""
    used, compute = float(condition["bytes_per_token"]), float(condition["compute_ms"])
    disk = float(condition["disk_bytes_per_s"]["median"])
    ms, read = _figures(condition["strategies"].get("auto"))
    if ms is None or read < used * _LEAST_SHARE or not used:
        return None
    off_ms, off_read = _figures(condition["strategies"].get("off"))
    stall = (off_ms - compute) * 1e6 / off_read if off_ms is not None and off_read >= used * _LEAST_SHARE else None
    exposed = max((ms - read / disk * 1e3) / compute, 0.0)
    return {
        "bytes_per_token": used,
        "compute_ns": compute * 1e6,
        "disk": disk,
        "stall": stall,
        "exposed": exposed,
    }


def _figures(strategy: Mapping[str, Any] | None) -> tuple[float | None, float]:
    """Return (ms per token, bytes that server and sidecar read for it); (None, 0): not measured."""
    if strategy is None or strategy["ms_per_token"] is None:
        return None, 0.0
    read = strategy["server_bytes_per_token"]["median"] + strategy["helper_bytes_per_token"]["median"]
    return float(strategy["ms_per_token"]["median"]), float(read)
