"""How long a pass of so many rows takes, measured on this machine, for engines that train nothing."""

from __future__ import annotations

import logging
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from tokenloom.batch import BatchBuilder
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.build import share_prefixes
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.latency_profile import Cell, cache_path, profile_key

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine

logger = logging.getLogger("tokenloom.engine")

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (64, 1024)
REPEATS = 3


def pass_times(engine: Engine, home: Path | None) -> LatencyModel:
    """The stored profile of this machine, one with training if there is one; else a new one, in a second or
    two.

    home: where it is kept; None measures anew and stores nothing. Where the pool has no room to measure in, a
    row is taken to cost as much as the first: then no guess is worth it.
    """
    whole = profile_key(engine)
    key = {**whole, "passes": "tree"}
    if home is not None:
        for known in (whole, key):
            model = LatencyModel.load(cache_path(home, known), known)
            if model is not None:
                return model
    samples = _measure(engine)
    if not samples:
        return LatencyModel.fit([(Features(rows=n, head_rows=n), float(n)) for n in ROWS])
    model = LatencyModel.fit(samples, key)
    if home is not None:
        try:
            model.save(cache_path(home, key))
        except OSError as error:
            logger.warning("how long passes take could not be stored (%s)", error)
    return model


def _measure(engine: Engine) -> list[tuple[Features, float]]:
    samples: list[tuple[Features, float]] = []
    for rows, context in product(ROWS, CONTEXTS):
        context = min(context, engine.max_model_len - rows)
        table = BlockTable(engine.pool)
        try:
            if context < 1 or rows > engine.settings.scheduler.max_batch_tokens:
                continue
            table.grow(context + rows)
            samples.append(
                (Cell(decode_rows=rows, context=context).features(), _time(engine, table, rows, context))
            )
        except OutOfBlocks:
            continue
        finally:
            table.clear()
    return samples


def _time(engine: Engine, table: BlockTable, rows: int, context: int) -> float:
    """Milliseconds of a pass that verifies a chain of so many rows."""
    slots = torch.tensor([table.slot(i) for i in range(context)], device=engine.device)
    shape = (context, engine.config.num_kv_heads, engine.config.head_dim)
    # What lies there may be no normal numbers, and those are slow.
    for layer in range(engine.config.num_layers):
        nothing = torch.zeros(shape, dtype=engine.dtype, device=engine.device)
        engine.kv.write(layer, slots, nothing, nothing)
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        builder = BatchBuilder(engine.device)
        builder.add_draft(
            [0] * rows,
            list(range(-1, rows - 1)),
            table.blocks,
            kv_start=context - 1,
            block_size=engine.pool.block_size,
            contiguous=table.contiguous,
        )
        batch = builder.build()
        share_prefixes(engine, batch)
        hidden = engine.decoder.forward(batch, engine.kv)
        engine.decoder.logits(hidden[batch.logits_rows]).argmax(-1).tolist()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times[1:])  # the first touches memory for the first time
