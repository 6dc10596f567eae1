"""Tokens that a codec has made smaller, in blocks of the pool used as plain memory.

A block holds a *page*, `block_size` tokens' worth of bytes, for the keys and for the values of each layer.
Each layer that a codec stores has a stream of bytes of its own, spread over pages: page p of the i-th of S
stored layers is number `p * S + i` of the pages of all blocks, so that streams of equal length leave no gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.kv_cache import KVCache


class Codec(Protocol):
    """How tokens are written to bytes, layer by layer."""

    layers: Sequence[int]
    """Layers that are stored; the others are never read."""

    group: int
    """Tokens are encoded in multiples of this."""

    basis: Tensor | None
    """`[D, D]`, orthogonal: keys and values decode to k @ basis and v @ basis. None: to themselves."""

    def num_bytes(self, tokens: int, item_bytes: int) -> int:
        """Of the first `tokens` tokens in one layer; item_bytes: of a number in the pool's type."""

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens `first .. first + n` to bytes.

        Args:
            keys, values: `[n, Hk, D]`, keys after RoPE, in the pool's type; n and first are multiples of
                `group`.

        Returns:
            uint8, as many as `num_bytes` grows by.
        """

    def decode(self, layer: int, data: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write tokens `0 .. n` to keys and values `[n, Hk, D]`, which are contiguous; data: uint8."""


class PackedTokens:
    """Tokens `0 .. length` of one sequence, as a codec stores them."""

    def __init__(self, kv: KVCache, pool: BlockPool, codec: Codec) -> None:
        self.kv = kv
        self.pool = pool
        self.codec = codec
        self.blocks: list[int] = []
        self.length = 0

    def num_bytes(self, tokens: int) -> int:
        """Of so many tokens in one layer."""
        return self.codec.num_bytes(tokens, self.kv.keys[0].element_size())

    def num_blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        pages = -(-self.num_bytes(tokens) // self.kv.page_bytes) * len(self.codec.layers)
        return -(-pages // self.kv.pages_per_block)

    def append(self, layers: Sequence[Tensor], tokens: int, released: Sequence[int] = ()) -> None:
        """Add tokens that have been encoded.

        Args:
            layers: what `Codec.encode` gave, for each of `Codec.layers`.
            released: blocks that may be given back first, the caller's references to them.

        Raises:
            OutOfBlocks: nothing has changed.
        """
        start = self.num_bytes(self.length)
        # Pages that are written to may be in blocks that a fork shares.
        first_page = start // self.kv.page_bytes * len(self.codec.layers)
        touched = range(first_page // self.kv.pages_per_block, len(self.blocks))
        shared = [i for i in touched if self.pool.refs(self.blocks[i]) > 1]
        wanted = len(shared) + self.num_blocks(self.length + tokens) - len(self.blocks)
        freed = sum(self.pool.refs(block) == 1 for block in released)
        if wanted > self.pool.num_available + freed:
            raise OutOfBlocks
        for block in reversed(released):
            self.pool.release(block)
        for i in shared:
            copy = self.pool.allocate(self.blocks[i - 1] if i else None)
            self.kv.copy_block(self.blocks[i], copy)
            self.pool.release(self.blocks[i])
            self.blocks[i] = copy
        for _ in range(wanted - len(shared)):
            self.blocks.append(self.pool.allocate(self.blocks[-1] if self.blocks else None))
        self.length += tokens
        self._write(start, torch.stack(list(layers)))

    def _write(self, start: int, data: Tensor) -> None:
        """Write data `[S, bytes]` at byte `start` of every stored layer's stream."""
        size, memory = self.kv.page_bytes, self.kv.pages
        numbers = self._pages(-(-(start + data.shape[1]) // size))
        at = start
        while at < start + data.shape[1]:
            page, begin = divmod(at, size)
            count = min(size - begin, start + data.shape[1] - at)
            memory[numbers[page], begin : begin + count] = data[:, at - start : at - start + count]
            at += count

    def _pages(self, rounds: int) -> Tensor:
        """Where in `KVCache.pages` the first `rounds` pages of each stored layer lie, `[rounds, S]`."""
        device = self.kv.keys[0].device
        streams = len(self.codec.layers)
        number = torch.arange(rounds * streams, device=device).view(-1, streams)
        blocks = torch.tensor(self.blocks, dtype=torch.int64, device=device)
        block = blocks[number // self.kv.pages_per_block]
        return number.remainder(self.kv.pages_per_block).mul_(self.kv.num_blocks).add_(block)

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """All tokens of a stored layer, to keys and values `[length, Hk, D]`."""
        used = self.num_bytes(self.length)
        pages = self._pages(-(-used // self.kv.page_bytes))[:, self.codec.layers.index(layer)]
        self.codec.decode(layer, self.kv.pages[pages].flatten()[:used], keys, values)

    def fork(self) -> PackedTokens:
        """The same tokens for a sibling; whoever appends first copies what it writes to."""
        other = PackedTokens(self.kv, self.pool, self.codec)
        other.blocks, other.length = list(self.blocks), self.length
        for block in self.blocks:
            self.pool.share(block)
        return other

    def clear(self) -> None:
        """Give everything back."""
        for block in self.blocks:
            self.pool.release(block)
        self.blocks, self.length = [], 0
