"""However a request is batched, chunked, cached or preempted, its answer is the same.

In float64 a tiny model's logits differ by rounding only, so tokens must be equal and log-probabilities
equal to 1e-9; on the reference backend every bit must be equal, in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny_models import build_tiny
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Completion, RequestOutput, collect
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import native
from tokenloom.models.loader import ModelFiles, open_model

VOCAB = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder, _ = build_tiny(tmp_path_factory.mktemp("llama"), "llama")
    return open_model(str(folder))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder, _ = build_tiny(tmp_path_factory.mktemp("mistral"), "mistral")
    return open_model(str(folder))


def engine(files: ModelFiles, **flags: Any) -> Engine:
    defaults = {"model.dtype": "float64", "cache.block_size": 4, "cache.kv_bytes": 4 * 2**20}
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return Engine(load_settings({**defaults, **keys}), files)


def run(target: Engine, requests: list[Request], arrive: list[int] | None = None) -> list[RequestOutput]:
    """Run to the end; request i joins before step `arrive[i]`."""
    outputs = {
        r.request_id: RequestOutput(r.request_id, r.prompt, [Completion(i) for i in range(r.params.n)])
        for r in requests
    }
    pending = sorted(zip(arrive or [0] * len(requests), range(len(requests)), strict=True))
    step = 0
    while pending or target.has_work:
        while pending and (pending[0][0] <= step or not target.has_work):
            target.add(requests[pending.pop(0)[1]])
        for output in target.step():
            collect(outputs[output.request_id], output)
        target.pool.check()
        step += 1
        assert step < 5000
    assert target.pool.num_used == 0
    assert not target.requests
    return list(outputs.values())


def same(actual: RequestOutput, expected: RequestOutput, tolerance: float = 1e-9) -> None:
    for got, want in zip(actual.completions, expected.completions, strict=True):
        assert got.token_ids == want.token_ids
        assert (got.text, got.finish_reason) == (want.text, want.finish_reason)
        for a, b in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert abs(a.logprob - b.logprob) <= tolerance
            assert a.token_id == b.token_id


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[tuple[list[int], SamplingParams]], list[int]]:
    """Requests that partly share prefixes, with parameters of all kinds, and when each arrives."""
    shared = draw(prompts)
    requests = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from([[], shared, shared[: len(shared) // 2]])) + draw(prompts)
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1.0])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            presence_penalty=draw(st.sampled_from([0.0, 0.5])),
            max_tokens=draw(st.integers(1, 12)),
            n=draw(st.sampled_from([1, 1, 2, 3])),
            seed=draw(st.integers(0, 1000)),
            ignore_eos=True,
            logprobs=0,
        )
        requests.append((prompt, params))
    return requests, draw(st.lists(st.integers(0, 12), min_size=len(requests), max_size=len(requests)))


def check_mix(
    files: ModelFiles,
    mix: tuple[list[tuple[list[int], SamplingParams]], list[int]],
    tolerance: float,
    **flags: Any,
) -> Engine:
    requests, arrive = mix
    mixed = engine(files, **flags)
    outputs = run(mixed, [Request(f"r{i}", p, s) for i, (p, s) in enumerate(requests)], arrive)
    plain = {k: v for k, v in flags.items() if k.startswith(("model", "cache__dtype"))}
    for i, (prompt, params) in enumerate(requests):
        fresh = engine(files, cache__prefix_caching=False, **plain)
        same(outputs[i], run(fresh, [Request(f"r{i}", prompt, params)])[0], tolerance)
    return mixed


relaxed = settings(
    max_examples=18, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(mixes())
def test_batched_equals_alone(files: ModelFiles, mix: Any) -> None:
    check_mix(files, mix, 1e-9, cache__prefix_caching=False)


@relaxed
@given(mixes(), st.integers(1, 9))
def test_any_chunk_size_equals_one_shot(files: ModelFiles, mix: Any, rows: int) -> None:
    check_mix(files, mix, 1e-9, cache__prefix_caching=False, scheduler__max_batch_tokens=rows)


@relaxed
@given(mixes())
def test_prefix_hits_equal_misses(files: ModelFiles, mix: Any) -> None:
    check_mix(files, mix, 1e-9)


@relaxed
@given(mixes(), st.integers(1, 9))
def test_sliding_windows_survive_all_of_it(sliding: ModelFiles, mix: Any, rows: int) -> None:
    check_mix(sliding, mix, 1e-9, scheduler__max_batch_tokens=rows)


def tight_pool(files: ModelFiles, tokens: int) -> int:
    config = files.config
    return tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 8


@relaxed
@given(mixes(), st.integers(3, 64))
def test_preempted_equals_undisturbed(files: ModelFiles, mix: Any, rows: int) -> None:
    check_mix(files, mix, 1e-9, cache__kv_bytes=tight_pool(files, 100), scheduler__max_batch_tokens=rows)


@settings(relaxed, max_examples=12)
@given(mixes(), st.integers(3, 64), st.sampled_from(["none", "host"]), st.sampled_from([3, 64]))
def test_levels_and_swaps_equal_undisturbed(
    files: ModelFiles, mix: Any, rows: int, tier: str, running: int
) -> None:
    check_mix(
        files,
        mix,
        1e-9,
        cache__kv_bytes=tight_pool(files, 100),
        cache__tier=tier,
        scheduler__policy="mlfq",
        scheduler__mlfq_quantum=4,
        scheduler__max_batch_tokens=rows,
        scheduler__max_running=running,
    )


def test_a_tight_pool_does_preempt(files: ModelFiles) -> None:
    target = engine(files, cache__kv_bytes=tight_pool(files, 96))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = run(target, [Request(f"r{i}", [i + 1] * 20, params) for i in range(3)])
    assert target.stats().preemptions > 0
    assert all(len(o.completions[0].token_ids) == 40 for o in outputs)


@settings(relaxed, max_examples=10)
@given(mixes(), st.integers(3, 30), st.sampled_from(["float32", "float64"]))
def test_reference_backend_is_bit_identical_in_any_batch(
    files: ModelFiles, mix: Any, rows: int, dtype: str
) -> None:
    size = 8 if dtype == "float64" else 4
    check_mix(
        files,
        mix,
        0.0,
        model__backend="reference",
        model__dtype=dtype,
        cache__kv_bytes=tight_pool(files, 140) * size // 8,
        scheduler__max_batch_tokens=rows,
    )


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
@settings(relaxed, max_examples=10)
@given(mixes(), st.integers(3, 30), st.sampled_from(["q8", "q4"]), st.sampled_from(["auto", "int8"]))
def test_packed_weights_are_bit_identical_in_any_batch(
    files: ModelFiles, mix: Any, rows: int, quantize: str, kv_dtype: str
) -> None:
    mixed = check_mix(
        files,
        mix,
        0.0,
        model__dtype="float32",
        model__quantize=quantize,
        cache__dtype=kv_dtype,
        cache__kv_bytes=tight_pool(files, 140) // 2,
        scheduler__max_batch_tokens=rows,
    )
    assert mixed.decoder.fused is not None


def test_warm_prefix_cache_is_used_and_changes_nothing(files: ModelFiles) -> None:
    target = engine(files)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    prompt = list(range(1, 30))
    cold = run(target, [Request("cold", prompt, params)])[0]
    warm = run(target, [Request("warm", prompt, params)])[0]
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 28)
    same(warm, cold)


def test_salt_separates_tenants(files: ModelFiles) -> None:
    target = engine(files)
    params = SamplingParams(temperature=0, max_tokens=2)
    prompt = list(range(1, 30))
    run(target, [Request("a", prompt, params, cache_salt="a")])
    assert run(target, [Request("b", prompt, params, cache_salt="b")])[0].cached_tokens == 0
    assert run(target, [Request("a2", prompt, params, cache_salt="a")])[0].cached_tokens == 28


@relaxed
@given(mixes(), st.data())
def test_aborts_leave_nothing_behind_and_disturb_nobody(files: ModelFiles, mix: Any, data: Any) -> None:
    requests, _ = mix
    target = engine(files, cache__kv_bytes=tight_pool(files, 160))
    for i, (prompt, params) in enumerate(requests):
        target.add(Request(f"r{i}", prompt, params))
    outputs = {
        f"r{i}": RequestOutput("", p, [Completion(c) for c in range(s.n)])
        for i, (p, s) in enumerate(requests)
    }
    doomed = data.draw(st.sets(st.sampled_from(sorted(outputs)), max_size=len(outputs)))
    at = {name: data.draw(st.integers(0, 6)) for name in doomed}
    step = 0
    while target.has_work:
        for name in [n for n, s in at.items() if s == step]:
            target.abort(name)
        for output in target.step():
            collect(outputs[output.request_id], output)
        target.pool.check()
        step += 1
    assert target.pool.num_used == 0 and not target.requests
    for i, (prompt, params) in enumerate(requests):
        if f"r{i}" not in doomed:
            alone = run(engine(files), [Request("x", prompt, params)])[0]
            same(outputs[f"r{i}"], alone)


def test_priorities_go_first(files: ModelFiles) -> None:
    target = engine(files, scheduler__policy="priority", scheduler__max_running=1)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for name, priority in (("low", 5), ("high", -1), ("middle", 0)):
        target.add(Request(name, [1, 2, 3], params, priority=priority))
    finished = []
    while target.has_work:
        finished += [o.request_id for o in target.step() if o.finished]
    assert finished == ["high", "middle", "low"]


def test_who_has_most_of_its_prompt_in_the_prefix_cache_goes_first(files: ModelFiles) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    warm, half = list(range(40)), [*range(20), *range(100, 120)]

    def order(**flags: Any) -> list[str]:
        target = engine(files, scheduler__policy="lpm", scheduler__max_running=1, **flags)
        run(target, [Request("before", warm, params)])
        for name, prompt in (("none", [199] * 40), ("half", half), ("all", warm), ("all again", warm)):
            target.add(Request(name, prompt, params))
        finished = []
        while target.has_work:
            finished += [o.request_id for o in target.step() if o.finished]
        return finished

    assert order() == ["all", "all again", "half", "none"]
    assert order(scheduler__lpm_wait_s=0.0) == ["none", "half", "all", "all again"]


@pytest.fixture
def small(files: ModelFiles) -> Iterator[Engine]:
    yield engine(files, cache__kv_bytes=tight_pool(files, 64))


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ([], {}, "prompt", "empty"),
        ([10**6], {}, "prompt", "1000000"),
        ([1] * 100, {}, "prompt", "KV pool holds 64"),
        ([1] * 10**4, {}, "prompt", "context"),
        ([1], {"logit_bias": {10**6: 1.0}}, "logit_bias", "1000000"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ([1], {"n": 100}, "n", "64"),
    ],
)
def test_what_can_never_be_served_is_refused(
    small: Engine, prompt: list[int], params: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        small.add(Request("r", prompt, SamplingParams(**params)))
    assert error.value.param == param  # type: ignore[attr-defined]
    assert not small.has_work


def test_an_answer_ends_where_the_pool_or_context_does(small: Engine, files: ModelFiles) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [output] = run(small, [Request("r", [1] * 60, params)])
    assert len(output.completions[0].token_ids) == 4
    assert output.completions[0].finish_reason == "length"
    context = engine(files, model__max_model_len=32)
    [output] = run(context, [Request("r", [1] * 30, params)])
    assert len(output.completions[0].token_ids) == 2
