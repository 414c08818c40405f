"""Find out all that the sidecar needs to know, then become it.

This side may use everything: it reads the model's header, compiles and attaches the clock, learns the sequence from the
server's own compute graph. Then it joins the server's memory cgroup and executes a bare interpreter in its own place,
which keeps the process id and the open descriptors and none of the memory.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llmtraced import ggml_layout
from llmtraced.cgroup import Cgroup, cgroup_of
from llmtraced.errors import FAILED, NO_PERMISSION, UNSUPPORTED, LlmtracedError, printable
from llmtraced.ggml_layout import Graph, Layout
from llmtraced.gguf_map import Model
from llmtraced.loading import why_unmapped
from llmtraced.prefetch import plan as plans
from llmtraced.prefetch import unit
from llmtraced.prefetch.clock import BEGIN, TickRing
from llmtraced.prefetch.guesses import DEFAULT
from llmtraced.prefetch.hold import let_go
from llmtraced.prefetch.iouring import MadviseRing
from llmtraced.prefetch.plan import Plan
from llmtraced.prefetch.policy import CHUNK, slack_for
from llmtraced.prefetch.routing import mixture
from llmtraced.prefetch.told import FOLDER
from llmtraced.probes import ticks as tick_probes
from llmtraced.probes.ticks import Ticks
from llmtraced.target import ModelFile, Target, find_target

__all__ = ["STRATEGIES", "Options", "live_plan", "run"]

log = logging.getLogger(__name__)

STRATEGIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "auto": {"pin": True, "stream": True, "evict": True, "experts": True, "path": ""},
    "pin": {"pin": True, "stream": False, "evict": True, "experts": False, "path": "huge"},
    "pattern": {"pin": False, "stream": True, "evict": False, "experts": False, "path": "readahead"},
    "uring": {"pin": False, "stream": True, "evict": False, "experts": False, "path": "uring"},
    "moe": {"pin": True, "stream": True, "evict": True, "experts": True, "path": ""},
    "off": {"pin": False, "stream": False, "evict": False, "experts": False, "path": "huge"},
}
"""What each does: pin chunks, stream the rest ahead of the server, give back behind it, keep and fetch a mixture's
experts, and by which way of reading (empty: a short calibration says)."""

_GRAPH_TRIES: Final = 8
_MOST_WIDTH: Final = 16_384
_NEVER: Final = 1 << 40  # tokens to watch first
_LOCKED: Final = 0.9  # of what is mapped
_LEAST_SHARE: Final = 0.05  # of what a token uses whole, that must be in the mapped file
_LEFT: Final = "a mixture of experts: what every token uses is managed, its experts are left to the kernel"
_WAIT_SECONDS: Final = 5.0  # between lines that say what is waited for


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may choose.

    Attributes:
        strategy: a key of :data:`STRATEGIES`.
        plan: a plan's file; None: learned from the server's graph.
        budget: bytes for the model's pages; None: what the memory allows.
        window: bytes for what is streamed; 0: what is good for the budget.
        slack: bytes of memory to leave free; None: half a per cent, at least 8 MiB.
        depth: chunks that are read at the same time; 0: half the window, 8 to 16.
        path: a way of reading (pages.PATHS or ``uring``); empty: the strategy's own.
        trial: tokens to watch before engaging; 0: engage at once and never compare.
        join: join the server's memory cgroup.
        predict: what a mixture's experts are guessed by, of guesses.SOURCES.
        clock: ``ticks``, ``pagetable``, or ``auto``: ticks where they can be had.
        metrics: write metrics to this file, in Prometheus's text format; None: to where the daemon looks, until the
            end; empty: nowhere.
        json: print the summary as JSON.
        hand_over: leave becoming the sidecar to a unit's main process (prefetch/unit.py).
    """

    strategy: str = "auto"
    plan: Path | None = None
    budget: int | None = None
    window: int = 0
    slack: int | None = None
    depth: int = 0
    path: str = ""
    trial: int = 3
    join: bool = True
    predict: tuple[str, ...] = DEFAULT
    clock: str = "auto"
    metrics: str | None = None
    json: bool = False
    hand_over: bool = False


