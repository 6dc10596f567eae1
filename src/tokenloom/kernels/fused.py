"""A decoder's layers as one native call for a batch (`csrc/layers.cpp`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels.interface import Attend, LayerWeights, ModelShape
from tokenloom.kernels.native import native
from tokenloom.kernels.native_arguments import capsule, native_cache, shared_table, span_table
from tokenloom.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from tokenloom.batch import Batch, Bypass

# As the native kernels number them.
SITES = ("qkv", "o", "gate_up", "down")
PLACES = ("input", "query", "residual", "gate_up", "attended", "log_sums")


class FusedLayers:
    """All layers of a decoder in one call."""

    def __init__(self, shape: ModelShape, layers: Sequence[LayerWeights]) -> None:
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_dim = shape.head_dim
        self._native = native.Layers(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.rms_norm_eps,
        )
        for layer in layers:
            weights = []
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                assert isinstance(linear.weight, PackedWeight)
                format, data = linear.weight.format, linear.weight.data
                weights.append(native.Weight(format.code, *linear.weight.shape, data, linear.bias))
            qkv, o, gate_up, down = weights
            self._native.add(
                layer.input_norm,
                qkv,
                layer.q_norm,
                layer.k_norm,
                o,
                layer.post_norm,
                gate_up,
                down,
                layer.window or 0,
            )

    def __call__(
        self, batch: Batch, kv: KVCache, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | None = None
    ) -> bool:
        bypasses = []
        for part in batch.bypasses:
            loras = None if part.keep is not None else _native_loras(part.layers)
            if loras is None:
                return False
            bypasses.append((part.rows.start, part.rows.stop, loras))
        taps = []
        for tap in batch.taps:
            units = tap.units()
            if units is None or kv.quantized:
                return False
            taps += [(PLACES.index(site), tap.rows.start, where) for site, where in units.items()]
        table, blocks = span_table(batch.spans)
        qkv, attend_to = None, None
        if attend is not None:
            qkv = torch.empty(len(x), (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
            q = qkv[:, : self.num_heads * self.head_dim].unflatten(1, (self.num_heads, self.head_dim))

            def attend_to(layer: int) -> Any:
                return capsule(attend(layer, q).flatten(1))

        self._native.forward(
            capsule(x),
            native_cache(kv),
            capsule(cos),
            capsule(sin),
            capsule(batch.slots),
            capsule(table),
            capsule(blocks),
            kv.block_size,
            bypasses,
            taps,
            None if qkv is None else capsule(qkv),
            attend_to,
            torch.get_num_threads(),
            shared_table(batch.spans, batch.shared),
        )
        return True


def _native_loras(layers: Sequence[Mapping[str, Bypass]]) -> list[Any] | None:
    """An adapter's bypasses by layer and site, None where it has none; None if one of them is not a LoRA."""
    loras: list[Any] = []
    for sites in layers:
        for site in SITES:
            bypass = sites.get(site)
            if bypass is None:
                loras.append(None)
                continue
            lora = bypass.low_rank
            if lora is None or lora.a.dtype != torch.float32:
                return None
            if lora.native is None:
                lora.native = native.LowRank(
                    lora.a, [(b, out.start, float(scale)) for b, _, out, scale in lora.parts]
                )
            loras.append(lora.native)
    return loras
