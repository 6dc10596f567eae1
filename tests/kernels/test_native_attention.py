"""Native attention against the torch backend in float64, on ragged batches over a paged cache.

There the torch backend equals the reference to 1e-12 (`test_backends.py`), and takes less time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, get_kernels, native
from tokenloom.kernels.cpu import HEAD_DIMS, native_cache, span_table

pytestmark = pytest.mark.skipif(native is None, reason="the native kernels were not built")

TORCH = get_kernels("torch")
ISAS = native.isas() if native is not None else []
CPU = torch.device("cpu")


@dataclass
class Case:
    q: Tensor
    kv: KVCache
    spans: list[KVSpan]
    window: int | None

    def attend(self, threads: int = 2) -> Tensor:
        return attend(self.q, self.kv, self.spans, self.window, threads)

    def expected(self) -> Tensor:
        return TORCH.attention(self.q.double(), in_float64(self.kv), 0, self.spans, self.window)


def attend(
    q: Tensor, kv: KVCache, spans: list[KVSpan], window: int | None = None, threads: int = 2
) -> Tensor:
    out = torch.full(q.shape, torch.nan)
    table = span_table(spans)
    native.attention(q, native_cache(kv), 0, *table, kv.block_size, window or 0, out, None, threads)
    return out


def cache(kv_heads: int, head_dim: int, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
    """A cache full of normal numbers."""
    kv = KVCache(1, kv_heads, head_dim, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=CPU)
    slots = torch.arange(num_blocks * block_size)
    kv.write(
        0, slots, torch.randn(len(slots), kv_heads, head_dim), torch.randn(len(slots), kv_heads, head_dim)
    )
    return kv


def in_float64(kv: KVCache) -> KVCache:
    """The same numbers."""
    kv_heads, head_dim = kv.keys[0].shape[1:]
    wide = KVCache(
        1,
        kv_heads,
        head_dim,
        num_blocks=kv.num_blocks,
        block_size=kv.block_size,
        dtype=torch.float64,
        device=CPU,
    )
    for part, scales, to in ((kv.keys, kv.key_scales, wide.keys), (kv.values, kv.value_scales, wide.values)):
        to[0][:] = part[0].double() * scales[0].double()[..., None] if kv.quantized else part[0].double()
    return wide


def span(start: int, length: int, kv_len: int, blocks: list[int]) -> KVSpan:
    consecutive = all(b + 1 == c for b, c in itertools.pairwise(blocks))
    return KVSpan(start, length, kv_len, blocks, consecutive)


def batch(
    seed: int,
    parts: list[tuple[int, int]],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    scattered: bool = True,
) -> Case:
    """parts: (rows, tokens that came before them) of each sequence."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(rows + past) // block_size) for rows, past in parts) + 1
    free = torch.randperm(num_blocks).tolist() if scattered else list(range(num_blocks))
    spans, row = [], 0
    for rows, past in parts:
        needed = -(-(rows + past) // block_size)
        blocks, free = free[:needed], free[needed:]
        spans.append(span(row, rows, rows + past, blocks))
        row += rows
    kv = cache(kv_heads, head_dim, num_blocks, block_size, dtype)
    return Case(torch.randn(row, kv_heads * group, head_dim), kv, spans, window)


@st.composite
def ragged(
    draw: st.DrawFn,
    pasts: tuple[int, ...] = (0, 1, 3, 4, 17, 70),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.int8),
) -> Case:
    """Prompts, chunks and decodes over scattered and consecutive blocks."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3), (3, 3), (1, 4), (1, 8)]))
    one = st.tuples(st.sampled_from([1, 1, 2, 5, 8, 9, 70]), st.sampled_from(pasts))
    return batch(
        draw(st.integers(0, 2**31)),
        draw(st.lists(one, min_size=1, max_size=5)),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        window=draw(st.sampled_from([None, 1, 3, 64, 65])),
        scattered=draw(st.booleans()),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=120, deadline=None)
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

BLOCK = 4
F = torch.empty


def table(*rows: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)


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


# -- the gradient --------------------------------------------------------------------------------------------


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


@pytest.fixture
def usual_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ragged(dtypes=(torch.float32,)), st.sampled_from(["torch", "reference", *ISAS]))
def test_gradients_are_autograds(usual_threads: None, case: Case, backend: str) -> None:
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
def test_gradients_of_long_samples_are_autograds(
    usual_threads: None, rows: int, past: int, window: int | None, isa: str
) -> None:
    native.use_isa(isa)
    case = batch(1, [(rows, past)], kv_heads=2, group=3, head_dim=64, window=window)
    d_out = torch.randn(case.q.shape)
    wanted = by_autograd(case, d_out.double(), [0], rows + past)
    for found, expected in zip(gradients_of(case, d_out, [0], rows + past), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-5)


def test_gradients_have_the_same_bits_in_any_number_of_threads(usual_threads: None) -> None:
    case = batch(2, [(150, 0), (40, 60), (1, 9)], kv_heads=3, group=3, head_dim=32)
    firsts, tokens = places(case)
    d_out = torch.randn(case.q.shape)
    results = [gradients_of(case, d_out, firsts, tokens, threads=n) for n in (1, 2, 3, 4, 2)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_sample_that_is_not_finite_spoils_its_own_gradient(usual_threads: None) -> None:
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
