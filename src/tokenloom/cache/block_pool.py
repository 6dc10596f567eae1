"""Who owns which KV block: reference counts, the prefix index, and least-recently-used eviction.

A block is in exactly one of three states: in use (`ref > 0`), cached (`ref == 0` but its content is
indexed by a digest and may be reused), or free. Cached blocks are given away last, oldest first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenloom.cache.tier import Tier


class OutOfBlocks(Exception):
    """Every block is in use."""


class BlockPool:
    """Hands out the blocks of the KV cache.

    Args:
        num_blocks: how many blocks the cache tensors hold.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free = set(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # ref == 0 and indexed, oldest first
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cursor = 0
        self.tier: Tier | None = None
        """Where cached blocks go that are given away, and come back from."""

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can take: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and whose content may be used again."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def refs(self, block: int) -> int:
        return self._refs[block]

    def in_use(self) -> list[bool]:
        """Of each block, whether somebody holds it. From any thread, as `cached`."""
        return [refs > 0 for refs in list(self._refs)]

    def cached(self) -> list[int]:
        """Blocks that nobody holds and whose content may be reused, the oldest first."""
        return list(self._cached)

    def counts(self) -> dict[str, int]:
        """Blocks by state: `free`, `cached`, `in_use`, of these `shared`; and `indexed` by their content."""
        refs = list(self._refs)
        return {
            "free": len(self._free),
            "cached": len(self._cached),
            "in_use": sum(count > 0 for count in refs),
            "shared": sum(count > 1 for count in refs),
            "indexed": len(self._digest_of),
        }

    def allocate(self, after: int | None = None, room: int = 1) -> int:
        """Take a block, with one reference.

        Args:
            after: the caller's last block; the next id is taken where it is free, because a sequence
                whose blocks are consecutive is read without a gather.
            room: how many blocks a new sequence (`after=None`) is expected to need; the next new
                sequence starts that much further on.

        Raises:
            OutOfBlocks: every block is in use.
        """
        if not self._free:
            if not self._cached:
                raise OutOfBlocks
            block, _ = self._cached.popitem(last=False)
            digest = self._digest_of.pop(block)
            del self._block_of[digest]
            if self.tier is not None:
                self.tier.demote(block, digest)
        else:
            if after is None:
                wanted, self._cursor = self._cursor, (self._cursor + max(1, room)) % self.num_blocks
            else:
                wanted = after + 1
            block = self._nearest_free(wanted)
            self._free.remove(block)
        self._refs[block] = 1
        return block

    def _nearest_free(self, wanted: int) -> int:
        for block in range(wanted, min(wanted + 64, self.num_blocks)):
            if block in self._free:
                return block
        return next(iter(self._free))

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use."""
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference; the last one leaves the block cached if its content is indexed, else free."""
        if self._refs[block] <= 0:
            raise RuntimeError(f"block {block} is released more often than it was taken")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.add(block)

    def holds(self, digest: bytes) -> bool:
        """Whether a block with that content is indexed, here or in the tier."""
        return digest in self._block_of or (self.tier is not None and self.tier.holds(digest))

    def is_resident(self, digest: bytes) -> bool:
        """Whether a block with that content is indexed here, not in the tier alone."""
        return digest in self._block_of

    def lookup(self, digest: bytes) -> int | None:
        """The block with that content, with a reference for the caller, or None."""
        block = self._block_of.get(digest)
        if block is None:
            return None
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1
        return block

    def restore(self, digest: bytes, after: int | None = None, room: int = 1) -> int | None:
        """A block with that content from the tier, indexed again; `after` and `room` as in `allocate`.

        None: the tier does not have it, or no block is free.
        """
        if self.tier is None or not self.num_available or not self.tier.touch(digest):
            return None
        block = self.allocate(after, room)
        if not self.tier.load(digest, block):
            self.release(block)
            return None
        self.publish(block, digest)
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Index a block in use by its content, unless that content is indexed already."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def unpublish(self, block: int) -> None:
        """Drop a block in use from the prefix index: its content is about to change."""
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def disown(self, block: int) -> None:
        """Drop the content of a block in use from the prefix index and the tier: it is not to be trusted."""
        digest = self._digest_of.get(block)
        self.unpublish(block)
        if digest is not None and self.tier is not None:
            self.tier.forget(digest)

    def is_published(self, block: int) -> bool:
        return block in self._digest_of

    def forget_prefixes(self) -> None:
        """Drop the whole prefix index, the tier's too; blocks in use stay with their owners."""
        if self.tier is not None:
            self.tier.clear()
        self._free.update(self._cached)
        self._cached.clear()
        self._digest_of.clear()
        self._block_of.clear()

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state (for tests and debugging)."""
        used = {b for b, refs in enumerate(self._refs) if refs > 0}
        cached = set(self._cached)
        assert not (used & self._free or used & cached or cached & self._free), "a block is in two states"
        assert len(used) + len(cached) + len(self._free) == self.num_blocks, "a block is in no state"
        assert cached <= set(self._digest_of), "a cached block has no digest"
        if self.tier is not None:
            self.tier.check()
        assert {d: b for b, d in self._digest_of.items()} == self._block_of, "the prefix index is torn"
