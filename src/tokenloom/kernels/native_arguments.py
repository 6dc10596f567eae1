"""What the native kernels are called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.interface import KVSpan, SharedPrefix
from tokenloom.kernels.native import native

# For nanobind a tensor's own `__dlpack__` takes 4.5 µs, this 0.3.
capsule = to_dlpack

SpanTable = tuple[Tensor, Tensor]


def span_table(spans: list[KVSpan]) -> SpanTable:
    """What the kernels read of a batch's spans: int32 `[S, 4]` (start, length, kv_len, first block) and all
    block ids. Where spans have tails, two more columns: length, and where in the blocks it begins."""
    table: list[tuple[int, ...]] = []
    lists: list[list[int]] = []
    first = 0
    for span in spans:
        if lists and span.blocks is lists[-1]:  # rows of one draft share them
            begin = first - len(span.blocks)
        else:
            begin = first
            lists.append(span.blocks)
            first += len(span.blocks)
        table.append((span.start, span.length, span.kv_len, begin))
    if any(span.tail for span in spans):
        for i, span in enumerate(spans):
            table[i] += (len(span.tail), first)
            lists.append(span.tail)
            first += len(span.tail)
    blocks = np.fromiter((b for part in lists for b in part), np.int32, first)
    columns = len(table[0]) if table else 4
    return torch.from_numpy(np.array(table, np.int32).reshape(-1, columns)), torch.from_numpy(blocks)


def shared_table(spans: Sequence[KVSpan], shared: Sequence[SharedPrefix]) -> SpanTable | None:
    """What the kernels read of prefixes that spans share: int32 `[R, 3]` (begin, end, number of spans) and
    the places in `spans` of those that share each; None: nothing is shared."""
    if not shared:
        return None
    place = {span.start: i for i, span in enumerate(spans)}
    table = [(prefix.begin, prefix.end, len(prefix.spans)) for prefix in shared]
    members = [place[span.start] for prefix in shared for span in prefix.spans]
    return torch.tensor(table, dtype=torch.int32), torch.tensor(members, dtype=torch.int32)


def keys_read(
    spans: list[KVSpan],
    shared: Sequence[SharedPrefix],
    block_size: int,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> int:
    """How many keys, of one head each, attention of these spans reads in one layer; as many values."""
    table = shared_table(spans, shared)
    return int(native.keys_read(*span_table(spans), block_size, 0, num_heads, num_kv_heads, table))


def native_cache(kv: KVCache) -> Any:
    if kv.native is None:
        kv.native = native.KV(kv.keys, kv.values, kv.key_scales, kv.value_scales)
    return kv.native
