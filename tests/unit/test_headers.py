"""Which kernel headers are taken, in trees laid out as distributions do it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from llmtraced import headers
from llmtraced.errors import UNSUPPORTED, LlmtracedError

RUNNING = "6.8.0-45-generic"


class Machine:
    """A made-up /lib/modules and /usr/src."""

    def __init__(self, root: Path) -> None:
        self.modules, self.sources, self.archive = root / "lib/modules", root / "usr/src", root / "kheaders.tar.xz"
        self.modules.mkdir(parents=True)
        self.sources.mkdir(parents=True)

    def find(self, release: str = RUNNING, chosen: str = "") -> headers.Headers:
        return headers.find(self.modules, self.sources, release, self.archive, chosen)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def generated(folder: Path, release: str, arch: str = "x86") -> Path:
    """Make the half that a build generates."""
    write(folder / "include/generated/autoconf.h")
    write(folder / "include/generated/utsrelease.h", f'#define UTS_RELEASE "{release}"\n')
    (folder / "arch" / arch / "include/generated").mkdir(parents=True)
    return folder


def plain(folder: Path) -> Path:
    """Make the half that is the same for all builds."""
    write(folder / "include/linux/kconfig.h")
    return folder


def complete(folder: Path, release: str) -> Path:
    return plain(generated(folder, release))


def debian(machine: Machine, release: str, common: str, flavour: str) -> tuple[Path, Path]:
    """Make Debian's split packages, links in /lib/modules included."""
    build = generated(machine.sources / f"linux-headers-{release}-{flavour}", f"{release}-{flavour}")
    source = plain(machine.sources / f"linux-headers-{release}-{common}")
    write(build / "Makefile", f"include {source}/Makefile\n")
    links = machine.modules / f"{release}-{flavour}"
    links.mkdir()
    (links / "build").symlink_to(build)
    (links / "source").symlink_to(source)
    return build, source


def test_the_running_kernels_own(machine: Machine) -> None:
    complete(machine.sources / "linux-headers-6.9.0-1-generic", "6.9.0-1-generic")
    real = complete(machine.sources / f"linux-headers-{RUNNING}", RUNNING)
    (machine.modules / RUNNING).mkdir()
    (machine.modules / RUNNING / "build").symlink_to(real)
    found = machine.find()
    assert found.build == found.source == machine.modules / RUNNING / "build"
    assert (found.exact, found.in_place) == (True, True)
    assert "not the running" not in str(found)


def test_the_running_kernels_own_in_two_halves(machine: Machine) -> None:
    debian(machine, "6.1.0-56", "common", "amd64")
    found = machine.find("6.1.0-56-amd64")
    assert (found.build.name, found.source.name) == ("build", "source")
    assert (found.exact, found.in_place) == (True, True)


def test_the_running_kernels_without_its_links(machine: Machine) -> None:
    """A kernel whose modules are elsewhere, as in a container with /usr/src mounted into it."""
    complete(machine.sources / f"linux-headers-{RUNNING}", RUNNING)
    found = machine.find()
    assert (found.exact, found.in_place) == (True, False)


@pytest.mark.parametrize(
    ("flavour", "common"), [("amd64", "common"), ("cloud-amd64", "common"), ("rt-amd64", "common-rt")]
)
def test_debian_for_another_kernel(machine: Machine, flavour: str, common: str) -> None:
    build, source = debian(machine, "6.1.0-56", common, flavour)
    found = machine.find()
    assert (found.build, found.source, found.exact, found.in_place) == (build, source, False, False)
    assert "not the running kernel's; sufficient" in str(found)


def test_ubuntus_generic_part_links_to_the_rest(machine: Machine) -> None:
    build = generated(machine.sources / "linux-headers-6.5.0-9-generic", "6.5.0-9-generic")
    source = plain(machine.sources / "linux-headers-6.5.0-9")
    (build / "include/linux").symlink_to(source / "include/linux")
    found = machine.find()
    assert found.build == found.source == build


def test_fedoras_kernels_folder(machine: Machine) -> None:
    build = complete(machine.sources / "kernels/6.5.6-300.fc39.x86_64", "6.5.6-300.fc39.x86_64")
    assert machine.find().build == build


def test_suses_object_folder(machine: Machine) -> None:
    build = generated(machine.sources / "linux-6.4.0-150600.21-obj/x86_64/default", "6.4.0-150600.21-default")
    source = plain(machine.sources / "linux-6.4.0-150600.21")
    write(build / "Makefile", "# comment\ninclude ../../../linux-6.4.0-150600.21/Makefile\n")
    found = machine.find()
    assert (found.build, found.source) == (build, source)


def test_headers_that_live_in_another_kernels_modules(machine: Machine) -> None:
    """As with Arch after an update: /lib/modules/OTHER/build is a folder, and the running kernel's is gone."""
    build = complete(machine.modules / "6.6.1-arch1-1/build", "6.6.1-arch1-1")
    found = machine.find()
    assert found.build == found.source == build
    assert not found.in_place


