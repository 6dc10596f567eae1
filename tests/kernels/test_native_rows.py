"""What the native kernels do row by row, against the reference: norms, gates, the largest logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.kernels import get_kernels, native

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")

REFERENCE = get_kernels("reference")
ISAS = native.isas() if native is not None else []
seeds = st.integers(0, 2**31)
few = settings(max_examples=40, deadline=None)


def normed(x: Tensor, weight: Tensor, eps: float = 1e-5, threads: int = 2) -> Tensor:
    out = torch.empty(x.shape)
    native.rms_norm(x, weight, eps, out, threads)
    return out


def gated(x: Tensor, threads: int = 2) -> Tensor:
    out = torch.empty(len(x), x.shape[1] // 2 + 3)[:, : x.shape[1] // 2]
    native.silu_mul(x, out, threads)
    return out


@few
@given(
    st.sampled_from([0, 1, 2, 7, 33]), st.integers(1, 100), st.floats(1e-6, 1e6), st.sampled_from(ISAS), seeds
)
def test_rms_norm_equals_reference(rows: int, width: int, size: float, isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    x, weight = torch.randn(rows, width + 3)[:, 1 : width + 1] * size, torch.randn(width)
    expected = REFERENCE.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed(x, weight).double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_rms_norm_of_a_row_that_overflows_is_the_references(value: float) -> None:
    x, weight = torch.ones(3, 19), torch.ones(19)
    clean = normed(x, weight)
    x[1, 5] = value
    torch.testing.assert_close(normed(x, weight), REFERENCE.rms_norm(x, weight, 1e-5), equal_nan=True)
    assert torch.equal(normed(x, weight)[[0, 2]], clean[[0, 2]])


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(normed(torch.zeros(2, 24), torch.ones(24)), torch.zeros(2, 24))


@few
@given(
    st.sampled_from([0, 1, 2, 7, 33]), st.integers(1, 60), st.floats(0.01, 60), st.sampled_from(ISAS), seeds
)
def test_silu_mul_equals_reference(rows: int, width: int, size: float, isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    x = torch.randn(rows, 2 * width + 5)[:, 2 : 2 * width + 2] * size
    torch.testing.assert_close(gated(x).double(), REFERENCE.silu_mul(x.double()), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 5, 8, 24])
@pytest.mark.parametrize(
    "gate", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 88.8, -87.4, -104.0, 0.0, -0.0]
)
def test_silu_mul_of_extreme_gates_is_the_references(gate: float, width: int, isa: str) -> None:
    native.use_isa(isa)
    x = torch.cat((torch.full((2, width), gate), torch.full((2, width), 3.0)), 1)
    expected = REFERENCE.silu_mul(x.double()).float()
    torch.testing.assert_close(gated(x), expected, rtol=1e-5, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_the_exponential_is_right_over_its_whole_range(isa: str) -> None:
    """As silu uses it: gate / (1 + e^-gate)."""
    native.use_isa(isa)
    gate = torch.linspace(-87.2, 88.6, 2**16)
    out = gated(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    expected = (gate.double() / (1 + torch.exp(-gate.double()))).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@few
@given(st.integers(0, 5), st.integers(1, 90), st.floats(1e-2, 1e2), st.sampled_from(ISAS), seeds)
def test_rms_norm_backward_is_autograds(rows: int, width: int, size: float, isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    weight, before = torch.randn(width), torch.randn(rows, width + 3)
    x, dy = (torch.randn(rows, width + 2)[:, 1 : width + 1] * size for _ in range(2))
    wide = x.double().requires_grad_()
    REFERENCE.rms_norm(wide, weight.double(), 1e-5).backward(dy.double())
    assert wide.grad is not None
    expected = before[:, 2 : width + 2].double() + wide.grad
    ours, reference = before.clone(), before.double()
    native.rms_norm_backward(ours[:, 2 : width + 2], dy, x, weight, 1e-5, 2)
    torch.testing.assert_close(ours[:, 2 : width + 2].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[:, :2], before[:, :2]) and torch.equal(ours[:, -1], before[:, -1])
    args = (dy.double(), x.double(), weight.double(), 1e-5)
    REFERENCE.rms_norm_backward(reference[:, 2 : width + 2], *args)
    torch.testing.assert_close(reference[:, 2 : width + 2], expected, rtol=1e-9, atol=1e-9)


@few
@given(st.integers(0, 5), st.integers(1, 90), st.floats(1e-2, 30), st.sampled_from(ISAS), seeds)
def test_silu_mul_backward_is_autograds(rows: int, width: int, size: float, isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    gate_up, dy = torch.randn(rows, 2 * width + 3)[:, 1:-2] * size, torch.randn(rows, width + 1)[:, 1:]
    wide = gate_up.double().requires_grad_()
    REFERENCE.silu_mul(wide).backward(dy.double())
    out = torch.empty(rows, 2 * width)
    native.silu_mul_backward(dy, gate_up, out, 2)
    torch.testing.assert_close(out.double(), wide.grad, rtol=1e-5, atol=1e-5)
    reference = REFERENCE.silu_mul_backward(dy.double(), gate_up.double())
    torch.testing.assert_close(reference, wide.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_of_a_row_that_is_not_finite_show_it(value: float) -> None:
    x, dy, dx, weight = torch.randn(3, 24), torch.randn(3, 24), torch.zeros(3, 24), torch.ones(24)
    dy[1, 5] = value
    native.rms_norm_backward(dx, dy, x, weight, 1e-5, 1)
    assert dx.isfinite().all(1).tolist() == [True, False, True]
    out = torch.empty(3, 48)
    native.silu_mul_backward(dy, torch.randn(3, 48), out, 1)
    assert out.isfinite().all(1).tolist() == [True, False, True]


def test_gradients_refuse_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        native.rms_norm_backward(
            torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, 8), torch.ones(8), 1e-5, 1
        )
    with pytest.raises(ValueError, match="wrong shape"):
        native.silu_mul_backward(torch.zeros(2, 8), torch.zeros(2, 14), torch.zeros(2, 16), 1)


def largest(x: Tensor, k: int, threads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    norms = torch.empty(len(x))
    native.top(x, values, ids, norms, threads)
    return values, ids, norms


@few
@given(st.integers(0, 6), st.integers(1, 400), st.data(), st.floats(1e-3, 1e3), st.sampled_from(ISAS), seeds)
def test_top_is_the_largest_in_order(
    rows: int, width: int, data: st.DataObject, size: float, isa: str, seed: int
) -> None:
    torch.manual_seed(seed)
    native.use_isa(isa)
    k = data.draw(st.integers(1, width))
    x = torch.randn(rows, width + 2)[:, 1 : width + 1] * size
    values, ids, norms = largest(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x.gather(1, ids), values)
    torch.testing.assert_close(norms.double(), x.double().logsumexp(-1), rtol=1e-6, atol=1e-5)


@few
@given(st.integers(1, 200), st.data(), seeds)
def test_equal_logits_come_in_the_order_of_their_ids(width: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, width))
    x = torch.randint(-2, 3, (2, width)).float()
    expected = x.sort(dim=-1, descending=True, stable=True)
    values, ids, _ = largest(x, k)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(ids, expected.indices[:, :k])


def test_banned_tokens_come_last_and_weigh_nothing() -> None:
    x = torch.full((2, 50), -torch.inf)
    x[0, [7, 30]] = torch.tensor([1.0, 2.0])
    values, ids, norms = largest(x, 3)
    assert ids[0, :2].tolist() == [30, 7] and values[0].tolist() == [2.0, 1.0, -torch.inf]
    torch.testing.assert_close(norms, x.logsumexp(-1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_is_first_and_shows_in_its_own_rows_norm(value: float) -> None:
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(0))
    x[1, 20] = value
    values, ids, norms = largest(x, 2)
    torch.testing.assert_close(values, x.topk(2).values, rtol=0, atol=0, equal_nan=True)
    assert ids[1, 0] == 20
    torch.testing.assert_close(norms, x.logsumexp(-1), equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_row_operators_give_the_same_bits_in_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(37, 90), torch.randn(90)
    assert torch.equal(normed(x, weight, threads=threads), normed(x, weight, threads=1))
    assert torch.equal(gated(x, threads), gated(x, 1))
    for some, same in zip(largest(x, 9, threads), largest(x, 9, 1), strict=True):
        assert torch.equal(some, same)


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 4096 + 24])
def test_read_all_sums_the_words(offset: int, num_bytes: int) -> None:
    data = torch.randint(0, 256, (offset + num_bytes,), dtype=torch.uint8)[offset:]
    words = data[: num_bytes // 8 * 8].clone().view(torch.int64)
    assert native.read_all(data, 2) == int(words.sum()) % 2**64


F = torch.empty
LONG = torch.int64
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm width": (lambda: native.rms_norm(F(2, 8), F(9), 0.0, F(2, 8), 1), "rms_norm"),
    "norm out": (lambda: native.rms_norm(F(2, 8), F(8), 0.0, F(3, 8), 1), "rms_norm"),
    "norm strided": (lambda: native.rms_norm(F(2, 16)[:, ::2], F(8), 0.0, F(2, 8), 1), "x: "),
    "silu width": (lambda: native.silu_mul(F(2, 8), F(2, 5), 1), "silu_mul"),
    "silu out strided": (lambda: native.silu_mul(F(2, 8), F(2, 8)[:, ::2], 1), "out: "),
    "silu out": (lambda: native.silu_mul(F(2, 8), F(2, 8), 1), "silu_mul"),
    "silu strided": (lambda: native.silu_mul(F(2, 16)[:, ::2], F(2, 4), 1), "gate_up: "),
    "top of none": (lambda: native.top(F(2, 8), F(2, 0), F(2, 0, dtype=LONG), F(2), 1), "values: "),
    "top of too many": (lambda: native.top(F(2, 8), F(2, 9), F(2, 9, dtype=LONG), F(2), 1), "values: "),
    "top ids": (lambda: native.top(F(2, 8), F(2, 3), F(2, 4, dtype=LONG), F(2), 1), "values, ids, norms"),
    "top norms": (lambda: native.top(F(2, 8), F(2, 3), F(2, 3, dtype=LONG), F(3), 1), "values, ids, norms"),
    "top strided": (lambda: native.top(F(2, 16)[:, ::2], F(2, 3), F(2, 3, dtype=LONG), F(2), 1), "x: "),
    "no threads": (lambda: native.top(F(2, 8), F(2, 3), F(2, 3, dtype=LONG), F(2), 0), "threads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_of_row_operators_are_refused_by_name(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_results_are_never_written_to_a_converted_copy() -> None:
    with pytest.raises(TypeError, match="out: ndarray"):
        native.silu_mul(F(2, 8), F(2, 4, dtype=torch.float64), 1)
    with pytest.raises(TypeError, match="values: ndarray"):
        native.top(F(2, 8), F(2, 3, dtype=torch.float64), F(2, 3, dtype=LONG), F(2), 1)
