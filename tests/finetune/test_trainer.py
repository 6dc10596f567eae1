"""The same adapter comes out however its training was cut, interrupted, or mixed with inference."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenloom.batch import BatchBuilder
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.finetune.checkpoint import latest_state, save_state
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import FinetuneOptions, Hyperparameters, resolve_hyperparameters
from tokenloom.finetune.local import new_adapter
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.optimizer import rate_factor
from tokenloom.finetune.progress import Progress, Snapshot
from tokenloom.finetune.trainer import Trainer, TrainingDiverged
from tokenloom.models.adapters import Adapter
from training_rig import Rig, our_name, random_samples, reference_loss

SAMPLES = random_samples((11, 7, 14, 5, 9), 7)
STEPS = 20


@dataclass
class Listener:
    """Remembers what it heard."""

    losses: list[float] = field(default_factory=list)
    checkpoints: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    saved: list[Snapshot] = field(default_factory=list)
    done: bool = False
    error: BaseException | None = None

    def step(self, progress: Progress, metrics: dict[str, float], eta_s: float | None) -> None:
        self.losses.append(metrics["train_loss"])

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        self.checkpoints.append((snapshot.progress["step"], metrics))

    def save(self, snapshot: Snapshot) -> None:
        self.saved.append(snapshot)

    def finished(self, snapshot: Snapshot) -> None:
        self.done = True

    def failed(self, error: BaseException, step: int) -> None:
        self.error = error


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("llama"))


def hyper(n: int = len(SAMPLES), *, epochs: int = STEPS, batch: int = 0, **training: Any) -> Hyperparameters:
    lora = {"r": 3, "alpha": 6.0, "dropout": training.pop("dropout", 0.0)}
    training.setdefault("learning_rate", 1e-2)
    options = {
        "hyperparameters": {"n_epochs": epochs, "batch_size": batch or n},
        "lora": lora,
        "training": {"max_seq_tokens": 32, "max_grad_norm": 0.5, **training},
    }
    return resolve_hyperparameters(n, FinetuneOptions.model_validate(options))


def trainer(
    engine: Engine,
    adapter: Adapter,
    listener: Listener | None = None,
    samples: Sequence[Sample] = SAMPLES,
    wanted: Hyperparameters | None = None,
    **options: Any,
) -> Trainer:
    return Trainer(
        engine,
        adapter,
        samples,
        wanted or hyper(),
        SupervisedFinetuning(),
        listener or Listener(),
        seed=5,
        **options,
    )


def drive(engine: Engine, training: Trainer, source: random.Random | None = None, until: float = 1e9) -> None:
    """Run a trainer by hand with random sizes (or the largest), for at most `until` moves."""
    moves = 0
    while training.slots_needed() is not None and moves < until:
        moves += 1
        if training.slots_needed():
            training.begin_pass()
        left = training.forward_left() or training.piece_rows()
        rows = left if source is None else source.randint(1, left)
        if training.forward_left():
            builder = BatchBuilder(engine.device)
            training.add_rows(builder, rows)
            engine.decoder.forward(builder.build(), engine.kv)
            training.forward_done(rows)
        else:
            training.run_piece(rows)


@pytest.fixture(scope="module")
def undisturbed(rig: Rig) -> Tensor:
    """The adapter's parameters after 20 steps in the largest windows."""
    engine, adapter = rig.engine(), rig.adapter()
    drive(engine, trainer(engine, adapter))
    return adapter.flat


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_twenty_steps_equal_torch(rig: Rig, undisturbed: Tensor) -> None:
    model = rig.peft(rig.adapter())
    named = {our_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0)
    wanted = hyper()
    warmup = math.ceil(wanted.training.warmup_ratio * STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        reference_loss(model, SAMPLES).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * rate_factor("linear", step, STEPS, warmup)
        optimizer.step()
    expected = {name: p.detach().clone() for name, p in named.items()}
    model.unload()
    found = rig.adapter().copy(undisturbed).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # clip_grad_norm_ adds 1e-6 to the norm before it divides.
        assert float((found[name] - tensor).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("pack", [True, False])
def test_windows_of_any_size_give_the_same_adapter(rig: Rig, undisturbed: Tensor, pack: bool) -> None:
    engine, adapter = rig.engine(), rig.adapter()
    drive(engine, trainer(engine, adapter, wanted=hyper(pack=pack)), random.Random(1))
    assert difference(adapter.flat, undisturbed) <= 1e-8
    assert engine.pool.num_used == 0


def test_interruptions_leave_no_trace(rig: Rig, undisturbed: Tensor, tmp_path: Any) -> None:
    """Stopped after a random number of moves, written to disk, and gone on with by a new trainer."""
    engine, source = rig.engine(), random.Random(2)
    state, runs = None, 0
    adapter = rig.adapter()
    while True:
        adapter = rig.adapter()
        job = trainer(engine, adapter, wanted=hyper(pack=False), resume=state)
        if job.complete:
            break
        drive(engine, job, source, until=source.randint(1, 150))
        save_state(tmp_path, job.stop() if not job.complete else job.snapshot())
        state = latest_state(tmp_path)
        runs += 1
    assert runs >= 20
    assert difference(adapter.flat, undisturbed) <= 1e-8
    assert engine.pool.num_used == 0


def test_a_reclaimed_pass_starts_over(rig: Rig, undisturbed: Tensor) -> None:
    engine, adapter, source = rig.engine(), rig.adapter(), random.Random(3)
    job = trainer(engine, adapter)
    reclaimed = 0
    while job.slots_needed() is not None:
        drive(engine, job, source, until=source.randint(1, 60))
        reclaimed += job.reclaim()
    assert reclaimed >= 10
    assert difference(adapter.flat, undisturbed) <= 1e-8


def test_dropout_is_the_same_in_any_windows(rig: Rig) -> None:
    results = []
    for source in (None, random.Random(4)):
        engine, adapter = rig.engine(), rig.adapter()
        drive(engine, trainer(engine, adapter, wanted=hyper(dropout=0.3, epochs=5)), source)
        results.append(adapter.flat)
    without = rig.adapter()
    drive(rig.engine(), trainer(rig.engine(), without, wanted=hyper(epochs=5)))
    assert difference(results[1], results[0]) <= 1e-9
    assert difference(without.flat, results[0]) > 1e-3


def fast_latency() -> LatencyModel:
    """A model under which everything fits, to drive co-serving without a profile."""
    return LatencyModel.fit(
        [(Features(rows=n, context=n, head_rows=1, train_rows=n), 1e-3 * n) for n in (1, 2, 8, 48, 100)]
        + [(Features(bwd_quanta=1, bwd_rows=n, bwd_context=n * n), 1e-3 * n) for n in (1, 8, 64)]
        + [(Features(loss_quanta=1, loss_rows=n), 1e-3 * n) for n in (1, 8, 64)]
        + [(Features(optimizer=1), 1e-3)]
    )


def traffic(engine: Engine, source: random.Random, n: int) -> list[Request]:
    return [
        Request(
            f"r{i}-{source.random()}",
            [source.randrange(256) for _ in range(source.randint(1, 30))],
            SamplingParams(temperature=0.0, max_tokens=source.randint(1, 12), ignore_eos=True),
        )
        for i in range(n)
    ]


def serve(engine: Engine, requests: list[Request], source: random.Random) -> dict[str, list[int]]:
    """Run requests, joining at random steps, until they and all training are done; their tokens."""
    answers: dict[str, list[int]] = {r.request_id: [] for r in requests}
    waiting = list(requests)
    for _ in range(100_000):
        if waiting and source.random() < 0.3:
            engine.add(waiting.pop())
        for output in engine.step():
            for delta in output.deltas:
                answers[output.request_id] += delta.token_ids
        engine.pool.check()
        if not waiting and not engine.has_work:
            return answers
    raise AssertionError("it does not end")


@pytest.mark.parametrize("mode", ["coserve", "temporal", "dynamic_temporal", "spatial"])
def test_co_served_with_traffic(rig: Rig, undisturbed: Tensor, mode: str) -> None:
    """Neither the adapter nor the answers know of each other."""
    requests = traffic(rig.engine(), random.Random(8), 25)
    alone = serve(rig.engine(coserve__mode="off"), requests, random.Random(9))
    for request in requests:  # as new
        request.__post_init__()
        request.sequences, request.first_token_s, request.scheduled_s, request.forked = [], None, None, False
    engine, adapter, listener = (
        rig.engine(coserve__mode=mode, coserve__temporal_every=3),
        rig.adapter(),
        Listener(),
    )
    engine.coserver.latency = fast_latency()
    engine.coserver.add(trainer(engine, adapter, listener))
    assert serve(engine, requests, random.Random(9)) == alone
    assert listener.error is None and listener.done
    assert difference(adapter.flat, undisturbed) <= 1e-8
    mixed = [i for i in engine.coserver.iterations if i.inference_rows and (i.train_rows or i.piece_rows)]
    assert mixed, "training and inference never shared an iteration"


def test_training_yields_its_memory_first(rig: Rig, undisturbed: Tensor) -> None:
    """A pool that cannot hold both: requests are never preempted for training, and both end."""
    block_bytes = 4 * 3 * 2 * 2 * 16 * 8
    engine, adapter = rig.engine(cache__kv_bytes=64 * block_bytes, ft__mem_frac=0.9), rig.adapter()
    engine.coserver.latency = fast_latency()
    listener = Listener()
    engine.coserver.add(trainer(engine, adapter, listener))
    source = random.Random(11)
    requests = [
        Request(
            f"r{i}",
            [source.randrange(256) for _ in range(60)],
            SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        )
        for i in range(12)
    ]
    answers = serve(engine, requests, source)
    assert all(len(tokens) == 20 for tokens in answers.values())
    assert engine.coserver.num_restarts > 0
    assert listener.done and difference(adapter.flat, undisturbed) <= 1e-8


def test_a_pass_that_can_never_fit_fails_with_the_numbers(rig: Rig) -> None:
    block_bytes = 4 * 3 * 2 * 2 * 16 * 8
    engine, listener = rig.engine(cache__kv_bytes=20 * block_bytes, coserve__mode="temporal"), Listener()
    engine.coserver.add(trainer(engine, rig.adapter(), listener))
    engine.step()
    assert isinstance(listener.error, MemoryError) and "of 20" in str(listener.error)
    assert not engine.has_work


def test_a_loss_that_is_not_a_number_fails_the_job_alone(rig: Rig) -> None:
    engine, adapter, listener = (
        rig.engine(coserve__mode="temporal", coserve__temporal_every=2),
        rig.adapter(),
        Listener(),
    )
    job = trainer(engine, adapter, listener, wanted=hyper(epochs=3))
    engine.coserver.add(job)
    while job.progress.step < 1:
        engine.step()
    engine.coserver.settle()
    done = job.progress.step
    adapter.flat[3] = float("nan")
    requests = traffic(engine, random.Random(1), 3)
    answers = serve(engine, requests, random.Random(1))
    assert isinstance(listener.error, TrainingDiverged)
    assert f"step {done + 1}" in str(listener.error)
    assert all(answers.values()) and engine.pool.num_used == 0


def test_base_weights_are_never_written(rig: Rig) -> None:
    engine, adapter = rig.engine(), rig.adapter()

    def bits() -> list[bytes]:
        decoder = engine.decoder
        tensors = [decoder.embedding, decoder.norm, decoder.head]
        for layer in decoder.layers:
            tensors += [layer.input_norm, layer.post_norm]
            tensors += [linear.weight for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return [tensor.numpy().tobytes() for tensor in tensors]

    before = bits()
    drive(engine, trainer(engine, adapter, wanted=hyper(epochs=2)))
    assert bits() == before


def test_checkpoints_validation_and_early_stopping(rig: Rig) -> None:
    engine, listener = rig.engine(), Listener()
    valid = random_samples((9, 13, 6), 21)
    wanted = hyper(epochs=40, batch=2, learning_rate=0.3, early_stopping_patience=2, checkpoint_every_steps=2)
    job = trainer(engine, rig.adapter(), listener, wanted=wanted, valid=valid)
    drive(engine, job)
    steps = [step for step, _ in listener.checkpoints]
    losses = [metrics["full_valid_loss"] for _, metrics in listener.checkpoints]
    assert listener.done and job.progress.stopped_early
    assert steps == list(range(2, 2 * len(steps) + 1, 2)) and steps[-1] < job.total_steps
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) - 1 - best == 2


def test_validation_loss_equals_transformers(rig: Rig) -> None:
    engine, listener, adapter = rig.engine(), Listener(), rig.adapter()
    valid = random_samples((9, 13, 6), 21)
    wanted = hyper(epochs=1)
    drive(engine, trainer(engine, adapter, listener, wanted=wanted, valid=valid), random.Random(5))
    model = rig.peft(adapter)
    with torch.no_grad():
        expected = float(reference_loss(model, valid))
    model.unload()
    assert listener.checkpoints[-1][1]["full_valid_loss"] == pytest.approx(expected, abs=1e-9)


def test_every_epoch_sees_every_sample_once_in_its_own_order(rig: Rig) -> None:
    engine = rig.engine()
    job = trainer(engine, rig.adapter(), wanted=hyper(epochs=3, batch=2, pack=False))
    orders: list[list[int]] = []
    for _ in range(3):
        seen: list[int] = []
        while len(seen) < len(SAMPLES):
            seen += [window[0] for window in job._windows_of_step]
            job.progress.step += 1
            job._plan_step()
        orders.append(seen)
    assert all(sorted(order) == list(range(len(SAMPLES))) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_new_adapter_changes_nothing(rig: Rig) -> None:
    adapter = new_adapter(rig.engine(), hyper(), seed=3)
    assert all(not tensor.any() for name, tensor in adapter.tensors().items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in adapter.tensors().items() if "lora_A" in name)
    assert torch.equal(adapter.flat, new_adapter(rig.engine(), hyper(), seed=3).flat)


def test_out_of_blocks_at_the_start_of_a_pass_is_not_an_error(rig: Rig) -> None:
    engine = rig.engine(cache__kv_bytes=20 * 4 * 3 * 2 * 2 * 16 * 8)
    job = trainer(engine, rig.adapter())
    with pytest.raises(OutOfBlocks):
        job.begin_pass()
    assert engine.pool.num_used == 0 and not job.reclaim()
