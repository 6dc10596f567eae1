"""Every failure in OpenAI's shape: `{"error": {message, type, param, code}}`, all four keys, always."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tokenloom.errors import (
    EngineBusyError,
    EngineStoppedError,
    GenerationError,
    RequestError,
    TokenloomError,
)
from tokenloom.serve.request_record import note_error

DRAIN_RETRY_AFTER_S = 5


class ErrorDetail(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"model: {name!r} is not served here; GET /v1/models lists what is",
            param="model",
            code="model_not_found",
        )


class ApiError(HTTPException):
    """A failure with its status and OpenAI's fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        detail = {"message": self.detail, "type": _type_of(self.status_code)}
        return {"error": {**detail, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


# What routes declare in the OpenAPI document; "4XX" also keeps FastAPI from promising a 422.
_FAILURES: dict[int | str, str] = {
    400: "A field is missing, malformed or out of range; `error.param` names it",
    401: "The API key is missing or wrong",
    404: "No such model, file or job",
    413: "The body is too large",
    429: "Too many requests are at work or waiting; see Retry-After",
    "4XX": "The request cannot be served",
    500: "The server failed; its log tells more under the request id",
    503: "The server is starting or draining; see Retry-After",
    507: "There is no room to store it",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": words} for status, words in _FAILURES.items()
}


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """The answer to any exception. What we did not foresee becomes a 500 that tells only the request id."""
    answer = _as_api_error(error, request_id)
    note_error(answer.code or _type_of(answer.status_code))
    return answer


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, ModelNotFoundError) else 400
        return ApiError(status, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineBusyError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return ApiError(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, EngineStoppedError):
        wait = {"Retry-After": str(DRAIN_RETRY_AFTER_S)}
        return ApiError(503, str(error), code="engine_stopped", headers=wait)
    if isinstance(error, GenerationError):
        return ApiError(500, f"{error} (request {request_id})", code="generation_failed")
    message = f"something went wrong on the server; its log tells more under request id {request_id}"
    return ApiError(500, message, code="internal_error")


def validation_error(error: RequestValidationError) -> ApiError:
    """The first fault that pydantic found, in plain words and with the field's path."""
    fault = error.errors()[0]
    cause = (fault.get("ctx") or {}).get("error")
    if isinstance(cause, RequestError):
        return ApiError(400, str(cause), param=cause.param, code=cause.code)
    param = field_path(fault["loc"])
    words = _in_words(fault)
    if not param:
        return ApiError(400, f"the request body {words}")
    return ApiError(400, f"{param}: {words}", param=param)


def field_path(location: tuple[int | str, ...]) -> str:
    """`("body", "messages", 0, "content")` as `messages[0].content`.

    Parts in angle brackets are the tags of alternatives (see `protocol.Prompt`), no part of the request.
    """
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def install_error_handlers(app: FastAPI) -> None:
    """Make every exception that reaches the application an answer in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = _unrouted(request, error)
        return as_api_error(error, request.state.request_id).response()

    async def nobody_listens(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    for kind in (HTTPException, RequestValidationError, TokenloomError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, nobody_listens)


def _unrouted(request: Request, error: HTTPException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    path = request.url.path
    if error.status_code == 404:
        return ApiError(404, f"there is no route {path}", code="route_not_found")
    return ApiError(
        405, f"{path} does not take {request.method}", code="method_not_allowed", headers=error.headers
    )


def _type_of(status: int) -> str:
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


_WORDS = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be a JSON object",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_long": "has too many items; at most {max_length} are allowed",
    "too_short": "must have at least {min_length} item(s)",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
}


def _in_words(fault: Mapping[str, Any]) -> str:
    context = fault.get("ctx") or {}
    if fault["type"] in _WORDS:
        return _WORDS[fault["type"]].format(**context)
    return str(context.get("error") or fault["msg"])
