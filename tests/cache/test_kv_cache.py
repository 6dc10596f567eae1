"""What is written to the cache is read back: exactly, or to a step of its 8 bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache, bytes_per_token, quantize_heads
from tokenloom.kernels import KVSpan

BLOCK, BLOCKS = 4, 6


def cache(dtype: torch.dtype, **shape: Any) -> KVCache:
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 8, "num_blocks": BLOCKS, "block_size": BLOCK}
    return KVCache(**{**sizes, **shape}, dtype=dtype, device=torch.device("cpu"))


def read(kv: KVCache, layer: int, blocks: list[int], length: int, begin: int = 0) -> tuple[Tensor, Tensor]:
    consecutive = all(b + 1 == c for b, c in itertools.pairwise(blocks))
    return KVSpan(0, 1, length, blocks, consecutive).read(kv, layer, begin)


def slots_of(blocks: list[int], length: int) -> Tensor:
    return torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("blocks", [[1, 2, 3], [5, 0, 2]])
def test_floats_are_read_as_they_were_written(dtype: torch.dtype, blocks: list[int]) -> None:
    kv, (k, v) = cache(dtype), torch.randn(2, 10, 3, 8, dtype=dtype)
    kv.write(1, slots_of(blocks, 10), k, v)
    for begin in (0, 3, 4, 9):
        keys, values = read(kv, 1, blocks, 10, begin)
        assert torch.equal(keys, k[begin:]) and torch.equal(values, v[begin:])


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(BLOCKS)), st.integers(1, 10), st.floats(-25, 25), st.integers(0, 2**31))
def test_int8_is_read_to_half_a_step_of_each_heads_largest(
    order: list[int], length: int, log_size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    blocks = order[: -(-length // BLOCK)]
    kv, (k, v) = cache(torch.int8), torch.randn(2, length, 3, 8) * 10**log_size
    kv.write(1, slots_of(blocks, length), k, v)
    for stored, given_ in zip(read(kv, 1, blocks, length), (k, v), strict=True):
        step = given_.abs().amax(-1, keepdim=True) / 127
        assert ((stored - given_).abs() <= 0.5001 * step).all()


def test_an_int8_heads_largest_number_is_kept() -> None:
    kv, k = cache(torch.int8), torch.zeros(1, 3, 8)
    k[0, :, 5] = torch.tensor([3.0, -0.25, 1e-9])
    kv.write(0, torch.tensor([7]), k, -k)
    keys, values = read(kv, 0, [1], 4)
    torch.testing.assert_close(keys[3], k[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(values[3], -k[0], rtol=1e-6, atol=0)


def test_an_int8_head_has_a_scale_of_its_own() -> None:
    k = torch.ones(1, 2, 8)
    k[0, 1] = 1e6
    q, scales = quantize_heads(k)
    assert scales.shape == (1, 2) and scales.dtype == torch.float32 and q.dtype == torch.int8
    torch.testing.assert_close(scales, torch.tensor([[1 / 127, 1e6 / 127]]))
    assert (q == 127).all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31])
def test_int8_zeros_are_zeros(size: float) -> None:
    q, scales = quantize_heads(torch.full((2, 1, 8), size))
    assert (q == 0).all() and scales.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_own_head_of_its_own_token(value: float) -> None:
    kv, (k, v) = cache(torch.int8), torch.randn(2, 4, 3, 8)
    kv.write(0, torch.arange(4), k, v)
    clean_k, clean_v = read(kv, 0, [0], 4)
    k[2, 1, 5] = value
    v[1, 0, 0] = value
    kv.write(0, torch.arange(4), k, v)
    keys, values = read(kv, 0, [0], 4)
    assert keys[2, 1].isnan().all() and values[1, 0].isnan().all()
    keys[2, 1], values[1, 0] = clean_k[2, 1], clean_v[1, 0]
    assert torch.equal(keys, clean_k) and torch.equal(values, clean_v)


def test_a_write_touches_its_own_slots_and_layer() -> None:
    kv = cache(torch.int8)
    for layer in range(2):
        kv.write(layer, torch.arange(BLOCK * BLOCKS), *torch.randn(2, BLOCK * BLOCKS, 3, 8))
    parts = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
    before = [[layer.clone() for layer in part] for part in parts]
    kv.write(1, torch.tensor([9, 2]), *torch.randn(2, 2, 3, 8))
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[0], old[0])
        changed = (part[1] != old[1]).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert changed == [2, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_copied_block_equals_its_source_scales_included(dtype: torch.dtype) -> None:
    kv = cache(dtype)
    for layer in range(2):
        kv.write(layer, torch.arange(BLOCK * BLOCKS), *torch.randn(2, BLOCK * BLOCKS, 3, 8))
    parts = [kv.keys, kv.values, kv.key_scales, kv.value_scales]
    before = [[layer.view(BLOCKS, BLOCK, -1).clone() for layer in part] for part in parts]
    kv.copy_block(4, 1)
    for part, old in zip(parts, before, strict=True):
        for layer, expected in zip(part, old, strict=True):
            expected[1] = expected[4]
            assert torch.equal(layer.view(BLOCKS, BLOCK, -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_per_token_are_those_allocated(dtype: torch.dtype) -> None:
    kv = cache(dtype)
    assert kv.num_bytes == BLOCK * BLOCKS * bytes_per_token(2, 3, 8, dtype)


def test_int8_takes_about_a_quarter_of_float32() -> None:
    share = bytes_per_token(30, 3, 64, torch.int8) / bytes_per_token(30, 3, 64, torch.float32)
    assert share == 0.25 + 1 / 64


def test_rows_are_the_memory_of_keys_and_values() -> None:
    kv = cache(torch.float32)
    kv.write(1, torch.tensor([5]), torch.full((1, 3, 8), 2.0), torch.full((1, 3, 8), 3.0))
    assert (kv.rows[1][5] == 2).all() and (kv.rows[1][BLOCK * BLOCKS + 5] == 3).all()
