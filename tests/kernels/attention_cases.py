"""Ragged batches over a paged cache, and native attention of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, get_kernels, native
from tokenloom.kernels.cpu import HEAD_DIMS
from tokenloom.kernels.native_arguments import native_cache, span_table

TORCH = get_kernels("torch")
ISAS = native.isas() if native is not None else []
CPU = torch.device("cpu")
BLOCK = 4  # of the caches of calls that are refused


@dataclass
class Case:
    q: Tensor
    kv: KVCache
    spans: list[KVSpan]
    window: int | None

    def attend(self, threads: int = 2) -> Tensor:
        return attend(self.q, self.kv, self.spans, self.window, threads)

    def expected(self) -> Tensor:
        return TORCH.attention(self.q.double(), in_float64(self.kv), 0, self.spans, self.window)


def attend(
    q: Tensor, kv: KVCache, spans: list[KVSpan], window: int | None = None, threads: int = 2
) -> Tensor:
    out = torch.full(q.shape, torch.nan)
    table = span_table(spans)
    native.attention(q, native_cache(kv), 0, *table, kv.block_size, window or 0, out, None, threads)
    return out


def cache(kv_heads: int, head_dim: int, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    """A cache full of normal numbers."""
    kv = KVCache(1, kv_heads, head_dim, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=CPU)
    slots = torch.arange(num_blocks * block_size)
    kv.write(
        0, slots, torch.randn(len(slots), kv_heads, head_dim), torch.randn(len(slots), kv_heads, head_dim)
    )
    return kv


def in_float64(kv: KVCache) -> KVCache:
    """The same numbers."""
    kv_heads, head_dim = kv.keys[0].shape[1:]
    wide = KVCache(
        1,
        kv_heads,
        head_dim,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        dtype=torch.float64,
        device=CPU,
    )
    for part, scales, to in ((kv.keys, kv.key_scales, wide.keys), (kv.values, kv.value_scales, wide.values)):
        to[0][:] = part[0].double() * scales[0].double()[..., None] if kv.quantized else part[0].double()
    return wide


def span(start: int, length: int, kv_len: int, blocks: list[int]) -> KVSpan:
    consecutive = all(b + 1 == c for b, c in itertools.pairwise(blocks))
    return KVSpan(start, length, kv_len, blocks, consecutive)


def batch(
    seed: int,
    parts: list[tuple[int, int]],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    scattered: bool = True,
) -> Case:
    """parts: (rows, tokens that came before them) of each sequence."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(rows + past) // block_size) for rows, past in parts) + 1
    free = torch.randperm(num_blocks).tolist() if scattered else list(range(num_blocks))
    spans, row = [], 0
    for rows, past in parts:
        needed = -(-(rows + past) // block_size)
        blocks, free = free[:needed], free[needed:]
        spans.append(span(row, rows, rows + past, blocks))
        row += rows
    kv = cache(kv_heads, head_dim, num_blocks, block_size, dtype)
    return Case(torch.randn(row, kv_heads * group, head_dim), kv, spans, window)


@st.composite
def ragged(
    draw: st.DrawFn,
    pasts: tuple[int, ...] = (0, 1, 3, 4, 17, 70),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.int8),
) -> Case:
    """Prompts, chunks and decodes over scattered and consecutive blocks."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3), (3, 3), (1, 4), (1, 8)]))
    one = st.tuples(st.sampled_from([1, 1, 2, 5, 8, 9, 70]), st.sampled_from(pasts))
    return batch(
        draw(st.integers(0, 2**31)),
        draw(st.lists(one, min_size=1, max_size=5)),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        window=draw(st.sampled_from([None, 1, 3, 64, 65])),
        scattered=draw(st.booleans()),
    )


def table(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)
