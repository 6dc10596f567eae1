"""What methods look at that sum up attention: logits of a prompt's rows, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# So many logits exist at a time: 1 MB in float32, which stays in a core's second cache from step to step.
_LOGITS_AT_A_TIME = 2**18


def causal_logits(q: Tensor, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    """q . k / sqrt(D) of the last rows of a sequence, -inf where a key comes after the row.

    Args:
        q: `[n, Hq, D]`, after RoPE; the rows are the last n tokens of `keys`.
        keys: `[m, Hk, D]`.

    Yields:
        The first of some rows, and their logits `[Hk, G, rows, keys up to the last row]`, in float32 at
        least; they may be written over.
    """
    (n, num_heads, head_dim), (m, num_kv_heads) = q.shape, keys.shape[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    step = max(1, _LOGITS_AT_A_TIME // (num_heads * m))
    by_head = keys.to(wide).permute(1, 2, 0)
    for first in range(0, n, step):
        rows = q[first : first + step].to(wide) / math.sqrt(head_dim)
        count, end = len(rows), m - n + first + len(rows)
        rows = rows.view(count, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        logits = torch.matmul(rows.flatten(1, 2), by_head[..., :end]).unflatten(1, (-1, count))
        if count > 1:
            ahead = torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1)
            logits[..., end - count :].masked_fill_(ahead, -math.inf)
        yield first, logits
