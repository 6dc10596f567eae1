"""The native CPU backend: integer dot products on packed weights, and fused operators (see `csrc/`).

What it has no kernel for (other dtypes, weights that are not packed) is the torch backend's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.fused import FusedLayers
from tokenloom.kernels.interface import KVSpan, LayerWeights, ModelShape, Pages, SharedPrefix, Weight
from tokenloom.kernels.native import native
from tokenloom.kernels.native_arguments import SpanTable, capsule, native_cache, shared_table, span_table
from tokenloom.kernels.packed import PackedWeight
from tokenloom.kernels.torch_ops import SMALL_WEIGHT, TorchKernels

HEAD_DIMS = (8, 16, 32, 64, 80, 96, 128)
MAX_GROUP = 64  # query heads per KV head
TILE_ROWS = 128  # of float32 products in matrix tiles: with fewer BLAS is as fast
FEW_ROWS = 4  # of float32 weights: from 8 rows on BLAS is as fast


class CpuKernels(TorchKernels):
    """See `tokenloom.kernels.interface.Kernels` for shapes."""

    name = "cpu"

    def __init__(self) -> None:
        self._table: tuple[list[KVSpan], SpanTable] = ([], (torch.empty(0), torch.empty(0)))

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32 or not (isinstance(weight, PackedWeight) or _reads_memory(x, weight)):
            return super().linear(x, weight, bias)
        y = torch.empty(len(x), weight.shape[0])
        if isinstance(weight, PackedWeight):
            rows = x if x.stride(-1) == 1 else x.contiguous()
            native.linear(weight.native, capsule(rows), capsule(y), False, torch.get_num_threads())
        else:
            native.few_products(capsule(x.contiguous()), capsule(weight), capsule(y), torch.get_num_threads())
        return y if bias is None else y.add_(bias)

    def linear_backward(self, dy: Tensor, weight: Weight, extra: Tensor | None = None) -> Tensor:
        if not (self.reads_packed(dy) if isinstance(weight, PackedWeight) else _in_tiles(dy, weight)):
            return super().linear_backward(dy, weight, extra)
        dx = torch.empty(len(dy), weight.shape[1]) if extra is None else extra
        end = (capsule(dx), extra is not None, torch.get_num_threads())
        if isinstance(weight, PackedWeight):
            native.linear_backward(weight.native, capsule(dy), *end)
        else:
            native.float_products(capsule(dy), capsule(weight), *end)
        return dx

    def reads_packed(self, dy: Tensor) -> bool:
        in_tiles = len(dy) >= TILE_ROWS and native.has_float_products()
        return dy.dtype == torch.float32 and dy.stride(-1) == 1 and not in_tiles

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != torch.float32 or x.dim() != 2 or x.stride(-1) != 1:
            return super().rms_norm(x, weight, eps)
        out = torch.empty(x.shape)
        native.rms_norm(capsule(x), capsule(weight), eps, capsule(out), torch.get_num_threads())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype != torch.float32:
            return super().silu_mul(gate_up)
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2)
        native.silu_mul(capsule(gate_up), capsule(out), torch.get_num_threads())
        return out

    def rms_norm_backward(self, dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        if any(t.dtype != torch.float32 or t.dim() != 2 or t.stride(-1) != 1 for t in (dx, dy, x)):
            super().rms_norm_backward(dx, dy, x, weight, eps)
        else:
            native.rms_norm_backward(dx, dy, x, weight, eps, torch.get_num_threads())

    def silu_mul_backward(self, dy: Tensor, gate_up: Tensor) -> Tensor:
        if any(t.dtype != torch.float32 or t.stride(-1) != 1 for t in (dy, gate_up)):
            return super().silu_mul_backward(dy, gate_up)
        out = torch.empty(gate_up.shape)
        native.silu_mul_backward(dy, gate_up, out, torch.get_num_threads())
        return out

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        spans: list[KVSpan],
        window: int | None = None,
        shared: Sequence[SharedPrefix] = (),
    ) -> Tensor:
        heads, head_dim = q.shape[1:]
        if q.dtype != torch.float32 or not _attends(heads, kv.keys[0].shape[1], head_dim):
            return super().attention(q, kv, layer, spans, window, shared)
        return self._attention(q, kv, layer, spans, window, None, shared)

    def exact_prefix_tokens(self, shape: ModelShape, dtype: torch.dtype) -> int | None:
        exact = dtype == torch.float32 and _attends(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        return native.KEY_BLOCK if exact else None

    def attention_at(self, q: Tensor, kv: KVCache, cells: Tensor | Sequence[Tensor]) -> Tensor:
        heads, head_dim = q.shape[1:]
        if q.dtype != torch.float32 or not _attends(heads, len(cells), head_dim):
            return super().attention_at(q, kv, cells)
        out = torch.empty(q.shape)
        if isinstance(cells, Tensor):
            flat, each = cells.flatten(), cells.shape[1]
            ends = torch.arange(each, flat.numel() + 1, each)
        else:
            flat, ends = torch.cat(tuple(cells)), torch.tensor([len(at) for at in cells]).cumsum(0)
        native.attention_at(
            capsule(q), native_cache(kv), capsule(flat), capsule(ends), capsule(out), torch.get_num_threads()
        )
        return out

    def attention_over_pages(self, q: Tensor, kv: KVCache, layer: int, pages: Pages) -> Tensor:
        heads, head_dim = q.shape[1:]
        if q.dtype != torch.float32 or not _attends(heads, pages.bounds.shape[1], head_dim):
            return super().attention_over_pages(q, kv, layer, pages)
        out = torch.empty(q.shape)
        native.attention_over_pages(
            capsule(q),
            native_cache(kv),
            layer,
            capsule(pages.slots),
            capsule(pages.bounds),
            pages.size,
            pages.count,
            pages.by_group,
            capsule(out),
            torch.get_num_threads(),
        )
        return out

    def key_scores(self, q: Tensor, keys: Tensor, slots: Tensor, scales: Tensor | None = None) -> Tensor:
        width = q.shape[1]
        if q.dtype != torch.float32 or width % 8 or width > 2 * HEAD_DIMS[-1]:
            return super().key_scores(q, keys, slots, scales)
        out = torch.empty(len(q), len(slots))
        narrow = None if scales is None else capsule(scales)
        arrays = (capsule(q.contiguous()), capsule(keys), narrow, capsule(slots), capsule(out))
        native.key_scores(*arrays, torch.get_num_threads())
        return out

    def attention_for_backward(
        self, q: Tensor, kv: KVCache, layer: int, spans: list[KVSpan], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self._trains(q, kv):
            return super().attention_for_backward(q, kv, layer, spans, window)
        log_sums = torch.empty(q.shape[:2])
        return self._attention(q, kv, layer, spans, window, log_sums), log_sums

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
        if not self._trains(q, kv):
            args = (kv, layer, spans, firsts, dk, dv, window)
            return super().attention_backward(d_out, q, out, log_sums, *args)
        dq = torch.empty(q.shape)
        native.attention_backward(
            dq,
            dk,
            dv,
            d_out,
            q,
            out,
            log_sums,
            native_cache(kv),
            layer,
            *self._span_table(spans),
            torch.tensor(firsts, dtype=torch.int32),
            kv.block_size,
            window or 0,
            torch.get_num_threads(),
        )
        return dq

    def _attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        spans: list[KVSpan],
        window: int | None,
        log_sums: Tensor | None,
        shared: Sequence[SharedPrefix] = (),
    ) -> Tensor:
        out = torch.empty(q.shape)
        native.attention(
            capsule(q),
            native_cache(kv),
            layer,
            *self._span_table(spans),
            kv.block_size,
            window or 0,
            capsule(out),
            None if log_sums is None else capsule(log_sums),
            torch.get_num_threads(),
            shared_table(spans, shared),
        )
        return out

    @staticmethod
    def _trains(q: Tensor, kv: KVCache) -> bool:
        heads, head_dim = q.shape[1:]
        attends = _attends(heads, kv.keys[0].shape[1], head_dim)
        return attends and q.dtype == torch.float32 and not kv.quantized

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if logits.dtype != torch.float32 or logits.stride(-1) != 1:
            return super().top(logits, k)
        values, norms = torch.empty(len(logits), k), torch.empty(len(logits))
        ids = torch.empty(len(logits), k, dtype=torch.int64)
        native.top(logits, values, ids, norms, torch.get_num_threads())
        return values, ids, norms

    def likeliest(self, logits: Tensor, k: int) -> Tensor:
        if logits.dtype != torch.float32 or logits.stride(-1) != 1:
            return super().likeliest(logits, k)
        ids = self.largest(logits, k)
        order = logits.gather(1, ids).argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order)

    def largest(self, scores: Tensor, k: int) -> Tensor:
        if scores.dtype != torch.float32 or scores.stride(-1) != 1:
            return super().largest(scores, k)
        ids = torch.empty(len(scores), k, dtype=torch.int64)
        native.largest(capsule(scores), capsule(ids), torch.get_num_threads())
        return ids

    def fuse(self, shape: ModelShape, layers: Sequence[LayerWeights]) -> FusedLayers | None:
        packed = all(
            isinstance(linear.weight, PackedWeight)
            for layer in layers
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        fits = (
            _attends(shape.num_heads, shape.num_kv_heads, shape.head_dim) and shape.intermediate_size % 8 == 0
        )
        return FusedLayers(shape, layers) if packed and fits else None

    def _span_table(self, spans: list[KVSpan]) -> SpanTable:
        """Made once for a batch: its layers pass the same list."""
        known, table = self._table
        if known is not spans:
            table = span_table(spans)
            self._table = (spans, table)
        return table


def _reads_memory(x: Tensor, weight: Tensor) -> bool:
    """Whether a product takes as long as reading its weight: BLAS needs twice that for a row or two."""
    fits = weight.dtype == torch.float32 and weight.is_contiguous() and x.shape[1] % 8 == 0
    return fits and len(x) <= FEW_ROWS and weight.numel() > SMALL_WEIGHT


def _in_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of float32 is one of pairs of 16-bit floats in matrix tiles: gradients of frozen
    weights may be (each product is within 2^-15 of itself), what a model says never is."""
    fits = x.dtype == weight.dtype == torch.float32 and x.stride(-1) == weight.stride(-1) == 1
    return fits and len(x) >= TILE_ROWS and min(weight.shape) >= TILE_ROWS and native.has_float_products()


def _attends(heads: int, kv_heads: int, head_dim: int) -> bool:
    return head_dim in HEAD_DIMS and heads // kv_heads <= MAX_GROUP
