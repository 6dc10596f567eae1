"""Errors of files and jobs, each with the HTTP status that tells it best."""

from __future__ import annotations

from tokenloom.errors import RequestError, TokenloomError


class NotFoundError(RequestError):
    """No file, job or tuned model has that id."""

    def __init__(self, kind: str, object_id: str, param: str | None = None) -> None:
        super().__init__(f"no {kind} has the id {object_id[:128]!r}", param=param, code="not_found")


class FileTooLargeError(RequestError):
    """An upload is over the limit."""


class IllegalTransitionError(RequestError):
    """A job cannot go from the state it is in to the one asked for."""

    def __init__(self, job_id: str, current: str, target: str) -> None:
        super().__init__(f"job {job_id} is {current} and cannot become {target}", code="invalid_job_state")
        self.current = current
        self.target = target


class StorageFullError(TokenloomError):
    """The disk, or the quota for files, is full."""


class StoreError(TokenloomError):
    """The database or the folder of files cannot be used; the message names it."""
