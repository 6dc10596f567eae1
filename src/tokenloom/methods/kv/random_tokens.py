"""Tokens by lot: what every scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.methods.kv.budget import at_least, check_budget, check_window
from tokenloom.methods.kv.parts import Scorer
from tokenloom.methods.registry import method


@method("random", hook="kv", title="Random tokens", claim="the row of a table that a scorer must beat")
@dataclass(frozen=True)
class RandomTokens(Scorer):
    """Keeps tokens at random, besides the first and the last.

    Attributes:
        budget: tokens kept of the prompt by each kv head, or the part of them.
        window, sinks: of which so many (or such a part) are the last, and so many the first.
        seed: of the lot; it is another in each layer, and the same for prompts of the same length.
    """

    budget: int | float = 2048
    window: int | float = 32
    sinks: int = 4
    seed: int = 0
    reads_queries = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_window(self.window)
        at_least(0, sinks=self.sinks)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return self.score_layer(0, keys, values, queries)

    def score_layer(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(((self.seed << 16) + layer) % 2**63)
        return torch.rand(keys.shape[1], len(keys), generator=generator).to(keys.device)
