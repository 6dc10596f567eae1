"""A tiny random model that must do as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny_models import build_tiny
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Completion, RequestOutput, collect
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.methods.defaults import with_methods
from tokenloom.methods.drafting import draft_method
from tokenloom.models.loader import ModelFiles, open_model
from tokenloom.structured import Structured, grammars_of

PROMPT = [104, 101, 108, 108, 111]


def tiny_files(folder: Path) -> ModelFiles:
    return open_model(str(build_tiny(folder, "llama", torch.float32)[0]))


def build_engine(files: ModelFiles, **flags: Any) -> Engine:
    defaults = {
        "model.dtype": "float64",
        "model.backend": "reference",
        "cache.block_size": 4,
        "cache.kv_bytes": 2**22,
        "drafting.persist": False,
    }
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return Engine(with_methods(load_settings({**defaults, **keys})), files)


def ask(
    engine: Engine, wanted: Structured | None = None, name: str = "r", draft: str = "", **params: Any
) -> Request:
    """A request of at most 400 tokens, drawn with seed 0 unless told otherwise."""
    if wanted is not None:
        params["processors"] = (grammars_of(engine).compile(wanted),)
    prompt = params.pop("prompt", PROMPT)
    chosen = SamplingParams(**{"seed": 0, "max_tokens": 400, **params})
    return Request(name, prompt, chosen, draft=draft_method(draft) if draft else None)


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    outputs = {
        r.request_id: RequestOutput(r.request_id, r.prompt, [Completion(i) for i in range(r.params.n)])
        for r in requests
    }
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            collect(outputs[output.request_id], output)
    assert engine.pool.num_used == 0
    return list(outputs.values())


def answer(engine: Engine, wanted: Structured | None = None, **params: Any) -> Completion:
    """The first choice of one request."""
    return run(engine, ask(engine, wanted, **params))[0].completions[0]
