"""The gradient of attention, in every backend, against autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import BLOCK, ISAS, Case, batch, in_float64, ragged, table
from tokenloom.kernels import get_kernels, native

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")

F = torch.zeros


def by_autograd(case: Case, d_out: Tensor, firsts: list[int], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of plain attention in float64."""
    q, kv = case.q.double().requires_grad_(), in_float64(case.kv)
    kv_heads, head_dim = kv.keys[0].shape[1:]
    dk, dv = (torch.zeros(kv_heads, tokens, head_dim, dtype=torch.float64) for _ in "kv")
    total, read = torch.zeros((), dtype=torch.float64), []
    for span in case.spans:
        k, v = (part.clone().requires_grad_() for part in span.read(kv, 0))
        read.append((k, v))
        rows = q[span.start : span.start + span.length].view(span.length, kv_heads, -1, head_dim)
        scores = torch.einsum("nhgd,lhd->nhgl", rows, k) / math.sqrt(head_dim)
        last = torch.arange(span.kv_len - span.length, span.kv_len)[:, None]
        keys = torch.arange(span.kv_len)
        hidden = (keys > last) | ((keys <= last - case.window) if case.window else (keys < 0))
        weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
        out = torch.einsum("nhgl,lhd->nhgd", weights, v).reshape(span.length, -1, head_dim)
        total = total + (out * d_out[span.start : span.start + span.length]).sum()
    total.backward()
    for span, first, (k, v) in zip(case.spans, firsts, read, strict=True):
        dk[:, first : first + span.kv_len] += k.grad.transpose(0, 1)
        dv[:, first : first + span.kv_len] += v.grad.transpose(0, 1)
    return q.grad, dk, dv


def gradients_of(
    case: Case, d_out: Tensor, firsts: list[int], tokens: int, backend: str = "cpu", threads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, kv = get_kernels(backend), case.kv
    kv_heads, head_dim = kv.keys[0].shape[1:]
    torch.set_num_threads(threads)
    out, kept = kernels.attention_for_backward(case.q, kv, 0, case.spans, case.window)
    dk, dv = (torch.full((kv_heads, tokens, head_dim), 0.5, dtype=case.q.dtype) for _ in "kv")
    dq = kernels.attention_backward(d_out, case.q, out, kept, kv, 0, case.spans, firsts, dk, dv, case.window)
    return dq, dk - 0.5, dv - 0.5


def places(case: Case) -> tuple[list[int], int]:
    """Samples one after another, with a gap before each."""
    firsts, at = [], 0
    for part in case.spans:
        firsts.append(at + 3)
        at += 3 + part.kv_len
    return firsts, at + 2


@settings(max_examples=100, deadline=None)
@given(ragged(dtypes=(torch.float32,)), st.sampled_from(["torch", "reference", *ISAS]))
def test_gradients_are_autograds(case: Case, backend: str) -> None:
    firsts, tokens = places(case)
    d_out = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(3))
    wanted = by_autograd(case, d_out.double(), firsts, tokens)
    if backend in ISAS:
        native.use_isa(backend)
        backend = "cpu"
    for found, expected in zip(gradients_of(case, d_out, firsts, tokens, backend), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("rows", "past"), [(300, 0), (200, 190), (30, 500)])
def test_gradients_of_long_samples_are_autograds(rows: int, past: int, window: int | None, isa: str) -> None:
    native.use_isa(isa)
    case = batch(1, [(rows, past)], kv_heads=2, group=3, head_dim=64, window=window)
    d_out = torch.randn(case.q.shape)
    wanted = by_autograd(case, d_out.double(), [0], rows + past)
    for found, expected in zip(gradients_of(case, d_out, [0], rows + past), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-5)


