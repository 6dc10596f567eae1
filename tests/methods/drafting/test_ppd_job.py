"""Prompt tokens trained in pieces, whatever their size, are what they would be in one go."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from draft_rig import build_engine, request, text_of, tiny_files
from ppd_rig import random_vectors
from tokenloom.batch import BatchBuilder
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import JobOptions, resolve_hyperparameters
from tokenloom.finetune.progress import Snapshot
from tokenloom.methods.drafting.ppd_job import PromptTrainer, measured
from tokenloom.methods.drafting.ppd_pass import PromptPass, cuts_of
from tokenloom.methods.drafting.ppd_student import Student, distances, read
from tokenloom.methods.drafting.ppd_text import Sample as Answer
from tokenloom.methods.drafting.ppd_training import accuracy
from tokenloom.models.loader import ModelFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


TEXTS = [(text_of(1, 23), [6, 9, 15, 17]), (text_of(2, 14), [5, 8])]


def run_pass(engine: Engine, part: PromptPass, seed: int) -> None:
    draw = random.Random(seed)
    while part.forward_left():
        rows = draw.randint(1, part.forward_left())
        builder = BatchBuilder(engine.device)
        part.add_rows(builder, rows)
        engine.decoder.forward(builder.build(), engine.kv)
        part.forward_done(rows)
    while not part.done:
        part.run_piece(draw.randint(1, part.piece_rows()))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_do_not_depend_on_the_pieces(files: ModelFiles, seed: int) -> None:
    engine, vectors = build_engine(files), random_vectors(64).double()
    student, grads = Student(engine, torch.float64), torch.zeros(3, 64, dtype=torch.float64)
    part = PromptPass(engine, student, vectors, TEXTS, 0.8, grads=grads, scale=0.5)
    run_pass(engine, part, seed)
    part.release()
    engine.pool.check()
    assert engine.pool.num_used == 0

    wanted = vectors.clone().requires_grad_()
    weights = 0.8 ** torch.arange(3, dtype=torch.float64)
    means = [
        (distances(engine, student, wanted, cuts, read(engine, text, torch.float64))[0] * weights).mean()
        for text, cuts in TEXTS
    ]
    (sum(means) * 0.5).backward()
    torch.testing.assert_close(grads, wanted.grad, rtol=0, atol=1e-10)
    assert part.sums()["loss"] == pytest.approx(float((means[0] * 4 + means[1] * 2).detach()))
    assert part.sums()["weight"] == 6


def test_a_pass_gives_its_blocks_back_where_the_pool_is_too_small(files: ModelFiles) -> None:
    engine = build_engine(files)
    long = [(text_of(3, 200), [150])] * 40
    with pytest.raises(OutOfBlocks):
        PromptPass(engine, Student(engine, torch.float64), random_vectors(64), long, 0.8, grads=None, scale=1)
    assert engine.pool.num_used == 0


def test_cuts_are_where_all_that_is_guessed_counts() -> None:
    assert cuts_of([0, 0, 1, 1, 1, 1, 1], 3) == [2, 3]
    assert cuts_of([0, 0, 1, 1, 0, 1, 1, 1, 1], 3) == [5]
    assert cuts_of([0, 1, 1], 3) == []


# -- the trainer -------------------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.end: Snapshot | None = None

    def step(self, progress: Any, metrics: dict[str, float], eta_s: float | None) -> None:
        self.losses.append(metrics["train_loss"])

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        assert metrics["full_valid_loss"] > 0

    def save(self, snapshot: Snapshot) -> None: ...

    def finished(self, snapshot: Snapshot) -> None:
        self.end = snapshot

    def failed(self, error: BaseException, step: int) -> None:
        raise error


def samples(count: int, first: int = 0) -> list[Sample]:
    lengths = [18 + 3 * i for i in range(count)]
    return [Sample(text_of(first + i, n), [0.0] * 6 + [1.0] * (n - 6)) for i, n in enumerate(lengths)]


def trainer(engine: Engine, listener: Listener, resume: Snapshot | None = None, **knobs: Any) -> Any:
    requested = JobOptions.model_validate(
        {"hyperparameters": {"n_epochs": 2}, "training": {"learning_rate": 0.1}, "ppd": {"cuts": 2, **knobs}}
    )
    hyper = resolve_hyperparameters(5, requested)
    vectors = random_vectors(64)
    return PromptTrainer(
        engine, vectors, samples(5), hyper, listener, seed=3, valid=samples(2, 50), resume=resume
    )


def train(engine: Engine, job: Any, passes: int = 10**6) -> None:
    engine.coserver.mode = "ft_only"
    engine.coserver.add(job)
    while not job.complete and passes:
        before = job.progress.passes_done
        engine.step()
        passes -= job.progress.passes_done != before
    engine.coserver.remove(job)


def test_a_job_that_was_interrupted_comes_to_the_same_vectors(files: ModelFiles) -> None:
    engine, whole, first, rest = build_engine(files), Listener(), Listener(), Listener()
    train(engine, trainer(engine, whole))
    stopped = trainer(engine, first)
    train(engine, stopped, passes=3)
    train(engine, trainer(engine, rest, stopped.stop()))
    assert whole.end is not None and rest.end is not None and not first.end
    assert first.losses + rest.losses == whole.losses
    assert torch.equal(rest.end.flat, whole.end.flat)
    assert engine.pool.num_used == 0


def test_accuracy_is_measured_on_what_was_held_out(files: ModelFiles) -> None:
    engine, listener = build_engine(files), Listener()
    job = trainer(engine, listener, cuts=100)
    train(engine, job)
    assert listener.end is not None
    texts = [Answer(sample.tokens, 6) for sample in samples(2, 50)]
    wanted = accuracy(engine, job.student, listener.end.flat.view(3, -1), texts)
    assert torch.equal(measured(listener.end.progress, 3), wanted)


def test_pieces_are_priced_by_whole_cuts(files: ModelFiles) -> None:
    engine = build_engine(files)
    part = PromptPass(
        engine, Student(engine, torch.float64), random_vectors(64).double(), TEXTS, 0.8, grads=None, scale=1
    )
    assert part.piece_rows() == 12
    assert part.piece_features(1) == part.piece_features(5) != part.piece_features(6)
    assert part.piece_features(12).bwd_rows == 12 * engine.config.num_layers
    part.release()


class Foretold(LatencyModel):
    """Every row of a batch or a piece takes 10 ms, in each layer that goes backward too."""

    def __init__(self) -> None:
        super().__init__(LatencyModel.fit([(Features(rows=1), 1.0)]).beta, [1.0], {})
        self.asked: list[Features] = []

    def predict(self, features: Features) -> float:
        return 10.0 * (features.rows + features.bwd_rows + features.loss_rows + features.optimizer)

    corrected = planned = predict

    def observe(self, features: Features, measured_ms: float) -> None:
        self.asked.append(features)


def test_pieces_stay_within_what_a_decode_may_wait(files: ModelFiles) -> None:
    """A token's target less the margin, and at most half a token's time more."""
    engine = build_engine(files, slo__tpot_ms=1000.0, slo__ttft_ms=1e6, ft__min_rows=3)
    model = engine.coserver.latency = Foretold()
    job = trainer(engine, Listener(), cuts=100)
    engine.coserver.add(job)
    engine.add(request([1, 2, 3], max_tokens=200, logprobs=None))
    for _ in range(60):
        engine.step()
    limit = 1000.0 * 0.9 * 1.5
    pieces = [model.predict(features) for features in model.asked if features.bwd_rows]
    assert 0.4 * limit < max(pieces) <= limit
    assert job.progress.step > 0 and any(features.train_rows for features in model.asked)
    engine.abort("r")
    engine.coserver.remove(job)
    assert engine.pool.num_used == 0
