"""How far each layer moves its tokens (Token Sparse Attention, arXiv 2602.03216, layer choice by drift)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokenloom.engine.engine import Engine
from tokenloom.methods.calibration import observe, passages, shape_of, store


@dataclass
class DriftTap:
    """Sums `||h' - h|| / ||h||` over rows, h entering a layer and h' leaving it."""

    num_layers: int
    rows: slice = field(default_factory=lambda: slice(0, 0))
    sites: frozenset[str] = frozenset({"input"})
    entered: Tensor | None = None
    sums: list[float] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.sums = [0.0] * self.num_layers

    def save(self, layer: int, site: str, value: Tensor) -> None:
        if layer and self.entered is not None:
            moved = (value - self.entered).float().norm(dim=-1)
            self.sums[layer - 1] += float((moved / (self.entered.float().norm(dim=-1) + 1e-8)).sum())
        self.entered = value.clone()
        self.count += len(value) if layer == 0 else 0

    def units(self) -> dict[str, Tensor] | None:
        return None

    def drift(self) -> list[float]:
        """By layer."""
        return [total / self.count for total in self.sums]


def calibrate(
    engine: Engine, text: Path | None = None, *, num_passages: int = 1, tokens: int = 4096
) -> tuple[Path, list[float]]:
    """Measure every layer's drift, and keep it where `token_sparse` finds it.

    Args:
        text: UTF-8; None: see `calibration.passages`.

    Returns:
        The file, and the drift by layer.

    Raises:
        RequestError: the text, the context or the pool is too small.
    """
    tap = DriftTap(engine.config.num_layers)
    with torch.inference_mode():
        for passage in passages(engine, text, num_passages, tokens):
            observe(engine, passage, taps=[tap])
    about = {
        "model": engine.name,
        "text": str(text) if text else "Python's standard library",
        "made": f"tokenloom calibrate token_sparse, {num_passages} passages of {tokens} tokens",
    }
    drift = tap.drift()
    path = store("token_sparse", shape_of(engine, tokens), {"drift": torch.tensor(drift)}, about)
    return path, drift
