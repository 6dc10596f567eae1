"""POST /v1/completions, with `echo` and `logprobs` so that evaluation harnesses can score through it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import Completion, Delta
from tokenloom.errors import RequestError
from tokenloom.serve.completions_protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
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
from tokenloom.serve.logprobs import CompletionLogprobsWriter, joined, prompt_logprobs
from tokenloom.serve.models import Models
from tokenloom.serve.streaming import EventStream, documented, primed
from tokenloom.serve.structured_output import structured_params

DEFAULT_MAX_TOKENS = 16


def completions_router(engine: AsyncEngine, models: Models) -> APIRouter:
    """The completions route over one engine."""
    router = APIRouter(prefix="/v1", tags=["completions"], responses=ERROR_RESPONSES, route_class=JSONRoute)

    @router.post("/completions", response_model=CompletionResponse, responses=documented(CompletionResponse))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt. Choices are numbered prompt by prompt, `n` to each."""
        adapter = await models.resolve(body.model)
        prompts = await token_prompts(engine, body.prompt, "prompt")
        scores_prompt = body.echo and body.logprobs is not None
        default = min(DEFAULT_MAX_TOKENS, engine.settings.limits.max_tokens or DEFAULT_MAX_TOKENS)
        params = sampling_params(
            body,
            engine.settings.limits,
            max_tokens=default if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if scores_prompt else body.prompt_logprobs,
        )
        params = await structured_params(engine, params, body)
        with prompt_is("prompt"):
            generation = await Generation.start(engine, body, prompts, params, adapter, body.compress_upto)
        answer = _Answer(engine, body, generation)
        if body.stream:
            try:
                outputs = await until_disconnect(request.receive, primed(generation.outputs()))
            except BaseException:
                await generation.aclose()
                raise
            return EventStream(answer.chunks(outputs), generation)
        try:
            await until_disconnect(request.receive, generation.finish())
        finally:
            await generation.aclose()
        return await write_json(answer.whole)

    return router


async def token_prompts(engine: AsyncEngine, prompt: Any, field: str) -> list[list[int]]:
    """The token ids of each prompt, whichever of the four forms it came in.

    Raises RequestError naming `field` if there are too many, or if one is not text.
    """
    many = _many(prompt)
    limit = engine.settings.limits.max_prompts
    if len(many) > limit:
        raise RequestError(f"{field}: has {len(many)} entries; at most {limit} are allowed", param=field)
    if not isinstance(many[0], str):
        return many
    with prompt_is(field):
        return await encode(engine, many)


def _many(prompt: Any) -> list[Any]:
    one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
    return [prompt] if one else prompt


class _Answer:
    """Writes what a generation yields as choices of one completions answer."""

    def __init__(self, engine: AsyncEngine, body: CompletionRequest, generation: Generation) -> None:
        self.engine = engine
        self.body = body
        self.generation = generation
        self.prompts = _many(body.prompt)
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def whole(self) -> CompletionResponse:
        """The finished answer."""
        choices = [
            self._choice(number, completion, self._writer(), is_first=True)
            for number, answer in enumerate(self.generation.answers)
            for completion in answer.completions
        ]
        return CompletionResponse(**self.head, choices=choices, usage=self.generation.usage())

    async def chunks(self, outputs: Outputs) -> AsyncIterator[CompletionResponse]:
        """One event for each piece of each choice, and at last the usage if it was asked for."""
        tail: dict[str, Any] = {"usage": None} if self.body.include_usage else {}
        writers: dict[tuple[int, int], CompletionLogprobsWriter] = {}
        async for number, step in outputs:
            for delta in step.deltas:
                key = (number, delta.index)
                is_first = key not in writers
                writer = writers.setdefault(key, self._writer())
                choice = self._choice(number, delta, writer, is_first=is_first)
                if choice.text or choice.logprobs or choice.finish_reason:
                    yield CompletionResponse(**self.head, choices=[choice], **tail)
        if self.body.include_usage:
            yield CompletionResponse(**self.head, choices=[], usage=self.generation.usage())

    def _writer(self) -> CompletionLogprobsWriter:
        skip = self.generation.params.skip_special_tokens
        return CompletionLogprobsWriter(self.engine.tokenizer, skip_special_tokens=skip)

    def _choice(
        self, number: int, piece: Completion | Delta, writer: CompletionLogprobsWriter, *, is_first: bool
    ) -> CompletionChoice:
        """`piece` is a whole choice, or what one gained; the first one brings the echo of the prompt."""
        answer, text, extra = self.generation.answers[number], piece.text, dict[str, Any]()
        parts: list[CompletionLogprobs] = []
        if self.body.echo and is_first:
            echoed = self._echo(number)
            text = echoed + text
            if self.body.logprobs is not None:
                scored = answer.prompt_logprobs or []
                parts.append(writer.write_prompt(answer.prompt_token_ids, scored, echoed))
        if piece.logprobs:
            parts.append(writer.write(piece.token_ids, piece.logprobs))
        if self.body.prompt_logprobs is not None and answer.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs, self.engine.tokenizer)
        return CompletionChoice(
            index=number * self.generation.params.n + piece.index,
            text=text,
            logprobs=joined(parts) if parts else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            **extra,
        )

    def _echo(self, number: int) -> str:
        prompt = self.prompts[number]
        if isinstance(prompt, str):
            return prompt
        return self.engine.tokenizer.decode(prompt, skip_special_tokens=False)
