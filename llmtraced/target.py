"""Processes that use GGUF models: their mappings, libraries, symbols and memory cgroup.

Everything is read from ``/proc``; names and paths in there are chosen by others and are only ever passed on as bytes
that were found, never through a shell. Files are opened by ``/proc/PID/map_files`` or ``/proc/PID/root``, so that
containers and deleted files are no special case.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from elftools.common.exceptions import ELFError

from llmtraced import elf
from llmtraced.errors import FAILED, NO_PERMISSION, UNSUPPORTED, LlmtracedError, printable
from llmtraced.gguf_map import Model, is_gguf, read_model
from llmtraced.loading import load_mode

__all__ = [
    "EVALUATE",
    "Mapping",
    "ModelFile",
    "Symbol",
    "Target",
    "find_target",
    "from_arguments",
    "gguf_arguments",
    "maps",
    "maps_text",
    "parse_maps",
    "prepare",
    "scan",
    "start_ticks",
]

log = logging.getLogger(__name__)

EVALUATE: Final = "ggml_graph_compute"
"""The function that evaluates a graph; a library that has it has the operators, too."""

_MAPS_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A file-backed line of ``/proc/PID/maps``; ``device`` is the kernel's own dev_t (major << 20 | minor)."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str
    deleted: bool


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One shard as a process uses it: which file it is, and where it is mapped (nowhere if it was read)."""

    label: str
    shard: int
    device: int
    inode: int
    mappings: tuple[Mapping, ...]


STAND_INS: Final = {"ggml_cpu_extra_compute_forward": "ggml_compute_forward"}
"""What is hooked where a function has no symbol since it was inlined (static builds with link-time optimisation): one
that is called for the same operators, and has the same arguments. ggml's own dispatch asks the former first."""

# Renamed by link-time optimisation, and otherwise as it was: a local function.
_RENAMED: Final = re.compile(r"\.lto_priv\.\d+$")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function: the file that has it (a path we can open) and its offset in that file, bytes.

    ``instead``: it stands in for one that this build has inlined (:data:`STAND_INS`), and this is its own name.
    """

    library: str
    offset: int
    instead: str = ""


def start_ticks(pid: int) -> int:
    """Return when ``pid`` started, in clock ticks since boot: with the pid it names a process for good.

    Raises:
        ProcessLookupError: there is no such process.
    """
    return _statistics(pid)[19]


def _statistics(pid: int) -> list[int]:
    """Return the numbers of ``/proc/PID/stat`` (proc_pid_stat(5)) from the 3rd on, which is a letter: 0.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(pid) from error
    return [0, *map(int, text[text.rindex(b")") + 2 :].split()[1:])]


def maps_text(pid: int) -> bytes:
    """Return ``/proc/PID/maps``; empty if the process is gone or not ours to see."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def maps(pid: int) -> list[Mapping]:
    """Return the file-backed mappings of ``pid``, by address; an empty list if it is gone or not ours to see."""
    return parse_maps(maps_text(pid))


def parse_maps(text: bytes) -> list[Mapping]:
    r"""Return the file-backed mappings in a ``/proc/PID/maps``.

    The kernel writes a path as it is but for newlines, which become ``\012`` (fs/proc/task_mmu.c); a path that has
    these four characters cannot be told from it, nor one that ends in `` (deleted)``: :func:`reachable` copes.
    """
    found = []
    for line in text.split(b"\n"):  # not splitlines: a path may hold a carriage return
        match = _MAPS_LINE.fullmatch(line)
        if not match or match[7] == b"0" or not match[8].startswith(b"/"):
            continue
        raw = match[8]
        deleted = raw.endswith(b" (deleted)")
        path = os.fsdecode(raw.removesuffix(b" (deleted)").replace(b"\\012", b"\n"))
        device = int(match[5], 16) << 20 | int(match[6], 16)
        numbers = int(match[1], 16), int(match[2], 16), match[3].decode("ascii", "replace"), int(match[4], 16)
        found.append(Mapping(*numbers, device, int(match[7]), path, deleted))
    return found


def reachable(pid: int, mapping: Mapping) -> str:
    """Return a path by which we can open what is mapped, also from another mount namespace or after deletion."""
    if not mapping.deleted:
        path = f"/proc/{pid}/root{mapping.path}"
        try:
            status = os.stat(path)
            if status.st_ino == mapping.inode:
                own = os.stat(mapping.path) if os.path.exists(mapping.path) else None
                return mapping.path if own and (own.st_dev, own.st_ino) == (status.st_dev, status.st_ino) else path
        except OSError:
            pass
    return f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def kernel_device(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the (device, inode) of a file as kernel tracepoints print them."""
    status = os.stat(path)
    return os.major(status.st_dev) << 20 | os.minor(status.st_dev), status.st_ino


