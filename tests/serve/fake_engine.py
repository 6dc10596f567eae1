"""An engine without a model: it spells the alphabet, slowly if asked to, and fails on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tiny_models import CHAT_TEMPLATE, EOS_ID, tiny_tokenizer
from tokenloom.cache.block_pool import BlockPool
from tokenloom.config import Settings
from tokenloom.engine.adapters import AdapterRegistry, LoadedAdapter
from tokenloom.engine.outputs import Delta, StepOutput, TokenLogprob
from tokenloom.engine.overview import BlocksOverview, Overview
from tokenloom.engine.request import Request, Sequence
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.stats import EngineStats, RequestTiming
from tokenloom.errors import EngineStoppedError, RequestError
from tokenloom.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@dataclass
class Call:
    """What `generate` was asked for."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    kv: Any
    draft: Any = None
    compress_upto: int | None = None


class FakeEngine:
    """Choice `index` answers with letters from `seed + index` on, one in each step of `step_s` seconds."""

    model_name = "fake"
    max_model_len = 512

    def __init__(
        self, settings: Settings, *, step_s: float = 0.0, chat_template: str = CHAT_TEMPLATE
    ) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer(tiny_tokenizer(), SPECIAL, {"default": chat_template}, "fake")
        self.engine = SimpleNamespace(
            adapters=AdapterRegistry(settings.adapters.max_loaded),
            tokenizer=self.tokenizer,
            config=SimpleNamespace(vocab_size=self.tokenizer.vocab_size),
            end_tokens=(EOS_ID,),
            settings=settings,
        )
        self.alive = False
        self.failed = False
        self.draining = False
        self.running = 0
        self.abort_all = False
        self.observe: Callable[[Any], None] = lambda stream: None
        self.seen = Overview([], 0, BlocksOverview(16, "rrffffff"), [], False, [])
        self.behave(step_s)

    def behave(self, step_s: float = 0.0) -> None:
        """Forget what was asked, and what it was told to do wrong."""
        self.step_s = step_s
        self.calls: list[Call] = []
        self.most_running = 0
        self.aborted: list[str] = []
        self.refuse: Exception | None = None
        self.fail_at: int | None = None
        self.stop_at: int | None = None
        self.break_at: int | None = None
        self.counters = EngineStats(kv_blocks_total=8, kv_blocks_used=2, iterations=5, batch_tokens=50)

    @property
    def ready(self) -> bool:
        return self.alive and not self.draining

    def start(self) -> None:
        self.alive = True

    def shutdown(self) -> None:
        self.alive = False

    async def drain(self, timeout_s: float) -> None:
        self.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.running and loop.time() < deadline:
            await asyncio.sleep(0.005)
        self.abort_all = True

    def stats(self) -> EngineStats:
        return self.counters

    def overview(self) -> Overview:
        return self.seen

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: LoadedAdapter | None = None,
        kv: Any = None,
        draft: Any = None,
        compress_upto: int | None = None,
    ) -> FakeStream:
        self._admit(prompt_token_ids)
        call = Call(request_id, prompt_token_ids, params, priority, cache_salt, kv, draft, compress_upto)
        self.calls.append(call)
        stream = FakeStream(self, call, adapter)
        self.observe(stream)
        return stream

    async def embed(
        self, prompt_token_ids: list[int], *, request_id: str, adapter: LoadedAdapter | None = None
    ) -> list[float]:
        self._admit(prompt_token_ids)
        params = SamplingParams(max_tokens=0)
        request = Request(request_id, prompt_token_ids, params, kind="embed", adapter=adapter)
        self.observe(SimpleNamespace(request=request))
        try:
            await asyncio.sleep(self.step_s)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            raise
        return [float(len(prompt_token_ids)), 0.5, -1.25]

    def _admit(self, prompt: list[int]) -> None:
        if self.refuse is not None:
            raise self.refuse
        if not self.ready:
            raise EngineStoppedError("the server is shutting down")
        if len(prompt) > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; the context is {self.max_model_len}",
                param="prompt",
                code="context_length_exceeded",
            )


class FakeStream(AsyncIterator[StepOutput]):
    """Its `request` tells what the engine's own would: when it was scheduled, and what has been written."""

    def __init__(self, engine: FakeEngine, call: Call, adapter: LoadedAdapter | None = None) -> None:
        self.engine, self.call = engine, call
        self.request = Request(call.request_id, call.prompt, call.params, adapter=adapter)
        self.request.scheduled_s = time.monotonic()
        self.request.cached_tokens = 3
        pool, tokenizer = BlockPool(1, 16), engine.tokenizer
        for index in range(call.params.n):
            self.request.sequences.append(Sequence(self.request, index, pool, tokenizer.detokenizer()))
        self.step = 0
        self.done = False
        engine.running += 1
        engine.most_running = max(engine.most_running, engine.running)

    def _end(self) -> None:
        self.done = True
        self.engine.running -= 1

    async def aclose(self) -> None:
        if not self.done:
            self._end()
            self.engine.aborted.append(self.call.request_id)

    async def __anext__(self) -> StepOutput:
        if self.done:
            raise StopAsyncIteration
        engine, params, step = self.engine, self.call.params, self.step
        await asyncio.sleep(engine.step_s)
        self.step += 1
        if step == engine.break_at:
            raise ZeroDivisionError("secret internals")
        last = step + 1 >= (params.max_tokens if params.max_tokens is not None else engine.max_model_len)
        reason = "stop" if step == engine.stop_at else "length" if last else None
        error = None
        if engine.abort_all:
            reason = "abort"
        elif step == engine.fail_at:
            reason, error = "error", "the engine failed on this request"
        deltas = [self._delta(index, step, reason, error) for index in range(params.n)]
        self.request.first_token_s = self.request.first_token_s or time.monotonic()
        for sequence, delta in zip(self.request.sequences, deltas, strict=True):
            sequence.tokens += delta.token_ids
            sequence.finish_reason = delta.finish_reason
            sequence.last_token_s = time.monotonic()
        if reason is not None:
            self._end()
        prompt_logprobs = None
        if step == 0 and params.prompt_logprobs is not None:
            scored = [_logprob(token, params.prompt_logprobs) for token in self.call.prompt[1:]]
            prompt_logprobs = [None, *scored]
        return StepOutput(self.call.request_id, deltas, reason is not None, prompt_logprobs, cached_tokens=3)

    def _delta(self, index: int, step: int, reason: str | None, error: str | None) -> Delta:
        params = self.call.params
        if params.max_tokens == 0:
            return Delta(index, "", [], finish_reason="length")
        token = ord("a") + ((params.seed or 0) + index + step) % 26
        logprobs = None if params.logprobs is None else [_logprob(token, params.logprobs)]
        return Delta(index, chr(token), [token], logprobs, reason, error=error)  # type: ignore[arg-type]


def _logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, ((token, -0.5), (token + 1, -1.5), (token + 2, -2.5))[:top])


def timing() -> RequestTiming:
    """One finished request."""
    return RequestTiming(0.0, 0.01, 0.2, 1.0, 0.05, 0.19, 0.8, 7, 16, "stop")
