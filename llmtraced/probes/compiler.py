"""Compile BPF programs: the only module that imports BCC. They are kept for the next time.

BCC brings LLVM, 150 MB of it, needed for seconds. So it runs in a child, a module of ours as a program, which answers
with an image: maps and instructions. Its parent makes kernel objects of that. An image depends on the sources, the
flags and the kernel and on nothing else that matters, so one that was kept needs neither BCC nor headers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmtraced import __version__, children, headers, kept
from llmtraced.capabilities import can_load, held
from llmtraced.errors import NO_PERMISSION, UNSUPPORTED, LlmtracedError
from llmtraced.probes.image import Image, taken

__all__ = ["answer", "compile_in_child", "compiled", "image", "import_bcc"]

log = logging.getLogger(__name__)

_HEADERS_TRIED: Final = 3
_DISTRIBUTION_BCC: Final = ("/usr/lib/python3/dist-packages", "/usr/lib/python3*/site-packages")
_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_SUFFIX: Final = ".bpf"
_KEPT: Final = 8  # images


def image(module: str, argument: str, depends: Sequence[str], *, anew: bool = False) -> Image:
    """Return what ``python -m module FD argument`` compiles, or what it has compiled before.

    Args:
        module: whose :func:`answer` is an image.
        argument: for it.
        depends: all that the image depends on, beside the kernel.
        anew: compile, whatever is kept.

    Raises:
        LlmtracedError: no permission, or what went wrong in the child.
    """
    if not can_load(held()):
        raise LlmtracedError("loading BPF programs needs root, or CAP_BPF and CAP_PERFMON", NO_PERMISSION)
    path = kept.folder() / "programs" / f"{_key([module, argument, *depends])}{_SUFFIX}"
    if not anew and (data := kept.read(path)) is not None:
        try:
            return Image.decoded(data)
        except ValueError as error:
            log.info("compiling: what was kept in %s is damaged (%s)", path, error)
    data = compile_in_child(module, argument)
    try:
        kept.write(path, data, most=_KEPT)
    except OSError as error:
        log.info("the programs are not kept for the next time (%s)", error)
    return Image.decoded(data)


def _key(depends: Sequence[str]) -> str:
    """Return a name for what depends on this, on the running kernel, and on headers that were chosen by hand."""
    system = os.uname()
    digest = hashlib.sha256(_BTF.read_bytes() if _BTF.exists() else b"")
    parts = [__version__, system.release, system.version, os.environ.get("BCC_KERNEL_SOURCE", ""), *depends]
    for part in parts:
        digest.update(b"%d %s" % (len(part), part.encode()))
    return digest.hexdigest()


def import_bcc() -> Any:
    """Import BCC: as any module, else from where distributions put it for their own Python.

    BCC's Python part is plain ctypes code, so the distribution's copy works in any virtual environment.

    Raises:
        LlmtracedError: it is not installed; the message names the packages.
    """
    try:
        import bcc
    except ImportError:
        bcc = None
    if bcc is not None and hasattr(bcc, "BPF"):
        return bcc
    folders = [f for pattern in _DISTRIBUTION_BCC for f in sorted(Path("/").glob(pattern.lstrip("/")))]
    for folder in folders:
        init = folder / "bcc" / "__init__.py"
        if init.is_file():
            spec = importlib.util.spec_from_file_location("bcc", init, submodule_search_locations=[str(init.parent)])
            if spec is None or spec.loader is None:
                continue
            module = importlib.util.module_from_spec(spec)
            sys.modules["bcc"] = module
            spec.loader.exec_module(module)
            return module
    raise LlmtracedError(
        "BCC is not installed; apt-get install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)",
        UNSUPPORTED,
    )


def compile_in_child(module: str, argument: str) -> bytes:
    """Run ``python -m module FD argument``, whose :func:`answer` comes back over the socket FD, and return it.

    BCC may be too old for the headers that are tried first: if it fails, others are.

    Raises:
        LlmtracedError: what went wrong in the (first) child.
    """
    first: LlmtracedError | None = None
    for skip in range(_HEADERS_TRIED):
        try:
            return _compile_in_child(module, argument, skip)
        except LlmtracedError as error:
            first = first or error
            if error.exit_code != UNSUPPORTED or not _others(skip + 1):
                break
            log.info("%s; trying other kernel headers", str(error).partition("\n")[0])
    assert first is not None
    raise first


def _others(tried: int) -> bool:
    """Tell whether there are more kernel headers than those that have been tried."""
    try:
        return len(headers.candidates()) > tried
    except LlmtracedError:
        return False


def _compile_in_child(module: str, argument: str, skip: int) -> bytes:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    # A file, not a pipe: nobody reads what the compiler has to say before the child is done.
    with ours, theirs, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno()), argument],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=children.environment(**{headers.SKIP: str(skip)}),
        )
        theirs.close()
        with ours.makefile("rb") as stream:
            message = stream.read()
        child.wait()
        said.seek(max(said.seek(0, os.SEEK_END) - (1 << 16), 0))
        output = said.read().decode(errors="replace")
    if message and not message.startswith(b"{"):
        return message
    reply: dict[str, Any] = {"error": "it ended without an answer", "exit_code": UNSUPPORTED}
    if message:
        reply = json.loads(message)
    log.debug("BPF compiler said: %s", output)
    detail = "" if not output.strip() else "\n" + output.strip()[-2000:]
    raise LlmtracedError(f"cannot load the BPF programs: {reply['error']}{detail}", reply["exit_code"])


def compiled(
    text: str,
    flags: Sequence[str],
    programs: Mapping[str, tuple[str, int]],
    maps: Sequence[str],
    *,
    absent: Mapping[str, str] | None = None,
) -> Image:
    """Compile, in the child.

    Args:
        text: the source.
        flags: for the compiler.
        programs: kind (kernel.KINDS) and number of the kernel's type, by name.
        maps: names of those that have to be found again.
        absent: programs that this kernel cannot have, and why.

    Raises:
        LlmtracedError: no BCC, no headers, or they do not compile.
    """
    bcc = import_bcc()
    found = headers.find()
    try:
        with headers.presented(found):
            bpf = bcc.BPF(text=text, cflags=["-Wno-macro-redefined", *flags])
        code = {name: (*what, bpf.dump_func(name.encode())) for name, what in programs.items()}
        names = {bpf[name].map_fd: name for name in maps}
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        about = {
            "absent": dict(absent or {}),
            "headers": str(found),
            "bcc_version": str(getattr(bcc, "__version__", "?")),
            "compile_rss_bytes": int(peak[1]) * 1024 if peak else 0,
        }
        return taken(code, names, about)
    except Exception as error:
        raise LlmtracedError(f"BCC cannot compile them ({error})", UNSUPPORTED) from error


def answer(fd: int, made: Callable[[], Image]) -> None:
    """Send the image that ``made`` returns, or its error, over ``fd``."""
    with socket.socket(fileno=fd) as parent:
        try:
            parent.sendall(made().encoded())
        except LlmtracedError as error:
            parent.sendall(json.dumps({"error": str(error), "exit_code": error.exit_code}).encode())
