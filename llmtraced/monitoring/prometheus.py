"""Asking a Prometheus, by its HTTP API (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

from llmtraced.errors import USAGE, LlmtracedError, printable

__all__ = ["Prometheus", "Series"]

_TIMEOUT_SECONDS: Final = 30.0
_MOST_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Series:
    """What a query returns for one set of labels.

    Attributes:
        labels: by name.
        times: seconds since 1970.
        values: as many; without those that are not numbers.
    """

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Prometheus:
    """A Prometheus.

    Args:
        url: such as ``http://127.0.0.1:9090``.
    """

    def __init__(self, url: str) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise LlmtracedError(f"{printable(url)!r} is not a URL like http://127.0.0.1:9090", USAGE)
        self._url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is not for proxies

    def ask(self, path: str, **parameters: str | float) -> Any:
        """Return the ``data`` of an answer.

        Args:
            path: below ``/api/v1/``.
            parameters: of the request.

        Raises:
            LlmtracedError: no answer, or an error.
        """
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with self._opener.open(url, timeout=_TIMEOUT_SECONDS) as response:
                body = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            body = error.read(_MOST_BYTES)
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise LlmtracedError(
                f"no Prometheus answers at {printable(self._url)}: {printable(str(reason))}"
            ) from error
        try:
            answer = json.loads(body)
            if answer["status"] == "success":
                return answer["data"]
            message = str(answer["error"])
        except (ValueError, KeyError, TypeError) as error:
            raise LlmtracedError(f"{printable(self._url)} does not answer as a Prometheus does") from error
        raise LlmtracedError(f"{printable(self._url)}: {printable(message)}")

    def instant(self, expr: str, time: float) -> list[Series]:
        """Return a query's values at ``time`` (seconds since 1970), the largest first.

        Raises:
            LlmtracedError: no answer, or an error.
        """
        found = [_series(one["metric"], [one["value"]]) for one in self.ask("query", query=expr, time=time)["result"]]
        return sorted((one for one in found if one.values), key=lambda one: -one.values[0])

    def range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Return a query's values from ``start`` to ``end`` (seconds since 1970), every ``step`` seconds.

        Raises:
            LlmtracedError: no answer, or an error.
        """
        data = self.ask("query_range", query=expr, start=start, end=end, step=step)
        found = [_series(one["metric"], one["values"]) for one in data["result"]]
        return [one for one in found if one.values]


def _series(labels: dict[str, str], pairs: list[list[Any]]) -> Series:
    points = [(float(at), float(value)) for at, value in pairs]
    points = [(at, value) for at, value in points if math.isfinite(value)]
    return Series(labels, [at for at, _ in points], [value for _, value in points])
