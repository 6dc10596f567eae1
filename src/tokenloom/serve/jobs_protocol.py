"""Answers of the files and fine-tuning routes: OpenAI's objects, with every key that is always present."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from tokenloom.finetune.hyperparameters import (
    LoraOptions,
    PpdOptions,
    TrainingOptions,
    merge_given,
)
from tokenloom.finetune.records import CheckpointRecord, EventRecord, FileRecord, JobRecord, Status

ORGANIZATION = "tokenloom"


class FileObject(BaseModel):
    """A file. `status` is always processed: what the file holds is checked when a job uses it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Hyperparameters(BaseModel):
    """Numbers once the files have been checked; "auto" can only stay before that."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class Supervised(BaseModel):
    hyperparameters: Hyperparameters


class Ppd(PpdOptions):
    hyperparameters: Hyperparameters


class Method(BaseModel):
    """The key of the job's type alone is not null. `ppd` is an extension."""

    type: Literal["supervised", "ppd"]
    supervised: Supervised | None = None
    ppd: Ppd | None = None


class JobFailure(BaseModel):
    code: str
    message: str
    param: str | None


class Job(BaseModel):
    """A fine-tuning job. `lora` (null where none is trained) and `training` are extensions;
    `training.learning_rate` is the peak rate."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = ORGANIZATION
    status: Status
    hyperparameters: Hyperparameters
    method: Method
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobFailure | None
    seed: int
    metadata: dict[str, str] | None
    integrations: list[Any] = []
    lora: LoraOptions | None
    training: TrainingOptions


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class Event(BaseModel):
    """Something that happened in a job; the `data` of metrics events has step, train_loss and so on."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool


class Checkpoint(BaseModel):
    """A state of the adapter that can be named as `model` in requests."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float | None]


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def job_object(record: JobRecord) -> Job:
    numbers = record.hyperparameters
    if numbers is not None:
        shown = Hyperparameters.model_validate(numbers, from_attributes=True)
        training = numbers.training.model_copy(update={"learning_rate": numbers.learning_rate})
    else:
        asked = record.requested
        shown = Hyperparameters.model_validate(asked.hyperparameters, from_attributes=True)
        given = merge_given(("hyperparameters", asked.hyperparameters), ("training", asked.training))
        training = TrainingOptions.model_validate(
            {key: given[key] for key in given.keys() & TrainingOptions.model_fields.keys()}
        )
    if record.requested.ppd is None:
        method = Method(type="supervised", supervised=Supervised(hyperparameters=shown))
    else:
        method = Method(type="ppd", ppd=Ppd(hyperparameters=shown, **record.requested.ppd.model_dump()))
    over = record.finished_at is not None
    return Job(
        id=record.id,
        created_at=record.created_at,
        finished_at=record.finished_at,
        estimated_finish=record.estimated_finish,
        model=record.model,
        fine_tuned_model=record.fine_tuned_model,
        status=record.status,
        hyperparameters=shown,
        method=method,
        training_file=record.training_file,
        validation_file=record.validation_file,
        result_files=record.result_files,
        trained_tokens=record.trained_tokens if over else None,
        error=None if record.error is None else JobFailure(**vars(record.error)),
        seed=record.seed,
        metadata=record.metadata,
        lora=record.requested.lora if record.requested.ppd is None else None,
        training=training,
    )


def event_object(record: EventRecord) -> Event:
    return Event(
        id=record.id,
        created_at=record.created_at,
        level=record.level,
        message=record.message,
        type=record.type,
        data=record.data,
    )


def checkpoint_object(record: CheckpointRecord) -> Checkpoint:
    return Checkpoint(
        id=record.id,
        created_at=record.created_at,
        fine_tuning_job_id=record.job_id,
        fine_tuned_model_checkpoint=record.name,
        step_number=record.step,
        metrics=dict(record.metrics),
    )
