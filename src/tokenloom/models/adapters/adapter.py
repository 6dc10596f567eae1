"""One adapter: its configuration, all its parameters in one tensor, and a bypass for each site it touches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenloom.errors import TokenloomError
from tokenloom.kernels import Kernels, Linear, LowRank
from tokenloom.models.adapters.sites import SITES, Dims

Params = tuple[Tensor, ...]


class AdapterError(TokenloomError):
    """An adapter cannot be read, or does not fit the model; the message names the file, key or tensor."""


class TrainableBypass(Protocol):
    """A bypass at one site of one layer. n rows; x `[n, in]` is what the frozen projection reads."""

    params: Params

    @property
    def low_rank(self) -> LowRank | None:
        """See `batch.Bypass`."""

    def forward(self, x: Tensor, y: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None) -> None:
        """Change y `[n, out]`, which holds `linear(x)`, in place. keep: dropout's multiplier, like x."""

    def backward(
        self, dy: Tensor, x: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None, grads: Params
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradients of the parameters to `grads`, which is shaped like `params`.

        Nothing of the forward pass is kept for it: what it needs, it computes again from x.

        Args:
            dy: `[n, out]`, gradient of the changed y.

        Returns:
            The gradient of `linear(x)`, `[n, out]`, and what the bypass adds to that of x, `[n, in]`.
        """


class AdapterConfig(Protocol):
    """A kind of adapter and its options."""

    kind: str

    def shapes(self, layer: int, site: str, dims: Dims) -> list[tuple[int, ...]]:
        """Shapes of the parameters at one site; empty if the adapter does not touch it."""

    def bypass(self, layer: int, site: str, dims: Dims, params: Params) -> TrainableBypass:
        """The bypass over those parameters, which are views of the adapter's one tensor."""

    def tensors(self, layer: int, site: str, params: Params) -> dict[str, Tensor]:
        """The parameters under the names that PEFT gives them inside the layer, e.g.
        `self_attn.q_proj.lora_A.weight`."""

    def init(self, params: Params, generator: torch.Generator) -> None:
        """Fill the parameters of a new adapter, which changes nothing until it is trained."""

    def to_json(self) -> dict[str, Any]:
        """`adapter_config.json` without the base model's name."""


class Adapter:
    """All bypasses of a model over one flat tensor.

    Args:
        config: the kind and its options.
        dims: the model's widths.
        flat: `[num_parameters]`, or None for zeros.

    `layers[i]` maps a site to its bypass. One flat tensor makes an optimizer step, a gradient norm and a
    snapshot one operation each; `views` gives any tensor like it (gradients) the same structure.
    """

    def __init__(
        self,
        config: AdapterConfig,
        dims: Dims,
        dtype: torch.dtype,
        device: torch.device,
        flat: Tensor | None = None,
    ) -> None:
        self.config, self.dims = config, dims
        self._shapes = [
            {site: shapes for site in SITES if (shapes := config.shapes(i, site, dims))}
            for i in range(dims.num_layers)
        ]
        size = sum(
            math.prod(shape) for sites in self._shapes for shapes in sites.values() for shape in shapes
        )
        self.flat = torch.zeros(size, dtype=dtype, device=device) if flat is None else flat
        self.layers: list[dict[str, TrainableBypass]] = [
            {site: config.bypass(i, site, dims, params) for site, params in sites.items()}
            for i, sites in enumerate(self.views(self.flat))
        ]

    def views(self, flat: Tensor) -> list[dict[str, Params]]:
        """A tensor like `flat` cut into parameters, by layer and site."""
        start, layers = 0, []
        for sites in self._shapes:
            layer: dict[str, Params] = {}
            for site, shapes in sites.items():
                params = []
                for shape in shapes:
                    params.append(flat[start : start + math.prod(shape)].view(shape))
                    start += math.prod(shape)
                layer[site] = tuple(params)
            layers.append(layer)
        return layers

    def init(self, seed: int) -> None:
        """Fill a new adapter; the same seed gives the same parameters."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.views(self.flat):
            for params in layer.values():
                self.config.init(params, generator)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by the name it has inside the model, `layers.0.self_attn.q_proj.lora_A.weight`."""
        return {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for site, bypass in layer.items()
            for name, tensor in self.config.tensors(i, site, bypass.params).items()
        }

    def copy(self, flat: Tensor | None = None) -> Adapter:
        """An adapter of the same kind over its own copy of the parameters (or over `flat`)."""
        flat = self.flat.clone() if flat is None else flat
        return Adapter(self.config, self.dims, flat.dtype, flat.device, flat)

    @property
    def num_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


def check_targets(option: str, targets: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise AdapterError if a target is none of the allowed linears, bare or of one layer (`3.q_proj`)."""
    for target in targets:
        layer, dot, linear = target.rpartition(".")
        if linear not in allowed or (dot and not layer.isdecimal()):
            raise AdapterError(f"{option}: {target!r} is not one of {', '.join(allowed)}, nor of one layer")


def is_target(layer: int, linear: str, targets: Sequence[str]) -> bool:
    """Whether targets name the linear for all layers (`q_proj`) or for this one (`3.q_proj`)."""
    return linear in targets or f"{layer}.{linear}" in targets


def targets_of(layer: int, site: str, targets: Sequence[str]) -> list[str]:
    """The targeted linears of one layer's site, in their stacked order."""
    return [linear for linear in SITES[site] if is_target(layer, linear, targets)]
