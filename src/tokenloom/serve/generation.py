"""From a request body to the engine and back: parameters, running prompts, usage, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from tokenloom.config import LimitSettings
from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.outputs import Completion, RequestOutput, StepOutput, collect
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import EngineStoppedError, GenerationError, RequestError
from tokenloom.methods.defaults import methods_of
from tokenloom.serve.key_limits import current_meter, own_salt
from tokenloom.serve.protocol import CachedTokens, CompletionDetails, SamplingFields, Usage
from tokenloom.serve.request_record import engine_id

T = TypeVar("T")
Outputs = AsyncIterator[tuple[int, StepOutput]]

_INLINE_CHARACTERS = 4096


def sampling_params(
    body: SamplingFields,
    limits: LimitSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The engine's parameters for a body. Raises RequestError naming a field that is over `limits`."""
    _check_limit("n", body.n, limits.max_n)
    _check_limit("logprobs", logprobs, limits.max_logprobs)
    _check_limit("prompt_logprobs", prompt_logprobs, limits.max_logprobs)
    if limits.max_tokens:
        _check_limit("max_tokens", max_tokens, limits.max_tokens)
        max_tokens = limits.max_tokens if max_tokens is None else max_tokens
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "stop": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "include_stop": body.include_stop_str_in_output,
        "ignore_eos": body.ignore_eos,
        "n": body.n,
        "seed": body.seed,
        "skip_special_tokens": body.skip_special_tokens,
    }
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        **{name: value for name, value in given.items() if value is not None},
    )


