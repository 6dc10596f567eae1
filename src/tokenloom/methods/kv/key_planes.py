"""Keys as whole numbers in two planes: the high bits of each, and the low ones, read where needed."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens

# Tokens that share the step of a channel.
BLOCK = 16


def encode(keys: Tensor, step: Tensor, bits: int) -> Tensor:
    """Symmetric codes of keys, int16; `step` broadcasts against keys."""
    most = 2 ** (bits - 1) - 1
    return (keys / step).round_().clamp_(-most, most).to(torch.int16)


def split(codes: Tensor, low_bits: int) -> tuple[Tensor, Tensor]:
    """The planes of codes; `codes == (high << low_bits) + low`, exactly."""
    return codes >> low_bits, codes & (2**low_bits - 1)


def from_high(high: Tensor, low_bits: int, dtype: torch.dtype) -> Tensor:
    """What codes are taken for if the high plane alone is read: the middle of those that have it.

    Taking the low bits for 0 would shift a channel's keys all by the same, which no softmax notices, but only
    where they share one step.
    """
    return (high << low_bits).to(dtype).add_((2**low_bits - 1) / 2)


def step_of(keys: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """The step with which the largest of the keys along `dims` gets the largest code."""
    return keys.abs().amax(dims, keepdim=True).clamp_min_(1e-30).div_(2 ** (bits - 1) - 1)


class KeyPlanes:
    """The codes of one sequence's keys, brought up to date as tokens come.

    A channel's step is shared by 16 tokens, or by all of a layer's keys: then it is that of the keys seen
    first, and larger ones saturate.
    """

    def __init__(self, bits: int, whole_tensor: bool) -> None:
        self.bits = bits
        self.whole_tensor = whole_tensor
        self.dropped = 0
        self.known: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by layer: codes of complete blocks, and their steps

    def read(self, layer: int, cached: CachedTokens, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes of the tokens at `index` (None: all), `[m, Hk, D]` int16, and steps that broadcast."""
        if cached.dropped != self.dropped:  # other tokens lie at the same indices now
            self.known.clear()
            self.dropped = cached.dropped
        codes, steps = self._all(layer, cached)
        if index is not None:
            codes = codes[index]
        elif not self.whole_tensor:
            index = torch.arange(len(codes), device=codes.device)
        return codes, steps if index is None or self.whole_tensor else steps[index // BLOCK]

    def _all(self, layer: int, cached: CachedTokens) -> tuple[Tensor, Tensor]:
        """Codes of all tokens, `[length, Hk, D]`, and steps, `[blocks, Hk, D]` or `[1, 1, 1]`."""
        known = self.known.get(layer)
        done = 0 if known is None else len(known[0])
        keys = cached.keys(layer, done)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32)).nan_to_num()
        if self.whole_tensor:
            steps = step_of(keys, (0, 1, 2), self.bits) if known is None else known[1]
            codes = encode(keys, steps, self.bits)
        else:
            blocks = [(block, step_of(block, (0,), self.bits)) for block in keys.split(BLOCK)]
            codes = torch.cat([encode(block, step, self.bits) for block, step in blocks])
            steps = torch.cat([step for _, step in blocks])
        if known is not None:
            codes = torch.cat((known[0], codes))
            steps = steps if self.whole_tensor else torch.cat((known[1], steps))
        whole = len(codes) // BLOCK
        if whole * BLOCK > done:  # the last block may be open
            self.known[layer] = codes[: whole * BLOCK], steps if self.whole_tensor else steps[:whole]
        return codes, steps
