"""The torch backend against the reference, and the reference's promise that rows are independent."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, get_kernels

REFERENCE, TORCH = get_kernels("reference"), get_kernels("torch")
BLOCK = 4
Case = tuple[Tensor, KVCache, list[KVSpan], "int | None"]


@st.composite
def packed_attention(draw: st.DrawFn) -> Case:
    """A random ragged batch over a paged cache: chunks, decodes, scattered and consecutive blocks."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)]))
    head_dim = draw(st.sampled_from([4, 8, 16]))
    spans, row, free = [], 0, list(range(64))
    if draw(st.booleans()):
        free = torch.randperm(64).tolist()
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.sampled_from([1, 1, 2, 5, 9]))
        kv_len = length + draw(st.sampled_from([0, 1, 3, 4, 17]))
        num_blocks = -(-kv_len // BLOCK)
        blocks, free = free[:num_blocks], free[num_blocks:]
        consecutive = all(b + 1 == c for b, c in itertools.pairwise(blocks))
        spans.append(KVSpan(row, length, kv_len, blocks, consecutive))
        row += length
    kv = KVCache(
        1,
        num_kv_heads,
        head_dim,
        num_blocks=64,
        block_size=BLOCK,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    kv.keys[0].normal_()
    kv.values[0].normal_()
    q = torch.randn(row, num_kv_heads * group, head_dim, dtype=torch.float64)
    return q, kv, spans, draw(st.sampled_from([None, 1, 3, 8]))


@settings(max_examples=80, deadline=None)
@given(packed_attention())
def test_attention_equals_reference(case: Case) -> None:
    q, kv, spans, window = case
    expected = REFERENCE.attention(q, kv, 0, spans, window)
    torch.testing.assert_close(TORCH.attention(q, kv, 0, spans, window), expected, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(packed_attention())
def test_reference_attention_is_softmax_over_the_causal_window(
    case: Case,
) -> None:
    q, kv, spans, window = case
    k, v = kv.keys[0], kv.values[0]
    out = REFERENCE.attention(q, kv, 0, spans, window)
    group = q.shape[1] // k.shape[1]
    for span in spans:
        slots = [b * BLOCK + o for b in span.blocks for o in range(BLOCK)][: span.kv_len]
        for i in range(span.length):
            end = span.kv_len - span.length + i + 1
            seen = slots[max(0, end - window) if window else 0 : end]
            for head in range(q.shape[1]):
                scores = k[seen, head // group] @ q[span.start + i, head] / q.shape[2] ** 0.5
                expected = scores.softmax(0) @ v[seen, head // group]
                torch.testing.assert_close(out[span.start + i, head], expected)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 47, 48, 70])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_equals_reference(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 33, dtype=dtype), torch.randn(20, 33, dtype=dtype)
    b = torch.randn(20, dtype=dtype) if bias else None
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.25}[dtype]
    actual = TORCH.linear(x, weight, b)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, REFERENCE.linear(x, weight, b), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_operators_equal_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.13}[dtype]
    x, weight = torch.randn(5, 24, dtype=dtype) * 3, torch.randn(24, dtype=dtype)
    heads, angle = torch.randn(5, 3, 8, dtype=dtype), torch.randn(5, 4)
    for name, operate in (
        ("rms_norm", lambda backend: backend.rms_norm(x, weight, 1e-5)),
        ("silu_mul", lambda backend: backend.silu_mul(x)),
        ("rope", lambda backend: backend.rope(heads, backend.rotation(angle.cos(), angle.sin(), dtype))),
    ):
        actual, expected = operate(TORCH), operate(REFERENCE)
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rope_turns_each_pair_by_its_angle() -> None:
    x, angle = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), torch.tensor([[0.5, 1.0]])
    turned = REFERENCE.rope(x, REFERENCE.rotation(angle.cos(), angle.sin(), x.dtype))[0, 0]
    expected = torch.tensor([0.5, 1.0]).cos().tolist(), torch.tensor([0.5, 1.0]).sin().tolist()
    torch.testing.assert_close(
        turned, torch.tensor([expected[0][0], -2 * expected[1][1], expected[1][0], 2 * expected[0][1]])
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_reference_rows_do_not_depend_on_their_neighbours(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 50), torch.randn(70, 50)
    i = seed % rows
    assert torch.equal(REFERENCE.linear(x, weight)[i], REFERENCE.linear(x[i : i + 1].clone(), weight)[0])
    norm = torch.randn(50)
    assert torch.equal(
        REFERENCE.rms_norm(x, norm, 1e-5)[i], REFERENCE.rms_norm(x[i : i + 1].clone(), norm, 1e-5)[0]
    )
    assert torch.equal(REFERENCE.silu_mul(x)[i], REFERENCE.silu_mul(x[i : i + 1].clone())[0])


def test_span_view_is_the_cache_itself_where_blocks_are_consecutive() -> None:
    cache = torch.arange(10 * BLOCK * 2.0).view(10 * BLOCK, 1, 2)
    view = KVSpan(0, 1, 7, [3, 4], True).view(cache, BLOCK)
    assert view.data_ptr() == cache[3 * BLOCK].data_ptr() and len(view) == 7
    scattered = KVSpan(0, 1, 7, [5, 2], False).view(cache, BLOCK, begin=3)
    assert torch.equal(scattered, cache[[5 * BLOCK + 3, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2]])
