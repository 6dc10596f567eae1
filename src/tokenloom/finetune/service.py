"""Finetuning jobs from request to result: checks their files, hands them to a runner one after another."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokenloom.errors import RequestError
from tokenloom.finetune.chat_spans import ChatTokenizer
from tokenloom.finetune.data import validate
from tokenloom.finetune.errors import IllegalTransitionError, NotFoundError
from tokenloom.finetune.hyperparameters import resolve_hyperparameters
from tokenloom.finetune.job_request import CreateJob
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.finetune.records import TERMINAL, FileRecord, JobError, JobRecord, TunedModel
from tokenloom.finetune.reporter import JobReporter, remove_adapter
from tokenloom.finetune.store import Store

logger = logging.getLogger("tokenloom.finetune")

LOOK_ROUND_S = 0.5
RETRY_S = 2.0


class JobRunner(Protocol):
    """Trains jobs. Methods return at once; what comes of them is told through the reporter."""

    def start(self, job: JobRecord, reporter: JobReporter) -> None:
        """Begin a job, or go on with it from the newest checkpoint in `job.checkpoint_dir`."""

    def pause(self, job_id: str) -> None:
        """Stop at the next quantum, leave a checkpoint, and answer `reporter.paused()`."""

    def cancel(self, job_id: str) -> None:
        """Stop at the next quantum and answer `reporter.cancelled()`."""


@dataclass(frozen=True)
class TrainableModel:
    """A base model that jobs may name; examples are cut to `max_model_len` tokens."""

    tokenizer: ChatTokenizer
    max_model_len: int


class JobService:
    """One thread that validates new jobs and starts queued ones, first come first served.

    `pause`, `resume` and `cancel` change a job's state at once. A run that was asked to stop still counts
    until it has answered, so that a job never runs twice at the same time.

    Args:
        report: makes the reporter of each run, as `JobReporter` is made.
    """

    def __init__(
        self,
        store: Store,
        runner: JobRunner,
        models: Mapping[str, TrainableModel],
        *,
        max_concurrent: int = 1,
        report: Callable[[Store, JobRecord, Callable[[], None]], JobReporter] = JobReporter,
    ) -> None:
        self.store = store
        self.files = store.files
        self._runner = runner
        self._models = models
        self._max_concurrent = max_concurrent
        self._report = report
        self._active: set[str] = set()
        self._changed = threading.Condition(threading.RLock())
        self._stopping = False
        self._work_to_do = True
        self._thread = threading.Thread(target=self._loop, name="finetune-jobs", daemon=True)

    def start(self) -> None:
        """Take up the jobs that wait, then new ones."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ask running jobs to stop with a checkpoint, and wait for it; they go on at the next start."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            for job_id in sorted(self._active):
                self._ask(self._runner.pause, job_id)
            self._changed.wait_for(lambda: not self._active, timeout_s)
        self._thread.join(max(0.1, deadline - time.monotonic()))

    def create_file(
        self, chunks: Iterable[bytes], filename: str, purpose: str = "fine-tune", **options: Any
    ) -> FileRecord:
        """Store a file; `options` are those of `FileStore.add`, whose errors it raises."""
        with self.files.begin() as blob:
            for chunk in chunks:
                blob.write(chunk)
            return self.files.add(blob, filename, purpose, **options)

    def create_job(
        self, request: CreateJob, idempotency_key: str | None = None, who: Principal = OPERATOR
    ) -> JobRecord:
        """Take a new job of `who`. The same key with the same request returns the job that was created first.

        Raises RequestError naming the field at fault.
        """
        if request.model not in self._models:
            raise RequestError(
                f"model: {request.model!r} cannot be finetuned here; {', '.join(self._models)} can",
                param="model",
                code="model_not_found",
            )
        wanted = resolve_hyperparameters(1, request.options()).training
        if wanted.early_stopping_patience is not None and request.validation_file is None:
            raise RequestError(
                "early_stopping_patience: needs a validation_file", param="early_stopping_patience"
            )
        job = self.store.jobs.create(request, idempotency_key, who)
        self._wake()
        return job

    def pause(self, job_id: str) -> JobRecord:
        """Raises NotFoundError, or IllegalTransitionError unless the job is queued or running."""
        with self._changed:
            job = self.store.jobs.move(job_id, "paused", "The job was paused")
            if job_id in self._active:
                self._ask(self._runner.pause, job_id)
        return job

    def resume(self, job_id: str) -> JobRecord:
        """Raises NotFoundError, or IllegalTransitionError unless the job is paused."""
        with self._changed:
            message = "The job was resumed and is queued"
            job = self.store.jobs.move(job_id, "queued", message, source="paused")
        self._wake()
        return job

    def cancel(self, job_id: str) -> JobRecord:
        """Raises NotFoundError, or IllegalTransitionError if the job is over."""
        with self._changed:
            job = self.store.jobs.move(job_id, "cancelled", "The job was cancelled")
            if job_id in self._active:
                self._ask(self._runner.cancel, job_id)
        self._wake()
        return job

    def models(self) -> list[TunedModel]:
        """Everything that can be served: adapters of finished jobs, and checkpoints."""
        return [model for model in self.store.log.models() if model.adapter_path.is_dir()]

    def delete_model(self, name: str, who: Principal = OPERATOR) -> TunedModel:
        """Delete a tuned model or a checkpoint with its adapter; whoever serves it unloads it first.

        Raises NotFoundError, also where `who` may not see its job, or RequestError for a checkpoint that its
        job may still need.
        """
        model = next((model for model in self.models() if model.name == name), None)
        if model is None:
            raise NotFoundError("fine-tuned model", name, "model")
        job = self.store.jobs.get(model.job_id, who)
        if model.step is None:
            self.store.log.forget_adapter(job.id)
        elif job.status in TERMINAL:
            self.store.log.delete_checkpoint(name)
        else:
            raise RequestError(
                f"model: {name} belongs to job {job.id}, which is {job.status}",
                param="model",
                code="model_in_use",
            )
        remove_adapter(model.adapter_path, job.directory)
        return model

    def _wake(self) -> None:
        with self._changed:
            self._work_to_do = True
            self._changed.notify_all()

    def _ended(self, job_id: str) -> None:
        with self._changed:
            self._active.discard(job_id)
        self._wake()

    def _ask(self, ask: Any, job_id: str) -> None:
        try:
            ask(job_id)
        except Exception:  # the state is changed and on disk; the request must not fail after that
            logger.exception("the runner failed on a request to stop job %s", job_id)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work_to_do or self._stopping)
                self._work_to_do = False
                if self._stopping:
                    return
            try:
                while self._start_next() or self._validate_next():
                    continue
            except Exception:  # the disk may be full, the database away
                logger.exception("the job queue has to wait")
                with self._changed:
                    self._work_to_do = True
                    self._changed.wait_for(lambda: self._stopping, RETRY_S)

    def _start_next(self) -> bool:
        """Start the oldest queued job if there is one, and a place for it."""
        with self._changed:
            if self._stopping or len(self._active) >= self._max_concurrent:
                return False
            waiting = self.store.jobs.oldest("queued", self._models, excluding=self._active)
            if waiting is None:
                return False
            job = self.store.jobs.move(waiting.id, "running", "The job has started")
            reporter = self._report(self.store, job, lambda: self._ended(job.id))
            self._active.add(job.id)
            try:
                job.checkpoint_dir.mkdir(parents=True, exist_ok=True)
                self._runner.start(job, reporter)
            except Exception:
                logger.exception("job %s could not be started", job.id)
                reporter.failed("server_error", "the trainer could not start; the server's log tells why")
            return True

    def _validate_next(self) -> bool:
        """Check the files of the oldest new job, if there is one."""
        job = self.store.jobs.oldest("validating_files", self._models)
        if job is None or self._stopping:
            return False
        try:
            # Nobody wants the outcome if the job was cancelled meanwhile.
            with contextlib.suppress(_NoLonger, IllegalTransitionError):
                self._validate(job)
        except OSError:
            logger.exception("the files of job %s cannot be read", job.id)
            error = JobError("server_error", "a file of the job cannot be read on the server", None)
            self.store.jobs.fail(job.id, error)
        return True

    def _validate(self, job: JobRecord) -> None:
        model = self._models[job.model]
        last_look = time.monotonic()

        def look_round(_: int) -> None:
            nonlocal last_look
            if time.monotonic() - last_look > LOOK_ROUND_S:
                self._start_next()
                if self._stopping or self.store.jobs.get(job.id).status != "validating_files":
                    raise _NoLonger
                last_look = time.monotonic()

        wanted = resolve_hyperparameters(1, job.requested).training.max_seq_tokens
        max_tokens = min(wanted, model.max_model_len)
        self.store.log.add_event(job.id, f"Validating training file {job.training_file}")
        warnings, samples = [], 0
        paths = {"training_file": job.training_path, "validation_file": job.validation_path}
        for param, path in paths.items():
            if path is None:
                continue
            report = validate(path, model.tokenizer, max_tokens, look_round)
            if not report.ok:
                error = JobError("invalid_training_file", f"{param}: {report.summary()}", param)
                self.store.jobs.fail(job.id, error)
                return
            warnings += [f"{param}: {warning}" for warning in report.warnings]
            samples = samples or report.samples
        resolved = resolve_hyperparameters(samples, job.requested)
        training = resolved.training.model_copy(update={"max_seq_tokens": max_tokens})
        resolved = resolved.model_copy(update={"training": training})
        self.store.jobs.resolve(job.id, resolved, warnings)


class _NoLonger(Exception):
    """The validation at hand is not wanted any more."""
