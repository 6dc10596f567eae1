"""What training minimises: a loss on the logits of some rows, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class LossSums:
    """Sums over the rows of a window, still on the device: weighted loss, and rows predicted right."""

    loss: Tensor
    correct: Tensor


class Objective(Protocol):
    """Loss and gradient by windows: the logits of a whole sequence never exist."""

    def backward(self, logits: Tensor, labels: Tensor, weights: Tensor, scale: float) -> LossSums:
        """Overwrite logits with the gradient of `scale` times the sum of weights times losses.

        Args:
            logits: `[n, vocab]`.
            labels: `[n]`, the token that follows each row.
            weights: `[n]`, weights of the rows in the loss, above 0.
            scale: 1 over the sum of weights of everything that one optimizer step sees.
        """

    def evaluate(self, logits: Tensor, labels: Tensor, weights: Tensor) -> LossSums:
        """The loss alone. logits may be overwritten."""


class SupervisedFinetuning:
    """Cross-entropy with the next token."""

    def backward(self, logits: Tensor, labels: Tensor, weights: Tensor, scale: float) -> LossSums:
        logits, sums = self._log_softmax(logits, labels, weights)
        logits.exp_()
        rows = torch.arange(len(labels), device=labels.device)
        logits[rows, labels] -= 1
        logits.mul_((weights * scale)[:, None])
        return sums

    def evaluate(self, logits: Tensor, labels: Tensor, weights: Tensor) -> LossSums:
        return self._log_softmax(logits, labels, weights)[1]

    @staticmethod
    def _log_softmax(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, LossSums]:
        """Log-probabilities in place of the logits, and the sums."""
        best, choice = logits.max(dim=-1, keepdim=True)
        logits.sub_(best)
        logits.sub_(logits.logsumexp(-1, keepdim=True))
        losses = -logits.gather(1, labels[:, None])[:, 0] * weights
        return logits, LossSums(losses.sum(), (choice[:, 0] == labels).sum())
