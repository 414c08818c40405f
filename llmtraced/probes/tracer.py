"""The kernel side as one object: programs attached, processes and files registered, events and accounts read.

Nothing here knows tensors' names or Parquet. Closing it, or dying, detaches everything: the kernel does that with the
descriptors.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmtraced.errors import UNSUPPORTED, LlmtracedError
from llmtraced.probes import KERNEL_POINTS, MATRICES, PROCESS_POINTS, kernel, loader
from llmtraced.probes.attach import attach_point, open_on_cpu, open_set, program
from llmtraced.probes.points import SoftwareEvent, Uprobe
from llmtraced.probes.ringbuf import Ring
from llmtraced.probes.shared import ACCOUNT, BOUND, CONFIG, COUNTER, FILE, OP, RANGE, SLOT, op_events
from llmtraced.resolve import Extents
from llmtraced.schema import EPOCHS, PAGE, SLOTS, Detail, Phase, Probe
from llmtraced.target import Symbol

__all__ = ["Tracer"]

log = logging.getLogger(__name__)

_LATE_NS: Final = 20_000_000  # by which an event's clock may be behind: two ticks of a machine whose clock is coarse

_UNPLACED = 0  # CONFIG_* in bpf/common.h


class _Space:
    """Stretches of an array that are handed out and taken back."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]

    def take(self, n: int) -> int | None:
        for i, (start, length) in enumerate(self._free):
            if length >= n:
                self._free[i : i + 1] = [(start + n, length - n)] if length > n else []
                return start
        return None

    def give(self, start: int, n: int) -> None:
        merged: list[tuple[int, int]] = []
        for first, length in sorted([*self._free, (start, n)]):
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((first, length))
        self._free = merged


