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
    """Drops what a scorer ranks last, when the prompt's context is complete; what comes after it is kept.

    The context is the whole prompt unless the request says that a question follows it. Its own rows read
    everything, so its blocks can be shared by prefix as without a policy. Without a question, the answer's
    first token is then the one that plain attention gives.
    """

    shape: SequenceShape
    scorer: Scorer
    layer_budget: LayerBudget | None = None
    head_budget: HeadBudget | None = None
    merger: Merger | None = None
    done: bool = False
    queries: dict[int, Tensor] = field(default_factory=dict)  # by layer: those of the window so far

    def __post_init__(self) -> None:
        self.heeds_context = True
        context, prompt = self.shape.context_tokens, self.shape.prompt_tokens
        self.budget = tokens_of(self.scorer.budget, context)
        self.window = min(tokens_of(self.scorer.window, self.budget), context)
        self.last_rows = max(1, prompt - context + self.window)
        self.done = context <= max(self.budget, self.window + self.scorer.sinks)

    def rows(self, start: int, wanted: int, most: int) -> int:
        # What follows (after a preemption, the answer too) reads what was kept, as it did before.
        end = self.shape.context_tokens
        return min(wanted, most, end - start) if start < end else min(wanted, most)

    def attends(self, start: int, stop: int) -> bool:
        end = self.shape.context_tokens
        return not self.done and self.scorer.reads_queries and start < end and stop > end - self.window

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        first = self.shape.context_tokens - self.window - cached.start  # row of the window's first token
        rows = q[max(0, first) :].clone()
        before = self.queries.get(layer)
        self.queries[layer] = rows if before is None else torch.cat((before, rows))

    def drop(self, cached: CachedTokens) -> None:
        context = self.shape.context_tokens
        if self.done or cached.computed < context:
            return
        later = torch.arange(context, cached.length)  # where blocks were short when the context ended
        layers, merged = [], []
        counts = [self.budget] * self.shape.num_layers
        if self.layer_budget is not None:
            counts = self.layer_budget.spread(self.budget, self.window, context, self.shape.num_layers)
        for layer, count in enumerate(counts):
            keys, values = cached.keys(layer)[:context], cached.values(layer)[:context]
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

    def shared_tokens(self, prompt_tokens: int) -> int:
        return min(prompt_tokens, self.shape.context_tokens)

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
