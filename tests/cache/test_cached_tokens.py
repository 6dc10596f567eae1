"""Dropping tokens: the right ones stay, their memory goes back to the pool, and nobody else's changes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from token_rows import grow
from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import get_kernels

LAYERS, HEADS, DIM, BLOCK = 3, 2, 8, 4
KERNELS = get_kernels("torch")


class Rig:
    """A pool, and sequences whose keys say whose they are, in their first four numbers."""

    def __init__(self, num_blocks: int = 64, dtype: torch.dtype = torch.float32) -> None:
        self.kv = KVCache(
            LAYERS,
            HEADS,
            DIM,
            num_blocks=num_blocks,
            block_size=BLOCK,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.pool = BlockPool(num_blocks, BLOCK)

    def sequence(self) -> CachedTokens:
        return CachedTokens(self.kv, BlockTable(self.pool), KERNELS)

    def append(self, cached: CachedTokens, name: int, tokens: range | list[int]) -> None:
        first = grow(self.kv, cached, len(tokens))
        for layer in range(LAYERS):
            keys = torch.stack([marks(layer, name, t) for t in tokens])
            self.kv.write(layer, cached.slots()[first:], keys, -keys)


def marks(layer: int, name: int, token: int) -> Tensor:
    """`[HEADS, DIM]`"""
    each = [[layer + 1, head + 1, name, token, 0, 0, 0, 127] for head in range(HEADS)]
    return torch.tensor(each, dtype=torch.float32)


def tokens_in(cached: CachedTokens, name: int) -> list[list[list[int]]]:
    """By layer and head; every other mark must be the sequence's own."""
    found = []
    for layer in range(LAYERS):
        found.append([])
        for head in range(HEADS):
            cells = cached.cells(layer)[head]
            if cached.ragged is not None:
                cells = torch.cat((cached.ragged.cells[layer][head], cells))
            keys, values = cached.kv.read_cells(cells, torch.float32)
            assert torch.equal(values, -keys)
            assert (keys[:, :3] == torch.tensor([layer + 1, head + 1, name])).all()
            found[-1].append([round(float(t)) for t in keys[:, 3]])
    return found


