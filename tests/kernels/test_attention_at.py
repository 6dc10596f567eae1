"""Attention over chosen cells: every backend against plain arithmetic in float64, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import BLOCK, ISAS, cache
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import get_kernels, native
from tokenloom.kernels.cpu import HEAD_DIMS
from tokenloom.kernels.native_arguments import native_cache

LAYERS = 3
BACKENDS = ["torch", "reference", *(["cpu"] if native is not None else [])]


def paged(kv_heads: int, head_dim: int, dtype: torch.dtype, num_slots: int = 256) -> KVCache:
    kv = KVCache(
        LAYERS,
        kv_heads,
        head_dim,
        num_blocks=num_slots // BLOCK,
        block_size=BLOCK,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for layer in range(LAYERS):
        k, v = torch.randn(2, num_slots, kv_heads, head_dim).to(
            torch.float32 if dtype == torch.int8 else dtype
        )
        kv.write(layer, torch.arange(num_slots), k, v)
    return kv


def expected(q: Tensor, kv: KVCache, cells: list[Tensor]) -> Tensor:
    """One row and head at a time."""
    n, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(heads):
        at = cells[head * len(cells) // heads]
        keys, values = kv.read_cells(at, torch.float64)
        for i in range(n):
            end = len(at) - n + i + 1
            weights = torch.softmax(keys[:end] @ q[i, head].double() / math.sqrt(head_dim), 0)
            out[i, head] = weights @ values[:end]
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, KVCache, list[Tensor]]:
    """Lists of different lengths in different layers, one for each kv head or for each query head."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (1, 8)]))
    head_dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from([torch.float32, torch.int8]))
    kv = paged(kv_heads, head_dim, dtype)
    heads, n = kv_heads * group, draw(st.sampled_from([1, 1, 2, 9, 40]))
    lists = draw(st.sampled_from([kv_heads, heads]))
    layer = draw(st.integers(0, LAYERS - 1))
    cells = []
    for i in range(lists):
        length = n + draw(st.sampled_from([0, 1, 7, 64, 130]))
        own = kv.cells(layer, torch.randperm(kv.num_slots)[:length])
        cells.append(own[i * kv_heads // lists])
    return torch.randn(n, heads, head_dim), kv, cells


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_chosen_cells_are_attended_to(backend: str, case: tuple[Tensor, KVCache, list[Tensor]]) -> None:
    q, kv, cells = case
    torch.testing.assert_close(
        get_kernels(backend).attention_at(q, kv, cells).double(), expected(q, kv, cells), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_instruction_set_attends_to_chosen_cells(
    usual_machine: None, isa: str, case: tuple[Tensor, KVCache, list[Tensor]]
) -> None:
    native.use_isa(isa)
    q, kv, cells = case
    actual = get_kernels("cpu").attention_at(q, kv, cells).double()
    torch.testing.assert_close(actual, expected(q, kv, cells), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float64_stays_float64(backend: str) -> None:
    kv = paged(2, 16, torch.float64)
    q, cells = torch.randn(3, 4, 16, dtype=torch.float64), list(kv.cells(1, torch.arange(5, 90)))
    torch.testing.assert_close(
        get_kernels(backend).attention_at(q, kv, cells), expected(q, kv, cells), rtol=1e-12, atol=1e-12
    )


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_all_tokens_in_order_give_the_bits_of_plain_attention() -> None:
    from attention_cases import batch

    for rows, past in ((1, 700), (5, 33), (70, 128)):
        case = batch(1, [(rows, past)], kv_heads=3, group=3, head_dim=64)
        span = case.spans[0]
        blocks = torch.tensor(span.blocks)
        slots = (blocks[:, None] * 16 + torch.arange(16)).flatten()[: span.kv_len]
        actual = get_kernels("cpu").attention_at(case.q, case.kv, list(case.kv.cells(0, slots)))
        assert torch.equal(actual, case.attend())


def refuse(words: str, **changed: Any) -> None:
    kv = cache(2, 16, 8, BLOCK, torch.float32)
    good = {
        "q": torch.zeros(2, 4, 16),
        "kv": native_cache(kv),
        "cells": torch.tensor([0, 2, 1, 3]),
        "ends": torch.tensor([2, 4]),
        "out": torch.zeros(2, 4, 16),
        "threads": 1,
    }
    native.attention_at(**good)
    with pytest.raises(ValueError, match=words):
        native.attention_at(**{**good, **changed})


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_what_lies_outside_is_refused() -> None:
    refuse("cells: not a cell of keys: 64", cells=torch.tensor([0, 2, 1, 64]))  # where the values begin
    refuse("cells: not a cell of keys: 128", cells=torch.tensor([0, 2, 128, 1]))
    refuse("cells: not a cell of keys: -1", cells=torch.tensor([0, -1, 2, 1]))
    refuse("ends: a list has no place for q", ends=torch.tensor([1, 4]))
    refuse("ends: a list has no place for q", ends=torch.tensor([2, 5]))
    refuse("ends: one for each kv head", ends=torch.tensor([2, 4, 4]))
    refuse("out: wrong shape", out=torch.zeros(1, 4, 16))
