"""Errors that a user can cause. Each message names the field, file, key or tensor at fault."""

from __future__ import annotations

_LONGEST = 2000


class TokenloomError(Exception):
    """Base of every error that tokenloom raises on purpose; the CLI prints it as one line.

    A message names what a file or a request holds, and that may be megabytes: its middle is left out then.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= _LONGEST:
            return text
        return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"


class ModelError(TokenloomError):
    """A model cannot be found, read or run: unknown name, corrupt file, unsupported architecture."""


class RequestError(TokenloomError, ValueError):
    """A request cannot be served as asked.

    `param` is the request field at fault (OpenAI's `error.param`), or None when no single field is;
    `code` is a short machine-readable reason (OpenAI's `error.code`), or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineBusyError(TokenloomError):
    """The waiting queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(TokenloomError):
    """The engine is draining or has stopped and takes no new requests."""


class GenerationError(TokenloomError):
    """The engine failed on a request that it had taken."""
