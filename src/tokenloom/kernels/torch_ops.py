"""Fast paths in plain torch, for CPU and CUDA. Tested against `kernels.reference`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.interface import FusedLayers, KVSpan, LayerWeights, ModelShape, Pages, SharedPrefix
from tokenloom.kernels.packed import PackedWeight, Weight, dense
from tokenloom.kernels.pages import attend_to_pages
from tokenloom.kernels.shared_prefix import attend_shared

# Below this many rows, BLAS is faster on CPU with the weight as the left factor (measured: 25 against
# 35 ms at one row and 52 against 100 ms at 16 rows for all layers of the default model).
_FEW_ROWS = 48
# ... but not where the weight lies in the caches anyway.
SMALL_WEIGHT = 2**18
# Rows of a quantised weight that are numbers at a time, for a gradient.
UNPACKED_ROWS = 4096
# Rows of one tile of attention: its weights, `[Hq, rows, keys]`, should stay in the caches.
_TILE_ROWS = 128


class TorchKernels:
    """See `tokenloom.kernels.interface.Kernels` for shapes."""

    name = "torch"

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedWeight):
            weight = dense(weight, like=x)
        rows = x.shape[0]
        small = weight.numel() <= SMALL_WEIGHT
        if x.is_cuda or rows >= _FEW_ROWS or small or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        # One row alone would fall to a slow matrix-vector product; a second, equal one makes it a GEMM.
        columns = torch.cat((x, x)).t() if rows == 1 else x.t()
        y = torch.mm(weight, columns)[:, :rows].t().contiguous()
        return y if bias is None else y.add_(bias)

    def linear_backward(self, dy: Tensor, weight: Weight, extra: Tensor | None = None) -> Tensor:
        if not isinstance(weight, PackedWeight):
            return dy @ weight if extra is None else extra.addmm_(dy, weight)
        for first in range(0, weight.shape[0], UNPACKED_ROWS):
            rows = slice(first, min(first + UNPACKED_ROWS, weight.shape[0]))
            extra = self.linear_backward(dy[:, rows], dense(weight, rows, dy), extra)
        assert extra is not None
        return extra

    def reads_packed(self, dy: Tensor) -> bool:
        return False

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        y.addmm_(x, weight.t())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        wide = F.rms_norm(x.float(), (x.shape[-1],), None, eps)
        return weight * wide.to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rms_norm_backward(self, dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        t = dy * weight
        normed = x * scale
        dx += (t - normed * (t * normed).mean(-1, keepdim=True)).mul_(scale)

    def silu_mul_backward(self, dy: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        d_gate, d_up = out.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(dy, silu, out=d_up)
        # d silu / d gate = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        torch.addcmul(sigmoid, silu, 1 - sigmoid, out=d_gate)
        d_gate.mul_(up).mul_(dy)
        return out

    def rotation(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            torch.cat((cos, cos), dim=-1)[:, None].to(dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(dtype),
        )

    def rope(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        cos, signed_sin = rotation
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)

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
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        done = attend_shared(q, kv, layer, shared, out) if shared and window is None else set()
        for span in spans:
            if span.start in done:
                continue
            rows = span.rows
            first_row_end = span.kv_len - span.length + 1
            begin = 0 if window is None else max(0, first_row_end - window)
            k, v = _read(span, kv, layer, q.dtype, begin)
            if span.length == 1:
                # The query heads of a group read the same keys: to the kernel they are rows of one head.
                group = q[span.start].view(num_kv_heads, num_heads // num_kv_heads, head_dim)
                out[span.start] = _sdpa(group, k, v).reshape(num_heads, head_dim)
                continue
            if not q.is_cuda and q.dtype in (torch.float32, torch.float64):
                out[rows] = _tiled(q[rows], k, v, window)
                continue
            query = q[rows].transpose(0, 1)  # [Hq, n, D]
            if span.length == span.kv_len and (window is None or span.kv_len <= window):
                attended = _sdpa(query, k, v, is_causal=True, gqa=num_heads != num_kv_heads)
            else:
                mask = _chunk_mask(span.length, span.kv_len, begin, window, q.device)
                attended = _sdpa(query, k, v, mask=mask, gqa=num_heads != num_kv_heads)
            out[rows] = attended.transpose(0, 1)
        return out

    def exact_prefix_tokens(self, shape: ModelShape, dtype: torch.dtype) -> int | None:
        return None

    def attention_at(self, q: Tensor, kv: KVCache, cells: Tensor | Sequence[Tensor]) -> Tensor:
        n, num_heads, head_dim = q.shape
        queries = q.view(n, len(cells), -1, head_dim)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for i, at in enumerate(cells):
            k, v = (part[None] for part in kv.read_cells(at, q.dtype))
            out[:, i] = _tiled(queries[:, i], k, v, None)
        return out.view(n, num_heads, head_dim)

    def attention_over_pages(self, q: Tensor, kv: KVCache, layer: int, pages: Pages) -> Tensor:
        return attend_to_pages(self, q, kv, layer, pages)

    def key_scores(self, q: Tensor, keys: Tensor, slots: Tensor, scales: Tensor | None = None) -> Tensor:
        chosen = keys[slots]
        if scales is not None:
            chosen = chosen * scales[slots][..., None]
        queries = q.view(keys.shape[1], -1, q.shape[1])
        return torch.matmul(queries, chosen.to(q.dtype).permute(1, 2, 0)).flatten(0, 1)

    def attention_for_backward(
        self, q: Tensor, kv: KVCache, layer: int, spans: list[KVSpan], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        log_sums = q.new_empty(q.shape[:2])
        for span in spans:
            rows = span.rows
            out[rows] = _tiled(q[rows], *_read(span, kv, layer, q.dtype), window, log_sums[rows])
        return out, log_sums

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
        num_kv_heads, scale = len(dk), 1 / math.sqrt(q.shape[-1])
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span, start in zip(spans, firsts, strict=True):
            k, v = _read(span, kv, layer, q.dtype)
            for first, last, begin, end in _tiles(span.length, span.kv_len, window):
                rows, keys = slice(span.start + first, span.start + last), slice(start + begin, start + end)
                query, do, o = (_grouped(x[rows], num_kv_heads) for x in (q, d_out, out))
                sums = _grouped(log_sums[rows, :, None], num_kv_heads)
                weights = torch.matmul(query, k[:, begin:end].transpose(1, 2)).mul_(scale).sub_(sums).exp_()
                _hide(weights.view(num_kv_heads, -1, last - first, end - begin), window, 0)
                dv[:, keys].baddbmm_(weights.transpose(1, 2), do)
                ds = torch.matmul(do, v[:, begin:end].transpose(1, 2))
                # rowsum(dP * P) = rowsum(dO * O), which is smaller by L / D.
                ds.sub_((do * o).sum(-1, keepdim=True)).mul_(weights)
                dk[:, keys].baddbmm_(ds.transpose(1, 2), query, alpha=scale)
                dq[rows] = _ungrouped(torch.matmul(ds, k[:, begin:end]).mul_(scale), last - first)
        return dq

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        values, ids = logits.topk(k, dim=-1)
        return values, ids, logits.logsumexp(-1)

    def likeliest(self, logits: Tensor, k: int) -> Tensor:
        return logits.topk(k, dim=-1).indices

    def largest(self, scores: Tensor, k: int) -> Tensor:
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices  # topk picks any of equal ones
        return ranked[:, :k].sort().values

    def fuse(self, shape: ModelShape, layers: Sequence[LayerWeights]) -> FusedLayers | None:
        return None


def _read(span: KVSpan, kv: KVCache, layer: int, dtype: torch.dtype, begin: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens `begin .. kv_len`, `[Hk, L, D]`."""
    k, v = span.read(kv, layer, begin)
    return k.to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)


