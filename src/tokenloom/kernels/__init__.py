"""Compute backends behind one interface."""

from __future__ import annotations

from tokenloom.kernels.interface import Kernels, KVSpan, Linear
from tokenloom.kernels.reference import ReferenceKernels
from tokenloom.kernels.torch_ops import TorchKernels, mask_ahead

__all__ = ["BACKENDS", "KVSpan", "Kernels", "Linear", "get_kernels", "mask_ahead"]

BACKENDS: dict[str, type[ReferenceKernels] | type[TorchKernels]] = {
    "reference": ReferenceKernels,
    "torch": TorchKernels,
}


def get_kernels(name: str = "auto") -> Kernels:
    """The backend of that name; `auto` is the fastest that this machine runs."""
    return BACKENDS["torch" if name == "auto" else name]()
