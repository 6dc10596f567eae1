"""Bodies of `/v1/batches`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from tokenloom.finetune.file_store import MAX_EXPIRY_S, MIN_EXPIRY_S
from tokenloom.serve.batches.records import BatchRecord, Endpoint, Status
from tokenloom.serve.protocol import Integer, RequestBody, at_most

WINDOW_S = 24 * 3600


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a character that is not text")
    return text


Key = Annotated[str, Field(max_length=64), AfterValidator(_storable)]
Value = Annotated[str, Field(max_length=512), AfterValidator(_storable)]


class ExpiresAfter(BaseModel):
    """How long the output files are kept once they are there."""

    anchor: Literal["created_at"]
    seconds: Integer = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class CreateBatch(RequestBody):
    """POST /v1/batches."""

    input_file_id: str = Field(min_length=1, max_length=256)
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Key, Value], Field(max_length=16), at_most(16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    """Why the input file was refused; `line` counts from 1."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Lines of the input file: all, those answered, and those answered with an error."""

    total: int
    completed: int
    failed: int


class InputDetails(BaseModel):
    cached_tokens: int


class OutputDetails(BaseModel):
    """Every token is part of an answer here: `reasoning_tokens` is 0."""

    reasoning_tokens: Literal[0] = 0


class BatchUsage(BaseModel):
    """Tokens of all lines answered so far."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Batch(BaseModel):
    """A batch. `model` is there if all lines name the same one."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(record: BatchRecord) -> Batch:
    errors = None
    if record.errors is not None:
        errors = BatchErrors(data=[BatchError(**fault) for fault in record.errors])
    tokens = record.tokens
    return Batch(
        id=record.id,
        endpoint=record.endpoint,
        model=record.model,
        errors=errors,
        input_file_id=record.input_file_id,
        status=record.status,
        output_file_id=record.output_file_id,
        error_file_id=record.error_file_id,
        created_at=record.created_at,
        in_progress_at=record.times.get("in_progress"),
        expires_at=record.expires_at,
        finalizing_at=record.times.get("finalizing"),
        completed_at=record.times.get("completed"),
        failed_at=record.times.get("failed"),
        expired_at=record.times.get("expired"),
        cancelling_at=record.times.get("cancelling"),
        cancelled_at=record.times.get("cancelled"),
        request_counts=RequestCounts.model_validate(vars(record.counts)),
        usage=BatchUsage(
            input_tokens=tokens["input"],
            input_tokens_details=InputDetails(cached_tokens=tokens["cached"]),
            output_tokens=tokens["output"],
            output_tokens_details=OutputDetails(),
            total_tokens=tokens["input"] + tokens["output"],
        ),
        metadata=record.metadata,
    )
