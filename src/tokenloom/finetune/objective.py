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

    def backward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[LossSums, Tensor]:
        """The sums, and the gradient of each row's own loss by its logits, `[n, vocab]`.

        Weights enter the sums only: the caller scales the rows of the gradient where they are short.

        Args:
            logits: `[n, vocab]`; may be overwritten.
            labels: `[n]`, the token that follows each row.
            weights: `[n]`, weights of the rows in the loss, above 0.
        """

    def evaluate(self, logits: Tensor, labels: Tensor, weights: Tensor) -> LossSums:
        """The loss alone. logits may be overwritten."""


class SupervisedFinetuning:
    """Cross-entropy with the next token."""

    def backward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[LossSums, Tensor]:
        best, choice = logits.max(dim=-1, keepdim=True)
        wanted = logits.gather(1, labels[:, None])
        probabilities = torch.softmax(logits, dim=-1, out=logits)
        # log sum exp from the likeliest token, whose probability is never too small for a logarithm.
        losses = (best - probabilities.gather(1, choice).log() - wanted)[:, 0]
        probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
        return LossSums((losses * weights).sum(), (choice[:, 0] == labels).sum()), probabilities

    def evaluate(self, logits: Tensor, labels: Tensor, weights: Tensor) -> LossSums:
        losses = logits.logsumexp(-1) - logits.gather(1, labels[:, None])[:, 0]
        return LossSums((losses * weights).sum(), (logits.argmax(-1) == labels).sum())