class Tracer:
    """Loads on construction; attaches to the kernel with the first process.

    Args:
        sizes: of ring and maps.
        anew: compile the programs, whatever is kept from the last time.

    Attributes:
        attached: what is attached to the kernel, by attach point.
        missing: what could not be attached: attach point → (reason, what is lost).
        unplaced: pages of model files that are in no per-tensor total (never seen so far; see docs/pagecache.md).
    """

    def __init__(self, sizes: loader.Sizes | None = None, *, anew: bool = False) -> None:
        self.programs = loader.load(sizes, anew=anew)
        self.sizes = self.programs.sizes
        maps = self.programs.maps
        self.ring = Ring(maps["ring"], self.sizes.ring_bytes)
        self.slots = kernel.map_array(maps["slots"], SLOT, SLOTS)
        self._ranges = kernel.map_array(maps["ranges"], RANGE, self.sizes.ranges)
        self._files = kernel.map_array(maps["files"], FILE, loader.FILES)
        self._bounds = kernel.map_array(maps["bounds"], BOUND, self.sizes.bounds)
        self._counters = kernel.map_array(maps["counters"], COUNTER, self.sizes.bounds)
        self._seen = kernel.map_array(maps["seen"], BOUND, self.sizes.model_bytes // PAGE // 64)
        self._config = kernel.map_array(maps["config"], CONFIG, 8)
        self._left: list[NDArray[Any]] = []  # operators that were not in the ring yet when their process was removed
        self._ops = kernel.map_array(maps["ops"], OP, loader.OP_THREADS)
        self._epoch = 0
        self._cpus = loader.possible_cpus()
        shape = (self._cpus, SLOTS, EPOCHS, len(Probe))
        self._accounts = kernel.map_array(maps["accounts"], ACCOUNT, int(np.prod(shape))).reshape(shape)
        self._kernel_fds: list[int] = []
        self._cpu_fds: dict[int, list[int]] = {}
        self._cpu_times: dict[int, tuple[int, int]] = {}  # for how long its event had counted when it was looked at
        self._process_fds: dict[int, dict[str, int]] = {}
        self._uprobes: dict[int, dict[str, Symbol]] = {}
        self._slot_pids: dict[int, int] = {}
        self._aliases = kernel.map_array(maps["aliases"], BOUND, SLOTS * loader.FILES).reshape(SLOTS, loader.FILES)
        self._file_ids: dict[int, bytes] = {}
        self._file_slots: dict[int, int] = {}
        self._sharers: dict[bytes, list[int]] = {}
        self._bound_space = _Space(self.sizes.bounds)
        self._seen_space = _Space(len(self._seen))
        self._range_space = _Space(self.sizes.ranges)
        self._windows: dict[int, tuple[int, int]] = {}
        self.attached: list[str] = []
        self.missing: dict[str, tuple[str, str]] = {}

    # --- attaching -------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Attach to the kernel's own points; done by itself with the first process.

        Raises:
            LlmtracedError: a required point cannot be had.
        """
        if self._kernel_fds:
            return
        for point in KERNEL_POINTS:
            try:
                name, fds = attach_point(point, self.programs)
            except LlmtracedError as error:
                if point.required:
                    self.detach()
                    raise
                self.missing[str(point)] = (str(error), point.lost)
                log.warning("%s; %s", error, point.lost)
            else:
                self.attached.append(name)
                if isinstance(point, SoftwareEvent):
                    for cpu, fd in fds.items():
                        self._cpu_fds.setdefault(cpu, []).append(fd)
                else:
                    self._kernel_fds += fds.values()

    def follow_cpus(self) -> None:
        """Attach to CPUs that have come online: a software event is one CPU's, and ends when that goes offline.

        A CPU may have gone and come back since the last look; all but one do while the machine is suspended. Its event
        has counted less time since than has passed.
        """
        if not self._kernel_fds:
            return
        online = set(kernel.online_cpus())
        ended = []
        for cpu, own in sorted(self._cpu_fds.items()):
            before = time.monotonic_ns()
            enabled = kernel.time_enabled(own[0])
            counted, seen = self._cpu_times.get(cpu, (enabled, before))
            if cpu not in online or enabled - counted < before - seen - _LATE_NS:
                ended.append(cpu)
            self._cpu_times[cpu] = enabled, time.monotonic_ns()
        for cpu in ended:
            del self._cpu_times[cpu]
            for fd in self._cpu_fds.pop(cpu):
                os.close(fd)
            log.warning("CPU %d has gone offline", cpu)
        for cpu in sorted(online - self._cpu_fds.keys()):
            fds: list[int] = []
            try:
                fds.extend(
                    open_on_cpu(point, self.programs, cpu)
                    for point in KERNEL_POINTS
                    if isinstance(point, SoftwareEvent)
                )
            except LlmtracedError as error:  # it has gone again
                log.warning("CPU %d: %s", cpu, error)
                for fd in fds:
                    os.close(fd)
                continue
            self._cpu_fds[cpu] = fds
            log.info("CPU %d has come online", cpu)

    def detach(self) -> None:
        """Detach from everything; what is in the ring can still be read."""
        for fd in (fd for fds in self._cpu_fds.values() for fd in fds):
            os.close(fd)
        self._cpu_fds.clear()
        for fd in [*self._kernel_fds, *(fd for fds in self._process_fds.values() for fd in fds.values())]:
            os.close(fd)
        self._kernel_fds.clear()
        for fds in self._process_fds.values():
            fds.clear()
        self.attached.clear()
        self._cpu_times.clear()

    # --- processes -------------------------------------------------------------------------------------------------

    def add_process(self, pid: int, phase: Phase) -> int:
        """Begin to trace ``pid`` and return its slot. ``phase``: what it is doing until its first graph.

        Raises:
            LlmtracedError: all slots are taken, or a required attach point cannot be had.
        """
        free = [n for n in range(SLOTS) if n not in self._slot_pids]
        if not free:
            raise LlmtracedError(f"{SLOTS} processes are being traced already; process {pid} is not", UNSUPPORTED)
        self.attach()
        slot = free[0]
        self.slots[slot : slot + 1] = np.zeros(1, SLOT)
        self._accounts[:, slot] = np.zeros(1, ACCOUNT)
        self.slots["epoch"][slot] = self._epoch
        self.slots["phase"][slot] = int(phase)
        self.slots["detail"][slot] = int(Detail.FAULTS)
        self.slots["process"][slot] = pid
        self._slot_pids[slot] = pid
        self._process_fds[slot] = {}
        self._uprobes[slot] = {}
        kernel.map_update(self.programs.maps["targets"], struct.pack("<I", pid), struct.pack("<I", slot))
        return slot

    def remove_process(self, slot: int) -> None:
        """Stop tracing a process; its slot is free once its last events have been read (:meth:`free`)."""
        for fd in self._process_fds.pop(slot, {}).values():
            os.close(fd)
        kernel.map_delete(self.programs.maps["targets"], struct.pack("<I", self._slot_pids[slot]))
        self._take_ops(slot)
        for file in [f for f, owner in self._file_slots.items() if owner == slot]:
            self.remove_file(file)
        self.slots["window"][slot] = 0
        self.slots["process"][slot] = 0

    def _take_ops(self, slot: int) -> None:
        """Take the operators that a process had computed of a graph that was cut off; no program runs for it now."""
        for op in self._ops[(self._ops["slot"] == slot) & (self._ops["done"] != 0)]:
            events = op_events(op)
            events["mark"] = events["mark"] & 15 | self._epoch << 4
            self._accounts[0, slot, self._epoch, Probe.OPS]["counted"] += np.uint64(len(events))
            self._left.append(events)
        mine = self._ops["slot"] == slot
        self._ops["thread"][mine], self._ops["done"][mine] = 0, 0

    def free(self, slot: int) -> None:
        """Let the slot be used again."""
        window = self._windows.pop(slot, None)
        if window:
            self._range_space.give(*window)
        del self._slot_pids[slot]
        if not self._slot_pids:
            self.detach()  # nothing to trace costs nothing

    def set_detail(
        self, slot: int, detail: Detail, symbols: Mapping[str, Symbol], *, experts: bool = False
    ) -> list[str]:
        """Attach to, or detach from, the process's ggml so that ``detail`` is recorded.

        What stays attached is not touched: taking a probe away takes the kernel some 100 ms, in which tokens pass. What
        is attached to a library that the process has no more, or no longer uses, goes.

        Args:
            slot: of the process.
            detail: the dial.
            symbols: ggml's functions in the process.
            experts: its models have merged expert tensors, whose operators only the hook for all of them sees.

        Returns:
            What is lost for want of symbols or permission, a sentence each; empty if all could be attached.
        """
        there = set(symbols.values())
        old = [name for name, symbol in self._uprobes[slot].items() if symbol not in there]
        ending = [self._process_fds[slot].pop(name) for name in old]
        for name in old:
            del self._uprobes[slot][name]
        wanted = [p for p in PROCESS_POINTS if p.detail <= max(detail, Detail.FAULTS)]
        wanted = [p for p in wanted if p.is_needed(symbols)]
        matrices = None
        if detail == MATRICES.detail and not experts:
            matrices = self._attach_matrices(slot, symbols)
        if matrices is not None:
            wanted = [p for p in wanted if p.program != MATRICES.program]
        elif any(p.instead_of_ops and p.symbol in symbols for p in wanted):  # one that sees all
            wanted = [p for p in wanted if p.symbol != MATRICES.symbol]
        attached = self._process_fds[slot]
        keep = {str(p) for p in wanted} | ({str(MATRICES)} if matrices else set())
        for name in [n for n in attached if n not in keep]:
            os.close(attached.pop(name))
            del self._uprobes[slot][name]
        self.slots["detail"][slot] = int(detail)
        errors = [self._attach_uprobe(slot, point, symbols) for point in wanted if str(point) not in attached]
        for fd in ending:  # last: the process may be about to evaluate its first graph
            os.close(fd)
        return [error for error in errors if error]

    def _attach_matrices(self, slot: int, symbols: Mapping[str, Symbol]) -> Symbol | None:
        """Attach :data:`MATRICES` where it is known to see all matrices and to be cheaper; return where it is."""
        name = str(MATRICES)
        if name in self._process_fds[slot]:
            return self._uprobes[slot][name]
        if not any(p.instead_of_ops and p.symbol in symbols for p in PROCESS_POINTS):
            return None
        try:
            fd = open_set(MATRICES, symbols, self._slot_pids[slot], self.programs, slot)
        except LlmtracedError as error:
            log.debug("%s; %s", error, MATRICES.lost)
            return None
        self._process_fds[slot][name] = fd
        self._uprobes[slot][name] = symbols[MATRICES.symbol]
        return symbols[MATRICES.symbol]

    def _attach_uprobe(self, slot: int, point: Uprobe, symbols: Mapping[str, Symbol]) -> str | None:
        symbol = symbols.get(point.symbol)
        if symbol is None:
            return f"{point}: this build has no such symbol; {point.lost}"
        try:
            fd = kernel.open_uprobe(
                symbol.library,
                symbol.offset,
                self._slot_pids[slot],
                program(self.programs, point.program),
                str(point),
                on_return=point.on_return,
                cookie=slot,
            )
        except LlmtracedError as error:
            return f"{error}; {point.lost}"
        self._process_fds[slot][str(point)] = fd
        self._uprobes[slot][str(point)] = symbol
        return None

    def uprobes(self, slot: int) -> dict[str, Symbol]:
        """Return what is attached in the process, by attach point."""
        return dict(self._uprobes.get(slot, {}))

    def set_ranges(self, slot: int, ranges: Sequence[tuple[int, int, int, int]]) -> None:
        """Say where the process has its models: (start, end, offset in the file, file number), in any order.

        Raises:
            LlmtracedError: more stretches than the map holds.
        """
        table = np.array(sorted(ranges), dtype=np.uint64).reshape(-1, 4)
        base = self._range_space.take(max(len(table), 1))
        if base is None:
            raise LlmtracedError(
                f"process {self._slot_pids[slot]} has its models mapped in {len(table)} stretches, "
                f"more than the {self.sizes.ranges} there is room for",
                UNSUPPORTED,
            )
        for column, name in enumerate(("start", "end", "offset", "file")):
            self._ranges[name][base : base + len(table)] = table[:, column]
        before = self._windows.get(slot)
        self._windows[slot] = (base, max(len(table), 1))
        self.slots["window"][slot] = base << 32 | len(table)  # one store: a probe sees the old window or the new
        if before:
            time.sleep(0.01)  # longer than any probe that may still read the old one
            self._range_space.give(*before)

    def ranges(self, slot: int) -> list[tuple[int, int, int, int]]:
        """Return where the process has its models, as :meth:`set_ranges` was told."""
        window = int(self.slots["window"][slot])
        chosen = self._ranges[window >> 32 : (window >> 32) + (window & 0xFFFFFFFF)]
        return [(int(r["start"]), int(r["end"]), int(r["offset"]), int(r["file"])) for r in chosen]

    # --- files -----------------------------------------------------------------------------------------------------

    def next_file(self) -> int:
        """Return a file number that is free.

        Raises:
            LlmtracedError: there is none.
        """
        for number in range(loader.FILES):
            if number not in self._file_ids:
                return number
        raise LlmtracedError(f"{loader.FILES} model files are being traced already", UNSUPPORTED)

    def add_file(self, number: int, slot: int, device: int, inode: int, size: int, extents: Extents) -> None:
        """Count a model file's page cache from now on.

        Args:
            number: from :meth:`next_file`.
            slot: whose it is, for what other processes do to it.
            device: major << 20 | minor, as tracepoints give it.
            inode: of the file.
            size: bytes.
            extents: how it is counted.

        Raises:
            LlmtracedError: the maps are full.
        """
        n_bytes, n_pages = len(extents.byte_starts), len(extents.page_starts)
        words = -(-size // PAGE // 64) + 1
        bounds = self._bound_space.take(n_bytes + n_pages)
        if bounds is None:
            raise LlmtracedError(f"no room for {n_bytes + n_pages} more extents of {self.sizes.bounds}", UNSUPPORTED)
        seen = self._seen_space.take(words)
        self._bounds[bounds : bounds + n_bytes] = extents.byte_starts
        self._bounds[bounds + n_bytes : bounds + n_bytes + n_pages] = extents.page_starts
        self._counters[bounds : bounds + n_bytes + n_pages] = np.zeros(1, COUNTER)
        if seen is None:
            log.warning("no room to tell re-reads in the metrics of %d more bytes of models (the trace has them)", size)
            seen, words = 0, 0
        self._seen[seen : seen + words] = 0
        pages = -(-size // PAGE) if words else 0
        self._files[number] = (slot, bounds, n_bytes, bounds + n_bytes, n_pages, seen, pages, words)
        self._file_ids[number] = struct.pack("<QQ", inode, device)
        self._file_slots[number] = slot
        identity = self._file_ids[number]
        self._sharers.setdefault(identity, []).append(number)
        self._share(identity)

    def _share(self, identity: bytes) -> None:
        """Tell the kernel who has which number for a file; the first also gets what other processes do to it."""
        sharers = self._sharers[identity]
        for number in sharers:
            self._aliases[self._file_slots[number], sharers[0]] = number + 1
        kernel.map_update(self.programs.maps["file_ids"], identity, struct.pack("<I", sharers[0]))

    def remove_file(self, number: int) -> None:
        """Stop counting a file for its process."""
        identity, slot = self._file_ids.pop(number), self._file_slots[number]
        self._sharers[identity].remove(number)
        if self._sharers[identity]:
            self._share(identity)
        else:
            kernel.map_delete(self.programs.maps["file_ids"], identity)
            del self._sharers[identity]
        self._aliases[slot] = np.where(self._aliases[slot] == number + 1, 0, self._aliases[slot])
        self._aliases[:, number] = 0
        del self._file_slots[number]
        entry = self._files[number]
        self._bound_space.give(int(entry["byte_base"]), int(entry["byte_count"] + entry["page_count"]))
        if entry["spare"]:
            self._seen_space.give(int(entry["seen_base"]), int(entry["spare"]))

    def counters(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of a file's totals, dtype shared.COUNTER: by byte extent (faults), by page segment (pages).

        Pages are in the totals once their run has ended: :meth:`flush` before.
        """
        entry = self._files[number]
        first, middle = int(entry["byte_base"]), int(entry["page_base"])
        last = middle + int(entry["page_count"])
        return self._counters[first:middle].copy(), self._counters[middle:last].copy()

    # --- events and accounts ---------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The account's current generation."""
        return self._epoch

    @property
    def unplaced(self) -> int:
        """Pages in no per-tensor total."""
        return int(self._config[_UNPLACED])

    def next_epoch(self) -> int:
        """Begin a new generation, with an empty account, and return the one before."""
        before = self._epoch
        self._epoch = (before + 1) % EPOCHS
        self._accounts[:, :, self._epoch] = np.zeros(1, ACCOUNT)
        self.slots["epoch"] = self._epoch
        return before

    def account(self, slot: int, epoch: int) -> NDArray[Any]:
        """Return what the kernel counted and dropped: dtype shared.ACCOUNT, one for each schema.Probe."""
        cells = self._accounts[:, slot, epoch]
        total = np.zeros(len(Probe), ACCOUNT)
        total["counted"], total["dropped"] = cells["counted"].sum(axis=0), cells["dropped"].sum(axis=0)
        return total

    def flush(self) -> None:
        """Have every CPU send the run of pages that it is collecting."""
        program = self.programs.programs.get("on_flush")
        if program is None:
            return
        for cpu in kernel.online_cpus():
            for _ in range(100):
                try:
                    if kernel.run_on_cpu(program, cpu) == 0:
                        break
                except OSError as error:  # the CPU went offline: its run is sent when it comes back
                    log.debug("flush on CPU %d: %s", cpu, error)
                    break

    def read(self) -> list[NDArray[Any]]:
        """Return all records that are ready, dtype schema.EVENT, in batches."""
        batches = []
        room = self.ring.capacity * 2  # a producer that is faster than we are does not keep us here for ever
        while room > 0:
            batch = self.ring.read()
            if not len(batch):
                break
            batches.append(batch)
            room -= len(batch)
        batches += self._left
        self._left = []
        return batches

    def misses(self) -> dict[str, int]:
        """Return how often the kernel skipped each program (nested in another on the same CPU)."""
        return {name: kernel.program_misses(fd) for name, fd in self.programs.programs.items()}

    def close(self) -> None:
        """Detach and free everything."""
        self.detach()
        self.ring.close()
        self.programs.close()
