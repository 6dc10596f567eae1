"""Native attention against the torch backend in float64, on ragged batches over a paged cache.

There the torch backend equals the reference to 1e-12 (`test_backends.py`), and takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import (
    BLOCK,
    ISAS,
    Case,
    attend,
    batch,
    cache,
    ragged,
    span,
    table,
)
from tokenloom.kernels import native
from tokenloom.kernels.cpu import HEAD_DIMS

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(ragged(), st.sampled_from(ISAS))
def test_attention_equals_torch(case: Case, isa: str) -> None:
    native.use_isa(isa)
    assert_close(case.attend(), case.expected())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_attention_equals_torch_for_every_shape_of_heads(
    head_dim: int, group: int, dtype: torch.dtype
) -> None:
    parts = [(1, 20), (7, 0), (3, 66)]
    case = batch(group, parts, kv_heads=2, group=group, head_dim=head_dim, dtype=dtype)
    assert_close(case.attend(), case.expected())


@pytest.mark.parametrize("window", [None, 8, 300, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("past", [254, 255, 520, 1290])
def test_the_keys_of_few_rows_are_split_and_merged(past: int, dtype: torch.dtype, window: int | None) -> None:
    parts = [(1, past), (9, past), (2, past), (8, past)]
    case = batch(past, parts, kv_heads=1, group=3, head_dim=16, dtype=dtype, window=window)
    assert_close(case.attend(), case.expected())


@pytest.mark.parametrize("group", [1, 8, 64])
def test_a_long_prompt_is_cut_into_tiles_of_rows(group: int) -> None:
    case = batch(group, [(150, 0), (131, 40)], kv_heads=1, group=group, head_dim=8)
    assert_close(case.attend(), case.expected())


@settings(max_examples=40, deadline=None)
@given(ragged(pasts=(0, 17, 300, 700)))
def test_attention_is_the_same_bits_in_any_number_of_threads(case: Case) -> None:
    once = case.attend(threads=1)
    assert all(torch.equal(case.attend(threads), once) for threads in (1, 2, 3, 4, 2))


@settings(max_examples=40, deadline=None)
@given(ragged(pasts=(0, 17, 300)))
def test_attention_of_a_sequence_does_not_depend_on_the_others(case: Case) -> None:
    together = case.attend()
    for s in case.spans:
        rows = slice(s.start, s.start + s.length)
        alone = attend(case.q[rows], case.kv, [span(0, s.length, s.kv_len, s.blocks)], case.window)
        assert torch.equal(alone, together[rows])


@st.composite
def cut_prompts(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """One sequence of a few hundred tokens, and the lengths of the pieces in which it comes."""
    past = draw(st.sampled_from([0, 5, 190, 255, 256, 700]))
    pieces = draw(st.lists(st.sampled_from([1, 1, 2, 5, 8, 9, 30, 70]), min_size=2, max_size=6))
    case = batch(
        draw(st.integers(0, 2**31)),
        [(sum(pieces), past)],
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        dtype=draw(st.sampled_from([torch.float32, torch.int8])),
        window=draw(st.sampled_from([None, None, 7, 100, 300])),
    )
    return case, pieces


@settings(max_examples=50, deadline=None)
@given(cut_prompts(), st.sampled_from(ISAS))
def test_attention_is_the_same_bits_in_whatever_pieces_a_prompt_comes(
    cut: tuple[Case, list[int]], isa: str
) -> None:
    native.use_isa(isa)
    case, pieces = cut
    whole, (all_of_it,) = case.attend(), case.spans
    end, row = all_of_it.kv_len - all_of_it.length, 0
    for length in pieces:
        end += length
        piece = span(0, length, end, all_of_it.blocks)
        assert torch.equal(
            attend(case.q[row : row + length], case.kv, [piece], case.window), whole[row : row + length]
        )
        row += length


def test_the_heads_of_a_wider_row_are_read_where_they_lie() -> None:
    case = batch(0, [(3, 5), (1, 40)], kv_heads=2, group=2, head_dim=16)
    expected = case.attend()
    wide = torch.full((len(case.q), 8, 16), torch.nan)
    wide[:, 1:5] = case.q
    case.q = wide[:, 1:5]
    assert torch.equal(case.attend(), expected)


def test_unaligned_queries_give_the_same_bits() -> None:
    case = batch(0, [(3, 5), (1, 40)], kv_heads=2, group=2, head_dim=16)
    expected = case.attend()
    case.q = torch.empty(1 + case.q.numel())[1:].view(case.q.shape).copy_(case.q)
    assert torch.equal(case.attend(), expected)


def test_rows_of_no_span_are_left_alone() -> None:
    case = batch(0, [(2, 3), (2, 3)], kv_heads=1, group=2, head_dim=8)
    del case.spans[0]
    out = case.attend()
    assert out[:2].isnan().all() and out[2:].isfinite().all()


def test_an_empty_batch_is_served() -> None:
    kv = cache(1, 8, 2, 4, torch.float32)
    assert attend(torch.empty(0, 2, 8), kv, []).shape == (0, 2, 8)


@pytest.mark.parametrize("past", [3, 700])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_spoils_its_own_head_and_row(value: float, past: int) -> None:
    case = batch(0, [(4, past), (1, past)], kv_heads=2, group=2, head_dim=16)
    clean = case.attend()
    case.q[1, 2, 7] = value
    out = case.attend()
    assert out[1, 2].isnan().all()
    clean[1, 2] = out[1, 2] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("past", [3, 700])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_nan_in_the_cache_spoils_only_those_that_read_it(part: str, past: int, dtype: torch.dtype) -> None:
    case = batch(0, [(4, past), (4, past)], kv_heads=2, group=2, head_dim=16, dtype=dtype)
    clean, second = case.attend(), case.spans[1]
    token = past + 2  # its own row and the one after read it
    slot = second.blocks[token // 16] * 16 + token % 16
    if dtype == torch.int8:
        (case.kv.key_scales if part == "keys" else case.kv.value_scales)[0][slot, 1] = torch.nan
    else:
        getattr(case.kv, part)[0][slot, 1] = torch.nan
    out = case.attend()
    assert out[6:, 2:].isnan().all()
    clean[6:, 2:] = out[6:, 2:] = 0
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_slots_beyond_the_last_token_are_not_read(dtype: torch.dtype) -> None:
    case = batch(0, [(1, 4), (3, 2)], kv_heads=2, group=2, head_dim=16, dtype=dtype)
    clean = case.attend()
    for s in case.spans:
        beyond = slice(s.blocks[0] * 16 + s.kv_len, s.blocks[0] * 16 + 16)
        for part in (
            (case.kv.key_scales, case.kv.value_scales)
            if case.kv.quantized
            else (case.kv.keys, case.kv.values)
        ):
            part[0][beyond] = torch.nan
    assert torch.equal(case.attend(), clean)


@pytest.mark.parametrize("past", [20, 700])
def test_scores_of_any_size_do_not_overflow(past: int) -> None:
    case = batch(0, [(3, past)], kv_heads=1, group=2, head_dim=16)
    case.q *= 1e4
    torch.testing.assert_close(case.attend().double(), case.expected(), rtol=1e-2, atol=1e-2)


# -- what is refused ----------------------------------------------------------------------------------------

F = torch.empty


def call(
    q: Tensor | None = None,
    spans: Tensor | None = None,
    blocks: list[int] | None = None,
    out: Tensor | None = None,
    layer: int = 0,
    block_size: int = BLOCK,
    threads: int = 1,
) -> None:
    kv = native.KV([torch.zeros(16, 2, 8)], [torch.zeros(16, 2, 8)], [], [])
    native.attention(
        F(2, 4, 8) if q is None else q,
        kv,
        layer,
        table((0, 2, 5, 0)) if spans is None else spans,
        torch.tensor([0, 1] if blocks is None else blocks, dtype=torch.int32),
        block_size,
        0,
        F(2, 4, 8) if out is None else out,
        None,
        threads,
    )


def kv_of(*shapes: tuple[int, ...], scales: int = 0, dtype: torch.dtype = torch.float32) -> None:
    parts = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    given_scales = [torch.zeros(16, 2)] * scales
    native.KV(parts[::2], parts[1::2], given_scales, given_scales)


S = (16, 2, 8)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "head_dim": (lambda: call(q=F(2, 4, 16), out=F(2, 4, 16)), "head_dim"),
    "heads": (lambda: call(q=F(2, 3, 8), out=F(2, 3, 8)), "heads"),
    "too many heads": (lambda: call(q=F(2, 130, 8), out=F(2, 130, 8)), "heads"),
    "q strided": (lambda: call(q=F(2, 4, 16)[:, :, ::2]), "(q|out): heads of a row must be contiguous"),
    "out strided": (lambda: call(out=F(2, 4, 16)[:, :, ::2]), "(q|out): heads of a row must be contiguous"),
    "out too short": (lambda: call(out=F(1, 4, 8)), "out: wrong shape"),
    "out too wide": (lambda: call(out=F(2, 6, 8)), "out: wrong shape"),
    "layer": (lambda: call(layer=1), "layer"),
    "layer below 0": (lambda: call(layer=-1), "layer"),
    "block too high": (lambda: call(blocks=[0, 4]), "blocks: block 4 is outside of the cache"),
    "block below 0": (lambda: call(blocks=[0, -1]), "blocks: block -1"),
    "too few blocks": (lambda: call(blocks=[0]), "spans: row 0"),
    "no block_size": (lambda: call(block_size=0), "block_size"),
    "block_size below 0": (lambda: call(block_size=-4), "block_size"),
    "threads": (lambda: call(threads=0), "threads"),
    "spans' shape": (lambda: call(spans=torch.zeros(1, 3, dtype=torch.int32)), "spans"),
    "row too high": (lambda: call(spans=table((0, 1, 1, 0), (1, 2, 5, 0))), "spans: row 1"),
    "row below 0": (lambda: call(spans=table((-1, 2, 5, 0))), "spans: row 0"),
    "no length": (lambda: call(spans=table((0, 0, 5, 0))), "spans: row 0"),
    "kv_len below length": (lambda: call(spans=table((0, 2, 1, 0))), "spans: row 0"),
    "kv_len too high": (lambda: call(spans=table((0, 2, 2**31 - 1, 0))), "spans: row 0"),
    "first block below 0": (lambda: call(spans=table((0, 2, 5, -1))), "spans: row 0"),
    "an overflow": (lambda: call(spans=table((2**31 - 1, 1, 5, 0))), "spans: row 0"),
    "no layers": (lambda: native.KV([], [], [], []), "cache: as many"),
    "keys alone": (lambda: native.KV([torch.zeros(S)], [], [], []), "cache: as many"),
    "too few scales": (lambda: kv_of(S, S, S, S, scales=1, dtype=torch.int8), "cache: as many"),
    "int8 without scales": (lambda: kv_of(S, S, dtype=torch.int8), "cache: float32, or int8"),
    "scales without int8": (lambda: kv_of(S, S, scales=1), "cache: float32, or int8"),
    "float64": (lambda: kv_of(S, S, dtype=torch.float64), "cache: float32, or int8"),
    "other values": (lambda: kv_of(S, (16, 2, 16)), "cache: layers differ"),
    "other layers": (lambda: kv_of(S, S, (8, 2, 8), (8, 2, 8)), "cache: layers differ"),
    "other scales": (lambda: kv_of((8, 2, 8), (8, 2, 8), scales=1, dtype=torch.int8), "cache: scales differ"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_of_attention_are_refused_by_name(case: str) -> None:
    attempt, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        attempt()


def test_a_cache_is_never_a_converted_copy() -> None:
    with pytest.raises(TypeError):
        native.KV([torch.zeros(16, 2, 16)[:, :, ::2]], [torch.zeros(S)], [], [])
