"""What one HTTP request was and how it fared: its log line and its trace are made of this."""

from __future__ import annotations

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tokenloom.engine.request import Request
from tokenloom.engine.stream import Stream

CLIENT_GONE = 499
"""Status in logs where the client went away before an answer began (nginx's number)."""


@dataclass(eq=False)
class RequestRecord:
    """One HTTP request, from its first byte to the last of its answer.

    Attributes:
        route: the route's template, `unmatched` without one. status: 0 until the answer begins.
        started_s, ended_s: on the monotonic clock; `ended_s` is None until it is over.
        model: the model that the body named, if that is served. error: `error.code` of the answer.
        key: the id of the API key, never the key; None where no key was asked for.
        answers: of the engine, one for each prompt. They know their requests, which are others once the
            engine's loop has been started again.
        span: what traces keep here.
    """

    request_id: str
    method: str
    route: str = "unmatched"
    status: int = 0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    model: str | None = None
    error: str | None = None
    key: str | None = None
    answers: list[Stream] = field(default_factory=list)
    span: Any = None

    @property
    def runs(self) -> list[Request]:
        """The engine's requests, one for each prompt."""
        return [answer.request for answer in self.answers]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(run.prompt) for run in self.runs)

    @property
    def cached_tokens(self) -> int:
        return sum(run.cached_tokens for run in self.runs)

    @property
    def completion_tokens(self) -> int:
        return sum(sequence.num_output for run in self.runs for sequence in run.sequences)


@dataclass(frozen=True)
class Phases:
    """When a request of the engine came through each phase, on the monotonic clock; None: it never did."""

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None

    @classmethod
    def of(cls, run: Request) -> Phases:
        last = max((s.last_token_s for s in run.sequences), default=run.arrival_s)
        return cls(run.arrival_s, run.scheduled_s, run.first_token_s, last if run.first_token_s else None)


_current: ContextVar[RequestRecord | None] = ContextVar("tokenloom_request_record", default=None)


def enter(record: RequestRecord) -> Any:
    """Make it the record of this context; `leave` takes the result."""
    return _current.set(record)


def leave(token: Any) -> None:
    _current.reset(token)


def engine_id() -> str:
    """An id for a request of the engine that nobody else has, and that begins with the id of the HTTP request
    at hand (which its client chose, perhaps twice)."""
    record = _current.get()
    own = secrets.token_hex(8)
    return own if record is None else f"{record.request_id}-{own}"


def note_answer(answer: Stream) -> None:
    """The engine begins an answer: it belongs to the HTTP request at hand, if there is one.

    One that is over can still be at hand: for tasks that it began and left behind.
    """
    record = _current.get()
    if record is not None and record.ended_s is None:
        record.answers.append(answer)


def note_model(name: str) -> None:
    """The request at hand names this model."""
    record = _current.get()
    if record is not None:
        record.model = name


def note_error(code: str | None) -> None:
    """The request at hand is answered with this error."""
    record = _current.get()
    if record is not None:
        record.error = code


def note_key(key_id: str) -> None:
    """The request at hand came with this key. Takes the key's id, not the key."""
    record = _current.get()
    if record is not None:
        record.key = key_id


def finish_reasons(run: Request) -> list[str]:
    """Of each choice; `abort` for one that was not over when its client went."""
    return [sequence.finish_reason or "abort" for sequence in run.sequences] or ["abort"]
