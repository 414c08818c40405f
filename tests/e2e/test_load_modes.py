"""Load modes and options of llama-server: what is traced in each, and that what is not is said. docs/load-modes.md."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import EMULATED, wait_until
from made_files import LAZY, write_lazy, write_lora, write_projector
from running import Sidecar, asking, mounted, read_bytes

from llmtraced import checks
from llmtraced.analysis.advise import advise
from llmtraced.analysis.summary import summary
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, free_port
from llmtraced.bench.pressure import MemoryCgroup, drop_cache
from llmtraced.bench.shapes import Shape
from llmtraced.capture import Capture
from llmtraced.errors import UNSUPPORTED
from llmtraced.gguf_map import read_model
from llmtraced.metrics import LlmtracedCollector
from llmtraced.probes.tracer import Tracer
from llmtraced.schema import Detail
from llmtraced.target import maps

pytestmark = pytest.mark.e2e

WIDE, LAYERS, VOCAB = 512, 6, 2048
DENSE = Shape(LAYERS, WIDE, 1536, 8, 2, VOCAB)
PROMPT, TOKENS = list(range(20, 27)), 13
READ, DIRECT = "was read into the process's own memory", "was read with direct I/O"
ALL, SOME, NOTHING = "all", "some", "nothing"


@dataclass(frozen=True)
class Mode:
    """How a server is started, and what is to be seen of its model then.

    Attributes:
        model: the file.
        options: with names of files in braces.
        backed: tensors that are used from the mapped file: ALL, SOME or NOTHING.
        added: bytes of the model that come into the page cache while it is loaded.
        reads: bytes of it that are read by read().
        says: what the tool must say, by file.
        clients: that ask at the same time.
        others: further models whose graphs are seen.
    """

    model: str = "dense.gguf"
    options: tuple[str, ...] = ("--no-repack",)
    backed: str = ALL
    added: str = ALL
    reads: str = NOTHING
    says: dict[str, str] = field(default_factory=dict)
    clients: int = 1
    others: tuple[str, ...] = ()


MODES = {
    "mmap": Mode(),
    "mmap+mlock": Mode(options=("--load-mode", "mmap+mlock", "--no-repack")),
    "none": Mode(options=("--load-mode", "none", "--no-repack"), backed=NOTHING, reads=ALL, says={"dense.gguf": READ}),
    "none, repack": Mode("q4.gguf", ("--load-mode", "none"), NOTHING, ALL, ALL, {"q4.gguf": READ}),
    "mlock": Mode(
        options=("--load-mode", "mlock", "--no-repack"), backed=NOTHING, reads=ALL, says={"dense.gguf": READ}
    ),
    "dio": Mode(
        options=("--load-mode", "dio", "--no-repack"), backed=NOTHING, added=NOTHING, says={"dense.gguf": DIRECT}
    ),
    "lazy": Mode("lazy.gguf", ("--lazy-mode", "on", "--no-repack"), added=SOME),
    "repack": Mode("q4.gguf", (), SOME),
    "slots": Mode(options=("--no-repack", "-np", "4"), clients=4),
    "no continuous batching": Mode(options=("--no-repack", "-np", "2", "-nocb"), clients=2),
    "quantised cache": Mode(options=("--no-repack", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")),
    "draft": Mode(
        options=("--no-repack", "-md", "{draft.gguf}", "--spec-type", "draft-simple"), others=("draft.gguf",)
    ),
    "draft of the same shape": Mode(
        options=("--no-repack", "-md", "{twin.gguf}", "--spec-type", "draft-simple"), others=("twin.gguf",)
    ),
    "both read": Mode(
        options=("--load-mode", "none", "--no-repack", "-md", "{twin.gguf}", "--spec-type", "draft-simple"),
        backed=NOTHING,
        reads=ALL,
        says={"dense.gguf": READ, "twin.gguf": READ},
        others=("twin.gguf",),
    ),
    "adapter": Mode(options=("--no-repack", "--lora", "{lora.gguf}"), says={"lora.gguf": READ}),
    "scaled adapter": Mode(options=("--no-repack", "--lora-scaled", "{lora.gguf}:0.5"), says={"lora.gguf": READ}),
    "mixture": Mode("moe.gguf"),
    "mixture, none": Mode(
        "moe.gguf", ("--load-mode", "none", "--no-repack"), backed=NOTHING, reads=ALL, says={"moe.gguf": READ}
    ),
    "mixture, repack": Mode("moe.gguf", (), SOME),
    "mixture, slots": Mode("moe.gguf", ("--no-repack", "-np", "4"), clients=4),
    "mixture, draft": Mode(
        "moe.gguf", ("--no-repack", "-md", "{draft.gguf}", "--spec-type", "draft-simple"), others=("draft.gguf",)
    ),
    "projector": Mode(
        options=("--no-repack", "--mmproj", "{projector.gguf}"),
        says={"projector.gguf": READ},
        others=("projector.gguf",),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load-modes")
    models.write(folder / "dense.gguf", DENSE)
    models.write(folder / "twin.gguf", DENSE, seed=7)
    models.write(folder / "draft.gguf", Shape(3, 256, 768, 4, 1, VOCAB), seed=5)
    models.write(folder / "q4.gguf", Shape(LAYERS, WIDE, 1536, 8, 2, VOCAB, "Q4_0"))
    models.write(folder / "moe.gguf", models.moe_preset(30_000_000, n_experts=16, n_used=3, quant="Q4_0"))
    write_lora(folder / "lora.gguf", folder / "dense.gguf")
    write_lazy(folder / "lazy.gguf")
    write_projector(folder / "projector.gguf", WIDE)
    return folder


@dataclass
class Run:
    """A recording of a load, some learning, and then what is judged.

    Attributes:
        trace: its folder.
        first, last: tokens that are judged.
        answers: of the server to what was asked then.
        where: address ranges of model files: (start, end, offset, file name).
        problems: what the session says.
        checked: what ``llmtraced check --pid`` says.
        counted: what ``llmtraced_problems`` is.
    """

    trace: Path
    first: int
    last: int
    answers: list[dict[str, Any]]
    where: list[tuple[int, int, int, str]]
    problems: list[str]
    checked: list[str]
    counted: int

    def table(self, name: str) -> pl.DataFrame:
        files = sorted((self.trace / name).glob("*.parquet"))
        if not files:
            return pl.DataFrame(schema={"model": pl.String, "bytes": pl.Int64, "action": pl.String, "token": pl.Int32})
        frame = pl.concat([pl.read_parquet(f) for f in files])
        return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))

    def judged(self, name: str) -> pl.DataFrame:
        return self.table(name).filter(pl.col("token").is_between(self.first, self.last))

    def bytes(self, name: str, model: str) -> int:
        mine = pl.col("model") == model
        return int(
            self.table(name).filter(mine & (pl.col("action") == "add") if name == "pagecache" else mine)["bytes"].sum()
        )


def image() -> str:
    """Return a small picture, as the server takes it."""
    pixels = bytes(n % 251 for n in range(3 * 16 * 16))
    return base64.b64encode(b"P6 16 16 255\n" + pixels).decode()


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    """One for all recordings: loading it takes longer than a recording."""
    tracer = Tracer()
    yield tracer
    tracer.close()


def record(mode: Mode, folder: Path, trace: Path, binary: Path, tracer: Tracer) -> Run:
    for file in folder.glob("*.gguf"):
        drop_cache(file)
    options = [option.replace("{", f"{folder}/").replace("}", "") for option in mode.options]
    server = Server(folder / mode.model, binary=binary, threads=1, ctx=1024, extra=options)
    server.port = free_port()
    capture = Capture(trace, Detail.OPS, flush_seconds=60, tracer=tracer)
    child = capture.start(server.command(server.port), env=server.environment)
    answers: list[dict[str, Any]] = []
    try:

        def step_while(work: Sequence[Callable[[], object]]) -> None:
            threads = [threading.Thread(target=one) for one in work]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                capture.step()

        def ready() -> bool:
            assert child.poll() is None, "the server has ended"
            capture.step()
            with suppress(OSError):
                return server._request("GET", "/health", None, 5.0)[0] == 200
            return False

        wait_until(ready, 60, "the server is ready")
        session = capture.session
        assert session is not None
        for _ in range(20):
            step_while([lambda: server.completion([5, 6, 7], 8)])
            capture.step()
            if session.layout is not None:
                break
        assert session.layout is not None, session.problems
        step_while([lambda: server.completion([5, 6, 7], 8)])
        capture.step()
        first = int(capture.tracer.slots["token"][session.slot]) + 1
        asked = [PROMPT, *([n + 7 * k for n in PROMPT] for k in range(1, mode.clients))]
        prompts: list[Any] = list(asked)
        if "--mmproj" in mode.options:
            marker = json.loads(server._request("GET", "/props", None, 5.0)[1])["media_marker"]
            prompts = [{"prompt_string": f"ab{marker}cd", "multimodal_data": [image()]}]
        step_while([lambda p=p: answers.append(ask(server, p)) for p in prompts])  # type: ignore[misc]
        for _ in range(2):
            capture.step()
        last = int(capture.tracer.slots["token"][session.slot])
        where = [(m.start, m.end, m.offset, Path(m.path).name) for m in maps(child.pid) if m.path.endswith(".gguf")]
        problems = list(session.problems)
        checked = [check.detail for check in checks.process(child.pid, None)]
        samples = [s for family in LlmtracedCollector(capture.recorder).collect() for s in family.samples]
        counted = sum(int(sample.value) for sample in samples if sample.name == "llmtraced_problems")
    finally:
        child.terminate()
        child.wait()
        totals = capture.close()
        server.log.unlink()
    for probe, cell in totals["account"].items():
        assert cell["counted"] == cell["delivered"], probe
    assert [line for line in capture.summary() if line in problems] == problems
    return Run(trace, first, last, answers, where, problems, checked, counted)


def ask(server: Server, prompt: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    status, raw = server._request("POST", "/completion", body, 120.0)
    assert status == 200, raw
    answer: dict[str, Any] = json.loads(raw)
    return answer


def weights(path: Path) -> list[str]:
    """Return the matrices that a token multiplies with, sorted."""
    looked_up = ("token_embd.weight", LAZY)
    found = [t.name for t in read_model(path).tensors if len(t.shape) > 1 and t.name not in looked_up]
    tied = [] if "output.weight" in found else ["token_embd.weight"]
    return sorted(found + tied)


@pytest.mark.parametrize("name", MODES)
def test_each_mode_is_traced_or_said_not_to_be(
    name: str, folder: Path, tmp_path: Path, llama_server: Path, tracer: Tracer
) -> None:
    mode = MODES[name]
    run = record(mode, folder, tmp_path / "trace", llama_server, tracer)
    size = sum(t.size for t in read_model(folder / mode.model).tensors)

    # What the tool says, and nothing else.
    assert len(run.problems) == run.counted == len(mode.says), run.problems
    for file, words in mode.says.items():
        assert any(problem.startswith(f"{file} {words}") for problem in run.problems), run.problems
        assert any(detail.startswith(f"{file} {words}") for detail in run.checked), run.checked
    assert any("locked in memory by the process itself" in one for one in run.checked) == (name == "mmap+mlock")

    # Page cache, reads, what is backed.
    shares = {
        "added": run.bytes("pagecache", mode.model) / size,
        "reads": run.bytes("reads", mode.model) / size,
    }
    bounds = {ALL: (0.97, 1.1), SOME: (0.1, 0.9), NOTHING: (0.0, 0.05)}
    for what, share in shares.items():
        low, high = bounds[getattr(mode, what)]
        assert low <= share <= high, (what, share)
    tensors = run.table("tensors").filter(pl.col("model") == mode.model)
    backed = set(tensors["backed"].to_list())
    assert backed == {ALL: {True}, SOME: {True, False}, NOTHING: {False}}[mode.backed]
    if mode.backed == NOTHING:
        assert run.table("faults").is_empty()
    evicted = run.table("pagecache").filter(pl.col("action") == "evict")
    assert set(evicted["comm"].str.slice(0, 7)) <= {"kdamond"}  # DAMON reclaims cached pages that nobody maps

    # Every operator has its weight, of the right file; the address says so, too.
    tokens, ops = run.judged("tokens"), run.judged("ops").sort("timestamp")
    assert tokens.height == run.last - run.first + 1
    assert set(tokens["model"]) == {mode.model, *mode.others}
    named = ops.filter(pl.col("tensor_name").is_not_null())
    of_token = dict(tokens.select("token", "model").iter_rows())
    outputs_of = dict(tokens.select("token", "n_outputs").iter_rows())
    adapters = {"lora.gguf"}
    languages = [file for file in (mode.model, *mode.others) if file != "projector.gguf"]
    expected = {file: weights(folder / file) for file in languages}
    for (token,), rows in named.group_by("token"):
        model = of_token[token]
        assert set(rows["model"]) <= {model, *adapters}
        if model in expected:
            mine = rows.filter(pl.col("model") == model)["tensor_name"].to_list()
            if outputs_of[token]:
                assert sorted(mine) == expected[model], (token, model)
            else:  # a piece of a prompt of which nothing is wanted: no last layer's end, no output
                assert set(mine) < set(expected[model])
            layers = [int(one.split(".")[1]) for one in mine if one.startswith("blk.")]
            assert layers == sorted(layers)
    offsets = {(file, t.name): t.offset for file in languages for t in read_model(folder / file).tensors}
    for file, tensor, data in named.select("model", "tensor_name", "data_ptr").unique().iter_rows():
        places = [(file_, at - s + o) for at, (s, e, o, file_) in ((data, w) for w in run.where) if s <= at < e]
        if places:  # else it is a copy
            assert places == [(file, offsets[file, tensor])]

    # Batches agree with what the server says that it did.
    said = sum(answer["tokens_predicted"] for answer in run.answers)
    drafts = [answer["timings"].get("draft_n", 0) for answer in run.answers]
    accepted = sum(answer["timings"].get("draft_n_accepted", 0) for answer in run.answers)
    main = tokens.filter(pl.col("model") == mode.model)
    decode = main.filter(pl.col("phase") == "decode")
    outputs = int(main["n_outputs"].sum())
    assert outputs - sum(drafts) + accepted == said
    assert int((decode["n_tokens"] - 1).sum()) >= sum(drafts)
    together = decode["n_tokens"].to_list()
    assert max(together) <= (1 + 3 if any(drafts) else mode.clients)
    assert max(together) > 1 or not (
        any(drafts) or name.endswith("slots")
    )  # without continuous batching it is a matter of luck
    if "draft.gguf" in mode.others or "twin.gguf" in mode.others:
        assert sum(drafts) > 0
        draft = tokens.filter(pl.col("model") == mode.others[0])
        assert (
            draft.filter(pl.col("phase") == "decode")["n_tokens"].to_list()
            == [1] * draft.filter(pl.col("phase") == "decode").height
        )

    OF_ONE_KIND[name](run, ops) if name in OF_ONE_KIND else None
    reported = summary(open_trace(run.trace))
    assert {one["model"] for one in reported["phases"]} >= ({mode.model, *mode.others} if mode.others else {None})
    mapped = {file for *_, file in run.where}
    assert set(reported["unmapped"]) == {mode.model, *mode.others, *mode.says} - mapped
    advice = next(one for one in advise(open_trace(run.trace))["findings"] if one["finding"] == "repacked")
    for file, words in mode.says.items():
        assert f"{file} {words}" in advice["title"]


def _mixture(run: Run, ops: pl.DataFrame) -> None:
    """Each layer chooses for each position, but for the last one, which computes what is wanted; and that is read."""
    routing, sizes = run.judged("routing"), run.judged("tokens").filter(pl.col("model") == "moe.gguf")
    sizes = sizes.select("token", "n_tokens", "n_outputs")
    layers = routing["layer"].max() + 1  # type: ignore[operator]
    assert set(routing["experts"].list.len()) == set(routing["experts"].list.n_unique()) == {3}
    rows = dict(routing.group_by("token").len().iter_rows())
    assert rows == {token: (layers - 1) * n + outputs for token, n, outputs in sizes.iter_rows()}
    chosen = routing.explode("experts").group_by("token", "layer").agg(pl.col("experts").n_unique())
    tensors = run.table("tensors").filter(pl.col("model") == "moe.gguf")
    known = tensors.select("tensor_name", "layer", "expert_bytes").filter(pl.col("expert_bytes") > 0)
    used = ops.join(known, on="tensor_name").join(chosen, on=["token", "layer"])
    assert used.height == 3 * chosen.height
    assert used.filter(pl.col("bytes_accessed") != pl.col("experts") * pl.col("expert_bytes")).is_empty()


def _lazy(run: Run, ops: pl.DataFrame) -> None:
    """Of the table that is read row by row nothing is read while loading, and little at all."""
    adds = run.table("pagecache").filter((pl.col("tensor_name") == LAZY) & (pl.col("action") == "add"))
    loading = adds.filter(pl.col("token") == 0)["bytes"].sum()
    rows = run.table("tokens")["n_tokens"].fill_null(1).sum()
    assert loading <= 64 << 10
    assert 0 < adds["bytes"].sum() <= 64 * 1024 * rows
    assert run.table("faults").filter(pl.col("tensor_name") == LAZY).height > 0


def _adapter(run: Run, ops: pl.DataFrame) -> None:
    """Its matrices have names and a model of their own, and are told to be copies."""
    mine = ops.filter(pl.col("model") == "lora.gguf")
    per_token = mine.group_by("token").agg(pl.col("tensor_name").n_unique(), pl.len())
    assert set(per_token["tensor_name"]) == set(per_token["len"]) == {2 * 2 * LAYERS}
    assert mine["tensor_name"].str.contains(r"\.lora_[ab]$").all()
    assert set(run.table("tensors").filter(pl.col("model") == "lora.gguf")["backed"]) == {False}


def _projector(run: Run, ops: pl.DataFrame) -> None:
    """A picture is one graph of the projector, which has no tokens and belongs to the prompt."""
    graphs = run.judged("tokens").filter(pl.col("model") == "projector.gguf")
    assert graphs.height == 1
    assert graphs.select("phase", "n_tokens", "n_outputs").rows() == [("prompt", 0, 0)]
    mine = ops.filter(pl.col("model") == "projector.gguf")
    assert mine.filter(pl.col("tensor_name").str.starts_with("v.blk."))["tensor_name"].n_unique() == 4 * 6
    assert set(mine["phase"]) == {"prompt"}


OF_ONE_KIND: dict[str, Callable[[Run, pl.DataFrame], None]] = {
    "lazy": _lazy,
    "adapter": _adapter,
    "scaled adapter": _adapter,
    "projector": _projector,
    "mixture": _mixture,
    "mixture, none": _mixture,
    "mixture, repack": _mixture,
    "mixture, slots": _mixture,
    "mixture, draft": _mixture,
}


def test_the_same_experts_are_chosen_however_the_model_was_loaded(
    folder: Path, tmp_path: Path, llama_server: Path, tracer: Tracer
) -> None:
    mapped, read = (
        record(MODES[name], folder, tmp_path / name, llama_server, tracer).judged("routing")
        for name in ("mixture", "mixture, none")
    )
    assert mapped.height == read.height > 0
    for column in ("layer", "position", "experts"):
        assert mapped[column].to_list() == read[column].to_list()


def test_where_there_is_no_direct_io_its_mode_is_that_of_plain_reading(
    folder: Path, tmp_path: Path, llama_server: Path, tracer: Tracer
) -> None:
    mode = MODES["dio"]
    with mounted("ramfs", "ramfs", tmp_path / "plain", "size=1") as plain:
        shutil.copy(folder / mode.model, plain)
        run = record(mode, plain, tmp_path / "trace", llama_server, tracer)
        size = sum(t.size for t in read_model(plain / mode.model).tensors)
    assert [problem.startswith(f"{mode.model} {READ}") for problem in run.problems] == [True], run.problems
    assert any(detail.startswith(f"{mode.model} {READ}") for detail in run.checked), run.checked
    assert 0.97 <= run.bytes("reads", mode.model) / size <= 1.1
    assert summary(open_trace(run.trace))["load_mode"] == "none"


# --- the sidecar beside such servers --------------------------------------------------------------------------------

MB = 1_000_000
FEW = 5  # tokens of an answer
LARGE, LIMIT = (40 * MB, 44 * MB) if EMULATED else (100 * MB, 92 * MB)  # 17 MB of it are the server's own, and a draft


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    models.write(folder / "large.gguf", models.dense_preset(LARGE))
    models.write(folder / "draft.gguf", Shape(3, 256, 768, 4, 1, VOCAB), seed=5)
    return folder / "large.gguf"


REFUSED = {
    "none": ("dense.gguf", {"LLAMA_ARG_LOAD_MODE": "none"}, READ),
    "dio": ("dense.gguf", {"LLAMA_ARG_LOAD_MODE": "dio"}, DIRECT),
    "repacked": ("q4.gguf", {}, "copies in the server's own memory: start it with --no-repack"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_sidecar_says_why_there_is_nothing_for_it(
    name: str, folder: Path, tmp_path: Path, llama_server: Path
) -> None:
    model, environment, why = REFUSED[name]
    with Server(folder / model, binary=llama_server, threads=1, ctx=256, env=environment) as server:
        before = server.completion(PROMPT, TOKENS)["content"]
        with Sidecar(server.pid, tmp_path) as sidecar, asking(server, before, tokens=TOKENS):
            assert sidecar.child.wait(60) == UNSUPPORTED, sidecar.said()
        assert why in sidecar.said()
        assert "Traceback" not in sidecar.said()


FITTING = ("mmap+mlock", "lazy", "quantised cache", "adapter", "projector")


@pytest.mark.parametrize("name", FITTING)
def test_the_sidecar_follows_and_stands_aside(name: str, folder: Path, tmp_path: Path, llama_server: Path) -> None:
    """All of it is in memory: nothing is to be done, and nothing is done; with mlock it says why."""
    mode = MODES[name]
    extra = [option.replace("{", f"{folder}/").replace("}", "") for option in mode.options]
    with Server(folder / mode.model, binary=llama_server, threads=1, ctx=256, extra=extra) as server:
        before = server.completion(PROMPT, TOKENS)["content"]
        with Sidecar(server.pid, tmp_path) as sidecar, asking(server, before, tokens=TOKENS):
            wait_until(lambda: sidecar.metrics().get("tokens_total", 0) > 10, 60, "it follows")
            ended = sidecar.end()
    assert ended["state"] == "fits"
    assert ended["pinned_bytes"] == ended["prefetched_bytes"] == ended["other_graphs"] == 0
    assert ("has locked its model in memory itself" in sidecar.said()) == (name == "mmap+mlock")


BESIDE = {
    "draft": (("-md", "draft.gguf", "--spec-type", "draft-simple"), 1),
    "slots": (("-np", "4"), 3),
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_sidecar_serves_the_large_model(name: str, large: Path, tmp_path: Path, llama_server: Path) -> None:
    """Batches of a draft's proposals, or of several slots, are the model's; the draft's own graphs are not."""
    options, clients = BESIDE[name]
    extra = ["--no-repack", *(str(large.parent / one) if one.endswith(".gguf") else one for one in options)]
    for file in large.parent.glob("*.gguf"):
        drop_cache(file)

    with (
        MemoryCgroup(f"llmtraced-modes-{os.getpid()}", LIMIT) as group,
        Server(large, binary=llama_server, ctx=512, extra=extra, cgroup=group) as server,
    ):
        expected = server.completion(PROMPT, FEW)["content"]

        def read() -> float:
            before = read_bytes(server.pid)
            assert server.completion(PROMPT, FEW)["content"] == expected
            return read_bytes(server.pid) - before

        without = read()
        assert without > 0.3 * FEW * LARGE, "the limit is no pressure"
        with Sidecar(server.pid, tmp_path, "--trial", "0") as sidecar:
            with contextlib.ExitStack() as busy:
                for client in range(clients):
                    busy.enter_context(asking(server, prompt=[n + 7 * client for n in PROMPT], tokens=FEW))
                wait_until(sidecar.settled, 90, "the sidecar is engaged")
            reads = [read()]
            while min(reads) >= 0.5 * without:  # beside other load the server overtakes it
                assert len(reads) < 10, f"{reads} bytes an answer, where it was {without} without"
                reads.append(read())
            ended = sidecar.end()
        assert server.completion(PROMPT, FEW)["content"] == expected
        assert group.stat().get("oom_kill", 0) == 0
    assert ended["failed_reads"] == 0
    assert ended["tokens"] > 0
    if name == "draft":
        assert ended["other_graphs"] > ended["tokens"]
        assert "large.gguf is served; draft.gguf is left to the kernel" in sidecar.said()
    else:
        assert ended["other_graphs"] == 0
