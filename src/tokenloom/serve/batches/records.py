"""What the store of batches hands out, and the states of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]

SOURCES: dict[Status, frozenset[Status]] = {
    "failed": frozenset({"validating", "in_progress"}),
    "in_progress": frozenset({"validating"}),
    "cancelling": frozenset({"validating", "in_progress"}),
    "finalizing": frozenset({"in_progress"}),
    "completed": frozenset({"finalizing"}),
    "expired": frozenset({"in_progress"}),
    "cancelled": frozenset({"cancelling"}),
}
"""From which states a batch may come into each state. It begins in validating."""


class LineFault(TypedDict):
    """Why a line of the input file cannot be taken; `line` counts from 1, null is the whole file."""

    code: str
    line: int | None
    message: str
    param: str | None


class Tokens(TypedDict):
    """Tokens of answered lines."""

    input: int
    cached: int
    output: int


@dataclass(frozen=True)
class Counts:
    """Lines of a batch. `failed` ones have an answer, too: an error."""

    total: int
    completed: int
    failed: int


@dataclass(frozen=True)
class BatchRecord:
    """A batch. Times are Unix seconds.

    Attributes:
        account: whose key made it; None where no key was asked for.
        times: when it came into each of its states, by status.
        errors: why the input file was refused.
        model: the model that all lines name; None if they name several, or before validation.
        output_expires_after_s: how long its output files are kept; None for ever.
    """

    id: str
    account: str | None
    endpoint: Endpoint
    input_file_id: str
    status: Status
    created_at: int
    expires_at: int
    times: dict[str, int]
    counts: Counts
    tokens: Tokens
    errors: list[LineFault] | None
    model: str | None
    output_file_id: str | None
    error_file_id: str | None
    metadata: dict[str, str] | None
    output_expires_after_s: int | None


@dataclass(frozen=True)
class LineAnswer:
    """The answer to one line, ready to be a line of the output file (`ok`) or of the error file."""

    line: int
    ok: bool
    text: str
    tokens: Tokens
