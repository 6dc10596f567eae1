"""One response while it is written: its state, its events, and what is kept of it."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import Completion
from tokenloom.errors import RequestError
from tokenloom.serve.chat import render
from tokenloom.serve.chat_protocol import ChatLogprob
from tokenloom.serve.errors import as_api_error
from tokenloom.serve.generation import Generation, Outputs, sampling_params
from tokenloom.serve.logprobs import chat_logprobs
from tokenloom.serve.models import Models
from tokenloom.serve.responses.conversation import context_of, new_message_id, with_instructions
from tokenloom.serve.responses.events import EventWriter, ResponseEvent
from tokenloom.serve.responses.protocol import (
    Failure,
    Incomplete,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
    TextOptions,
)
from tokenloom.serve.responses.store import ResponseStore, StoredResponse

logger = logging.getLogger("tokenloom.serve")

# What the pipeline of chat completions calls what this API names otherwise.
_FIELDS = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens"}


class Answer:
    """A response from its request to its end. Must be closed, as the generation behind it."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: ResponseStore,
        body: ResponseRequest,
        stored: StoredResponse,
        generation: Generation,
        request_id: str,
    ) -> None:
        self.engine = engine
        self.store = store
        self.body = body
        self.stored = stored
        self.generation = generation
        self.request_id = request_id
        self._message_id = new_message_id()

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
            context, items = context_of(body, previous)
            chat = body.as_chat(with_instructions(body, context))
            prompt = await render(engine, chat.messages, None, True)
            params = sampling_params(
                chat,
                engine.settings.limits,
                max_tokens=chat.max_completion_tokens,
                logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
                prompt_logprobs=None,
            )
            generation = await Generation.start(engine, chat, [prompt], params, adapter)
        response = _begun(body, keeps=store.keeps and body.store is not False)
        return cls(engine, store, body, StoredResponse(response, context, items), generation, request_id)

    @property
    def response(self) -> ResponseObject:
        """As it is now."""
        return self.stored.response

    async def finish(self) -> ResponseObject:
        """Run to the end, and keep the response if it is to be kept. Raises as `Generation.outputs` does."""
        await self.generation.finish()
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
        """The finished response, from all that was generated."""
        [completion] = self.generation.answers[0].completions
        cut = completion.finish_reason == "length"
        self._become(
            status="incomplete" if cut else "completed",
            completed_at=None if cut else int(time.time()),
            incomplete_details=Incomplete(reason="max_output_tokens") if cut else None,
            output=[self._message(completion, "incomplete" if cut else "completed")],
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
        writer = EventWriter(self._message_id)
        yield writer.whole("response.created", self.response)
        yield writer.whole("response.in_progress", self.response)
        empty = OutputText(text="", annotations=[], logprobs=[])
        begun = OutputMessage(id=self._message_id, status="in_progress", content=[])
        yield writer.item("response.output_item.added", begun)
        yield writer.part("response.content_part.added", empty)
        try:
            async for _, step in outputs:
                for delta in step.deltas:
                    entries = self._logprobs(delta)
                    if delta.text or entries:
                        yield writer.delta(delta.text, entries)
        except Exception as error:
            yield writer.whole("response.failed", self.fail(error))
            return
        response = self.end()
        [item] = response.output
        [part] = item.content
        yield writer.done(part.text, part.logprobs)
        yield writer.part("response.content_part.done", part)
        yield writer.item("response.output_item.done", item)
        yield writer.whole(f"response.{response.status}", response)

    async def aclose(self) -> None:
        await self.generation.aclose()

    def _become(self, **changes: object) -> None:
        response = self.response.model_copy(update=changes)
        self.stored = StoredResponse(response, self.stored.context, self.stored.items)
        if response.store:
            self.store.put(self.stored)

    def _message(self, completion: Completion, status: str) -> OutputMessage:
        part = OutputText(text=completion.text, annotations=[], logprobs=self._logprobs(completion))
        return OutputMessage.model_validate({"id": self._message_id, "status": status, "content": [part]})

    def _logprobs(self, piece: object) -> list[ChatLogprob]:
        entries = getattr(piece, "logprobs", None)
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
        if theirs not in _FIELDS:
            raise
        own = _FIELDS[theirs]
        message = f"{own}: {str(error).removeprefix(theirs).removeprefix(': ')}"
        raise RequestError(message, param=own, code=error.code) from error


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
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    )
