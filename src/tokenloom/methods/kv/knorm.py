"""Key norms: tokens whose keys are short get the attention, so those are kept."""

from __future__ import annotations

from torch import Tensor

from tokenloom.methods.kv.plain_scorer import scorer


@scorer(
    "knorm",
    budget=2048,
    window=0.3,
    reads_queries=False,
    title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arxiv="2406.11430",
    claim="keeps the shortest keys: the cheapest score there is",
)
def knorm(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """Minus the length of each key, `[Hk, n]` (Section 3)."""
    return -keys.norm(dim=-1).t()
