"""The weights that each token uses, in order: from operators, or else from the order in which they were first missed.

Sequences are compared by a 64-bit **fingerprint**: the sum over the positions *i*, from 0, of
``name_hash(weight i) * FACTOR**i`` modulo 2^64. It depends on the names and their order only, so it is the same in
every run and on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from llmtraced.analysis.choices import Choices
from llmtraced.analysis.columns import ahead
from llmtraced.analysis.trace import Trace, collect

__all__ = ["FACTOR", "SOURCES", "Weights", "fingerprints", "name_hash", "source"]

Ints = NDArray[np.int64]

FACTOR: Final = 0x9E3779B97F4A7C15
"""An odd number, so that multiplying by it loses nothing modulo 2^64."""

SOURCES: Final = ("ops", "faults", "pagecache")
"""Tables that tell an order of weights, best first. Only ``ops`` has every use, faults and adds just what missed."""

_ROWS: Final = 2_000_000


def name_hash(name: str) -> int:
    """Return the first 8 bytes, little-endian, of the BLAKE2b hash (of that length) of a weight's name."""
    raw = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")


def fingerprints(hashes: NDArray[np.uint64], starts: Ints) -> NDArray[np.uint64]:
    """Return the fingerprint of each sequence; ``starts`` are the sequences' first positions in ``hashes``."""
    at = _positions(len(hashes), starts)
    powers = np.full(int(at.max(initial=0)) + 1, FACTOR, np.uint64)
    powers[0] = 1
    return np.add.reduceat(hashes * np.cumprod(powers)[at], starts)


def source(trace: Trace, phase: str | None) -> str | None:
    """Return the first of :data:`SOURCES` with a weight and a token in it; None: there is none."""
    for name in SOURCES:
        if trace.rows[name] and collect(_of_weights(trace.table(name, phase), name).select("token").head(1)).height:
            return name
    return None


