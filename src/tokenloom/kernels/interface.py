"""What a compute backend offers. Activations are `[T, width]`: rows of the packed batch, no padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Linear:
    """A frozen projection: weight `[out, in]`, bias `[out]` or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class KVSpan:
    """The cached keys and values that one segment of the batch reads.

    Rows `start .. start + length` of the batch are the last `length` of the `kv_len` tokens cached in
    `blocks`, in order: row i reads the first `kv_len - length + i + 1` of them.

    `contiguous` says that the block ids are consecutive, so that the span is a view of the cache and
    need not be gathered.
    """

    start: int
    length: int
    kv_len: int
    blocks: list[int]
    contiguous: bool

    def slots(self, block_size: int, device: torch.device) -> Tensor:
        """Cache slots of the span in order, `[kv_len]` int64."""
        blocks = torch.tensor(self.blocks, device=device)
        offsets = torch.arange(block_size, device=device)
        return (blocks[:, None] * block_size + offsets).flatten()[: self.kv_len]

    def view(self, cache: Tensor, block_size: int, begin: int = 0) -> Tensor:
        """Keys or values `begin .. kv_len` of the span, `[kv_len - begin, Hk, D]`; a view where it can be.

        cache: `[num_slots, Hk, D]`.
        """
        if self.contiguous:
            first = self.blocks[0] * block_size
            return cache[first + begin : first + self.kv_len]
        skip = begin // block_size
        by_block = cache.view(-1, block_size, *cache.shape[1:])
        blocks = torch.tensor(self.blocks[skip:], device=cache.device)
        rows = by_block.index_select(0, blocks).flatten(0, 1)
        return rows[begin - skip * block_size : self.kv_len - skip * block_size]


class Kernels(Protocol):
    """One compute backend."""

    name: str

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[T, in]`, weight `[out, in]` -> `[T, out]`."""

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """y `[T, out]` += x `[T, in]` times weight `[out, in]`, which is small; y may be strided."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x `[..., d]`, normalised over the last dimension in float32 (float64 for float64)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up `[T, 2 * ff]` -> silu(gate) * up, `[T, ff]`."""

    def rotation(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rope` reads, from float32 cos and sin `[T, D / 2]`: prepared once, used by every layer."""

    def rope(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x `[T, H, D]` by half-split RoPE: dimension i turns with i + D / 2."""

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        spans: list[KVSpan],
        block_size: int,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of every row over its own span.

        q: `[T, Hq, D]`; caches: `[num_slots, Hk, D]`; window: a row reads at most its last `window`
        tokens, itself included. Returns `[T, Hq, D]`.
        """
