"""Selectors against plain arithmetic: which tokens a row reads, and that it reads no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kv_rig import answer, build_engine, request, run, text_of, tiny_files, tokens
from tokenloom.cache.block_pool import BlockPool
from tokenloom.cache.block_table import BlockTable
from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import SequenceShape
from tokenloom.kernels import Pages, get_kernels
from tokenloom.kernels.pages import page_index
from tokenloom.methods.kv.quest import Quest
from tokenloom.methods.kv.tokenselect import TokenSelect, TokenSelectPolicy
from tokenloom.models.loader import ModelFiles

HK, G, D, LAYERS = 2, 3, 16, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return tiny_files(tmp_path_factory.mktemp("llama"))


class Recording(CachedTokens):
    """Remembers which tokens attention was asked for."""

    asked: list[Tensor | None]

    def attend(self, layer: int, q: Tensor, index: Tensor | None = None) -> Tensor:
        self.asked.append(index)
        return super().attend(layer, q, index)

    def attend_pages(self, layer: int, q: Tensor, pages: Pages) -> Tensor:
        self.asked.append(page_index(self.kernels, q, pages))
        return super().attend_pages(layer, q, pages)


def cached_tokens(length: int, seed: int = 0) -> Recording:
    torch.manual_seed(seed)
    kv = KVCache(LAYERS, HK, D, num_blocks=64, block_size=4, dtype=torch.float64, device=torch.device("cpu"))
    cached = Recording(kv, BlockTable(BlockPool(64, 4)), get_kernels("torch"))
    cached.asked = []
    cached.table.grow(length)
    cached.length, cached.start = length, length - 1
    for layer in range(LAYERS):
        k, v = torch.randn(2, length, HK, D, dtype=torch.float64)
        kv.write(layer, cached.slots(), k, v)
    return cached


def shape(prompt: int) -> SequenceShape:
    return SequenceShape(prompt, 50, LAYERS, HK * G, HK, D)


def row() -> Tensor:
    return torch.randn(1, HK * G, D, dtype=torch.float64)


@pytest.mark.parametrize("group", ["kv", "q"])
@pytest.mark.parametrize("length", [57, 60, 61])
def test_quest_reads_the_pages_whose_bound_is_highest(length: int, group: str) -> None:
    cached, q = cached_tokens(length), row()
    policy = Quest(budget=12, page=4, dense_layers=1, group=group).policy(shape(40))
    assert policy.attend(0, q, cached) is None
    policy.attend(2, q, cached)
    (index,) = cached.asked
    assert index is not None
    pages = [range(first, min(first + 4, length)) for first in range(0, length, 4)]
    keys = cached.keys(2)

    def bound(head: int, page: range) -> float:
        part = keys[page.start : page.stop, head // G]
        best = torch.maximum(q[0, head] * part.amax(0), q[0, head] * part.amin(0)).sum()
        assert best >= (part @ q[0, head]).max()  # the property that Quest rests on
        return float(best)

    for i, read in enumerate(index.tolist()):
        heads = [i] if group == "q" else range(i * G, (i + 1) * G)
        ranked = sorted(pages[:-1], key=lambda p: -max(bound(head, p) for head in heads))
        expected = sorted(t for page in [*ranked[:2], pages[-1]] for t in page)
        assert read == expected


def test_quests_bounds_follow_the_newest_token() -> None:
    whole = cached_tokens(60)
    policy = Quest(budget=12, page=4, dense_layers=0).policy(shape(20))
    for length in range(41, 61):
        whole.length = length
        policy.attend(1, row(), whole)
        keys = whole.keys(1)
        for page, first in enumerate(range(0, length - 3, 4)):  # all but the open one
            part = keys[first : first + 4]
            expected = torch.cat((part.amax(0), part.amin(0)), -1)
            assert torch.equal(policy.bounds[1][page], expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize("vote", ["soft", "head", "topk"])
def test_heads_vote_for_what_all_of_them_read(vote: str) -> None:
    cached, q = cached_tokens(60), row()
    policy = TokenSelect(budget=16, n_init=3, n_local=5, vote=vote).policy(shape(40))
    policy.attend(1, q, cached)
    (index,) = cached.asked
    keys, candidates = cached.keys(1), range(3, 55)
    scores = torch.stack(
        [torch.stack([q[0, h] @ keys[t, h // G] for t in candidates]) for h in range(HK * G)]
    )
    if vote == "soft":
        votes = torch.softmax(scores, -1).sum(0)
    elif vote == "topk":
        votes = scores.sum(0)
    else:
        votes = torch.zeros(len(candidates))
        for head in scores:
            votes[head.topk(8).indices] += 1
    assert index is not None and len(index) == 16
    chosen = index[3:-5]
    assert index.tolist() == [0, 1, 2, *sorted(chosen.tolist()), 55, 56, 57, 58, 59]
    left = [t for t in candidates if t not in chosen.tolist()]
    assert min(votes[chosen - 3]) >= max(votes[torch.tensor(left) - 3])


def test_heads_of_a_group_may_change_places() -> None:
    cached, q = cached_tokens(60), row()
    swapped = q.view(HK, G, D)[:, [2, 0, 1]].reshape(1, HK * G, D)
    for each in (q, swapped):
        TokenSelect(budget=16, n_init=3, n_local=5).policy(shape(40)).attend(1, each, cached)
    assert torch.equal(*cached.asked)  # type: ignore[arg-type]


def test_a_chunk_chooses_together_and_reads_causally() -> None:
    cached = cached_tokens(60)
    cached.start = 40
    q = torch.randn(20, HK * G, D, dtype=torch.float64)
    policy = TokenSelect(budget=16, n_init=2, n_local=4, chunk=8).policy(shape(60))
    out = policy.attend(1, q, cached)
    assert out is not None
    # Chunks of 8, 8 and 4 rows, each with its own rows as the local ones.
    assert [len(index) for index in cached.asked] == [2 + 10 + 8, 2 + 10 + 8, 2 + 10 + 4]  # type: ignore[arg-type]
    keys, values = cached.keys(1), cached.values(1)
    for i in range(20):
        chunk = cached.asked[i // 8]
        assert chunk is not None
        read = chunk[chunk <= 40 + i]
        for head in range(HK * G):
            weights = torch.softmax(keys[read, head // G] @ q[i, head] / 4, 0)
            torch.testing.assert_close(out[i, head], weights @ values[read, head // G])


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[TokenSelectPolicy]:
    """Every one that is made."""
    made = []
    plain = TokenSelect.policy

    def spy(self: TokenSelect, shape: SequenceShape) -> Any:
        made.append(plain(self, shape))
        return made[-1]

    monkeypatch.setattr(TokenSelect, "policy", spy)
    return made


def test_theta_says_how_often_a_choice_is_made_again(
    files: ModelFiles, policies: list[TokenSelectPolicy]
) -> None:
    engine, prompt = build_engine(files, cache__prefix_caching=False), text_of(1, 60)
    hits = {}
    for theta in (1.0, 0.9, 0.5, -1.0):
        policies.clear()
        answer(engine, prompt, f"tokenselect(budget=24, n_init=2, chunk=8, theta={theta})", max_tokens=21)
        used = next(p for p in policies if p.selections)
        assert used.selections + used.reuses == 3 * 20
        hits[theta] = used.reuses
    assert hits[1.0] == 0 and hits[-1.0] == 3 * 19
    assert 0 <= hits[0.9] <= hits[0.5] <= hits[-1.0]


def test_only_the_budget_is_read(files: ModelFiles) -> None:
    engine, prompt = build_engine(files, cache__prefix_caching=False), text_of(1, 100)
    for spec, per_layer in (
        ("tokenselect(budget=24, prefill=False, theta=1.0)", 24 * 2),
        ("quest(budget=16, page=4, dense_layers=0)", None),
    ):
        engine.add(request(prompt, spec, max_tokens=6))
        engine.step()
        cached = engine.scheduler.running[0].cached
        assert cached is not None and cached.tokens_read == 0
        for _ in range(4):
            before = cached.tokens_read
            engine.step()
            read = cached.tokens_read - before
            if per_layer:
                assert read == per_layer * 3
            else:  # 4 pages, the last of which may not be full
                assert 13 * 2 * 3 <= read <= 16 * 2 * 3
        engine.abort("r")


def test_longer_chunks_than_an_iteration_wait_for_a_whole_one(files: ModelFiles) -> None:
    engine = build_engine(
        files, cache__prefix_caching=False, scheduler__max_batch_tokens=26, scheduler__max_running=4
    )
    spec = "tokenselect(budget=24, n_init=2, chunk=8)"
    decoding = [request(text_of(i, 4), "", f"d{i}", max_tokens=60) for i in range(3)]
    outputs = run(engine, *decoding, request(text_of(1, 90), spec, "chunks"))
    alone = build_engine(files, cache__prefix_caching=False)
    assert tokens(outputs[3]) == tokens(answer(alone, text_of(1, 90), spec))
