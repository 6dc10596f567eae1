"""The central type: one packed, ragged batch of tokens from many places, and the runs it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVPolicy
from tokenloom.kernels import Kernels, KVSpan, Linear, LowRank, SharedPrefix

Keep = Callable[[int, str, int], Tensor | None]
"""(layer, site, width) -> what dropout multiplies a site's input by, `[rows, width]`; None: nothing."""


class SegmentKind(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"
    TRAIN = "train"


class Bypass(Protocol):
    """What an adapter adds beside one frozen projection (FlexLLM, arXiv 2402.18789: bypass networks)."""

    @property
    def low_rank(self) -> LowRank | None:
        """The same as two matrices, where that is all it is: fused kernels then run it."""

    def forward(self, x: Tensor, y: Tensor, linear: Linear, kernels: Kernels, keep: Tensor | None) -> None:
        """Change y `[n, out]`, which holds `linear(x)`, in place; x `[n, in]`, keep like x."""


@dataclass(slots=True)
class BypassRows:
    """Rows of the batch that go through an adapter.

    `layers[i]` maps a site of layer i (`qkv`, `o`, `gate_up`, `down`) to its bypass.
    """

    rows: slice
    layers: Sequence[Mapping[str, Bypass]]
    keep: Keep | None = None
    """Dropout, where these rows are trained on."""


class Tap(Protocol):
    """Reads activations of some rows as they are computed.

    Sites of layer i: `input` (what enters it; that of layer L is what the last one puts out, before the
    final norm), `query` (after RoPE), `attended` (what attention gives, before its projection), `log_sums`
    (of its exponentiated scores, by query head; beside `attended`), `residual` (after attention),
    `gate_up` (both, before SiLU).
    """

    rows: slice
    sites: frozenset[str]

    def save(self, layer: int, site: str, value: Tensor) -> None:
        """value `[len(rows), width]`; it is overwritten afterwards, so it must be copied."""

    def units(self) -> dict[str, Tensor] | None:
        """Where in `KVCache.rows` of every layer the sites' values go, int64 `[len(rows), units of a row]` by
        site: fused kernels then write them, and `save` gets what the last layer puts out alone. None: `save`
        must see every value."""


@dataclass(slots=True)
class PolicyRows:
    """Rows of one segment whose attention a KV policy may change."""

    segment: Segment
    policy: KVPolicy
    cached: CachedTokens

    @property
    def rows(self) -> slice:
        return self.segment.span.rows


@dataclass(slots=True)
class EmbeddingOverride:
    """Rows whose input is a vector rather than the embedding of their token.

    rows: int64 `[n]`, of the batch. vectors: `[n, hidden_size]`.
    """

    rows: Tensor
    vectors: Tensor


@dataclass(slots=True)
class Segment:
    """A run of rows of one sequence.

    Rows `start .. start + length` of the batch are the sequence's tokens at KV indices
    `kv_len - length .. kv_len`. Segments never attend to one another.
    """

    kind: SegmentKind
    span: KVSpan
    """What its rows read: the sequence's own KV, through its block table."""
    branches: list[KVSpan] | None = None
    """Where rows are a draft (`verify`): what each of them reads, which is what a decode of that token would
    read. To the kernels they are decodes, so that drafted tokens get the same bits as others."""

    @property
    def spans(self) -> list[KVSpan]:
        return [self.span] if self.branches is None else self.branches


@dataclass(slots=True)
class Batch:
    """What one pass over the weights computes. T rows, one per token; no padding.

    Attributes:
        tokens: `[T]` int64 token ids.
        positions: `[T]` int64 RoPE positions. Not the KV index: a method may make them differ.
        slots: `[T]` int64, where each row's keys and values are stored.
        segments: which rows belong together, in row order.
        logits_rows: `[M]` int64, rows whose logits are wanted, in the order in which they are returned.
        bypasses: which rows go through which adapter; rows of the base model alone are in none.
        taps: who reads activations.
        policies: segments that a KV policy attends to.
        overrides: rows that begin with a vector; what `tokens` says of them is not read.
        shared: what spans that no policy attends to have in common; empty: every row reads its own.
        spans: those of all segments; plain_spans: of those that no policy attends to and whose attention no
            tap reads; tapped_spans: of those whose attention a tap reads.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    segments: list[Segment]
    logits_rows: Tensor
    bypasses: list[BypassRows] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    policies: list[PolicyRows] = field(default_factory=list)
    overrides: list[EmbeddingOverride] = field(default_factory=list)
    shared: list[SharedPrefix] = field(default_factory=list)
    spans: list[KVSpan] = field(init=False)
    plain_spans: list[KVSpan] = field(init=False)
    tapped_spans: list[KVSpan] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = self.plain_spans = [span for segment in self.segments for span in segment.spans]
        tapped = [tap.rows for tap in self.taps if "log_sums" in tap.sites]
        self.tapped_spans = [s for s in self.spans if any(t.start <= s.start < t.stop for t in tapped)]
        others = {id(part.segment.span) for part in self.policies} | set(map(id, self.tapped_spans))
        if others:
            self.plain_spans = [span for span in self.spans if id(span) not in others]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)


class BatchBuilder:
    """Collects rows segment by segment in plain lists, then turns them into tensors once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.segments: list[Segment] = []
        self.logits_rows: list[int] = []
        self.bypasses: list[BypassRows] = []
        self.taps: list[Tap] = []
        self.policies: list[PolicyRows] = []
        self.overrides: list[EmbeddingOverride] = []

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def add(
        self,
        kind: SegmentKind,
        tokens: list[int],
        blocks: list[int],
        *,
        kv_start: int,
        block_size: int,
        contiguous: bool,
        logits: str = "last",
        positions: Sequence[int] | None = None,
    ) -> int:
        """Append one segment.

        Args:
            tokens: its tokens, the first at KV index `kv_start`.
            blocks: the sequence's block table, long enough for all of them.
            logits: `none`, `last` or `all` of its rows.
            positions: of the tokens; None: from `kv_start` on.

        Returns:
            The first row of the segment.
        """
        start, length = len(self.tokens), len(tokens)
        end = kv_start + length
        self.tokens += tokens
        self.positions += range(kv_start, end) if positions is None else positions
        self.slots += [blocks[i // block_size] * block_size + i % block_size for i in range(kv_start, end)]
        blocks_read = blocks[: -(-end // block_size)]
        self.segments.append(Segment(kind, KVSpan(start, length, end, blocks_read, contiguous)))
        if logits == "last":
            self.logits_rows.append(start + length - 1)
        elif logits == "all":
            self.logits_rows += range(start, start + length)
        return start

    def add_draft(
        self,
        tokens: list[int],
        parents: list[int],
        blocks: list[int],
        *,
        kv_start: int,
        block_size: int,
        contiguous: bool,
        prompts: Sequence[int] = (),
        vectors: Tensor | None = None,
    ) -> int:
        """Append a `verify` segment: a token and the tree of those that may follow it, all with logits.

        Args:
            tokens: the known token at KV index `kv_start`, then the drafted ones, at the indices behind it.
            parents: row that each row follows, smaller than its own; -1 for the first.
            blocks: the sequence's block table, long enough for all of them.
            prompts: rows of prompt tokens that hang below each token, one below the other, without logits;
                they come behind all tokens, chain by chain.
            vectors: `[S, hidden_size]`, what the first, second, ... prompt token of a chain is.

        Returns:
            The first row of the segment.
        """
        start = self.add(
            SegmentKind.VERIFY,
            tokens,
            blocks,
            kv_start=kv_start,
            block_size=block_size,
            contiguous=contiguous,
            logits="all",
        )
        if vectors is not None and any(prompts):
            parents = [*parents, *self._add_prompts(prompts, vectors, blocks, kv_start, block_size)]
        slots, segment = self.slots[start:], self.segments[-1]
        shared, branches, paths = segment.span.blocks, [], [[0]]
        for row in range(1, len(parents)):
            paths.append([*paths[parents[row]], row])
        for row, path in enumerate(paths):
            depth = len(path) - 1
            self.positions[start + row] = kv_start + depth
            tail = [] if depth == row else [slots[i] for i in path[1:]]
            branches.append(KVSpan(start + row, 1, kv_start + depth + 1, shared, contiguous, tail))
        segment.branches = branches
        return start

    def _add_prompts(
        self, prompts: Sequence[int], vectors: Tensor, blocks: list[int], kv_start: int, block_size: int
    ) -> list[int]:
        """Rows of the chains below a draft's tokens, which came last; returns the row that each follows."""
        parents: list[int] = []
        steps: list[int] = []
        for row, count in enumerate(prompts):
            for i in range(count):
                parents.append(row if i == 0 else len(prompts) + len(parents) - 1)
                steps.append(i)
        first, span = len(self.tokens), self.segments[-1].span
        begin = kv_start + len(prompts)
        self.tokens += [0] * len(steps)
        self.positions += [0] * len(steps)  # the depth of each says its position
        self.slots += [
            blocks[i // block_size] * block_size + i % block_size for i in range(begin, begin + len(steps))
        ]
        span.length += len(steps)
        span.kv_len += len(steps)
        span.blocks = blocks[: -(-span.kv_len // block_size)]
        rows = torch.arange(first, first + len(steps), device=self.device)
        self.overrides.append(EmbeddingOverride(rows, vectors[steps]))
        return parents

    def through(self, adapter: Sequence[Mapping[str, Bypass]], start: int, keep: Keep | None = None) -> None:
        """Send the rows from `start` to the last one added through an adapter."""
        last = self.bypasses[-1] if self.bypasses else None
        if last is not None and last.layers is adapter and last.rows.stop == start and keep is last.keep:
            last.rows = slice(last.rows.start, self.num_rows)
        else:
            self.bypasses.append(BypassRows(slice(start, self.num_rows), adapter, keep))

    def governed(self, policy: KVPolicy, cached: CachedTokens) -> None:
        """Let a policy attend to the segment added last."""
        self.policies.append(PolicyRows(self.segments[-1], policy, cached))

    def build(self) -> Batch:
        return Batch(
            tokens=torch.tensor(self.tokens, device=self.device),
            positions=torch.tensor(self.positions, device=self.device),
            slots=torch.tensor(self.slots, device=self.device),
            segments=self.segments,
            logits_rows=torch.tensor(self.logits_rows, dtype=torch.int64, device=self.device),
            bypasses=self.bypasses,
            taps=self.taps,
            policies=self.policies,
            overrides=self.overrides,
        )