def run(pid: int, options: Options) -> None:
    """Prepare, and become the sidecar of process ``pid``; it returns only where that is handed over.

    Raises:
        LlmtracedError: no such server, no permission, a plan of another model, nothing that could be managed.
    """
    if os.geteuid() != 0:
        raise LlmtracedError("prefetching locks and gives back a server's pages: run as root", NO_PERMISSION)
    if "uring" in (options.path, STRATEGIES[options.strategy]["path"]):
        try:
            MadviseRing(1).close()
        except OSError as error:
            why = f"no io_uring here ({error.strerror}): see kernel.io_uring_disabled, or read otherwise with --path"
            raise LlmtracedError(why, UNSUPPORTED) from error
    target = find_target(pid)
    only = _only_one(target)
    label, model = _main_model(target)
    files = [f for f in target.files if f.label == label]
    given = plans.load(options.plan) if options.plan else None
    if given and given.fingerprint != model.fingerprint:
        raise LlmtracedError(
            f"{printable(str(options.plan))} is a plan of {printable(given.model)} ({given.fingerprint}), but process "
            f"{pid} runs {printable(label)} ({model.fingerprint}); make one with `llmtraced plan`"
        )
    _tell_of_others(target, label)
    merged = {tensor.name for tensor in model.tensors if tensor.n_experts}
    opened = _opened(model, files)
    held, hold = 0, None
    if not merged:
        held, hold = _hold(target, opened, given or plans.from_tensors(label, model), options)
    ticks = _open_clock(target, options.clock, _width(model), matrices=not merged)
    marks: list[list[int]] = []
    unbacked: set[str] = set()
    experts: dict[str, Any] | None = None
    if options.strategy == "moe" and (not merged or ticks is None):
        why = "not a mixture of experts" if not merged else "not to be seen at work"
        raise LlmtracedError(f"{printable(label)} is {why}: use the strategy auto", UNSUPPORTED)
    if ticks is not None:
        layout, graph = _learn(target, label, ticks)
        learned = given or plans.from_graph(label, model, graph, layout)
        marks, numbers = _set_marks(ticks, layout, graph, learned)
        unbacked = _unbacked(graph, label, files)
        if ticks.matrices and not set(graph.sequence([layout.op_mul_mat])) - unbacked:
            ticks.operators = False  # all are repacked: this model's graphs cannot be told from another's
        if merged and STRATEGIES[options.strategy]["experts"]:
            experts = _experts(model, layout, graph, numbers, unbacked & merged)
    else:
        learned = given or plans.from_tensors(label, model)
    _warn(learned, unbacked, enough=experts is not None)
    if merged and experts is None:
        log.warning(_LEFT)
    config = configuration(target, label, opened, learned, unbacked, ticks, marks, options)
    config["hold"], config["held"] = None, 0
    if hold is not None and ticks is not None:
        config["hold"], config["held"] = hold, held
        config["keep"] += hold.values()
    config["mixture"], config["predict"] = experts, list(options.predict)
    if experts is not None and experts["code"] is not None:
        config["keep"].append(experts["code"])
    config["keep"].append(only.detach())
    become(config, target, options)


def _opened(model: Model, files: list[ModelFile]) -> list[dict[str, Any]]:
    """Return of each file of a model the descriptor, and where the server has it mapped."""
    return [
        {
            "fd": os.open(model.shards[f.shard].path, os.O_RDONLY),
            "maps": [[m.start, m.end, m.offset] for m in f.mappings],
        }
        for f in sorted(files, key=lambda f: f.shard)
    ]


