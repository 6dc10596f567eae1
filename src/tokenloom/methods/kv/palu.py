"""Palu: old tokens as latents, in the few directions in which a layer's keys and values vary most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens, CosSin
from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load
from tokenloom.methods.kv.budget import at_least
from tokenloom.methods.kv.packing import Packing
from tokenloom.methods.kv.parts import Packer
from tokenloom.methods.kv.rotation import turned
from tokenloom.methods.registry import method


@method(
    "palu",
    hook="kv",
    title="Palu: KV-Cache Compression with Low-Rank Projection",
    arxiv="2407.21118",
    claim="old keys and values as vectors of a lower rank",
)
@dataclass(frozen=True)
class Palu(Packer):
    """The paper factors W_k and W_v after whitening them by calibration data. Of W S = U Sig V' the best W of
    rank r is U_r U_r' W, so the latent of a token is U_r' k, with k before RoPE, and U_r' v: that is what is
    stored, and the weights stay as they are. `tokenloom calibrate palu` finds U once per model.

    Keys and values are built up again when they are read. All layers have the same rank (the paper also
    spreads it by Fisher information); latents have the pool's type.

    Attributes:
        ratio: rank kept, as a part of all dimensions of a layer's keys, and of its values.
        groups: kv heads are compressed together in so many groups of neighbours.
        residual: so many newest tokens are not packed.
    """

    # Each head would hold tokens of other positions, and keys must be turned by theirs.
    conflicts: ClassVar = {**Packer.conflicts, "scorer": "palu must know at which position each key stood"}

    ratio: float = 0.7
    groups: int = 1
    residual: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {self.ratio}")
        at_least(1, groups=self.groups)
        at_least(0, residual=self.residual)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        if shape.num_kv_heads % self.groups:
            raise RequestError(
                f"kv: palu: groups is {self.groups}; {shape.num_kv_heads} kv heads cannot be split so",
                param="kv",
            )
        found = load("palu", shape)
        names = [f"{part}_{self.groups}" for part in ("keys", "values")]
        if names[0] not in found:
            raise RequestError(
                f"kv: palu: this model is not calibrated for groups={self.groups}: "
                f"run tokenloom calibrate palu --groups {self.groups}",
                param="kv",
            )
        rank = max(1, round(self.ratio * found[names[0]].shape[3]))
        keys, values = (found[name][..., :rank] for name in names)

        def codec_for(cached: CachedTokens) -> PaluCodec:
            assert cached.cos_sin is not None  # only calibrations have no rotation at hand
            return PaluCodec(keys, values, cached.cos_sin)

        return Packing(shape, codec_for, self.residual)


class PaluCodec:
    """See `cache.packed_tokens.Codec`. A token of a layer: its key's latent by groups, and its value's.

    Args:
        keys, values: orthonormal columns by layer and group, `[L, groups, Hk * D / groups, rank]`.
    """

    group = 1
    basis: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor, cos_sin: CosSin) -> None:
        self.layers: Sequence[int] = range(len(keys))
        self.keys, self.values, self.cos_sin = keys, values, cos_sin
        self.width = keys.shape[1] * keys.shape[3]

    def num_bytes(self, tokens: int, item_bytes: int) -> int:
        return tokens * 2 * self.width * item_bytes

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        positions = torch.arange(first, first + len(keys), device=keys.device)
        plain = turned(keys, positions, torch.zeros_like(positions), self.cos_sin)
        values = values.to(plain.dtype)
        latents = [
            torch.einsum("tgc,gcr->tgr", x.reshape(len(x), u.shape[0], -1), u.to(x)).flatten(1)
            for x, u in ((plain, self.keys[layer]), (values, self.values[layer]))
        ]
        return torch.cat(latents, 1).to(keys.dtype).flatten().view(torch.uint8)

    def decode(self, layer: int, data: Tensor, keys: Tensor, values: Tensor) -> None:
        latents = data.view(keys.dtype).view(len(keys), 2, self.keys.shape[1], -1)
        for i, (out, bases) in enumerate(((keys, self.keys[layer]), (values, self.values[layer]))):
            for group, basis in enumerate(bases.to(out)):
                at = out.view(len(out), len(bases), -1)[:, group]
                at.copy_(latents[:, i, group] @ basis.t())
        positions = torch.arange(len(keys), device=keys.device)
        keys.copy_(turned(keys, torch.zeros_like(positions), positions, self.cos_sin))