def _tiles(length: int, kv_len: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Tiles of the last `length` of `kv_len` tokens: rows `first .. last` read keys `begin .. end`."""
    for first in range(0, length, _TILE_ROWS):
        last = min(first + _TILE_ROWS, length)
        begin = 0 if window is None else max(0, kv_len - length + first + 1 - window)
        yield first, last, begin, kv_len - length + last


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[n, Hq, D]` -> `[Hk, G * n, D]`: the query heads of a group read the same keys."""
    n, _, head_dim = x.shape
    return x.view(n, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


def _ungrouped(x: Tensor, n: int) -> Tensor:
    """`[Hk, G * n, D]` -> `[n, Hq, D]`."""
    num_kv_heads, _, head_dim = x.shape
    return x.view(num_kv_heads, -1, n, head_dim).permute(2, 0, 1, 3).reshape(n, -1, head_dim)


def _tiled(q: Tensor, k: Tensor, v: Tensor, window: int | None, log_sums: Tensor | None = None) -> Tensor:
    """Attention of the last n of L tokens by plain products, tile by tile of rows.

    On CPU in full precision faster than torch's own (1.6 times at 512 rows, measured): the query heads of a
    group go into one product, and keys behind a tile's last row are not touched.

    Args:
        q: `[n, Hq, D]`.
        k, v: `[Hk, L, D]`; the last row reads all of them, within its window.
        log_sums: gets the logarithms of the sums of exponentiated scores, `[n, Hq]`.
    """
    (n, _, head_dim), (num_kv_heads, length, _) = q.shape, k.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first, last, begin, end in _tiles(n, length, window):
        query = _grouped(q[first:last], num_kv_heads) / math.sqrt(head_dim)
        scores = torch.matmul(query, k[:, begin:end].transpose(1, 2))
        _hide(scores.view(num_kv_heads, -1, last - first, end - begin), window, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        out[first:last] = _ungrouped(torch.matmul(weights, v[:, begin:end]), last - first)
        if log_sums is not None:
            log_sums[first:last] = _ungrouped(scores.logsumexp(-1, keepdim=True), last - first)[..., 0]
    return out


def _hide(scores: Tensor, window: int | None, value: float) -> None:
    """Set to a value, in place, what the last `rows` of `length` tokens must not read.

    scores: `[..., rows, length]`; window: a row reads at most its last `window` tokens, itself included.
    """
    rows, length = scores.shape[-2:]
    ahead = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., length - rows :].masked_fill_(ahead, value)
    if window is not None and window < length:
        last = torch.arange(length - rows, length, device=scores.device)[:, None]
        passed = torch.arange(length, device=scores.device) <= last - window
        scores.masked_fill_(passed, value)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, gqa: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=is_causal, enable_gqa=gqa
    )[0]


def _chunk_mask(length: int, kv_len: int, begin: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys `begin .. kv_len` each of the last `length` rows reads, `[length, kv_len - begin]`."""
    rows = torch.arange(kv_len - length, kv_len, device=device)[:, None]
    keys = torch.arange(begin, kv_len, device=device)[None]
    mask = keys <= rows
    return mask if window is None else mask & (keys > rows - window)
