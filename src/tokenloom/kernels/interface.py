"""What a compute backend offers. Activations are `[T, width]`: rows of the packed batch, no padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.packed import Weight

if TYPE_CHECKING:
    from tokenloom.batch import Batch


@dataclass(slots=True)
class Linear:
    """A frozen projection: weight `[out, in]`, bias `[out]` or None."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(slots=True)
class LayerWeights:
    """The weights of one decoder layer; q, k and v, and gate and up, are stacked to be read at once."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass(slots=True, eq=False)
class LowRank:
    """What a LoRA adds beside one projection: `y[:, out] += scale * (x Aᵀ)[:, rank] Bᵀ` for each part.

    Attributes:
        a: `[sum of ranks, in]`.
        parts: (B `[width of out, width of rank]`, rank, out, scale); the ranks follow one another.
    """

    a: Tensor
    parts: list[tuple[Tensor, slice, slice, float]]
    native: Any = None
    """What the native kernels made of it."""


class ModelShape(Protocol):
    """The part of a model's configuration that kernels need."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...


@dataclass(slots=True)
class KVSpan:
    """The cached keys and values that one segment of the batch reads.

    Rows `start .. start + length` of the batch are the last `length` of the `kv_len` tokens cached in
    `blocks`, in order: row i reads the first `kv_len - length + i + 1` of them.

    `contiguous` says that the block ids are consecutive, so that the span is a view of the cache and
    need not be gathered.

    `tail`: slots of the last tokens, where they are not those that the blocks say: a row of a draft tree
    reads its own branch, and not the siblings that lie in between.
    """

    start: int
    length: int
    kv_len: int
    blocks: list[int]
    contiguous: bool
    tail: list[int] = field(default_factory=list)

    @property
    def num_before(self) -> int:
        """Tokens that all of its rows read, where the blocks say."""
        return self.kv_len - max(self.length, len(self.tail))

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)

    def view(self, cache: Tensor, block_size: int, begin: int = 0) -> Tensor:
        """What the cache holds of tokens `begin .. kv_len`, `[kv_len - begin, ...]`; a view where it can be.

        cache: `[num_slots, ...]`.
        """
        if self.tail:
            own = self.kv_len - len(self.tail)
            before = replace(self, kv_len=own, tail=[]).view(cache, block_size, min(begin, own))
            return torch.cat((before, cache[self.tail[max(0, begin - own) :]]))
        if self.contiguous:
            first = self.blocks[0] * block_size
            return cache[first + begin : first + self.kv_len]
        skip = begin // block_size
        by_block = cache.view(-1, block_size, *cache.shape[1:])
        blocks = torch.tensor(self.blocks[skip:], device=cache.device)
        rows = by_block.index_select(0, blocks).flatten(0, 1)
        return rows[begin - skip * block_size : self.kv_len - skip * block_size]

    def read(self, kv: KVCache, layer: int, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `begin .. kv_len`, each `[kv_len - begin, Hk, D]`, as floating point."""
        k = self.view(kv.keys[layer], kv.block_size, begin)
        v = self.view(kv.values[layer], kv.block_size, begin)
        if not kv.quantized:
            return k, v
        k_scale = self.view(kv.key_scales[layer], kv.block_size, begin)
        v_scale = self.view(kv.value_scales[layer], kv.block_size, begin)
        return k * k_scale[..., None], v * v_scale[..., None]


@dataclass(slots=True, eq=False)
class SharedPrefix:
    """Tokens `begin .. end` that lie in the same blocks for several spans, and that all of their rows read.

    A span may be in several: each begins where the one before it ends, the first at 0.
    """

    begin: int
    end: int
    spans: list[KVSpan]

    @property
    def num_saved(self) -> int:
        """Tokens that need not be read again for spans after the first."""
        return (self.end - self.begin) * (len(self.spans) - 1)


Attend = Callable[[int, Tensor], Tensor]
"""(layer, q `[T, Hq, D]`) -> `[T, Hq, D]`: attention, once a layer's keys and values are stored."""


class FusedLayers(Protocol):
    """All layers of a decoder, in one call."""

    def __call__(
        self, batch: Batch, kv: KVCache, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None = None
    ) -> bool:
        """Run a batch: x `[T, hidden_size]` in place; cos, sin `[T, D / 2]`; attend instead of the plain
        attention of `batch.spans`, then in a call per layer.

        False, with nothing done, where the batch has bypasses or taps that only the operators know.
        """


@dataclass(frozen=True, slots=True)
class Pages:
    """A sequence's tokens by pages, and what is known of the keys of each.

    Attributes:
        slots: where the tokens lie, int64 `[length]`, the reading row's own the last.
        bounds: of the keys of all pages but the last one, which is read in any case: the largest numbers,
            then the least, `[at least pages - 1, Hk, 2 * D]`.
        size: tokens of a page; the last one may have fewer.
        count: pages that are read, the last one among them.
        by_group: the heads of a group read the same pages, the best for any of them; else each its own.
    """

    slots: Tensor
    bounds: Tensor
    size: int
    count: int
    by_group: bool

    @property
    def tokens_read(self) -> int:
        """By each head, or each group."""
        return self.count * self.size - (-len(self.slots) % self.size)


class Kernels(Protocol):
    """One compute backend."""

    name: str

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """x `[T, in]`, weight `[out, in]` -> `[T, out]`."""

    def linear_backward(self, dy: Tensor, weight: Weight, extra: Tensor | None = None) -> Tensor:
        """The gradient of `linear`'s x by that of its result, dy `[T, out]`: `[T, in]`, added to extra, which
        is given up. A quantised weight becomes numbers for this product only, some rows at a time."""

    def reads_packed(self, dy: Tensor) -> bool:
        """Whether `linear_backward` of dy is as fast through a quantised weight as through its numbers."""

    def add_linear(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """y `[T, out]` += x `[T, in]` times weight `[out, in]`, which is small; y may be strided."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x `[..., d]`, normalised over the last dimension in float32 (float64 for float64)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up `[T, 2 * ff]` -> silu(gate) * up, `[T, ff]`."""

    def rms_norm_backward(self, dx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        """dx `[..., d]` += the gradient of `rms_norm`'s x by that of its result, dy; all may be strided."""

    def silu_mul_backward(self, dy: Tensor, gate_up: Tensor) -> Tensor:
        """The gradient of `silu_mul`'s gate_up, `[T, 2 * ff]`, by that of its result, dy `[T, ff]`."""

    def rotation(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rope` reads, from float32 cos and sin `[T, D / 2]`: prepared once, used by every layer."""

    def rope(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x `[T, H, D]` by half-split RoPE: dimension i turns with i + D / 2."""

    def attention(
        self,
        q: Tensor,
        kv: KVCache,
        layer: int,
        spans: list[KVSpan],
        window: int | None = None,
        shared: Sequence[SharedPrefix] = (),
    ) -> Tensor:
        """Causal attention of every row over its own span of a layer's cache.

        q: `[T, Hq, D]`; window: a row reads at most its last `window` tokens, itself included; shared: what
        of these spans may be read once for all that share it (without a window). Returns `[T, Hq, D]`.
        """

    def exact_prefix_tokens(self, shape: ModelShape, dtype: torch.dtype) -> int | None:
        """Prefixes of a multiple of so many tokens may be `shared` without changing a bit; None: none may."""

    def attention_at(self, q: Tensor, kv: KVCache, cells: Tensor | Sequence[Tensor]) -> Tensor:
        """Attention of rows that read chosen tokens, of one sequence in one layer.

        Args:
            q: `[n, Hq, D]`.
            cells: for each kv head, or for each query head, where the keys lie that it reads, int64 `[m]`
                each (see `KVCache.cells`); they may differ in length. The last n of them are the rows' own:
                row i reads the first m - n + i + 1.

        Returns:
            `[n, Hq, D]`.
        """

    def attention_over_pages(self, q: Tensor, kv: KVCache, layer: int, pages: Pages) -> Tensor:
        """Attention of one row, q `[1, Hq, D]`, over the pages that may hold its largest scores; like q."""

    def key_scores(self, q: Tensor, keys: Tensor, slots: Tensor, scales: Tensor | None = None) -> Tensor:
        """q . k of every query head with chosen keys of its kv head.

        Args:
            q: `[Hq, W]`.
            keys: `[S, Hk, W]`; int8 ones have a scale per slot and head, `[S, Hk]`.
            slots: which of them, int64 `[m]`.

        Returns:
            `[Hq, m]`.
        """

    def attention_for_backward(
        self, q: Tensor, kv: KVCache, layer: int, spans: list[KVSpan], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`attention`, and the logarithm of each row's and head's sum of exponentiated scores, `[T, Hq]`."""

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
        """The gradient of attention's q by that of its result; those of keys and values are added to dk, dv.

        Args:
            d_out, q, out: `[T, Hq, D]`; out and log_sums are what `attention_for_backward` returned.
            firsts: where in dk and dv each span's token 0 is.
            dk, dv: `[Hk, tokens, D]`.
        """

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest of each row of logits `[R, V]` in descending order, their ids, both `[R, k]`, and the
        logarithm of the sum of each row's exponentials, `[R]`."""

    def likeliest(self, logits: Tensor, k: int) -> Tensor:
        """The ids of `top` alone, int64 `[R, k]`: the sums are most of its work."""

    def largest(self, scores: Tensor, k: int) -> Tensor:
        """Where the k largest of each row of scores `[R, m]` are, ascending, int64 `[R, k]`.

        Of equal ones the first count, and NaN is above all.
        """

    def fuse(self, shape: ModelShape, layers: Sequence[LayerWeights]) -> FusedLayers | None:
        """All layers in one call, where the backend has that for these weights; it does what the operators
        do one after another."""
