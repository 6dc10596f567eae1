"""Keeping the best tokens of a prompt, once it has been computed, by any scorer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.methods.kv.budget import tokens_of
from tokenloom.methods.kv.parts import HeadBudget, LayerBudget, Merger, Scorer


@dataclass
class Eviction(KVPolicy):
    """Drops what a scorer ranks last, when the prompt is complete; what comes after it is kept.

    The prompt's own rows read everything, so its blocks can be shared by prefix as without a policy, and the
    answer's first token is the one that plain attention gives.
    """

    shape: SequenceShape
    scorer: Scorer
    layer_budget: LayerBudget | None = None
    head_budget: HeadBudget | None = None
    merger: Merger | None = None
    done: bool = False
    queries: dict[int, Tensor] = field(default_factory=dict)  # by layer: those of the window so far

    def __post_init__(self) -> None:
        prompt = self.shape.prompt_tokens
        self.budget = tokens_of(self.scorer.budget, prompt)
        self.window = min(tokens_of(self.scorer.window, self.budget), prompt)
        self.last_rows = max(1, self.window)
        self.done = prompt <= max(self.budget, self.window + self.scorer.sinks)

    def rows(self, start: int, wanted: int, most: int) -> int:
        # What follows the prompt (after a preemption) reads what was kept of it, as it did before.
        end = self.shape.prompt_tokens
        return min(wanted, most, end - start) if start < end else min(wanted, most)

    def attends(self, start: int, stop: int) -> bool:
        end = self.shape.prompt_tokens
        return not self.done and self.scorer.reads_queries and start < end and stop > end - self.window

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        first = self.shape.prompt_tokens - self.window - cached.start  # row of the window's first token
        rows = q[max(0, first) :].clone()
        before = self.queries.get(layer)
        self.queries[layer] = rows if before is None else torch.cat((before, rows))

    def drop(self, cached: CachedTokens) -> None:
        prompt = self.shape.prompt_tokens
        if self.done or cached.computed < prompt:
            return
        later = torch.arange(prompt, cached.length)  # where blocks were short when the prompt ended
        layers, merged = [], []
        counts = [self.budget] * self.shape.num_layers
        if self.layer_budget is not None:
            counts = self.layer_budget.spread(self.budget, self.window, prompt, self.shape.num_layers)
        for layer, count in enumerate(counts):
            keys, values = cached.keys(layer)[:prompt], cached.values(layer)[:prompt]
            index = self._choose(layer, keys, values, count)
            if self.merger is not None:
                merged.append(
                    [self.merger.merge(keys[:, head], values[:, head], at) for head, at in enumerate(index)]
                )
            layers.append([torch.cat((at, later.to(at.device))) for at in index])
        if self.layer_budget is None and self.head_budget is None:
            cached.keep([torch.stack(heads) for heads in layers])
        else:
            cached.keep_ragged(layers)
        for layer, heads in enumerate(merged):
            for head, new in enumerate(heads):
                cached.set_values(layer, head, new)
        self.done = True
        self.queries.clear()

    def _choose(self, layer: int, keys: Tensor, values: Tensor, count: int) -> list[Tensor]:
        """What each kv head of a layer keeps, ascending."""
        n, sinks, window = len(keys), self.scorer.sinks, self.window
        queries = self.queries.get(layer, keys.new_empty(0, self.shape.num_heads, self.shape.head_dim))
        scores = self.scorer.score_layer(layer, keys, values, queries).float()
        if scores.shape != (self.shape.num_kv_heads, n):
            raise ValueError(f"scores are {list(scores.shape)}, expected {[self.shape.num_kv_heads, n]}")
        pinned = torch.cat((torch.arange(sinks), torch.arange(n - window, n))).to(scores.device)
        rest = scores[:, sinks : n - window]
        wanted = min(max(0, count - len(pinned)), rest.shape[1])
        if self.head_budget is not None:
            chosen = self.head_budget.choose(rest, wanted)
        else:
            chosen = list(rest.masked_fill(rest.isnan(), -math.inf).topk(wanted).indices)
        return [torch.cat((pinned, at + sinks)).sort().values for at in chosen]
