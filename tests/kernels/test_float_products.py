"""Float32 products in AMX tiles, against float64: gradients of frozen weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenloom.kernels import get_kernels, native
from tokenloom.kernels.cpu import TILE_ROWS

pytestmark = pytest.mark.skipif(
    native is None or not native.has_float_products(), reason="this machine has no AMX, or no native kernels"
)

# Of the exact result, in the mean: each product is off by at most 2^-15, up and down.
OFF = 6e-6


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@given(
    rows=st.sampled_from([1, 15, 32, 33, 100, 545]),
    n=st.sampled_from([1, 16, 31, 64, 65, 100]),
    k=st.sampled_from([1, 2, 31, 32, 33, 288, 289, 600]),
    add=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_strides_and_threads(rows: int, n: int, k: int, add: bool, threads: int) -> None:
    torch.manual_seed(rows + n + k)
    x, w = torch.randn(rows, k + 3)[:, 1 : k + 1], torch.randn(k, n + 5)[:, 2 : n + 2]
    y = torch.randn(rows, n) if add else torch.full((rows, n), torch.nan)
    before = y.double() if add else torch.zeros(rows, n, dtype=torch.float64)
    exact = before + x.double() @ w.double()
    native.float_products(x, w, y, add, threads)
    size = before.abs() + x.double().abs() @ w.double().abs()
    assert ((y - exact).abs() <= 2**-15 * size).all()
    assert add or min(k, n) < 30 or off(y, exact) < OFF


def test_small_and_large_numbers_keep_their_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.logspace(-20, 15, 64)[:, None]
    w, y = torch.randn(96, 64), torch.empty(64, 64)
    native.float_products(x, w, y, False, 2)
    exact = x.double() @ w.double()
    assert max(off(y[i], exact[i]) for i in range(64)) < 2 * OFF


def test_integers_are_exact() -> None:
    x, w = torch.randint(-300, 300, (70, 80)).float(), torch.randint(-9, 9, (80, 40)).float()
    y = torch.empty(70, 40)
    native.float_products(x, w, y, False, 2)
    assert torch.equal(y, x @ w)


def test_what_is_not_a_number_spreads_to_its_row_alone() -> None:
    x, w, y = torch.randn(40, 64), torch.randn(64, 40), torch.empty(40, 40)
    x[3, 5] = torch.nan
    native.float_products(x, w, y, False, 1)
    assert y[3].isnan().all() and y[[i for i in range(40) if i != 3]].isfinite().all()


def test_the_same_bits_every_time_and_with_any_rows_beside() -> None:
    x, w = torch.randn(600, 300), torch.randn(300, 100)
    y, again, some = torch.empty(600, 100), torch.empty(600, 100), torch.empty(50, 100)
    native.float_products(x, w, y, False, 2)
    native.float_products(x, w, again, False, 1)
    native.float_products(x[37:87], w, some, False, 2)
    assert torch.equal(y, again) and torch.equal(y[37:87], some)


def test_the_backend_uses_them_for_gradients_of_many_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = native.float_products
    monkeypatch.setattr(native, "float_products", lambda *args: asked.append(args[3]) or real(*args))
    kernels, weight = get_kernels("cpu"), torch.randn(200, 160)
    for rows, wanted in ((TILE_ROWS - 1, []), (TILE_ROWS, [False, True])):
        dy, extra = torch.randn(rows, 200), torch.randn(rows, 160)
        exact = dy.double() @ weight.double()
        assert off(kernels.linear_backward(dy, weight), exact) < OFF
        assert off(kernels.linear_backward(dy, weight, extra.clone()), exact + extra) < OFF
        assert asked == wanted
    kernels.linear(torch.randn(TILE_ROWS, 160), weight)
    kernels.linear_backward(torch.randn(TILE_ROWS, 200).double(), weight.double())
    assert asked == wanted


def test_what_does_not_fit_is_refused() -> None:
    x, w, y = torch.zeros(4, 8), torch.zeros(8, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match="w: wrong shape"):
        native.float_products(x, torch.zeros(7, 5), y, False, 1)
    with pytest.raises(ValueError, match="y: wrong shape"):
        native.float_products(x, w, torch.zeros(3, 5), False, 1)
    with pytest.raises(ValueError, match="x: the last dimension is strided"):
        native.float_products(torch.zeros(8, 4).t(), w, y, False, 1)
    with pytest.raises(ValueError, match="empty"):
        native.float_products(torch.zeros(4, 0), torch.zeros(0, 5), y, False, 1)
