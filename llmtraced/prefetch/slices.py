"""Where a mixture's experts lie in its files, and the system calls on them. Standard library only.

An expert, here one of a layer, is a number; its *slices* are its parts of that layer's merged matrices. They are read
in large folios where the kernel does that as it should (:mod:`llmtraced.prefetch.folios`), and by readahead(2)
elsewhere, also where the file system's blocks are larger than a page anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from llmtraced.prefetch.folios import Calls, Folios, limits_of, works
from llmtraced.prefetch.pages import PAGE, Pages

__all__ = ["Slices"]

_TRIED = 24  # experts that large folios are tried with, until one has come out right


class Slices:
    """The slices of all experts.

    Args:
        pages: of each file of the model.
        layers: of each layer its merged matrices, in the order of use: file, offset of the first expert, bytes of each.
        n_experts: of a layer.
        large: whether to try to read in large folios.

    Attributes:
        large: whether they are read so.
        kept: bytes of each expert that stay in memory when it is given back.
    """

    def __init__(
        self, pages: list[Pages], layers: Sequence[Sequence[tuple[int, int, int]]], n_experts: int, *, large: bool
    ) -> None:
        self.pages = pages
        self._of = [
            [(file, first + expert * size, size) for file, first, size in layer]
            for layer in layers
            for expert in range(n_experts)
        ]
        self._folios: list[Folios] | None = None
        self._folios = self._tried() if large else None
        self.large = self._folios is not None
        self.kept = [sum(size for part in one for _, size in self._anchors(*part)) for one in self._of]

    def _anchors(self, file: int, offset: int, size: int) -> list[tuple[int, int]]:
        return self._folios[file].anchors(offset, size) if self._folios is not None else []

    def _tried(self) -> list[Folios] | None:
        """Return what reads each file in large folios, or None: experts are too small, or the kernel does not."""
        if any(pages.block > PAGE for pages in self.pages):
            return None
        sample = [one[0] for one in self._of[:: max(len(self._of) // _TRIED, 1)]]
        found = self.opened()
        with contextlib.suppress(OSError):
            if all(
                works(self.pages[number], folios, [(offset, size) for file, offset, size in sample if file == number])
                for number, folios in enumerate(found)
                if any(file == number for file, *_ in sample)
            ):
                return found
        self.close(found)
        return None

    def opened(self) -> list[Folios]:
        """Return what reads each file in large folios, for one more thread."""
        like: Sequence[Folios | None] = self._folios or [None] * len(self.pages)
        return [Folios(Calls(pages), limits_of(pages.fd), one) for pages, one in zip(self.pages, like, strict=True)]

    def close(self, folios: list[Folios] | None = None) -> None:
        """Close what was opened; without ``folios``, what was opened here."""
        for one in (folios if folios is not None else self._folios) or ():
            one.close()

    def count(self, one: int) -> int:
        """Return how many slices an expert has."""
        return len(self._of[one])

    def ask(self, one: int, at: int, folios: list[Folios] | None = None) -> tuple[int, int]:
        """Have a slice read, without waiting for it; return its bytes, and how many of these come in large folios.

        ``folios``: this thread's own, where slices are read so and it is not the one that made this.

        Raises:
            OSError: it cannot be read.
        """
        file, offset, size = self._of[one][at]
        if self._folios is not None:
            return size, (folios or self._folios)[file].ask(offset, size)
        self.pages[file].ask(offset, size)
        return size, 0

    def give_back(self, one: int, *, before: bool, after: bool) -> None:
        """Give an expert back, but for what stays; of blocks at its borders, see :meth:`Pages.give_back_range`."""
        for file, offset, size in self._of[one]:
            keep = self._anchors(file, offset, size)
            with contextlib.suppress(OSError):
                self.pages[file].give_back_range(offset, size, before=before, after=after, keep=keep)

    def keep(self, one: int) -> None:
        """Have what of an expert stays in memory read, if it is not there."""
        if self._folios is None:
            return
        for file, offset, size in self._of[one]:
            with contextlib.suppress(OSError):
                self._folios[file].keep(offset, size)

    def there(self, one: int, *, wait: bool = True) -> int:
        """Return how many bytes of an expert are in memory; see :meth:`Pages.resident_range`."""
        return sum(self.pages[file].resident_range(offset, size, wait=wait) for file, offset, size in self._of[one])

    def whole(self, one: int) -> bool:
        """Tell whether nothing of an expert is missing."""
        return all(self.pages[file].resident_range(offset, size) >= size for file, offset, size in self._of[one])

    def seems(self, one: int, *, held: bool) -> bool:
        """Tell from a page in the middle of each slice, and its first, whether an expert is there, or not, as held."""
        for file, offset, size in self._of[one]:
            pages = self.pages[file]
            if bool(pages.resident_range(offset + size // 2, 1)) != held:
                return False
            if self.kept[one] and not pages.resident_range(-(-offset // PAGE) * PAGE, 1):
                return False
        return True
