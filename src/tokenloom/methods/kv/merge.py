"""What is dropped leaves its value with the kept token that is most like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.methods.kv.parts import Merger
from tokenloom.methods.registry import method


@method(
    "merge",
    hook="kv",
    title="A Survey on LLM Acceleration based on KV Cache Management: merging (D2O, CaM and others)",
    arxiv="2412.19442",
    claim="values of dropped tokens are averaged into their nearest kept neighbours",
)
@dataclass(frozen=True)
class Merge(Merger):
    """Weighs a dropped token by its key's cosine to the nearest kept key and by its value's norm; keys stay.

    Attributes:
        threshold: of the cosine, below which a token is dropped for good.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between -1 and 1, not {self.threshold}")

    def merge(self, keys: Tensor, values: Tensor, kept: Tensor) -> Tensor:
        gone = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        gone[kept] = False
        directions, norms = F.normalize(keys, dim=-1), values.norm(dim=-1)
        cosine, target = (directions[gone] @ directions[kept].t()).max(-1)
        if not len(cosine):
            return values[kept]
        size = norms[gone] / (norms[gone] + norms[kept][target]).clamp_min(1e-30)
        weight = cosine.clamp_min(0) * size * (cosine >= self.threshold)
        merged = values[kept].index_add(0, target, weight[:, None] * values[gone])
        total = torch.ones(len(kept), dtype=keys.dtype, device=keys.device).index_add(0, target, weight)
        return merged / total[:, None]
