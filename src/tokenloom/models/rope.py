"""Rotary position embedding: one table of cosines and sines, indexed by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.errors import RequestError
from tokenloom.models.config import RopeConfig

_FIRST_ROWS = 1024


class Rope:
    """Cosines and sines of every position, computed in float32 with transformers' own order of operations.

    The rotation of a token depends on its position alone, so that a prompt gives the same keys in one piece,
    in chunks, or token by token. For dynamic NTK this means: positions below `original_max_position` use the
    base frequencies, and a later position p uses those for a sequence of p + 1 tokens. transformers does the
    same when it decodes token by token; it would rotate the whole of a long prompt by its full length.
    """

    def __init__(
        self, config: RopeConfig, head_dim: int, max_position: int, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.head_dim = head_dim
        self.max_position = max_position
        self.device = torch.device(device)
        self.attention_scaling = _attention_scaling(config)
        self._cos = torch.empty(0, head_dim // 2, device=self.device)
        self._sin = torch.empty(0, head_dim // 2, device=self.device)
        # Looking at positions on a GPU would make every step wait for it, so there the table is complete.
        self._grow(max_position if self.device.type != "cpu" else min(max_position, _FIRST_ROWS))

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position: int64 `[T]` -> two float32 `[T, D/2]`.

        Raises RequestError if a position is not below `max_position` (on CPU; a GPU does not look).
        """
        if self.device.type == "cpu" and positions.numel():
            needed = int(positions.max()) + 1
            if needed > len(self._cos):
                if needed > self.max_position:
                    raise RequestError(
                        f"position {needed - 1} is past the model's limit of {self.max_position} tokens"
                    )
                self._grow(min(max(needed, 2 * len(self._cos)), self.max_position))
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self, rows: int) -> None:
        positions = torch.arange(len(self._cos), rows)
        angles = positions[:, None].float() * _inverse_frequencies(self.config, self.head_dim, positions)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        self._cos = torch.cat([self._cos, cos.to(self.device)])
        self._sin = torch.cat([self._sin, sin.to(self.device)])


def _inverse_frequencies(config: RopeConfig, head_dim: int, positions: Tensor) -> Tensor:
    """Radians per token: float32 `[D/2]`, or `[T, D/2]` where they depend on the position (dynamic)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    if config.kind == "dynamic":
        frequencies = _dynamic(config, head_dim, exponents, positions)
    elif config.kind == "yarn":
        frequencies = _yarn(config, head_dim, exponents)
    else:
        frequencies = 1.0 / (config.theta**exponents)
        if config.kind == "linear":
            frequencies = frequencies / config.factor
        elif config.kind == "llama3":
            frequencies = _llama3(config, frequencies)
    if config.freq_factors is not None:
        frequencies = frequencies / torch.tensor(config.freq_factors)
    return frequencies


def _dynamic(config: RopeConfig, head_dim: int, exponents: Tensor, positions: Tensor) -> Tensor:
    """NTK-aware scaling: the base grows with the sequence, so that the longest wave still covers it."""
    lengths = (positions + 1).clamp(min=config.original_max_position)
    growth = (config.factor * lengths / config.original_max_position) - (config.factor - 1)
    # transformers holds one length, a scalar, whose power PyTorch takes in float64.
    bases = config.theta * (growth.double() ** (head_dim / (head_dim - 2))).float()
    return 1.0 / (bases[:, None] ** exponents)


def _yarn(config: RopeConfig, head_dim: int, exponents: Tensor) -> Tensor:
    """YaRN, section 3.2: keep the fast waves, interpolate the slow ones, blend those between linearly."""

    def dimension_that_turns(times: float) -> float:
        waves = math.log(config.original_max_position / (times * 2 * math.pi))
        return head_dim * waves / (2 * math.log(config.theta))

    low, high = dimension_that_turns(config.beta_fast), dimension_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    powers = config.theta**exponents
    return (1.0 / (config.factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def _llama3(config: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: waves longer than the first context slow down by `factor`, short ones stay, others blend."""
    context = config.original_max_position
    waves = 2 * math.pi / frequencies
    slowed = torch.where(waves > context / config.low_freq_factor, frequencies / config.factor, frequencies)
    smooth = (context / waves - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - smooth) * slowed / config.factor + smooth * slowed
    is_between = (waves >= context / config.high_freq_factor) & (waves <= context / config.low_freq_factor)
    return torch.where(is_between, blended, slowed)


def _attention_scaling(config: RopeConfig) -> float:
    """The factor on cosines and sines that keeps attention sharp in a longer context (YaRN, section 3.4)."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
