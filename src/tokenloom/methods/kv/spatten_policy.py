"""SpAtten's switches at work on one sequence."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import SequenceShape
from tokenloom.methods.kv.causal_logits import causal_logits
from tokenloom.methods.kv.key_planes import KeyPlanes, from_high, split
from tokenloom.methods.kv.selection import DecodeSelection

if TYPE_CHECKING:
    from tokenloom.methods.kv.spatten import SpAttenHead, SpAttenLocalV, SpAttenPQ, SpAttenToken


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; of equal ones the first."""
    least = scores.topk(count).values[-1]
    above, ties = scores > least, scores == least
    return (above | (ties & (ties.cumsum(0) <= count - above.sum()))).nonzero()[:, 0]


class SpAtten(DecodeSelection):
    """What the switches know of one sequence.

    `token_sums` `[length]` and `head_sums` `[Hq]` go on from row to row; `alive` and `heard`, indices or None
    for all, from layer to layer of one row. `counts` says what was read of what there was: keys and values
    (of `dense`) by query head, and heads (of `heads`) that needed low bits.
    """

    def __init__(
        self,
        shape: SequenceShape,
        token: SpAttenToken | None = None,
        head: SpAttenHead | None = None,
        local_v: SpAttenLocalV | None = None,
        pq: SpAttenPQ | None = None,
    ) -> None:
        super().__init__(shape)
        self.pq = pq
        self.token = token if token is not None and token.r_end > 0 else None
        self.head = head if head is not None and head.r_end > 0 else None
        self.keep = local_v.keep if local_v is not None else 1.0
        self.active = bool(self.token or self.head or self.pq or self.keep < 1)
        prompt = shape.prompt_tokens
        # The first rows that are summed over.
        self.token_row = max(0, prompt - (self.token.score_rows or prompt)) if self.token else prompt
        self.head_row = max(0, prompt - self.head.score_rows) if self.head else prompt
        self.last_rows = max(1, prompt - min(self.token_row, self.head_row))
        self.planes = KeyPlanes(self.pq.hi + self.pq.lo, self.pq.steps == "tensor") if self.pq else None
        self.token_sums: Tensor = torch.zeros(0)
        self.head_sums: Tensor = torch.zeros(shape.num_heads)
        self.alive: Tensor | None = None
        self.heard: Tensor | None = None
        self.counts: Counter[str] = Counter()

    def attends(self, start: int, stop: int) -> bool:
        return self.active and stop > min(self.token_row, self.head_row)

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        if layer == 0:
            wide = torch.promote_types(q.dtype, torch.float32)
            new = cached.length - len(self.token_sums)
            self.token_sums = F.pad(self.token_sums.to(q.device, wide), (0, new))
            self.head_sums = self.head_sums.to(q.device, wide)
            self.alive = self.heard = None
        if cached.start < self.shape.prompt_tokens:
            self._observe(layer, q, cached)
            return None
        self._narrow(layer, cached.length)
        return self._decode(layer, q, cached)

    # -- the prompt: read in full, and summed over ----------------------------------------------------------

    def _observe(self, layer: int, q: Tensor, cached: CachedTokens) -> None:
        end = cached.start + len(q)
        if self.token is not None and end > self.token_row:
            rows = q[max(0, self.token_row - cached.start) :]
            paid = torch.zeros_like(self.token_sums)
            for _, logits in causal_logits(rows, cached.keys(layer)):
                paid[: logits.shape[-1]] += torch.softmax(logits, -1).sum((0, 1, 2))
            if self.token.row_norm:
                first = torch.arange(len(paid), device=q.device).clamp_min_(self.token_row)
                paid /= self.shape.prompt_tokens - first
            self.token_sums += paid.nan_to_num_()
        if self.head is not None and end > self.head_row:
            rows = q[max(0, self.head_row - cached.start) :]
            self._hear(cached.attend(layer, rows))

    def _hear(self, attended: Tensor) -> None:
        self.head_sums += attended.abs().sum((0, 2), dtype=self.head_sums.dtype).nan_to_num_()

    # -- rows after it --------------------------------------------------------------------------------------

    def _narrow(self, layer: int, length: int) -> None:
        """What this layer reads and hears of what the one before it did."""
        num_layers = self.shape.num_layers
        if self.token is not None:
            count = max(
                self.token.ramp.keep(layer, num_layers, length),
                min(length, self.token.protect_sink + self.token.protect_recent),
            )
            if count < (length if self.alive is None else len(self.alive)):
                worth = self.token_sums.clone() if self.alive is None else self.token_sums[self.alive]
                worth[: self.token.protect_sink] = torch.inf
                worth[-self.token.protect_recent :] = torch.inf
                chosen = best(worth, count)
                self.alive = chosen if self.alive is None else self.alive[chosen]
        if self.head is not None:
            count = self.head.ramp.keep(layer, num_layers, self.shape.num_heads)
            if count < (self.shape.num_heads if self.heard is None else len(self.heard)):
                worth = self.head_sums if self.heard is None else self.head_sums[self.heard]
                chosen = best(worth, count)
                self.heard = chosen if self.heard is None else self.heard[chosen]

    def _decode(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        heads, read = self.shape.num_heads, cached.length if self.alive is None else len(self.alive)
        loud = heads if self.heard is None else len(self.heard)
        values = max(1, int(read * self.keep + 1e-9))
        self.counts.update(dense=heads * cached.length, keys=loud * read, values=loud * values)
        paid = None
        if self.token is not None or self.pq is not None or values < read:
            paid = self._probabilities(layer, q, cached)  # [Hq, read]
        if self.token is not None and paid is not None:
            total = (paid if self.heard is None else paid[self.heard]).sum(0).nan_to_num_()
            if self.alive is None:
                self.token_sums += total
            else:
                self.token_sums[self.alive] += total
        if paid is not None and (self.pq is not None or values < read):
            out = self._weighted(layer, paid.to(q.dtype), values, cached)[None]
        elif self.alive is None and self.head is None:
            return None  # this layer reads and hears everything
        else:
            out = cached.attend(layer, q, self.alive)
        if self.heard is not None:
            silent = torch.ones(heads, dtype=torch.bool, device=q.device)
            silent[self.heard] = False
            out[:, silent] = 0
        if self.head is not None:
            self._hear(out)
        return out

    def _probabilities(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor:
        """Of a row over the tokens alive, `[Hq, tokens]`."""
        if self.pq is None or self.planes is None:
            keys = cached.keys(layer)
            return _softmax(q, keys if self.alive is None else keys[self.alive])
        codes, step = self.planes.read(layer, cached, self.alive)
        high, _ = split(codes, self.pq.lo)
        paid = _softmax(q, from_high(high, self.pq.lo, step.dtype).mul_(step))
        sinks = self.pq.exclude_sinks
        if self.alive is not None:
            sinks = int((self.alive < sinks).sum())
        others = paid[:, sinks:]
        flat = others.amax(-1) < self.pq.threshold if others.numel() else paid.new_ones(len(paid)).bool()
        low = int((flat if self.heard is None else flat[self.heard]).sum())
        self.counts.update(heads=len(paid) if self.heard is None else len(self.heard), low=low)
        if low:
            paid = torch.where(flat[:, None], _softmax(q, codes.to(step.dtype).mul_(step)), paid)
        return paid

    def _weighted(self, layer: int, paid: Tensor, count: int, cached: CachedTokens) -> Tensor:
        """The sum of the values of each head's `count` largest probabilities, `[Hq, D]`."""
        num_kv_heads, size = self.shape.num_kv_heads, self.shape.num_heads // self.shape.num_kv_heads
        values = cached.values(layer).to(paid.dtype)
        cached.tokens_read += num_kv_heads * paid.shape[1]
        if count == paid.shape[1]:
            values = values if self.alive is None else values[self.alive]
            return torch.matmul(paid.unflatten(0, (num_kv_heads, size)), values.transpose(0, 1)).flatten(0, 1)
        largest, index = paid.topk(count, sorted=False)
        index = index if self.alive is None else self.alive[index]
        head = torch.arange(num_kv_heads, device=paid.device).repeat_interleave(size)
        return torch.matmul(largest[:, None], values[index, head[:, None]])[:, 0]


def _softmax(q: Tensor, keys: Tensor) -> Tensor:
    """One row's q `[1, Hq, D]` on keys `[m, Hk, D]`: `[Hq, m]`."""
    ((_, logits),) = causal_logits(q, keys)
    return torch.softmax(logits, -1).flatten(0, 2)
