"""A traced process: registered with the tracer, its events turned into the files of a trace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llmtraced import clock, layouts
from llmtraced.description import session_metadata, tensor_table
from llmtraced.dial import Load
from llmtraced.errors import LlmtracedError, printable
from llmtraced.ggml_layout import Graph, Layout, known_weights, memory_reader, read_graph
from llmtraced.gguf_map import Model
from llmtraced.ledger import Account, Ledger
from llmtraced.loading import why_unmapped
from llmtraced.operator_names import operator_names
from llmtraced.probes.tracer import Tracer
from llmtraced.resolve import Resolver
from llmtraced.rows import RowMaker, TokenBook, as_prompts, join, pick
from llmtraced.schema import Detail, Kind, Phase, Probe
from llmtraced.store import TraceWriter
from llmtraced.target import EVALUATE, Symbol, Target, maps_text, scan

__all__ = ["Account", "Session"]

log = logging.getLogger(__name__)

_GRAPH_TRIES: Final = 8
_GRAPHS_AT_ONCE: Final = 4  # that are read for one batch of records
_GRAPHS: Final = 64  # that are read: a context has a few
_ASKED_SECONDS: Final = 0.005  # asking a library takes 1 to 3 ms where its pages are in memory
_SILENT_GRAPHS: Final = 32  # after so many graphs without any, what is hooked is not called
_NEVER: Final = "its function is hooked and never called in this build (inlined?)"
_PROBE_OF: Final = {
    Probe.FAULTS: (Kind.FAULT,),
    Probe.PAGECACHE: (Kind.ADD, Kind.EVICT),
    Probe.READS: (Kind.READ,),
    Probe.TOKENS: (Kind.TOKEN, Kind.TOKEN_END),
    Probe.OPS: (Kind.OP,),
    Probe.ROUTING: (Kind.ROUTE,),
}
_LOW32: Final = np.uint64(0xFFFFFFFF)


@dataclass(slots=True)
class _Epoch:
    """Records of one generation of the account, and how many of each probe's units they are."""

    events: list[NDArray[Any]] = field(default_factory=list)
    delivered: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Probe), np.int64))


class _Hearing:
    """Notices what never comes of graphs that have it: an attached hook may be on a copy that nobody calls."""

    def __init__(self) -> None:
        self._graphs = 0
        self._heard: set[Kind] = set()

    def silent(self, kinds: NDArray[Any], graph: Graph) -> list[str]:
        """Take the kinds of more records; return, once and when enough graphs have ended, a sentence for each kind."""
        if self._graphs >= _SILENT_GRAPHS:
            return []
        self._heard |= {kind for kind in (Kind.OP, Kind.ROUTE) if (kinds == kind).any()}
        self._graphs += int(np.count_nonzero(kinds == Kind.TOKEN_END))
        if self._graphs < _SILENT_GRAPHS:
            return []
        merged = any("_exps." in name for name, _ in graph.weights.values())
        sentences = [] if Kind.OP in self._heard else [f"operators are not recorded: {_NEVER}"]
        if merged and Kind.ROUTE not in self._heard:
            sentences.append(f"the experts chosen are not recorded: {_NEVER}, or the model's graph has other names")
        return sentences


