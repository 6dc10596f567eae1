"""Prefixes that sequences of a batch share: who shares what, and attention that reads each of them once.

Softmax over a row's keys can be taken in parts: each gives a weighted mean of its values and the logarithm of
the sum of its weights, and the whole is the mean of those means, weighted by the sums. Keys that many rows
read are then one part, read once for all of their queries (Hydragen, arXiv 2402.05099).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.interface import KVSpan, SharedPrefix

LEAST_TOKENS = 64
"""Shorter prefixes are not worth a result more to be merged."""
MOST_ROWS = 8
"""Spans of more rows than these meet each key often enough alone."""


def shared_prefixes(
    spans: Sequence[KVSpan], block_size: int, least_tokens: int = LEAST_TOKENS, piece: int = 1
) -> list[SharedPrefix]:
    """What spans of few rows have in common at their beginning, as a tree: what all of a group share, then
    what parts of the group share behind it.

    Only whole blocks that all rows of a span read; at least `least_tokens` each, and of those only what lies
    between multiples of `piece` tokens.
    """
    found: list[SharedPrefix] = []
    few = [span for span in spans if span.length <= MOST_ROWS]
    _split(few, 0, 0, block_size, max(1, -(-least_tokens // block_size)), found)
    if piece == 1:
        return found
    cut = (replace(p, begin=p.begin // piece * piece, end=p.end // piece * piece) for p in found)
    return [prefix for prefix in cut if prefix.begin < prefix.end]


def _split(
    spans: list[KVSpan], begin: int, at: int, block_size: int, least: int, found: list[SharedPrefix]
) -> None:
    """Spans that have their blocks before `at` in common; those before `begin` are in `found` already."""
    groups: dict[int, list[KVSpan]] = {}
    for span in spans:
        if (at + 1) * block_size <= span.num_before:
            groups.setdefault(span.blocks[at], []).append(span)
    for group in groups.values():
        if len(group) < 2:
            continue
        end = _common_end(group, at + 1, block_size)
        start = begin
        if end - begin >= least:
            found.append(SharedPrefix(begin * block_size, end * block_size, group))
            start = end
        _split(group, start, end, block_size, least, found)


def _common_end(group: list[KVSpan], at: int, block_size: int) -> int:
    """Where the blocks that all have in common end; those before `at` are known to be."""
    first, end = group[0].blocks, min(span.num_before for span in group) // block_size
    for span in group[1:]:
        # Rows of a tree have the same list; others are compared as a whole, since most agree to their end.
        if span.blocks is not first and span.blocks[at:end] != first[at:end]:
            end = next(i for i in range(at, end) if span.blocks[i] != first[i])
    return end


def attend_shared(
    q: Tensor, kv: KVCache, layer: int, shared: Sequence[SharedPrefix], out: Tensor
) -> set[int]:
    """Attention of all spans that share something, by plain products.

    Args:
        q: `[T, Hq, D]`; out: the same, written where these spans' rows are.

    Returns:
        The first rows of the spans that are done.
    """
    spans = {span.start: span for prefix in shared for span in prefix.spans}
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {start: [] for start in spans}
    own_begin = dict.fromkeys(spans, 0)
    for prefix in shared:
        # The last rows of any of these spans: all of them read the whole prefix.
        first = prefix.spans[0]
        keys = KVSpan(0, 1, prefix.end, first.blocks[: -(-prefix.end // kv.block_size)], first.contiguous)
        k, v = keys.read(kv, layer, prefix.begin)
        rows = torch.cat([torch.arange(s.start, s.start + s.length) for s in prefix.spans])
        mean, log_sum = _part(q[rows.to(q.device)], k, v, causal=False)
        ends = [s.length for s in prefix.spans]
        for span, m, s in zip(prefix.spans, mean.split(ends), log_sum.split(ends), strict=True):
            parts[span.start].append((m, s))
            own_begin[span.start] = max(own_begin[span.start], prefix.end)
    for start, span in spans.items():
        own_rows = slice(start, start + span.length)
        k, v = span.read(kv, layer, own_begin[start])
        parts[start].append(_part(q[own_rows], k, v, causal=True))
        means, log_sums = (torch.stack(list(each)) for each in zip(*parts[start], strict=True))
        weights = torch.softmax(log_sums, dim=0)
        out[own_rows] = (means * weights[..., None]).sum(0).to(q.dtype)
    return set(spans)


def _part(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: mean `[n, Hq, D]` and log of the sum of weights `[n, Hq]`.

    q: `[n, Hq, D]`; k, v: `[L, Hk, D]`; causal: the rows are the last n of the keys.
    """
    (n, num_heads, head_dim), (length, num_kv_heads, _) = q.shape, k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(dtype).view(n, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [Hk, G, n, D]
    k, v = (x.to(dtype).transpose(0, 1) for x in (k, v))  # [Hk, L, D]
    scores = (query.flatten(1, 2) @ k.transpose(1, 2) / math.sqrt(head_dim)).view(*query.shape[:3], length)
    if causal and n > 1:
        ahead = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., length - n :].masked_fill_(ahead, -math.inf)
    log_sum = scores.logsumexp(-1)
    weights = torch.exp(scores - log_sum[..., None])
    mean = (weights.flatten(1, 2) @ v).view(*query.shape)
    return mean.permute(2, 0, 1, 3).reshape(n, num_heads, head_dim), log_sum.permute(2, 0, 1).flatten(1)
