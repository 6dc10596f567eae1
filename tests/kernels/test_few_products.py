"""Float32 products of few rows: every instruction set against float64, and when they are used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import ISAS
from tokenloom.kernels import get_kernels, native
from tokenloom.kernels.cpu import FEW_ROWS
from tokenloom.kernels.torch_ops import SMALL_WEIGHT

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 6),
    n=st.sampled_from([1, 7, 8, 31, 33, 100]),
    k=st.sampled_from([8, 16, 24, 64, 200]),
    odd=st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_are_those_of_float64(
    usual_machine: None, isa: str, rows: int, n: int, k: int, odd: bool
) -> None:
    native.use_isa(isa)
    torch.manual_seed(n)
    x, weights = torch.randn(rows, k), torch.randn(n * k + 1)[int(odd) : n * k + int(odd)].view(n, k)
    y = torch.full((rows, n), torch.nan)
    native.few_products(x, weights, y, 2)
    torch.testing.assert_close(y.double(), x.double() @ weights.double().t(), rtol=1e-5, atol=1e-4)


def test_the_backend_uses_them_for_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = native.few_products
    monkeypatch.setattr(native, "few_products", lambda *args: asked.append(rows) or real(*args))
    kernels, large = get_kernels("cpu"), torch.randn(SMALL_WEIGHT // 64 + 8, 64)
    bias = torch.randn(len(large))
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, 64)
        expected = x.double() @ large.double().t() + bias
        torch.testing.assert_close(kernels.linear(x, large, bias).double(), expected, rtol=1e-5, atol=1e-4)
    kernels.linear(torch.randn(1, 64), large[:8])
    assert asked == [1, FEW_ROWS]


def test_a_row_has_the_same_bits_beside_any_others() -> None:
    kernels = get_kernels("cpu")
    x, weight = torch.randn(FEW_ROWS, 64), torch.randn(SMALL_WEIGHT // 64 + 8, 64)
    together = kernels.linear(x, weight)
    assert all(torch.equal(kernels.linear(x[i : i + 1], weight)[0], together[i]) for i in range(len(x)))


def test_what_is_not_a_number_spreads_to_its_row_alone() -> None:
    x, weights, y = torch.randn(3, 16), torch.randn(9, 16), torch.empty(3, 9)
    x[1, 3] = torch.nan
    native.few_products(x, weights, y, 1)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="weights: wrong width"):
        native.few_products(torch.zeros(1, 16), torch.zeros(3, 8), torch.zeros(1, 3), 1)
    with pytest.raises(ValueError, match="weights: wrong width"):
        native.few_products(torch.zeros(1, 12), torch.zeros(3, 12), torch.zeros(1, 3), 1)
    with pytest.raises(ValueError, match="y: wrong shape"):
        native.few_products(torch.zeros(1, 16), torch.zeros(3, 16), torch.zeros(1, 4), 1)
