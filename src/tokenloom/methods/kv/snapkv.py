"""SnapKV: the prompt's last tokens look back and say what they would read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.methods.kv.budget import at_least, check_budget
from tokenloom.methods.kv.parts import Scorer
from tokenloom.methods.registry import method


def window_attention(keys: Tensor, queries: Tensor) -> Tensor:
    """Causal attention of the last W tokens: keys `[n, Hk, D]`, queries `[W, Hq, D]` -> `[Hk, G, W, n]`."""
    (n, num_kv_heads, head_dim), window = keys.shape, len(queries)
    q = queries.view(window, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = torch.matmul(q.flatten(1, 2), keys.permute(1, 2, 0)).div_(math.sqrt(head_dim))
    scores = scores.view(num_kv_heads, -1, window, n)
    ahead = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu_(1)
    scores[..., n - window :].masked_fill_(ahead, -math.inf)
    return torch.softmax(scores, dim=-1)


@method(
    "snapkv",
    hook="kv",
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    claim="keeps of a prompt what its last tokens attend to",
)
@dataclass(frozen=True)
class SnapKV(Scorer):
    """Scores a token by the attention that the window's queries pay it, pooled over its neighbours.

    Attributes:
        budget: tokens kept of the prompt by each kv head, window included, or the part of them.
        window: how many last tokens observe (and are kept).
        kernel: width of the pooling, odd; 1: none.
        pooling: avg or max.
    """

    budget: int | float = 2048
    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        at_least(1, window=self.window, kernel=self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}")
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"pooling must be avg or max, not {self.pooling}")

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        before = len(keys) - len(queries)
        seen = window_attention(keys, queries).mean(2)[..., :before]  # [Hk, G, before]
        if self.kernel > 1 and before:
            pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
            seen = pool(seen, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(seen.mean(1), (0, len(queries)))