def gguf_arguments(arguments: Iterable[str], root: str = "", cwd: str = "/") -> list[str]:
    """Return the existing GGUF files that command-line arguments name, as paths below ``root``.

    An argument is a file, ``--option=FILE``, or a list with scales: ``FILE:SCALE,FILE:SCALE`` (llama.cpp's
    ``--lora-scaled``). What exists as it stands is not taken apart: a path may have any of these characters.
    """
    found = []
    for argument in arguments:
        for value in (argument, argument.partition("=")[2]):
            pieces = [piece.rpartition(":") for piece in value.split(",")]
            pairs = [[head or tail, head and f"{head}:{tail}"] for head, _, tail in pieces]
            some = False
            for names in ([value], *pairs):
                paths = (root + os.path.join(cwd, name) for name in names if ".gguf" in name)
                path = next((path for path in paths if is_gguf(path)), None)
                if path and path not in found:
                    found.append(path)
                some |= path is not None
                if path and names == [value]:
                    break
            if some:
                break
    return found


def _settings(pid: int) -> dict[str, str]:
    """Return llama.cpp's options that come from the environment (``LLAMA_ARG_MODEL``, …)."""
    try:
        found = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(one).partition("=") for one in found if one.startswith(b"LLAMA_ARG_"))
    return {name: value for name, _, value in pairs}


