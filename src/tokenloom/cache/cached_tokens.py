"""The cached keys and values of one sequence, as its policy reads, moves and frees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.packed_tokens import Codec, PackedTokens

if TYPE_CHECKING:
    from tokenloom.kernels import Kernels, Pages

CosSin = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions, int64 `[T]`, to the cosines and sines that turn keys there (RoPE), two float32 `[T, D / 2]`."""


@dataclass(slots=True)
class Ragged:
    """Tokens whose number differs by layer and head, packed into blocks of their own."""

    blocks: list[int]
    cells: list[list[Tensor]]
    """By layer and kv head: the cells of its keys, in the order of their positions."""


class CachedTokens:
    """Tokens `0 .. length` of one sequence's cache; `length` counts the rows of the running iteration.

    After `keep`, index i of a layer and head holds the token that this head kept there.
    Keys were rotated at their own positions, so attention need not know which. After `keep_ragged` the tokens
    kept lie in `ragged`, after `pack` the oldest ones in `packed`, and those that follow are counted from 0
    again.
    """

    def __init__(
        self, kv: KVCache, table: BlockTable, kernels: Kernels, cos_sin: CosSin | None = None
    ) -> None:
        self.kv = kv
        self.table = table
        self.kernels = kernels
        self.cos_sin = cos_sin
        self.length = 0
        self.dropped = 0
        """Positions less indices: how many tokens are not in the table any more."""
        self.start = 0
        """Position of the running iteration's first row."""
        self.ragged: Ragged | None = None
        self.packed: PackedTokens | None = None
        self.tokens_read = 0
        """Keys that attention has read where a policy chose, one for each token, layer and head."""
        self._slots: tuple[list[int], Tensor] = ([], torch.empty(0, dtype=torch.int64))

    @property
    def num_layers(self) -> int:
        return len(self.kv.keys)

    @property
    def num_kv_heads(self) -> int:
        return int(self.kv.keys[0].shape[1])

    @property
    def computed(self) -> int:
        """Position behind the running iteration's last row."""
        return self.dropped + self.length

    @property
    def blocks_apart(self) -> list[int]:
        """Blocks of tokens outside the table: where there are some, only `attend` reads everything."""
        ragged, packed = self.ragged, self.packed  # read once: who watches asks from another thread
        blocks = ragged.blocks if ragged is not None else []
        return blocks + (packed.blocks if packed is not None else [])

    # -- reading ------------------------------------------------------------------------------------------

    def slots(self) -> Tensor:
        """Where tokens `0 .. length` lie, int64 `[length]`."""
        blocks, known = self._slots
        if blocks != self.table.blocks:
            blocks = list(self.table.blocks)
            known = _slots_of(blocks, self.kv)
            self._slots = (blocks, known)
        return known[: self.length]

    def keys(self, layer: int, begin: int = 0) -> Tensor:
        """Keys of tokens `begin .. length`, `[length - begin, Hk, D]`: a view if the table is contiguous."""
        return self._values_of(self.kv.keys[layer], self._scales(self.kv.key_scales, layer), begin)

    def values(self, layer: int, begin: int = 0) -> Tensor:
        """Values of tokens `begin .. length`, like `keys`."""
        return self._values_of(self.kv.values[layer], self._scales(self.kv.value_scales, layer), begin)

    def _scales(self, scales: list[Tensor], layer: int) -> Tensor | None:
        return scales[layer] if self.kv.quantized else None

    def _values_of(self, cache: Tensor, scales: Tensor | None, begin: int) -> Tensor:
        if self.table.contiguous and self.table.blocks:
            first = self.table.blocks[0] * self.kv.block_size
            where: slice | Tensor = slice(first + begin, first + self.length)
        else:
            where = self.slots()[begin:]
        return cache[where] if scales is None else cache[where] * scales[where][..., None]

    def cells(self, layer: int, index: Tensor | None = None) -> Tensor:
        """Cells `[heads, n]` of tokens at `index`, `[n]`, or by head `[Hk, n]` or `[Hq, n]`; None: all."""
        slots = self.slots() if index is None else self.slots().take(index)
        return self.kv.cells(layer, slots)

    def scores(self, layer: int, q: Tensor, begin: int, end: int) -> Tensor:
        """q . k of queries q `[Hq, D]` and the keys of tokens `begin .. end`, `[Hq, end - begin]`."""
        scales = self._scales(self.kv.key_scales, layer)
        return self.kernels.key_scores(q, self.kv.keys[layer], self.slots()[begin:end], scales)

    def attend(self, layer: int, q: Tensor, index: Tensor | None = None) -> Tensor:
        """Attention of rows q `[n, Hq, D]` over the tokens at `index` alone, `[n, Hq, D]`.

        Args:
            index: ascending, `[m]` for all heads, or `[Hk, m]`, or `[Hq, m]`; it ends with the rows' own
                tokens `length - n .. length`, which are read causally. None: everything.
        """
        if self.packed is not None:
            if index is not None or self.ragged is not None:
                raise RuntimeError("packed tokens are all read, by all heads alike")
            return self._attend_packed(self.packed, layer, q)
        own = self.cells(layer, index)
        if self.ragged is None:
            self.tokens_read += own.numel()
            return self.kernels.attention_at(q, self.kv, own)
        cells = [torch.cat(pair) for pair in zip(self.ragged.cells[layer], own, strict=True)]
        self.tokens_read += sum(map(len, cells))
        return self.kernels.attention_at(q, self.kv, cells)

    def attend_pages(self, layer: int, q: Tensor, pages: Pages) -> Tensor:
        """Attention of one row over the pages of `slots()` that promise most."""
        self.tokens_read += pages.tokens_read * (self.num_kv_heads if pages.by_group else q.shape[1])
        return self.kernels.attention_over_pages(q, self.kv, layer, pages)

    def _attend_packed(self, packed: PackedTokens, layer: int, q: Tensor) -> Tensor:
        """Attention of rows q over packed tokens and those of the table, side by side in scratch memory."""
        n, total = packed.length, packed.length + self.length
        scratch, basis = self.kv.scratch(total), packed.codec.basis
        keys, values = scratch.keys[0][:total], scratch.values[0][:total]
        packed.decode(layer, keys[:n], values[:n])
        keys[n:], values[n:] = self.keys(layer), self.values(layer)
        if basis is not None:
            # (q B)(k B)' = q k': packed tokens need not be turned back one by one.
            basis = basis.to(q)
            keys[n:], values[n:], q = keys[n:] @ basis, values[n:] @ basis, q @ basis
        self.tokens_read += self.num_kv_heads * total
        out = self.kernels.attention_at(q, scratch, scratch.cells(0, torch.arange(total, device=q.device)))
        return out if basis is None else out @ basis.t()

    # -- keeping ------------------------------------------------------------------------------------------

    def keep(self, index: Sequence[Tensor]) -> None:
        """Keep these tokens alone and give the other blocks back.

        Args:
            index: for each layer `[Hk, n]`, ascending; n is the same in all of them.

        Raises:
            OutOfBlocks: others share the blocks, and there are none to copy to; nothing has changed.
        """
        n = int(index[0].shape[1])
        source = [self.cells(layer, at).flatten() for layer, at in enumerate(index)]
        self._exchange(self.table, n)
        slots = _slots_of(self.table.blocks, self.kv)[:n]
        for layer, cells in enumerate(source):
            self.kv.copy_cells(cells, self.kv.cells(layer, slots).flatten())
        self.dropped += self.length - n
        self.length = n

    def _exchange(self, table: BlockTable, n: int) -> None:
        """Give the sequence's blocks back, and only then let `table` take blocks for n tokens.

        So the pool never holds both. What the old blocks hold is there until it is written over: whoever
        copies reads everything that a write could reach first. Those that the prefix cache knows are the
        last that the pool takes, and stay in it where there is room.
        """
        pool, blocks = self.table.pool, self.table.blocks
        needed = -(-n // self.kv.block_size)
        if pool.num_available + sum(pool.refs(block) == 1 for block in blocks) < needed:
            raise OutOfBlocks
        free = bool(blocks) and pool.refs(blocks[0]) == 1 and not pool.is_published(blocks[0])
        after = blocks[0] - 1 if free else None  # its own pages again: fresh ones cost more than the copy
        self.table.clear()
        table.grow(n, after=after)

    def keep_ragged(self, index: Sequence[Sequence[Tensor]]) -> None:
        """Keep these tokens alone: for each layer and kv head `[n]`, ascending, with an n of its own.

        Raises:
            OutOfBlocks: others share the blocks, and there are not enough to copy to; nothing has changed.
        """
        if self.ragged is not None:
            raise RuntimeError("tokens were dropped by layer and head before")
        source = []
        for layer, heads in enumerate(index):
            cells = self.cells(layer)
            source += [cells[head, at] for head, at in enumerate(heads)]
        counts = [len(at) for at in source]
        packed = BlockTable(self.table.pool)
        per_block = self.kv.block_size * self.num_kv_heads * self.num_layers
        self._exchange(packed, -(-sum(counts) // per_block) * self.kv.block_size)
        # Where block b's cells lie: in each layer a run of block_size * Hk.
        slots = _slots_of(packed.blocks, self.kv)
        runs = [self.kv.cells(layer, slots) for layer in range(self.num_layers)]
        free = torch.stack([r.view(self.num_kv_heads, -1, self.kv.block_size) for r in runs])
        free = free.permute(2, 0, 3, 1).flatten()  # by block, layer, slot, head: as memory goes
        target = free[: sum(counts)].split(counts)
        # All at once: a layer's tokens may go to where another layer's lie.
        self.kv.copy_cells(torch.cat(source), torch.cat(target))
        per_layer = self.num_kv_heads
        cells_of = [list(target[i : i + per_layer]) for i in range(0, len(target), per_layer)]
        self.ragged = Ragged(packed.blocks, cells_of)
        self.dropped += self.length
        self.length = 0

    def pack(self, tokens: int, codec: Codec) -> None:
        """Let a codec hold the first `tokens` tokens of the table, behind those that it holds already.

        Args:
            tokens: a multiple of the block size and of `codec.group`.

        Raises:
            OutOfBlocks: there are not enough blocks; nothing has changed.
        """
        size = self.table.pool.block_size
        if tokens % size or tokens % codec.group or tokens > self.length:
            raise ValueError(f"{tokens} of {self.length} tokens cannot be packed")
        packed = self.packed or PackedTokens(self.kv, self.table.pool, codec)
        encoded = [
            codec.encode(layer, packed.length, self.keys(layer)[:tokens], self.values(layer)[:tokens])
            for layer in codec.layers
        ]
        packed.append(encoded, tokens, released=self.table.blocks[: tokens // size])
        self.packed = packed
        self.table.forget_first(tokens // size)
        self.dropped += tokens
        self.length -= tokens

    def overwrite(self, index: Tensor) -> None:
        """Let the last token take the place of another, which is dropped: index `[L, Hk]`, by layer and head.

        Raises:
            OutOfBlocks: the blocks are shared, and there are none to copy to.
        """
        for i in range(len(self.table.blocks)):
            copied = self.table.make_writable(i)
            if copied is not None:
                self.kv.copy_block(*copied)
        last = self.length - 1
        target = torch.cat([self.cells(layer, at[:, None]) for layer, at in enumerate(index)])
        source = torch.cat([self.kv.cells(layer, self.slots()[last:]) for layer in range(self.num_layers)])
        self.kv.copy_cells(source.flatten(), target.flatten())
        self.dropped += 1
        self.length = last

    def set_values(self, layer: int, head: int, values: Tensor) -> None:
        """Let the first kept tokens of a layer and kv head have other values, `[n, D]`."""
        cells = self.cells(layer)[head] if self.ragged is None else self.ragged.cells[layer][head]
        self.kv.write_values(cells[: len(values)], values)

    def set_keys(self, index: Tensor, keys: Tensor) -> None:
        """Let tokens at `index`, `[n]`, have other keys in every layer, `[L, n, Hk, D]`. Their blocks must be
        the sequence's own: they are after `keep` and `overwrite`."""
        cells = torch.stack([self.cells(layer, index) for layer in range(self.num_layers)])
        self.kv.write_keys(cells.flatten(), keys.transpose(1, 2).flatten(0, 2))

    def clear(self) -> None:
        """Give everything back."""
        if self.ragged is not None:
            for block in self.ragged.blocks:
                self.table.pool.release(block)
        if self.packed is not None:
            self.packed.clear()
        self.ragged = self.packed = None
        self.table.clear()
        self.length = self.dropped = 0

    def fork(self, table: BlockTable) -> CachedTokens:
        """The same tokens for a sibling, whose table shares this one's blocks."""
        other = CachedTokens(self.kv, table, self.kernels, self.cos_sin)
        other.length, other.dropped = self.length, self.dropped
        if self.ragged is not None:
            for block in self.ragged.blocks:
                table.pool.share(block)
            other.ragged = Ragged(list(self.ragged.blocks), self.ragged.cells)
        if self.packed is not None:
            other.packed = self.packed.fork()
        return other


def _slots_of(blocks: list[int], kv: KVCache) -> Tensor:
    first = torch.tensor(blocks, dtype=torch.int64, device=kv.keys[0].device) * kv.block_size
    return (first[:, None] + torch.arange(kv.block_size, device=first.device)).flatten()
