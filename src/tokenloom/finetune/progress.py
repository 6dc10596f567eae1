"""Where a training job is, and who hears of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass
class Progress:
    """Where a job is. With the tensors of a `Snapshot` it is all that going on needs: everything random is a
    function of the seed and of these numbers, and a pass that was under way starts over."""

    step: int = 0
    """Optimizer steps done."""
    passes_done: int = 0
    """Passes of the step at hand whose gradients are in the sum."""
    trained_tokens: int = 0
    loss: float = 0.0
    """Weighted sum over the passes done of the step at hand; so are the next two."""
    weight: float = 0.0
    correct: int = 0
    labels: int = 0
    valid_windows_done: int = 0
    valid: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "weight", "correct", "n"), 0.0)
    )
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluating: bool = False
    best_valid_loss: float | None = None
    valid_without_gain: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    """Time spent training so far."""


@dataclass
class Snapshot:
    """A copy of a job's state between two passes."""

    progress: dict[str, Any]
    flat: Tensor
    optimizer: dict[str, Tensor]
    grads: Tensor
    """Of the step at hand; empty when none of its passes is done."""


class Listener(Protocol):
    """Hears of a trainer, on the engine's thread: it must return at once."""

    def step(self, progress: Progress, metrics: dict[str, float], eta_s: float | None) -> None: ...

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """An adapter to keep, and to go on from."""

    def save(self, snapshot: Snapshot) -> None:
        """A state to go on from."""

    def finished(self, snapshot: Snapshot) -> None:
        """The last step is done (its checkpoint came before)."""

    def failed(self, error: BaseException, step: int) -> None: ...
