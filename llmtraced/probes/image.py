"""Compiled programs apart from any kernel object: what their maps are, and their instructions. Made into objects here.

An instruction that loads a map's address holds the map's descriptor (BPF_PSEUDO_MAP_FD, linux/bpf.h). In an image it
holds the map's number in the list of maps instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from llmtraced.probes import kernel
from llmtraced.probes.kernel import MapInfo

__all__ = ["Image", "taken", "used_maps"]

_LOAD_WIDE: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW: two slots of 8 bytes
_MAP_SOURCES: Final = (1, 2)  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
_SLOT: Final = 8


@dataclass(frozen=True, slots=True)
class Image:
    """Programs and maps.

    Attributes:
        maps: in the order of their numbers.
        programs: name → kind (kernel.KINDS), number of the kernel's type that it is for or 0, instructions.
        about: what else is to be known: ``headers``, ``bcc_version``, ``compile_rss_bytes``, ``absent``.
    """

    maps: tuple[MapInfo, ...]
    programs: Mapping[str, tuple[str, int, bytes]]
    about: Mapping[str, Any]

    def encoded(self) -> bytes:
        """Return it as bytes: a digest, a line of JSON."""
        text = json.dumps(
            {
                "maps": [asdict(one) for one in self.maps],
                "programs": {n: [kind, t, base64.b64encode(i).decode()] for n, (kind, t, i) in self.programs.items()},
                "about": dict(self.about),
            }
        ).encode()
        return hashlib.sha256(text).hexdigest().encode() + b"\n" + text

    @classmethod
    def decoded(cls, data: bytes) -> Image:
        """Return what :meth:`encoded` was made of.

        Raises:
            ValueError: it is damaged, or something else.
        """
        digest, _, text = data.partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise ValueError("the digest is another")
        told = json.loads(text)
        try:
            return cls(
                tuple(MapInfo(**one) for one in told["maps"]),
                {n: (kind, t, base64.b64decode(i)) for n, (kind, t, i) in told["programs"].items()},
                told["about"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no image: {error}") from error

    def load(self, maps: Sequence[str]) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
        """Make the maps and load the programs.

        Args:
            maps: names of those that are wanted; the others live as long as the programs that use them.

        Returns:
            Descriptors of programs and of maps by name, and why programs were refused.

        Raises:
            OSError: a map cannot be made.
        """
        made: list[int] = []
        programs: dict[str, int] = {}
        refused: dict[str, str] = {}
        try:
            made.extend(kernel.create_map(one) for one in self.maps)  # those before one that fails stay in the list
            numbers = dict(enumerate(made))
            for name, (kind, number, code) in self.programs.items():
                try:
                    programs[name] = kernel.load_program(name, _mapped(code, numbers.__getitem__), kind, number)
                except OSError as error:
                    refused[name] = f"{error.strerror or error}"
        except BaseException:
            for fd in (*made, *programs.values()):
                os.close(fd)
            raise
        wanted = {one.name: fd for one, fd in zip(self.maps, made, strict=True) if one.name in maps}
        for fd in made:
            if fd not in wanted.values():
                os.close(fd)
        return programs, {name: wanted[name] for name in maps}, refused


def used_maps(programs: Sequence[bytes]) -> list[int]:
    """Return the descriptors of the maps that programs use, each once, in order."""
    return list(dict.fromkeys(_number(code, at) for code in programs for at in _places(code)))


def taken(programs: Mapping[str, tuple[str, int, bytes]], names: Mapping[int, str], about: Mapping[str, Any]) -> Image:
    """Return the image of programs as a compiler has made them, with descriptors of maps that it has made, too.

    Args:
        programs: as in :class:`Image`.
        names: of maps that have to be found again, by descriptor.
        about: as in :class:`Image`.

    Raises:
        OSError: a map is gone.
    """
    fds = list(dict.fromkeys([*names, *used_maps([code for _, _, code in programs.values()])]))
    numbers = {fd: number for number, fd in enumerate(fds)}
    maps = tuple(kernel.map_info(fd, names.get(fd, "")) for fd in fds)
    moved = {n: (kind, t, _mapped(code, numbers.__getitem__)) for n, (kind, t, code) in programs.items()}
    return Image(maps, moved, about)


def _places(code: bytes) -> Iterator[int]:
    """Yield where the instructions begin that load a map's address."""
    at = 0
    while at < len(code):
        if code[at] == _LOAD_WIDE:
            if code[at + 1] >> 4 in _MAP_SOURCES:  # the source register's place says what the number is
                yield at
            at += _SLOT
        at += _SLOT


def _number(code: bytes, at: int) -> int:
    return int(struct.unpack_from("<i", code, at + 4)[0])


def _mapped(code: bytes, number: Callable[[int], int]) -> bytes:
    """Return the instructions with other numbers of maps."""
    changed = bytearray(code)
    for at in _places(code):
        struct.pack_into("<i", changed, at + 4, number(_number(code, at)))
    return bytes(changed)
