"""A step of the optimizer: how far it goes, and when it does not."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from tokenloom.finetune.hyperparameters import FinetuneOptions, Hyperparameters, resolve_hyperparameters
from tokenloom.finetune.optimizer import Optimizer, rate_factor


def trained_with(**training: Any) -> Hyperparameters:
    return resolve_hyperparameters(5, FinetuneOptions.model_validate({"training": training}))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_rise_then_fall(schedule: str) -> None:
    rates = [rate_factor(schedule, step, 100, 10) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 11) for i in range(10)]
    assert rates[10] == 1
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    middle = {"constant": 1, "linear": 0.5, "cosine": 0.5}[schedule]
    assert rates[55] == pytest.approx(middle)


def test_gradients_are_clipped_to_the_norm() -> None:
    flat = torch.zeros(4, dtype=torch.float64)
    wanted = trained_with(
        max_grad_norm=0.5, optimizer="sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0.0
    )
    norm = Optimizer(flat, wanted, 10).step(torch.full((4,), 3.0, dtype=torch.float64), 0)
    assert norm == 6.0
    assert float(flat.norm()) == pytest.approx(0.5)


def test_infinite_gradients_change_nothing() -> None:
    flat = torch.ones(4)
    assert not math.isfinite(Optimizer(flat, trained_with(), 10).step(torch.full((4,), math.inf), 0))
    assert flat.tolist() == [1.0] * 4
