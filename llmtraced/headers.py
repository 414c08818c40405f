"""Kernel headers for BCC, found or put together without touching the system.

BCC compiles against ``/lib/modules/$(uname -r)/{build,source}``, or against one complete tree that the environment
names. Where the running kernel has no headers (cloud kernels, WSL2, micro-VMs) any recent ones do, for our programs
use no kernel struct of theirs: where the kernel's fields lie comes from BTF, the running kernel's own description.
:func:`find` says which to use; :func:`presented` shows them to this process by its environment, so it belongs in a
short-lived child. docs/requirements.md has the whole story.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmtraced.errors import UNSUPPORTED, LlmtracedError

__all__ = ["SKIP", "Headers", "candidates", "find", "presented"]

_MODULES: Final = Path("/lib/modules")
_SOURCES: Final = Path("/usr/src")
_ARCHIVE: Final = Path("/sys/kernel/kheaders.tar.xz")  # CONFIG_IKHEADERS; BCC unpacks it by itself
_VARIABLE: Final = "BCC_KERNEL_SOURCE"  # a complete tree; src/cc/frontends/clang/loader.cc
SKIP: Final = "LLMTRACED_HEADERS_SKIP"
"""Environment variable of the child that compiles: how many of :func:`candidates` have been tried in vain."""

_REMEDY: Final = (
    "install kernel headers: apt-get install linux-headers-$(uname -r), or, where the running kernel has none, those "
    "of any recent kernel (Debian: linux-headers-amd64, Ubuntu: linux-headers-generic, Fedora: kernel-devel)"
)


@dataclass(frozen=True, slots=True)
class Headers:
    """Kernel headers.

    Attributes:
        build: the generated part.
        source: the rest; the same folder where a distribution does not split them.
        exact: whether they are the running kernel's.
        in_place: whether BCC finds them by itself.
    """

    build: Path
    source: Path
    exact: bool
    in_place: bool

    def __str__(self) -> str:
        return f"{self.build}" + ("" if self.exact else " (not the running kernel's; sufficient)")


def find(
    modules: Path = _MODULES,
    sources: Path = _SOURCES,
    release: str | None = None,
    archive: Path = _ARCHIVE,
    chosen: str | None = None,
) -> Headers:
    """Return the headers to compile with: the first of :func:`candidates`, or as :data:`SKIP` says.

    Args:
        modules: ``/lib/modules``.
        sources: ``/usr/src``.
        release: the running kernel's, as ``uname -r`` has it.
        archive: of the headers in the kernel itself.
        chosen: the value of BCC_KERNEL_SOURCE; taken from the environment by default.

    Raises:
        LlmtracedError: there are none; the message says what to install.
    """
    return candidates(modules, sources, release, archive, chosen)[int(os.environ.get(SKIP, "0"))]


def candidates(
    modules: Path = _MODULES,
    sources: Path = _SOURCES,
    release: str | None = None,
    archive: Path = _ARCHIVE,
    chosen: str | None = None,
) -> list[Headers]:
    """Return all headers that there are, the ones to try first before the others; arguments as of :func:`find`.

    In this order: the running kernel's in ``modules``; the archive that the kernel carries; any other kernel's: those
    that are not newer than the running one, the newest first, then those that are, the oldest first (the installed
    LLVM and BCC may be too old for much newer headers, the running kernel's included). Where BCC's own environment
    variable names a tree, it is that one alone.

    Raises:
        LlmtracedError: there are none; the message says what to install.
    """
    release = release or os.uname().release
    chosen = os.environ.get(_VARIABLE, "") if chosen is None else chosen
    if chosen:
        folder = Path(chosen)
        if not _usable(folder, folder):
            raise LlmtracedError(f"{_VARIABLE}={chosen} is no complete tree of kernel headers; unset it", UNSUPPORTED)
        return [Headers(folder, folder, exact=_version(folder) == _numbers(release), in_place=True)]
    in_place: list[Headers] = []
    build, source = modules / release / "build", modules / release / "source"
    if _usable(build, source if source.is_dir() else build):  # the very choice that BCC makes
        in_place = [Headers(build, source if source.is_dir() else build, exact=True, in_place=True)]
    elif archive.is_file():
        in_place = [Headers(archive, archive, exact=True, in_place=True)]
    ours, known = _numbers(release), {headers.build.resolve() for headers in in_place}
    found: list[tuple[tuple[int, ...], Headers]] = []
    for folder in _folders(modules, sources):
        if folder.resolve() in known:
            continue
        for source in (folder, folder.parent / "source", *_named_source(folder)):
            if _usable(folder, source):
                version = _version(folder)
                headers = Headers(folder.resolve(), source.resolve(), exact=version == ours, in_place=False)
                found.append((version, headers))
                known.add(headers.build)
                break
    if not in_place and not found:
        raise LlmtracedError(f"no kernel headers for {release} or any other kernel; {_REMEDY}", UNSUPPORTED)
    older = sorted((item for item in found if item[0] <= ours), key=lambda item: item[0], reverse=True)
    newer = sorted((item for item in found if item[0] > ours), key=lambda item: item[0])
    return [*in_place, *(headers for _, headers in (*older, *newer))]


def _folders(modules: Path, sources: Path) -> Iterator[Path]:
    """Yield folders that may be the generated part of some kernel's headers."""
    # Debian and Ubuntu; Fedora and its family; SUSE (linux-V-obj/ARCH/FLAVOUR); what every kernel's modules link to
    for base, pattern in (
        (sources, "linux-headers-*"),
        (sources, "kernels/*"),
        (sources, "linux-*-obj/*/*"),
        (modules, "*/build"),
    ):
        yield from sorted(base.glob(pattern))


def _usable(build: Path, source: Path) -> bool:
    return (
        (build / "include/generated/autoconf.h").is_file()
        and (build / "arch/x86/include/generated").is_dir()  # not those of another architecture
        and (source / "include/linux/kconfig.h").is_file()
    )


def _named_source(build: Path) -> list[Path]:
    """Return the source that a split tree's Makefile includes (Debian's ``-common``, SUSE's ``linux-V``)."""
    try:
        text = (build / "Makefile").read_text(errors="replace")
    except OSError:
        return []
    return [build / name for name in re.findall(r"^include\s+(\S+)/Makefile\s*$", text, re.MULTILINE)]


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", release))


def _version(build: Path) -> tuple[int, ...]:
    """Return the numbers in the release that the headers are of; empty if they do not say."""
    try:
        text = (build / "include/generated/utsrelease.h").read_text(errors="replace")
    except OSError:
        return ()
    match = re.search(r'UTS_RELEASE "([^"]*)"', text)
    return _numbers(match[1]) if match else ()


@contextlib.contextmanager
def presented(headers: Headers) -> Iterator[None]:
    """Show ``headers`` to BCC in this process, until the context ends.

    Headers that are in place need nothing. A complete tree is named in the environment; the halves of a split one are
    first merged into a folder for temporary files, by links. It takes no privilege.
    """
    if headers.in_place:
        yield
        return
    before = os.environ.get(_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="llmtraced-headers-") as folder:
        whole = headers.build
        if not _usable(whole, whole):
            whole = Path(folder)
            _merge(whole, headers.build, headers.source)
        os.environ[_VARIABLE] = str(whole)
        try:
            yield
        finally:
            os.environ.pop(_VARIABLE)
            if before is not None:
                os.environ[_VARIABLE] = before


def _merge(into: Path, *trees: Path) -> None:
    """Link everything that the trees have into a folder; a folder that several have is one there."""
    names = sorted({entry.name for tree in trees for entry in tree.iterdir()})
    for name in names:
        found = [tree / name for tree in trees if (tree / name).exists()]
        if len(found) > 1 and all(path.is_dir() for path in found):
            (into / name).mkdir()
            _merge(into / name, *found)
        elif found:
            (into / name).symlink_to(found[0].resolve())
