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
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, LayerWeights, Linear, PackedWeight, Weight
from tokenloom.models.adapters.adapter import Params, TrainableBypass
from tokenloom.models.decoder import Decoder

MOST_NUMBERS = 2**24
"""Of a quantised projection that is kept unpacked while its layer is at hand; larger ones are unpacked some
rows at a time, whenever they are needed."""


@dataclass(slots=True)
class Window:
    """Rows `begin .. end` of a pass, in one layer.

    `spans` are its samples, each up to the last of its rows in the window; their tokens begin at the rows
    `firsts` of the pass.
    """

    index: int
    layer: LayerWeights
    begin: int
    end: int
    spans: list[KVSpan]
    firsts: list[int]
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
    attended: Tensor | None = None
    log_sums: Tensor | None = None
    gate_up: Tensor | None = None


class LayerBackward:
    """Runs windows through a layer's backward pass.

    Args:
        model: the frozen weights.
        kv: the cache.
    """

    def __init__(self, model: Decoder, kv: KVCache) -> None:
        self.model = model
        self.kv = kv
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
        query = query.view(-1, self.heads, self.head_dim)
        reads = (self.kv, w.index, w.spans)
        if kept.attended is not None and kept.log_sums is not None:
            attention, log_sums = kept.attended.view(query.shape), kept.log_sums
        else:
            attention, log_sums = kernels.attention_for_backward(query, *reads, layer.window)
        attended = attention.flatten(1)
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
        d_attention = d_attended.view(query.shape)
        dq = kernels.attention_backward(
            d_attention, query, attention, log_sums, *reads, w.firsts, dk, dv, layer.window
        )
        rows = slice(w.begin, w.end)
        q, k = slice(self.heads), slice(self.heads, self.heads + self.kv_heads)
        d_qkv = torch.cat((dq, dk[:, rows].transpose(0, 1), dv[:, rows].transpose(0, 1)), dim=1)
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
        return self.model.kernels.linear_backward(dy, self._weight(w, site, linear, dy), extra)

    def _weight(self, w: Window, site: str, linear: Linear, like: Tensor) -> Weight:
        """A projection's weight, in numbers where it is quantised and small, and not as fast as it is: they
        serve all of the layer's windows."""
        weight = linear.weight
        small = math.prod(weight.shape) <= MOST_NUMBERS
        if not (isinstance(weight, PackedWeight) and small) or self.model.kernels.reads_packed(like):
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
