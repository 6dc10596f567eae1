"""PyramidKV: more tokens for the first layers, fewer for the last."""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom.methods.kv.parts import LayerBudget
from tokenloom.methods.registry import method


@method(
    "pyramid",
    hook="kv",
    title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arxiv="2406.02069",
    claim="the scorer's budget falls from layer to layer; the mean stays",
)
@dataclass(frozen=True)
class Pyramid(LayerBudget):
    """A straight line from the first layer's budget to the last's, which is `1 / beta` of the mean.

    Attributes:
        beta: larger is steeper; 1 is flat.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, not {self.beta}")

    def spread(self, budget: int, window: int, prompt_tokens: int, num_layers: int) -> list[int]:
        mean = budget - window
        most, least = 2 * mean - mean / self.beta, mean / self.beta
        if most > prompt_tokens - window:
            most = prompt_tokens - window
            least = 2 * mean - most
        if mean <= 0 or num_layers == 1:
            return [budget] * num_layers
        counts = [int(most - i * (most - least) / (num_layers - 1)) + window for i in range(num_layers)]
        # What rounding left over goes to the first layers that have room, so that the mean is the budget.
        left = budget * num_layers - sum(counts)
        for i, count in enumerate(counts):
            if left and count < prompt_tokens:
                counts[i] += 1
                left -= 1
        return counts
