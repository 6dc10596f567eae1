"""Products of queries with chosen keys: every backend against float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import ISAS
from tokenloom.kernels import get_kernels, native
from tokenloom.kernels.cpu import HEAD_DIMS

BACKENDS = ["torch", "reference", *(["cpu"] if native is not None else [])]
WIDTHS = sorted({*HEAD_DIMS, *(2 * d for d in HEAD_DIMS)})


def expected(q: Tensor, keys: Tensor, slots: Tensor, scales: Tensor | None) -> Tensor:
    wide = keys.double() if scales is None else keys.double() * scales.double()[..., None]
    of_each_head = wide[slots].repeat_interleave(len(q) // keys.shape[1], 1)  # [m, Hq, W]
    return torch.einsum("hw,mhw->hm", q.double(), of_each_head)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (1, 8)]))
    width, count = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from([0, 1, 7, 8, 9, 130, 300]))
    slots = torch.randint(0, 64, (count,))
    q = torch.randn(kv_heads * group, width)
    if draw(st.booleans()):
        return q, torch.randn(64, kv_heads, width), slots, None
    narrow = torch.randint(-127, 128, (64, kv_heads, width), dtype=torch.int8)
    return q, narrow, slots, torch.rand(64, kv_heads)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_every_query_meets_the_chosen_keys(backend: str, case: tuple[Any, ...]) -> None:
    actual = get_kernels(backend).key_scores(*case)
    torch.testing.assert_close(actual.double(), expected(*case), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_instruction_set_gives_the_products(
    usual_machine: None, isa: str, case: tuple[Any, ...]
) -> None:
    native.use_isa(isa)
    actual = get_kernels("cpu").key_scores(*case)
    torch.testing.assert_close(actual.double(), expected(*case), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_bits_depend_neither_on_threads_nor_on_the_other_keys(usual_machine: None) -> None:
    q, keys, slots = torch.randn(9, 64), torch.randn(500, 3, 64), torch.randperm(500)
    kernels = get_kernels("cpu")
    torch.set_num_threads(1)
    alone = kernels.key_scores(q, keys, slots)
    torch.set_num_threads(3)
    assert torch.equal(kernels.key_scores(q, keys, slots), alone)
    assert torch.equal(kernels.key_scores(q, keys, slots[131:140]), alone[:, 131:140])


def test_float64_stays_float64() -> None:
    q, keys, slots = (
        torch.randn(4, 16, dtype=torch.float64),
        torch.randn(9, 2, 16).double(),
        torch.tensor([8, 0]),
    )
    for backend in BACKENDS:
        actual = get_kernels(backend).key_scores(q, keys, slots)
        torch.testing.assert_close(actual, expected(q, keys, slots, None), rtol=1e-12, atol=1e-12)


def refuse(words: str, **changed: Any) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(4, 16),
        "keys": torch.zeros(8, 2, 16),
        "scales": None,
        "slots": torch.tensor([0, 7]),
        "out": torch.zeros(4, 2),
        "threads": 1,
    }
    native.key_scores(**good)
    with pytest.raises(ValueError, match=words):
        native.key_scores(**{**good, **changed})


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_what_does_not_fit_is_refused() -> None:
    refuse("slots: out of range", slots=torch.tensor([0, 8]))
    refuse("slots: out of range", slots=torch.tensor([-1, 0]))
    refuse("keys: wrong width", keys=torch.zeros(8, 2, 8))
    refuse("keys: wrong width", q=torch.zeros(4, 12), keys=torch.zeros(8, 2, 12))
    refuse("heads: not a multiple", q=torch.zeros(3, 16))
    refuse("keys: float32, or int8 with scales", keys=torch.zeros(8, 2, 16, dtype=torch.int8))
    refuse("scales: wrong shape", keys=torch.zeros(8, 2, 16, dtype=torch.int8), scales=torch.ones(7, 2))
    refuse("out: wrong shape", out=torch.zeros(4, 3))
