"""Gradients by windows equal autograd's, whatever the windows; and the mistakes that would spoil them do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.batch import BatchBuilder
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.finetune.backward import LayerBackward
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.retained import Retained, blocks_needed, slots_per_token
from tokenloom.finetune.training_pass import Phase, TrainingPass
from tokenloom.models.adapters import Ia3Config, LoraConfig
from training_rig import Rig, gradients, random_samples, random_sizes, relative_error, total_weight, whole

LENGTHS = (11, 7, 2, 14)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.mark.parametrize("retain", ["lean", "fast", "ckpt"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_equal_autograd(tmp_path: Path, architecture: str, retain: str) -> None:
    rig = Rig(tmp_path, architecture)
    adapter, samples = rig.adapter(), random_samples(LENGTHS)
    loss, wanted = rig.autograd(adapter, samples)
    for size in (whole, lambda phase, left: 1, random_sizes(1)):
        found_loss, found = gradients(rig.engine(), adapter, samples, size, retain=retain)
        assert abs(found_loss - loss) <= 1e-9
        assert relative_error(found, wanted) <= 1e-9


@given(seed=st.integers(0, 10_000), lengths=st.lists(st.integers(2, 20), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_gives_the_gradients_of_one_window(rig: Rig, seed: int, lengths: list[int]) -> None:
    engine, adapter, samples = rig.engine(), rig.adapter(), random_samples(lengths, seed)
    loss, wanted = gradients(engine, adapter, samples)
    for retain in ("lean", "fast", "ckpt"):
        found_loss, found = gradients(engine, adapter, samples, random_sizes(seed), retain=retain)
        assert abs(found_loss - loss) <= 1e-10
        assert relative_error(found, wanted) <= 1e-10


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, alpha=2.0, targets=("v_proj", "down_proj")),
        LoraConfig(r=2, alpha=3.0, rslora=True, ranks={"q_proj": 4}, alphas={"up_proj": 1.0}),
        LoraConfig(r=2, alpha=2.0, targets=("0.k_proj", "2.gate_proj")),
        Ia3Config(),
    ],
    ids=["subset", "ranks", "layers", "ia3"],
)
def test_other_adapters_equal_peft(rig: Rig, config: Any) -> None:
    adapter, samples = rig.adapter(config), random_samples(LENGTHS, 2)
    loss, wanted = rig.autograd(adapter, samples)
    found_loss, found = gradients(rig.engine(), adapter, samples, random_sizes(3))
    assert abs(found_loss - loss) <= 1e-9
    assert relative_error(found, wanted) <= 1e-9


def test_the_worked_example(rig: Rig) -> None:
    """The sheet's T = 11: forward windows 1, 4, 2, 3, 1; layer 2 in ones, layer 1 in 3, 5, 1, 2, layer 0 in
    6, 5."""
    sizes = {"forward": iter([1, 4, 2, 3, 1]), "backward": iter([1] * 11 + [3, 5, 1, 2] + [6, 5])}
    sample = random_samples([12])
    adapter = rig.adapter()

    def size(phase: str, left: int) -> int:
        return next(sizes[phase]) if phase in sizes else left

    _, wanted = rig.autograd(adapter, sample)
    _, found = gradients(rig.engine(), adapter, sample, size)
    assert relative_error(found, wanted) <= 1e-9
    assert not list(sizes["forward"]) and not list(sizes["backward"])


def test_the_gradient_of_every_layers_input_equals_autograd(rig: Rig) -> None:
    adapter, samples = rig.adapter(), random_samples([13], 4)
    model = rig.peft(adapter)
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.base_model.model.model.layers
    ]
    ids = torch.tensor(samples[0].tokens)[None]
    with torch.enable_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
        ) * torch.tensor(samples[0].weights[1:], dtype=torch.float64)
        wanted = torch.autograd.grad(losses.sum() / total_weight(samples), inputs[1:])
    for hook in hooks:
        hook.remove()
    model.unload()
    engine = rig.engine()
    training = TrainingPass(
        engine,
        adapter,
        samples,
        SupervisedFinetuning(),
        grads=torch.zeros_like(adapter.flat),
        scale=1 / total_weight(samples),
    )
    builder = BatchBuilder(engine.device)
    training.add_rows(builder, training.forward_left())
    engine.decoder.forward(builder.build(), engine.kv)
    training.forward_done(training.num_rows)
    training.run_loss(training.losses_left())
    for layer in (2, 1):
        while training.phase is Phase.BACKWARD and training.layer == layer:
            training.run_backward(min(4, training.backward_left()))
        found, expected = training.hidden, wanted[layer - 1][0, :-1]
        assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-9


# -- mistakes -------------------------------------------------------------------------------------------


@pytest.fixture
def mutant(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """One of the mistakes that others have made, put into our code."""
    run, write, rows = LayerBackward.run, Retained.write, TrainingPass._rows
    name = request.param
    if name == "later windows' share of dK and dV is lost":

        def forget(self: Any, w: Any, kept: Any, dy: Any, dk: Tensor, dv: Tensor, need_dx: bool) -> Tensor:
            dk.zero_()
            dv.zero_()
            return run(self, w, kept, dy, dk, dv, need_dx)

        monkeypatch.setattr(LayerBackward, "run", forget)
    elif name == "keys are unrotated at the window's last position":
        last = staticmethod(
            lambda rotation, begin, end: (
                tuple(r[-1:].expand(end - begin, *r.shape[1:]) for r in rotation)
                if end - begin > 1
                else rows(rotation, begin, end)
            )
        )
        monkeypatch.setattr(TrainingPass, "_rows", last)
    elif name == "activations are captured at offset 0":
        monkeypatch.setattr(
            Retained, "write", lambda self, layer, site, begin, value: write(self, layer, site, 0, value)
        )
    yield name


MUTANTS = [
    "later windows' share of dK and dV is lost",
    "keys are unrotated at the window's last position",
    "activations are captured at offset 0",
]


@pytest.mark.parametrize("mutant", MUTANTS, indirect=True)
def test_the_comparison_catches_a(rig: Rig, mutant: str) -> None:
    adapter, samples = rig.adapter(), random_samples([12, 9], 5)
    _, wanted = rig.autograd(adapter, samples)
    _, found = gradients(rig.engine(), adapter, samples, lambda phase, left: min(4, left))
    assert relative_error(found, wanted) > 1e-3, mutant


def test_the_comparison_catches_a_lost_label_and_a_wrong_count(rig: Rig) -> None:
    adapter, samples = rig.adapter(), random_samples([12, 9], 5)
    _, wanted = rig.autograd(adapter, samples)
    without = [
        type(s)(s.tokens, [0.0 if i % 4 == 0 else w for i, w in enumerate(s.weights)]) for s in samples
    ]
    _, found = gradients(rig.engine(), adapter, without, scale=1 / total_weight(samples))
    assert relative_error(found, wanted) > 1e-3
    rows = sum(len(sample.tokens) for sample in samples)
    _, found = gradients(rig.engine(), adapter, samples, scale=1 / rows)
    assert relative_error(found, wanted) > 1e-3


# -- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retain", "numbers"),
    [("lean", 2 * 64 + 64), ("fast", 64 + 2 * 64 + 32 + 2 * 96), ("ckpt", 64)],
)
def test_kept_bytes_follow_the_formula(rig: Rig, retain: Any, numbers: int) -> None:
    """Per token and layer: {x, h, q} (lean), {x, q, attention, its sums, g, u} (fast), or {x} (ckpt), plus K
    and V. The sums, one for each query head, take a unit of Hk * D numbers."""
    rows, size = 400, 4
    kv = 2 * 2 * 16
    blocks = -(-rows // size) + blocks_needed(rig.files.config, rows, retain, size)
    found = blocks * size * kv  # a slot holds as many numbers as one token's K and V
    assert abs(found / (rows * (numbers + kv)) - 1) <= 0.05
    assert slots_per_token(rig.files.config, retain) * kv == numbers + kv


def test_a_frozen_projection_keeps_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of projections die once their gradients are known: only kept activations outlive a window."""
    refs: list[weakref.ref[Tensor]] = []
    linear = LayerBackward._linear

    def watched(self: Any, w: Any, site: str, frozen: Any, dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        refs.append(weakref.ref(x))
        refs.append(weakref.ref(dy))
        return linear(self, w, site, frozen, dy, x, *rest)

    monkeypatch.setattr(LayerBackward, "_linear", watched)
    gradients(rig.engine(), rig.adapter(), random_samples([12]), lambda phase, left: min(5, left))
    assert len(refs) == 3 * 3 * 4 * 2  # windows x layers x projections
    assert not [ref for ref in refs if ref() is not None]


def test_a_pass_that_does_not_fit_holds_nothing(rig: Rig) -> None:
    engine = rig.engine(cache__kv_bytes=40 * 4 * 3 * 64 * 8)
    with pytest.raises(OutOfBlocks):
        gradients(engine, rig.adapter(), random_samples([60]))
    assert engine.pool.num_used == 0
    engine.pool.check()