def _hold(
    target: Target, opened: list[dict[str, Any]], plan: Plan, options: Options
) -> tuple[int, dict[str, int] | None]:
    """Have kept what would be lost until the sidecar works.

    Returns:
        How many bytes are, and what lets go of them; 0 and None: this strategy keeps nothing, or nothing would be lost.
    """
    strategy = STRATEGIES[options.strategy]
    if not (strategy["pin"] and strategy["stream"] and options.join):
        return 0, None
    group = cgroup_of(target.pid)
    pidfd = os.pidfd_open(target.pid)
    config = {
        "pid": target.pid,
        "pidfd": pidfd,
        "files": opened,
        "entries": [[e.step, e.shard, e.offset_bytes, e.size_bytes] for e in plan.entries if e.whole],
        "procs": str(group.path / "cgroup.procs") if group else "",
        "cgroup": _told(group),
        "slack": _slack(options, group),
        "budget": options.budget,
    }
    nbytes, hold = unit.hold(config, [pidfd, *(f["fd"] for f in opened)])
    os.close(pidfd)
    if nbytes:
        log.info("keeping %d MB of the model as the server has them, in huge pages", nbytes >> 20)
        return nbytes, hold
    let_go(**hold)
    return 0, None


def _slack(options: Options, group: Cgroup | None) -> int:
    if options.slack is not None:
        return options.slack
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return slack_for(group.limit if group and group.limit else machine)


def live_plan(pid: int) -> Plan:
    """Return the plan of a running server, from the first graph that it evaluates.

    Raises:
        LlmtracedError: no such server, no permission, or its graphs cannot be seen or understood.
    """
    target = find_target(pid)
    label, model = _main_model(target)
    ticks = tick_probes.open_ticks(target.pid, target.symbols)
    try:
        layout, graph = _learn(target, label, ticks)
    finally:
        ticks.close()
    plan = plans.from_graph(label, model, graph, layout)
    unbacked = _unbacked(graph, label, [f for f in target.files if f.label == label])
    _warn(plan, unbacked)
    if any(tensor.n_experts for tensor in model.tensors):
        log.warning(_LEFT)
    return replace(plan, entries=tuple(e for e in plan.entries if e.tensor_name not in unbacked))


def _only_one(target: Target) -> socket.socket:
    """Return what says that the process has a sidecar, for as long as it is open.

    Raises:
        LlmtracedError: it has one already: two would give back what the other one reads.
    """
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0llmtraced-prefetch-{target.pid}-{target.start}")
    except OSError as error:
        name.close()
        raise LlmtracedError(f"process {target.pid} has a sidecar already") from error
    return name


def _main_model(target: Target) -> tuple[str, Model]:
    """Return the model of which most is mapped."""
    mapped = {
        label: sum(m.end - m.start for f in target.files if f.label == label for m in f.mappings)
        for label in target.models
    }
    label = max(mapped, key=lambda name: mapped[name])
    if not mapped[label]:
        raise LlmtracedError(
            f"process {target.pid}: {why_unmapped(label, target.load_mode)}. Its pages cannot be managed: start the "
            "server with --load-mode mmap",
            UNSUPPORTED,
        )
    return label, target.models[label]


def _tell_of_others(target: Target, label: str) -> None:
    """Say which other models there are, which this sidecar does not serve, and what leaves it nothing to do."""
    for other in (name for name in target.models if name != label):
        if other in target.unmapped:
            log.info("%s", why_unmapped(other, target.load_mode))
        else:
            log.warning("%s is served; %s is left to the kernel", printable(label), printable(other))
    locked = target.locked_bytes
    if locked >= _LOCKED * target.mapped_bytes:
        log.warning("the server has locked its model in memory itself (%d MB): nothing can be gained", locked >> 20)


def _width(model: Model) -> int:
    """Return the length of the inputs that a mixture's clock is to tell; 1, which none is: no mixture, or too long."""
    width = model.metadata.get(f"{model.architecture}.embedding_length")
    merged = any(tensor.n_experts for tensor in model.tensors)
    return width if merged and isinstance(width, int) and 1 < width <= _MOST_WIDTH else 1


def _open_clock(target: Target, wanted: str, width: int, *, matrices: bool) -> Ticks | None:
    if wanted == "pagetable":
        return None
    try:
        ticks = tick_probes.open_ticks(target.pid, target.symbols, width, matrices=matrices)
    except LlmtracedError as error:
        if wanted == "ticks":
            raise
        log.warning("%s; its page table will be the clock", error)
        return None
    for sentence in ticks.lost:
        log.info("%s", sentence)
    if target.rivalry:
        log.warning("%s", target.rivalry)
    return ticks