class Session:
    """One traced process.

    Args:
        tracer: where it is registered.
        target: the process.
        writer: of its trace.
        detail: the dial.
        phase: until the first graph: LOAD if the process was seen to start, else UNKNOWN.

    Attributes:
        ledger: the account of what was written and what was not.
        described: whether the table of tensors is on disk.
        layout: where fields lie in ggml's structures, once a graph was read by it; None: not known (yet).
        layout_from: where that is from, see :func:`llmtraced.layouts.find`.
        op_names: of the build's ``enum ggml_op``.
        unbacked: tensors that the process computes with from elsewhere than the mapping.
        problems: what cannot be traced in this process, a sentence each.
        marks: records of graphs that begin, kept where a list has been put: whoever put it there empties it.
        detached: the process is not traced any more; what was recorded of it may not all have been read.
    """

    def __init__(self, tracer: Tracer, target: Target, writer: TraceWriter, detail: Detail, phase: Phase) -> None:
        self.tracer = tracer
        self.target = target
        self.writer = writer
        self.slot = tracer.add_process(target.pid, phase)
        self.files: dict[tuple[str, int], int] = {}
        self.models: dict[str, Model] = {}
        self.layout: Layout | None = None
        self.layout_from = ""
        self.graph: Graph | None = None
        self.problems: list[str] = list(target.problems)
        self.op_names: dict[int, str] = {}
        self.unbacked: set[int] = set()
        self.backed: set[int] = set()
        self.marks: list[NDArray[Any]] | None = None
        self.ledger = Ledger(writer, target.pid)
        self.described = self.detached = False
        self._epochs: dict[int, _Epoch] = {}
        self._refused: set[str] = set()
        self._weights: dict[int, tuple[int, int]] = {}
        self._graphs_read: set[tuple[int, int]] = set()
        self._graph_models: dict[int, int] = {}
        self._projected = 0
        self._hearing = _Hearing()
        self._tries = 0
        self._records = self._dropped = 0
        self._maps = b""
        self._warned: set[str] = set()
        self._unsettled = phase == Phase.LOAD and EVALUATE in target.symbols
        self._hooked: dict[str, Symbol] = {}
        self._lost: list[str] = []
        self._batch_sizes: dict[int, tuple[int, int, int]] = {}
        self._ranges: list[tuple[int, int, int, int]] = []
        self._book = TokenBook(clock.monotonic_ns(), int(phase))
        self.detail = detail
        try:
            self._register(target)
            self.set_detail(detail)
        except BaseException:
            tracer.remove_process(self.slot)
            tracer.free(self.slot)
            raise

    @property
    def account(self) -> Account:
        """Totals since the start, by probe: of what is on disk, and of what was not written (it counts as dropped)."""
        return self.ledger.account

    @property
    def paused(self) -> str:
        """Why nothing is being recorded at the moment; empty: it is."""
        return self.ledger.paused

    @property
    def write_error(self) -> str:
        """What went wrong when the last interval was written; empty: nothing."""
        return self.ledger.error

    # --- the process -----------------------------------------------------------------------------------------------

    def _register(self, target: Target) -> None:
        """Take in the target's models and where they are mapped; called again when that changed.

        Raises:
            LlmtracedError: there is no room for a model; the others are taken in.
        """
        before, failure = len(self.models), None
        for label in [n for n in target.models if n not in self.models and n not in self._refused]:
            try:
                self._add_model(label, target)
            except LlmtracedError as error:
                self._refused.add(label)
                failure = failure or error
        if len(self.models) > before:
            self.resolver = Resolver(self.models, self.files)
            self.rows = RowMaker(self.resolver)
            self._by_name: dict[str, list[int]] = {}
            for number, name in enumerate(self.resolver.names):
                self._by_name.setdefault(name, []).append(number)
        ranges = sorted(
            (m.start, m.end, m.offset, self.files[f.label, f.shard])
            for f in target.files
            for m in f.mappings
            if f.label in self.models
        )
        if ranges != self._ranges:
            self.tracer.set_ranges(self.slot, ranges)
            self._ranges = ranges
            self._graphs_read.clear()  # it has loaded something, or let go of it: its graphs may be others by now
            self._graph_models.clear()
        if failure:
            raise failure

    def _add_model(self, label: str, target: Target) -> None:
        self.models[label] = target.models[label]
        added = []
        try:
            for file in (f for f in target.files if f.label == label):
                self.files[label, file.shard] = self.tracer.next_file()
                self._add_file(label, file.shard, file.device, file.inode)
                added.append(self.files[label, file.shard])
        except BaseException:
            del self.models[label]
            self.files = {key: number for key, number in self.files.items() if key[0] != label}
            for number in added:
                self.tracer.remove_file(number)
            raise

    def _add_file(self, label: str, shard: int, device: int, inode: int) -> None:
        model, number = self.models[label], self.files[label, shard]
        extents = Resolver({label: model}, {(label, shard): number}).extents(number)
        self.tracer.add_file(number, self.slot, device, inode, model.shards[shard].size, extents)

    @property
    def clocked(self) -> bool:
        """Whether the process's graphs are seen."""
        return bool(self.tracer.uprobes(self.slot))

    @property
    def loading(self) -> bool:
        """Whether the process may still have other libraries, or its model, at the next look."""
        return not self.problems and not (self.clocked and self.target.mapped_bytes)

    def refresh(self) -> None:
        """Look where the process has its models, and its ggml, now: it may still be loading, or unmap and map more."""
        found = maps_text(self.target.pid)
        if found == self._maps and not self._unsettled:
            return
        self._maps = found
        experts = self._experts
        for target in scan([self.target.pid]):
            self.target = target
            try:
                self._register(target)
            except LlmtracedError as error:
                if str(error) not in self._warned:
                    log.warning("process %d: %s", target.pid, error)
                    self.problems.append(str(error))
                self._warned.add(str(error))
            self.writer.describe(session_metadata(target, self.detail))
        self._unsettled = self._is_being_asked()
        if not self.clocked or experts != self._experts or self._hooked != self.target.symbols:
            self.set_detail(self.detail)

    def detach(self) -> None:
        """Trace the process no more; records of it may still be taken, but it is not looked at for them."""
        self.detached = True
        self.tracer.remove_process(self.slot)

    def _is_being_asked(self) -> bool:
        """Whether a library that evaluates graphs is only there to be asked if it is the best for this processor."""
        library = self.target.symbols.get(EVALUATE)
        if library is None or self.target.mapped_bytes or library == self._hooked.get(EVALUATE):
            return False
        time.sleep(_ASKED_SECONDS)
        return not self.target.has(library)

    @property
    def _experts(self) -> bool:
        return any(tensor.n_experts for model in self.models.values() for tensor in model.tensors)

    def set_detail(self, detail: Detail) -> None:
        """Turn the dial."""
        self.detail = detail
        self.writer.describe({"detail": detail.name.lower()})
        if not self.target.mapped_bytes and (EVALUATE not in self.target.symbols or self._unsettled):
            return  # still loading its libraries
        symbols = self.target.symbols
        if not self.target.alive:
            return  # of what has ended no symbol can be read, which would be told of its build
        self._hooked = symbols
        lost = self.tracer.set_detail(self.slot, detail, self._hooked, experts=self._experts)
        lost += [self.target.rivalry] if self.target.rivalry else []
        self.problems = [p for p in self.problems if p not in self._lost] + lost
        self._lost = lost
        for sentence in set(lost) - self._warned:
            log.warning("process %d: %s", self.target.pid, sentence)
        self._warned |= set(lost)

    def _look_at_graphs(self, marks: NDArray[Any]) -> None:
        """Learn from the graphs being evaluated: the layout, once; which weights are where, for each kind of graph.

        A graph is told by its address, which is its context's own (so of a model and its draft each has another), and
        its number of nodes.
        """
        if self.layout is None and self._tries >= _GRAPH_TRIES:
            return
        newest = {(int(mark["a"]), int(mark["c"])): mark for mark in marks}
        for key, mark in list(newest.items())[-_GRAPHS_AT_ONCE:]:
            if self.layout is None or (key not in self._graphs_read and len(self._graphs_read) <= _GRAPHS):
                self._look_at_graph(mark)

    def _look_at_graph(self, mark: NDArray[Any]) -> None:
        address = int(mark["a"])
        try:
            self.refresh()  # the model may have been mapped since the last look, and a graph is judged only once
            weights = known_weights(self.models, self._address)
            read = memory_reader(self.target.pid)
            if self.layout is None:
                self._tries += 1
                hook = self._hooked.get(EVALUATE)
                found = layouts.find(read, address, weights, hook.library if hook else "")
                self.layout, self.layout_from = found
                self._apply_layout(self.layout)
                self.writer.describe({"ggml_layout": self.layout_from})
            graph = read_graph(read, address, self.layout, weights)
            if not self._graphs_read:
                names = operator_names(self.target, read)
                if self.op_names.items() <= names.items():  # what was derived stands there, too
                    self.op_names = names
        except (LlmtracedError, OSError) as error:
            log.debug("process %d: graph %#x: %s", self.target.pid, address, error)
            if self.layout is None and self._tries == _GRAPH_TRIES:
                self._problem(f"{error}; tokens have no batch size, operators and experts are not recorded")
            return
        self.graph = graph
        self._graphs_read.add((address, len(graph.nodes)))
        if int(self.tracer.slots["token"][self.slot]) == int(mark["token"]):  # else it may be a later batch's by now
            self._batch_sizes[int(mark["token"])] = (graph.nodes[0].rows, graph.nodes[-1].rows, len(graph.nodes))
        if graph.model is not None:
            number = self._graph_models[address] = self.resolver.labels.index(graph.model)
            if self._is_projector(number):
                self._batch_sizes.pop(int(mark["token"]), None)
        for tensor, (name, data) in graph.weights.items():
            if tensor not in graph.models:
                self._problem(f"there are several models with a {printable(name)}, and which one is used is not clear")
                continue
            number = self._tensor_of(graph.models[tensor], name)
            self._weights[tensor] = (number, data)
            mapped = any(start <= data < end for start, end, _, _ in self._ranges)
            (self.backed if mapped else self.unbacked).add(number)
        self._tell_what_is_not_seen(graph)

    def _is_projector(self, number: int) -> bool:
        """Tell whether a model makes embeddings of images or sound: its graphs have no tokens."""
        return self.models[self.resolver.labels[number]].architecture == "clip"

    def _tell_what_is_not_seen(self, graph: Graph) -> None:
        used = {*graph.models.values()}
        for label in self.target.unmapped:
            if label in used:
                self._problem(why_unmapped(label, self.target.load_mode))
        if graph.strangers:
            example = printable(min(graph.strangers))
            files = "that is neither mapped nor named on the command line"
            self._problem(f"it uses weights of a file {files}, such as {example}: operators with them have no name")

    def tell_what_was_not_seen(self) -> None:
        """Say of which models nothing was mapped until the end, for whatever reason."""
        for label in self.target.unmapped:
            if not any(sentence.startswith(printable(label)) for sentence in self.problems):
                self._problem(why_unmapped(label, self.target.load_mode))

    def _problem(self, sentence: str) -> None:
        if sentence not in self.problems:
            self.problems.append(sentence)
            log.warning("process %d: %s", self.target.pid, sentence)

    def _apply_layout(self, layout: Layout) -> None:
        slot = self.tracer.slots[self.slot : self.slot + 1]
        for name in Layout.__dataclass_fields__:
            slot[name] = getattr(layout, name)
        slot["layout"] = 1
        self.op_names = {layout.op_mul_mat: "mul_mat"}
        if layout.op_mul_mat_id:
            self.op_names[layout.op_mul_mat_id] = "mul_mat_id"

    def _address(self, label: str, shard: int, offset: int) -> int | None:
        file = self.files.get((label, shard))
        for start, end, file_offset, number in self._ranges:
            if number == file and file_offset <= offset < file_offset + end - start:
                return start + offset - file_offset
        return None

    def _tensor_of(self, label: str, name: str) -> int:
        """Return the number of a model's tensor: a draft model's have the same names as the other's."""
        of = self.resolver.model_of
        return next(n for n in self._by_name[name] if self.resolver.labels[of[n]] == label)

    # --- events ----------------------------------------------------------------------------------------------------

    def take(self, events: NDArray[Any]) -> None:
        """Take records of this process."""
        self._records += len(events)
        kinds = events["kind"]
        marks = events[kinds == Kind.TOKEN]
        if len(marks):
            if not self.detached:
                self._look_at_graphs(marks)
            if self.marks is not None:
                self.marks.append(marks)
        generations = events["mark"] >> 4
        for number in np.unique(generations):
            mine = (
                events if generations[0] == number and (generations == number).all() else events[generations == number]
            )
            epoch = self._epochs.setdefault(int(number), _Epoch())
            epoch.events.append(mine)
            kinds = mine["kind"]
            counts = np.bincount(kinds, minlength=len(Kind))
            pages = (mine["b"][(kinds == Kind.ADD) | (kinds == Kind.EVICT)] & _LOW32).sum()
            for probe, members in _PROBE_OF.items():
                n = int(pages) if probe == Probe.PAGECACHE else int(sum(counts[k] for k in members))
                epoch.delivered[probe] += n
        if self.graph is not None and self.detail >= Detail.OPS:
            for sentence in self._hearing.silent(events["kind"], self.graph):
                self._problem(sentence)

    @property
    def buffered(self) -> int:
        """Records taken and not yet given to the writer."""
        return sum(len(batch) for epoch in self._epochs.values() for batch in epoch.events)

    @property
    def load(self) -> Load:
        """What it has cost so far."""
        return Load(self._records, self._dropped)

    def missing(self, number: int) -> dict[str, int]:
        """Return how many events of an ended epoch were counted and neither delivered nor dropped, by probe; not 0."""
        kernel = self.tracer.account(self.slot, number)
        epoch = self._epochs.get(number) or _Epoch()
        left = kernel["counted"].astype(np.int64) - kernel["dropped"].astype(np.int64) - epoch.delivered
        return {probe.name.lower(): int(left[probe]) for probe in Probe if left[probe]}

    def end_epoch(self, number: int) -> tuple[NDArray[Any], Account]:
        """Return an ended epoch's records and its account, and forget them."""
        kernel = self.tracer.account(self.slot, number)
        epoch = self._epochs.pop(number, None) or _Epoch()
        account: Account = {}
        for probe in Probe:
            cell = {
                "counted": int(kernel["counted"][probe]),
                "delivered": int(epoch.delivered[probe]),
                "dropped": int(kernel["dropped"][probe]),
            }
            self._dropped += cell["dropped"]
            if any(cell.values()):
                account[probe.name.lower()] = cell
        return join(epoch.events), account

    # --- files (the writer's thread) -------------------------------------------------------------------------------

    def lose(self, account: Account, why: str) -> None:
        """Do not write an interval (see :meth:`ledger.Ledger.lose`)."""
        self.ledger.lose(account, why)

    def write(self, events: NDArray[Any], account: Account, *, last: bool) -> None:
        """Write an epoch's files; :attr:`write_error` says what could not be written."""
        try:
            tables = self._tables(events, account, last=last) if self.ledger.ready() else []
        except BaseException as error:
            self.lose(account, f"its rows cannot be made: {error!r}")
            raise
        self.ledger.write(tables, account)

    def _tables(self, events: NDArray[Any], account: Account, *, last: bool) -> list[tuple[str, pa.Table]]:
        """Return the tables that have rows or something to account for."""
        projectors = [graph for graph, number in dict(self._graph_models).items() if self._is_projector(number)]
        if projectors:
            events, self._projected = as_prompts(events, projectors, self._projected)
        kinds = events["kind"]

        def of(*wanted: Kind) -> NDArray[Any]:
            chosen = np.isin(kinds, wanted)
            return events if chosen.all() else pick(events, chosen)

        makers: dict[Probe, Callable[[NDArray[Any]], pa.Table]] = {
            Probe.FAULTS: self.rows.faults,
            Probe.PAGECACHE: self.rows.pagecache,
            Probe.READS: self.rows.reads,
            Probe.OPS: lambda ops: self.rows.ops(ops, of(Kind.ROUTE), dict(self._weights), self.op_names),
            Probe.ROUTING: self.rows.routing,
        }
        # Each table costs some milliseconds even when it is empty: only those with something to say are made.
        speak = account.keys() | self.ledger.owed()
        tables = [(name, make(of(*_PROBE_OF[p]))) for p, make in makers.items() if (name := p.name.lower()) in speak]
        tokens = self._book.add(events, dict(self._batch_sizes), dict(self._graph_models), self.resolver.labels)
        if last:
            tokens = pa.concat_tables([tokens, self._book.close(clock.monotonic_ns())])
        name = Probe.TOKENS.name.lower()
        return [*tables, (name, tokens)] if tokens.num_rows or name in speak else tables

    def write_tensors(self) -> None:
        """Write, or write again, the table of tensors."""
        self.writer.rewrite("tensors", tensor_table(self.resolver, self.backed, self.unbacked))
        self.described = True