def test_gradients_have_the_same_bits_in_any_number_of_threads() -> None:
    case = batch(2, [(150, 0), (40, 60), (1, 9)], kv_heads=3, group=3, head_dim=32)
    firsts, tokens = places(case)
    d_out = torch.randn(case.q.shape)
    results = [gradients_of(case, d_out, firsts, tokens, threads=n) for n in (1, 2, 3, 4, 2)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_sample_that_is_not_finite_spoils_its_own_gradient() -> None:
    case = batch(2, [(30, 0), (12, 20), (9, 0)], kv_heads=1, group=2, head_dim=16)
    firsts, tokens = places(case)
    d_out = torch.randn(case.q.shape)
    clean = gradients_of(case, d_out, firsts, tokens)
    d_out[30 + 5, 1, 3] = math.nan
    dq, dk, dv = gradients_of(case, d_out, firsts, tokens)
    assert dq[30 + 5, 1].isnan().all() and not dq[torch.arange(51) != 35].isnan().any()
    mine = slice(firsts[1], firsts[1] + 32)
    for found, expected in ((dk, clean[1]), (dv, clean[2])):
        assert found[:, mine].isnan().any()
        found, expected = found.clone(), expected.clone()
        found[:, mine] = expected[:, mine] = 0
        assert torch.equal(found, expected)


def gradient_call(**changed: Any) -> None:
    kv = native.KV([torch.zeros(16, 2, 8)], [torch.zeros(16, 2, 8)], [], [])
    good = {
        "dq": F(2, 4, 8),
        "dk": F(2, 5, 8),
        "dv": F(2, 5, 8),
        "d_out": torch.zeros(2, 4, 8),
        "q": torch.zeros(2, 4, 8),
        "out": torch.zeros(2, 4, 8),
        "lse": torch.zeros(2, 4),
        "kv": kv,
        "layer": 0,
        "spans": table((0, 2, 5, 0)),
        "blocks": torch.tensor([0, 1], dtype=torch.int32),
        "firsts": torch.tensor([0], dtype=torch.int32),
        "block_size": BLOCK,
        "window": 0,
        "threads": 1,
    }
    native.attention_backward(**{**good, **changed})


def quantized_kv() -> Any:
    parts, scales = ([torch.zeros(16, 2, 8, dtype=torch.int8)], [torch.zeros(16, 2)])
    return native.KV(parts, parts, scales, scales)


REFUSED_GRADIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "dq": ({"dq": F(2, 4, 16)}, "dq: wrong shape"),
    "d_out": ({"d_out": F(3, 4, 8)}, "d_out: wrong shape"),
    "out": ({"out": F(2, 2, 8)}, "out: wrong shape"),
    "out strided": ({"out": F(2, 4, 16)[:, :, ::2]}, "out: heads of a row"),
    "lse": ({"lse": F(2, 2)}, "lse: wrong shape"),
    "heads of dk": ({"dk": F(1, 5, 8)}, "dk, dv"),
    "dk and dv": ({"dv": F(2, 6, 8)}, "dk, dv"),
    "dk strided": ({"dk": F(2, 5, 16)[:, :, :8], "dv": F(2, 5, 16)[:, :, :8]}, "dk, dv"),
    "too few tokens": ({"dk": F(2, 4, 8), "dv": F(2, 4, 8)}, "firsts: tokens outside"),
    "first below 0": ({"firsts": torch.tensor([-1], dtype=torch.int32)}, "firsts: tokens outside"),
    "first too high": ({"firsts": torch.tensor([1], dtype=torch.int32)}, "firsts: tokens outside"),
    "firsts": ({"firsts": torch.tensor([0, 0], dtype=torch.int32)}, "firsts: one per span"),
    "layer": ({"layer": 1}, "layer: out of range"),
    "8 bits": ({"kv": quantized_kv}, "cache: float32 expected"),
    "spans": ({"spans": table((1, 2, 5, 0))}, "spans: row 0"),
    "threads": ({"threads": 0}, "threads"),
}


@pytest.mark.parametrize("case", REFUSED_GRADIENTS)
def test_bad_arguments_of_the_gradient_are_refused_by_name(case: str) -> None:
    changed, words = REFUSED_GRADIENTS[case]
    gradient_call()
    with pytest.raises(ValueError, match=words):
        gradient_call(**{key: value() if callable(value) else value for key, value in changed.items()})
