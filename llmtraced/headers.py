"""Kernel headers for BCC, found or put together without touching the system.

BCC compiles against ``/lib/modules/$(uname -r)/{build,source}``. Where the running kernel has none (cloud kernels, WSL2,
micro-VMs) any recent headers do, for our programs read no kernel struct: tracepoint arguments come from tracefs, and
what uprobes read is the traced process's memory. :func:`find` says which to use; :func:`present` shows them to this
process alone, by a bind mount in a private mount namespace (so it belongs in a short-lived child).
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmtraced.errors import UNSUPPORTED, LlmtracedError

__all__ = ["Headers", "find", "present"]

_CLONE_NEWNS = 0x00020000
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_REMEDY = (
    "install kernel headers: apt-get install linux-headers-$(uname -r), or, where the running kernel has none, those of "
    "any recent kernel (Debian: linux-headers-amd64, Ubuntu: linux-headers-generic, Fedora: kernel-devel)"
)


@dataclass(frozen=True, slots=True)
class Headers:
    """Where the headers are: ``build`` (generated part) and ``source``; ``exact`` if they are the running kernel's."""

    build: Path
    source: Path
    exact: bool

    def __str__(self) -> str:
        return f"{self.build}" + ("" if self.exact else " (not the running kernel's; sufficient)")


def _usable(build: Path, source: Path) -> bool:
    return (build / "include/generated/autoconf.h").is_file() and (source / "include/linux/kconfig.h").is_file()


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.name))


def find(modules: Path = Path("/lib/modules"), sources: Path = Path("/usr/src"), release: str | None = None) -> Headers:
    """Return the headers to compile with: the running kernel's, else the newest that are installed.

    Raises:
        LlmtracedError: there are none; the message says what to install.
    """
    release = release or os.uname().release
    build, source = modules / release / "build", modules / release / "source"
    if _usable(build, source if source.exists() else build):
        return Headers(build, source if source.exists() else build, exact=True)
    found: list[tuple[tuple[int, ...], Headers]] = []
    for folder in [*sources.glob("linux-headers-*"), *sources.glob("kernels/*"), *modules.glob("*/build")]:
        # Debian splits them: linux-headers-V-ARCH (generated) and linux-headers-V-common; Ubuntu links one to the other.
        common = folder.parent / re.sub(r"-[^-]+$", "-common", folder.name)
        for source in (folder, folder.parent / "source", common):
            if _usable(folder, source):
                found.append((_version(folder), Headers(folder.resolve(), source.resolve(), exact=False)))
                break
    if not found:
        raise LlmtracedError(f"no kernel headers for {release} or any other kernel; {_REMEDY}", UNSUPPORTED)
    return max(found, key=lambda item: item[0])[1]


def present(headers: Headers) -> None:
    """Show ``headers`` as the running kernel's to this process and its children only.

    Moves the process into a private mount namespace; nothing outside sees it, and it ends with the process. With exact
    headers nothing is done.

    Raises:
        LlmtracedError: the namespace or the mount was refused.
    """
    if headers.exact:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    folder = Path(tempfile.mkdtemp(prefix="llmtraced-headers-"))
    (folder / os.uname().release).mkdir()
    (folder / os.uname().release / "build").symlink_to(headers.build)
    (folder / os.uname().release / "source").symlink_to(headers.source)

    def mount(source: str | None, target: str, flags: int) -> None:
        if libc.mount(source.encode() if source else None, target.encode(), None, flags, None):
            error = os.strerror(ctypes.get_errno())
            raise LlmtracedError(f"cannot show kernel headers to BCC: mount {target}: {error}; {_REMEDY}", UNSUPPORTED)

    if libc.unshare(_CLONE_NEWNS):
        error = os.strerror(ctypes.get_errno())
        raise LlmtracedError(f"cannot show kernel headers to BCC: unshare: {error}; {_REMEDY}", UNSUPPORTED)
    mount(None, "/", _MS_REC | _MS_PRIVATE)
    modules = Path("/lib/modules")
    if not modules.is_dir():  # a kernel without modules: give /lib a copy-free overlay is overkill; say what to do
        raise LlmtracedError(
            "cannot show kernel headers to BCC: there is no /lib/modules; mkdir /lib/modules", UNSUPPORTED
        )
    # The links point outside /lib/modules unless the distribution put its headers there: keep those reachable.
    if headers.build.is_relative_to(modules):
        (folder / os.uname().release / "build").unlink()
        (folder / os.uname().release / "source").unlink()
        for name, path in (("build", headers.build), ("source", headers.source)):
            (folder / os.uname().release / name).mkdir()
            mount(str(path), str(folder / os.uname().release / name), _MS_BIND | _MS_REC)
    mount(str(folder), str(modules), _MS_BIND | _MS_REC)
