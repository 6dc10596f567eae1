"""KIVI: old tokens in 2, 4 or 8 bits, keys by channel and values by token; the newest ones as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.errors import RequestError
from tokenloom.methods.kv.bit_groups import BITS, hadamard, pack, quantize, unpack
from tokenloom.methods.kv.budget import at_least, one_of
from tokenloom.methods.kv.packing import Packing
from tokenloom.methods.kv.parts import Packer
from tokenloom.methods.registry import method

GROUP = 32
"""Tokens, or channels, that share a scale."""


@method(
    "kivi",
    hook="kv",
    title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arxiv="2402.02750",
    claim="old keys and values in 2 to 8 bits, the newest ones exact",
)
@dataclass(frozen=True)
class Kivi(Packer):
    """Every group of 32 numbers has a scale and a minimum in float16: one bit more for each number.

    The paper flushes keys when `residual` of them have come, and values one by one. Here a token's key and
    value lie in one slot, so both follow the values' rule, 32 tokens (and whole blocks) at a time: the newest
    `residual` are always exact.

    Attributes:
        bits: 2, 4 or 8.
        key_bits: of keys, where they differ; 0: bits.
        value_bits: of values, where they differ; 0: bits.
        residual: so many newest tokens are not packed; a multiple of 32.
        keep_sinks: so many first tokens are stored exactly, and do not count in the range of their group;
            below 32.
        axis: of a group of keys: channel: 32 tokens of one channel (the paper's); token: 32 channels of one
            token.
        hadamard: turn keys and values by an orthogonal matrix first, which spreads outliers over channels.
    """

    bits: int = 4
    key_bits: int = 0
    value_bits: int = 0
    residual: int = 128
    keep_sinks: int = 0
    axis: str = "channel"
    hadamard: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits not in BITS and (name == "bits" or bits):
                raise ValueError(f"{name} must be 2, 4 or 8, not {bits}")
        at_least(0, residual=self.residual, keep_sinks=self.keep_sinks)
        if self.residual % GROUP:
            raise ValueError(f"residual must be a multiple of {GROUP}, not {self.residual}")
        if self.keep_sinks >= GROUP:
            raise ValueError(f"keep_sinks must be below {GROUP}, not {self.keep_sinks}")
        one_of(("channel", "token"), axis=self.axis)

    def policy(self, shape: SequenceShape) -> KVPolicy:
        try:
            codec = KiviCodec(self, shape)
        except ValueError as error:
            raise RequestError(f"kv: kivi: {error}", param="kv") from error
        return Packing(shape, lambda cached: codec, self.residual)


class KiviCodec:
    """See `cache.packed_tokens.Codec`.

    Bytes of a layer: the sinks' keys and values, then records of 32 tokens, each of key codes, value codes,
    scales and minima of keys, those of values.
    """

    group = GROUP

    def __init__(self, knobs: Kivi, shape: SequenceShape) -> None:
        self.layers: Sequence[int] = range(shape.num_layers)
        self.heads, self.head_dim = shape.num_kv_heads, shape.head_dim
        self.channels = self.heads * self.head_dim
        self.sinks = knobs.keep_sinks
        self.bits = (knobs.key_bits or knobs.bits, knobs.value_bits or knobs.bits)
        self.by_channel = (knobs.axis == "channel", False)
        self.width = math.gcd(GROUP, self.head_dim)  # of a group along a token
        self.basis = hadamard(self.head_dim) if knobs.hadamard else None
        codes = [GROUP * self.channels * bits // 8 for bits in self.bits]
        # float16 numbers: as many scales as minima.
        ranges = [
            2 * (self.channels if by_channel else GROUP * self.channels // self.width)
            for by_channel in self.by_channel
        ]
        self.fields = [*codes, 2 * ranges[0], 2 * ranges[1]]

    def num_bytes(self, tokens: int, item_bytes: int) -> int:
        return (self._header(item_bytes) if tokens else 0) + tokens // GROUP * sum(self.fields)

    def _header(self, item_bytes: int) -> int:
        return 2 * self.sinks * self.channels * item_bytes

    def encode(self, layer: int, first: int, keys: Tensor, values: Tensor) -> Tensor:
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (keys, values)]
        turned = [x if self.basis is None else x @ self.basis.to(x) for x in wide]
        records = [x.reshape(-1, GROUP, self.channels) for x in turned]
        codes, ranges = [], []
        for x, bits, by_channel in zip(records, self.bits, self.by_channel, strict=True):
            code, scale, least = self._quantize(x, bits, by_channel, first)
            codes.append(pack(code, bits).flatten(1))
            ranges.append(torch.stack((scale.flatten(1), least.flatten(1)), 1).flatten(1).view(torch.uint8))
        data = torch.cat((*codes, *ranges), 1).flatten()
        if first or not self.sinks:
            return data
        header = torch.stack([x[: self.sinks].to(keys.dtype) for x in turned]).flatten().view(torch.uint8)
        return torch.cat((header, data))

    def _quantize(self, x: Tensor, bits: int, by_channel: bool, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """x `[n, 32, C]`; codes alike, scales and minima `[n, groups]`."""
        if not by_channel:
            codes, scale, least = quantize(x.unflatten(2, (-1, self.width)), bits, 3)
            return codes.flatten(2), scale, least
        among = x
        if self.sinks and first == 0:
            among = x.clone()
            among[0, : self.sinks] = x[0, self.sinks]
        return quantize(x, bits, 1, among)

    def decode(self, layer: int, data: Tensor, keys: Tensor, values: Tensor) -> None:
        header = self._header(keys.element_size())
        exact = data[:header].view(keys.dtype).view(2, self.sinks, *keys.shape[1:])
        key_codes, value_codes, key_ranges, value_ranges = (
            data[header:].view(-1, sum(self.fields)).split(self.fields, 1)
        )
        parts = ((keys, key_codes, key_ranges), (values, value_codes, value_ranges))
        for i, (out, packed, ranges) in enumerate(parts):
            codes = unpack(packed.unflatten(1, (-1, self.channels)), self.bits[i])
            scale, least = ranges.view(torch.float16).unflatten(1, (2, -1)).to(out.dtype).unbind(1)
            if self.by_channel[i]:
                grouped = out.view(codes.shape)
                scale, least = scale[:, None], least[:, None]
            else:
                grouped = out.view(*codes.shape[:2], -1, self.width)
                codes = codes.view(grouped.shape)
                scale, least = (r.view(*grouped.shape[:3], 1) for r in (scale, least))
            # One step at a time: torch is slower at mixed types, and at broadcasts in addcmul.
            grouped.copy_(codes).mul_(scale).add_(least)
            out[: self.sinks] = exact[i]
