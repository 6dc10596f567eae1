"""Faults put into an engine from outside, and what its answers are without them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.config import load_settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.methods.drafting.combination import draft_method
from tokenloom.methods.kv.combination import combine
from tokenloom.models.loader import open_model

POISON = 7
"""Prompts of the guilty begin with this token; no other holds it."""


def make(folder: Path, **flags: Any) -> AsyncEngine:
    """An engine whose answers do not depend on what else is in a batch."""
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    chosen = {"cache.kv_bytes": 4 * 2**20, "model.dtype": "float64", "model.backend": "reference", **keys}
    return AsyncEngine(Engine(load_settings(chosen), open_model(str(folder))))


def patch_forward(target: AsyncEngine, fault: Callable[[Batch, Tensor], None]) -> None:
    """Have `fault` look at each batch and at its hidden states before the engine does."""
    forward = target.engine.decoder.forward

    def faulty(batch: Batch, kv: KVCache) -> Tensor:
        hidden = forward(batch, kv)
        fault(batch, hidden)
        return hidden

    target.engine.decoder.forward = faulty  # type: ignore[method-assign]


def poisoned(target: AsyncEngine, batch: Batch) -> list[slice]:
    """Rows of the sequences whose prompt begins with POISON."""
    guilty = {
        s.table.blocks[0] for s in target.engine.scheduler.running if s.tokens[0] == POISON and s.table.blocks
    }
    return [s.span.rows for s in batch.segments if s.span.blocks[0] in guilty]


def params(i: int, max_tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=1, seed=i, max_tokens=max_tokens, ignore_eos=True, **fields)


async def answer(
    target: AsyncEngine, prompt: list[int], i: int, kv: str = "", draft: str = "", **fields: Any
) -> Any:
    """Tokens of each choice, the text, and how it ended."""
    chosen = params(i, **fields)
    tokens: dict[int, list[int]] = {n: [] for n in range(chosen.n)}
    text, ends, errors = "", [], []
    methods: dict[str, Any] = {"kv": combine(kv), "draft": draft_method(draft)}
    async for output in target.generate(prompt, chosen, request_id=f"r{i}", **methods):
        for delta in output.deltas:
            tokens[delta.index] += delta.token_ids
            text += delta.text if delta.index == 0 else ""
            ends += [delta.finish_reason] if delta.finish_reason else []
            errors += [delta.error] if delta.error else []
    return tokens, text, ends, errors


async def answers(target: AsyncEngine, guilty: list[int], count: int = 6, **fields: Any) -> list[Any]:
    """Of `count` requests at the same time, those in `guilty` poisoned."""
    prompts = [[POISON if i in guilty else 20 + i, *range(30, 40 + i)] for i in range(count)]
    return await asyncio.gather(*(answer(target, p, i, **fields) for i, p in enumerate(prompts)))


def healthy_answers(folder: Path, **fields: Any) -> list[Any]:
    """The same of an engine on which nothing goes wrong."""

    async def ask() -> list[Any]:
        target = make(folder)
        target.start()
        try:
            return await answers(target, [], **fields)
        finally:
            await asyncio.to_thread(target.shutdown)

    return asyncio.run(ask())


async def settled(target: AsyncEngine) -> None:
    """Wait until nothing runs."""
    for _ in range(500):
        if not target.engine.requests and not target._inbox:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests are still there")
