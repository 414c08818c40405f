"""Of several libraries with ggml in them, hooks are in the one that computes (GGML_CPU_ALL_VARIANTS)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import wait_until
from running import MadeUp

from llmtraced.capture import Capture
from llmtraced.schema import Detail, Phase
from llmtraced.session import Session

pytestmark = pytest.mark.kernel

LIBRARY = """
__attribute__((noinline)) int ggml_graph_compute(int *p) { __asm__ volatile("" ::: "memory"); return *p; }
"""
SERVER = """
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char line[64];
    void *library[2] = {0, 0};
    struct stat status;
    int one = 1, fd = open(argv[1], O_RDONLY);
    fstat(fd, &status);
    puts("ready"), fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        int n = line[1] - '1';
        if (*line == 'l') library[n] = dlopen(argv[2 + n], RTLD_NOW | RTLD_LOCAL);
        if (*line == 'u') dlclose(library[n]);
        if (*line == 'm') mmap(0, status.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
        if (*line == 'g') {
            int (*compute)(int *) = (int (*)(int *))dlsym(library[n], "ggml_graph_compute");
            for (int i = 0; i < 997; i++) compute(&one);
        }
        printf("%d\\n", getpid()), fflush(stdout);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The program, and two libraries that it may load."""
    folder = tmp_path_factory.mktemp("libraries")
    libraries = [folder / f"libggml-cpu-{name}.so" for name in ("first", "second")]
    for path in libraries:
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=LIBRARY, text=True, check=True
        )
    command = ["cc", "-O1", "-x", "c", "-", "-o", folder / "server", "-ldl"]
    subprocess.run(command, input=SERVER, text=True, check=True)
    return folder / "server", libraries


def hooked(session: Session) -> set[str]:
    return {Path(symbol.library).name for symbol in session.tracer.uprobes(session.slot).values()}


def test_hooks_follow_the_process_to_the_library_that_it_keeps(
    built: tuple[Path, list[Path]], small_model: Path, tmp_path: Path
) -> None:
    program, libraries = built
    first, second = (path.name for path in libraries)
    capture = Capture(tmp_path / "trace", Detail.FAULTS, flush_seconds=60)
    with MadeUp(program, small_model, *map(str, libraries)) as server:
        assert server.do("l1")
        session = capture.attach(server.pid, Phase.LOAD)
        assert hooked(session) == set(), "it may be there only to be asked"
        wait_until(lambda: capture.step() or hooked(session) == {first}, 10, "it stays: it is hooked")
        assert server.do("u1")
        assert server.do("l2")
        wait_until(lambda: capture.step() or hooked(session) == {second}, 10, "another one has come in its place")
        assert server.do("m")
        assert server.do("g2")
        capture.step()
        assert int(session.tracer.slots["token"][session.slot]) == 997
        assert not session.target.rivals
        assert not [p for p in session.problems if "several times" in p]
        summary = capture.close()
    assert summary["account"]["tokens"] == {"counted": 2 * 997, "delivered": 2 * 997, "dropped": 0}


def test_that_ggml_is_there_twice_is_said(built: tuple[Path, list[Path]], small_model: Path, tmp_path: Path) -> None:
    """The one that was loaded last is taken to be the one that computes; graphs of the other are not seen."""
    program, libraries = built
    capture = Capture(tmp_path / "trace", Detail.FAULTS, flush_seconds=60)
    with MadeUp(program, small_model, *map(str, libraries)) as server:
        for what in ("l1", "l2", "m"):
            assert server.do(what)
        session = capture.attach(server.pid)
        assert hooked(session) == {libraries[1].name}
        (said,) = (p for p in session.problems if "several times" in p)
        assert f"those of {libraries[0].name} are not" in said
        for what in ("g2", "g1"):
            assert server.do(what)
        capture.step()
        assert int(session.tracer.slots["token"][session.slot]) == 997
        capture.close()
