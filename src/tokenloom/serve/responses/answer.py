"""One response while it is written: its state, its events, and what is kept of it."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import TokenLogprob
from tokenloom.errors import RequestError
from tokenloom.serve.chat import held_params, render, used_tools
from tokenloom.serve.chat_protocol import ChatLogprob
from tokenloom.serve.errors import as_api_error
from tokenloom.serve.generation import Generation, Outputs, sampling_params
from tokenloom.serve.logprobs import chat_logprobs
from tokenloom.serve.models import Models
from tokenloom.serve.responses.conversation import items_of, messages_of
from tokenloom.serve.responses.events import EventWriter, ResponseEvent
from tokenloom.serve.responses.output import OutputWriter
from tokenloom.serve.responses.protocol import (
    Failure,
    Incomplete,
    InputDetails,
    OutputDetails,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    TextOptions,
)
from tokenloom.serve.responses.store import ResponseStore, StoredResponse
from tokenloom.serve.tools import ToolUse

logger = logging.getLogger("tokenloom.serve")

_FIELDS = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
}
"""What the pipeline of chat completions calls what this API names otherwise, and what is within it."""
_TOOL = re.compile(r"(tools\[\d+\])\.function")


class Answer:
    """A response from its request to its end. Must be closed, as the generation behind it."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: ResponseStore,
        body: ResponseRequest,
        stored: StoredResponse,
        generation: Generation,
        use: ToolUse | None,
        request_id: str,
    ) -> None:
        self.engine = engine
        self.store = store
        self.body = body
        self.stored = stored
        self.generation = generation
        self.request_id = request_id
        self._events = EventWriter()
        self._output = OutputWriter(self._events, use)

    @classmethod
    async def start(
        cls, engine: AsyncEngine, models: Models, store: ResponseStore, body: ResponseRequest, request_id: str
    ) -> Answer:
        """Send the request to the engine.

        Raises RequestError, ApiError, EngineBusyError or EngineStoppedError, naming this API's fields.
        """
        previous = None
        if body.previous_response_id is not None:
            previous = _previous(store, body.previous_response_id)
        if body.background and not store.keeps:
            raise RequestError("background: this server keeps no responses", param="background")
        adapter = await models.resolve(body.model)
        with _own_names():
            items = items_of(body, previous)
            chat = body.as_chat(messages_of(body, items))
            use = used_tools(chat, engine)
            prompt = await render(engine, chat.messages, use.offered if use else None, True)
            params = sampling_params(
                chat,
                engine.settings.limits,
                max_tokens=chat.max_completion_tokens,
                logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
                prompt_logprobs=None,
            )
            params = await held_params(engine, chat, use, params)
            generation = await Generation.start(engine, chat, [prompt], params, adapter)
        response = _begun(body, keeps=store.keeps and body.store is not False)
        return cls(engine, store, body, StoredResponse(response, items), generation, use, request_id)

    @property
    def response(self) -> ResponseObject:
        """As it is now."""
        return self.stored.response

    async def finish(self) -> ResponseObject:
        """Run to the end, and keep the response if it is to be kept. Raises as `Generation.outputs` does."""
        [answer] = await self.generation.finish()
        [completion] = answer.completions
        for _ in self._output.push(completion.text, self._logprobs(completion.logprobs), last=True):
            continue  # nobody listens
        for _ in self._output.end(cut=self._cut):
            continue
        return self.end()

    async def run_in_background(self) -> None:
        """Run to the end, however it ends; whoever asks for the response sees how it goes."""
        try:
            self._become(status="in_progress")
            await self.finish()
        except Exception as error:
            self.fail(error)
        finally:
            await self.generation.aclose()

    def queue(self) -> ResponseObject:
        """Keep the response before it has begun."""
        self._become(status="queued")
        return self.response

    def cancel(self) -> ResponseObject:
        """Keep what there is of it as cancelled; whoever runs it stops."""
        self._become(status="cancelled")
        return self.response

    def end(self) -> ResponseObject:
        """The finished response, from all items of its output."""
        self._become(
            status="incomplete" if self._cut else "completed",
            completed_at=None if self._cut else int(time.time()),
            incomplete_details=Incomplete(reason="max_output_tokens") if self._cut else None,
            output=self._output.items,
            usage=self._usage(),
        )
        return self.response

    def fail(self, error: Exception) -> ResponseObject:
        """The response after the engine failed on it."""
        known = as_api_error(error, self.request_id)
        if known.status_code == 500:
            logger.error("response %s broke off", self.response.id, exc_info=error)
        self._become(
            status="failed",
            error=Failure(code="server_error", message=known.detail),
            usage=self._usage(),
        )
        return self.response

    async def events(self, outputs: Outputs) -> AsyncIterator[ResponseEvent]:
        """OpenAI's events. A failure is the last of them: the client has its 200 already."""
        yield self._events.whole("response.created", self.response)
        yield self._events.whole("response.in_progress", self.response)
        for event in self._output.begin():
            yield event
        try:
            async for _, step in outputs:
                for delta in step.deltas:
                    last = delta.finish_reason is not None
                    for event in self._output.push(delta.text, self._logprobs(delta.logprobs), last=last):
                        yield event
        except Exception as error:
            yield self._events.whole("response.failed", self.fail(error))
            return
        for event in self._output.end(cut=self._cut):
            yield event
        response = self.end()
        yield self._events.whole(f"response.{response.status}", response)

    async def aclose(self) -> None:
        await self.generation.aclose()

    def _become(self, **changes: object) -> None:
        response = self.response.model_copy(update=changes)
        self.stored = StoredResponse(response, self.stored.items)
        if response.store:
            self.store.put(self.stored)

    @property
    def _cut(self) -> bool:
        """Whether it is over because it must not be longer."""
        [completion] = self.generation.answers[0].completions
        return completion.finish_reason == "length"

    def _logprobs(self, entries: list[TokenLogprob] | None) -> list[ChatLogprob]:
        return chat_logprobs(entries, self.engine.tokenizer).content if entries else []

    def _usage(self) -> ResponseUsage:
        usage = self.generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        written = usage.prompt_tokens - cached if self.engine.settings.cache.prefix_caching else 0
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=cached, cache_write_tokens=written),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=usage.total_tokens,
        )


def _previous(store: ResponseStore, response_id: str) -> StoredResponse:
    previous = store.find(response_id)
    if previous is None:
        raise RequestError(
            f"previous_response_id: no response has the id {response_id!r}, or not any longer",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if previous.response.status not in ("completed", "incomplete"):
        raise RequestError(
            f"previous_response_id: {response_id} is {previous.response.status}; there is no answer to go "
            "on from",
            param="previous_response_id",
        )
    return previous


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Complaints of the chat pipeline, under the names that this API's client knows."""
    try:
        yield
    except RequestError as error:
        theirs = error.param or ""
        own = _own_name(theirs)
        if own == theirs:
            raise
        message = f"{own}: {str(error).removeprefix(theirs).removeprefix(': ')}"
        raise RequestError(message, param=own, code=error.code) from error


def _own_name(theirs: str) -> str:
    for prefix, own in _FIELDS.items():
        if theirs == prefix or theirs.startswith(f"{prefix}."):
            return own + theirs.removeprefix(prefix)
    return _TOOL.sub(r"\1", theirs)


def _begun(body: ResponseRequest, *, keeps: bool) -> ResponseObject:
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
        store=keeps,
        temperature=1.0 if body.temperature is None else body.temperature,
        text=body.text or TextOptions(),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    )
