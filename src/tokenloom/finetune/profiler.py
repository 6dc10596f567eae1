"""Measures the cells of the latency profile on a real engine, with a real adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch

from tokenloom.batch import BatchBuilder, SegmentKind
from tokenloom.cache.block_pool import OutOfBlocks
from tokenloom.cache.block_table import BlockTable
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features, LatencyModel
from tokenloom.engine.latency_profile import Cell, cache_path, profile_grid, profile_key
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import Hyperparameters
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.optimizer import Optimizer
from tokenloom.finetune.training_pass import LOSS_ROWS, Phase, TrainingPass
from tokenloom.models.adapters import Adapter

logger = logging.getLogger("tokenloom.finetune")

REPEATS = 3
LONG_MS = 300.0
_PREPARE_ROWS = 256
_PASS_ROWS = 1024


def stored_profile(engine: Engine, home: Path) -> LatencyModel | None:
    """The profile of an earlier run on this machine, if there is one."""
    key = profile_key(engine)
    return LatencyModel.load(cache_path(home, key), key)


class EngineProfiler:
    """Runs one cell per call on the engine's thread, so that requests can come in between.

    Args:
        adapter: like the one that will be trained; its values are not changed.
        home: where the fit is stored.
        cells: what to measure; the whole grid by default.
    """

    def __init__(
        self,
        engine: Engine,
        adapter: Adapter,
        hyper: Hyperparameters,
        home: Path,
        cells: Iterable[Cell] | None = None,
    ) -> None:
        self.engine, self.home = engine, home
        self.adapter, self.hyper = adapter.copy(), hyper
        self.grads = torch.zeros_like(self.adapter.flat)
        self.optimizer = Optimizer(self.adapter.flat, hyper, 1)
        self.samples: list[tuple[Features, float]] = []
        self._cells = iter(profile_grid() if cells is None else cells)
        rows = min(_PASS_ROWS, engine.max_model_len - 1)
        self._tokens = [i % 251 % engine.config.vocab_size for i in range(rows + 1)]

    def run_cell(self) -> LatencyModel | None:
        """Time the next cell; the fitted and stored model after the last one."""
        if self.measure_next():
            return None
        model = LatencyModel.fit(self.samples, profile_key(self.engine))
        try:
            model.save(cache_path(self.home, model.key))
        except OSError as error:
            logger.warning("the latency profile could not be stored (%s)", error)
        return model

    def measure_next(self) -> bool:
        """Time the next cell that the engine has room for; False after the last one."""
        for cell in self._cells:
            if self._too_large(cell):
                continue
            try:
                self._measure(cell)
            except OutOfBlocks:  # the pool is small, or requests hold it: the fit goes without this cell
                continue
            return True
        return False

    def _too_large(self, cell: Cell) -> bool:
        longest = max(cell.train_rows, cell.bwd_end, cell.prefill_rows)
        too_long = longest >= len(self._tokens) or cell.context > self.engine.max_model_len
        return too_long or cell.loss_rows > LOSS_ROWS

    def _measure(self, cell: Cell) -> None:
        tables: list[BlockTable] = []
        passes: list[TrainingPass] = []
        try:
            run = self._prepare(cell, tables, passes)
            run()  # once unmeasured: the first touch of memory is not what iterations pay
            times: list[float] = []
            while len(times) < REPEATS and (not times or times[0] < LONG_MS):
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            self.samples.append((cell.features(), median(times)))
        finally:
            for table in tables:
                table.clear()
            for training in passes:
                training.release()

    def _prepare(
        self, cell: Cell, tables: list[BlockTable], passes: list[TrainingPass]
    ) -> Callable[[], None]:
        if cell.optimizer:
            return lambda: self._optimizer_step()
        if cell.bwd_rows or cell.loss_rows:
            return self._backward(cell, passes)
        for _ in range(cell.decode_rows):
            tables.append(self._table(cell.context + 1))
        if cell.prefill_rows:
            tables.append(self._table(cell.prefill_rows))
        training = None
        if cell.train_rows:
            training = self._pass(cell.train_rows)
            passes.append(training)
        return lambda: self._batch(cell, tables, training)

    def _table(self, tokens: int) -> BlockTable:
        table = BlockTable(self.engine.pool)
        try:
            table.grow(tokens, -(-tokens // self.engine.pool.block_size))
        except OutOfBlocks:
            table.clear()
            raise
        return table

    def _pass(self, rows: int) -> TrainingPass:
        engine = self.engine
        sample = Sample(self._tokens[: rows + 1], [0.0] + [1.0] * rows)
        return TrainingPass(
            engine,
            self.adapter,
            [sample],
            SupervisedFinetuning(),
            retain=self.hyper.training.retain,
            grads=self.grads,
        )

    def _batch(self, cell: Cell, tables: list[BlockTable], training: TrainingPass | None) -> None:
        engine, builder = self.engine, BatchBuilder(self.engine.device)
        size = engine.pool.block_size
        for i, table in enumerate(tables):
            decode = i < cell.decode_rows
            start = cell.context - 1 if decode else 0
            rows = 1 if decode else cell.prefill_rows
            builder.add(
                SegmentKind.DECODE if decode else SegmentKind.PREFILL,
                self._tokens[:rows],
                table.blocks,
                kv_start=start,
                block_size=size,
                contiguous=table.contiguous,
            )
        if training is not None:
            training.position = 0
            training.add_rows(builder, cell.train_rows)
        batch = builder.build()
        hidden = engine.decoder.forward(batch, engine.kv)
        if len(batch.logits_rows):
            int(engine.decoder.logits(hidden[batch.logits_rows]).argmax())
        else:
            float(hidden[0, 0])

    def _backward(self, cell: Cell, passes: list[TrainingPass]) -> Callable[[], None]:
        training = self._pass(max(cell.bwd_end, cell.loss_rows))
        passes.append(training)
        while training.phase is Phase.FORWARD:
            rows = min(_PREPARE_ROWS, training.forward_left())
            builder = BatchBuilder(self.engine.device)
            training.add_rows(builder, rows)
            self.engine.decoder.forward(builder.build(), self.engine.kv)
            training.forward_done(rows)

        hidden = training.hidden.clone()

        @torch.inference_mode()
        def run() -> None:
            # A loss of what the last run left there, a gradient, has logits so large that their exponentials
            # are no normal numbers, and those are slow.
            training.hidden.copy_(hidden)
            if cell.loss_rows:
                training.phase, training.num_losses = Phase.LOSS, 0
                training.run_loss(cell.loss_rows)
            else:
                training.layer, training.end = self.engine.config.num_layers // 2, cell.bwd_end
                training.run_backward(cell.bwd_rows)
            float(training.hidden[0, 0])

        return run

    def _optimizer_step(self) -> None:
        self.grads.fill_(1e-3)
        self.optimizer.step(self.grads, 0)