def pick(rng: random.Random, length: int, n: int) -> Tensor:
    return torch.tensor(sorted(rng.sample(range(length), n)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_each_layer_and_head_keeps_its_own(dtype: torch.dtype) -> None:
    rig, rng = Rig(dtype=dtype), random.Random(0)
    cached = rig.sequence()
    rig.append(cached, 7, range(30))
    index = [torch.stack([pick(rng, 30, 9) for _ in range(HEADS)]) for _ in range(LAYERS)]
    cached.keep(index)
    assert tokens_in(cached, 7) == [heads.tolist() for heads in index]
    assert (cached.length, cached.dropped, rig.pool.num_used) == (9, 21, 3)
    rig.append(cached, 7, range(30, 33))
    assert [heads[0][-3:] for heads in tokens_in(cached, 7)] == [[30, 31, 32]] * LAYERS
    cached.clear()
    assert rig.pool.num_used == 0


def test_uneven_tokens_are_packed_and_read_with_those_that_follow() -> None:
    rig, rng = Rig(), random.Random(1)
    cached = rig.sequence()
    rig.append(cached, 3, range(50))
    index = [[pick(rng, 50, rng.randint(1, 20)) for _ in range(HEADS)] for _ in range(LAYERS)]
    total = sum(len(at) for heads in index for at in heads)
    cached.keep_ragged(index)
    assert rig.pool.num_used == -(-total // (LAYERS * HEADS * BLOCK))
    rig.append(cached, 3, range(50, 55))
    expected = [[[*at.tolist(), 50, 51, 52, 53, 54] for at in heads] for heads in index]
    assert tokens_in(cached, 3) == expected
    assert cached.computed == 55
    q = torch.randn(2, HEADS * 2, DIM)
    cells = [torch.cat((cached.ragged.cells[1][h], cached.cells(1)[h])) for h in range(HEADS)]
    assert torch.equal(cached.attend(1, q), KERNELS.attention_at(q, rig.kv, cells))
    cached.clear()
    assert rig.pool.num_used == 0


def test_the_last_token_takes_the_place_of_another() -> None:
    rig = Rig()
    cached = rig.sequence()
    rig.append(cached, 5, range(9))
    victims = torch.tensor([[0, 3], [8, 1], [7, 2]])
    cached.overwrite(victims)
    expected = [
        [[8 if t == victim else t for t in range(8)] for victim in heads.tolist()] for heads in victims
    ]
    assert tokens_in(cached, 5) == expected
    assert (cached.length, cached.dropped) == (8, 1)


def test_shared_blocks_are_left_as_they_are() -> None:
    rig = Rig()
    one = rig.sequence()
    rig.append(one, 4, range(20))
    table = one.table.fork()
    other = one.fork(table)
    everything = torch.arange(20).expand(HEADS, -1)
    one.keep([everything[:, 8:]] * LAYERS)
    one.overwrite(torch.zeros(LAYERS, HEADS, dtype=torch.int64))
    assert tokens_in(other, 4) == [[list(range(20))] * HEADS] * LAYERS
    other.overwrite(torch.zeros(LAYERS, HEADS, dtype=torch.int64))
    assert tokens_in(other, 4)[0][0][:2] == [19, 1]
    assert tokens_in(one, 4)[0][0][:2] == [19, 9]
    one.clear()
    other.clear()
    assert rig.pool.num_used == 0


@pytest.mark.parametrize("ragged", [False, True])
def test_a_full_pool_is_no_obstacle_to_one_that_owns_its_blocks(ragged: bool) -> None:
    """What is kept goes where something else of it lay; prefixes stay known where nothing was written."""
    rig = Rig(num_blocks=5)
    cached = rig.sequence()
    rig.append(cached, 2, range(20))
    for i, block in enumerate(cached.table.blocks):
        rig.pool.publish(block, bytes([i]))
    odd, late = torch.arange(1, 20, 2), torch.arange(8, 20)
    if ragged:
        cached.keep_ragged([[odd, late]] * LAYERS)
        assert tokens_in(cached, 2) == [[odd.tolist(), late.tolist()]] * LAYERS
    else:
        cached.keep([odd.expand(HEADS, -1)] * LAYERS)
        assert tokens_in(cached, 2) == [[odd.tolist()] * HEADS] * LAYERS
    assert rig.pool.num_used == 3
    assert [rig.pool.holds(bytes([i])) for i in range(5)] == [True, True, False, False, False]
    rig.pool.check()


@pytest.mark.parametrize("published", [False, True])
def test_the_pool_never_holds_what_is_kept_twice(published: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, used = Rig(), []
    cached = rig.sequence()
    rig.append(cached, 2, range(40))
    if published:
        for i, block in enumerate(cached.table.blocks):
            rig.pool.publish(block, bytes([i]))
    before, plain = cached.table.blocks, rig.pool.allocate

    def watched(after: int | None = None, room: int = 1) -> int:
        block = plain(after, room)
        used.append(rig.pool.num_used)
        return block

    monkeypatch.setattr(rig.pool, "allocate", watched)
    cached.keep([torch.arange(20, 40).expand(HEADS, -1)] * LAYERS)
    assert used == [1, 2, 3, 4, 5]
    if published:  # there is room beside them
        assert all(rig.pool.holds(bytes([i])) for i in range(10))
    else:  # its own pages
        assert cached.table.blocks == before[:5]


def test_a_full_pool_of_shared_blocks_changes_nothing() -> None:
    rig = Rig(num_blocks=5)
    cached = rig.sequence()
    rig.append(cached, 2, range(20))
    other = cached.fork(cached.table.fork())
    for drop in (
        lambda: cached.keep([torch.arange(10).expand(HEADS, -1)] * LAYERS),
        lambda: cached.keep_ragged([[torch.arange(3)] * HEADS] * LAYERS),
        lambda: cached.overwrite(torch.zeros(LAYERS, HEADS, dtype=torch.int64)),
    ):
        with pytest.raises(OutOfBlocks):
            drop()
        assert tokens_in(cached, 2) == tokens_in(other, 2) == [[list(range(20))] * HEADS] * LAYERS
        assert (cached.length, cached.dropped) == (20, 0)


def test_merged_values_replace_those_of_kept_tokens() -> None:
    for ragged in (False, True):
        rig = Rig()
        cached = rig.sequence()
        rig.append(cached, 1, range(12))
        kept = torch.tensor([2, 5, 9])
        if ragged:
            cached.keep_ragged([[kept] * HEADS] * LAYERS)
        else:
            cached.keep([kept.expand(HEADS, -1)] * LAYERS)
        cached.set_values(1, 0, torch.full((3, DIM), 0.5))
        cells = cached.ragged.cells[1] if ragged else cached.cells(1)
        assert (rig.kv.read_cells(cells[0], torch.float32)[1] == 0.5).all()
        assert (rig.kv.read_cells(cells[1], torch.float32)[1] != 0.5).all()


def test_a_thousand_random_operations_keep_every_token_and_lose_no_block() -> None:
    rig, rng = Rig(num_blocks=48), random.Random(2)
    alive: dict[int, tuple[CachedTokens, list[list[list[int]]], int]] = {}
    for name in range(1000):
        operation = rng.choice(["start", "append", "keep", "ragged", "overwrite", "fork", "end"])
        try:
            if operation == "start" or not alive:
                cached = rig.sequence()
                n = rng.randint(1, 24)
                alive[name] = (cached, [[[] for _ in range(HEADS)] for _ in range(LAYERS)], name % 100)
                rig.append(cached, name % 100, range(n))
                alive[name] = (cached, [[list(range(n))] * HEADS] * LAYERS, name % 100)
                continue
            key = rng.choice(list(alive))
            cached, held, mark = alive[key]
            n = cached.length
            if operation == "append":
                rig.append(cached, mark, [n + 100])
                held = [[[*tokens, n + 100] for tokens in heads] for heads in held]
            elif operation == "keep" and cached.ragged is None and n > 2:
                index = [torch.stack([pick(rng, n, n // 2) for _ in range(HEADS)]) for _ in range(LAYERS)]
                cached.keep(index)
                held = [[[held[i][h][t] for t in index[i][h]] for h in range(HEADS)] for i in range(LAYERS)]
            elif operation == "ragged" and cached.ragged is None and n > 2:
                some = [[pick(rng, n, rng.randint(1, n)) for _ in range(HEADS)] for _ in range(LAYERS)]
                cached.keep_ragged(some)
                held = [[[held[i][h][t] for t in some[i][h]] for h in range(HEADS)] for i in range(LAYERS)]
            elif operation == "overwrite" and cached.ragged is None and n > 1:
                victims = torch.randint(0, n, (LAYERS, HEADS))
                cached.overwrite(victims)
                held = [
                    [
                        [held[i][h][-1] if t == int(victims[i, h]) else held[i][h][t] for t in range(n - 1)]
                        for h in range(HEADS)
                    ]
                    for i in range(LAYERS)
                ]
            elif operation == "fork":
                alive[name] = (cached.fork(cached.table.fork()), held, mark)
                continue
            elif operation == "end":
                cached.clear()
                del alive[key]
                continue
            alive[key] = (cached, held, mark)
        except OutOfBlocks:
            key = rng.choice(list(alive))
            alive.pop(key)[0].clear()
        finally:
            rig.pool.check()
        owned = {b for c, _, _ in alive.values() for b in c.table.blocks}
        owned |= {b for c, _, _ in alive.values() if c.ragged for b in c.ragged.blocks}
        assert rig.pool.num_used == len(owned)
        if name % 20 == 0:
            for cached, held, mark in alive.values():
                assert tokens_in(cached, mark) == held
    for cached, _, _ in alive.values():
        cached.clear()
    assert rig.pool.num_used == 0
