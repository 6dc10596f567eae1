"""Products of packed weights against plain torch. `make sanitize` runs all test_native files here on kernels
that were built with ASan and UBSan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.kernels import FORMATS, PackedWeight, native

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")

ROWS = [0, 1, 2, 3, 4, 5, 16, 64, 65, 130]
ISAS = native.isas() if native is not None else []
formats = st.sampled_from(sorted(FORMATS))
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def weight_of(name: str, rows: int, columns: int) -> PackedWeight:
    return PackedWeight.quantize(name, torch.randn(rows, columns))


def activations(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """x `[T, K]`, and what 8 bits hold of it: no number lies near the middle of two steps, where the order
    of multiplications decides which way it is rounded."""
    q = torch.randint(-126, 127, (rows, columns // 32, 32)).float()
    noise = torch.empty_like(q).uniform_(-0.4, 0.4)
    largest = torch.randint(32, (rows, columns // 32, 1))
    q.scatter_(2, largest, 127.0)
    noise.scatter_(2, largest, 0.0)
    scale = torch.exp2(torch.empty(rows, columns // 32, 1).uniform_(-12, 6))
    x = (q + noise) * scale
    step = x.gather(2, largest) / 127
    return x.view(rows, columns), (q * step).view(rows, columns)


def times(
    weight: PackedWeight, x: Tensor, y: Tensor | None = None, *, add: bool = False, n: int = 2
) -> Tensor:
    out = torch.empty(len(x), weight.shape[0]) if y is None else y
    native.linear(weight.native, x, out, add, n)
    return out


def assert_product(y: Tensor, x: Tensor, weight: PackedWeight, extra: Tensor | float = 0.0) -> None:
    """y equals x times the weight, to 1e-5 of what was added up."""
    dense = weight.dense().double()
    added = x.double().abs() @ dense.abs().t()
    difference = (y.double() - (x.double() @ dense.t() + extra)).abs()
    assert (difference <= 1e-5 * added + 1e-6).all(), (difference / added).max()


def bits(x: Tensor) -> Tensor:
    """Equal where every bit is, NaN included."""
    return x.contiguous().view(torch.int32)


# -- linear -------------------------------------------------------------------------------------------------


@few
@given(formats, st.integers(1, 70), st.integers(1, 6), st.sampled_from(ROWS), seeds)
def test_linear_is_the_product_with_8_bit_activations(
    name: str, n: int, blocks: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, (x, x8) = weight_of(name, n, 32 * blocks), activations(rows, 32 * blocks)
    assert_product(times(weight, x), x8, weight)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_is_near_the_dense_product(name: str, rows: int) -> None:
    torch.manual_seed(rows)
    weight, x = weight_of(name, 27, 320), torch.randn(rows, 320)
    expected = x @ weight.dense().t()
    # Steps of 1 / 127 of a block's largest number, about 2.5: an error of 0.006 each, 0.1 over 320 columns.
    torch.testing.assert_close(times(weight, x), expected, rtol=0, atol=0.6)


@few
@given(formats, st.integers(1, 40), st.integers(1, 9), seeds)
def test_linear_adds_its_bias(name: str, n: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, bias, (x, x8) = weight_of(name, n, 64), torch.randn(n), activations(rows, 64)
    biased = native.Weight(FORMATS[name].code, n, 64, weight.data, bias)
    y = torch.empty(rows, n)
    native.linear(biased, x, y, False, 2)
    assert_product(y, x8, weight, bias.double())


@few
@given(formats, st.integers(1, 40), st.integers(1, 9), seeds)
def test_linear_adds_to_what_is_there(name: str, n: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight, (x, x8), before = weight_of(name, n, 96), activations(rows, 96), torch.randn(rows, n)
    assert_product(times(weight, x, before.clone(), add=True), x8, weight, before.double())


@few
@given(formats, st.integers(1, 30), st.sampled_from(ROWS), st.integers(0, 9), st.integers(0, 9), seeds)
def test_strided_rows_give_the_same_bits_and_nothing_else_is_written(
    name: str, n: int, rows: int, before: int, after: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, (x, _) = weight_of(name, n, 64), activations(rows, 64)
    wide_x, wide_y = (
        torch.full((rows, before + 64 + after), torch.nan),
        torch.full((rows, before + n + after), 7.0),
    )
    wide_x[:, before : before + 64] = x
    times(weight, wide_x[:, before : before + 64], wide_y[:, before : before + n])
    assert torch.equal(wide_y[:, before : before + n], times(weight, x))
    assert (wide_y[:, :before] == 7).all() and (wide_y[:, before + n :] == 7).all()


@few
@given(
    formats,
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(0, 17),
    st.integers(0, 67),
    st.sampled_from(ISAS),
    seeds,
)
def test_unaligned_memory_gives_the_same_bits(
    name: str, n: int, rows: int, floats: int, odd_bytes: int, isa: str, seed: int
) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    weight, (x, _) = weight_of(name, n, 64), activations(rows, 64)
    data = torch.empty(odd_bytes + weight.data.numel(), dtype=torch.uint8)[odd_bytes:]
    data.copy_(weight.data.view(-1))
    moved_x = torch.empty(floats + x.numel())[floats:].view(rows, 64).copy_(x)
    moved_y = torch.empty(floats + rows * n)[floats:].view(rows, n)
    native.linear(native.Weight(FORMATS[name].code, n, 64, data), moved_x, moved_y, False, 2)
    assert torch.equal(moved_y, times(weight, x))
    ids, unpacked = torch.arange(n), torch.empty(floats + n * 64)[floats:].view(n, 64)
    native.unpack(native.Weight(FORMATS[name].code, n, 64, data), ids, unpacked, 2)
    assert torch.equal(unpacked, weight.dense())


@few
@given(
    formats,
    st.integers(1, 40),
    st.sampled_from(ROWS[1:]),
    st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    seeds,
)
def test_what_is_not_finite_spreads_to_its_whole_row_and_no_other(
    name: str, n: int, rows: int, value: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, (x, _) = weight_of(name, n, 96), activations(rows, 96)
    clean, row = times(weight, x), seed % rows
    x[row, seed % 96] = value
    y = times(weight, x)
    assert not y[row].isfinite().any()
    others = torch.arange(rows) != row
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 1e-20, 1e20, 1e29])
def test_rows_of_any_size_stay_finite(name: str, value: float) -> None:
    weight, x = weight_of(name, 16, 64), torch.full((3, 64), value)
    y = times(weight, x)
    # Below 1e-30 a block counts as zero.
    expected = x if value > 1e-30 else torch.zeros_like(x)
    torch.testing.assert_close(y, expected @ weight.dense().t(), rtol=1e-4, atol=1e-5 * value + 1e-29)


@few
@given(formats, st.integers(1, 70), st.integers(1, 6), st.sampled_from(ROWS[1:]), seeds)
def test_a_rows_product_is_the_same_bits_alone_in_a_batch_and_in_any_number_of_threads(
    name: str, n: int, blocks: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = weight_of(name, n, 32 * blocks), torch.randn(rows, 32 * blocks)
    once = times(weight, x, n=1)
    for threads in (1, 2, 3, 4):
        assert torch.equal(times(weight, x, n=threads), once)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(times(weight, x[row : row + 1])[0], once[row])


def test_a_large_product_is_the_same_bits_in_every_run() -> None:
    torch.manual_seed(0)
    weight, x = weight_of("Q4_1", 700, 512), torch.randn(70, 512)
    first = times(weight, x)
    assert all(torch.equal(times(weight, x, n=1 + run % 4), first) for run in range(8))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_set_computes_the_same_product(name: str, isa: str) -> None:
    torch.manual_seed(1)
    weight, (x, x8) = weight_of(name, 43, 160), activations(7, 160)
    added = x8.abs() @ weight.dense().abs().t()
    native.use_isa("portable")
    expected = times(weight, x)
    native.use_isa(isa)
    assert ((times(weight, x) - expected).abs() <= 1e-6 * added).all()


@pytest.mark.skipif("AVX512-VNNI+AMX" not in ISAS, reason="a machine with AMX is needed")
@settings(max_examples=150, deadline=None)
@given(
    formats,
    st.integers(1, 100),
    st.integers(1, 30),
    st.integers(1, 70) | st.sampled_from([127, 128, 129, 145, 300]),
    st.sampled_from([None, torch.nan, torch.inf]),
    seeds,
)
def test_tiles_give_the_same_bits_as_vectors(
    name: str, n: int, blocks: int, rows: int, value: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = weight_of(name, n, 32 * blocks), torch.randn(rows, 32 * blocks)
    before, row = torch.randn(rows, n), seed % rows
    if value is not None:
        x[row, seed % (32 * blocks)] = value
    results = []
    for isa in ("AVX512-VNNI+AMX", "AVX512-VNNI"):
        native.use_isa(isa)
        results.append((times(weight, x), times(weight, x, before.clone(), add=True)))
    finite = torch.ones(rows, dtype=torch.bool)
    finite[row] = value is None
    for tiles, vectors in zip(*results, strict=True):
        assert torch.equal(bits(tiles[finite]), bits(vectors[finite]))
        assert not tiles[~finite].isfinite().any() and not vectors[~finite].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_set_reaches_the_ends_of_its_integers(name: str, isa: str) -> None:
    """Sums of the largest products there are: 8 or 16 bits of an intermediate result would overflow."""
    format = FORMATS[name]
    native.use_isa(isa)
    for byte in (0x00, 0x7F, 0x80, 0x81, 0xFF):
        rows = torch.full((9, 2, format.row_bytes), byte, dtype=torch.uint8).numpy()
        rows[..., : 2 * format.halves] = torch.tensor([1.0] * format.halves).half().view(torch.uint8).numpy()
        weight = PackedWeight.pack(name, rows.reshape(9, -1))
        for x in (torch.full((5, 64), 127.0), torch.full((5, 64), -127.0)):
            assert torch.equal(times(weight, x), x @ weight.dense().t())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_unpack_equals_gguf_own_numbers_on_every_half(name: str, isa: str) -> None:
    """Scales of every float16 there is: subnormal, infinite and NaN ones too."""
    format = FORMATS[name]
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(-1, 1).repeat(1, format.halves)
    quants = torch.randint(0, 256, (2**16, format.quant_bytes), dtype=torch.uint8)
    rows = torch.cat((halves.view(torch.uint8), quants), 1).numpy()
    weight = PackedWeight.pack(name, rows)
    native.use_isa(isa)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(rows, GGMLQuantizationType[name]))
    for actual in (weight.dense(), weight.rows(torch.arange(2**16))):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [(0, 29), (3, 29), (8, 24), (5, 6), (13, 15), (7, 17), (29, 29), (24, 29)])
def test_consecutive_rows_are_those_that_are_picked(rows: tuple[int, int], name: str, isa: str) -> None:
    native.use_isa(isa)
    weight, (first, end) = weight_of(name, 29, 96), rows
    picked = weight.rows(torch.arange(first, end))
    assert torch.equal(weight.dense(slice(first, end)), picked)
    around = torch.full((end - first + 2, 100), 7.0)
    inner = around[1:-1, 1:97]
    assert weight.dense(slice(first, end), out=inner) is inner
    assert torch.equal(inner, picked)
    inner.fill_(7)
    assert (around == 7).all()
    assert torch.equal(weight.dense(slice(first, end), out=picked.double()), picked.double())


# -- what is refused ----------------------------------------------------------------------------------------

EIGHT = torch.zeros(1, 2, 8 * 34, dtype=torch.uint8)  # Q8_0 [8, 64]
F = torch.empty


def linear(x: Tensor, y: Tensor, threads: int = 1) -> None:
    native.linear(native.Weight(0, 8, 64, EIGHT), x, y, False, threads)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "format": (lambda: native.Weight(3, 8, 64, EIGHT), "format"),
    "no rows": (lambda: native.Weight(0, 0, 64, EIGHT), "rows"),
    "width": (lambda: native.Weight(0, 8, 63, EIGHT), "columns"),
    "too little data": (lambda: native.Weight(0, 9, 64, EIGHT), "data: 544 bytes, expected 1088"),
    "too much data": (lambda: native.Weight(1, 8, 64, EIGHT), "data: 544 bytes, expected 288"),
    "bias": (lambda: native.Weight(0, 8, 64, EIGHT, F(7)), "bias"),
    "x too wide": (lambda: linear(F(2, 96), F(2, 8)), "x: wrong width"),
    "x strided": (lambda: linear(F(2, 128)[:, ::2], F(2, 8)), "x: the last dimension is strided"),
    "y too wide": (lambda: linear(F(2, 64), F(2, 9)), "y: wrong shape"),
    "y too short": (lambda: linear(F(2, 64), F(1, 8)), "y: wrong shape"),
    "y strided": (lambda: linear(F(2, 64), F(2, 16)[:, ::2]), "y: the last dimension is strided"),
    "no threads": (lambda: linear(F(2, 64), F(2, 8), 0), "threads"),
    "row too high": (
        lambda: native.unpack(native.Weight(0, 8, 64, EIGHT), torch.tensor([8]), F(1, 64), 1),
        "rows",
    ),
    "row below 0": (
        lambda: native.unpack(native.Weight(0, 8, 64, EIGHT), torch.tensor([-1]), F(1, 64), 1),
        "rows",
    ),
    "rows too high": (
        lambda: native.unpack_rows(native.Weight(0, 8, 64, EIGHT), 7, F(2, 64), 1),
        "first: rows out of range",
    ),
    "rows below 0": (
        lambda: native.unpack_rows(native.Weight(0, 8, 64, EIGHT), -1, F(2, 64), 1),
        "first: rows out of range",
    ),
    "rows out": (lambda: native.unpack_rows(native.Weight(0, 8, 64, EIGHT), 0, F(2, 32), 1), "out"),
    "unpack out": (
        lambda: native.unpack(native.Weight(0, 8, 64, EIGHT), torch.tensor([1]), F(1, 32), 1),
        "out",
    ),
    "isa": (lambda: native.use_isa("Z80"), "Z80"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()
