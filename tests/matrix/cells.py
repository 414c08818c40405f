"""What is measured of one build, a cell of the table each: a text, and what is wrong.

Each is checked against something that llmtraced had no part in: the model file, the kernel's own counters and page
cache, what the engine was asked for, and the routers' products worked out from the file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
from builds import BUILDS, Build
from choices import compare, only_the_chosen_are_touched
from ggml_functions import unlike_its_functions
from helpers import wait_until
from running import Daemon

from llmtraced import layouts
from llmtraced.analysis.trace import open_trace
from llmtraced.bench import models
from llmtraced.bench.engine import Server, SyncEngine
from llmtraced.bench.pressure import drop_cache, resident_bytes
from llmtraced.bench.shapes import BYTE_TOKENS, FIRST_BYTE
from llmtraced.bench.switch import counting, program_runs
from llmtraced.capture import Capture
from llmtraced.ggml_layout import derive, known_weights, memory_reader
from llmtraced.gguf_map import read_model
from llmtraced.probes.kernel import KINDS
from llmtraced.probes.tracer import Tracer
from llmtraced.schema import PAGE, Detail
from llmtraced.session import Session
from llmtraced.target import EVALUATE, find_target

__all__ = ["CELLS", "Cell", "Models", "make_models"]

TOKENS = 13  # prime
UPROBE = KINDS["KPROBE"][0]
STARTS = 7
PROMPT = [11, 12, 14]
INPUT = ("get_rows", "set_rows", "dup", "cpy")
NOTHING = ("none", "reshape", "view", "permute", "transpose")
FUSED = "uprobe ggml_compute_forward_rms_norm_mul_fused"
FUSED_LOST = "norms that are computed together with a multiplication are not recorded"
ORDER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass
class Cell:
    """Attributes:
    text: what the table shows.
    wrong: what is not as it should be, a sentence each.
    """

    text: str = ""
    wrong: list[str] = field(default_factory=list)

    def check(self, ok: object, what: str) -> None:
        """Note ``what`` unless ``ok``."""
        if not ok:
            self.wrong.append(what)


@dataclass(frozen=True)
class Models:
    """Files: a dense model, one whose weights are repacked, a mixture; and the mixture's experts."""

    dense: Path
    repacked: Path
    mixture: Path
    n_used: int = 2


def make_models(folder: Path) -> Models:
    """Write them, about 60 MB each. A slice of an expert is several times what a fault maps."""
    made = Models(
        models.write(folder / "dense.gguf", models.dense_preset(60_000_000)),
        models.write(folder / "repacked.gguf", models.dense_preset(40_000_000, quant="Q4_0")),
        models.write(folder / "mixture.gguf", models.moe_preset(60_000_000, n_experts=16, n_used=Models.n_used)),
    )
    for path in (made.dense, made.repacked, made.mixture):
        drop_cache(path)  # onto the disk: what is not written yet cannot be taken from memory later
    return made


@dataclass(frozen=True)
class Engine:
    """A build that runs.

    Attributes:
        pid: its process.
        generate: n, temperature → what came out.
    """

    pid: int
    generate: Callable[[int, float], object]

    def ask(self, n: int, temperature: float = 0.0) -> object:
        """Generate ``n`` tokens after :data:`PROMPT`; return what came out."""
        return self.generate(n, temperature)


@contextmanager
def running(build: Build, model: Path, *, repack: bool = False, threads: int = 1) -> Iterator[Engine]:
    """Start a build on a model."""
    if build.python:
        package, bindings = build.get(), build.python
        with SyncEngine(model, threads=threads, ctx=512, repack=repack, package=package, bindings=bindings) as one:
            yield Engine(one.pid, lambda n, t: one.generate(PROMPT, n, temperature=t)["tokens"])
    else:
        extra = () if repack else ("--no-repack",)
        with Server(model, binary=build.get(), threads=threads, ctx=512, extra=extra) as server:
            # Build 9093 answers text that is not UTF-8 with an error: no single bytes.
            words = {"logit_bias": [[token, False] for token in range(FIRST_BYTE + BYTE_TOKENS)]}
            yield Engine(server.pid, lambda n, t: server.completion(PROMPT, n, temperature=t, **words)["content"])


