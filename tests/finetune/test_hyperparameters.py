"""What "auto" comes to, and what a request may not ask for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenloom.errors import RequestError
from tokenloom.finetune.hyperparameters import FinetuneOptions, Hyperparameters, resolve_hyperparameters
from tokenloom.finetune.job_request import parse_job


def resolve(n_examples: int, **options: Any) -> Hyperparameters:
    return resolve_hyperparameters(n_examples, FinetuneOptions.model_validate(options))


@pytest.mark.parametrize(
    ("examples", "epochs"), [(1, 25), (4, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (30_000, 1)]
)
def test_auto_epochs_follow_the_cookbook(examples: int, epochs: int) -> None:
    assert resolve(examples).n_epochs == epochs


@pytest.mark.parametrize(("examples", "batch"), [(1, 1), (700, 1), (1000, 2), (50_000, 100), (10**6, 256)])
def test_auto_batch_is_a_fifth_of_a_percent(examples: int, batch: int) -> None:
    assert resolve(examples).batch_size == batch


def test_the_multiplier_scales_the_base_rate_or_the_given_one() -> None:
    assert resolve(10, hyperparameters={"learning_rate_multiplier": 0.5}).learning_rate == 1e-4
    given = {"learning_rate_multiplier": 2, "learning_rate": 1e-3}
    assert resolve(10, hyperparameters=given).learning_rate == 2e-3


def test_training_keys_are_taken_in_either_place_but_must_agree() -> None:
    assert resolve(10, hyperparameters={"pack": False}).training.pack is False
    assert resolve(10, training={"pack": False}).training.pack is False
    assert resolve(10, training={"pack": False}, hyperparameters={"pack": False}).training.pack is False
    with pytest.raises(RequestError) as caught:
        resolve(10, training={"pack": False}, hyperparameters={"pack": True})
    assert caught.value.param == "training.pack"


def test_null_means_left_out() -> None:
    assert resolve(10, training={"optimizer": None}, lora={"r": None}) == resolve(10)


@given(st.integers(1, 10**7))
def test_what_is_resolved_is_allowed_and_survives_json(examples: int) -> None:
    resolved = resolve(examples)
    assert 1 <= resolved.n_epochs <= 50 and 1 <= resolved.batch_size <= 256
    assert Hyperparameters.model_validate_json(resolved.model_dump_json()) == resolved


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"r": 16.5}},
        {"lora": {"r": True}},
        {"lora": {"dropout": 1.0}},
        {"lora": {"target_modules": []}},
        {"training": {"learning_rate": float("nan")}},
        {"training": {"learning_rate": 0}},
        {"training": {"grad_accum": 0}},
        {"training": {"schedule": "exponential"}},
        {"hyperparameters": {"learning_rate_multiplier": float("inf")}},
        {"hyperparameters": {"n_epochs": "many"}},
        {"optimizer": "adamw"},
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FinetuneOptions.model_validate(options)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_metadata_that_no_database_holds_is_refused(text: str) -> None:
    body = {"model": "m", "training_file": "f", "metadata": {"k": text}}
    with pytest.raises(RequestError) as caught:
        parse_job(body)
    assert caught.value.param == "metadata.k"


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        parse_job([])
