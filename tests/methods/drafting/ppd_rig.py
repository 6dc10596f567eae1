"""Prompt tokens for tiny models: stored as training stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.engine.engine import Engine
from tokenloom.methods.drafting.ppd_training import Trained, keep

ACCURACY = torch.tensor(
    [
        [0.48, 0.12, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01],
        [0.36, 0.10, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
        [0.30, 0.09, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01],
    ]
)


def random_vectors(width: int, seed: int = 0, count: int = 3) -> Tensor:
    return 0.3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def install(engine: Engine, vectors: Tensor, accuracy: Tensor = ACCURACY) -> None:
    """Let an engine find these vectors, whatever it had read before."""
    keep(engine, Trained(vectors), accuracy[: len(vectors)], {})
    engine.drafting.shared.pop("ppd", None)
