"""Engines on tiny models, and requests under KV methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny_models import build_tiny
from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_table import BlockTable
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Completion, RequestOutput, collect
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.methods.defaults import with_methods
from tokenloom.methods.kv import combine
from tokenloom.models.loader import ModelFiles, open_model

BLOCK = 4


def tiny_files(folder: Path, **overrides: Any) -> ModelFiles:
    """A model of 3 layers (unless told otherwise), 4 query heads and 2 kv heads of width 16."""
    path, _ = build_tiny(folder, "llama", torch.float32, **{"num_hidden_layers": 3, **overrides})
    return open_model(str(path))


def build_engine(files: ModelFiles, **flags: Any) -> Engine:
    defaults = {"model.dtype": "float64", "cache.block_size": BLOCK, "cache.kv_bytes": 2**22}
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return Engine(with_methods(load_settings({**defaults, **keys})), files)


def request(
    prompt: list[int],
    kv: str = "",
    name: str = "r",
    *,
    max_tokens: int | None = 12,
    n: int = 1,
    **params: Any,
) -> Request:
    chosen: dict[str, Any] = {"temperature": 0.0, "logprobs": 2, "ignore_eos": True, **params}
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n, **chosen), kv=combine(kv))


def run(engine: Engine, *requests: Request, watch: Any = None) -> list[RequestOutput]:
    """Run to the end; `watch` is called after every step."""
    outputs = {
        r.request_id: RequestOutput(r.request_id, r.prompt, [Completion(i) for i in range(r.params.n)])
        for r in requests
    }
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            collect(outputs[output.request_id], output)
        engine.pool.check()
        if watch is not None:
            watch()
    assert engine.pool.num_used == 0
    return list(outputs.values())


def answer(engine: Engine, prompt: list[int], kv: str = "", **options: Any) -> RequestOutput:
    return run(engine, request(prompt, kv, **options))[0]


def tokens(output: RequestOutput) -> list[list[int]]:
    return [choice.token_ids for choice in output.completions]


def bits(output: RequestOutput) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities."""
    return [[(e.token_id, e.logprob) for e in choice.logprobs or []] for choice in output.completions]


def same(actual: RequestOutput, expected: RequestOutput, tolerance: float = 1e-9) -> None:
    for got, want in zip(actual.completions, expected.completions, strict=True):
        assert got.token_ids == want.token_ids
        for a, b in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert abs(a.logprob - b.logprob) <= tolerance


def text_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def dense_logprob(engine: Engine, kept: list[int], token: int) -> float:
    """Of a token after these, at positions 0, 1, 2, ..."""
    table, builder = BlockTable(engine.pool), BatchBuilder(engine.device)
    table.grow(len(kept))
    builder.add(
        SegmentKind.PREFILL, kept, table.blocks, kv_start=0, block_size=BLOCK, contiguous=table.contiguous
    )
    hidden = engine.decoder.forward(builder.build(), engine.kv)
    table.clear()
    return float(engine.decoder.logits(hidden[-1:])[0].log_softmax(-1)[token])
