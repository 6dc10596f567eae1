"""KeyDiff: keys that point elsewhere than most are kept; no attention needs to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tokenloom.methods.kv.budget import at_least, check_budget, check_window
from tokenloom.methods.kv.parts import Scorer
from tokenloom.methods.registry import method


@method(
    "keydiff",
    hook="kv",
    title="KeyDiff: Key Similarity-Based KV Cache Eviction",
    arxiv="2504.15364",
    claim="keeps the keys least like the mean key: no queries, so prefill runs as it is",
)
@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Scores a token by minus the cosine of its key to the mean of all keys' directions.

    Attributes:
        budget: tokens kept of the prompt by each kv head, or the part of them.
        window, sinks: of which so many (or such a part) are the last, and so many the first.
    """

    budget: int | float = 2048
    window: int | float = 32
    sinks: int = 4
    reads_queries = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_window(self.window)
        at_least(0, sinks=self.sinks)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        directions = F.normalize(keys, dim=-1)
        return -F.cosine_similarity(directions, directions.mean(0, keepdim=True), dim=-1).t()
