"""When the oldest tokens of a sequence are handed to a codec."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.packed_tokens import Codec
from tokenloom.cache.policy import KVPolicy, SequenceShape

_PIECE = 512  # tokens that are encoded at once: their bytes exist twice until the blocks they lay in are free


class Packing(KVPolicy):
    """Packs all but the newest `residual` tokens when the prompt is complete, and again as answers grow.

    The prompt's own rows read what has not been packed, so its blocks can be shared by prefix as without a
    policy. Whole groups of the codec and whole blocks are packed, so that `residual` tokens and less than one
    such step more lie in the ordinary table, and none of them is ever moved.
    """

    def __init__(
        self, shape: SequenceShape, codec_for: Callable[[CachedTokens], Codec], residual: int
    ) -> None:
        self.shape, self.codec_for, self.residual = shape, codec_for, residual
        self.rows_left = 1
        """Until the next step is full."""

    def rows(self, start: int, wanted: int, most: int) -> int:
        # After a preemption the answer's tokens read what was packed when they were written.
        end = self.shape.prompt_tokens
        return min(wanted, most, end - start if start < end else self.rows_left)

    def drop(self, cached: CachedTokens) -> None:
        if cached.computed < self.shape.prompt_tokens:
            return
        codec = self.codec_for(cached)
        step = math.lcm(codec.group, cached.kv.block_size)
        self.rows_left = 1  # where blocks are short, every row asks again
        while tokens := max(0, cached.length - self.residual) // step * step:
            cached.pack(min(tokens, max(step, _PIECE // step * step)), codec)
        self.rows_left = self.residual + step - cached.length

    def fork(self) -> KVPolicy:
        return copy.copy(self)
