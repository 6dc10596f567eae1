"""From an iteration's plan to the batch that the weights see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenloom.batch import Batch, BatchBuilder, SegmentKind
from tokenloom.engine.request import Sequence
from tokenloom.engine.scheduler import Plan
from tokenloom.kernels.shared_prefix import shared_prefixes

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine


def build_batch(engine: Engine, plan: Plan, train_rows: int) -> Batch:
    """The rows of a plan, one segment for each sequence in its order, and behind them those that train.

    Where adapters are used the plan is put in their order first, so that each runs once.
    """
    if any(sequence.request.adapter is not None for sequence in plan.rows):
        plan.rows = dict(sorted(plan.rows.items(), key=lambda item: _adapter_version(item[0])))
    builder, block_size = BatchBuilder(engine.device), engine.pool.block_size
    for sequence, rows in plan.rows.items():
        _add(builder, block_size, sequence, rows, plan)
    if train_rows:
        engine.coserver.add_rows(builder, train_rows)
    engine.counters.iterations += 1
    engine.counters.batch_tokens += plan.num_rows
    batch = builder.build()
    share_prefixes(engine, batch)
    engine.counters.prefix_reads_saved += sum(prefix.num_saved for prefix in batch.shared)
    return batch


def share_prefixes(engine: Engine, batch: Batch) -> None:
    """Say which keys may be read once for all rows that read them."""
    piece = _shared_piece(engine)
    if piece is not None:
        batch.shared = shared_prefixes(batch.plain_spans, engine.pool.block_size, piece=piece)


def _shared_piece(engine: Engine) -> int | None:
    """Common prefixes are read once in multiples of so many tokens; None: not at all."""
    mode, decoder = engine.settings.cache.shared_prefix_attention, engine.decoder
    if mode == "off":
        return None
    exact = decoder.kernels.exact_prefix_tokens(decoder.config, decoder.dtype)
    return exact if mode == "auto" or exact is not None else 1


def _add(builder: BatchBuilder, block_size: int, sequence: Sequence, rows: int, plan: Plan) -> None:
    start, policy, cached = sequence.num_computed, sequence.policy, sequence.cached
    samples = start + rows == len(sequence.tokens) and sequence.generates
    draft = plan.drafts.get(sequence)
    if draft is not None and draft.tree.num_rows:
        first = draft.first_batch_row = builder.add_draft(
            [sequence.tokens[start], *draft.tree.tokens],
            [-1, *(node + 1 for node in draft.tree.parents)],
            sequence.table.blocks,
            kv_start=start,
            block_size=block_size,
            contiguous=sequence.table.contiguous,
            prompts=draft.tree.prompts,
            vectors=draft.tree.vectors,
        )
    else:
        first = builder.add(
            SegmentKind.DECODE if sequence.num_output and rows == 1 else SegmentKind.PREFILL,
            sequence.tokens[start : start + rows],
            sequence.table.blocks,
            kv_start=sequence.kv_start,
            block_size=block_size,
            contiguous=sequence.table.contiguous,
            logits="last" if samples else "none",
            positions=None if policy is None else policy.seen_at(start, rows),
        )
    if policy is not None and cached is not None:
        cached.start, cached.length = start, sequence.kv_start + rows
        if policy.attends(start, start + rows) or cached.blocks_apart:
            builder.governed(policy, cached)
    if sequence.request.adapter is not None:
        builder.through(sequence.request.adapter.adapter.layers, first)


def _adapter_version(sequence: Sequence) -> int:
    adapter = sequence.request.adapter
    return 0 if adapter is None else adapter.version
