"""The KV blocks of one sequence, in order."""

from __future__ import annotations

import hashlib
from array import array

from tokenloom.cache.block_pool import BlockPool


class BlockTable:
    """Maps the token at KV index i to slot `blocks[i // block_size] * block_size + i % block_size`."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        self.contiguous = True

    def missing(self, num_tokens: int) -> int:
        """How many blocks must still be taken to hold `num_tokens`."""
        return -(-num_tokens // self.pool.block_size) - len(self.blocks)

    def grow(self, num_tokens: int, room: int = 1, after: int | None = None) -> None:
        """Take blocks until `num_tokens` fit; blocks taken before OutOfBlocks is raised are kept.

        An empty table leaves `room` blocks until the next empty one begins, or begins after block `after`.
        """
        for _ in range(self.missing(num_tokens)):
            self._append(self.pool.allocate(self.blocks[-1] if self.blocks else after, room))

    def _append(self, block: int) -> None:
        if self.blocks and block != self.blocks[-1] + 1:
            self.contiguous = False
        self.blocks.append(block)

    def adopt(self, block: int) -> None:
        """Append a block whose reference the caller already holds (a prefix-cache hit)."""
        self._append(block)

    def cut(self, num_blocks: int) -> None:
        """Give back all blocks but the first `num_blocks`."""
        for block in reversed(self.blocks[num_blocks:]):
            self.pool.release(block)
        del self.blocks[num_blocks:]
        self.contiguous = self.contiguous or self._consecutive()

    def forget_first(self, num_blocks: int) -> None:
        """Hold the first `num_blocks` no more; their references have been given back by the caller."""
        del self.blocks[:num_blocks]
        self.contiguous = all(b + 1 == c for b, c in zip(self.blocks, self.blocks[1:], strict=False))

    def fork(self) -> BlockTable:
        """A second table over the same blocks; whoever writes first copies (`make_writable`)."""
        other = BlockTable(self.pool)
        other.blocks, other.contiguous = list(self.blocks), self.contiguous
        for block in self.blocks:
            self.pool.share(block)
        return other

    def make_writable(self, index: int) -> tuple[int, int] | None:
        """Own block `index` alone before writing to it.

        Returns:
            (from, to): the caller must copy the content of one block to the other; None if the block
            was not shared.

        Raises:
            OutOfBlocks: there is no block to copy to.
        """
        block = self.blocks[index]
        if self.pool.refs(block) == 1 and not self.pool.is_published(block):
            return None
        copy = self.pool.allocate(self.blocks[index - 1] if index else None)
        self.blocks[index] = copy
        self.contiguous = self._consecutive()
        self.pool.release(block)
        return block, copy

    def _consecutive(self) -> bool:
        return all(b + 1 == c for b, c in zip(self.blocks, self.blocks[1:], strict=False))

    def slot(self, index: int) -> int:
        block_size = self.pool.block_size
        return self.blocks[index // block_size] * block_size + index % block_size

    def clear(self) -> None:
        """Give every block back, last first, so that the prefix index loses its tails before its heads."""
        for block in reversed(self.blocks):
            self.pool.release(block)
        self.blocks = []
        self.contiguous = True


def root_digest(*namespace: str | int | None) -> bytes:
    """Where a chain of block digests starts: KV is shared only inside one namespace.

    The namespace holds everything besides the tokens that changes keys and values: the adapter and its
    version, the KV policy, and the tenant's salt.
    """
    return hashlib.blake2b(repr(namespace).encode(), digest_size=16).digest()


def block_digest(parent: bytes, tokens: list[int]) -> bytes:
    """Digest of a full block that follows `parent`: equal digests mean equal tokens from the start."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()
