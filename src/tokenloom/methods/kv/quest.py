"""Quest: pages of keys, bounded by their least and largest numbers, read where the bound promises most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.kernels import Pages
from tokenloom.methods.kv.budget import at_least, check_budget, one_of, tokens_of
from tokenloom.methods.kv.parts import Selector
from tokenloom.methods.kv.selection import DecodeSelection
from tokenloom.methods.registry import method

LEAST_PAGES = 3


@method(
    "quest",
    hook="kv",
    title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arxiv="2406.10774",
    claim="reads an eighth of the keys to find the pages worth reading; drops nothing",
)
@dataclass(frozen=True)
class Quest(Selector):
    """Reads the pages in which a query's largest possible score is highest.

    Attributes:
        budget: tokens read by a row in each layer, or the part of the prompt.
        page: tokens of a page.
        dense_layers: the first layers, which read everything.
        group: kv: the heads of a group read the same pages, chosen by the best of them; q: each its own.
    """

    budget: int | float = 1024
    page: int = 16
    dense_layers: int = 2
    group: str = "kv"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        at_least(1, page=self.page)
        at_least(0, dense_layers=self.dense_layers)
        one_of(("kv", "q"), group=self.group)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        return QuestPolicy(self, shape)


class QuestPolicy(DecodeSelection):
    """Keeps the bounds of each layer's pages, `[pages, Hk, 2 * D]`: the largest numbers, then the least."""

    def __init__(self, knobs: Quest, shape: SequenceShape) -> None:
        super().__init__(shape)
        self.knobs = knobs
        budget = tokens_of(knobs.budget, shape.prompt_tokens)
        self.pages = max(LEAST_PAGES, -(-budget // knobs.page))
        self.bounds: dict[int, Tensor] = {}
        self.closed: dict[int, int] = {}
        """Pages whose bounds are known, by layer."""
        self.dropped = 0

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        page, length = self.knobs.page, cached.length
        total = -(-length // page)
        if layer < self.knobs.dense_layers or total <= self.pages:
            return None
        bounds = self._bounds(layer, cached)
        pages = Pages(cached.slots(), bounds, page, self.pages, self.knobs.group == "kv")
        return cached.attend_pages(layer, q, pages)

    def _bounds(self, layer: int, cached: CachedTokens) -> Tensor:
        """The bounds of all pages but the open one, which is read in any case, and room for more."""
        if cached.dropped != self.dropped:  # other tokens lie in the pages now
            self.bounds.clear()
            self.closed.clear()
            self.dropped = cached.dropped
        page, closed = self.knobs.page, self.closed.get(layer, 0)
        total = cached.length // page
        if total == closed:
            return self.bounds[layer]
        known = self.bounds.get(layer)
        if known is None or len(known) <= total:
            # With room for half as many again, and for the open page.
            heads, width = self.shape.num_kv_heads, 2 * self.shape.head_dim
            grown = cached.keys(layer, cached.length).new_zeros(total + total // 2 + 8, heads, width)
            if known is not None:
                grown[:closed] = known[:closed]
            known = self.bounds[layer] = grown
        keys = cached.keys(layer, closed * page)[: (total - closed) * page].unflatten(0, (-1, page))
        torch.cat((keys.amax(1), keys.amin(1)), -1, out=known[closed:total])
        self.closed[layer] = total
        return known
