"""Ada-KV: heads whose attention is spread get more of a layer's budget than those that look at few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.methods.kv.budget import part
from tokenloom.methods.kv.parts import HeadBudget
from tokenloom.methods.registry import method


@method(
    "adakv",
    hook="kv",
    title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation",
    arxiv="2407.11550",
    claim="the heads of a layer compete for its budget",
)
@dataclass(frozen=True)
class AdaKV(HeadBudget):
    """Each head keeps its best `alpha` of an even share; the rest goes to the best scores of all heads.

    Attributes:
        alpha: between 0 (all by score) and 1 (even shares).
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        part(alpha=self.alpha)

    def choose(self, scores: Tensor, count: int) -> list[Tensor]:
        num_heads = len(scores)
        ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).clone()
        taken = torch.zeros_like(ranked, dtype=torch.bool)
        taken.scatter_(1, ranked.topk(int(self.alpha * count)).indices, True)
        rest = num_heads * count - int(taken.sum())
        # The stable sort decides ties by position: the same tokens whatever else is computed.
        order = ranked.masked_fill(taken, -torch.inf).flatten().sort(descending=True, stable=True).indices
        free = order[~taken.flatten()[order]][:rest]
        taken.view(-1)[free] = True
        return [row.nonzero()[:, 0] for row in taken]