@dataclass
class Target:
    """A process that uses GGUF models, as it was when looked at.

    Attributes:
        models: by label (the first shard's file name, made unique).
        files: every shard of those models; one that is not mapped was read (``--load-mode none``) or is not yet mapped.
        problems: what could not be understood, for the user.
        load_mode: what llama.cpp was told, see :mod:`llmtraced.loading`; ``none`` instead of ``dio`` where the file
            systems of all models have no direct I/O, for it reads as without then.
    """

    pid: int
    start: int
    comm: str
    command: list[str]
    models: dict[str, Model] = field(default_factory=dict)
    files: list[ModelFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    load_mode: str = ""

    @property
    def alive(self) -> bool:
        """Whether the process still has its memory (and its pid was not given to another).

        One that ends has none for a while before it is a zombie: nothing that is read of it then means anything.
        """
        try:
            *_, start, virtual_bytes = _statistics(self.pid)[:21]
            return start == self.start and virtual_bytes > 0
        except (ProcessLookupError, PermissionError):
            return False

    @property
    def mapped_bytes(self) -> int:
        """Bytes of model files in the address space."""
        return sum(m.end - m.start for f in self.files for m in f.mappings)

    @property
    def unmapped(self) -> list[str]:
        """Labels of the models of which nothing is mapped: not yet loaded, or read into the process's own memory."""
        mapped = {f.label for f in self.files if f.mappings}
        return [label for label in self.models if label not in mapped]

    @property
    def locked_bytes(self) -> int:
        """Bytes that the process has locked in memory (mlock)."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^VmLck:\s*(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    @cached_property
    def _libraries(self) -> list[dict[str, Symbol]]:
        return _ggml_symbols(self.pid)

    @cached_property
    def symbols(self) -> dict[str, Symbol]:
        """Functions of ggml in this process, by name: of one object that evaluates graphs, and of all that do not.

        A build may have a library for each kind of processor (``GGML_CPU_ALL_VARIANTS``). llama.cpp loads one after the
        other to ask it, and the best of them last: for a moment another one is mapped. Of several that stay it is taken
        to be the one at the lowest address, for the kernel maps downwards; :attr:`rivals` are the others.
        """
        found: dict[str, Symbol] = {}
        for library in [*self._libraries[:1], *(one for one in self._libraries[1:] if EVALUATE not in one)]:
            found = library | found
        return found

    def has(self, symbol: Symbol) -> bool:
        """Whether the process still has the object with this function."""
        executable = (m for m in maps(self.pid) if "x" in m.permissions)
        return any(reachable(self.pid, mapping) == symbol.library for mapping in executable)

    @property
    def rivals(self) -> list[str]:
        """Objects that could evaluate graphs, too; theirs are not seen."""
        return [one[EVALUATE].library for one in self._libraries[1:] if EVALUATE in one]

    @property
    def rivalry(self) -> str:
        """What may be lost because of :attr:`rivals`, a sentence; empty if there are none."""
        if not self.rivals:
            return ""
        others = ", ".join(printable(os.path.basename(path)) for path in self.rivals)
        return (
            f"ggml is in this process several times: graphs that {printable(self.symbols[EVALUATE].library)} evaluates "
            f"are seen, those of {others} are not"
        )


def scan(pids: Iterable[int] | None = None, *, known: Iterable[int] = ()) -> Iterator[Target]:
    """Yield every process (or those of ``pids``) that maps a GGUF or has read one with a ggml library in it.

    Args:
        pids: which processes to look at; all by default.
        known: processes not to look at again.
    """
    skip = {*known, os.getpid()}
    if pids is None:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    for pid in pids:
        if pid in skip:
            continue
        try:
            target = _look(pid)
        except (ProcessLookupError, FileNotFoundError):
            continue
        except PermissionError:
            log.debug("process %d: not ours to see", pid)
            continue
        if target:
            yield target


def find_target(pid: int) -> Target:
    """Return the target with that pid.

    Raises:
        LlmtracedError: no such process, no permission, or no model in it.
    """
    try:
        target = _look(pid)
    except (ProcessLookupError, FileNotFoundError) as error:
        raise LlmtracedError(f"no process {pid}", FAILED) from error
    except PermissionError as error:
        raise LlmtracedError(f"process {pid} is not ours to see; run as root", NO_PERMISSION) from error
    if target is None:
        raise LlmtracedError(
            f"process {pid} maps no GGUF model; if it is still starting, try again, "
            "or start it with `llmtraced record -- COMMAND`",
            UNSUPPORTED,
        )
    return target


def from_arguments(pid: int, command: Sequence[str]) -> Target | None:
    """Return the target that ``pid`` will be once it has become ``command``, or None if that names no GGUF file."""
    mode = load_mode(command, _settings(pid))
    target = Target(pid, start_ticks(pid), os.path.basename(command[0])[:15], list(command), load_mode=mode)
    _take_models(target, gguf_arguments(command, cwd=os.getcwd()), [])
    _settle_mode(target)
    return target if target.models else None


_MODELS: dict[tuple[str, int, int, int, int], Model] = {}


def _read_model(path: str) -> Model:
    """Return the model at ``path``, read once for as long as the file stays what it was: reading it fills the cache."""
    status = os.stat(path)
    key = (path, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if key not in _MODELS:
        if len(_MODELS) > 64:
            _MODELS.clear()
        _MODELS[key] = read_model(path)
    return _MODELS[key]


_GGUF_BY_INODE: dict[tuple[int, int, int], bool] = {}


def _maps_gguf(pid: int, mapping: Mapping) -> bool:
    if "x" in mapping.permissions or mapping.path.startswith(("/dev/", "/memfd:", "/SYSV")):
        return False
    path = reachable(pid, mapping)
    try:
        status = os.stat(path)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size < 32:
        return False
    key = (status.st_dev, status.st_ino, status.st_mtime_ns)
    if key not in _GGUF_BY_INODE:
        if len(_GGUF_BY_INODE) > 1 << 16:
            _GGUF_BY_INODE.clear()
        _GGUF_BY_INODE[key] = is_gguf(path)
    return _GGUF_BY_INODE[key]


def _look(pid: int) -> Target | None:
    command = [os.fsdecode(a) for a in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    if not command:
        return None  # a kernel thread, or gone
    found, settings = maps(pid), _settings(pid)
    mapped = [m for m in found if _maps_gguf(pid, m)]
    root = f"/proc/{pid}/root" if os.path.realpath(f"/proc/{pid}/root") != "/" else ""
    paths: list[str] = list(dict.fromkeys(reachable(pid, m) for m in mapped))
    if any("ggml" in os.path.basename(m.path) or "llama" in os.path.basename(m.path) for m in found):
        cwd = os.readlink(f"/proc/{pid}/cwd")
        paths += [p for p in gguf_arguments([*command, *settings.values()], root, cwd) if p not in paths]
    if not paths:
        return None
    comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    target = Target(pid, start_ticks(pid), comm, command, load_mode=load_mode(command, settings))
    _take_models(target, paths, mapped)
    _settle_mode(target)
    return target if target.models else None


def _take_models(target: Target, paths: Sequence[str], mapped: Sequence[Mapping]) -> None:
    """Read the models at ``paths`` into ``target``, with where they are ``mapped``."""
    shards_seen: set[tuple[int, int]] = set()
    for path in paths:
        try:
            identity = kernel_device(path)
            if identity in shards_seen:
                continue
            model = _read_model(path)
        except (LlmtracedError, OSError) as error:
            target.problems.append(str(error))
            continue
        label = model.shards[0].path.name
        if path.startswith("/proc/") and "/map_files/" in path:  # deleted or replaced: only the mapping has it now
            names = (os.path.basename(m.path) for m in mapped if reachable(target.pid, m) == path)
            label = next(names, label)
        label = printable(label, 255)  # file names are bytes; a label is text
        while label in target.models:
            label += "'"
        target.models[label] = model
        for number, shard in enumerate(model.shards):
            device, inode = kernel_device(shard.path)
            shards_seen.add((device, inode))
            mine = tuple(m for m in mapped if m.inode == inode and _same_file(target.pid, m, shard.path))
            # btrfs and overlayfs print another device in maps and tracepoints than stat gives: believe the mapping.
            target.files.append(ModelFile(label, number, mine[0].device if mine else device, inode, mine))


def _settle_mode(target: Target) -> None:
    shards = [shard.path for model in target.models.values() for shard in model.shards]
    if target.load_mode == "dio" and not any(map(_can_be_direct, shards)):
        target.load_mode = "none"


def _can_be_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL  # open(2): the file system does not support it
    return True


def _same_file(pid: int, mapping: Mapping, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(reachable(pid, mapping)), path.stat())
    except OSError:
        return False


_FUNCTIONS: dict[tuple[int, int, int, int], dict[str, int]] = {}


def _functions(path: str) -> dict[str, int]:
    """Return ggml's functions in a file; read once for as long as it stays what it was: it takes 0.1 s."""
    status = os.stat(path)
    key = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    if key not in _FUNCTIONS:
        if len(_FUNCTIONS) > 256:
            _FUNCTIONS.clear()
        _FUNCTIONS[key] = _plain(elf.functions(path, b"ggml_", b"_ZN4ggml3cpu"))
    return _FUNCTIONS[key]


def _plain(functions: dict[str, int]) -> dict[str, int]:
    """Return functions by the names they have in the source; without those of which two have the same."""
    plain = {name: _RENAMED.sub("", name) for name in functions}
    times = Counter(plain.values())
    return {plain[name]: at for name, at in functions.items() if plain[name] == name or times[plain[name]] == 1}


def prepare(program: str) -> None:
    """Read the symbols of a program that is about to be started, and of the ggml libraries beside it.

    A small model is loaded, and warmed up, in the time that this takes.
    """
    real = Path(os.path.realpath(program))
    for path in (real, *real.parent.glob("*ggml*.so*")):
        try:
            _functions(str(path))
        except (ELFError, OSError, ValueError) as error:
            log.debug("%s: no symbols: %s", path, error)


def _ggml_symbols(pid: int) -> list[dict[str, Symbol]]:
    """Return the functions of each mapped object that has some, by address; first those that evaluate graphs."""
    seen: set[tuple[int, int]] = set()
    found = []
    for mapping in maps(pid):
        key = (mapping.device, mapping.inode)
        if "x" not in mapping.permissions or key in seen:
            continue
        seen.add(key)
        path = reachable(pid, mapping)
        try:
            functions = _functions(path)
        except (ELFError, OSError, ValueError) as error:
            log.debug("%s: no symbols: %s", mapping.path, error)
            continue
        if functions:
            symbols = {name: Symbol(path, offset) for name, offset in functions.items()}
            for name, other in STAND_INS.items():
                if name not in symbols and other in symbols:
                    symbols[name] = Symbol(path, functions[other], other)
            found.append(symbols)
    return sorted(found, key=lambda symbols: EVALUATE not in symbols)
