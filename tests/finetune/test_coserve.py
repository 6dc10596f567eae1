"""How much of an iteration training gets: what the latency model says fits, and never nothing for good."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_trainer import Listener, hyper, traffic, trainer

from tokenloom.engine.coserve import DOUBT_AFTER
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.finetune.trainer import Trainer
from tokenloom.methods.drafting import draft_method
from training_rig import Rig, random_samples

ROW_MS, TPOT_MS, IDLE_MS = 10.0, 1000.0, 300.0
LONG = random_samples((60, 55, 58), 1)


class Predicted(LatencyModel):
    """Every row, of a batch or a piece, takes 10 ms; nothing that is measured changes that."""

    def __init__(self, row_ms: float = ROW_MS) -> None:
        samples = [(Features(rows=1), 1.0)]
        super().__init__(LatencyModel.fit(samples).beta, [1.0], {})
        self.row_ms = row_ms
        self.asked: list[Features] = []

    def predict(self, features: Features) -> float:
        return self.row_ms * (features.rows + features.bwd_rows + features.loss_rows + features.optimizer)

    corrected = planned = predict

    def observe(self, features: Features, measured_ms: float) -> None:
        self.asked.append(features)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("llama"))


def training_engine(rig: Rig, row_ms: float = ROW_MS, **flags: Any) -> tuple[Engine, Trainer, Predicted]:
    defaults = {"slo__tpot_ms": TPOT_MS, "slo__ttft_ms": 1e6, "ft__idle_iter_ms": IDLE_MS, "ft__min_rows": 4}
    engine = rig.engine(**{**defaults, **flags})
    model = engine.coserver.latency = Predicted(row_ms)
    job = trainer(engine, rig.adapter(), samples=LONG, wanted=hyper(3, epochs=50, max_seq_tokens=64))
    engine.coserver.add(job)
    return engine, job, model


def endless(name: str) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    return Request(name, [1, 2, 3], params)


def test_iterations_stay_within_the_budget(rig: Rig) -> None:
    """Each decode's budget is its target less the margin, and at most half a token's time more."""
    engine, _, model = training_engine(rig)
    for i in range(6):
        engine.add(endless(f"r{i}"))
    for _ in range(80):
        engine.step()
    limit = TPOT_MS * 0.9 * 1.5
    mixed = [i for i in engine.coserver.iterations if i.inference_rows]
    assert any(i.train_rows for i in mixed) and any(i.piece_rows for i in mixed)
    used = [model.predict(features) for features in model.asked]
    assert max(used) <= limit
    assert max(used) > 0.4 * limit, "most of the budget was left unused"


def test_windows_are_as_large_as_targets_allow_however_few_rows_requests_may_have(rig: Rig) -> None:
    engine, _, _ = training_engine(rig, scheduler__max_batch_tokens=8)
    engine.add(endless("r"))
    for _ in range(30):
        engine.step()
    mixed = [i.train_rows for i in engine.coserver.iterations if i.inference_rows]
    assert max(mixed) > 40


def test_a_burst_is_answered_within_one_iteration(rig: Rig) -> None:
    """With 85 decodes nothing fits any more; when they are gone, training is back at once."""
    engine, _, _ = training_engine(rig, scheduler__max_running=128, cache__kv_bytes=64 * 2**20)

    def given(steps: int) -> list[int]:
        before = len(engine.coserver.iterations)
        for _ in range(steps):
            engine.step()
        return [i.train_rows + i.piece_rows for i in list(engine.coserver.iterations)[before:]]

    engine.add(endless("first"))
    assert sum(given(10)) > 0
    burst = [Request(f"b{i}", [1, 2], SamplingParams(max_tokens=100, ignore_eos=True)) for i in range(140)]
    for request in burst:
        engine.add(request)
    engine.coserver.settings.slo.ttft_ms = 1.0  # everybody is late already
    assert sum(given(6)) == 0
    engine.coserver.settings.slo.ttft_ms = 1e6
    for request in burst:
        engine.abort(request.request_id)
    assert given(1)[0] > 0


def test_an_arrival_ends_an_idle_iteration(rig: Rig) -> None:
    engine, job, model = training_engine(rig, ft__idle_iter_ms=1e6)
    while job.forward_left() or job.slots_needed():
        engine.step()
    engine.coserver.arrivals = lambda: True
    model.asked.clear()
    engine.step()
    assert len(model.asked) == 1


def test_idle_iterations_are_no_longer_than_said(rig: Rig) -> None:
    engine, job, model = training_engine(rig)
    while job.progress.step < 3:
        engine.step()
    used = [model.predict(features) for features in model.asked]
    assert 0.5 * IDLE_MS < max(used) <= IDLE_MS


def test_estimates_that_are_far_too_high_do_not_stop_training_for_good(rig: Rig) -> None:
    engine, job, _ = training_engine(rig, row_ms=1e5)
    for _ in range(3000):
        engine.step()
        if job.progress.step:
            return
    raise AssertionError("an idle engine does not train")


def test_a_doubtful_estimate_is_tried_beside_requests(rig: Rig) -> None:
    """One row does not fit by the model, although the budget is not used up."""
    engine, _, _ = training_engine(rig, row_ms=600.0)
    engine.add(endless("r"))
    for _ in range(DOUBT_AFTER + 3):
        engine.step()
    given = [i.train_rows + i.piece_rows for i in engine.coserver.iterations if i.inference_rows]
    assert 1 <= sum(n > 0 for n in given) <= 2


def test_late_requests_get_the_machine_for_themselves(rig: Rig) -> None:
    engine, _, _ = training_engine(rig, slo__tpot_ms=1e-3)
    engine.add(endless("r"))
    engine.step()  # its first token is not late yet
    before = len(engine.coserver.iterations)
    for _ in range(50):
        engine.step()
    after = list(engine.coserver.iterations)[before:]
    assert len(after) == 50 and not any(i.train_rows or i.piece_rows for i in after)


def test_min_progress_trains_whatever_the_targets(rig: Rig) -> None:
    engine, _, _ = training_engine(rig, slo__tpot_ms=1e-3, ft__min_progress=5)
    engine.add(endless("r"))
    for _ in range(52):
        engine.step()
    given = [bool(i.train_rows or i.piece_rows) for i in engine.coserver.iterations if i.inference_rows]
    assert 8 <= sum(given) <= 11


def test_jobs_take_turns(rig: Rig) -> None:
    engine, first, _ = training_engine(rig)
    second = trainer(
        engine, rig.adapter(), Listener(), samples=LONG, wanted=hyper(3, epochs=50, max_seq_tokens=64)
    )
    engine.coserver.add(second)
    while first.progress.step < 4:
        engine.step()
    assert abs(first.progress.step - second.progress.step) <= 1


def test_a_profile_that_fails_ends_the_jobs_and_no_request(rig: Rig) -> None:
    class Broken:
        def run_cell(self) -> LatencyModel | None:
            raise RuntimeError("no time")

    engine, _, _ = training_engine(rig)
    engine.coserver.latency, engine.coserver.profiler = None, Broken()
    engine.step()
    assert not engine.has_work
    engine.add(traffic(engine, random.Random(0), 1)[0])
    while engine.has_work:
        engine.step()
    assert engine.stats().generation_tokens > 0


def test_off_means_off(rig: Rig) -> None:
    engine, job, _ = training_engine(rig, coserve__mode="off")
    assert not engine.has_work
    for request in traffic(engine, random.Random(0), 3):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert job.slots_needed() and job.rows_run == 0


def test_drafted_rows_count_in_the_budget_and_training_changes_no_drafted_answer(rig: Rig) -> None:
    alone, beside = [], []
    engine = rig.engine()
    engine.add(endless("r"))
    while engine.has_work:
        alone += [token for output in engine.step() for d in output.deltas for token in d.token_ids]
    engine, _, model = training_engine(rig, drafting__persist=False)
    request = endless("r")
    request.draft = draft_method("token_recycling(tree=n16)")
    engine.add(request)
    while not request.finished:
        beside += [token for output in engine.step() for d in output.deltas for token in d.token_ids]
    assert beside == alone
    assert request.drafts.accepted > 0
    mixed = [i for i in engine.coserver.iterations if i.inference_rows > 1 and (i.train_rows or i.piece_rows)]
    assert mixed, "nothing was trained beside drafts"
    assert max(model.predict(features) for features in model.asked) <= TPOT_MS * 0.9 * 1.5
