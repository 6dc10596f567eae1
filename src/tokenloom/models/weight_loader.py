"""From a file's tensors to what kernels read: checked, stacked, and packed where they stay quantised."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokenloom.errors import ModelError
from tokenloom.kernels import FORMATS, Linear, PackedWeight, Weight
from tokenloom.models.weights import GGUFSource, WeightSource

Quantize = Literal["auto", "none", "q8", "q4"]

_BLOCK = 32
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHOSEN = {"q8": "Q8_0", "q4": "Q4_1"}


class WeightLoader:
    """Loads weights of expected shapes from one source.

    Args:
        weights: where the tensors come from.
        dtype, device: of the tensors.
        quantize: `none`: everything in `dtype`. `auto`: matrices that the file holds in 8 or 4 bits stay so
            (types without kernels become Q8_0). `q8`, `q4`: all matrices become Q8_0, or Q4_1; the embedding
            and the output head are Q8_0 in both. Rows whose width is no multiple of 32 are never quantised.
    """

    def __init__(
        self,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        quantize: Quantize = "none",
    ) -> None:
        self.weights, self.dtype, self.device, self.quantize = weights, dtype, device, quantize
        self.names = set(weights.names())

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in `dtype`. Raises ModelError if it is missing or has another shape."""
        self._check(name, shape)
        return self.weights.load(name, self.dtype, self.device)

    def matrix(self, name: str, shape: tuple[int, int]) -> Weight:
        """The embedding, or the output head."""
        self._check(name, shape)
        wide = "q8" if self.quantize == "q4" else self.quantize
        return self._matrix([name], [shape[0]], shape[1], wide)

    def stacked(self, prefix: str, parts: list[tuple[str, int]], width: int, bias: bool) -> Linear:
        """Several projections of one input as one, `[sum of outs, width]`."""
        outs = [out for _, out in parts]
        for name, out in parts:
            self._check(f"{prefix}.{name}.weight", (out, width))
        weight = self._matrix([f"{prefix}.{name}.weight" for name, _ in parts], outs, width, self.quantize)
        if not bias:
            return Linear(weight)
        return Linear(weight, torch.cat([self(f"{prefix}.{name}.bias", (out,)) for name, out in parts]))

    def _matrix(self, names: list[str], outs: list[int], width: int, quantize: Quantize) -> Weight:
        format = self._format(names, width, quantize)
        if format is None:
            weight = torch.empty(sum(outs), width, dtype=self.dtype, device=self.device)
            for part, name in zip(weight.split(outs), names, strict=True):
                part.copy_(self.weights.load(name, self.dtype, self.device))
            return weight
        if isinstance(self.weights, GGUFSource) and {self.weights.quantization(n) for n in names} == {format}:
            return PackedWeight.pack(format, np.concatenate([self._stored_rows(name) for name in names]))
        return PackedWeight.quantize(
            format, torch.cat([self.weights.load(name, torch.float32, "cpu") for name in names])
        )

    def _format(self, names: list[str], width: int, quantize: Quantize) -> str | None:
        """What the matrix is packed as; None: not at all."""
        if quantize == "none" or width % _BLOCK:
            return None
        if quantize != "auto":
            return _CHOSEN[quantize]
        stored = {self.weights.quantization(name) for name in names}
        if stored <= set(_FLOATS):
            return None
        return stored.pop() if len(stored) == 1 and stored <= set(FORMATS) else "Q8_0"

    def _stored_rows(self, name: str) -> np.ndarray:
        assert isinstance(self.weights, GGUFSource)
        rows, order = self.weights.raw(name), self.weights.row_order(name)
        return rows if order is None else rows[order]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.names:
            raise ModelError(f"{self.weights.path}: tensor {name!r} is missing")
        found = self.weights.shape(name)
        if found != shape:
            raise ModelError(
                f"{self.weights.path}: tensor {name!r} has shape {list(found)}; the configuration says "
                f"{list(shape)}"
            )
