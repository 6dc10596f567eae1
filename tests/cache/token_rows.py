"""Room for tokens in a paged cache."""

from __future__ import annotations

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.kv_cache import KVCache


def grow(kv: KVCache, cached: CachedTokens, count: int) -> int:
    """Make room for `count` more tokens, in a block of the sequence's own; where the first of them stands."""
    first = cached.length
    cached.table.grow(first + count)
    if first % kv.block_size:
        copied = cached.table.make_writable(first // kv.block_size)
        if copied is not None:
            kv.copy_block(*copied)
    cached.length = first + count
    return first
