"""Requests that can never be served, refused before they are queued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenloom.engine.request import Request
from tokenloom.errors import RequestError

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine


def validate(engine: Engine, request: Request) -> None:
    """See `Engine.validate`."""
    prompt, params, vocab = request.prompt, request.params, engine.config.vocab_size
    if not prompt:
        raise RequestError("prompt is empty: it must have at least one token", param="prompt")
    policy = None
    if request.kv is not None:
        if any(layer.window is not None for layer in engine.decoder.layers):
            raise RequestError("kv: this model's layers read a sliding window already", param="kv")
        scheduler = engine.settings.scheduler
        request.kv.check(scheduler.max_batch_tokens, scheduler.max_running, engine.kv.quantized)
        policy = request.kv.policy(request.shape(engine.config, engine.name))  # RequestError if it cannot be
    if request.compress_upto is not None:
        if policy is None or not policy.heeds_context:
            raise RequestError(
                "compress_upto: needs a kv method that compresses a prompt once, such as snapkv",
                param="compress_upto",
            )
        if not 1 <= request.compress_upto <= len(prompt):
            raise RequestError(
                f"compress_upto: it is {request.compress_upto}; the prompt has {len(prompt)} tokens",
                param="compress_upto",
            )
    context = engine.context(policy)
    generated = 0 if request.kind == "embed" else min(1, params.max_tokens or 1)
    if len(prompt) + generated > context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; this model's context is {context} tokens, "
            f"prompt and answer together",
            param="prompt",
            code="context_length_exceeded",
        )
    pool_tokens = engine.pool.num_blocks * engine.pool.block_size
    if len(prompt) + generated > pool_tokens:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; the whole KV pool holds {pool_tokens} "
            f"({engine.pool.num_blocks} blocks of {engine.pool.block_size})",
            param="prompt",
            code="context_length_exceeded",
        )
    bad = next((t for t in prompt if not 0 <= t < vocab), None)
    if bad is not None:
        raise RequestError(f"prompt has token id {bad}; ids are from 0 to {vocab - 1}", param="prompt")
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        bad = next((t for t in ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"{name} has token id {bad}; ids are from 0 to {vocab - 1}", param=name)
    if request.draft is not None:
        if request.kv is not None and not request.kv.keeps_all:
            raise RequestError("draft: does not go together with kv yet; drop one of them", param="draft")
        request.draft.check(engine)
    if params.n > engine.settings.scheduler.max_running:
        raise RequestError(
            f"n is {params.n}; this server runs at most {engine.settings.scheduler.max_running} sequences",
            param="n",
        )
