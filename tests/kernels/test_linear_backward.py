"""Gradients through packed weights, which are unpacked right before they are multiplied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.kernels import FORMATS, PackedWeight, get_kernels, native
from tokenloom.kernels.cpu import TILE_ROWS

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")

ISAS = native.isas() if native is not None else []
few = settings(max_examples=60, deadline=None)


def backward(weight: PackedWeight, dy: Tensor, dx: Tensor | None = None, threads: int = 2) -> Tensor:
    out = torch.empty(len(dy), weight.shape[1]) if dx is None else dx
    native.linear_backward(weight.native, dy, out, dx is not None, threads)
    return out


@few
@given(
    name=st.sampled_from(sorted(FORMATS)),
    rows=st.sampled_from([0, 1, 3, 4, 8, 9, 127, 128, 129, 300]),
    n=st.sampled_from([1, 7, 8, 50, 127, 128, 136, 260]),
    blocks=st.integers(1, 11),
    add=st.booleans(),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
)
def test_any_shape_format_strides_and_threads(
    name: str, rows: int, n: int, blocks: int, add: bool, isa: str, threads: int
) -> None:
    torch.manual_seed(rows + n + blocks)
    native.use_isa(isa)
    weight = PackedWeight.quantize(name, torch.randn(n, 32 * blocks))
    dy, whole = torch.randn(rows, n + 5)[:, 2 : n + 2], torch.randn(rows, 32 * blocks + 7)
    before, dx = whole.clone(), whole[:, 3 : 32 * blocks + 3]
    start = dx.double() if add else torch.zeros(rows, 32 * blocks, dtype=torch.float64)
    dense = weight.dense().double()
    native.linear_backward(weight.native, dy, dx, add, threads)
    added = start.abs() + dy.double().abs() @ dense.abs()
    assert ((dx - (start + dy.double() @ dense)).abs() <= 1e-5 * added).all()
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, -4:], before[:, -4:])


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_with_any_threads_and_any_rows_beside(isa: str) -> None:
    native.use_isa(isa)
    weight, dy = PackedWeight.quantize("Q4_1", torch.randn(200, 416)), torch.randn(270, 200)
    found = backward(weight, dy)
    for threads in (1, 3, 7):
        assert torch.equal(found, backward(weight, dy, threads=threads))
    assert torch.equal(found[37:87], backward(weight, dy[37:87]))


def test_what_is_not_a_number_spreads_to_its_row_alone() -> None:
    weight, dy = PackedWeight.quantize("Q8_0", torch.randn(64, 96)), torch.randn(21, 64)
    dy[3, 5] = torch.nan
    found = backward(weight, dy)
    assert found[3].isnan().all()
    assert found[[i for i in range(21) if i != 3]].isfinite().all()


def test_the_backend_reads_packed_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    weight, kernels = PackedWeight.quantize("Q4_0", torch.randn(160, 320)), get_kernels("cpu")
    exact = weight.dense().double()
    real = native.unpack_rows
    monkeypatch.setattr(native, "unpack_rows", lambda *args: unpacked.append(1) or real(*args))
    for rows in (1, TILE_ROWS - 1, TILE_ROWS):
        dy, extra = torch.randn(rows, 160), torch.randn(rows, 320)
        wanted = dy.double() @ exact
        assert torch.allclose(kernels.linear_backward(dy, weight).double(), wanted, atol=1e-3)
        assert torch.allclose(
            kernels.linear_backward(dy, weight, extra.clone()).double(), wanted + extra, atol=1e-3
        )
        assert bool(unpacked) == (rows == TILE_ROWS and native.has_float_products())
    strided = torch.randn(160, 9).t()
    assert torch.allclose(
        kernels.linear_backward(strided, weight).double(), strided.double() @ exact, atol=1e-3
    )


def test_what_does_not_fit_is_refused() -> None:
    weight = PackedWeight.quantize("Q8_0", torch.randn(16, 32))
    with pytest.raises(ValueError, match="dy: wrong width"):
        backward(weight, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="dx: wrong shape"):
        backward(weight, torch.zeros(4, 16), torch.zeros(3, 32))
    with pytest.raises(ValueError, match="dy: the last dimension is strided"):
        backward(weight, torch.zeros(16, 4).t())
