"""One quantum of backward: some rows of one layer (FlexLLM, arXiv 2402.18789, token-level finetuning).

Only gradients of the adapter's parameters are wanted. A frozen projection therefore keeps nothing (its input
gradient needs the weight alone), and what the adapter's gradients read is computed again for the rows at
hand from a few kept activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.batch import Keep
from tokenloom.kernels import KVSpan, LayerWeights, Linear, PackedWeight, Weight, mask_ahead, times
from tokenloom.models.adapters.adapter import Params, TrainableBypass
from tokenloom.models.decoder import Decoder

MOST_NUMBERS = 2**24
"""Of a quantised projection that is kept unpacked while its layer is at hand; larger ones are unpacked some
rows at a time, whenever they are needed."""


@dataclass(slots=True)
class AttentionPart:
    """The rows `begin .. end` of a window that belong to one sample.

    `span` covers the sample's tokens up to the last of these rows; `first` is the row of the pass at which
    the sample begins.
    """

    begin: int
    end: int
    first: int
    span: KVSpan


@dataclass(slots=True)
class Window:
    """Rows `begin .. end` of a pass, in one layer."""

    index: int
    layer: LayerWeights
    begin: int
    end: int
    parts: list[AttentionPart]
    rotation: tuple[Tensor, Tensor]
    inverse_rotation: tuple[Tensor, Tensor]
    bypasses: Mapping[str, TrainableBypass]
    grads: Mapping[str, Params]
    keep: Keep | None


@dataclass(slots=True)
class Kept:
    """What the forward pass kept of the window's rows; None is computed again."""

    x: Tensor
    residual: Tensor | None = None
    query: Tensor | None = None
    gate_up: Tensor | None = None


