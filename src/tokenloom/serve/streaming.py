"""Answers as server-sent events, in the form that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, TypeAdapter
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenloom.serve.errors import ApiError, as_api_error
from tokenloom.serve.generation import Generation, Outputs, until_disconnect

logger = logging.getLogger("tokenloom.serve")


async def primed(outputs: Outputs) -> Outputs:
    """`outputs`, whose first item has come: what fails before it still gets its own status."""
    first = await anext(outputs, None)

    async def all_of_them() -> Outputs:
        if first is not None:
            yield first
            async for item in outputs:
                yield item

    return all_of_them()


def documented(chunk: Any, *, done: bool = True) -> dict[int | str, dict[str, Any]]:
    """What a route that can stream declares about its answer, besides its response model.

    Args:
        chunk: the model of an event, or a union of models.
        done: whether `[DONE]` ends the stream.
    """
    schema = TypeAdapter(chunk).json_schema()
    definitions = schema.pop("$defs", {})
    end = ", then `[DONE]`" if done else ""

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items()}

    return {
        200: {
            "description": f"The answer. With `stream`: server-sent events, each a chunk{end}.",
            "content": {"text/event-stream": {"schema": inline(schema)}},
        }
    }


class EventStream(Response):
    """Each chunk as an event, an error object if they break off, and `[DONE]`.

    Chunks are sent without the fields that were not set. When the client goes away or the events are over,
    the generation is closed.
    """

    media_type = "text/event-stream"
    end = b"data: [DONE]\n\n"

    def __init__(self, chunks: AsyncIterator[BaseModel], generation: Generation) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send, scope["state"]["request_id"]))
        except ClientDisconnect:
            return
        finally:
            await self.generation.aclose()

    async def _send_all(self, send: Send, request_id: str) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": self.event(chunk), "more_body": True})
        except Exception as error:
            known = as_api_error(error, request_id)
            if known.status_code == 500:
                logger.exception("the answer broke off")
            await send({"type": "http.response.body", "body": _error_event(known), "more_body": True})
        await send({"type": "http.response.body", "body": self.end})

    def event(self, chunk: BaseModel) -> bytes:
        """One chunk as it is sent."""
        return _event(chunk.model_dump_json(exclude_unset=True).encode())


class NamedEventStream(EventStream):
    """Events that carry the name of their type, and tell by themselves when they are over."""

    end = b""

    def event(self, chunk: BaseModel) -> bytes:
        name = getattr(chunk, "type", "message")  # which is the name of an event without one
        return f"event: {name}\n".encode() + _event(chunk.model_dump_json().encode())


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _error_event(error: ApiError) -> bytes:
    return _event(json.dumps(error.body()).encode())
