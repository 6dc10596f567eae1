"""From what a body says of its answer's form to a compiled grammar in its sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.serve.response_format import StructuredFields
from tokenloom.structured import Source, grammars_of


async def structured_params(
    engine: AsyncEngine, params: SamplingParams, body: StructuredFields
) -> SamplingParams:
    """`params` with the grammar that the body's fields ask for, if any.

    Raises:
        RequestError: naming the field: it is not well-formed, or too large, deep, slow or complex to compile.
    """
    if body.structured is None:
        return params
    return await compiled_params(engine, params, partial(body.structured_source, engine.settings.limits))


async def compiled_params(
    engine: AsyncEngine, params: SamplingParams, source: Callable[[], Source | None]
) -> SamplingParams:
    """`params` with the grammar of `source`, which is made and compiled off the event loop."""
    found = await asyncio.to_thread(source)
    if found is None:
        return params
    grammar = await grammars_of(engine.engine).compile_async(found)
    return replace(params, processors=(*params.processors, grammar))
