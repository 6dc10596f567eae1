"""The service between requests and the trainer: what happens when something on either side fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_fakes import DATA, SPECIAL, FakeRunner, trainable, wait_until
from tiny_models import tiny_tokenizer
from tokenloom.errors import RequestError
from tokenloom.finetune.errors import IllegalTransitionError, NotFoundError, StorageFullError
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.service import JobService, TrainableModel
from tokenloom.finetune.store import Store
from tokenloom.text.tokenizer import Tokenizer


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def service(tmp_path: Path, runner: FakeRunner) -> Iterator[JobService]:
    store = Store(tmp_path)
    service = JobService(store, runner, trainable())
    service.start()
    yield service
    runner.go.set()
    service.stop()
    store.close()


def create(service: JobService, data: bytes = DATA, **options: Any) -> str:
    file = service.create_file([data], "train.jsonl")
    return service.create_job(parse_job({"model": "tiny", "training_file": file.id, **options})).id


def wait_for(service: JobService, job_id: str, *statuses: str) -> JobRecord:
    def look() -> JobRecord | None:
        job = service.store.jobs.get(job_id)
        return job if job.status in statuses else None

    job: JobRecord = wait_until(look)
    return job


def messages(service: JobService, job_id: str) -> list[str]:
    return [event.message for event in service.store.log.list_events(job_id, after=None, limit=100).data]


def test_stop_brings_running_jobs_back_to_the_queue_and_a_restart_finishes_them(tmp_path: Path) -> None:
    store, runner = Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable())
    service.start()
    runner.go.clear()
    job_id = create(service)
    wait_for(service, job_id, "running")
    service.stop()
    assert store.jobs.get(job_id).status == "queued"
    store.close()
    store, runner = Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable())
    service.start()
    assert wait_for(service, job_id, "succeeded").trained_tokens == 30
    service.stop()
    store.close()


def test_a_crash_brings_running_jobs_back_to_the_queue(tmp_path: Path) -> None:
    store, runner = Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable())
    job_id = create(service)
    store.jobs.move(job_id, "queued", "")
    store.jobs.move(job_id, "running", "")
    store.close()
    store = Store(tmp_path)
    service = JobService(store, runner, trainable())
    assert store.jobs.get(job_id).status == "queued"
    assert messages(service, job_id)[0].startswith("The server restarted")
    store.close()


def test_jobs_of_a_model_that_is_not_loaded_wait(tmp_path: Path) -> None:
    store = Store(tmp_path)
    service = JobService(store, FakeRunner(), {"other": trainable()["tiny"], **trainable()})
    waiting = create(service, model="other")
    store.close()
    store = Store(tmp_path)
    service = JobService(store, FakeRunner(), trainable())
    service.start()
    wait_for(service, create(service), "succeeded")
    assert store.jobs.get(waiting).status == "validating_files"
    service.stop()
    store.close()


def test_jobs_run_in_order_and_at_most_so_many_at_once(tmp_path: Path) -> None:
    store, runner = Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable(), max_concurrent=2)
    made = [create(service) for _ in range(5)]
    runner.go.clear()  # a run must not be over before the next one could have begun
    service.start()
    for job_id in made[:2]:
        wait_for(service, job_id, "running")
    runner.go.set()
    for job_id in made:
        wait_for(service, job_id, "succeeded")
    assert runner.started == made and runner.most_running == 2
    service.stop()
    store.close()


def test_a_job_resumed_before_its_run_has_stopped_does_not_run_twice(tmp_path: Path) -> None:
    store, runner = Store(tmp_path), FakeRunner()
    service = JobService(store, runner, trainable(), max_concurrent=2)
    service.start()
    runner.go.clear()
    job_id = create(service)
    wait_for(service, job_id, "running")
    runner.pause = lambda job_id: None  # type: ignore[method-assign]
    service.pause(job_id)
    service.resume(job_id)
    wait_for(service, create(service), "running")  # so the queue has been looked at since
    assert runner.started.count(job_id) == 1
    runner.go.set()
    wait_for(service, job_id, "succeeded")
    service.stop()
    store.close()


def test_a_runner_that_cannot_start_fails_the_job_alone(
    service: JobService, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: JobRecord, reporter: JobReporter) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(runner, "start", broken)
    job = wait_for(service, create(service), "failed")
    assert job.error is not None and job.error.code == "server_error" and "secret" not in job.error.message
    monkeypatch.undo()
    wait_for(service, create(service), "succeeded")


def test_a_runner_that_cannot_stop_does_not_break_the_request(
    service: JobService, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job_id: str) -> None:
        raise RuntimeError

    runner.go.clear()
    job_id = create(service)
    wait_for(service, job_id, "running")
    monkeypatch.setattr(runner, "cancel", broken)
    assert service.cancel(job_id).status == "cancelled"
    runner.go.set()


def test_a_run_that_ends_after_its_cancellation_changes_nothing(
    service: JobService, runner: FakeRunner
) -> None:
    runner.go.clear()
    job_id = create(service)
    job = wait_for(service, job_id, "running")
    runner.cancel = lambda job_id: None  # type: ignore[method-assign]
    service.cancel(job_id)
    runner.go.set()
    wait_until(lambda: not runner.running)
    JobReporter(service.store, job, lambda: None).failed("late", "too late")
    job = service.store.jobs.get(job_id)
    assert (job.status, job.fine_tuned_model, job.error, job.result_files) == ("cancelled", None, None, [])


def test_a_run_that_succeeds_although_it_was_paused_has_succeeded(
    service: JobService, runner: FakeRunner
) -> None:
    runner.go.clear()
    job_id = create(service)
    wait_for(service, job_id, "running")
    runner.pause = lambda job_id: None  # type: ignore[method-assign]
    service.pause(job_id)
    runner.go.set()
    assert wait_for(service, job_id, "succeeded").fine_tuned_model


def test_a_failed_run_tells_why_and_keeps_its_checkpoints(service: JobService, runner: FakeRunner) -> None:
    def diverge(job: JobRecord, reporter: JobReporter) -> None:
        (job.checkpoint_dir / "1").mkdir()
        reporter.checkpoint(1, job.checkpoint_dir / "1", {})
        reporter.failed("nan_loss", "the loss became NaN at step 2; step 1 is kept")

    runner.start = diverge  # type: ignore[method-assign]
    job = wait_for(service, create(service), "failed")
    assert job.error is not None and job.error.code == "nan_loss"
    assert [model.step for model in service.models()] == [1]


def test_a_reported_step_is_there_once_however_often_it_is_done(
    service: JobService, runner: FakeRunner
) -> None:
    runner.go.clear()
    job = wait_for(service, create(service), "running")
    reporter = JobReporter(service.store, job, lambda: None)
    # The job says that it runs a moment before its folder is made.
    (job.checkpoint_dir / "1").mkdir(parents=True)
    names = set()
    for loss in (3.0, 2.0):
        reporter.step(1, {"train_loss": loss}, 10, None)
        names.add(reporter.checkpoint(1, job.checkpoint_dir / "1", {"train_loss": loss}))
    assert names == {f"{job.name}:ckpt-step-1"}
    assert service.store.log.metrics(job.id) == [{"step": 1, "train_loss": 2.0, "trained_tokens": 10}]
    checkpoints = service.store.log.list_checkpoints(job.id, after=None, limit=10).data
    assert [checkpoint.metrics for checkpoint in checkpoints] == [{"step": 1, "train_loss": 2.0}]


def test_progress_is_estimated_only_while_it_runs(service: JobService, runner: FakeRunner) -> None:
    runner.go.clear()
    job = wait_for(service, create(service), "running")
    JobReporter(service.store, job, lambda: None).step(1, {"train_loss": 1.0}, 10, 60.0)
    estimate = service.store.jobs.get(job.id).estimated_finish
    assert estimate is not None and abs(estimate - job.created_at - 60) < 10
    assert service.pause(job.id).estimated_finish is None


def test_examples_are_cut_to_what_the_model_can_take(tmp_path: Path) -> None:
    short = {"tiny": TrainableModel(trainable()["tiny"].tokenizer, 16)}
    store = Store(tmp_path)
    service = JobService(store, FakeRunner(), short)
    service.start()
    job = wait_for(
        service, create(service, b'{"prompt": "aa", "completion": "%s"}' % (b"b" * 99)), "succeeded"
    )
    assert job.hyperparameters is not None and job.hyperparameters.training.max_seq_tokens == 16
    assert any("1 of 1 examples are too long" in message for message in messages(service, job.id))
    service.stop()
    store.close()


def test_a_cancelled_validation_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenloom.finetune.service.LOOK_ROUND_S", 0.0)
    reached, go_on = threading.Event(), threading.Event()
    read: list[str] = []

    class Slow(Tokenizer):
        def render_chat(self, *arguments: Any, **options: Any) -> str:
            read.append("")
            reached.set()
            go_on.wait(10)
            return "text"

    slow = TrainableModel(Slow(tiny_tokenizer(), SPECIAL, {}, "tiny"), 512)
    store = Store(tmp_path)
    service = JobService(store, FakeRunner(), {"tiny": slow})
    service.start()
    job_id = create(service, DATA * 100)
    assert reached.wait(10)
    service.cancel(job_id)
    go_on.set()
    service.stop()
    assert not service._thread.is_alive()
    assert store.jobs.get(job_id).status == "cancelled" and len(read) < 20
    store.close()


def test_a_lost_file_fails_the_job_and_the_queue_goes_on(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = service.create_file([DATA], "train.jsonl")
    file.path.unlink()
    job = service.create_job(parse_job({"model": "tiny", "training_file": file.id}))
    failed = wait_for(service, job.id, "failed")
    assert failed.error is not None and str(file.path) not in failed.error.message
    wait_for(service, create(service), "succeeded")


def test_results_find_room_although_the_quota_is_used_up(tmp_path: Path) -> None:
    store = Store(tmp_path, quota_bytes=len(DATA))
    service = JobService(store, FakeRunner(), trainable())
    service.start()
    job = wait_for(service, create(service), "succeeded")
    assert len(job.result_files) == 1
    with pytest.raises(StorageFullError):
        service.create_file([DATA], "train.jsonl")
    service.stop()
    store.close()


def test_models_can_be_deleted_but_not_what_a_job_still_needs(
    service: JobService, runner: FakeRunner
) -> None:
    runner.go.clear()
    job = wait_for(service, create(service), "running")
    (job.checkpoint_dir / "1").mkdir(parents=True)  # the run itself may be about to make its folder
    name = JobReporter(service.store, job, lambda: None).checkpoint(1, job.checkpoint_dir / "1", {})
    with pytest.raises(RequestError, match="which is running"):
        service.delete_model(name)
    service.cancel(job.id)
    service.delete_model(name)
    assert not (job.checkpoint_dir / "1").exists()
    with pytest.raises(NotFoundError):
        service.delete_model(name)


def test_an_adapter_outside_its_job_is_never_removed(service: JobService, tmp_path: Path) -> None:
    job = wait_for(service, create(service), "succeeded")
    outside = tmp_path / "precious"
    outside.mkdir()
    link = job.directory / "link"
    link.symlink_to(outside)
    for path in (outside, job.directory / ".." / ".." / "precious", link):
        service.store.log.add_checkpoint(job.id, 9, path, {})
        service.delete_model(f"{job.name}:ckpt-step-9")
        assert outside.is_dir()


def test_two_places_of_a_request_must_agree_before_a_job_is_made(service: JobService) -> None:
    with pytest.raises(RequestError, match=r"training\.pack"):
        create(service, training={"pack": True}, hyperparameters={"pack": False})
    assert not service.store.jobs.list_jobs().data


def test_pausing_what_is_not_running_names_both_states(service: JobService, runner: FakeRunner) -> None:
    job = wait_for(service, create(service), "succeeded")
    with pytest.raises(IllegalTransitionError, match="is succeeded and cannot become paused"):
        service.pause(job.id)


def test_a_clock_that_jumps_neither_stops_jobs_nor_changes_their_order(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, jumps = time.time(), itertools.cycle((0, -1e8, 1e8, -1e6))
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    ids = [create(service) for _ in range(3)]
    for job_id in ids:
        wait_for(service, job_id, "succeeded")
        told = messages(service, job_id)
        assert told[0] == "The job has successfully completed"
        steps = [text for text in told if text.startswith("Step ")]
        assert [text.split(":")[0] for text in steps] == ["Step 3", "Step 2", "Step 1"]
    assert [job.id for job in service.store.jobs.list_jobs().data] == ids[::-1]
