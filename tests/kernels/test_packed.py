"""Packed weights hold exactly GGUF's numbers, with the native kernels and without."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.kernels import FORMATS, PackedWeight, dense, get_kernels, native, num_bytes, packed, torch_ops

WITH_AND_WITHOUT = [True, False] if native is not None else [False]
few = settings(max_examples=40, deadline=None)
formats = st.sampled_from(sorted(FORMATS))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 5))
seeds = st.integers(0, 2**31)


@pytest.fixture(params=WITH_AND_WITHOUT, ids=lambda with_native: "native" if with_native else "numpy")
def maybe_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(packed, "native", None)


def stored(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Rows of a GGUF file: any quants, scales and offsets that are finite."""
    format, generator = FORMATS[name], np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows, blocks, format.row_bytes), dtype=np.uint8)
    halves = generator.normal(0, 0.1, (rows, blocks, format.halves)).astype(np.float16)
    data[..., : 2 * format.halves] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def dequantized(name: str, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows, GGMLQuantizationType[name]))


@few
@given(formats, shapes, seeds)
def test_unpacked_is_what_was_packed(name: str, shape: tuple[int, int], seed: int) -> None:
    rows = stored(name, *shape, seed)
    weight = PackedWeight.pack(name, rows)
    assert np.array_equal(weight.unpacked(), rows)
    assert weight.shape == (shape[0], 32 * shape[1])


@few
@given(formats, shapes, seeds)
def test_dense_equals_gguf_own_numbers(name: str, shape: tuple[int, int], seed: int) -> None:
    rows = stored(name, *shape, seed)
    assert torch.equal(PackedWeight.pack(name, rows).dense(), dequantized(name, rows))


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_packed_in_several_steps_is_whole(name: str) -> None:
    rows = stored(name, 8 * 5 + 3, 32 * 1024 // 8)  # several times the bytes of one step
    weight = PackedWeight.pack(name, rows)
    assert np.array_equal(weight.unpacked(), rows)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31])
@pytest.mark.usefixtures("maybe_native")
def test_dense_does_not_show_the_padding(name: str, rows: int) -> None:
    file = stored(name, rows, 3)
    weight = PackedWeight.pack(name, file)
    assert weight.data.shape == (-(-rows // 8), 3, 8 * FORMATS[name].row_bytes)
    assert torch.equal(weight.dense(), dequantized(name, file))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("maybe_native")
def test_rows_are_those_asked_for(name: str) -> None:
    file = stored(name, 21, 2)
    ids = torch.tensor([20, 0, 7, 8, 7])
    assert torch.equal(PackedWeight.pack(name, file).rows(ids), dequantized(name, file)[ids])


@pytest.mark.usefixtures("maybe_native")
def test_no_rows_are_none() -> None:
    weight = PackedWeight.pack("Q8_0", stored("Q8_0", 5, 2))
    assert weight.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 64)


@pytest.mark.parametrize("rows", [slice(3, 12), slice(8, 16), slice(15, None), slice(0, 0)])
@pytest.mark.usefixtures("maybe_native")
def test_a_slice_is_dense_of_that_slice(rows: slice) -> None:
    file = stored("Q4_1", 21, 2)
    assert torch.equal(dense(PackedWeight.pack("Q4_1", file), rows), dequantized("Q4_1", file)[rows])


@few
@given(formats, shapes, st.floats(1e-3, 1e3), seeds)
def test_quantize_rounds_as_gguf_tools_do(name: str, shape: tuple[int, int], size: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape[0], 32 * shape[1]) * size
    rows = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType[name])
    assert np.array_equal(PackedWeight.quantize(name, weight).unpacked(), rows)


@pytest.mark.parametrize(("name", "most"), [("Q8_0", 0.02), ("Q4_0", 0.4), ("Q4_1", 0.3)])
def test_quantize_is_near(name: str, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 320)
    error = (PackedWeight.quantize(name, weight).dense() - weight).abs().max()
    assert most / 20 < error < most


def test_quantize_takes_any_floats() -> None:
    weight = torch.randn(9, 32).bfloat16()
    assert torch.equal(
        PackedWeight.quantize("Q8_0", weight).dense(), PackedWeight.quantize("Q8_0", weight.float()).dense()
    )


@pytest.mark.parametrize(("name", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_1", 5.0)])
def test_bytes_are_the_files(name: str, bits: float) -> None:
    weight = PackedWeight.pack(name, stored(name, 16, 4))
    assert weight.num_bytes == num_bytes(weight) == 16 * 128 * bits / 8


@few
@given(formats, st.integers(1, 40), st.integers(1, 9), st.booleans(), seeds)
def test_the_gradient_of_a_linear_is_the_dense_product(
    name: str, out: int, rows: int, with_extra: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, dy = PackedWeight.quantize(name, torch.randn(out, 64)), torch.randn(rows, out)
    extra = torch.randn(rows, 64) if with_extra else None
    expected = dy @ weight.dense() + (extra if extra is not None else 0)
    for kernels in (get_kernels("reference"), get_kernels("torch")):
        for given_weight in (weight, weight.dense()):
            given_up = None if extra is None else extra.clone()
            dx = kernels.linear_backward(dy, given_weight, given_up)
            torch.testing.assert_close(dx, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_extra", [False, True])
def test_the_gradient_in_tiles_of_rows_is_the_whole_product(
    monkeypatch: pytest.MonkeyPatch, with_extra: bool
) -> None:
    monkeypatch.setattr(torch_ops, "UNPACKED_ROWS", 10)
    weight, dy = PackedWeight.quantize("Q4_1", torch.randn(37, 64)), torch.randn(3, 37, dtype=torch.float64)
    extra = torch.randn(3, 64, dtype=torch.float64) if with_extra else None
    expected = dy @ weight.dense().double() + (0 if extra is None else extra)
    torch.testing.assert_close(get_kernels("torch").linear_backward(dy, weight, extra), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("maybe_native")
def test_backends_without_kernels_for_it_multiply_by_its_numbers(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = PackedWeight.quantize("Q4_0", torch.randn(9, 64))
    x, bias = torch.randn(5, 64, dtype=dtype), torch.randn(9, dtype=dtype)
    y = get_kernels(backend).linear(x, weight, bias)
    torch.testing.assert_close(y, x @ weight.dense().to(dtype).t() + bias, rtol=0, atol=1e-4)
