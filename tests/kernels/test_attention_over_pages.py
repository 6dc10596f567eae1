"""Attention over chosen pages: natively as the operators make it up, for every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import BLOCK, ISAS, cache, in_float64
from tokenloom.kernels import Pages, get_kernels, native
from tokenloom.kernels.cpu import HEAD_DIMS
from tokenloom.kernels.native_arguments import native_cache
from tokenloom.kernels.pages import attend_to_pages, page_index

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")


def bounds_of(keys: Tensor, page: int) -> Tensor:
    """keys `[length, Hk, D]`: of all pages but the last."""
    pages = keys[: (len(keys) - 1) // page * page].unflatten(0, (-1, page))
    return torch.cat((pages.amax(1), pages.amin(1)), -1).contiguous()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (1, 8)]))
    head_dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from([torch.float32, torch.int8]))
    kv = cache(kv_heads, head_dim, 128, BLOCK, dtype)
    page = draw(st.sampled_from([1, 4, 16]))
    length = draw(st.sampled_from([1, 15, 16, 17, 130, 400]))
    slots = torch.randperm(128 * BLOCK)[:length]
    total = -(-length // page)
    count = draw(st.integers(1, total))
    keys = kv.read_cells(kv.cells(0, slots), torch.float32)[0].transpose(0, 1)
    q = torch.randn(1, kv_heads * group, head_dim)
    return q, kv, 0, Pages(slots, bounds_of(keys, page), page, count, draw(st.booleans()))


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_what_the_operators_give(usual_machine: None, isa: str, case: tuple[Any, ...]) -> None:
    native.use_isa(isa)
    kernels = get_kernels("cpu")
    # Scores of equal bits choose equal pages.
    assert torch.equal(kernels.attention_over_pages(*case), attend_to_pages(kernels, *case))


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_backends_agree(case: tuple[Any, ...]) -> None:
    q, kv, layer, pages = case
    cells = in_float64(kv).cells(layer, pages.slots.take(page_index(get_kernels("cpu"), q, pages)))
    expected = get_kernels("reference").attention_at(q.double(), in_float64(kv), cells)
    actual = get_kernels("cpu").attention_over_pages(*case).double()
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


def test_all_pages_are_all_tokens() -> None:
    kv = cache(2, 16, 16, BLOCK, torch.float32)
    q, slots = torch.randn(1, 4, 16), torch.randperm(64)[:50]
    bounds = bounds_of(kv.keys[0][slots], 4)
    for name in ("cpu", "torch", "reference"):
        kernels = get_kernels(name)
        whole = kernels.attention_at(q, kv, kv.cells(0, slots))
        torch.testing.assert_close(
            kernels.attention_over_pages(q, kv, 0, Pages(slots, bounds, 4, 13, True)),
            whole,
            rtol=1e-5,
            atol=1e-6,
        )


def refuse(words: str, **changed: Any) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(1, 4, 16),
        "kv": native_cache(cache(2, 16, 8, BLOCK, torch.float32)),
        "layer": 0,
        "slots": torch.arange(9),
        "bounds": torch.zeros(2, 2, 32),
        "page": 4,
        "count": 2,
        "by_group": True,
        "out": torch.zeros(1, 4, 16),
        "threads": 1,
    }
    native.attention_over_pages(**good)
    with pytest.raises(ValueError, match=words):
        native.attention_over_pages(**{**good, **changed})


def test_what_does_not_fit_is_refused() -> None:
    refuse("q: one row", q=torch.zeros(2, 4, 16), out=torch.zeros(2, 4, 16))
    refuse("page: at least one", page=0)
    refuse("count: from one", count=0)
    refuse("count: from one", count=4)
    refuse("bounds: float32", bounds=torch.zeros(1, 2, 32))
    refuse("bounds: float32", bounds=torch.zeros(2, 2, 16))
    refuse("slots: out of range", slots=torch.arange(25, 34))
    refuse("layer: out of range", layer=1)
