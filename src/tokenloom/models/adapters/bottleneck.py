"""Bottleneck adapters (arXiv 1902.00751): a small feedforward network after a sublayer, added to it.

With both targets they sit where Houlsby et al. put them, after attention and after the MLP; with `down_proj`
alone, after the MLP only, as AdapterFusion (arXiv 2005.00247) found sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenloom.kernels import Kernels, Linear
from tokenloom.models.adapters.adapter import AdapterError, Params, check_targets, targets_of
from tokenloom.models.adapters.sites import MODULE, Dims, module_suffix

Activation = Literal["relu", "gelu", "silu"]
SUBLAYER_ENDS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class BottleneckConfig:
    """y += scale * (U act(D y + b_D) + b_U), where y is what the sublayer's last linear puts out.

    Attributes:
        size: width of the bottleneck.
        targets: `o_proj`, `down_proj` or both, each in all layers or in one (`3.down_proj`).
        scale: a fixed factor.
        activation: `relu`, `gelu` (the exact one) or `silu`.

    Its files have PEFT's layout, but PEFT cannot load them: the `peft_type` (`BOTTLENECK`) is our own, and so
    are the names: `mlp.down_proj.adapter_down.weight` `[size, out]`, `.adapter_up.weight` `[out, size]`, and
    a bias each.
    """

    size: int = 64
    targets: tuple[str, ...] = ("down_proj",)
    scale: float = 1.0
    activation: Activation = "relu"
    kind = "bottleneck"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise AdapterError(f"size: {self.size} is not a width")
        if self.activation not in get_args(Activation):
            raise AdapterError(
                f"activation: {self.activation!r} is not one of {', '.join(get_args(Activation))}"
            )
        check_targets("targets", self.targets, SUBLAYER_ENDS)

    def shapes(self, layer: int, site: str, dims: Dims) -> list[tuple[int, ...]]:
        return [
            shape
            for linear in targets_of(layer, site, self.targets)
            for width in (dims.width_out(linear),)
            for shape in ((self.size, width), (self.size,), (width, self.size), (width,))
        ]

    def bypass(self, layer: int, site: str, dims: Dims, params: Params) -> Bottleneck:
        return Bottleneck(params, self.scale, self.activation)

    def tensors(self, layer: int, site: str, params: Params) -> dict[str, Tensor]:
        names = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")
        (linear,) = targets_of(layer, site, self.targets)
        return {f"{MODULE[linear]}.{name}": tensor for name, tensor in zip(names, params, strict=True)}

    def init(self, params: Params, generator: torch.Generator) -> None:
        """Down as in `nn.Linear`; up zero."""
        bound = 1 / math.sqrt(params[0].shape[1])
        for down in params[:2]:
            values = torch.rand(down.shape, generator=generator, dtype=torch.float64)
            down.copy_(values * 2 * bound - bound)
        for up in params[2:]:
            up.zero_()

    def to_json(self) -> dict[str, Any]:
        return {
            "peft_type": "BOTTLENECK",
            "task_type": "CAUSAL_LM",
            "size": self.size,
            "target_modules": sorted(map(module_suffix, self.targets)),
            "scale": self.scale,
            "activation": self.activation,
        }


class Bottleneck:
    """One bottleneck. `params` is (down `[size, out]`, its bias, up `[out, size]`, its bias)."""

    low_rank = None

    def __init__(self, params: Params, scale: float, activation: Activation) -> None:
        self.params = params
        self.scale = scale
        self.activation = activation

    def forward(self, x: Tensor, y: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None) -> None:
        """keep is not read: nothing is dropped."""
        down, down_bias, up, up_bias = self.params
        inner = _activate(self.activation, kernels.linear(y, down, down_bias))
        y += self.scale * kernels.linear(inner, up, up_bias)

    def backward(
        self, dy: Tensor, x: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None, grads: Params
    ) -> tuple[Tensor, Tensor | None]:
        down, down_bias, up, _ = self.params
        y = kernels.linear(x, linear.weight, linear.bias)
        before = kernels.linear(y, down, down_bias)
        dup = dy * self.scale
        dbefore = (dup @ up) * _slope(self.activation, before)
        grads[0].addmm_(dbefore.t(), y)
        grads[1].add_(dbefore.sum(0))
        grads[2].addmm_(dup.t(), _activate(self.activation, before))
        grads[3].add_(dup.sum(0))
        return dy + dbefore @ down, None


# Written out rather than taken from torch, whose fused gelu and silu round an element by its place in the
# tensor, so that a row's numbers would depend on what shares its batch.
def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = 1 / (1 + torch.exp(-x))
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(x * x * -0.5) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density


_FUNCTIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "gelu": (_gelu, _gelu_slope),
    "silu": (_silu, _silu_slope),
}


def _activate(activation: Activation, x: Tensor) -> Tensor:
    return _FUNCTIONS[activation][0](_wide(x)).to(x.dtype)


def _slope(activation: Activation, x: Tensor) -> Tensor:
    return _FUNCTIONS[activation][1](_wide(x)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Half precision is not enough for several steps in a row."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
