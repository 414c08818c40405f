"""Columns of a table as numpy arrays, batch by batch in the order of the files, read ahead by other threads.

For what polars cannot say in a query because each row depends on those before it. Words (dictionary columns) become
small numbers that mean the same in all files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import Any, Final, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmtraced.analysis.trace import Stored, Trace, damaged

__all__ = ["Batch", "Bools", "Ints", "Numbers", "Words", "ahead", "batches", "grown"]

Ints = np.ndarray[Any, np.dtype[np.int64]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Batch = dict[str, np.ndarray[Any, Any]]
"""Columns by name, all of the same length, of the table's types; words are int32 numbers (:class:`Words`), truth is
int8."""

_ROWS: Final = 1 << 17
"""Rows of a batch, about, as long as there are so many: files may be small."""
_COMING: Final = 4
"""Batches of a table that are read ahead."""
_Made = TypeVar("_Made")
_Array = TypeVar("_Array", bound=np.ndarray[Any, Any])


class Words:
    """The different words of a column, numbered from 0 as they come, in any order; null is a word.

    Attributes:
        list: the words by number.
    """

    def __init__(self, *known: str | None) -> None:
        self.list: list[str | None] = list(known)
        self._number: dict[str | None, int] = {word: number for number, word in enumerate(known)}
        self._lock = Lock()
        self._known: pa.Array | None = None  # the list
        self._last: tuple[pa.Array, Numbers] | None = None

    def numbers(self, column: pa.DictionaryArray) -> Numbers:
        """Return the numbers of a dictionary column's words, which may be new ones."""
        words, codes, last = column.dictionary, column.indices, self._last
        if last is None or not last[0].equals(words):
            last = self._last = words, self._found(words)
        places = codes.fill_null(-1) if codes.null_count else codes
        numbers: Numbers = last[1][places.to_numpy()]
        return numbers

    def _found(self, words: pa.Array) -> Numbers:
        """Return the numbers of the words, and then that of null, where -1 points to."""
        at = pc.index_in(words, self._known) if self._known is not None else None
        if at is None or at.null_count:  # new ones
            with self._lock:
                for word in (*words.to_pylist(), None):
                    if self._number.setdefault(word, len(self.list)) == len(self.list):
                        self.list.append(word)
                self._known = pa.array(self.list, words.type)
                at = pc.index_in(words, self._known)
        return np.append(at.to_numpy(), self._number[None]).astype(np.int32)


def batches(
    trace: Trace, table: str, columns: Mapping[str, Words | int], make: Callable[[Batch], _Made], threads: int = 1
) -> Iterator[_Made]:
    """Read a table and yield what ``make`` makes of each batch, in order; it runs in other threads.

    Args:
        trace: an open trace.
        table: its name.
        columns: with :class:`Words` for those that are words, and for all others what stands for null.
        make: what to do with a batch.
        threads: that read and make; one is enough where other tables are read beside.

    Raises:
        LlmtracedError: a file's data (not its footer) is damaged.
    """

    def load(some: Sequence[tuple[Stored, list[int]]]) -> _Made:
        with damaged():
            return make(_read(some, columns))

    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[_Made]] = deque()
        try:
            for some in _planned(trace.files[table]):
                coming.append(pool.submit(load, some))
                if len(coming) > _COMING:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for one in coming:
                one.cancel()


def grown(array: _Array, room: tuple[int, ...]) -> _Array:
    """Return the array with zeros added at the end of each dimension that is shorter, or itself if none is."""
    room = tuple(max(sizes) for sizes in zip(array.shape, room, strict=True))
    if array.shape == room:
        return array
    larger: Any = np.zeros(room, array.dtype)
    larger[tuple(slice(size) for size in array.shape)] = array
    return cast("_Array", larger)


def ahead(items: Iterator[_Made]) -> Iterator[_Made]:
    """Yield the items, each of which is made in another thread while the one before it is looked at."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lambda: list(islice(items, 1)))
        while found := coming.result():
            coming = pool.submit(lambda: list(islice(items, 1)))
            yield found[0]


def _planned(files: Sequence[Stored]) -> Iterator[list[tuple[Stored, list[int]]]]:
    """Yield the row groups of one batch after the other."""
    some: list[tuple[Stored, list[int]]] = []
    rows = 0
    for file in files:
        groups: list[int] = []
        for group, size in enumerate(file.groups):
            if not size:
                continue
            groups.append(group)
            rows += size
            if rows >= _ROWS:
                yield [*some, (file, groups)]
                some, groups, rows = [], [], 0
        if groups:
            some.append((file, groups))
    if some:
        yield some


def _read(some: Sequence[tuple[Stored, list[int]]], columns: Mapping[str, Words | int]) -> Batch:
    parts: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in columns}
    for stored, groups in some:
        with pq.ParquetFile(stored.path, pre_buffer=False) as file:  # no hop to a thread that reads: it is in the cache
            same = _same(file.metadata, groups, columns)
            read = [name for name in columns if name not in same]
            table = file.read_row_groups(groups, columns=read, use_threads=False)
            types = file.schema_arrow
        for name, known in columns.items():
            if name in same:
                one = _array(pa.array([same[name]], types.field(name).type), known)
                parts[name].append(np.broadcast_to(one, sum(stored.groups[group] for group in groups)))
            else:
                parts[name] += [_array(chunk, known) for chunk in table.column(name).chunks]
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _same(footer: pq.FileMetaData, groups: Sequence[int], columns: Collection[str]) -> dict[str, Any]:
    """Return the columns that have one value in all of these rows, and that value, as far as the footer tells.

    So they need not be read: most files are of one model and phase.
    """
    found: dict[str, Any] = {}
    parts = [footer.row_group(group) for group in groups]
    for at in range(parts[0].num_columns):
        name = parts[0].column(at).path_in_schema
        told = [part.column(at).statistics for part in parts] if name in columns else [None]
        if all(one is not None and one.has_min_max and one.null_count == 0 for one in told):
            values = {value for one in told if one is not None for value in (one.min, one.max)}
            if len(values) == 1:
                found[name] = values.pop()
    return found


def _array(chunk: pa.Array, known: Words | int) -> np.ndarray[Any, Any]:
    if isinstance(known, Words):
        return known.numbers(chunk)
    if pa.types.is_boolean(chunk.type):
        chunk = chunk.cast(pa.int8())
    array: np.ndarray[Any, Any] = (chunk.fill_null(known) if chunk.null_count else chunk).to_numpy()
    return array