@cache
def _tracer() -> Tracer:
    """One for all: compiling takes seconds."""
    return Tracer()


class Recording:
    """A capture of an engine, until the block ends; then its tables.

    Attributes:
        session: of the process.
    """

    def __init__(self, folder: Path, engine: Engine, detail: Detail, *, router_scores: bool = False) -> None:
        self.folder, self.engine = folder, engine
        self.capture = Capture(folder, detail, flush_seconds=60, router_scores=router_scores, tracer=_tracer())
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Recording:
        self.session: Session = self.capture.attach(self.engine.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.summary = self.capture.close()

    def step(self, seconds: float = 0.3) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.capture.step()

    def learn(self) -> None:
        """Let it see graphs until it knows their layout."""
        for _ in range(20):
            self.engine.ask(4)
            self.step(0.1)
            if self.session.layout is not None:
                break

    def page_out(self) -> None:
        """Have the process fault on all of its model again, and the kernel read it again."""
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(self.engine.pid)
        for start, end, _, _ in self.session.tracer.ranges(self.session.slot):
            vector = (ctypes.c_uint64 * 2)(start, end - start)
            assert libc.syscall(440, pidfd, vector, 1, 21, 0) > 0, os.strerror(ctypes.get_errno())
        os.close(pidfd)

    @property
    def graphs(self) -> int:
        return int(self.session.tracer.slots["token"][self.session.slot])

    def table(self, name: str) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(f) for f in sorted((self.folder / name).glob("*.parquet"))])

    def rows(self, name: str) -> int:
        return int(self.summary["rows"].get(name, 0))


def _faults_of(pid: int) -> int:
    """Return the major faults of a process, by the kernel's own count."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[9])


def layout(build: Build, files: Models, folder: Path) -> Cell:
    """Where fields lie, by each way there is to know it, against what ggml's own functions do."""
    cell, sources, derived, found = Cell(), [], None, None
    with running(build, files.mixture) as engine:
        symbol = find_target(engine.pid).symbols.get(EVALUATE)
        path = layouts.kept_path(symbol.library) if symbol else None
        if path:
            path.unlink(missing_ok=True)
        for occasion in ("first", "again", "spoilt"):
            if occasion == "spoilt" and path and found:
                path.write_text(json.dumps(asdict(replace(found, graph_nodes=0))))
            with Recording(folder / occasion, engine, Detail.OPS) as recording:
                recording.learn()
                session = recording.session
                found, problems = session.layout, list(session.problems)
                sources.append(session.layout_from)
                if session.layout:
                    read, weights = memory_reader(engine.pid), known_weights(session.models, session._address)
                    derived = derive(read, next(iter(session._graphs_read))[0], weights)
        mapped = {Path(line.split()[-1]) for line in Path(f"/proc/{engine.pid}/maps").read_text().splitlines()}
    base = sorted(path for path in mapped if path.name.startswith("libggml-base"))
    if not base:  # a static build: that of the same source with shared libraries has the same structures
        shared = next(b for b in BUILDS if b.version == build.version and b.pinned)
        base = sorted(shared.get().resolve().parents[1].rglob("libggml-base.so*"))
    if build.blind:
        cell.check(found is None and problems, f"{found}, problems {problems}")
        cell.text = "lost, and said"
        return cell
    cell.check(found, f"not found: {problems}")
    if found is None:
        return cell
    fields = asdict(found)
    cell.wrong += unlike_its_functions(base[0], fields)
    first = "DWARF" if build.described else "memory"
    cell.check(sources == [first, "kept" if path else first, first], f"from {sources}, build id {bool(path)}")
    cell.check(derived == found, f"from {sources[0]}: {found}; derived: {derived}")
    cell.text = f"{len(fields)} of {len(fields)} fields, from {' and '.join(dict.fromkeys([*sources, 'memory']))}"
    return cell


