"""Scorers, budgets and merging against plain arithmetic, one token and head at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.cache.policy import SequenceShape
from tokenloom.methods.kv.adakv import AdaKV
from tokenloom.methods.kv.budget import tokens_of
from tokenloom.methods.kv.eviction import Eviction
from tokenloom.methods.kv.keydiff import KeyDiff
from tokenloom.methods.kv.knorm import knorm
from tokenloom.methods.kv.merge import Merge
from tokenloom.methods.kv.parts import Scorer
from tokenloom.methods.kv.pyramid import Pyramid
from tokenloom.methods.kv.random_tokens import RandomTokens
from tokenloom.methods.kv.snapkv import SnapKV, window_attention

N, HK, G, D, W = 40, 2, 3, 16, 6


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """keys, values `[N, HK, D]`, queries `[W, HK * G, D]`"""
    torch.manual_seed(seed)
    keys, values = torch.randn(2, N, HK, D, dtype=torch.float64)
    return keys, values, torch.randn(W, HK * G, D, dtype=torch.float64)


def attention_of(keys: Tensor, queries: Tensor, head: int, row: int) -> Tensor:
    """What one row of the window pays each token, `[N]`."""
    end = N - W + row + 1
    scores = keys[:end, head // G] @ queries[row, head] / math.sqrt(D)
    weights = torch.zeros(N, dtype=keys.dtype)
    weights[:end] = torch.softmax(scores, 0)
    return weights


def test_the_window_looks_back_causally() -> None:
    keys, _, queries = drawn()
    seen = window_attention(keys, queries)
    for head in range(HK * G):
        for row in range(W):
            torch.testing.assert_close(seen[head // G, head % G, row], attention_of(keys, queries, head, row))


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_pools_what_the_window_pays(kernel: int, pooling: str) -> None:
    keys, values, queries = drawn()
    scores = SnapKV(kernel=kernel, pooling=pooling, window=W).score(keys, values, queries)
    before, half = N - W, kernel // 2
    for kv_head in range(HK):
        for token in range(before):
            expected = 0.0
            for head in range(kv_head * G, (kv_head + 1) * G):
                paid = torch.stack([attention_of(keys, queries, head, row) for row in range(W)]).mean(0)
                near = [
                    float(paid[t]) if 0 <= t < before else 0.0 for t in range(token - half, token + half + 1)
                ]
                expected += (max(near) if pooling == "max" else sum(near) / kernel) / G
            assert abs(float(scores[kv_head, token]) - expected) < 1e-12


def test_keydiff_prefers_keys_unlike_the_mean() -> None:
    keys, values, _ = drawn()
    keys += 3
    keys[17, 1] = -keys[17, 1]
    scores = KeyDiff().score(keys, values, torch.empty(0))
    assert scores[1].argmax() == 17
    directions = keys / keys.norm(dim=-1, keepdim=True)
    mean = directions.mean(0)
    for token, head in ((0, 0), (17, 1), (39, 0)):
        cosine = directions[token, head] @ mean[head] / mean[head].norm()
        assert abs(float(scores[head, token] + cosine)) < 1e-9


@given(
    budget=st.integers(9, 300),
    window=st.integers(0, 8),
    extra=st.integers(1, 2000),
    layers=st.integers(1, 40),
    beta=st.floats(1, 100),
)
@settings(deadline=None)
def test_a_pyramid_falls_and_its_mean_is_the_budget(
    budget: int, window: int, extra: int, layers: int, beta: float
) -> None:
    prompt = budget + extra
    counts = Pyramid(beta=beta).spread(budget, window, prompt, layers)
    assert sum(counts) == budget * layers
    assert all(window <= count <= prompt for count in counts)
    assert all(later <= earlier for earlier, later in itertools.pairwise(counts))


@given(seed=st.integers(0, 10**6), alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]), count=st.integers(0, 30))
@settings(deadline=None)
def test_heads_compete_for_what_is_not_guaranteed(seed: int, alpha: float, count: int) -> None:
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(seed))
    kept = AdaKV(alpha=alpha).choose(scores, count)
    assert sum(len(at) for at in kept) == 3 * count
    for head, at in enumerate(kept):
        assert at.tolist() == sorted(set(at.tolist()))
        sure = scores[head].topk(int(alpha * count)).indices
        assert set(sure.tolist()) <= set(at.tolist())
        # Nothing that is kept beyond that is worth less than something that is not.
        free = set(at.tolist()) - set(sure.tolist())
        for other, theirs in enumerate(kept):
            left = set(range(30)) - set(theirs.tolist())
            if free and left:
                assert min(float(scores[head, t]) for t in free) >= max(float(scores[other, t]) for t in left)


def test_equal_heads_get_equal_shares() -> None:
    scores = torch.rand(1, 50).expand(4, 50)
    for at in AdaKV().choose(scores, 12):
        assert len(at) == 12


def test_a_merge_is_a_weighted_mean_of_values() -> None:
    keys, values = torch.randn(2, 12, D, dtype=torch.float64)
    kept = torch.tensor([1, 4, 9])
    expected, totals = values[kept].clone(), torch.ones(3, dtype=torch.float64)
    for token in sorted(set(range(12)) - {1, 4, 9}):
        cosines = [float(torch.cosine_similarity(keys[token], keys[k], 0)) for k in kept]
        best = max(range(3), key=cosines.__getitem__)
        share = values[token].norm() / (values[token].norm() + values[kept[best]].norm())
        weight = max(cosines[best], 0) * float(share)
        assert 0 <= weight <= 1
        expected[best] += weight * values[token]
        totals[best] += weight
    torch.testing.assert_close(Merge().merge(keys, values, kept), expected / totals[:, None])
    assert torch.equal(Merge().merge(keys, values, torch.arange(12)), values)
    assert torch.equal(Merge(threshold=1.0).merge(keys, values, kept), values[kept])


@pytest.mark.parametrize(
    ("budget", "prompt", "expected"),
    [(100, 50, 100), (0.5, 50, 25), (1.0, 50, 50), (1, 50, 1), (0.001, 50, 1)],
)
def test_budgets_are_tokens_or_parts(budget: float, prompt: int, expected: int) -> None:
    assert tokens_of(budget, prompt) == expected


class Given(Scorer):
    """A plain score, as a user would bring it."""

    budget, window, sinks, reads_queries = 10, 3, 2, False

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return self.scores


def test_the_first_and_last_are_kept_and_the_best_between_them() -> None:
    scores = torch.rand(HK, N)
    scores[0, 20] = torch.nan
    policy = Eviction(SequenceShape(N, 5, 1, HK * G, HK, D), Given(scores))
    keys, values, _ = drawn()
    for head, at in enumerate(policy._choose(0, keys, values, 10)):
        middle = sorted(range(2, N - 3), key=lambda t: -float(scores[head, t].nan_to_num(-1)))[:5]
        assert at.tolist() == sorted([0, 1, *middle, N - 3, N - 2, N - 1])


def test_scores_of_the_wrong_shape_are_refused() -> None:
    policy = Eviction(SequenceShape(N, 5, 1, HK * G, HK, D), Given(torch.rand(HK, N - 1)))
    with pytest.raises(ValueError, match=r"scores are \[2, 39\], expected \[2, 40\]"):
        policy._choose(0, *drawn()[:2], 10)


def test_what_is_kept_by_lot_differs_by_layer_and_head_and_not_by_run() -> None:
    def drawn_by(layer: int, seed: int = 0) -> Tensor:
        return RandomTokens(seed=seed).score_layer(layer, *drawn())

    assert torch.equal(drawn_by(2), drawn_by(2))
    others = [*drawn_by(2), *drawn_by(3), *drawn_by(2, seed=1)]
    assert len({tuple(scores.tolist()) for scores in others}) == 3 * HK


def test_knorm_keeps_the_shortest_keys() -> None:
    keys, values, _ = drawn()
    scores = knorm(keys, values, torch.empty(0))
    for head in range(HK):
        lengths = [float((keys[t, head] ** 2).sum()) ** 0.5 for t in range(N)]
        assert scores[head].argsort(descending=True).tolist() == sorted(range(N), key=lengths.__getitem__)


def test_a_window_may_be_a_part_of_the_budget() -> None:
    shape = SequenceShape(N, 5, 1, HK * G, HK, D)
    assert [Eviction(shape, KeyDiff(budget=20, window=w)).window for w in (0.3, 7, 0)] == [6, 7, 0]
    for wrong in (-0.5, 1.5, -1):
        with pytest.raises(ValueError, match=f"window must be .*, not {wrong}"):
            KeyDiff(window=wrong)
