"""A mixture's experts: fetch what is chosen the moment that can be known, keep the hot ones. Standard library only.

What every token uses is pinned (:mod:`llmtraced.prefetch.work`). For the experts there is the rest of the memory:
:mod:`llmtraced.prefetch.experts` decides which are kept. An expert is read exactly, from its slices' first page to
their last, and before the server touches it: a fault on a page that is not there makes the kernel read as much as the
file's readahead says, which may be megabytes of other experts. So each layer's choice is guessed, by what is asked for
of :data:`llmtraced.prefetch.guesses.SOURCES`:

1. when the router of the layer one or two before it begins: its input, put through this layer's router, says most of
   the choice; so does, much less, what the past says (the last tokens, or what the layer before has chosen);
2. when its own attention begins: the same with the input of that says almost all of it;
3. when its own router begins: its input says the choice itself, some operators ahead.

When its first merged matrix is used, that is the server's own word: what was missed is read by it, and guesses are
measured by it.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llmtraced.prefetch.clock import EXPERTS, INPUT, choices
from llmtraced.prefetch.experts import ABSENT, HERE, Residency
from llmtraced.prefetch.guesses import SURE, CoActivation, LastTokens, Margin, Tally
from llmtraced.prefetch.movers import Movers
from llmtraced.prefetch.pages import PAGE, Pages, copied
from llmtraced.prefetch.router import Router
from llmtraced.prefetch.slices import Slices

__all__ = ["Mixture"]

_ROWS = 8  # tokens of a batch whose choices are worked out
_RESERVE_LAYERS = 1  # of experts that are all read: so much room is made ahead
_PIECES = 64  # speculative slices that may wait: more would only be late
_STALE_NS = 5_000_000  # a tick that is taken up so late is of the past
_STRAY_BYTES = 2 << 20
_SWEEPS = 8  # and all layers have been looked at
_JUDGED = 16  # experts at a tick, of what was looked at
_FINE = "its experts are read by the page here; where they could come in larger ones, see docs/prefetching.md"
_AROUND = 8 << 20  # on each side of a fault that was too early: what the kernel reads, at readahead 8192 KB


class _Layer:
    """One layer of experts: what the launcher found out."""

    def __init__(self, number: int, told: Mapping[str, Any], pages: Sequence[Pages]) -> None:
        self.number = number
        self.router_mark: int | None = told["router_mark"]
        self.experts_mark: int | None = told["experts_mark"]
        self.slices = [tuple(one) for one in told["slices"]]  # file, offset of the first expert, bytes of each
        self.nbytes = sum(size for _, _, size in self.slices)
        blocks = sum(pages[file].block for file, _, _ in self.slices)
        self.footprint, self.edges = self.nbytes + blocks, 2 * blocks  # of one that begins anywhere
        self.attention_mark: int | None = told["attention_mark"]
        router = told["router"]
        self.weights = pages[router[0]].address(router[1]) if router else 0
        self.norm, self.attention_norm = _values(told["norm"], pages), _values(told["attention_norm"], pages)
        self.bias, self.correction = _values(told["bias"], pages), _values(told["correction"], pages)


def _values(told: Sequence[int] | None, pages: Sequence[Pages]) -> array[float] | None:
    if told is None:
        return None
    file, offset, length = told
    return array("f", (ctypes.c_float * length).from_address(pages[file].address(offset)))


def _ratio(norm: array[float] | None, like: array[float] | None) -> array[float] | None:
    """Return what the result of one norm is multiplied with to be that of another."""
    if norm is None or like is None:
        return None
    return array("f", (b / a if a else 0.0 for a, b in zip(norm, like, strict=True)))


class Mixture:
    """Manages the experts of one server's model.

    Args:
        pid: the server.
        pages: of each file of the model.
        told: ``routing.mixture``: layers in order, experts and how many are used, length of the routers' input.
        predict: what to guess by, of guesses.SOURCES.
        say: where to tell what is done.
        large: whether to read experts in large folios, if the kernel does that (:mod:`llmtraced.prefetch.folios`).

    Attributes:
        total: bytes of all experts.
        residency: which are in memory.
        seen: experts chosen.
        tallies: how good the guesses are, by source.
    """

    def __init__(
        self,
        pid: int,
        pages: list[Pages],
        told: Mapping[str, Any],
        predict: Collection[str],
        say: Callable[[str], None],
        *,
        large: bool = False,
    ) -> None:
        self.pid, self.pages, self.say = pid, pages, say
        self.layers = [_Layer(i, one, pages) for i, one in enumerate(told["layers"])]
        self.n_experts: int = told["n_experts"]
        self.n_used: int = told["n_used"]
        self.total = sum(layer.nbytes * self.n_experts for layer in self.layers)
        self.slices = Slices(pages, [layer.slices for layer in self.layers], self.n_experts, large=large)
        if not self.slices.large and all(one.block == PAGE for one in pages):
            say(_FINE)
        self.router: Router | None = None
        if told["code"] is not None:
            self.router = Router(
                told["code"], told["n"], self.n_experts, self.n_used, sigmoid=told["sigmoid"], groups=told["groups"]
            )
        self._ones = array("f", [1.0] * told["n"])
        layers = self.layers
        self._before = [_ratio(layer.attention_norm, layer.norm) or self._ones for layer in layers]
        self._after = [
            [
                (source, layers[i + far], _ratio(layer.norm, layers[i + far].norm) or self._ones)
                for far, source in ((1, "router-1"), (2, "router-2"))
                if source in predict and i + far < len(layers)
            ]
            for i, layer in enumerate(layers)
        ]
        shape = self.n_experts, self.n_used
        self._last = [LastTokens(*shape) for _ in layers] if "last" in predict else []
        self._with = [CoActivation(*shape) for _ in layers[1:]] if "coactivation" in predict else []
        self._before_it: set[int] = set()  # what the layer before has used
        self.tallies = {source: Tally() for source in predict}
        self._margins = {source: Margin(SURE[source]) for source in predict if source in SURE}
        self._input = (ctypes.c_float * (told["n"] * _ROWS))()
        self._by_mark = {
            mark: layer
            for layer in self.layers
            for mark in (layer.attention_mark, layer.router_mark, layer.experts_mark)
            if mark is not None
        }
        nbytes = [layer.nbytes for layer in self.layers for _ in range(self.n_experts)]
        self.residency = Residency(nbytes, self.n_experts, 0)
        self.movers = Movers(self.slices, self.residency)
        self.seen = self.surprises = self.checked = 0
        self.read_bytes = self.large_bytes = self.failed = self.lost = self.stale = 0
        self._chosen: dict[int, set[int]] = {}  # of this token, by layer: what its router's input said
        self._sure: set[int] = set()  # here, as of this token
        self._left: dict[int, int] = {}  # slices of an expert that are still to be read
        self._late: set[int] = set()  # of this token
        self._swept = 0

    # --- what the server does --------------------------------------------------------------------------------------

    def wakes(self) -> dict[int, int]:
        """Return the marks that the clock should tell, and what of them."""
        found = {layer.experts_mark: EXPERTS for layer in self.layers if layer.experts_mark is not None}
        if self.router is not None:
            inputs: list[int | None] = []
            if "attention" in self.tallies:
                inputs += [layer.attention_mark for layer in self.layers]
            if {"router", "router-1", "router-2"} & set(self.tallies):
                inputs += [layer.router_mark for layer in self.layers]
            found |= dict.fromkeys((mark for mark in inputs if mark is not None), INPUT)
        return found

    def ended(self, read: int) -> None:
        """Take in that a graph has ended, in which the server itself has read so many bytes.

        It is what its readahead took for good: megabytes around each fault. They must go before memory is full of them.
        """
        if read > self.residency.capacity // _SWEEPS:  # a prompt, for one
            self.movers.doubt(range(len(self.residency.state)))
        elif read > _STRAY_BYTES:
            self.sweep()
            self.movers.doubt({one for late in self._late for one in self._around(late)})
        self._late.clear()

    def begin(self) -> None:
        """Take in that a graph begins."""
        self.residency.token += 1
        for source, tally in self.tallies.items():
            if source != "last":  # which guesses a token ahead
                tally.forget()
        self._chosen.clear()
        self._before_it = set()
        self._sure.clear()

    def other(self) -> None:
        """Take in that the graph that began is another model's: a draft's tokens do not age what ours have used."""
        self.residency.token -= 1

    def tick(self, ts: int, mark: int, value: int, told: bytes) -> bool:
        """Take in that the server has come to a mark; return whether it was one of ours."""
        layer = self._by_mark.get(mark)
        if layer is None:
            return False
        self.collect()
        fresh = time.monotonic_ns() - ts < _STALE_NS
        if mark == layer.experts_mark:
            self._used(layer, choices(value, told), ts, fresh=fresh)
            return True
        if not fresh:  # the server is past it: what is ahead of it matters
            self.stale += 1
            return True
        inputs = self._inputs(value & (1 << 48) - 1, value >> 48, told)
        if not inputs:
            return True
        if mark == layer.attention_mark:
            self._guess("attention", layer, self._choose("attention", layer, inputs, self._before[layer.number]), ts)
            return True
        if "router" in self.tallies:
            chosen = self._chosen[layer.number] = self._choose("router", layer, inputs, self._ones)
            self._guess("router", layer, chosen, ts)
        for source, later, scale in self._after[layer.number]:
            if self.movers.early > _PIECES:
                break
            self._guess(source, later, self._choose(source, later, inputs, scale), ts, early=True)
        self._make_room()
        return True

    def _guess(self, source: str, layer: _Layer, experts: set[int], ts: int, *, early: bool = False) -> None:
        """Have what will probably be chosen read, of which ``early`` says that nothing else may wait for it."""
        numbers = self._numbers(layer, experts)
        if not early:
            self.movers.hasten(numbers)
        read = self.residency.expect(numbers)
        self._fetch(read, early=early)
        sizes = {one % self.n_experts: self.residency.nbytes[one] for one in read}
        self.tallies[source].made(layer.number, experts, sizes, ts)

    def _inputs(self, address: int, rows: int, values: bytes) -> list[int]:
        """Take in the input of a router, or what is like it; return where its rows are now."""
        router = self.router
        if router is None or not 0 < rows <= _ROWS:
            return []
        size = 4 * router.n
        if len(values) >= size:
            ctypes.memmove(self._input, values, size)
            return [ctypes.addressof(self._input)]
        if not copied(self.pid, address, self._input, size * rows):
            return []
        return [ctypes.addressof(self._input) + size * row for row in range(rows)]

    def _choose(self, source: str, layer: _Layer, inputs: list[int], scale: array[float]) -> set[int]:
        """Return the experts that the layer's router chooses from inputs, as far as the source is sure."""
        router, margin = self.router, self._margins.get(source)
        assert router is not None
        at, least, found = scale.buffer_info()[0], margin.least if margin else 0.0, set()
        for x in inputs:
            found.update(router.choose(layer.weights, x, at, layer.bias, layer.correction, least))
            if margin:
                margin.begin(router.gap)
        return found

    def _used(self, layer: _Layer, rows: list[tuple[int, ...]], ts: int, *, fresh: bool) -> None:
        """Take in what the server says that it uses."""
        if not rows:
            return  # a prompt uses nearly all of them, one after the other: that is what readahead is for
        used = {e for row in rows for e in row if 0 <= e < self.n_experts}
        known = self._chosen.get(layer.number)
        if known is not None and len(rows) == 1:  # of more rows, the input may have been overwritten when it was read
            self.surprises += len(used - known)
            self.checked += len(used)
        numbers = self._numbers(layer, used)
        self._late.update(one for one in numbers if self.residency.state[one] != HERE)
        read = self.residency.use(layer.number, numbers)
        if fresh:
            self._fetch(read)
        else:
            for one in read:
                self.residency.gone(one)
        self.seen += len(used)
        for source, tally in self.tallies.items():
            right, wrong = tally.judge(layer.number, used, ts)
            if source in self._margins:
                self._margins[source].learn(right, wrong)
        self._look_back(layer, used, ts)
        self._make_room()

    def _look_back(self, layer: _Layer, used: set[int], ts: int) -> None:
        """Guess by what was used so far."""
        at = layer.number
        if self._last:
            self._guess("last", layer, self._last[at].after(used), ts, early=True)
        if self._with:
            if at:
                self._with[at - 1].learn(self._before_it, used)
            self._before_it = used
            if at < len(self._with):
                self._guess("coactivation", self.layers[at + 1], self._with[at].after(used), ts, early=True)

    def _numbers(self, layer: _Layer, experts: set[int]) -> list[int]:
        """Return the experts' numbers; those held to be here are looked at once a token, for nothing is locked."""
        numbers = [layer.number * self.n_experts + e for e in sorted(experts)]
        for one in numbers:
            if self.residency.state[one] == HERE and one not in self._sure:
                self._sure.add(one)
                if not self.slices.whole(one):
                    self.residency.gone(one)
                    self.lost += 1
        return numbers

    # --- reading and giving back -----------------------------------------------------------------------------------

    def _fetch(self, experts: list[int], *, early: bool = False) -> None:
        for one in experts:
            self._left[one] = self.slices.count(one)
        self.movers.fetch(experts, early=early)

    def _make_room(self) -> None:
        """Have the coldest experts given back."""
        reserve = _RESERVE_LAYERS * self.n_used * max(layer.nbytes for layer in self.layers)
        go = self.residency.surplus(min(reserve, self.residency.capacity // 4))
        if go:
            self.movers.leave(go)

    def collect(self) -> None:
        """Take in what has been read, and what was looked at."""
        read, seen = self.movers.read, self.movers.seen
        for _ in range(min(len(seen), _JUDGED)):
            self._judge(*seen.popleft())
        while read:
            one, nbytes, large, failed = read.popleft()
            self.read_bytes += nbytes
            self.large_bytes += large
            self.failed += failed
            self._left[one] = self._left.get(one, 1) - 1
            if not self._left[one]:
                del self._left[one]
                self.residency.arrived(one)

    # --- memory ----------------------------------------------------------------------------------------------------

    def hold(self, capacity: int) -> None:
        """Keep experts in so many bytes of memory from now on: whole blocks are read, of which others have parts."""
        footprint = self.n_experts * sum(layer.footprint for layer in self.layers)
        capacity = max(capacity - sum(self.slices.kept), 0) * self.total // footprint
        self.residency.capacity = capacity
        if self.movers.start():
            for one in range(len(self.residency.state)):
                self._judge(one, self.slices.there(one))
        self._make_room()
        self.say(f"keeping {capacity >> 20} of {self.total >> 20} MB of experts")

    def sweep(self) -> None:
        """Have some of the layers compared with what is in memory, the next time the next ones."""
        if self.movers.looking:
            return  # it does not keep up
        first, count = self._swept, -(-len(self.layers) // _SWEEPS)
        self._swept = (first + count) % len(self.layers)
        last = min(first + count, len(self.layers))
        self.movers.doubt(range(first * self.n_experts, last * self.n_experts))

    def _around(self, one: int) -> range:
        """Return the experts of which the kernel may have read something when one was used too early."""
        layer = self.layers[one // self.n_experts]
        far = -(-_AROUND // max(1, min(size for _, _, size in layer.slices)))
        first = layer.number * self.n_experts
        return range(max(one - far, first), min(one + far + 1, first + self.n_experts))

    def _judge(self, one: int, there: int) -> None:
        """Take in how many bytes of an expert are in memory."""
        state, layer, kept = self.residency.state[one], self.layers[one // self.n_experts], self.slices.kept[one]
        room = self.residency.capacity - self.residency.held
        if state == HERE and there <= kept:
            if self.slices.there(one) > kept:
                return  # it has come since it was looked at
            self.residency.gone(one)
            self.movers.leave([one], anew=True)
        elif state == ABSENT and layer.nbytes <= min(there, room):
            self.residency.adopt([one])
        elif state == ABSENT and not kept <= there <= kept + layer.edges:
            self.movers.leave([one], anew=True)

    def relieve(self, nbytes: int) -> int:
        """Give up experts of that many bytes, the coldest first; return how many bytes will be free."""
        before = self.residency.held
        self.residency.capacity = max(min(self.residency.capacity, before) - nbytes, 0)
        self._make_room()
        return before - self.residency.held

    def release(self) -> None:
        """Stop; what is in memory stays there until the kernel wants it back."""
        self.movers.close()

    def summary(self) -> dict[str, Any]:
        """Return what was done so far; docs/prefetching.md explains the fields."""
        self.collect()
        r = self.residency
        asked = r.used + r.late + r.missed
        missing = r.missed + sum(tally.useful for tally in self.tallies.values())
        return {
            "capacity_bytes": r.capacity,
            "total_bytes": self.total,
            "held_bytes": r.held,
            "chosen": self.seen,
            "used_bytes": r.used,
            "late_bytes": r.late,
            "missed_bytes": r.missed,
            "missing_bytes": missing,
            "tokens": r.token,
            "wasted_bytes": r.wasted,
            "hit_share": r.used / asked if asked else None,
            "read_bytes": self.read_bytes,
            "large_bytes": self.large_bytes,
            "failed_reads": self.failed,
            "lost": self.lost,
            "stale_ticks": self.stale,
            "predictors": {source: tally.summary(missing) for source, tally in self.tallies.items()},
            "router_checked": self.checked,
            "router_surprises": self.surprises,
            "hottest": [[one // self.n_experts, one % self.n_experts] for one in r.hottest()[:32]],
        }
