"""What the store hands out: files, jobs, events, checkpoints; and the states of a job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from tokenloom.finetune.hyperparameters import Hyperparameters, JobOptions

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]

TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
LIVE: frozenset[Status] = frozenset({"validating_files", "queued", "running", "paused"})

SOURCES: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"validating_files", "running", "paused"}),
    "running": frozenset({"queued"}),
    "paused": frozenset({"queued", "running"}),
    "cancelled": LIVE,
    "failed": LIVE,
    # The last step may end while a pause is on its way to the trainer, or was already taken back.
    "succeeded": frozenset({"running", "paused", "queued"}),
}
"""From which states a job may come into each state. It begins in validating_files."""

METRICS = (
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""Names of OpenAI's metrics, in the order of the result file's columns after `step`."""

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a listing."""

    data: list[T]
    has_more: bool


@dataclass(frozen=True)
class FileRecord:
    """An uploaded or produced file. Times are Unix seconds; `path` is where its bytes are."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None
    path: Path


@dataclass(frozen=True)
class JobError:
    """Why a job failed; `param` names the file at fault, or is None."""

    code: str
    message: str
    param: str | None


@dataclass(frozen=True)
class JobRecord:
    """A finetuning job.

    Attributes:
        name: what the finished model is called, `ft:<base>:<suffix>:<id>`; fixed from the beginning, because
            checkpoints carry it. `fine_tuned_model` is None until the job has succeeded.
        training_path, validation_path: where the files' bytes are.
        requested: how to train, as asked; `hyperparameters` is the same resolved, None before validation.
        directory: the job's own folder, which the trainer may fill; adapters live in it.
        checkpoint_dir: the folder below it in which a restarted run finds what to go on from.
        adapter_path: the finished adapter; None before, and after the model has been deleted.
        trained_tokens, estimated_finish: as last reported.
    """

    id: str
    name: str
    model: str
    suffix: str | None
    status: Status
    training_file: str
    validation_file: str | None
    training_path: Path
    validation_path: Path | None
    requested: JobOptions
    hyperparameters: Hyperparameters | None
    seed: int
    metadata: dict[str, str] | None
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    trained_tokens: int | None
    fine_tuned_model: str | None
    result_files: list[str]
    error: JobError | None
    directory: Path
    checkpoint_dir: Path
    adapter_path: Path | None


@dataclass(frozen=True)
class EventRecord:
    """Something that happened in a job; metrics events carry `data`."""

    id: str
    job_id: str
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True)
class CheckpointRecord:
    """A state of the adapter that can be served under `name`."""

    id: str
    job_id: str
    created_at: int
    step: int
    name: str
    metrics: dict[str, float]
    path: Path


@dataclass(frozen=True)
class TunedModel:
    """A name that can be served: a finished job's adapter, or (with a `step`) a checkpoint's."""

    name: str
    base: str
    job_id: str
    created_at: int
    adapter_path: Path
    step: int | None
