"""A poisoned request ends alone: all others get the answer that they get without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import POISON, answer, answers, healthy_answers, make, patch_forward, poisoned, settled
from tokenloom.engine import engine as engine_module
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.methods.drafting.ngram import NgramDrafter


@pytest.fixture(scope="module")
def healthy(folder: Path) -> list[Any]:
    """What six requests answer when nothing goes wrong."""
    return healthy_answers(folder)


@pytest.fixture
async def target(folder: Path) -> AsyncIterator[AsyncEngine]:
    target = make(folder)
    target.start()
    yield target
    await asyncio.to_thread(target.shutdown)
    target.engine.pool.check()
    assert target.engine.pool.num_used == 0
    assert target.engine.counters.restarts == 0


def assert_alone(got: list[Any], healthy: list[Any], guilty: list[int]) -> None:
    for i, (one, expected) in enumerate(zip(got, healthy, strict=True)):
        if i in guilty:
            assert one[2] == ["error"] and one[3]
        else:
            assert one == expected


async def test_logits_that_are_not_numbers_end_their_own_request(
    target: AsyncEngine, healthy: list[Any]
) -> None:
    def fault(batch: Any, hidden: torch.Tensor) -> None:
        for rows in poisoned(target, batch):
            hidden[rows] = torch.nan

    patch_forward(target, fault)
    assert_alone(await answers(target, [2]), healthy, [2])


@pytest.mark.parametrize("guilty", [[0], [1, 4], [0, 1, 2, 3, 4, 5]])
async def test_a_pass_that_fails_ends_those_with_whom_it_fails(
    target: AsyncEngine, healthy: list[Any], guilty: list[int]
) -> None:
    def fault(batch: Any, hidden: torch.Tensor) -> None:
        if poisoned(target, batch):
            raise RuntimeError("secret internals")

    patch_forward(target, fault)
    got = await answers(target, guilty)
    assert_alone(got, healthy, guilty)
    assert all("secret" not in message for one in got for message in one[3])


async def test_a_pass_that_fails_once_costs_nobody_anything(target: AsyncEngine, healthy: list[Any]) -> None:
    passes = 0

    def fault(batch: Any, hidden: torch.Tensor) -> None:
        nonlocal passes
        passes += 1
        if passes % 5 == 0:
            raise MemoryError

    patch_forward(target, fault)
    assert_alone(await answers(target, []), healthy, [])


async def test_a_pass_that_verifies_guesses_is_run_again_without_them(
    target: AsyncEngine, healthy: list[Any]
) -> None:
    failed = 0

    def fault(batch: Any, hidden: torch.Tensor) -> None:
        nonlocal failed
        if any(segment.branches for segment in batch.segments):
            failed += 1
            raise RuntimeError

    patch_forward(target, fault)
    assert_alone(await answers(target, [], draft="ngram(fixed=True)"), healthy, [])
    assert failed


async def test_a_drafter_that_fails_ends_its_own_request(
    target: AsyncEngine, healthy: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = NgramDrafter.propose

    def faulty(self: NgramDrafter, tokens: list[int], most: int) -> Any:
        if tokens[0] == POISON:
            raise IndexError
        return propose(self, tokens, most)

    monkeypatch.setattr(NgramDrafter, "propose", faulty)
    assert_alone(await answers(target, [1], draft="ngram(fixed=True)"), healthy, [1])


async def test_all_choices_of_a_poisoned_request_end_and_nobody_elses(target: AsyncEngine) -> None:
    expected = await answers(target, [], n=3)

    def fault(batch: Any, hidden: torch.Tensor) -> None:
        decoding = poisoned(target, batch)
        if len(decoding) == 3:
            hidden[decoding[1]] = torch.inf

    patch_forward(target, fault)
    got = await answers(target, [3], n=3)
    assert got[3][2] == ["error"] * 3 and len(got[3][0][0]) == 1
    assert got[:3] + got[4:] == expected[:3] + expected[4:]


async def test_a_kv_method_that_fails_ends_its_own_request(folder: Path, target: AsyncEngine) -> None:
    kv = "snapkv(budget=8,window=4)"
    expected = await answers(target, [], kv=kv)

    def fault(batch: Any, hidden: torch.Tensor) -> None:
        if poisoned(target, batch):
            raise RuntimeError

    patch_forward(target, fault)
    got = await answers(target, [4], kv=kv)
    assert got[4][2] == ["error"]
    assert got[:4] + got[5:] == expected[:4] + expected[5:]


async def test_a_fault_in_a_request_s_own_text_ends_it_alone(
    target: AsyncEngine, healthy: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = engine_module.sample_each.__globals__["_draw"]

    def draw(logits: Any, sequences: Any, rows: Any, kernels: Any) -> Any:
        if any(sequences[i].tokens[0] == POISON for i in rows):
            raise ValueError("its distribution")
        return sample(logits, sequences, rows, kernels)

    monkeypatch.setitem(engine_module.sample_each.__globals__, "_draw", draw)
    assert_alone(await answers(target, [5]), healthy, [5])


async def test_what_a_poisoned_request_computed_is_not_in_the_prefix_cache(target: AsyncEngine) -> None:
    prompt = [POISON, *range(40, 90)]
    healthy = await answer(target, prompt, 0)
    target.engine.pool.forget_prefixes()
    broken = True

    def fault(batch: Any, hidden: torch.Tensor) -> None:
        if broken and poisoned(target, batch):
            target.engine.kv.keys[0][batch.slots] = torch.nan
            hidden[:] = torch.nan

    patch_forward(target, fault)
    assert (await answer(target, prompt, 0))[2] == ["error"]
    await settled(target)
    assert target.engine.pool.num_cached == 0
    broken = False
    assert await answer(target, prompt, 0) == healthy


async def test_an_embedding_that_is_not_a_number_is_an_error(target: AsyncEngine) -> None:
    def fault(batch: Any, hidden: torch.Tensor) -> None:
        hidden[-1] = torch.nan

    patch_forward(target, fault)
    with pytest.raises(Exception, match="failed on this request"):
        await target.embed([1, 2, 3], request_id="e")
