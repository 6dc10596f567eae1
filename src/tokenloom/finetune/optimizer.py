"""The optimizer over an adapter's one tensor, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenloom.finetune.hyperparameters import Hyperparameters


def rate_factor(schedule: str, step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at step 0, 1, ... of `total`: rises linearly to 1 at step `warmup`,
    then falls by the schedule; no step has a rate of 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW (arXiv 1711.05101) or SGD with clipping by the global norm.

    Args:
        flat: the parameters, changed in place.
        total_steps: of the whole job, for the schedule.
    """

    def __init__(self, flat: Tensor, hyper: Hyperparameters, total_steps: int) -> None:
        training = hyper.training
        self.flat = flat
        self.peak = hyper.learning_rate
        self.schedule, self.total = training.schedule, total_steps
        self.warmup = math.ceil(training.warmup_ratio * total_steps) if training.warmup_ratio else 0
        self.max_norm = training.max_grad_norm
        self._optimizer: torch.optim.Optimizer
        if training.optimizer == "adamw":
            # Fused: one pass over memory instead of ten.
            self._optimizer = torch.optim.AdamW(
                [flat], lr=self.peak, weight_decay=training.weight_decay, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD([flat], lr=self.peak, weight_decay=training.weight_decay)

    def rate(self, step: int) -> float:
        return self.peak * rate_factor(self.schedule, step, self.total, self.warmup)

    @torch.no_grad()
    def step(self, grads: Tensor, step: int) -> float:
        """Take step number `step` (from 0); returns the norm of the gradients before clipping.

        Nothing is changed if the norm is not finite. grads, which may be scaled, holds no use afterwards.
        """
        norm = float(torch.linalg.vector_norm(grads))
        if not math.isfinite(norm):
            return norm
        if self.max_norm and norm > self.max_norm:
            grads.mul_(self.max_norm / norm)
        self._optimizer.param_groups[0]["lr"] = self.rate(step)
        self.flat.grad = grads
        self._optimizer.step()
        self.flat.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """Copies of the moments, by name; empty before the first step and for SGD."""
        state = self._optimizer.state.get(self.flat, {})
        return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            self._optimizer.state[self.flat] = {name: value.clone() for name, value in state.items()}
