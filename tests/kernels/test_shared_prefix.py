"""Attention that reads a common prefix once equals attention that reads it for every sequence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import ISAS, TORCH, cache, in_float64, span
from tokenloom.cache.kv_cache import KVCache
from tokenloom.kernels import KVSpan, SharedPrefix, get_kernels, native
from tokenloom.kernels.native_arguments import keys_read, native_cache, span_table
from tokenloom.kernels.shared_prefix import shared_prefixes

needs_native = pytest.mark.skipif(native is None, reason="the native kernels were not built")


@dataclass
class Tree:
    q: Tensor
    kv: KVCache
    spans: list[KVSpan]
    least_tokens: int

    @property
    def shared(self) -> list[SharedPrefix]:
        return shared_prefixes(self.spans, self.kv.block_size, self.least_tokens)

    def expected(self, window: int | None = None) -> Tensor:
        return TORCH.attention(self.q.double(), in_float64(self.kv), 0, self.spans, window)


def build(
    seed: int,
    sequences: list[tuple[list[int], int, int]],
    *,
    block_size: int = 4,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    least_tokens: int = 1,
) -> Tree:
    """sequences: (names of the blocks that it begins with, tokens of its own, rows that are computed now).

    Equal names at the same place after equal names are the same block.
    """
    torch.manual_seed(seed)
    own = sum(-(-tokens // block_size) for _, tokens, _ in sequences)
    prefixes = {tuple(names[: i + 1]) for names, _, _ in sequences for i in range(len(names))}
    free = torch.randperm(own + len(prefixes)).tolist()
    at = dict(zip(sorted(prefixes), free, strict=False))
    free = free[len(at) :]
    spans, row = [], 0
    for names, tokens, rows in sequences:
        needed = -(-tokens // block_size)
        blocks = [at[tuple(names[: i + 1])] for i in range(len(names))] + free[:needed]
        free = free[needed:]
        spans.append(span(row, rows, len(names) * block_size + tokens, blocks))
        row += rows
    kv = cache(kv_heads, head_dim, own + len(prefixes), block_size, dtype)
    return Tree(torch.randn(row, kv_heads * group, head_dim), kv, spans, least_tokens)


@st.composite
def trees(draw: st.DrawFn, least: int = 0) -> Tree:
    """Decodes and small chunks over prefixes that branch; now and then a long chunk, or a long prefix, of
    `least` blocks and more."""
    long = draw(st.integers(least, 70))
    names = st.lists(st.integers(0, 1), max_size=4).map(lambda tail: [9] * long + tail)
    rows = st.sampled_from([1, 1, 1, 2, 3, 8, 9, 40])
    one = st.tuples(names, rows, st.integers(0, 20)).map(lambda t: (t[0], t[1] + t[2], t[1]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3), (1, 8), (1, 64)]))
    return build(
        draw(st.integers(0, 2**31)),
        draw(st.lists(one, min_size=1, max_size=7)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from([8, 16, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.int8])),
        least_tokens=draw(st.sampled_from([1, 8, 64])),
    )


def covered(spans: list[KVSpan], shared: list[SharedPrefix]) -> dict[int, list[tuple[int, int]]]:
    """What each span shares, by its first row."""
    return {s.start: [(p.begin, p.end) for p in shared if s in p.spans] for s in spans}


def test_what_a_part_of_a_group_shares_follows_what_all_of_it_shares() -> None:
    tree = build(0, [([0, 1, 2], 3, 1), ([0, 1, 2], 9, 1), ([0, 1, 5], 1, 1), ([7, 1, 2], 1, 1)])
    assert covered(tree.spans, tree.shared) == {
        0: [(0, 8), (8, 12)],
        1: [(0, 8), (8, 12)],
        2: [(0, 8)],
        3: [],
    }


def test_a_short_common_part_is_taken_with_what_follows_it() -> None:
    sequences = [([0, 1, 2, 3], 2, 1), ([0, 1, 2, 3], 2, 1), ([0, 8], 2, 1)]
    tree = build(0, sequences, least_tokens=9)
    assert covered(tree.spans, tree.shared) == {0: [(0, 16)], 1: [(0, 16)], 2: []}


def test_a_prefix_is_cut_to_whole_pieces() -> None:
    tree = build(0, [([0] * 5, 2, 1), ([0] * 5, 2, 1), ([0, 0, 0, 1], 2, 1)])
    cut = shared_prefixes(tree.spans, 4, 1, piece=8)
    assert covered(tree.spans, cut) == {0: [(0, 8), (8, 16)], 1: [(0, 8), (8, 16)], 2: [(0, 8)]}


def test_a_block_that_a_row_does_not_read_whole_is_not_shared() -> None:
    tree = build(0, [([0, 1], 1, 1), ([0, 1], 1, 3)])  # of the second, rows 7 and 8 are in block 1
    assert covered(tree.spans, tree.shared) == {0: [(0, 4)], 1: [(0, 4)]}


@settings(max_examples=50, deadline=None)
@given(trees())
def test_prefixes_are_whole_blocks_that_all_rows_read_without_gaps(tree: Tree) -> None:
    size = tree.kv.block_size
    for prefix in tree.shared:
        assert len(prefix.spans) > 1 and prefix.end - prefix.begin >= tree.least_tokens
        blocks = {tuple(s.blocks[: prefix.end // size]) for s in prefix.spans}
        assert len(blocks) == 1 and prefix.begin % size == prefix.end % size == 0
        assert all(prefix.end <= s.kv_len - s.length for s in prefix.spans)
    for parts in covered(tree.spans, tree.shared).values():
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts)][: len(parts)]


@settings(max_examples=40, deadline=None)
@given(trees())
def test_torch_equals_separate_attention(tree: Tree) -> None:
    together = TORCH.attention(tree.q.double(), in_float64(tree.kv), 0, tree.spans, None, tree.shared)
    torch.testing.assert_close(together, tree.expected(), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(trees())
def test_torch_equals_separate_attention_in_float32(tree: Tree) -> None:
    together = TORCH.attention(tree.q, tree.kv, 0, tree.spans, None, tree.shared)
    torch.testing.assert_close(together.double(), tree.expected(), rtol=1e-5, atol=1e-5)


@needs_native
@settings(max_examples=50, deadline=None)
@given(trees(), st.sampled_from(ISAS))
def test_native_equals_separate_attention(tree: Tree, isa: str) -> None:
    native.use_isa(isa)
    actual = get_kernels("cpu").attention(tree.q, tree.kv, 0, tree.spans, None, tree.shared)
    torch.testing.assert_close(actual.double(), tree.expected(), rtol=1e-5, atol=1e-5)


@needs_native
@settings(max_examples=40, deadline=None)
@given(trees(least=17), st.sampled_from(ISAS))
def test_native_gives_the_bits_of_separate_attention_in_any_number_of_threads(tree: Tree, isa: str) -> None:
    native.use_isa(isa)
    kernels, before = get_kernels("cpu"), torch.get_num_threads()
    try:
        found = [kernels.attention(tree.q, tree.kv, 0, tree.spans)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernels.attention(tree.q, tree.kv, 0, tree.spans, None, tree.shared))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_native)])
def test_with_a_window_every_row_reads_its_own(backend: str) -> None:
    tree, kernels = build(0, [([0] * 9, 5, 1), ([0] * 9, 7, 1)]), get_kernels(backend)
    assert tree.shared
    together = kernels.attention(tree.q, tree.kv, 0, tree.spans, 12, tree.shared)
    assert torch.equal(together, kernels.attention(tree.q, tree.kv, 0, tree.spans, 12))


@needs_native
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (16, 1)])
@pytest.mark.parametrize("streams", [2, 16, 40])
def test_keys_are_read_as_often_as_computed(streams: int, heads: int, kv_heads: int) -> None:
    own, prefix = 37, 2048 + 192
    tree = build(0, [([0] * 140, own, 1)] * streams, block_size=16, kv_heads=1, group=1, head_dim=8)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads}
    tiles = -(-streams // (64 // (heads // kv_heads)))  # 64 queries meet a key at a time
    assert keys_read(tree.spans, [], 16, **sizes) == kv_heads * streams * (prefix + own)
    assert keys_read(tree.spans, tree.shared, 16, **sizes) == kv_heads * (prefix * tiles + streams * own)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("before", [1, 63, 64, 200, 255, 256, 300, 511, 512, 580])
def test_rows_of_a_tree_read_what_is_before_them_once_and_get_the_same_bits(before: int, isa: str) -> None:
    native.use_isa(isa)
    kernels, parents = get_kernels("cpu"), [-1, 0, 1, 1, 0, 4, 2, 2]
    num_blocks = -(-(before + len(parents)) // 16)
    kv = cache(3, 64, num_blocks, 16, torch.float32)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(before)).tolist()
    slots = [blocks[i // 16] * 16 + i % 16 for i in range(before + len(parents))]
    spans = []
    for row in range(len(parents)):
        path, at = [], row
        while at >= 0:
            path, at = [slots[before + at], *path], parents[at]
        spans.append(KVSpan(row, 1, before + len(path), blocks, False, path))
    q = torch.randn(len(parents), 9, 64)
    separate = kernels.attention(q, kv, 0, spans)
    for few in (8, 5, 2):  # as many queries as are computed in different ways
        shared = shared_prefixes(spans[:few], 16, piece=native.KEY_BLOCK)
        assert [(p.begin, p.end) for p in shared] == ([(0, before // 64 * 64)] if before >= 64 else [])
        assert torch.equal(kernels.attention(q[:few], kv, 0, spans[:few], None, shared), separate[:few])


@needs_native
def test_of_prefixes_in_the_last_piece_the_one_that_saves_most_is_shared() -> None:
    tree = build(0, [([0, 1, 1], 9, 1)] * 3 + [([0, 2, 2], 9, 1)] * 2, block_size=64, kv_heads=1, group=1)
    sizes = {"num_heads": 1, "num_kv_heads": 1}
    alone = 5 * (192 + 9)
    # Five rows share 64 keys (saves 4 * 64), and either branch 128 more (2 * 192 and 1 * 192).
    assert keys_read(tree.spans, tree.shared, 64, **sizes) == alone - 2 * 192 - 192
    kernels = get_kernels("cpu")
    together = kernels.attention(tree.q, tree.kv, 0, tree.spans, None, tree.shared)
    assert torch.equal(together, kernels.attention(tree.q, tree.kv, 0, tree.spans))


@needs_native
@pytest.mark.parametrize(
    ("prefix", "members", "words"),
    [
        ((0, 4, 1), [2], "no such span"),
        ((0, 4, 2), [0], "out of range"),
        ((4, 4, 1), [0], "out of range"),
        ((0, 12, 1), [0], "do not all read"),
        ((4, 8, 1), [0], "gap"),
    ],
)
def test_prefixes_that_the_spans_do_not_have_are_refused(
    prefix: tuple[int, int, int], members: list[int], words: str
) -> None:
    tree = build(0, [([0, 1], 3, 1), ([0, 1], 3, 1)])
    shared = torch.tensor([prefix], dtype=torch.int32), torch.tensor(members, dtype=torch.int32)
    out = torch.empty_like(tree.q)
    with pytest.raises(ValueError, match=words):
        native.attention(
            tree.q, native_cache(tree.kv), 0, *span_table(tree.spans), 4, 0, out, None, 1, shared
        )
