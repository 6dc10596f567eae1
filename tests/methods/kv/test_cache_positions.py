"""streaming(positions=cache): what is kept is read as if nothing else had been written, without end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kv_rig import (
    BLOCK,
    answer,
    bits,
    build_engine,
    dense_logprob,
    request,
    run,
    same,
    text_of,
    tiny_files,
    tokens,
)
from tokenloom.batch import Batch
from tokenloom.cache.kv_cache import KVCache
from tokenloom.engine.scheduler import Plan
from tokenloom.errors import RequestError
from tokenloom.kernels import get_kernels
from tokenloom.methods.kv.rotation import turned
from tokenloom.models.config import RopeConfig
from tokenloom.models.loader import ModelFiles
from tokenloom.models.rope import Rope

SPEC = "streaming(budget=16, positions=cache)"
CONTEXT = 64


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Its keys depend on a token and its position alone: a dense run over some tokens is the truth."""
    folder = tmp_path_factory.mktemp("one")
    return tiny_files(folder, num_hidden_layers=1, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"), max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("length", [10, 40])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_logits_are_those_of_the_kept_tokens_alone(one_layer: ModelFiles, length: int, cache: str) -> None:
    engine = build_engine(one_layer, cache__dtype=cache, cache__prefix_caching=False)
    truth = build_engine(one_layer)
    prompt = text_of(4, length)
    output = answer(engine, prompt, SPEC, max_tokens=200)
    written, entries = prompt + tokens(output)[0], output.completions[0].logprobs or []
    for n in range(length + 1, length + 200):
        # The row of token n - 1 reads the first 4, the last 12 before it, and itself.
        kept = written[:n] if n <= 17 else written[:4] + written[n - 13 : n]
        entry = entries[n - length]
        tolerance = 1e-4 if cache == "auto" else 0.1
        assert abs(dense_logprob(truth, kept, entry.token_id) - entry.logprob) < tolerance


def test_an_answer_beyond_the_context_takes_constant_memory(files: ModelFiles) -> None:
    engine, used, largest = build_engine(files, cache__prefix_caching=False), [], []
    forward = engine.decoder.forward

    def spy(batch: Batch, kv: KVCache) -> Tensor:
        largest.append(int(batch.positions.max()))
        return forward(batch, kv)

    engine.decoder.forward = spy  # type: ignore[method-assign]
    outputs = run(
        engine, request(text_of(3, 50), SPEC, max_tokens=500), watch=lambda: used.append(engine.pool.num_used)
    )
    assert len(tokens(outputs[0])[0]) == 500
    assert set(used[1:-1]) == {16 // BLOCK + 1}
    assert max(largest) == CONTEXT - 1  # and no further


@pytest.mark.parametrize("spec", ["off", "streaming(budget=16)"])
def test_others_end_with_the_context(files: ModelFiles, spec: str) -> None:
    output = answer(build_engine(files), text_of(3, 50), spec, max_tokens=500)
    assert len(tokens(output)[0]) == CONTEXT - 50


def test_the_settings_limit_and_an_answer_without_one_hold(files: ModelFiles) -> None:
    limited = build_engine(files, model__max_model_len=60)
    assert len(tokens(answer(limited, text_of(3, 50), SPEC, max_tokens=500))[0]) == 10
    endless = answer(build_engine(files), text_of(3, 50), SPEC, max_tokens=None)
    assert len(tokens(endless)[0]) == CONTEXT - 50


def test_nothing_is_different_while_all_fits(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    spec = "streaming(budget=500, positions=cache)"
    assert bits(answer(engine, text_of(3, 40), spec, max_tokens=20)) == bits(
        answer(engine, text_of(3, 40), "off", max_tokens=20)
    )


def test_a_long_stream_is_the_same_after_preemption_and_among_forks(files: ModelFiles) -> None:
    roomy = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    options: dict[str, Any] = {"max_tokens": 150, "temperature": 1.0, "seed": 5}
    prompt = text_of(1, 30)
    alone = answer(roomy, prompt, SPEC, **options)
    # Fewer tokens fit in all than this answer has when it is interrupted.
    tight = build_engine(files, model__backend="reference", cache__kv_bytes=3 * 2 * 2 * 16 * 8 * BLOCK * 12)
    scheduler, steps = tight.scheduler, iter(range(10**6))

    def interrupt() -> None:
        if next(steps) == 100:
            scheduler._preempt(Plan(), scheduler.running[0])

    same(run(tight, request(prompt, SPEC, **options), watch=interrupt)[0], alone)
    assert scheduler.num_preemptions == 1
    both = answer(roomy, prompt, SPEC, n=2, **options)
    assert tokens(both)[0] == tokens(alone)[0] != tokens(both)[1]


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_keys_turn_to_where_rope_would_have_put_them(kind: str) -> None:
    rope = Rope(RopeConfig(10000.0, kind, factor=4.0, original_max_position=32), 16, 200)
    kernels = get_kernels("torch")
    raw, old, new = torch.randn(6, 2, 16).double(), torch.arange(40, 46), torch.arange(3, 9)
    at_old, at_new = (
        kernels.rope(raw, kernels.rotation(*rope.cos_sin(at), torch.float64)) for at in (old, new)
    )
    assert (at_old - at_new).abs().max() > 1
    torch.testing.assert_close(turned(at_old, old, new, rope.cos_sin), at_new, atol=1e-5, rtol=0)


def test_more_first_tokens_than_positions_are_refused(files: ModelFiles) -> None:
    with pytest.raises(RequestError, match="sinks is 63; the model knows 64 positions"):
        build_engine(files).add(request(text_of(1, 20), "streaming(sinks=63, positions=cache)"))
