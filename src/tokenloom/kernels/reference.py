"""The truth: every row is computed alone, so a token's numbers never depend on what shares its batch.

Each operator handles one row at a time with calls whose shapes depend on that row only (its width, its
context length). The same row therefore gives the same bits alone or in a batch, in one prefill or in
chunks, with a cold or a warm prefix cache. Faster backends are tested against this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.interface import KVSpan, LayerWeights, ModelShape, Pages, SharedPrefix
from tokenloom.kernels.packed import PackedWeight, Weight, dense
from tokenloom.kernels.pages import attend_to_pages


class ReferenceKernels:
    """See `tokenloom.kernels.interface.Kernels` for shapes."""

    name = "reference"

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedWeight):
            weight = dense(weight, like=x)
        y = x.new_empty(len(x), len(weight))
        for i, row in enumerate(x):
            # BLAS picks its order of summation by the vector's alignment, so each row gets a fresh one.
            y[i] = torch.mv(weight, row.clone())
        return y if bias is None else y + bias

    def linear_backward(self, dy: Tensor, weight: Weight, extra: Tensor | None = None) -> Tensor:
        dx = dy @ dense(weight, like=dy)
        return dx if extra is None else dx + extra

    def reads_packed(self, dy: Tensor) -> bool:
        return False

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        y += self.linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(_wide(gate_up.dtype)).chunk(2, dim=-1)
        return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)

    def rms_norm_backward(self, dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        wide, d_normed = x.to(_wide(x.dtype)), (dy * weight).to(_wide(x.dtype))
        mean = wide.pow(2).mean(-1, keepdim=True) + eps
        along = (d_normed * wide).mean(-1, keepdim=True) / mean
        dx += ((d_normed - wide * along) / mean.sqrt()).to(x.dtype)

    def silu_mul_backward(self, dy: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(_wide(gate_up.dtype)).chunk(2, dim=-1)
        sigmoid = 1 / (1 + torch.exp(-gate))
        d_gate = dy * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        return torch.cat((d_gate, dy * gate * sigmoid), dim=-1).to(gate_up.dtype)

    def rotation(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return cos[:, None].to(dtype), sin[:, None].to(dtype)

    def rope(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotation
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        spans: list[KVSpan],
        window: int | None = None,
        shared: Sequence[SharedPrefix] = (),
    ) -> Tensor:
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = kv.keys[layer].shape[1]
        out = torch.empty_like(q)
        for span in spans:
            keys, values = span.read(kv, layer)  # [kv_len, Hk, D]
            for i in range(span.length):
                end = span.kv_len - span.length + i + 1  # this row and all that came before it
                begin = 0 if window is None else max(0, end - window)
                group = q[span.start + i].view(num_kv_heads, num_heads // num_kv_heads, head_dim)
                k = keys[begin:end].permute(1, 2, 0).contiguous()  # [Hk, D, L]
                v = values[begin:end].transpose(0, 1).contiguous()  # [Hk, L, D]
                scores = torch.matmul(group, k) / math.sqrt(head_dim)
                weights = torch.softmax(scores, dim=-1, dtype=_wide(q.dtype)).to(q.dtype)
                out[span.start + i] = torch.matmul(weights, v).reshape(num_heads, head_dim)
        return out

    def exact_prefix_tokens(self, shape: ModelShape, dtype: torch.dtype) -> int | None:
        return None

    def attention_at(self, q: Tensor, kv: KVCache, cells: Tensor | Sequence[Tensor]) -> Tensor:
        n, num_heads, head_dim = q.shape
        out = torch.empty_like(q).view(n, len(cells), -1, head_dim)
        for j, at in enumerate(cells):
            keys, values = kv.read_cells(at, q.dtype)  # [m, D]
            for i in range(n):
                end = len(at) - n + i + 1
                query = q.view(out.shape)[i, j]
                scores = torch.matmul(query, keys[:end].t().contiguous()) / math.sqrt(head_dim)
                weights = torch.softmax(scores, dim=-1, dtype=_wide(q.dtype)).to(q.dtype)
                out[i, j] = torch.matmul(weights, values[:end].contiguous())
        return out.view(n, num_heads, head_dim)

    def attention_over_pages(self, q: Tensor, kv: KVCache, layer: int, pages: Pages) -> Tensor:
        return attend_to_pages(self, q, kv, layer, pages)

    def key_scores(self, q: Tensor, keys: Tensor, slots: Tensor, scales: Tensor | None = None) -> Tensor:
        group = len(q) // keys.shape[1]
        out = q.new_empty(len(q), len(slots))
        for head, query in enumerate(q):
            for i, slot in enumerate(slots.tolist()):
                key = keys[slot, head // group].to(q.dtype)
                out[head, i] = query @ (key if scales is None else key * scales[slot, head // group])
        return out

    def attention_for_backward(
        self, q: Tensor, kv: KVCache, layer: int, spans: list[KVSpan], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        num_heads, head_dim = q.shape[1:]
        log_sums = q.new_empty(q.shape[:2])
        for span in spans:
            keys, _ = span.read(kv, layer)  # [kv_len, Hk, D]
            for i in range(span.length):
                end = span.kv_len - span.length + i + 1
                begin = 0 if window is None else max(0, end - window)
                group = q[span.start + i].view(keys.shape[1], -1, head_dim)
                scores = torch.matmul(group, keys[begin:end].permute(1, 2, 0)) / math.sqrt(head_dim)
                log_sums[span.start + i] = scores.logsumexp(-1).view(num_heads)
        return self.attention(q, kv, layer, spans, window), log_sums

    def attention_backward(
        self,
        d_out: Tensor,
        q: Tensor,
        out: Tensor,
        log_sums: Tensor,
        kv: KVCache,
        layer: int,
        spans: list[KVSpan],
        firsts: list[int],
        dk: Tensor,
        dv: Tensor,
        window: int | None = None,
    ) -> Tensor:
        num_heads, head_dim = q.shape[1:]
        num_kv_heads, scale = len(dk), 1 / math.sqrt(head_dim)
        dq = torch.empty_like(q)
        for span, first in zip(spans, firsts, strict=True):
            keys, values = (part.transpose(0, 1) for part in span.read(kv, layer))  # [Hk, kv_len, D]
            for i in range(span.length):
                end = span.kv_len - span.length + i + 1
                begin = 0 if window is None else max(0, end - window)
                k, v, at = keys[:, begin:end], values[:, begin:end], slice(first + begin, first + end)
                group, d_group = (x[span.start + i].view(num_kv_heads, -1, head_dim) for x in (q, d_out))
                sums = log_sums[span.start + i].view(num_kv_heads, -1, 1)
                weights = torch.exp(group @ k.transpose(1, 2) * scale - sums)
                d_weights = d_group @ v.transpose(1, 2)
                d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
                dq[span.start + i] = (d_scores @ k).reshape(num_heads, head_dim)
                dk[:, at] += d_scores.transpose(1, 2) @ group
                dv[:, at] += weights.transpose(1, 2) @ d_group
        return dq

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        values, ids = logits.topk(k, dim=-1)
        return values, ids, logits.logsumexp(-1)

    def likeliest(self, logits: Tensor, k: int) -> Tensor:
        return logits.topk(k, dim=-1).indices

    def largest(self, scores: Tensor, k: int) -> Tensor:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices
        return ranked[:, :k].sort().values

    def fuse(self, shape: ModelShape, layers: Sequence[LayerWeights]) -> None:
        return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
