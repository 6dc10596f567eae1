"""Where the largest of each row are: every backend and instruction set against a stable sort in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import ISAS
from tokenloom.kernels import get_kernels, native

BACKENDS = ["torch", "reference", *(["cpu"] if native is not None else [])]
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, math.inf, -math.inf, math.nan])


def expected(scores: Tensor, k: int) -> list[list[int]]:
    def rank(row: list[float], i: int) -> tuple[bool, float, int]:
        return not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i

    rows = scores.tolist()
    return [sorted(sorted(range(len(row)), key=lambda i, row=row: rank(row, i))[:k]) for row in rows]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    width = draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=4))
    return torch.tensor(rows), draw(st.integers(0, width))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@example(case=(torch.zeros(2, 40), 17))
@settings(max_examples=60, deadline=None)
def test_the_first_of_the_largest_are_found(backend: str, case: tuple[Tensor, int]) -> None:
    assert get_kernels(backend).largest(*case).tolist() == expected(*case)


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases(), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_instruction_set_finds_them(
    usual_machine: None, isa: str, case: tuple[Tensor, int], seed: int
) -> None:
    native.use_isa(isa)
    assert get_kernels("cpu").largest(*case).tolist() == expected(*case)
    scores = torch.randn(3, 700, generator=torch.Generator().manual_seed(seed))
    assert get_kernels("cpu").largest(scores, 64).tolist() == expected(scores, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likeliest_are_those_of_top(backend: str) -> None:
    kernels, logits = get_kernels(backend), torch.randn(3, 700, generator=torch.Generator().manual_seed(1))
    for rows in (logits, logits.double(), logits[:, ::7]):
        assert torch.equal(kernels.likeliest(rows, 9), kernels.top(rows, 9)[1])


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
def test_rows_may_be_strided() -> None:
    scores = torch.randn(4, 100)[:, 3:50]
    assert get_kernels("cpu").largest(scores, 9).tolist() == expected(scores, 9)


@pytest.mark.skipif(native is None, reason="the native kernels were not built")
@pytest.mark.parametrize("shape", [(1, 4), (2, 9)])
def test_what_does_not_fit_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="ids: wrong shape"):
        native.largest(torch.zeros(2, 8), torch.empty(shape, dtype=torch.int64), 1)
