"""POST /v1/responses, and the routes that read, list, cancel and delete what it keeps."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.errors import RequestError
from tokenloom.serve.errors import ERROR_RESPONSES
from tokenloom.serve.generation import until_disconnect
from tokenloom.serve.json_body import JSONRoute, write_json
from tokenloom.serve.models import Models
from tokenloom.serve.responses.answer import Answer
from tokenloom.serve.responses.events import ResponseEvent
from tokenloom.serve.responses.items import KeptItem
from tokenloom.serve.responses.protocol import (
    InputItemList,
    ResponseDeleted,
    ResponseObject,
    ResponseRequest,
)
from tokenloom.serve.responses.store import ResponseStore
from tokenloom.serve.streaming import NamedEventStream, documented, primed


def responses_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """The routes of responses over one engine, with a store of their own."""
    router = APIRouter(prefix="/v1", tags=["responses"], responses=ERROR_RESPONSES, route_class=JSONRoute)
    limits = engine.settings.limits
    store = ResponseStore(limits.max_stored_responses, limits.max_stored_bytes)
    running: dict[str, tuple[Answer, asyncio.Task[None]]] = {}

    @router.post("/responses", response_model=ResponseObject, responses=documented(ResponseEvent, done=False))
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a text or a conversation. With `stream` the answer comes as server-sent events."""
        answer = await Answer.start(engine, models, store, body, request.state.request_id)
        if body.background:
            response = answer.queue()
            task = asyncio.create_task(answer.run_in_background())
            running[response.id] = answer, task
            task.add_done_callback(lambda _: running.pop(response.id))
            return await write_json(lambda: response, exclude_unset=False)
        if body.stream:
            try:
                outputs = await until_disconnect(request.receive, primed(answer.generation.outputs()))
            except BaseException:
                await answer.aclose()
                raise
            return NamedEventStream(answer.events(outputs), answer.generation)
        try:
            response = await until_disconnect(request.receive, answer.finish())
        finally:
            await answer.aclose()
        return await write_json(lambda: response, exclude_unset=False)

    @router.get("/responses/{response_id}")
    async def get_response(response_id: str, stream: bool = False) -> ResponseObject:
        """A response that is kept. It cannot be streamed a second time."""
        if stream:
            raise RequestError(
                "stream: a kept response is not streamed again", param="stream", code="unsupported_parameter"
            )
        return store.get(response_id).response

    @router.delete("/responses/{response_id}")
    async def delete_response(response_id: str) -> ResponseDeleted:
        """Forget a response; one that still runs in the background is stopped."""
        await stop(response_id)
        store.delete(response_id)
        return ResponseDeleted(id=response_id)

    @router.post("/responses/{response_id}/cancel")
    async def cancel_response(response_id: str) -> ResponseObject:
        """Stop a response that runs in the background. One that is over stays as it is."""
        response = store.get(response_id).response
        if not response.background:
            raise RequestError(
                f"response {response_id} does not run in the background; closing its connection cancels it",
                code="not_in_background",
            )
        return await stop(response_id) or response

    async def stop(response_id: str) -> ResponseObject | None:
        if response_id not in running:
            return None
        answer, task = running[response_id]
        task.cancel()
        await asyncio.wait([task])
        await answer.aclose()  # a task that had not begun has closed nothing
        # It may have come to its end at the same moment.
        return answer.cancel() if answer.response.status in ("queued", "in_progress") else answer.response

    @router.get("/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> InputItemList:
        """The conversation that a response answers, with what was said before its `previous_response_id`."""
        items = list(store.get(response_id).items)
        if order == "desc":
            items.reverse()
        return _page(items, after, limit)

    return router


def _page(items: list[KeptItem], after: str | None, limit: int) -> InputItemList:
    start = 0
    if after is not None:
        start = next((i + 1 for i, item in enumerate(items) if item.id == after), 0)
        if start == 0:
            raise RequestError(f"after: nothing in this list has the id {after[:128]!r}", param="after")
    data = items[start : start + limit]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return InputItemList(data=data, first_id=first, last_id=last, has_more=start + limit < len(items))