def totals(build: Build, files: Models, folder: Path) -> Cell:
    """Pages read and major faults, against the page cache (cachestat) and the process's own counter."""
    cell = Cell()
    with running(build, files.dense) as engine:
        engine.ask(4)  # what it needs beside the model is in memory then
        with Recording(folder, engine, Detail.FAULTS) as recording:
            recording.step()
            recording.page_out()
            left, begin = drop_cache(files.dense), clock_ns()
            recording.step(0.2)
            majors = _faults_of(engine.pid)
            engine.ask(TOKENS)
            majors = _faults_of(engine.pid) - majors
            resident = -(-resident_bytes(files.dense) // PAGE)
            end = clock_ns()
            recording.step()
    when = pl.col("timestamp").is_between(begin, end)
    cache, faults = (recording.table(name).filter(when) for name in ("pagecache", "faults"))
    pages = {a: int(cache.filter(pl.col("action") == a)["bytes"].sum()) // PAGE for a in ("add", "evict")}
    seen = faults.filter(pl.col("major")).height
    cell.text = f"{pages['add']:,} pages, {seen} major faults"
    cell.check(left == 0, f"{left} bytes were in the page cache still")
    cell.check(pages["add"] - pages["evict"] == resident, f"{pages} pages, but {resident} are in the page cache")
    cell.check(pages["add"] > 10_000, "hardly anything was read")
    cell.check(seen == majors, f"{seen} major faults, the process counted {majors}")
    for probe, account in recording.summary["account"].items():
        cell.check(account["counted"] == account["delivered"] and not account["dropped"], f"{probe}: {account}")
    return cell


def clock_ns() -> int:
    """Return the time that records have."""
    return time.monotonic_ns()


def told(build: Build, model: Path, folder: Path, table: str, what: str) -> Cell:
    """Of a build that cannot show it: nothing is recorded, and it is said that nothing is."""
    cell = Cell("lost, and said")
    with running(build, model) as engine, Recording(folder, engine, Detail.FULL) as recording:
        recording.step()
        engine.ask(TOKENS)
        recording.step()
        problems = list(recording.session.problems)
        cell.check(not recording.graphs, f"{recording.graphs} graphs")
    cell.check(any(what in problem for problem in problems), f"not said: {what}; only {problems}")
    cell.check(recording.rows(table) == (table == "tokens"), f"{recording.rows(table)} rows of {table}")
    return cell


def tokens(build: Build, files: Models, folder: Path) -> Cell:
    """Graphs, their batches and phases, against what was asked for."""
    if build.blind:
        return told(build, files.dense, folder, "tokens", "no token clock")
    cell = Cell()
    with running(build, files.dense, threads=2) as engine, Recording(folder, engine, Detail.FAULTS) as recording:
        recording.learn()
        before = recording.graphs
        engine.ask(TOKENS)
        recording.step()
        n = recording.graphs - before
        problems = list(recording.session.problems)
    table = recording.table("tokens").filter(pl.col("token") > before).sort("token")
    batches = table["n_tokens"].to_list()
    phases = dict(table.group_by("phase").len().iter_rows())
    cell.text = f"{phases.get('prompt', 0)} prompt, {phases.get('decode', 0)} decode of {TOKENS} graphs"
    cell.check(n == TOKENS, f"{n} graphs, not {TOKENS}")
    cell.check(batches == [len(PROMPT)] + [1] * (TOKENS - 1), f"batches {batches}")
    cell.check(phases == {"prompt": 1, "decode": TOKENS - 1}, f"phases {phases}; {problems}")
    cell.check(table["end_ns"].null_count() == 0, "graphs have no end")
    return cell


def names(build: Build, files: Models, folder: Path) -> Cell:
    """Each weight of a dense model once a token, in the order of the model; by each way to see operators."""
    if build.blind:
        return told(build, files.dense, folder, "ops", "matrix multiplications are not recorded")
    cell, ways = Cell(), []
    for way, model, repack, detail in (
        ("ops", files.dense, False, Detail.OPS),
        ("repacked", files.repacked, True, Detail.OPS),
        ("full", files.dense, False, Detail.FULL),
    ):
        layers = max(t.layer for t in read_model(model).tensors) + 1
        expected = [{f"blk.{n}.{c}.weight" for c in ORDER} for n in range(layers)] + [{"output.weight"}]
        with running(build, model, repack=repack) as engine, Recording(folder / way, engine, detail) as recording:
            recording.learn()
            before = recording.graphs
            engine.ask(TOKENS)
            recording.step()
            session = recording.session
            unbacked, problems = len(session.unbacked), list(session.problems)
            graph = session.graph.sequence([session.layout.op_mul_mat]) if session.graph and session.layout else []
        table = recording.table("ops").filter(pl.col("token") > before + 1)
        mine = table.filter((pl.col("op") == "mul_mat") & pl.col("tensor_name").is_not_null()).sort("timestamp")
        orders = {tuple(rows) for _, rows in mine.group_by("token").agg("tensor_name").iter_rows()}
        cell.check(mine["token"].n_unique() == TOKENS - 1, f"{way}: operators of {mine['token'].n_unique()} tokens")
        cell.check(orders == {tuple(graph)}, f"{way}: {len(orders)} orders, not the graph's; {problems}")
        for order in orders:
            blocks = [set(order[7 * n : 7 * n + 7]) for n in range(layers)] + [set(order[7 * layers :])]
            cell.check(blocks == expected and len(order) == 7 * layers + 1, f"{way}: {order[:9]}…")
        timed = table.filter(pl.col("op") != "rms_norm")  # which may be computed together with the next
        cell.check(timed["duration_ns"].min() or 0, f"{way}: an operator has no duration")
        nameless = sorted({op for op in table["op"] if op.startswith("op_")})
        cell.check(not nameless, f"{way}: operators without a name: {nameless}")
        if detail == Detail.FULL and session.graph:
            # As often as in the graph. Newer builds leave out a second way to the input, which is in the graph as well.
            nodes = Counter(session.op_names.get(node.op, "") for node in session.graph.nodes)
            counts = [Counter(ops) for _, ops in table.group_by("token").agg("op").iter_rows()]
            cell.check(all(c == counts[0] for c in counts), f"{way}: tokens differ in their operators")
            differ = {op: (counts[0][op], n) for op, n in nodes.items() if counts[0][op] != n and op not in NOTHING}
            cell.check(counts[0].keys() <= nodes.keys(), f"{way}: {counts[0].keys() - nodes.keys()} not in the graph")
            unlike = {op: n for op, n in differ.items() if op not in INPUT or n[0] < n[1] - 1}
            if build.unfused:
                lost = [unlike.pop(op, None) for op in ("rms_norm", "mul")]
                cell.check(all(lost) and any(FUSED_LOST in p for p in problems), f"{lost} are lost; {problems}")
            cell.check(not unlike, f"{way}: operators recorded, and in the graph: {unlike}")
        cell.check(bool(unbacked) == repack, f"{way}: {unbacked} weights are not backed by the file")
        ways.append(f"{way} {len(graph)}")
    cell.text = ", ".join(ways)
    return cell


def experts(build: Build, files: Models, folder: Path) -> Cell:
    """The chosen experts, against the routers' products with what they were given, and the slices touched."""
    if build.blind:
        return told(build, files.mixture, folder, "routing", "the experts chosen are not recorded")
    cell = Cell()
    layer_of = {t.name: t.layer for t in read_model(files.mixture).tensors}
    layers = max(layer_of.values()) + 1
    with (
        running(build, files.mixture) as engine,
        Recording(folder, engine, Detail.OPS, router_scores=True) as recording,
    ):
        recording.learn()
        for _ in range(20):
            engine.ask(4, 1.0)
            recording.step(0.1)
            if recording.session.writer.rows["router_scores"]:
                break
        recording.page_out()
        before = recording.graphs
        engine.ask(61, 1.0)
        recording.step()
        cell.check(not recording.session.problems, f"problems: {recording.session.problems}")
    trace = open_trace(folder)
    compared, ties, n_tokens = compare(trace)
    routing = recording.table("routing")
    cell.text = f"{compared} choices of {n_tokens} tokens"
    cell.check(compared >= 60 * layers, f"only {compared} choices could be compared")
    cell.check(ties <= compared // 50, f"{ties} of {compared} choices are not the routers'")
    lengths = set(routing["experts"].list.len()) | set(routing["experts"].list.n_unique())
    cell.check(lengths == {files.n_used}, f"{lengths} experts were chosen")
    only_the_chosen_are_touched(trace, files.mixture)
    after = routing.filter(pl.col("token") > before)
    chosen = {(layer, e) for layer, ids in after.select("layer", "experts").iter_rows() for e in ids}
    faults = recording.table("faults").filter((pl.col("token") > before) & (pl.col("expert") >= 0))
    for kind in ("gate", "up", "down"):
        mine = faults.filter(pl.col("tensor_name").cast(pl.String).str.contains(f"ffn_{kind}_exps"))
        touched = {(layer_of[name], e) for name, e in mine.select("tensor_name", "expert").unique().iter_rows()}
        cell.check(
            touched == chosen, f"{kind}: touched, not chosen {touched - chosen}; the other way {chosen - touched}"
        )
    ops = recording.table("ops").filter(pl.col("token") > before)
    merged = ops.filter(pl.col("op") == "mul_mat_id")
    per_token = set(merged.group_by("token").len()["len"])
    cell.check(per_token == {3 * layers}, f"{per_token} multiplications of experts a token, not {3 * layers}")
    sizes = {t.name: t.expert_bytes for t in read_model(files.mixture).tensors if t.n_experts}
    decode = merged.filter(pl.col("token") > before + 1)
    for name, nbytes in decode.select("tensor_name", "bytes_accessed").unique().iter_rows():
        cell.check(nbytes == files.n_used * sizes[name], f"{name}: {nbytes} bytes")
    return cell


def sidecar(build: Build, files: Models, folder: Path) -> Cell:
    """The sidecar's clock ticks with each graph, and answers stay the same."""
    cell = Cell()
    folder.mkdir(parents=True, exist_ok=True)
    with running(build, files.dense) as engine:
        without = engine.ask(TOKENS)
        command = [sys.executable, "-m", "llmtraced", "prefetch", "--pid", str(engine.pid), "--json", "--metrics", ""]
        with (folder / "errors").open("w") as errors:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            answers = []
            deadline = time.monotonic() + 60
            while child.poll() is None and not _bare(child.pid) and time.monotonic() < deadline:
                answers.append(engine.ask(TOKENS))
            if child.poll() is None:
                time.sleep(0.5)
                answers += [engine.ask(TOKENS) for _ in range(4)]
                time.sleep(0.5)
                child.send_signal(signal.SIGTERM)
            out, _ = child.communicate(timeout=30)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    said = (folder / "errors").read_text().strip()
    if child.returncode:
        cell.text = said.splitlines()[-1] if said else f"status {child.returncode}"
        cell.check(False, f"status {child.returncode}: {said}")
        return cell
    summary = json.loads(out)
    cell.text = "by the page table" if build.blind else f"by {summary['clock']}: {summary['tokens']} graphs"
    cell.check(summary["clock"] == ("page table" if build.blind else "ticks"), f"clock: {summary['clock']}")
    cell.check(build.blind or summary["tokens"] >= 4 * TOKENS, f"{summary['tokens']} graphs, not {4 * TOKENS} or more")
    cell.check(answers and all(a == without for a in answers), "answers differ")
    return cell


def _bare(pid: int) -> bool:
    return b"llmtraced.prefetch.sidecar" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _best(libraries: Sequence[Path]) -> Path:
    """Return the library of which llama.cpp's own score for this processor is the highest."""
    code = "import ctypes, sys; print(*(ctypes.CDLL(path).ggml_backend_score() for path in sys.argv[1:]))"
    said = subprocess.check_output([sys.executable, "-c", code, *map(str, libraries)], text=True)
    scores = dict(zip(libraries, map(int, said.split()), strict=True))
    return max(libraries, key=lambda path: scores[path])


def _starts(build: Build, model: Path, folder: Path, cell: Cell) -> None:
    """Start it several times beside a daemon, which may find it while its libraries come and go."""
    with Daemon(folder / "trace", folder / "log") as daemon:
        for _ in range(STARTS):
            with running(build, model) as engine:

                def graphs(engine: Engine = engine) -> float:
                    engine.ask(TOKENS)
                    return daemon.total("llmtraced_graphs_total", pid=str(engine.pid))

                before = wait_until(graphs, 5, "its graphs are seen")
                more = graphs() - before
                cell.check(more == TOKENS, f"started beside a daemon: {more} graphs, not {TOKENS}")


def hooks(build: Build, files: Models, folder: Path) -> Cell:
    """What ``check --pid`` says of the build's hooks."""
    cell = Cell()
    folder.mkdir(parents=True, exist_ok=True)
    variants = sorted(build.get().parent.glob("libggml-cpu-*.so"))
    with running(build, files.dense) as engine:
        command = [sys.executable, "-m", "llmtraced", "check", "--pid", str(engine.pid), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    checks = json.loads(done.stdout)["checks"]
    found = [c for c in checks if c["name"].startswith("hook ")]
    lost = [c["name"].removeprefix("hook ") for c in found if c["status"] != "ok"]
    attached = f"{len(found) - len(lost)} of {len(found)}"
    cell.text = "none, and said" if len(lost) == len(found) else attached + "".join(f", no {name}" for name in lost)
    cell.check(found, "nothing is said of hooks")
    expected = [c["name"].removeprefix("hook ") for c in found] if build.blind else [FUSED] if build.unfused else []
    cell.check(lost == expected, f"not there: {lost}")
    libraries = [c["detail"].partition(", build id")[0] for c in checks if c["name"] == "library"]
    cell.check(len(libraries) == 1, f"hooks are in {libraries}")
    if variants:
        best = _best(variants)
        cell.text += f" in {best.name}, of {len(variants)}"
        cell.check(libraries == [str(best)], f"{libraries}, but {best} is the best for this processor")
        _starts(build, files.dense, folder, cell)
    return cell


def overhead(build: Build, files: Models, folder: Path) -> Cell:
    """How often uprobes' programs run for a token, against the operators recorded, and for how long by the kernel.

    What runs for page faults and the page cache is left out: that runs for all that the machine does.

    Two threads run them and the first one's operators are recorded, so there are about twice as many runs; the way to
    see matrices alone (``ops``) takes fewer than that for all operators.
    """
    cell, ways = Cell(), []
    runs = {}
    for detail in (Detail.FAULTS, Detail.OPS, Detail.FULL):
        way = detail.name.lower()
        with (
            running(build, files.dense, threads=2) as engine,
            Recording(folder / way, engine, detail) as recording,
        ):
            recording.learn()
            recording.step(0.1)
            before = recording.graphs
            with counting():
                start, start_ns = program_runs(os.getpid(), UPROBE)
                engine.ask(TOKENS)
                end, end_ns = program_runs(os.getpid(), UPROBE)
            recording.step()
        runs[way] = (end - start) / TOKENS
        ways.append(f"{way} {runs[way]:,.0f}, {(end_ns - start_ns) / TOKENS / 1e3:,.0f} µs")
        if detail > Detail.FAULTS and not build.blind:
            recorded = recording.table("ops").filter(pl.col("token") > before).height / TOKENS
            cell.check(recorded >= 85, f"{way}: {recorded} operators a token were recorded")
            cell.check(recorded < runs[way] < 3 * recorded + 20, f"{way}: {runs[way]} runs for {recorded} operators")
    cell.text = "; ".join(ways)
    expected = 0 if build.blind else 2  # a graph's begin and its end
    cell.check(abs(runs["faults"] - expected) < 0.5, f"faults: {runs['faults']} runs a token")
    cell.check(build.blind or runs["ops"] < runs["full"], f"runs a token: {runs}")
    return cell


CELLS = {
    "hooks": hooks,
    "layout": layout,
    "totals": totals,
    "tokens": tokens,
    "names": names,
    "experts": experts,
    "overhead": overhead,
    "sidecar": sidecar,
}
