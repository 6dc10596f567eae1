"""JSON in and out: strict parsing before FastAPI sees a body, and writing answers off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json

from tokenloom.serve.errors import ApiError

# Parsing holds the interpreter: many small arrays and objects are what makes it slow.
MAX_CONTAINERS = 2**18
_INLINE_BYTES = 2**16


def parse_json(body: bytes) -> Any:
    """The value of a JSON text as RFC 8259 has it: UTF-8, no NaN or Infinity, at most 200 levels deep.

    Raises ApiError (400) saying what is wrong and where.
    """
    if not body.strip():
        raise ApiError(400, "the request body is empty; it must be a JSON object", code="invalid_json")
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ApiError(
            400, f"the request body holds more than {MAX_CONTAINERS} arrays and objects", code="invalid_json"
        )
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        message = f"the request body is not valid JSON: {_explain(str(error), body)}"
        raise ApiError(400, message, code="invalid_json") from None


def _explain(problem: str, body: bytes) -> str:
    what, _, where = problem.rpartition(" at ")
    if "unicode" in what:
        what = "it is not UTF-8"
    elif "hex escape" in what:
        what = "a lone surrogate or a broken \\u escape"
    elif "recursion" in what:
        what = "it is nested too deeply"
    elif b"NaN" in body or b"Infinity" in body:
        what += " (JSON has no NaN and no Infinity)"
    return f"{what} at {where}"


async def write_json(build: Callable[[], BaseModel], *, exclude_unset: bool = True) -> Response:
    """The answer that `build` makes, without the fields it did not set (unless those have a meaning, too).

    Log-probabilities of long prompts are much to write, so it is done in a thread: streams go on meanwhile.
    """

    def write() -> str:
        return build().model_dump_json(exclude_unset=exclude_unset)

    return Response(await asyncio.to_thread(write), media_type="application/json")


class _ParsedRequest(Request):
    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JSONRoute(APIRoute):
    """A route whose body is JSON: 415 for other content types, 400 for what is not strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parse_first(original: Request) -> Response:
            request = _ParsedRequest(original.scope, original.receive)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415, "content-type: must be application/json", param=None, code="unsupported_media_type"
                )
            body = await request.body()
            if len(body) > _INLINE_BYTES:
                request.parsed = await asyncio.to_thread(parse_json, body)
            else:
                request.parsed = parse_json(body)
            return await handle(request)

        return parse_first
