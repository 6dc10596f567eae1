"""Reading few of the cached tokens while decoding: what selectors share."""

from __future__ import annotations

from tokenloom.cache.policy import KVPolicy, SequenceShape


class DecodeSelection(KVPolicy):
    """The prompt is computed as without a policy; rows after it choose what they read, each for itself."""

    def __init__(self, shape: SequenceShape) -> None:
        self.shape = shape

    def rows(self, start: int, wanted: int, most: int) -> int:
        # After a preemption, rows that were decoded one by one are computed one by one again.
        end = self.shape.prompt_tokens
        return min(wanted, most, end - start if start < end else 1)

    def attends(self, start: int, stop: int) -> bool:
        return start >= self.shape.prompt_tokens
