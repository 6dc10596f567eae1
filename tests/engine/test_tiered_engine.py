"""What went down to the second tier and came back answers as if it had never left."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import build_tiny
from tokenloom.cache.tier import Tier
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import TokenLogprob
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.scheduler import Plan
from tokenloom.methods.kv import combine
from tokenloom.models.loader import open_model

BLOCK = 4
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder, _ = build_tiny(tmp_path_factory.mktemp("llama"), "llama", torch.float32)
    files = open_model(str(folder))

    def build(**flags: Any) -> Engine:
        defaults = {"cache.block_size": BLOCK, "cache.kv_bytes": 2**20, "cache.tier_bytes": 2**20}
        keys = {key.replace("__", "."): value for key, value in flags.items()}
        return Engine(load_settings({**defaults, **keys}), files)

    return build


def request(name: str, length: int, answer: int = 12, **options: Any) -> Request:
    prompt = [(17 * len(name) + ord(name[-1]) + 3 * i) % 200 for i in range(length)]
    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True, logprobs=0)
    return Request(name, prompt, params, **options)


def run(
    engine: Engine, *requests: Request, between: Callable[[], None] = lambda: None
) -> dict[str, list[TokenLogprob | None]]:
    """Serve to the end; tokens with their log-probabilities. `between` is called after each step."""
    found: dict[str, list[TokenLogprob | None]] = {r.request_id: [] for r in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            for delta in output.deltas:
                found[output.request_id] += delta.logprobs or []
        engine.pool.check()
        between()
        assert engine.counters.iterations < 5000
    assert engine.pool.num_used == 0
    return found


def tier_of(engine: Engine) -> Tier:
    assert engine.pool.tier is not None
    return engine.pool.tier


def swap_out(engine: Engine) -> None:
    """Preempt everybody, and take all blocks, so that what is cached has to go down."""
    for sequence in list(engine.scheduler.running):
        engine.scheduler._preempt(Plan(), sequence)
    for block in [engine.pool.allocate() for _ in range(engine.pool.num_available)]:
        engine.pool.release(block)


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_a_forced_swap_of_every_block_leaves_every_bit_of_the_answers(
    make: Make, tmp_path: Path, tier: str, dtype: str
) -> None:
    flags = {"model__backend": "reference", "cache__dtype": dtype}
    lengths = {"a": 21, "b": 40, "c": 9}
    undisturbed = run(make(**flags), *(request(name, n) for name, n in lengths.items()))
    engine, swaps = make(**flags, cache__tier=tier, cache__tier_path=str(tmp_path)), 0

    def swap() -> None:
        nonlocal swaps
        if engine.counters.iterations % 3 == 0 and engine.has_work:
            swaps += len(engine.scheduler.running)
            swap_out(engine)

    assert run(engine, *(request(name, n) for name, n in lengths.items()), between=swap) == undisturbed
    stats = engine.stats()
    assert swaps >= 9 and stats.tier_hits_tokens > 100 and stats.tier_corrupt == 0
    # Only what is not a full block is computed again.
    assert stats.batch_tokens <= sum(lengths.values()) + 3 * 11 + swaps * BLOCK


def test_without_a_tier_the_same_swaps_cost_the_whole_prompts_again(make: Make) -> None:
    engine = make(model__backend="reference")

    def swap() -> None:
        if engine.counters.iterations % 3 == 0 and engine.has_work:
            swap_out(engine)

    run(engine, request("a", 21), request("b", 40), between=swap)
    assert engine.stats().batch_tokens > 61 + 2 * 11 + 61


def test_a_prefix_that_left_the_pool_is_found_by_a_later_request(make: Make) -> None:
    engine = make(cache__tier="host")
    run(engine, request("a", 41))
    swap_out(engine)
    again = request("a", 41)
    run(engine, again)
    assert again.cached_tokens == 40 and engine.stats().tier_hits_tokens == 40


def test_salt_separates_tenants_in_the_tier(make: Make) -> None:
    engine = make(cache__tier="host")
    run(engine, request("a", 41, cache_salt="one"))
    swap_out(engine)
    other, same = request("a", 41, cache_salt="two"), request("a", 41, cache_salt="one")
    run(engine, other)
    assert other.cached_tokens == 0
    run(engine, same)
    assert same.cached_tokens == 40


def test_private_blocks_of_a_kv_policy_do_not_go_down(make: Make) -> None:
    engine = make(cache__tier="host")
    run(engine, request("a", 61, kv=combine("snapkv(budget=16,window=4)")))
    swap_out(engine)
    # The prompt's own blocks alone: full keys and values that any request may share.
    assert tier_of(engine).demotions <= 61 // BLOCK
    plain, expected = request("a", 61), run(make(), request("a", 61))
    actual = run(engine, plain)
    assert [e.token_id for e in actual["a"] if e] == [e.token_id for e in expected["a"] if e]


@pytest.mark.parametrize("policy", ["fcfs", "mlfq"])
def test_a_tight_pool_swaps_instead_of_computing_again(make: Make, policy: str) -> None:
    requests = [(f"r{i}", 16 + 5 * i) for i in range(5)]
    expected = run(make(model__backend="reference"), *(request(n, k, 24) for n, k in requests))
    flags = {
        "model__backend": "reference",
        "cache__kv_bytes": 80 * TOKEN_BYTES,
        "scheduler__policy": policy,
        "scheduler__mlfq_quantum": 8,
        "scheduler__max_running": 3,
    }
    tiered, plain = make(**flags, cache__tier="host"), make(**flags)
    for engine in (tiered, plain):
        assert run(engine, *(request(n, k, 24) for n, k in requests)) == expected
        assert engine.stats().preemptions > 0
    assert tiered.stats().tier_hits_tokens > 0
    assert tiered.stats().batch_tokens < plain.stats().batch_tokens


def test_blocks_of_waiting_requests_are_read_before_they_are_admitted(make: Make, tmp_path: Path) -> None:
    engine = make(cache__tier="disk", cache__tier_path=str(tmp_path), scheduler__max_running=1)
    tier = tier_of(engine)
    run(engine, request("a", 41))
    swap_out(engine)
    engine.add(request("busy", 5, 6))
    engine.add(request("a", 41))
    engine.step()
    ahead = dict(tier._ahead)
    assert len(ahead) == 10 and tier.hits == 0
    assert all(len(future.result(10)) == engine.kv.block_bytes for future in ahead.values())
    while engine.has_work:
        engine.step()
    assert tier.hits == 10 and not tier._ahead


def test_a_disk_that_fails_does_not_end_a_request(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(cache__tier="disk", cache__tier_path=str(tmp_path), model__backend="reference")
    expected = run(engine, request("a", 41))
    swap_out(engine)

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    assert run(engine, request("a", 41)) == expected
    assert "cache.tier is off from now on" in caplog.text
    assert engine.stats().tier_bytes == 0 and engine.stats().tier_hits_tokens == 0