def test_the_newest_that_is_not_newer_than_the_kernel(machine: Machine) -> None:
    for release in ("5.15.0-1", "6.5.0-9", "6.5.0-10", "6.11.0-3", "6.17.0-1"):
        complete(machine.sources / f"linux-headers-{release}", release)
    assert machine.find("6.8.0-45").build.name == "linux-headers-6.5.0-10"
    assert machine.find("4.19.0-1").build.name == "linux-headers-5.15.0-1"


def test_in_which_order_they_are_tried(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for release in ("5.15.0-1", "6.5.0-10", "6.11.0-3", "6.17.0-1", RUNNING):
        complete(machine.sources / f"linux-headers-{release}", release)
    (machine.modules / RUNNING).mkdir()
    (machine.modules / RUNNING / "build").symlink_to(machine.sources / f"linux-headers-{RUNNING}")
    found = headers.candidates(machine.modules, machine.sources, RUNNING, machine.archive, "")
    assert [h.build.name for h in found] == ["build", *(f"linux-headers-{n}" for n in ("6.5.0-10", "5.15.0-1"))] + [
        f"linux-headers-{n}" for n in ("6.11.0-3", "6.17.0-1")
    ]
    assert [h.exact for h in found] == [True] + [False] * 4
    monkeypatch.setenv(headers.SKIP, "1")
    assert machine.find() == found[1]


def test_other_architectures_and_halves_are_no_use(machine: Machine) -> None:
    plain(generated(machine.sources / "linux-headers-6.1.0-56-arm64", "6.1.0-56-arm64", arch="arm64"))
    generated(machine.sources / "linux-headers-6.2.0-1-amd64", "6.2.0-1-amd64")
    plain(machine.sources / "linux-headers-6.1.0-56-common")
    (machine.modules / RUNNING).mkdir()
    (machine.modules / RUNNING / "build").symlink_to("/nowhere")
    with pytest.raises(LlmtracedError, match="no kernel headers"):
        machine.find()


def test_nothing_at_all(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(LlmtracedError) as error:
        headers.find(missing / "modules", missing / "src", "9.9.9-cloud", missing / "kheaders", "")
    assert error.value.exit_code == UNSUPPORTED
    assert "9.9.9-cloud" in str(error.value)
    assert "apt-get install linux-headers" in str(error.value)


def test_the_archive_in_the_kernel_before_another_kernels(machine: Machine) -> None:
    debian(machine, "6.1.0-56", "common", "amd64")
    machine.archive.write_bytes(b"xz")
    found = machine.find()
    assert (found.build, found.exact, found.in_place) == (machine.archive, True, True)


def test_the_users_choice_comes_first(machine: Machine, tmp_path: Path) -> None:
    chosen = complete(tmp_path / "mine", "6.7.0")
    debian(machine, "6.1.0-56", "common", "amd64")
    found = machine.find("6.1.0-56-amd64", str(chosen))
    assert (found.build, found.exact, found.in_place) == (chosen, False, True)
    with pytest.raises(LlmtracedError, match="BCC_KERNEL_SOURCE"):
        machine.find(chosen=str(machine.sources))


VARIABLE = "BCC_KERNEL_SOURCE"


def test_a_complete_tree_is_named_in_the_environment(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    build = complete(machine.sources / "kernels/6.5.6", "6.5.6")
    with headers.presented(machine.find()):
        assert os.environ[VARIABLE] == str(build)
    assert VARIABLE not in os.environ


def test_what_is_in_place_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "as it was")
    with headers.presented(headers.Headers(Path("/nowhere"), Path("/nowhere"), exact=True, in_place=True)):
        assert os.environ[VARIABLE] == "as it was"


def test_halves_are_merged_for_as_long_as_it_takes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "as it was")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    build, source = debian(machine, "6.1.0-56", "common", "amd64")
    write(build / "include/generated/autoconf.h", "generated")
    write(source / "include/linux/kconfig.h", "plain")
    write(source / "Makefile", "the source's, which does not count")
    (build / "scripts").symlink_to("../nowhere")  # Debian's are in another package
    with headers.presented(machine.find()):
        whole = Path(os.environ[VARIABLE])
        assert (whole / "include/generated/autoconf.h").read_text() == "generated"
        assert (whole / "include/linux/kconfig.h").read_text() == "plain"
        assert (whole / "arch/x86/include/generated").is_dir()
        assert (whole / "Makefile").read_text().startswith("include")
        assert headers.find(chosen=str(whole)).build == whole, "it is what is asked of a complete tree"
    assert os.environ[VARIABLE] == "as it was"
    assert list((tmp_path / "temporary").iterdir()) == []