def _ring(ticks: Ticks) -> TickRing:
    maps = ticks.maps
    return TickRing(maps["ticks"], maps["clocks"], maps["wakes"], tick_probes.RING_BYTES, tick_probes.MARKS)


def _learn(target: Target, label: str, ticks: Ticks) -> tuple[Layout, Graph]:
    """Wait for a graph of the model to be evaluated, and read it.

    Raises:
        LlmtracedError: the server ended, or its graphs cannot be understood.
    """
    ring = _ring(ticks)
    weights = known_weights(target)
    read = ggml_layout.memory_reader(target.pid)
    tries, told = 0, time.monotonic()
    log.info("waiting for process %d to evaluate a token", target.pid)
    while True:
        for _, _, mark, value, _ in ring.wait(0.5):
            if mark != BEGIN:
                continue
            try:
                layout = ggml_layout.derive(read, value, weights)
                graph = ggml_layout.read_graph(read, value, layout, weights)
                if graph.model == label:
                    return layout, graph
                if graph.model is None:
                    raise LlmtracedError("which of its models a graph evaluates is not clear", UNSUPPORTED)
            except (LlmtracedError, OSError) as error:
                tries += 1
                if tries == _GRAPH_TRIES:
                    raise LlmtracedError(f"process {target.pid}: {error}", UNSUPPORTED) from error
        if not target.alive:
            raise LlmtracedError(f"process {target.pid} has ended", FAILED)
        if time.monotonic() - told > _WAIT_SECONDS:
            told = time.monotonic()
            log.info("still waiting: send it a request")


def _told(group: Cgroup | None) -> dict[str, Any]:
    """Return what a bare process is told of a cgroup (memory.Memory)."""
    return {"folder": str(group.path) if group else "", "version": group.version if group else 2}


def known_weights(target: Target) -> dict[str, list[ggml_layout.Weight]]:
    """Return what files and the target's mappings tell of its models' weights, by name."""
    maps = {(f.label, f.shard): f.mappings for f in target.files}

    def address(label: str, shard: int, offset: int) -> int | None:
        inside = (m for m in maps.get((label, shard), ()) if m.offset <= offset < m.offset + m.end - m.start)
        return next((m.start + offset - m.offset for m in inside), None)

    return ggml_layout.known_weights(target.models, address)


def _experts(
    model: Model, layout: Layout, graph: Graph, numbers: Mapping[str, int], copied: set[str]
) -> dict[str, Any] | None:
    """Return what the sidecar is told of the model's experts; None, with a reason: they cannot be managed."""
    if copied:
        log.warning("%d of its merged matrices are copies in its own memory: try --no-repack", len(copied))
        return None
    try:
        return mixture(model, graph, layout, numbers)
    except LlmtracedError as error:
        log.warning("%s", error)
        return None


def _set_marks(ticks: Ticks, layout: Layout, graph: Graph, plan: Plan) -> tuple[list[list[int]], dict[str, int]]:
    """Tell the clock which weights to look for.

    Returns:
        The steps at which each is used, by the number of its mark; and the numbers by the weights' names.
    """
    steps: dict[str, list[int]] = {}
    for entry in plan.entries:
        steps.setdefault(entry.tensor_name, []).append(entry.step)
    firsts = {node.sources[0] for node in graph.nodes if node.sources}
    seen = {graph.weights[a][1]: graph.weights[a][0] for a in firsts if a in graph.weights}
    addresses = sorted(data for data, name in seen.items() if name in steps)[: tick_probes.MARKS]
    ticks.set_layout(layout, addresses)
    return [steps[seen[address]] for address in addresses], {seen[a]: number for number, a in enumerate(addresses)}


def _unbacked(graph: Graph, label: str, files: list[ModelFile]) -> set[str]:
    """Return the model's weights whose data are not in a mapping of it: repacked, or read."""
    ranges = [(m.start, m.end) for f in files for m in f.mappings]
    mine = (graph.weights[source] for source, model in graph.models.items() if model == label)
    return {name for name, data in mine if not any(s <= data < e for s, e in ranges)}


