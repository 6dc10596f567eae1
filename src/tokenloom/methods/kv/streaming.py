"""StreamingLLM: the first tokens and the last ones, and nothing between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.methods.kv.budget import at_least, check_budget, tokens_of
from tokenloom.methods.kv.parts import Evictor
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
    """Keeps `sinks` tokens from the start and the newest `budget - sinks`, at their original positions.

    Attributes:
        budget: tokens kept, or the part of the prompt.
        sinks: of which so many are the first.
    """

    budget: int | float = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        check_budget(self.budget)
        at_least(0, sinks=self.sinks)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return StreamingPolicy(
            max(tokens_of(self.budget, shape.prompt_tokens), self.sinks + 1), self.sinks, shape
        )


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
