"""LoRA (arXiv 2106.09685), with rank-stabilised scaling (rsLoRA, arXiv 2312.03732)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenloom.kernels import Kernels, Linear, LowRank
from tokenloom.models.adapters.adapter import Params, check_targets, targets_of
from tokenloom.models.adapters.sites import LINEARS, MODULE, Dims, module_suffix


@dataclass(frozen=True)
class LoraConfig:
    """y += scale * (x Aᵀ) Bᵀ, scale = alpha / r, or alpha / sqrt(r) with rsLoRA.

    Attributes:
        r, alpha: rank and scale of every target that has no entry of its own in `ranks` and `alphas`.
        dropout: on x, while training only. Linears that read the same x (q, k and v; gate and up) drop the
            same elements of it.
        targets: any of the seven linears, each in all layers (`q_proj`) or in one (`3.q_proj`).
        ranks, alphas: by linear (`q_proj`) or by layer and linear (`3.q_proj`), the latter first.
        layers: which layers have the adapter; None means all.
    """

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    layers: frozenset[int] | None = None
    kind = "lora"

    def __post_init__(self) -> None:
        check_targets("targets", self.targets, LINEARS)

    def rank(self, layer: int, linear: str) -> int:
        return self.ranks.get(f"{layer}.{linear}", self.ranks.get(linear, self.r))

    def scale(self, layer: int, linear: str) -> float:
        alpha = self.alphas.get(f"{layer}.{linear}", self.alphas.get(linear, self.alpha))
        rank = self.rank(layer, linear)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def shapes(self, layer: int, site: str, dims: Dims) -> list[tuple[int, ...]]:
        linears = self._targets(layer, site)
        if not linears:
            return []
        ranks = [self.rank(layer, linear) for linear in linears]
        return [
            (sum(ranks), dims.width_in[linears[0]]),
            *((dims.width_out(linear), rank) for linear, rank in zip(linears, ranks, strict=True)),
        ]

    def bypass(self, layer: int, site: str, dims: Dims, params: Params) -> Lora:
        parts, start = [], 0
        for linear in self._targets(layer, site):
            rank = self.rank(layer, linear)
            parts.append((slice(start, start + rank), dims.rows[linear], self.scale(layer, linear)))
            start += rank
        return Lora(params, parts)

    def tensors(self, layer: int, site: str, params: Params) -> dict[str, Tensor]:
        named, start = {}, 0
        for linear, b in zip(self._targets(layer, site), params[1:], strict=True):
            named[f"{MODULE[linear]}.lora_A.weight"] = params[0][start : start + b.shape[1]]
            named[f"{MODULE[linear]}.lora_B.weight"] = b
            start += b.shape[1]
        return named

    def init(self, params: Params, generator: torch.Generator) -> None:
        """A uniform as in `nn.Linear`, which PEFT uses; B zero."""
        bound = 1 / math.sqrt(params[0].shape[1])
        values = torch.rand(params[0].shape, generator=generator, dtype=torch.float64) * 2 * bound - bound
        params[0].copy_(values)
        for b in params[1:]:
            b.zero_()

    def to_json(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(map(module_suffix, self.targets)),
            "use_rslora": self.rslora,
            "bias": "none",
            "rank_pattern": _pattern(self.ranks),
            "alpha_pattern": _pattern(self.alphas),
        }
        if self.layers is not None:
            config |= {"layers_to_transform": sorted(self.layers), "layers_pattern": "layers"}
        return config

    def _targets(self, layer: int, site: str) -> list[str]:
        if self.layers is not None and layer not in self.layers:
            return []
        return targets_of(layer, site, self.targets)


class Lora:
    """LoRA at one site. The A of linears that read the same x are stacked: `params` is (A `[sum r, in]`, and
    a B `[out, r]` per linear); `parts` says, per linear, its columns of z = x Aᵀ and of y, and its scale.
    """

    def __init__(self, params: Params, parts: list[tuple[slice, slice, float]]) -> None:
        self.params = params
        self.low_rank = LowRank(params[0], [(b, *part) for b, part in zip(params[1:], parts, strict=True)])

    def forward(self, x: Tensor, y: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None) -> None:
        z = self._middle(kernels.linear(self._input(x, keep), self.params[0]))
        for b, rank, out, _ in self.low_rank.parts:
            if b.dtype == y.dtype:
                kernels.add_linear(y[:, out], z[:, rank], b)
            else:
                y[:, out] += kernels.linear(z[:, rank], b).to(y.dtype)

    def backward(
        self, dy: Tensor, x: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None, grads: Params
    ) -> tuple[Tensor, Tensor | None]:
        a = self.params[0]
        x, wide_dy = self._input(x, keep), dy.to(a.dtype)
        z = self._middle(kernels.linear(x, a))
        dz = torch.empty_like(z)
        for (b, rank, out, _), grad in zip(self.low_rank.parts, grads[1:], strict=True):
            grad.addmm_(wide_dy[:, out].t(), z[:, rank])
            torch.mm(wide_dy[:, out], b, out=dz[:, rank])
        dz = self._middle(dz)
        grads[0].addmm_(dz.t(), x)
        dx = dz @ a if keep is None else (dz @ a) * keep
        return dy, dx.to(dy.dtype)

    def _input(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x in the parameters' type, which in training is wider than a half-precision model's."""
        x = x.to(self.params[0].dtype)
        return x if keep is None else x * keep

    def _middle(self, z: Tensor) -> Tensor:
        """z `[n, sum r]` times each part's scale, in place."""
        for _, rank, _, scale in self.low_rank.parts:
            if scale != 1:
                z[:, rank] *= scale
        return z


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    """PEFT takes the first key that matches, so those of one layer come first."""
    keys = sorted(values, key=lambda key: ("." not in key, key))
    return {module_suffix(key): values[key] for key in keys}
