"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import Completion, FinishReason, RequestOutput
from tokenloom.errors import RequestError
from tokenloom.serve.chat_protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Message,
)
from tokenloom.serve.errors import ERROR_RESPONSES
from tokenloom.serve.generation import (
    Generation,
    Outputs,
    encode,
    prompt_is,
    sampling_params,
    until_disconnect,
)
from tokenloom.serve.json_body import JSONRoute, write_json
from tokenloom.serve.logprobs import chat_logprobs, prompt_logprobs
from tokenloom.serve.models import Models
from tokenloom.serve.protocol import Usage
from tokenloom.serve.streaming import EventStream, documented, primed
from tokenloom.text.chat_context import context_tokens


def chat_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """The chat route over one engine."""
    router = APIRouter(prefix="/v1", tags=["chat"], responses=ERROR_RESPONSES, route_class=JSONRoute)

    @router.post("/chat/completions", response_model=ChatResponse, responses=documented(ChatChunk))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. With `stream` the answer comes as server-sent events."""
        adapter = await models.resolve(body.model)
        prompt = await render(engine, body.messages, _tools(body, engine), body.add_generation_prompt)
        params = sampling_params(
            body,
            engine.settings.limits,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        with prompt_is("messages"):
            upto = await _context(engine, body, prompt)
            generation = await Generation.start(engine, body, [prompt], params, adapter, upto)
        if body.stream:
            return await _stream(engine, body, request, generation, head)
        try:
            [answer] = await until_disconnect(request.receive, generation.finish())
        finally:
            await generation.aclose()
        return await write_json(lambda: _whole(engine, answer, generation.usage(), head))

    return router


def _tools(body: ChatRequest, engine: AsyncEngine) -> list[dict[str, Any]] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    if not _template_knows("tools", engine):
        raise RequestError(
            "tools: this model's chat template knows no tools; leave them out or set tool_choice to none",
            param="tools",
            code="unsupported_parameter",
        )
    return body.tools


def _template_knows(word: str, engine: AsyncEngine) -> bool:
    return word in (engine.tokenizer.chat_template or "")


async def render(
    engine: AsyncEngine,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> list[int]:
    """Tokens of a conversation under the model's chat template. Raises RequestError (param "messages")."""
    knows_developer = _template_knows("developer", engine)
    plain = [message.for_template(knows_developer=knows_developer) for message in messages]
    # A template is a program that came with the model: it may take its time, but not the event loop's.
    text = await asyncio.to_thread(
        engine.tokenizer.render_chat, plain, tools=tools, add_generation_prompt=add_generation_prompt
    )
    with prompt_is("messages"):
        [tokens] = await encode(engine, [text], special=False)
    return tokens


async def _context(engine: AsyncEngine, body: ChatRequest, prompt: list[int]) -> int | None:
    """How many tokens of the prompt are of the messages to compress. Raises RequestError (compress_upto)."""
    if body.compress_upto is None:
        return None
    knows_developer = _template_knows("developer", engine)
    plain = [message.for_template(knows_developer=knows_developer) for message in body.messages]
    render = partial(engine.tokenizer.render_chat, tools=_tools(body, engine), add_generation_prompt=False)
    return await asyncio.to_thread(
        context_tokens, engine.tokenizer, render, plain, body.compress_upto, prompt
    )


def _whole(engine: AsyncEngine, answer: RequestOutput, usage: Usage, head: dict[str, Any]) -> ChatResponse:
    extra: dict[str, Any] = {}
    if answer.prompt_logprobs is not None:
        extra["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs, engine.tokenizer)
    choices = [_choice(completion, engine) for completion in answer.completions]
    return ChatResponse(**head, object="chat.completion", choices=choices, usage=usage, **extra)


def _choice(completion: Completion, engine: AsyncEngine) -> ChatChoice:
    entries = completion.logprobs
    return ChatChoice(
        index=completion.index,
        message=ChatMessage(role="assistant", content=completion.text, refusal=None),
        logprobs=None if entries is None else chat_logprobs(entries, engine.tokenizer),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )


async def _stream(
    engine: AsyncEngine, body: ChatRequest, request: Request, generation: Generation, head: dict[str, Any]
) -> Response:
    try:
        outputs = await until_disconnect(request.receive, primed(generation.outputs()))
    except BaseException:
        await generation.aclose()
        raise
    chunks = _chunks(engine, generation, outputs, head, include_usage=body.include_usage)
    return EventStream(chunks, generation)


async def _chunks(
    engine: AsyncEngine,
    generation: Generation,
    outputs: Outputs,
    head: dict[str, Any],
    *,
    include_usage: bool,
) -> AsyncIterator[ChatChunk]:
    """OpenAI's chunks: the role of each choice, its pieces, its end, and at last the usage if asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    tail: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: FinishReason | None = None,
        **reason: Any,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason, **reason
        )
        return ChatChunk(**head, choices=[choice], **tail)

    for index in range(generation.params.n):
        yield chunk(index, ChatDelta(role="assistant", content=""))
    async for _, step in outputs:
        for delta in step.deltas:
            entries = chat_logprobs(delta.logprobs, engine.tokenizer) if delta.logprobs else None
            if delta.text or entries:
                yield chunk(delta.index, ChatDelta(content=delta.text), entries)
            if delta.finish_reason:
                yield chunk(
                    delta.index, ChatDelta(), None, delta.finish_reason, stop_reason=delta.stop_reason
                )
    if include_usage:
        yield ChatChunk(**head, choices=[], usage=generation.usage())
