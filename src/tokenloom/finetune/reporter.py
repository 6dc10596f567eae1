"""How a trainer tells what becomes of a job. What it has told is on disk when the call returns."""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tokenloom.finetune.errors import IllegalTransitionError
from tokenloom.finetune.records import METRICS, JobError, JobRecord, Level
from tokenloom.finetune.store import Store


class JobReporter:
    """The trainer's end of one run of a job. Methods may be called from any thread.

    A run ends with exactly one of `paused`, `cancelled`, `failed` and `succeeded`; until then no other run of
    the job begins. Every method raises StorageFullError if nothing could be recorded; it may be called again.
    """

    def __init__(self, store: Store, job: JobRecord, ended: Callable[[], None]) -> None:
        self._store = store
        self._job = job
        self._ended = ended

    def step(
        self, step: int, metrics: dict[str, float], trained_tokens: int, estimated_finish_s: float | None
    ) -> None:
        """An optimizer step is done.

        Args:
            step: counted from 1. A step done again after a restart replaces what was reported of it.
            metrics: `train_loss`, `train_mean_token_accuracy`, `valid_loss`, ... and any others.
            trained_tokens: of the whole job so far.
            estimated_finish_s: seconds from now to the end of the job, if known.
        """
        shown = [("training loss", metrics.get("train_loss")), ("validation loss", metrics.get("valid_loss"))]
        losses = ", ".join(f"{name}={value:.4f}" for name, value in shown if value is not None)
        finish = None if estimated_finish_s is None else int(time.time() + estimated_finish_s)
        data = {"step": step, **metrics, "trained_tokens": trained_tokens}
        message = f"Step {step}: {losses}"
        self._store.log.add_metrics(self._job.id, step, message, data, trained_tokens, finish)

    def checkpoint(self, step: int, path: Path | str, metrics: dict[str, float]) -> str:
        """A checkpoint is complete on disk; returns the name it can be served by.

        Checkpoints beyond the job's `save_total_limit` are deleted, the oldest first. Reporting a step again
        changes nothing but its path and metrics.

        Args:
            path: an adapter folder of its own below `job.directory`.
        """
        log = self._store.log
        name = log.add_checkpoint(self._job.id, step, Path(path), {"step": step, **metrics})
        if self._job.hyperparameters is not None:
            keep = self._job.hyperparameters.training.save_total_limit
            known = log.list_checkpoints(self._job.id, after=None, limit=10_000).data
            for old in sorted(known, key=lambda checkpoint: -checkpoint.step)[keep:]:
                # The folder first: if we die in between, the next checkpoint removes the row.
                remove_adapter(old.path, self._job.directory)
                log.delete_checkpoint(old.name)
        return name

    def message(self, level: Level, text: str) -> None:
        """Something that the owner of the job should read."""
        self._store.log.add_event(self._job.id, text, level)

    def paused(self) -> None:
        """The run has stopped and can go on from its checkpoint."""
        with contextlib.suppress(
            IllegalTransitionError
        ):  # it was paused, or even resumed since, or cancelled
            # Nobody paused it: the server is stopping, and takes it up again when it is back.
            message = "The run stopped and waits to go on"
            self._store.jobs.move(self._job.id, "queued", message, source="running")
        self._ended()

    def cancelled(self) -> None:
        """The run has stopped for good."""
        self._finish(lambda: self._store.jobs.move(self._job.id, "cancelled", "The job was cancelled"))

    def failed(self, code: str, message: str, param: str | None = None) -> None:
        """The run cannot go on, e.g. because its loss became NaN. `code` is a short reason for programs."""
        self._finish(lambda: self._store.jobs.fail(self._job.id, JobError(code, message, param)))

    def succeeded(self, adapter_path: Path | str | None, trained_tokens: int) -> None:
        """Training is complete: the model gets its name, and the metrics become a result file.

        Args:
            adapter_path: the finished adapter, a folder of its own below `job.directory`; None: what was
                trained is no model to be named.
        """
        with self._store.files.begin(within_quota=False) as results:
            results.write(self._results())
            self._finish(
                lambda: self._store.jobs.succeed(
                    self._job.id,
                    None if adapter_path is None else Path(adapter_path),
                    trained_tokens,
                    results,
                )
            )

    def _finish(self, record: Callable[[], JobRecord]) -> None:
        with contextlib.suppress(IllegalTransitionError):  # cancelled while it came to its own end
            record()
        self._ended()

    def _results(self) -> bytes:
        text = io.StringIO()
        table = csv.DictWriter(
            text, ("step", *METRICS), restval="", extrasaction="ignore", lineterminator="\n"
        )
        table.writeheader()
        table.writerows(self._store.log.metrics(self._job.id))
        return text.getvalue().encode()


def remove_adapter(path: Path, directory: Path) -> None:
    """Delete an adapter's folder if it lies below its job's `directory`."""
    if directory.resolve() in path.resolve().parents:
        shutil.rmtree(path, ignore_errors=True)
