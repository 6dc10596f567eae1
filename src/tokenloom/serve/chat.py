"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import Completion, RequestOutput
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serve.chat_protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatFinishReason,
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
from tokenloom.serve.structured_output import compiled_params, structured_params
from tokenloom.serve.tools import CallWriter, ToolUse, read_calls, tool_use
from tokenloom.serve.tools_prompt import knows_tools, told_in_words
from tokenloom.serve.tools_protocol import ToolCallDelta
from tokenloom.text.chat_context import context_tokens


def chat_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """The chat route over one engine."""
    router = APIRouter(prefix="/v1", tags=["chat"], responses=ERROR_RESPONSES, route_class=JSONRoute)

    @router.post("/chat/completions", response_model=ChatResponse, responses=documented(ChatChunk))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. With `stream` the answer comes as server-sent events."""
        adapter = await models.resolve(body.model)
        use = used_tools(body, engine)
        tools = use.offered if use else None
        prompt = await render(engine, body.messages, tools, body.add_generation_prompt)
        params = sampling_params(
            body,
            engine.settings.limits,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        params = await held_params(engine, body, use, params)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        with prompt_is("messages"):
            upto = await _context(engine, body, tools, prompt)
            generation = await Generation.start(engine, body, [prompt], params, adapter, upto)
        if body.stream:
            return await _stream(engine, body, request, generation, head, use)
        try:
            [answer] = await until_disconnect(request.receive, generation.finish())
        finally:
            await generation.aclose()
        return await write_json(lambda: _whole(engine, answer, generation.usage(), head, use))

    return router


def used_tools(body: ChatRequest, engine: AsyncEngine) -> ToolUse | None:
    """What a body with tools wants of its answer; None where no tool is to be used. Raises RequestError."""
    form = engine.settings.server.tool_format
    return tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, engine.tokenizer, form)


async def held_params(
    engine: AsyncEngine, body: ChatRequest, use: ToolUse | None, params: SamplingParams
) -> SamplingParams:
    """`params` that hold the answer to what the body wants it to look like. Raises RequestError."""
    if use is None:
        return await structured_params(engine, params, body)
    if use.tag_is_special:
        params = replace(params, skip_special_tokens=False)
    limits = engine.settings.limits
    return await compiled_params(engine, params, partial(use.source, body, limits))


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
        _layout, engine, plain, tools=tools, add_generation_prompt=add_generation_prompt
    )
    with prompt_is("messages"):
        [tokens] = await encode(engine, [text], special=False)
    return tokens


def _layout(engine: AsyncEngine, messages: list[Any], *, tools: Any, add_generation_prompt: bool) -> str:
    """The text of a conversation under the model's chat template, whether or not that knows tools."""
    if not knows_tools(engine.tokenizer):
        messages, tools = told_in_words(messages, tools), None
    return engine.tokenizer.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)


async def _context(engine: AsyncEngine, body: ChatRequest, tools: Any, prompt: list[int]) -> int | None:
    """How many tokens of the prompt are of the messages to compress. Raises RequestError (compress_upto)."""
    if body.compress_upto is None:
        return None
    knows_developer = _template_knows("developer", engine)
    plain = [message.for_template(knows_developer=knows_developer) for message in body.messages]
    render = partial(_layout, engine, tools=tools, add_generation_prompt=False)
    return await asyncio.to_thread(
        context_tokens, engine.tokenizer, render, plain, body.compress_upto, prompt
    )


def _whole(
    engine: AsyncEngine, answer: RequestOutput, usage: Usage, head: dict[str, Any], use: ToolUse | None
) -> ChatResponse:
    extra: dict[str, Any] = {}
    if answer.prompt_logprobs is not None:
        extra["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs, engine.tokenizer)
    choices = [_choice(completion, engine, use) for completion in answer.completions]
    return ChatResponse(**head, object="chat.completion", choices=choices, usage=usage, **extra)


def _choice(completion: Completion, engine: AsyncEngine, use: ToolUse | None) -> ChatChoice:
    entries = completion.logprobs
    message = ChatMessage(role="assistant", content=completion.text, refusal=None)
    reason: ChatFinishReason | None = completion.finish_reason
    if use is not None:
        content, calls = read_calls(use, completion.text)
        if calls:
            message = ChatMessage(role="assistant", content=content or None, refusal=None, tool_calls=calls)
            reason = "tool_calls" if reason == "stop" else reason
    return ChatChoice(
        index=completion.index,
        message=message,
        logprobs=None if entries is None else chat_logprobs(entries, engine.tokenizer),
        finish_reason=reason,
        stop_reason=completion.stop_reason,
    )


async def _stream(
    engine: AsyncEngine,
    body: ChatRequest,
    request: Request,
    generation: Generation,
    head: dict[str, Any],
    use: ToolUse | None,
) -> Response:
    try:
        outputs = await until_disconnect(request.receive, primed(generation.outputs()))
    except BaseException:
        await generation.aclose()
        raise
    chunks = _chunks(engine, generation, outputs, head, use, include_usage=body.include_usage)
    return EventStream(chunks, generation)


def _gained(piece: str | ToolCallDelta) -> ChatDelta:
    return ChatDelta(content=piece) if isinstance(piece, str) else ChatDelta(tool_calls=[piece])


async def _chunks(
    engine: AsyncEngine,
    generation: Generation,
    outputs: Outputs,
    head: dict[str, Any],
    use: ToolUse | None,
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
        finish_reason: ChatFinishReason | None = None,
        **reason: Any,
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason, **reason
        )
        return ChatChunk(**head, choices=[choice], **tail)

    for index in range(generation.params.n):
        yield chunk(index, ChatDelta(role="assistant", content=""))
    writers = [CallWriter(use) for _ in range(generation.params.n)] if use is not None else []
    async for _, step in outputs:
        for delta in step.deltas:
            entries = chat_logprobs(delta.logprobs, engine.tokenizer) if delta.logprobs else None
            reason: ChatFinishReason | None = delta.finish_reason
            if writers:
                writer = writers[delta.index]
                for piece in writer.push(delta.text, last=reason is not None):
                    yield chunk(delta.index, _gained(piece), entries)
                    entries = None  # once
                if entries:
                    yield chunk(delta.index, ChatDelta(), entries)
                if reason == "stop" and writer.called:
                    reason = "tool_calls"
            elif delta.text or entries:
                yield chunk(delta.index, ChatDelta(content=delta.text), entries)
            if reason:
                yield chunk(delta.index, ChatDelta(), None, reason, stop_reason=delta.stop_reason)
    if include_usage:
        yield ChatChunk(**head, choices=[], usage=generation.usage())