class Weights:
    """The weights of a trace, numbered: those of the tensor map in file order, then names that it does not hold.

    Args:
        trace: an open trace.
        table: one of :data:`SOURCES`.
        phase: restricts everything to this phase; None: all.
        chosen: tells how many experts of a merged tensor were used.
    """

    def __init__(self, trace: Trace, table: str, phase: str | None, chosen: Choices) -> None:
        self._trace, self._table, self._phase, self._chosen = trace, table, phase, chosen
        self._map = trace.tensors.select(
            *("model", "tensor_name", "layer", "component", "shard", "offset_bytes", "size_bytes"),
            *("n_experts", "expert_bytes"),
        ).unique(["model", "tensor_name"], keep="first", maintain_order=True)
        self._number: dict[tuple[str | None, str], int] = {
            (model, name): number
            for number, (model, name) in enumerate(self._map.select("model", "tensor_name").rows())
        }

    def names(self) -> list[tuple[str | None, str]]:
        """Return (model, name) of each weight, by its number."""
        return list(self._number)

    def facts(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return what the tensor map says of these weights; None for what it does not hold."""
        known: list[dict[str, Any]] = self._map.to_dicts()
        names = self.names()
        empty = dict.fromkeys(self._map.columns)
        return [
            known[n] if n < len(known) else {**empty, "model": names[n][0], "tensor_name": names[n][1]} for n in numbers
        ]

    def rows(self, tokens: Sequence[int] | None = None) -> Iterator[pl.DataFrame]:
        """Yield the uses of weights in order of token and time; no token is split over two frames.

        Columns: ``token``, ``timestamp``, ``phase``, ``weight`` (its number); of ops also ``op``, ``bytes`` (null: not
        known). Of faults and adds only the first of each weight in a token is there.

        Args:
            tokens: only these.
        """
        held: pl.DataFrame | None = None
        for rows in ahead(self._read(tokens)):
            if not rows.height:
                continue
            rows = self._numbered(rows)
            rows = _ordered(rows if held is None else pl.concat([held, rows]))
            if self._table != "ops":
                rows = _first(rows)
            # CPUs and files are out of order by microseconds: the newest tokens' rows may be in the next piece.
            open_from = pl.lit(int(rows["token"].max())) - 1  # type: ignore[arg-type]
            done, held = rows.filter(pl.col("token") < open_from), rows.filter(pl.col("token") >= open_from)
            if done.height:
                yield done
        if held is not None and held.height:
            yield held

    def _read(self, tokens: Sequence[int] | None) -> Iterator[pl.DataFrame]:
        whole = [self._trace.table(self._table, self._phase)]
        for piece in self._trace.slices(self._table, self._phase, rows=_ROWS) if tokens is None else whole:
            chosen = _of_weights(piece, self._table)
            if tokens is not None:
                chosen = chosen.filter(pl.col("token").is_in(list(tokens)))
            columns = ("token", "timestamp", "phase", "model", "tensor_name")
            extra = ("op", "bytes_accessed") if self._table == "ops" else ()
            yield collect(chosen.select(*columns, *extra))

    def per_token(self, rank: Ints | None = None) -> pl.DataFrame:
        """Return one row a token: token, phase, length, bytes, unsized, fingerprint, agreement.

        ``bytes`` is the sum of what is known (null: nothing is), ``unsized`` how many uses are not, look-ups aside.
        ``agreement``: the share of the neighbours in the sequence that ``rank`` (by number; -1: none) has in the same
        order; null without ``rank``.
        """
        found = [_TOKENS]
        for rows in self.rows():
            token = rows["token"].to_numpy()
            number = rows["weight"].to_numpy()
            starts = np.flatnonzero(np.diff(token, prepend=token[0] - 1))
            sized = "bytes" in rows.columns
            size = rows["bytes"].fill_null(0).to_numpy() if sized else np.zeros(len(token), np.int64)
            lost = rows.select(pl.col("bytes").is_null() & (pl.col("op") != "get_rows")).to_series() if sized else None
            unsized = np.ones(len(token), bool) if lost is None else lost.to_numpy()
            found.append(
                pl.DataFrame(
                    {
                        "token": token[starts],
                        "phase": rows["phase"].cast(pl.String).gather(starts),
                        "length": np.diff(starts, append=len(token)),
                        "bytes": np.add.reduceat(size, starts) if sized else [None] * len(starts),
                        "unsized": np.add.reduceat(unsized.astype(np.int64), starts),
                        "fingerprint": fingerprints(self._hashes()[number], starts),
                        "agreement": _agreement(number, starts, rank),
                    },
                    schema=_TOKENS.schema,
                )
            )
        return pl.concat(found)

    def _hashes(self) -> NDArray[np.uint64]:
        # A further model's weights (a draft model's, say) are told apart by its file name; the first one's name does
        # not matter, so that copies of a model have the same fingerprints.
        first = self._trace.models[0] if self._trace.models else None
        keys = (name if model in (None, first) else f"{model}\0{name}" for model, name in self._number)
        return np.fromiter(map(name_hash, keys), np.uint64, len(self._number))

    def _numbered(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Number the weights of at least one row, and say how many bytes each use needs."""
        # By the dictionary's codes: one row of each pair is enough to know the names (a join takes ten times as long).
        model, name = (rows[column].to_physical().cast(pl.Int64).fill_null(-1) for column in ("model", "tensor_name"))
        pair = (model.to_numpy() + 1) * (int(name.max()) + 1) + name.to_numpy()  # type: ignore[arg-type]
        example = np.full(int(pair.max()) + 1, -1)
        example[pair] = np.arange(rows.height)
        used = np.flatnonzero(example >= 0)
        names = rows[example[used]].select(pl.col("model", "tensor_name").cast(pl.String)).rows()
        number = np.zeros(len(example), np.int64)
        number[used] = [self._number.setdefault((model, name), len(self._number)) for model, name in names]
        rows = rows.select(pl.exclude("model", "tensor_name"), weight=pl.Series(number[pair]))
        return self._sized(rows) if self._table == "ops" else rows

    def _sized(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Replace ``bytes_accessed`` by ``bytes``: of merged experts those chosen, of a look-up none (not known)."""
        each, layer = np.zeros(len(self._number), np.int64), np.zeros(len(self._number), np.int64)
        merged = self._map["n_experts"].fill_null(0).to_numpy() > 0
        each[: self._map.height] = np.where(merged, self._map["expert_bytes"].fill_null(0).to_numpy(), 0)
        layer[: self._map.height] = self._map["layer"].fill_null(-1).to_numpy()
        weight = rows["weight"].to_numpy()
        at = np.flatnonzero(each[weight] > 0)
        use = weight[at]
        size = np.zeros(rows.height, np.int64)
        size[at] = each[use] * self._chosen.count(rows["token"].to_numpy()[at].astype(np.int64), layer[use])
        known = pl.Series(size, dtype=pl.Int64)
        recorded = pl.when(pl.col("op") != "get_rows").then(pl.col("bytes_accessed"))
        return rows.with_columns(bytes=pl.when(known > 0).then(known).otherwise(recorded)).drop("bytes_accessed")


_TOKENS: Final = pl.DataFrame(
    schema={
        "token": pl.Int32,
        "phase": pl.String,
        "length": pl.Int64,
        "bytes": pl.Int64,
        "unsized": pl.Int64,
        "fingerprint": pl.UInt64,
        "agreement": pl.Float64,
    }
)


def _of_weights(frame: pl.LazyFrame, table: str) -> pl.LazyFrame:
    frame = frame.filter(pl.col("tensor_name").is_not_null(), pl.col("token") > 0)
    return frame.filter(pl.col("action") == "add") if table == "pagecache" else frame


def _ordered(rows: pl.DataFrame) -> pl.DataFrame:
    if rows["timestamp"].is_sorted() and rows["token"].is_sorted():
        return rows
    return rows.sort("token", "timestamp", maintain_order=True)


def _first(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the first row of each weight in each token, of rows that are in order."""
    token, weight = rows["token"].to_numpy(), rows["weight"].to_numpy()
    # One number for token, weight and row, so that one plain sort brings each weight's first row to the front.
    bits = rows.height.bit_length(), int(weight.max()).bit_length()
    pair = np.cumsum(np.diff(token, prepend=token[0]) != 0) << bits[1] | weight
    numbers = np.sort(pair << bits[0] | np.arange(rows.height))
    firsts = np.diff(numbers >> bits[0], prepend=-1) != 0
    return rows[np.sort(numbers[firsts] & ((1 << bits[0]) - 1))]


def _positions(length: int, starts: Ints) -> Ints:
    return np.arange(length) - np.repeat(starts, np.diff(starts, append=length))


def _agreement(number: Ints, starts: Ints, rank: Ints | None) -> pl.Series:
    """Return for each sequence the share of neighbours that ``rank`` has in this order; null where it knows none."""
    if rank is None:
        return pl.Series([None] * len(starts), dtype=pl.Float64)
    order = np.full(int(number.max(initial=-1)) + 1, -1)
    order[: len(rank)] = rank[: len(order)]
    of = order[number]
    within = np.ones(len(of), bool)
    within[starts] = False
    known, right = np.zeros(len(of), np.int64), np.zeros(len(of), np.int64)
    known[1:] = within[1:] & (of[1:] >= 0) & (of[:-1] >= 0)
    right[1:] = known[1:] & (of[1:] > of[:-1])
    pairs, agreed = np.add.reduceat(known, starts), np.add.reduceat(right, starts)
    return pl.Series(np.where(pairs > 0, agreed / np.maximum(pairs, 1), np.nan)).fill_nan(None)