class LayerBackward:
    """Runs windows through a layer's backward pass.

    Args:
        model: the frozen weights.
        keys, values: the cache, `[num_slots, Hk, D]` per layer.
        block_size: of the cache.
    """

    def __init__(self, model: Decoder, keys: list[Tensor], values: list[Tensor], block_size: int) -> None:
        self.model = model
        self.keys, self.values = keys, values
        self.block_size = block_size
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self._numbers: dict[str, Tensor] = {}  # of quantised projections, by site
        self._numbers_of: dict[str, int] = {}  # the layer whose they are

    def run(self, w: Window, kept: Kept, dy: Tensor, dk: Tensor, dv: Tensor, need_dx: bool) -> None:
        """Turn dy into the gradient of the layer's input; those of parameters are added to `w.grads`.

        Windows of a layer come right to left: by then `dk` and `dv` hold what later rows give to this
        window's keys and values, and the window adds its own share before it reads them.

        Args:
            dy: `[n, d]`, gradient of what the layer puts out; overwritten.
            dk, dv: `[Hk, T, D]`, gradients of the layer's (rotated) keys and values.
            need_dx: False where nothing is wanted of the layers below: dy is then meaningless.
        """
        kernels, layer, eps = self.model.kernels, w.layer, self.eps
        n1 = kernels.rms_norm(kept.x, layer.input_norm, eps)
        query = kept.query if kept.query is not None else self._query(w, n1)
        weights = [self._attention_weights(w, part, query) for part in w.parts]
        attended = torch.cat(
            [self._attended(w, part, p) for part, p in zip(w.parts, weights, strict=True)]
        )  # [n, Hq * D]
        residual = kept.residual
        if residual is None:
            residual = kept.x + self._forward(w, "o", layer.o, attended)

        n2 = kernels.rms_norm(residual, layer.post_norm, eps)
        gate_up = kept.gate_up
        if gate_up is None:
            gate_up = self._forward(w, "gate_up", layer.gate_up, n2)
        d_hidden = self._linear(w, "down", layer.down, dy, kernels.silu_mul(gate_up))
        d_n2 = self._linear(w, "gate_up", layer.gate_up, kernels.silu_mul_backward(d_hidden, gate_up), n2)
        kernels.rms_norm_backward(dy, d_n2, residual, layer.post_norm, eps)

        d_attended = self._linear(w, "o", layer.o, dy, attended)
        d_qkv = torch.empty(
            len(dy), self.heads + 2 * self.kv_heads, self.head_dim, dtype=dy.dtype, device=dy.device
        )
        for part, p in zip(w.parts, weights, strict=True):
            self._attention(w, part, p, query, attended, d_attended, d_qkv, dk, dv)
        rows = slice(w.begin, w.end)
        q, k = slice(self.heads), slice(self.heads, self.heads + self.kv_heads)
        d_qkv[:, k] = dk[:, rows].transpose(0, 1)
        d_qkv[:, self.heads + self.kv_heads :] = dv[:, rows].transpose(0, 1)
        turned = kernels.rope(d_qkv[:, : self.heads + self.kv_heads], w.inverse_rotation)
        if layer.q_norm is not None and layer.k_norm is not None:
            raw = self._forward(w, "qkv", layer.qkv, n1).view(d_qkv.shape)
            normed, turned = turned, torch.zeros_like(turned)
            kernels.rms_norm_backward(turned[:, q], normed[:, q], raw[:, q], layer.q_norm, eps)
            kernels.rms_norm_backward(turned[:, k], normed[:, k], raw[:, k], layer.k_norm, eps)
        d_qkv[:, : self.heads + self.kv_heads] = turned
        d_n1 = self._linear(w, "qkv", layer.qkv, d_qkv.flatten(1), n1, need_dx)
        if need_dx:
            kernels.rms_norm_backward(dy, d_n1, kept.x, layer.input_norm, eps)

    def _query(self, w: Window, n1: Tensor) -> Tensor:
        """The window's rotated queries, `[n, Hq * D]`."""
        kernels = self.model.kernels
        qkv = self._forward(w, "qkv", w.layer.qkv, n1).view(len(n1), -1, self.head_dim)
        q = qkv[:, : self.heads]
        if w.layer.q_norm is not None:
            q = kernels.rms_norm(q, w.layer.q_norm, self.eps)
        return kernels.rope(q, w.rotation).flatten(1)

    def _forward(self, w: Window, site: str, linear: Linear, x: Tensor) -> Tensor:
        """A projection and its bypass, as in the forward pass."""
        kernels = self.model.kernels
        y = kernels.linear(x, linear.weight, linear.bias)
        bypass = w.bypasses.get(site)
        if bypass is not None:
            bypass.forward(x, y, linear, kernels, self._keep(w, site, x))
        return y

    def _linear(
        self, w: Window, site: str, linear: Linear, dy: Tensor, x: Tensor, need_dx: bool = True
    ) -> Tensor:
        """The gradient of a projection's input `[n, in]`, its bypass included."""
        bypass, extra = w.bypasses.get(site), None
        if bypass is not None:
            grads, keep = w.grads[site], self._keep(w, site, x)
            dy, extra = bypass.backward(dy, x, linear, self.model.kernels, keep, grads)
        if not need_dx:
            return dy
        return times(dy, self._weight(w, site, linear, dy), extra)

    def _weight(self, w: Window, site: str, linear: Linear, like: Tensor) -> Weight:
        """A projection's weight, in numbers where it is quantised and small: they serve all of the layer's
        windows."""
        weight = linear.weight
        if not isinstance(weight, PackedWeight) or math.prod(weight.shape) > MOST_NUMBERS:
            return weight
        if self._numbers_of.get(site) != w.index:
            if site not in self._numbers:
                self._numbers[site] = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
            weight.dense(out=self._numbers[site])
            self._numbers_of[site] = w.index
        return self._numbers[site]

    @staticmethod
    def _keep(w: Window, site: str, x: Tensor) -> Tensor | None:
        return None if w.keep is None else w.keep(w.index, site, x.shape[1])

    # -- attention --------------------------------------------------------------------------------------

    def _grouped(self, rows: Tensor) -> Tensor:
        """`[n, Hq * D]` -> `[Hk, G * n, D]`: the queries of a group read the same keys."""
        n = len(rows)
        grouped = rows.view(n, self.kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        return grouped.reshape(self.kv_heads, -1, self.head_dim)

    def _ungrouped(self, grouped: Tensor, n: int) -> Tensor:
        """`[Hk, G * n, D]` -> `[n, Hq, D]`."""
        heads = grouped.view(self.kv_heads, -1, n, self.head_dim)
        return heads.permute(2, 0, 1, 3).reshape(n, self.heads, self.head_dim)

    def _read(self, cache: list[Tensor], w: Window, part: AttentionPart) -> Tensor:
        """The sample's keys or values up to the window's end, `[Hk, L, D]`."""
        return part.span.view(cache[w.index], self.block_size).transpose(0, 1)

    def _attention_weights(self, w: Window, part: AttentionPart, query: Tensor) -> Tensor:
        """softmax(q Kᵀ / sqrt(D)), `[Hk, G * n, L]`: it is not kept, but computed again from q and K."""
        n, length = part.end - part.begin, part.span.kv_len
        q = self._grouped(query[part.begin - w.begin : part.end - w.begin]) / math.sqrt(self.head_dim)
        scores = torch.matmul(q, self._read(self.keys, w, part).transpose(1, 2))
        mask_ahead(scores.view(self.kv_heads, -1, n, length), w.layer.window)
        return torch.softmax(scores, dim=-1)

    def _attended(self, w: Window, part: AttentionPart, weights: Tensor) -> Tensor:
        o = torch.matmul(weights, self._read(self.values, w, part))
        return self._ungrouped(o, part.end - part.begin).flatten(1)

    def _attention(
        self,
        w: Window,
        part: AttentionPart,
        weights: Tensor,
        query: Tensor,
        attended: Tensor,
        d_attended: Tensor,
        d_qkv: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add to dk and dv what the part's rows give to all keys before them, and write their d_q."""
        rows = slice(part.begin - w.begin, part.end - w.begin)
        keys = slice(part.first, part.end)
        scale = 1 / math.sqrt(self.head_dim)
        do = self._grouped(d_attended[rows])
        # rowsum(dP * P) = rowsum(dO * O), which is smaller by L / D.
        shift = (do * self._grouped(attended[rows])).sum(-1, keepdim=True)
        dv[:, keys].baddbmm_(weights.transpose(1, 2), do)
        ds = torch.matmul(do, self._read(self.values, w, part).transpose(1, 2))
        ds.sub_(shift).mul_(weights)
        dk[:, keys].baddbmm_(ds.transpose(1, 2), self._grouped(query[rows]), alpha=scale)
        dq = torch.matmul(ds, self._read(self.keys, w, part)).mul_(scale)
        d_qkv[rows, : self.heads] = self._ungrouped(dq, part.end - part.begin)
