"""Resolver and extents against brute force: the owner of every single byte, written down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from fakes import model, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmtraced.gguf_map import Model, Tensor
from llmtraced.resolve import Resolver
from llmtraced.schema import PAGE

Owner = tuple[int, int, int, int]  # tensor, expert, model, shard


@dataclass
class World:
    """Models, file numbers, and for each file the owner of every byte."""

    resolver: Resolver
    owners: dict[int, list[Owner]]
    sizes: dict[int, int]  # of tensors that are in a known file

    def owner(self, file: int, offset: int) -> Owner:
        known = self.owners[file]
        return known[offset] if offset < len(known) else (-1, -1, *known[-1][2:])


# Sizes around nothing, a few bytes, a page, and several; gaps alike, often none.
_SIZE = st.one_of(st.integers(0, 80), st.integers(PAGE - 2, PAGE + 2), st.integers(0, 3 * PAGE))
_GAP = st.one_of(st.just(0), st.integers(0, 64), st.integers(0, 2 * PAGE), st.just(PAGE))
_EXPERTS = st.one_of(st.just(0), st.integers(1, 5))
_SHARD = st.lists(st.tuples(_GAP, _SIZE, _EXPERTS), max_size=6)
_MODELS = st.lists(st.lists(_SHARD, min_size=1, max_size=3), min_size=1, max_size=3)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    models: dict[str, Model] = {}
    for number, shards in enumerate(draw(_MODELS)):
        tensors: list[Tensor] = []
        for shard, parts in enumerate(shards):
            at = 0
            for i, (gap, size, experts) in enumerate(parts):
                size -= size % max(experts, 1)
                at += gap
                tensors.append(tensor(f"{shard}.{i}", at, size, shard=shard, experts=experts))
                at += size
        models[f"m{number}"] = model(tensors, len(shards))
    places = [(label, n) for label, m in models.items() for n in range(len(m.shards))]
    numbers = draw(st.permutations(range(64)))[: len(places)]
    absent = draw(st.sets(st.sampled_from(places), max_size=1)) if len(places) > 1 else set()
    files = {place: n for place, n in zip(places, numbers, strict=True) if place not in absent}
    owners: dict[int, list[Owner]] = {}
    sizes: dict[int, int] = {}
    base = 0
    for number, (label, m) in enumerate(models.items()):
        for (name, shard), file in files.items():
            if name != label:
                continue
            nobody = (-1, -1, number, shard)
            mine = owners[file] = [nobody] * (m.shards[shard].size + 1)
            for i, t in enumerate(m.tensors):
                if t.shard != shard:
                    continue
                sizes[base + i] = t.size
                for byte in range(t.size):
                    expert = byte // t.expert_bytes if t.n_experts else -1
                    mine[t.offset + byte] = (base + i, expert, number, shard)
        base += len(m.tensors)
    return World(Resolver(models, files), owners, sizes)


def columns(resolver: Resolver, piece: NDArray[np.int64]) -> list[Owner]:
    parts = (resolver.tensor, resolver.expert, resolver.model, resolver.shard)
    return [tuple(int(v) for v in row) for row in zip(*(part[piece] for part in parts), strict=True)]  # type: ignore[misc]


def u64(values: list[int]) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_every_border_and_any_byte_resolves(world: World, data: st.DataObject) -> None:
    asked: list[tuple[int, int]] = []
    for file, owners in world.owners.items():
        borders = [i for i in range(1, len(owners)) if owners[i] != owners[i - 1]]
        near = {0, len(owners) + PAGE, *(b + d for b in borders for d in (-1, 0, 1))}
        near |= set(data.draw(st.lists(st.integers(0, len(owners) + 99), max_size=5)))
        asked += [(file, offset) for offset in near]
    asked = data.draw(st.permutations(asked))
    piece = world.resolver.at(u64([f for f, _ in asked]), u64([o for _, o in asked]))
    assert columns(world.resolver, piece) == [world.owner(f, o) for f, o in asked]


@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_split_gives_every_byte_to_its_owner_once(world: World, data: st.DataObject) -> None:
    stretch = st.sampled_from(sorted(world.owners)).flatmap(
        lambda f: st.tuples(st.just(f), st.integers(0, len(world.owners[f]) + 9), st.integers(1, 4 * PAGE))
    )
    asked = data.draw(st.lists(stretch, max_size=8))
    rows = world.resolver.split(*(u64([s[i] for s in asked]) for i in range(3)))
    assert int(rows.bytes.sum()) == sum(size for _, _, size in asked)
    assert (rows.bytes > 0).all()
    owned = columns(world.resolver, rows.piece)
    got: list[list[tuple[int, int, Owner]]] = [[] for _ in asked]
    for source, offset, size, owner in zip(rows.source, rows.offset, rows.bytes, owned, strict=True):
        got[source].append((int(offset), int(size), owner))
    assert sorted(rows.source.tolist()) == rows.source.tolist(), "rows follow their stretches"
    for (file, offset, size), parts in zip(asked, got, strict=True):
        expected: list[tuple[int, int, Owner]] = []
        for byte in range(offset, offset + size):
            owner = world.owner(file, byte)
            if expected and expected[-1][2] == owner:
                start, n, _ = expected[-1]
                expected[-1] = start, n + 1, owner
            else:
                expected.append((byte, 1, owner))
        assert parts == expected


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_extents_count_every_byte_and_every_page(world: World) -> None:
    from_bytes: Counter[int] = Counter()
    from_pages: Counter[int] = Counter()
    for file, owners in world.owners.items():
        extents = world.resolver.extents(file)
        assert extents.byte_starts[0] == 0
        assert extents.page_starts[0] == 0
        for starts in (extents.byte_starts, extents.page_starts):
            assert (np.diff(starts.astype(np.int64)) > 0).all()
        n_pages = -(-len(owners) // PAGE)
        at = np.searchsorted(extents.byte_starts, np.arange(n_pages * PAGE, dtype=np.uint64), side="right") - 1
        found = extents.byte_tensor[at]
        assert found.tolist() == [world.owner(file, byte)[0] for byte in range(n_pages * PAGE)]
        from_bytes.update(found.tolist())
        segments = np.searchsorted(extents.page_starts, np.arange(n_pages, dtype=np.uint64), side="right") - 1
        for page, segment in enumerate(segments):
            share = extents.page_bytes[segment]
            assert sum(n for _, n in share) == PAGE
            real = Counter(found[page * PAGE : (page + 1) * PAGE].tolist())
            mine: Counter[int] = Counter()
            for number, n in share:
                mine[number] += n
            assert mine == real
            from_pages.update(mine)
    assert from_bytes == from_pages
    assert {t: n for t, n in from_pages.items() if t >= 0} == {t: n for t, n in world.sizes.items() if n}


def test_known_answers() -> None:
    tensors = [
        tensor("embd", 64, 100),
        tensor("empty", 164, 0),
        tensor("exps", 4096, 8192, experts=4),
        tensor("norm", 12288, 10),
    ]
    resolver = Resolver({"a": model(tensors)}, {("a", 0): 5})
    starts = [0, 63, 64, 163, 164, 4095, 4096, 6143, 6144, 12287, 12288, 12297, 12298, 1 << 40]
    piece = resolver.at(np.full(len(starts), 5, np.uint64), u64(starts))
    assert resolver.tensor[piece].tolist() == [-1, -1, 0, 0, -1, -1, 2, 2, 2, 2, 3, 3, -1, -1]
    assert resolver.expert[piece].tolist() == [-1, -1, -1, -1, -1, -1, 0, 0, 1, 3, -1, -1, -1, -1]
    assert resolver.names == ["embd", "empty", "exps", "norm"]
    extents = resolver.extents(5)
    assert extents.byte_starts.tolist() == [0, 64, 164, 4096, 12288, 12298]
    assert extents.byte_tensor.tolist() == [-1, 0, -1, 2, 3, -1]
    assert extents.page_starts.tolist() == [0, 1, 3, 4]
    assert extents.page_bytes == [[(-1, 64), (0, 100), (-1, 3932)], [(2, 4096)], [(3, 10), (-1, 4086)], [(-1, 4096)]]
    rows = resolver.split(u64([5, 5]), u64([0, 8192]), u64([8192, 1]))
    assert rows.source.tolist() == [0, 0, 0, 0, 0, 1]
    assert rows.offset.tolist() == [0, 64, 164, 4096, 6144, 8192]
    assert rows.bytes.tolist() == [64, 100, 3932, 2048, 2048, 1]


def test_file_numbers_and_large_offsets_do_not_mix() -> None:
    big = 1 << 44
    one = model([tensor("a", 0, 10), tensor("b", big, 4096, shard=1)], 2)
    two = model([tensor("a", 5, 10)])
    resolver = Resolver({"one": one, "two": two}, {("one", 0): 63, ("one", 1): 0, ("two", 0): 7})
    piece = resolver.at(u64([63, 0, 0, 7, 7, 63]), u64([9, big, big - 1, 4, 5, 10]))
    assert resolver.tensor[piece].tolist() == [0, 1, -1, -1, 2, -1]
    assert resolver.model[piece].tolist() == [0, 0, 0, 1, 1, 0]
    assert resolver.shard[piece].tolist() == [0, 1, 1, 0, 0, 0]
    assert resolver.model_of == [0, 0, 1]


def test_nothing_to_resolve() -> None:
    empty = u64([])
    for resolver in (
        Resolver({}, {}),
        Resolver({"a": model([])}, {}),
        Resolver({"a": model([])}, {("a", 0): 0}),
        Resolver({"a": model([tensor("t", 0, 9)])}, {}),
    ):
        assert len(resolver.at(empty, empty)) == 0
        rows = resolver.split(empty, empty, empty)
        assert [len(c) for c in (rows.source, rows.offset, rows.bytes, rows.piece)] == [0, 0, 0, 0]
    nothing = Resolver({"a": model([])}, {("a", 0): 0})
    assert nothing.extents(0).page_bytes == [[(-1, PAGE)]]
    assert nothing.tensor[nothing.at(u64([0]), u64([123]))].tolist() == [-1]


def test_the_maps_have_room_for_a_model() -> None:
    """An extent is an entry of the map ``bounds``: at most six a tensor with gaps around it, two without."""
    n = 500
    spaced = Resolver({"a": model([tensor(str(i), 4096 + i * 9000, 8001) for i in range(n)])}, {("a", 0): 0}).extents(0)
    assert len(spaced.byte_starts) + len(spaced.page_starts) <= 6 * n + 2
    dense = Resolver({"a": model([tensor(str(i), i * 8192, 8192) for i in range(n)])}, {("a", 0): 0}).extents(0)
    assert len(dense.byte_starts) + len(dense.page_starts) <= 2 * n + 2
