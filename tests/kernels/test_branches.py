"""Rows whose last tokens lie elsewhere than their blocks say read the same numbers as if all lay in order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import ISAS, attend, cache, in_float64
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, get_kernels, native
from tokenloom.kernels.native_arguments import native_cache

BLOCK = 4
Case = tuple[Tensor, KVCache, list[KVSpan], list[KVSpan], "int | None"]


@st.composite
def branches(draw: st.DrawFn) -> Case:
    """Rows with tails over scattered or consecutive blocks, and the same rows over a copy that needs none."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 3), (1, 8)]))
    dtype = draw(st.sampled_from([torch.float32, torch.int8]))
    kv = cache(kv_heads, 16, 260, BLOCK, dtype)
    blocks = list(range(40, 200)) if draw(st.booleans()) else torch.randperm(200).tolist()[:160]
    consecutive = all(b + 1 == c for b, c in itertools.pairwise(blocks))
    before = draw(st.sampled_from([0, 1, 5, 30, 66, 255, 600]))
    copied, spans, plain = list(range(200, 260)), [], []
    for row in range(draw(st.integers(1, 4))):
        # Its path: some of the slots behind the tokens before it, in order.
        path = sorted(draw(st.sets(st.integers(before, before + 19), min_size=1, max_size=6)))
        tail = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in path]
        spans.append(KVSpan(row, 1, before + len(tail), blocks, consecutive, tail))
        whole = before // BLOCK
        own = blocks[:whole] + [copied.pop() for _ in range(-(-(before + len(tail)) // BLOCK) - whole)]
        slots = [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(whole * BLOCK, before)] + tail
        to = [own[i // BLOCK] * BLOCK + i % BLOCK for i in range(whole * BLOCK, before + len(tail))]
        kv.copy_slots(torch.tensor(slots), torch.tensor(to))
        plain.append(KVSpan(row, 1, before + len(tail), own, False))
    q = torch.randn(len(spans), kv_heads * group, 16)
    return q, kv, spans, plain, draw(st.sampled_from([None, 1, 3, 70]))


@settings(max_examples=60, deadline=None)
@given(branches())
def test_in_torch_and_reference(case: Case) -> None:
    q, kv, spans, plain, window = case
    wide = in_float64(kv)
    for name in ("torch", "reference"):
        kernels = get_kernels(name)
        tailed = kernels.attention(q.double(), wide, 0, spans, window)
        assert torch.equal(tailed, kernels.attention(q.double(), wide, 0, plain, window))


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
@settings(max_examples=60, deadline=None)
@given(branches(), st.sampled_from(ISAS or [""]))
def test_in_native_kernels(case: Case, isa: str) -> None:
    q, kv, spans, plain, window = case
    native.use_isa(isa)
    assert torch.equal(attend(q, kv, spans, window), attend(q, kv, plain, window))


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((0, 1, 5, 0, 6, 2), "row 0 has a tail"),  # longer than the span
        ((0, 1, 5, 0, -1, 2), "row 0 has a tail"),
        ((0, 1, 5, 0, 1, -1), "row 0 has a tail"),
        ((0, 1, 5, 0, 2, 3), "row 0 has a tail"),  # behind the last number
        ((0, 2, 5, 0, 1, 2), "row 0 has a tail"),  # of two rows
        ((0, 1, 5, 0, 1, 3), "slot 99"),
        ((0, 1, 5, 0, 1, 2), None),
    ],
)
def test_a_tail_outside_of_the_cache_is_refused(row: tuple[int, ...], words: str | None) -> None:
    kv = cache(1, 16, 4, BLOCK, torch.float32)
    q, out = torch.randn(2, 1, 16), torch.empty(2, 1, 16)

    def call() -> None:
        table = torch.tensor([row], dtype=torch.int32)
        blocks = torch.tensor([0, 1, 7, 99], dtype=torch.int32)
        native.attention(q, native_cache(kv), 0, table, blocks, BLOCK, 0, out, None, 1)

    if words is None:
        call()
        return
    with pytest.raises(ValueError, match=words):
        call()
