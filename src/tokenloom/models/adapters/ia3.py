"""(IA)³ (arXiv 2205.05638): learned vectors that rescale what a frozen linear puts out, or what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom.kernels import Kernels, Linear, dense
from tokenloom.models.adapters.adapter import AdapterError, Params, check_targets, is_target, targets_of
from tokenloom.models.adapters.sites import LINEARS, MODULE, Dims, module_suffix


@dataclass(frozen=True)
class Ia3Config:
    """y *= l for each target, bias included; y = linear(x * l) for the feedforward ones, bias apart.

    Attributes:
        targets: any of the seven linears, each in all layers (`k_proj`) or in one (`3.k_proj`). The default
            is the paper's choice, with the down projection standing for the inner feedforward activation.
        feedforward: those of the targets whose input is scaled.
    """

    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    kind = "ia3"

    def __post_init__(self) -> None:
        check_targets("targets", self.targets, LINEARS)
        check_targets("feedforward", self.feedforward, LINEARS)
        for target in self.feedforward:
            if target not in self.targets and target.rpartition(".")[2] not in self.targets:
                raise AdapterError(f"feedforward: {target!r} is not one of the targets")

    def shapes(self, layer: int, site: str, dims: Dims) -> list[tuple[int, ...]]:
        return [
            (1, dims.width_in[linear]) if self._scales_input(layer, linear) else (dims.width_out(linear), 1)
            for linear in targets_of(layer, site, self.targets)
        ]

    def bypass(self, layer: int, site: str, dims: Dims, params: Params) -> Ia3:
        linears = targets_of(layer, site, self.targets)
        return Ia3(params, [(dims.rows[linear], self._scales_input(layer, linear)) for linear in linears])

    def tensors(self, layer: int, site: str, params: Params) -> dict[str, Tensor]:
        linears = targets_of(layer, site, self.targets)
        return {f"{MODULE[linear]}.ia3_l": scale for linear, scale in zip(linears, params, strict=True)}

    def init(self, params: Params, generator: torch.Generator) -> None:
        """Ones, which change nothing."""
        for scale in params:
            scale.fill_(1)

    def to_json(self) -> dict[str, Any]:
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            # PEFT wants every entry of the second list to be in the first as well.
            "target_modules": sorted(map(module_suffix, {*self.targets, *self.feedforward})),
            "feedforward_modules": sorted(map(module_suffix, self.feedforward)),
        }

    def _scales_input(self, layer: int, linear: str) -> bool:
        return is_target(layer, linear, self.feedforward)


class Ia3:
    """(IA)³ at one site. `params` has one vector per target, `[out, 1]`, or `[1, in]` where it scales the
    input; `parts` says, per target, its columns of y (rows of the stacked weight), and whether it does.
    """

    low_rank = None

    def __init__(self, params: Params, parts: list[tuple[slice, bool]]) -> None:
        self.params = params
        self.parts = parts

    def forward(self, x: Tensor, y: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None) -> None:
        """keep is not read: nothing is dropped."""
        for (out, scales_input), scale in zip(self.parts, self.params, strict=True):
            if scales_input:
                # linear(x * l) = linear(x) + (x * (l - 1)) Wᵀ
                y[:, out] += kernels.linear(x * (scale - 1), dense(linear.weight, out, x))
            else:
                y[:, out] *= scale.view(-1)

    def backward(
        self, dy: Tensor, x: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None, grads: Params
    ) -> tuple[Tensor, Tensor | None]:
        dlinear, dx = dy.clone(), None
        for (out, scales_input), scale, grad in zip(self.parts, self.params, grads, strict=True):
            if scales_input:
                dscaled = dy[:, out] @ dense(linear.weight, out, x)
                grad += (dscaled * x).sum(0)
                dscaled *= scale - 1
                dx = dscaled if dx is None else dx.add_(dscaled)
            else:
                bias = None if linear.bias is None else linear.bias[out]
                grad += (dy[:, out] * kernels.linear(x, dense(linear.weight, out, x), bias)).sum(0)[:, None]
                dlinear[:, out] *= scale.view(-1)
        return dlinear, dx
