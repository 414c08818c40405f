"""Reports of a large model, with long and hostile names: nothing is wider than the terminal, pictures stay pictures."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_analysis_trace import Builder

from llmtraced.analysis.trace import Trace, open_trace
from llmtraced.bench.synthetic import write_trace
from llmtraced.reporters.questions import QUESTIONS, Options
from llmtraced.reporters.text import Style, blocks, profile, wrapped

EVIL = '--></text><script>x=1</script><img src=x onerror=alert(1)>\x1b[31m\x07&"\u202e.weight'


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """100 layers of 64 experts: 1,003 tensors."""
    folder = tmp_path_factory.mktemp("large") / "trace"
    write_trace(folder, 60_000, n_tensors=1000, model_bytes=400_000_000)
    return open_trace(folder)


@pytest.fixture
def hostile(tmp_path: Path) -> Trace:
    build = Builder(tmp_path / "a folder with a rather long name, as they are found below a home" / "trace")
    long = "blk.0." + "very_long_component_name_" * 8 + ".weight"
    build.tensor((EVIL, 0, 8192), layer=-1, component=EVIL)
    build.tensor((long, 8192, 8192), layer=0, component=long)
    for n in range(2):
        build.adds((EVIL, 0, 8192), (long, 8192, 8192), comm="a\x1b[2Jcomm", timestamp=1000 + n)
    build.write("faults", [{"tensor_name": EVIL, "major": True, "latency_ns": 5_000_000, "token": 1}] * 3)
    build.write(
        "tokens",
        [{"token": n, "start_ns": n * 10**9, "end_ns": n * 10**9 + 10**8} for n in range(1, 4)],
        command=["/opt/a/path/that/is/longer/than/the/terminal/" * 4 + "llama-server", "-m", EVIL],
        models=[{"model": EVIL, "path": EVIL, "fingerprint": "f", "size_bytes": 16384}],
        account={"tokens": {"counted": 9, "delivered": 6, "dropped": 3, "missed": 0}},
    )
    (build.path / "faults" / ("x" * 90 + ".parquet")).write_bytes(b"not parquet")
    return open_trace(build.path)


@pytest.fixture(params=["large", "hostile"])
def trace(request: pytest.FixtureRequest) -> Trace:
    found: Trace = request.getfixturevalue(request.param)
    return found


def ask(trace: Trace, name: str, **more: Any) -> Any:
    return QUESTIONS[name].ask(trace, Options(None, QUESTIONS[name].rows, more))


@pytest.mark.parametrize("name", QUESTIONS)
def test_text_fits_the_terminal(trace: Trace, name: str) -> None:
    report = ask(trace, name)
    for width in (80, 120):
        text = QUESTIONS[name].render(report, QUESTIONS[name].rows, Style(width))
        wide = [line for line in text.splitlines() if len(line) > width]
        assert [line for line in wide if not line.startswith("    $ ")] == []  # what is to be copied stays whole
        assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("by", ["token", "time"])
@pytest.mark.parametrize("value", ["accesses", "bytes", "stall"])
@pytest.mark.parametrize("order", ["file", "layer"])
def test_every_heatmap_fits_and_is_drawn(large: Trace, by: str, value: str, order: str) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib: pip install matplotlib")
    report = ask(large, "heatmap", by=by, value=value, order=order, bins=20)
    text = QUESTIONS["heatmap"].render(report, 32, Style(80))
    assert max(map(len, text.splitlines())) <= 80
    assert QUESTIONS["heatmap"].draw(report, "png", 32).startswith(b"\x89PNG")


@pytest.mark.parametrize("picture", ["svg", "web"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_hostile_names_are_text_in_pictures(hostile: Trace, name: str, picture: str) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib: pip install matplotlib")
    drawn = QUESTIONS[name].draw(ask(hostile, name), picture, 10).decode()
    assert drawn.replace("\n", "").isprintable()
    for element in ElementTree.fromstring(drawn).iter():
        assert "script" not in str(element.tag)
        assert not [key for key in element.attrib if key.lower().startswith("on")]
        for key, value in element.attrib.items():
            if key.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))


def test_what_goes_on_is_set_in() -> None:
    assert wrapped("one two three " * 4, Style(40)) == ["one two three one two three one two", "  three one two three"]
    assert wrapped("x" * 90, Style(40)) == ["x" * 40, "  " + "x" * 38, "  " + "x" * 12]


def test_a_profile_of_many_rows_shows_the_largest_of_several() -> None:
    rows = [{"n": n} for n in range(1, 101)]
    line = profile("read", rows, "n", str, Style(60))
    assert len(line) <= 60
    assert line == f"  read   {blocks(range(4, 101, 4), 100)}  1 to 100, 4 a block"
    assert profile("read", rows[:10], "n", str, Style(60)) == f"  read   {blocks(range(1, 11), 10)}  1 to 10"
