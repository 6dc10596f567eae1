"""Blocks are never leaked, never given twice, and never written while shared."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.block_table import BlockTable, block_digest, root_digest

BLOCK, BLOCKS = 4, 12


class PoolMachine(RuleBasedStateMachine):
    """Random sequences grow, fork, write, publish, match and end; a model of block contents checks them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, BLOCK)
        self.content: dict[int, list[int | None]] = {b: [None] * BLOCK for b in range(BLOCKS)}
        self.sequences: list[tuple[BlockTable, list[int]]] = []

    def _write(self, table: BlockTable, tokens: list[int], token: int) -> None:
        index = len(tokens)
        try:
            table.grow(index + 1)
            if index % BLOCK:
                copy = table.make_writable(index // BLOCK)
                if copy:
                    self.content[copy[1]] = list(self.content[copy[0]])
        except OutOfBlocks:
            return
        self.content[table.blocks[index // BLOCK]][index % BLOCK] = token
        tokens.append(token)
        if len(tokens) % BLOCK == 0:
            digest = root_digest("test")
            for i in range(0, len(tokens), BLOCK):
                digest = block_digest(digest, tokens[i : i + BLOCK])
            self.pool.publish(table.blocks[index // BLOCK], digest)

    @rule(token=st.integers(0, 1), count=st.integers(1, 9))
    def start(self, token: int, count: int) -> None:
        table, tokens = BlockTable(self.pool), []
        wanted = [token] * count
        digest = root_digest("test")
        for i in range((count - 1) // BLOCK):
            digest = block_digest(digest, wanted[i * BLOCK : (i + 1) * BLOCK])
            block = self.pool.lookup(digest)
            if block is None:
                break
            table.adopt(block)
            tokens += wanted[i * BLOCK : (i + 1) * BLOCK]
        for t in wanted[len(tokens) :]:
            self._write(table, tokens, t)
        self.sequences.append((table, tokens))

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), token=st.integers(0, 5))
    def extend(self, which: int, token: int) -> None:
        self._write(*self.sequences[which % len(self.sequences)], token)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        table, tokens = self.sequences[which % len(self.sequences)]
        self.sequences.append((table.fork(), list(tokens)))

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        self.sequences.pop(which % len(self.sequences))[0].clear()

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.pool.check()
        held = [b for table, _ in self.sequences for b in table.blocks]
        for block in range(BLOCKS):
            assert self.pool.refs(block) == held.count(block)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for table, tokens in self.sequences:
            read = [self.content[table.blocks[i // BLOCK]][i % BLOCK] for i in range(len(tokens))]
            assert read == tokens

    @invariant()
    def contiguous_is_true(self) -> None:
        for table, _ in self.sequences:
            consecutive = all(b + 1 == c for b, c in zip(table.blocks, table.blocks[1:], strict=False))
            assert table.contiguous == consecutive


PoolMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_cached_blocks_are_evicted_oldest_first() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.publish(block, bytes([block]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert pool.allocate() == blocks[1]
    assert pool.lookup(bytes([blocks[1]])) is None
    assert pool.lookup(bytes([blocks[0]])) == blocks[0]


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(1, BLOCK)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(RuntimeError, match=f"block {block}"):
        pool.release(block)


def test_allocation_beyond_the_pool_is_refused() -> None:
    pool = BlockPool(2, BLOCK)
    pool.allocate()
    pool.allocate()
    with pytest.raises(OutOfBlocks):
        pool.allocate()


def test_new_sequences_leave_room_for_their_elders() -> None:
    pool = BlockPool(32, BLOCK)
    first, second = BlockTable(pool), BlockTable(pool)
    first.grow(BLOCK, room=8)
    second.grow(BLOCK, room=8)
    first.grow(8 * BLOCK)
    assert first.contiguous and len(first.blocks) == 8


def test_digests_depend_on_namespace_order_and_prefix() -> None:
    plain, salted = root_digest("base", 0, None), root_digest("base", 0, "tenant")
    digests = {
        block_digest(plain, [1, 2]),
        block_digest(plain, [2, 1]),
        block_digest(salted, [1, 2]),
        block_digest(block_digest(plain, [1, 2]), [1, 2]),
    }
    assert len(digests) == 4
