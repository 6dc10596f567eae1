"""StreamingLLM: the first tokens and the last ones, and nothing between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.kv.budget import at_least, check_budget, one_of, tokens_of
from tokenloom.methods.kv.parts import Evictor
from tokenloom.methods.kv.rotation import turned
from tokenloom.methods.registry import method


@method(
    "streaming",
    hook="kv",
    title="Efficient Streaming Language Models with Attention Sinks (StreamingLLM)",
    arxiv="2309.17453",
    claim="memory that does not grow: the first tokens hold the attention that nobody needs",
)
@dataclass(frozen=True)
class Streaming(Evictor):
    """Keeps `sinks` tokens from the start and the newest `budget - sinks`.

    Attributes:
        budget: tokens kept, or the part of the prompt.
        sinks: of which so many are the first.
        positions: original: a token stays where it stood in the text. cache: tokens are as far apart as in
            the cache (the paper's, Section 3.2), so that an answer may be longer than the model's context;
            the budget is then at most that.
    """

    budget: int | float = 1024
    sinks: int = 4
    positions: str = "original"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        at_least(0, sinks=self.sinks)
        one_of(("original", "cache"), positions=self.positions)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        budget = max(tokens_of(self.budget, shape.prompt_tokens), self.sinks + 1)
        if self.positions == "cache":
            if self.sinks + 2 > shape.max_position:
                raise RequestError(
                    f"kv: streaming: sinks is {self.sinks}; the model knows {shape.max_position} positions",
                    param="kv",
                )
            return CachePositions(min(budget, shape.max_position - 1), self.sinks, shape)
        return StreamingPolicy(budget, self.sinks, shape)


class StreamingPolicy(KVPolicy):
    """The cache is a ring behind the sinks: the newest token takes the place of the oldest."""

    def __init__(self, budget: int, sinks: int, shape: SequenceShape) -> None:
        self.budget, self.sinks, self.shape = budget, sinks, shape
        self.oldest = sinks  # its index
        self.filled = False  # whether the ring is: its tokens are in order until then

    def rows(self, start: int, wanted: int, most: int) -> int:
        end = self.shape.prompt_tokens
        return min(wanted, most, end - start if start < end else 1)

    def drop(self, cached: CachedTokens) -> None:
        if cached.computed < self.shape.prompt_tokens:
            return
        device = cached.slots().device
        if not self.filled and cached.length > self.budget:
            newest = torch.arange(cached.length - self.budget + self.sinks, cached.length)
            index = torch.cat((torch.arange(self.sinks), newest)).to(device)
            cached.keep([index.expand(self.shape.num_kv_heads, -1)] * self.shape.num_layers)
        self.filled = self.filled or cached.length >= self.budget
        # One token, or more where blocks were short.
        while cached.length > self.budget:
            heads = (self.shape.num_layers, self.shape.num_kv_heads)
            cached.overwrite(torch.full(heads, self.oldest, device=device))
            self.oldest = self.oldest + 1 if self.oldest + 1 < self.budget else self.sinks


class CachePositions(StreamingPolicy):
    """Tokens stand where they would if only what is kept had been written.

    Attention sees distances alone, and those within the window are the same in text and cache: so the few
    first tokens follow the window, at every step, and the window stays where it is. Once it comes to the end
    of what the model knows, everything moves back to the beginning.
    """

    def __init__(self, budget: int, sinks: int, shape: SequenceShape) -> None:
        super().__init__(budget, sinks, shape)
        self.holds = budget
        self.placed = 0  # how many tokens had been dropped when the first were last moved
        self.shift = 0  # of the window: its places in the text less its positions
        self.first: Tensor | None = None  # keys of the first tokens as they were stored, [L, sinks, Hk, D]

    def seen_at(self, start: int, rows: int) -> Sequence[int]:
        if start < self.shape.prompt_tokens:
            return range(start, start + rows)
        # Where blocks are short at the very end, a few rows wait for the move at the last position.
        return [min(start - self.shift, self.shape.max_position - 1)]

    def drop(self, cached: CachedTokens) -> None:
        if self.first is None and self.sinks and cached.length > self.budget:
            keys = [cached.keys(layer)[: self.sinks] for layer in range(self.shape.num_layers)]
            self.first = torch.stack(keys)
        super().drop(cached)
        if cached.dropped == self.placed:
            return
        self.placed = cached.dropped
        window, device = cached.length - self.sinks, cached.slots().device
        oldest = cached.computed - window - self.shift  # its position
        if oldest + window >= self.shape.max_position and oldest > self.sinks:
            self._move_back(cached, oldest)
            oldest = self.sinks
        if self.first is not None:
            at = torch.arange(self.sinks, device=device)
            assert cached.cos_sin is not None
            cached.set_keys(at, turned(self.first, at, at + oldest - self.sinks, cached.cos_sin))

    def _move_back(self, cached: CachedTokens, oldest: int) -> None:
        """Let the window's first token have the position behind the first tokens."""
        window, by, device = cached.length - self.sinks, oldest - self.sinks, cached.slots().device
        place = torch.arange(window, device=device)  # in the ring
        old = oldest + (place - (self.oldest - self.sinks)) % window
        index = place + self.sinks
        keys = torch.stack([cached.keys(layer)[self.sinks :] for layer in range(self.shape.num_layers)])
        assert cached.cos_sin is not None
        cached.set_keys(index, turned(keys, old, old - by, cached.cos_sin))
        self.shift += by