def _check_limit(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise RequestError(f"{name}: is {value}; this server allows at most {limit}", param=name)


def check_total_tokens(
    engine: AsyncEngine, prompts: list[list[int]], params: SamplingParams | None = None
) -> None:
    """Raises RequestError if a request may come to more tokens than `limits.max_total_tokens`: each prompt
    once, and every choice of an answer (none without `params`) as long as it may become."""
    total = sum(map(len, prompts))
    if params is not None:
        for prompt in prompts:
            room = max(0, engine.max_model_len - len(prompt))
            total += params.n * (room if params.max_tokens is None else min(room, params.max_tokens))
    most = engine.settings.limits.max_total_tokens
    if total > most:
        raise RequestError(
            f"max_tokens: prompts and answers may come to {total} tokens; this server allows {most} in one "
            "request. Ask for fewer or shorter answers, or send fewer prompts",
            param="max_tokens" if params is not None else "prompt",
            code="too_many_tokens",
        )


async def encode(engine: AsyncEngine, texts: list[str], *, special: bool = True) -> list[list[int]]:
    """Tokens of each text; much text is done off the event loop. Raises RequestError (param "prompt")."""

    def encode_all() -> list[list[int]]:
        return [engine.tokenizer.encode(text, add_special_tokens=special) for text in texts]

    if sum(map(len, texts)) <= _INLINE_CHARACTERS:
        return encode_all()
    return await asyncio.to_thread(encode_all)


@contextlib.contextmanager
def prompt_is(field: str) -> Iterator[None]:
    """The engine calls what it reads the prompt; make its complaints name the request's own field."""
    try:
        yield
    except RequestError as error:
        if error.param != "prompt":
            raise
        raise RequestError(f"{field}: {error}", param=field, code=error.code) from error


class Generation:
    """The engine's requests behind one HTTP request, one for each prompt, run together.

    `answers` is complete once `outputs` has ended. Must be closed: that aborts whatever still runs.
    """

    def __init__(self, prompts: list[list[int]], params: SamplingParams, max_unread: int) -> None:
        self.params = params
        self.max_unread = max_unread * len(prompts)
        self.answers = [RequestOutput("", p, [Completion(i) for i in range(params.n)]) for p in prompts]
        self._streams: list[AsyncIterator[StepOutput]] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, StepOutput | Exception | None]] = asyncio.Queue()
        self._meter = current_meter()

    @classmethod
    async def start(
        cls,
        engine: AsyncEngine,
        body: SamplingFields,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: LoadedAdapter | None = None,
        compress_upto: int | None = None,
    ) -> Generation:
        """Send every prompt to the engine, or none: if it refuses one, the others are taken back.

        Args:
            compress_upto: tokens of each prompt that `body.kv` compresses before the others are computed.

        Raises:
            RequestError, EngineBusyError, EngineStoppedError: as `AsyncEngine.generate`; and RequestError if
                prompts and answers may come to more tokens than `limits.max_total_tokens`.
            ApiError: the key has no tokens left (429).
        """
        method, guesses = methods_of(engine.settings, body.kv, body.draft)
        check_total_tokens(engine, prompts, params)
        generation = cls(prompts, params, engine.settings.limits.max_unread)
        if generation._meter is not None:
            generation._meter.admit_prompts(sum(map(len, prompts)))
        try:
            for prompt in prompts:
                stream = engine.generate(
                    prompt,
                    params,
                    request_id=engine_id(),
                    priority=body.priority or 0,
                    cache_salt=own_salt(body.cache_salt),
                    adapter=adapter,
                    kv=method,
                    draft=guesses,
                    compress_upto=compress_upto,
                )
                generation._streams.append(stream)
        except BaseException:
            await generation.aclose()
            raise
        generation._pumps = [
            asyncio.create_task(generation._pump(number, stream))
            for number, stream in enumerate(generation._streams)
        ]
        return generation

    async def _pump(self, number: int, stream: AsyncIterator[StepOutput]) -> None:
        try:
            async for step in stream:
                if self._queue.qsize() >= self.max_unread:
                    await stream.aclose()  # type: ignore[attr-defined]
                    raise GenerationError("the answer was ended, since it was read too slowly")
                self._queue.put_nowait((number, step))
            self._queue.put_nowait((number, None))
        except Exception as error:
            self._queue.put_nowait((number, error))

    async def outputs(self) -> Outputs:
        """What the prompts gain, as it comes, each with the prompt's number.

        Raises:
            GenerationError: the engine failed on one of them.
            EngineStoppedError: the engine stopped before they were done.
        """
        running = len(self._streams)
        while running:
            number, step = await self._queue.get()
            if step is None:
                running -= 1
            elif isinstance(step, Exception):
                raise step
            else:
                _check_step(step)
                if self._meter is not None:
                    self._meter.spend(sum(len(delta.token_ids) for delta in step.deltas))
                collect(self.answers[number], step)
                yield number, step

    async def finish(self) -> list[RequestOutput]:
        """Run to the end. Raises as `outputs` does."""
        async for _ in self.outputs():
            continue
        return self.answers

    async def aclose(self) -> None:
        """Abort what still runs; the engine drops it before its next iteration."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()  # type: ignore[attr-defined]

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompt = sum(len(a.prompt_token_ids) for a in self.answers)
        completion = sum(len(c.token_ids) for a in self.answers for c in a.completions)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(a.cached_tokens for a in self.answers)),
            **self._guesses(),
        )

    def _guesses(self) -> dict[str, CompletionDetails]:
        """What became of guessed tokens, if any prompt was drafted for."""
        counts = [answer.drafts for answer in self.answers if answer.drafts is not None]
        if not counts:
            return {}
        longest = max(len(c.accepted_at) for c in counts)
        accepted, tokens = sum(c.accepted for c in counts), sum(c.tokens for c in counts)
        details = CompletionDetails(
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=tokens - accepted,
            draft_passes=sum(c.passes for c in counts),
            accepted_by_position=[
                sum(c.accepted_at[i] for c in counts if i < len(c.accepted_at)) for i in range(longest)
            ],
        )
        return {"completion_tokens_details": details}


def _check_step(step: StepOutput) -> None:
    """What ended a request from the inside must not pass for an answer."""
    for delta in step.deltas:
        if delta.finish_reason == "error" and delta.param is not None:
            raise RequestError(delta.error or "", param=delta.param)
        if delta.finish_reason == "error":
            raise GenerationError(delta.error or "the engine failed on this request")
        if delta.finish_reason == "abort":
            raise EngineStoppedError("the server is shutting down and could not finish this request")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientDisconnect).

    The request's body must have been read before.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
