"""Packed tokens: their bytes are the pool's, forks go their own ways, and no block is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from token_rows import grow
from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import get_kernels
from tokenloom.methods.kv.bit_groups import hadamard
from tokenloom.methods.kv.kvsharer import WholeTokens

LAYERS, HEADS, DIM, BLOCK = 3, 2, 8, 4
KERNELS = get_kernels("torch")


class Bytes:
    """A codec that keeps the whole part of every number, one byte each, behind a header of 3 bytes."""

    group = 2
    basis = None

    def __init__(self, layers: Sequence[int] = range(LAYERS)) -> None:
        self.layers = layers

    def num_bytes(self, tokens: int, item_bytes: int) -> int:
        return 3 * (tokens > 0) + tokens * 2 * HEADS * DIM

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        data = torch.stack((keys, -values), 1).flatten().to(torch.uint8)
        return data if first else torch.cat((data.new_tensor([9, 9, 9]), data))

    def decode(self, layer: int, data: Tensor, keys: Tensor, values: Tensor) -> None:
        assert data[:3].tolist() == [9, 9, 9]
        both = data[3:].view(len(keys), 2, HEADS, DIM)
        keys.copy_(both[:, 0])
        values.copy_(-both[:, 1].float())


class Rig:
    def __init__(self, num_blocks: int = 64) -> None:
        self.kv = KVCache(
            LAYERS,
            HEADS,
            DIM,
            num_blocks=num_blocks,
            block_size=BLOCK,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.pool = BlockPool(num_blocks, BLOCK)

    def sequence(self) -> CachedTokens:
        return CachedTokens(self.kv, BlockTable(self.pool), KERNELS)

    def append(self, cached: CachedTokens, marks: list[int]) -> None:
        first = grow(self.kv, cached, len(marks))
        for layer in range(LAYERS):
            keys = torch.stack([numbers(layer, mark) for mark in marks])
            self.kv.write(layer, cached.slots()[first:], keys, -keys)


def numbers(layer: int, mark: int) -> Tensor:
    """`[HEADS, DIM]`, whole ones below 256."""
    return (torch.arange(HEADS * DIM, dtype=torch.float32).view(HEADS, DIM) + 17 * layer + mark) % 256


def held(cached: CachedTokens, layers: Sequence[int] = range(LAYERS)) -> list[int]:
    """Marks of all tokens, the packed ones first; every number must be as it was written."""
    marks: list[int] = []
    for layer in layers:
        n = cached.packed.length if cached.packed is not None else 0
        keys = torch.empty(n + cached.length, HEADS, DIM)
        values = torch.empty_like(keys)
        if cached.packed is not None:
            cached.packed.decode(layer, keys[:n], values[:n])
        keys[n:], values[n:] = cached.keys(layer), cached.values(layer)
        marks = ((keys[:, 0, 0] - 17 * layer) % 256).int().tolist()
        assert torch.equal(values, -keys)
        assert torch.equal(keys, torch.stack([numbers(layer, mark) for mark in marks]))
    return marks


def test_packed_tokens_come_back_and_their_blocks_are_free() -> None:
    rig = Rig()
    cached = rig.sequence()
    rig.append(cached, list(range(50)))
    cached.pack(40, Bytes())
    assert held(cached) == list(range(50))
    assert (cached.length, cached.dropped, cached.computed) == (10, 40, 50)
    # A page has 4 * 16 * 4 = 256 bytes; 3 + 40 * 32 = 1,283 take 6 of them in 3 layers; a block has 6.
    assert cached.packed is not None and len(cached.packed.blocks) == 3
    assert rig.pool.num_used == 3 + 3
    rig.append(cached, list(range(50, 60)))
    cached.pack(16, Bytes())
    assert held(cached) == list(range(60))
    cached.clear()
    assert rig.pool.num_used == 0


def test_layers_that_are_not_stored_take_no_memory() -> None:
    rig = Rig()
    cached = rig.sequence()
    rig.append(cached, list(range(40)))
    cached.pack(40, Bytes([2]))
    assert held(cached, [2]) == list(range(40))
    assert rig.pool.num_used == 1


def test_attention_reads_packed_tokens_and_the_table_alike() -> None:
    rig = Rig()
    cached, whole = rig.sequence(), rig.sequence()
    for each in (cached, whole):
        rig.append(each, list(range(30)))
    cached.pack(24, Bytes())
    q = torch.randn(3, HEADS * 2, DIM)
    torch.testing.assert_close(cached.attend(1, q), whole.attend(1, q))


class Turned(WholeTokens):
    """Every number as it is, but in another basis."""

    basis = hadamard(DIM)

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        return super().encode(layer, first, keys @ self.basis.to(keys), values @ self.basis.to(keys))


def test_another_basis_alone_changes_no_attention() -> None:
    rig = Rig()
    cached, whole = rig.sequence(), rig.sequence()
    for each in (cached, whole):
        rig.append(each, list(range(30)))
    cached.pack(24, Turned(range(LAYERS), 2 * HEADS * DIM))
    q = torch.randn(3, HEADS * 2, DIM) / 50
    torch.testing.assert_close(cached.attend(1, q), whole.attend(1, q), atol=1e-4, rtol=1e-5)


def test_a_fork_that_packs_more_leaves_its_sibling_as_it_is() -> None:
    rig = Rig()
    one = rig.sequence()
    rig.append(one, list(range(14)))
    one.pack(12, Bytes())
    other = one.fork(one.table.fork())
    rig.append(one, list(range(100, 110)))
    rig.append(other, list(range(200, 210)))
    one.pack(12, Bytes())
    other.pack(12, Bytes())
    assert held(one) == [*range(14), *range(100, 110)]
    assert held(other) == [*range(14), *range(200, 210)]
    one.clear()
    assert held(other) == [*range(14), *range(200, 210)]
    other.clear()
    assert rig.pool.num_used == 0


def test_a_full_pool_packs_what_one_owns_alone() -> None:
    rig = Rig(num_blocks=5)
    cached = rig.sequence()
    rig.append(cached, list(range(20)))
    rig.pool.publish(cached.table.blocks[0], b"first")
    cached.pack(16, Bytes())
    assert held(cached) == list(range(20))
    rig.pool.check()


def test_a_full_pool_of_shared_blocks_changes_nothing() -> None:
    rig = Rig(num_blocks=5)
    cached = rig.sequence()
    rig.append(cached, list(range(20)))
    other = cached.fork(cached.table.fork())
    with pytest.raises(OutOfBlocks):
        cached.pack(16, Bytes())
    assert held(cached) == held(other) == list(range(20))
    assert (cached.length, cached.dropped, cached.packed) == (20, 0, None)
    rig.pool.check()


def test_tokens_that_fill_no_block_or_group_are_refused() -> None:
    rig = Rig()
    cached = rig.sequence()
    rig.append(cached, list(range(10)))
    for tokens in (2, 12):
        with pytest.raises(ValueError, match="cannot be packed"):
            cached.pack(tokens, Bytes())


def test_a_thousand_random_operations_keep_every_token_and_lose_no_block() -> None:
    rig, rng = Rig(num_blocks=40), random.Random(5)
    alive: dict[int, tuple[CachedTokens, list[int]]] = {}
    refused = 0
    for name in range(1000):
        operation = rng.choice(["start", "append", "append", "pack", "pack", "fork", "end"])
        try:
            if operation == "start" or not alive:
                cached, marks = rig.sequence(), [rng.randrange(256) for _ in range(rng.randint(1, 40))]
                alive[name] = (cached, [])
                rig.append(cached, marks)
                alive[name] = (cached, marks)
                continue
            key = rng.choice(list(alive))
            cached, marks = alive[key]
            if operation == "append":
                new = [rng.randrange(256) for _ in range(rng.randint(1, 9))]
                rig.append(cached, new)
                alive[key] = (cached, marks + new)
            elif operation == "pack" and cached.length >= BLOCK:
                cached.pack(rng.randint(1, cached.length // BLOCK) * BLOCK, Bytes())
            elif operation == "fork":
                alive[name] = (cached.fork(cached.table.fork()), marks)
            elif operation == "end":
                cached.clear()
                del alive[key]
        except OutOfBlocks:
            refused += 1
            if operation == "pack":
                assert held(cached) == marks
            alive.pop(name if operation == "start" else key)[0].clear()
        finally:
            rig.pool.check()
        owned = {b for c, _ in alive.values() for b in c.table.blocks + c.blocks_apart}
        assert rig.pool.num_used == len(owned)
        if name % 25 == 0:
            for cached, marks in alive.values():
                assert held(cached) == marks
    assert refused > 10
    for cached, _ in alive.values():
        cached.clear()
    assert rig.pool.num_used == 0