def _warn(plan: Plan, unbacked: set[str], *, enough: bool = False) -> None:
    """Say what cannot be managed.

    Raises:
        LlmtracedError: next to nothing can be, unless there is ``enough`` else to do.
    """
    whole = {entry.tensor_name: entry.size_bytes for entry in plan.entries if entry.whole}
    left = sum(size for name, size in whole.items() if name not in unbacked)
    if unbacked:
        log.warning(
            "%d of its weights are copies in its own memory (repacked); they cannot be managed: try --no-repack",
            len(unbacked),
        )
    if not whole:
        raise LlmtracedError("no weight of this model is used whole by each token: nothing can be planned", UNSUPPORTED)
    if left < _LEAST_SHARE * sum(whole.values()) and not enough:
        raise LlmtracedError(
            f"only {left / 1e6:.1f} of {sum(whole.values()) / 1e6:.1f} MB that each token uses are in the mapped file, "
            "the others are copies in the server's own memory: start it with --no-repack",
            UNSUPPORTED,
        )


def configuration(
    target: Target,
    label: str,
    opened: list[dict[str, Any]],
    plan: Plan,
    unbacked: set[str],
    ticks: Ticks | None,
    marks: list[list[int]],
    options: Options,
) -> dict[str, Any]:
    """Return what the sidecar is told: plain numbers, and descriptors that it inherits."""
    group = cgroup_of(target.pid)
    strategy = dict(STRATEGIES[options.strategy])
    if options.path:
        strategy["path"] = options.path
    return {
        "pid": target.pid,
        "pidfd": os.pidfd_open(target.pid),
        "label": printable(label, 255),
        "files": opened,
        "entries": [
            [e.step, e.shard, e.offset_bytes, e.size_bytes]
            for e in plan.entries
            if e.whole and e.tensor_name not in unbacked
        ],
        "marks": marks,
        "ticks": None
        if ticks is None
        else {
            "ring": ticks.maps["ticks"],
            "clocks": ticks.maps["clocks"],
            "wakes": ticks.maps["wakes"],
            "ring_bytes": tick_probes.RING_BYTES,
            "marks": tick_probes.MARKS,
            "operators": ticks.operators,
        },
        "keep": [] if ticks is None else ticks.descriptors(),
        "cgroup": _told(group),
        "strategy": strategy,
        "partial": any(tensor.n_experts for tensor in target.models[label].tensors),
        "budget": options.budget,
        "window": max(options.window // CHUNK, 2) * CHUNK if options.window else 0,
        "slack": _slack(options, group),
        "depth": options.depth,
        # Without ticks there are no tokens to compare before engaging.
        "trial": _NEVER if options.strategy == "off" else options.trial if ticks is not None else 0,
        "metrics": _metrics_file(target.pid, options.metrics),
        "passing": options.metrics is None,
        "json": options.json,
    }


def _metrics_file(pid: int, wanted: str | None) -> str | None:
    """Return where to write metrics; None: nowhere."""
    if wanted is not None:
        return str(Path(wanted).absolute()) if wanted else None
    folder = Path(FOLDER)
    try:
        folder.mkdir(0o755, exist_ok=True)
    except OSError as error:
        log.warning("cannot make %s (%s): the daemon will not know of this sidecar", folder, error.strerror)
        return None
    return str(folder / f"{pid}.prom")


def become(config: Mapping[str, Any], target: Target, options: Options) -> None:
    """Join the server's cgroup and turn into the bare sidecar; or leave that to the next steps of a unit."""
    fd = unit.memory_file(config)
    inherited = [config["pidfd"], *(f["fd"] for f in config["files"]), *config["keep"]]
    if options.hand_over:
        unit.hand_over(fd, inherited)
        return
    for one in (fd, *inherited):
        os.set_inheritable(one, True)
    if options.join:
        unit.join(target.pid, os.getpid())
    unit.execute(fd)
