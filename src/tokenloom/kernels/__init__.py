"""Compute backends behind one interface."""

from __future__ import annotations

import torch

from tokenloom.kernels.interface import (
    Attend,
    FusedLayers,
    Kernels,
    KVSpan,
    LayerWeights,
    Linear,
    LowRank,
    Pages,
    SharedPrefix,
)
from tokenloom.kernels.native import native
from tokenloom.kernels.packed import FORMATS, PackedWeight, Weight, dense, num_bytes
from tokenloom.kernels.reference import ReferenceKernels
from tokenloom.kernels.torch_ops import TorchKernels

__all__ = [
    "FORMATS",
    "Attend",
    "FusedLayers",
    "KVSpan",
    "Kernels",
    "LayerWeights",
    "Linear",
    "LowRank",
    "PackedWeight",
    "Pages",
    "SharedPrefix",
    "Weight",
    "dense",
    "describe",
    "get_kernels",
    "native",
    "num_bytes",
]


def get_kernels(name: str = "auto", device: torch.device | str = "cpu") -> Kernels:
    """The backend of that name; `auto` is the fastest that this machine runs.

    Raises:
        RuntimeError: the native kernels were not built.
    """
    if name == "auto":
        fast = native is not None and native.isas()[0] != "portable"
        name = "cpu" if torch.device(device).type == "cpu" and fast else "torch"
    if name == "cpu":
        if native is None:
            raise RuntimeError("the native CPU kernels were not built: no C++ compiler was found by pip")
        from tokenloom.kernels.cpu import CpuKernels

        return CpuKernels()
    return ReferenceKernels() if name == "reference" else TorchKernels()


def describe(kernels: Kernels) -> str:
    """One line for people: what computes, and why not the native kernels where they could have been meant."""
    if kernels.name == "cpu":
        return f"cpu (native kernels: {native.isas()[0]}, threads of {native.pool()})"
    if native is None:
        return f"{kernels.name} (native CPU kernels were not built: pip found no C++ compiler)"
    if native.isas()[0] == "portable":
        return f"{kernels.name} (the native CPU kernels know no instruction set of this machine)"
    return kernels.name
