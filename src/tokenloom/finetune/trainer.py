"""A job's training, from its first pass to its last: what runs next, whatever the size of the pieces."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from tokenloom.batch import BatchBuilder, Keep
from tokenloom.engine.engine import Engine
from tokenloom.engine.latency_model import Features
from tokenloom.errors import RequestError, TokenloomError
from tokenloom.finetune.data import Sample
from tokenloom.finetune.dropout import keep_mask
from tokenloom.finetune.hyperparameters import Hyperparameters
from tokenloom.finetune.objective import Objective
from tokenloom.finetune.optimizer import Optimizer
from tokenloom.finetune.packing import pack
from tokenloom.finetune.progress import Listener, Progress, Snapshot
from tokenloom.finetune.retained import blocks_needed
from tokenloom.finetune.training_pass import KeepFor, Pass, TrainingPass
from tokenloom.models.adapters import Adapter

SAVE_EVERY_S = 60.0


class TrainingDiverged(TokenloomError):
    """A loss or a gradient is not a number any more."""


class StepTrainer(ABC):
    """Implements `engine.training.Training` for one job, whatever its passes train.

    Args:
        engine: what runs it.
        flat: the numbers that are trained, in place; they may be wider than the model's type.
        samples, valid: what to learn from, and what to evaluate on at each checkpoint.
        hyper, seed: of the job, everything resolved.
        listener: hears of steps, checkpoints and the end.
        resume: a snapshot to go on from.

    Raises:
        RequestError: the KV pool holds 8-bit numbers, in which activations cannot be kept.
    """

    def __init__(
        self,
        engine: Engine,
        flat: Tensor,
        samples: Sequence[Sample],
        hyper: Hyperparameters,
        listener: Listener,
        *,
        seed: int,
        valid: Sequence[Sample] = (),
        resume: Snapshot | None = None,
    ) -> None:
        if engine.kv.quantized:
            raise RequestError("cache.dtype: nothing can be trained on an int8 cache; use cache.dtype=auto")
        self.engine, self.flat, self.listener = engine, flat, listener
        self.samples, self.valid, self.seed = samples, valid, seed
        self.hyper = hyper
        training = hyper.training
        self.examples_per_step = hyper.batch_size * training.grad_accum
        self.steps_per_epoch = math.ceil(len(samples) / self.examples_per_step)
        self.total_steps = self.steps_per_epoch * hyper.n_epochs
        self.progress = Progress()
        self.optimizer = Optimizer(flat, hyper, self.total_steps)
        self.grads = torch.zeros_like(flat)
        self.pass_grads = torch.zeros_like(flat)
        if resume is not None:
            self.progress = Progress(**resume.progress)
            flat.copy_(resume.flat)
            if resume.grads.numel():
                self.grads.copy_(resume.grads)
            self.optimizer.restore(resume.optimizer)
        self.valid_windows = self._windows(list(range(len(valid))), valid) if valid else []
        self.tokens_per_epoch = sum(len(sample.tokens) for sample in samples)
        self.rows_run = 0
        """Forward rows of finished training passes: each token once, restarts not counted."""
        self._pass: Pass | None = None
        self._windows_of_step: list[list[int]] = []
        self._scale = 1.0
        self._over = self.complete
        self._saved_s = self._clock = time.monotonic()
        self._plan_step()

    # -- what comes next --------------------------------------------------------------------------------

    def _windows(self, indices: list[int], samples: Sequence[Sample]) -> list[list[int]]:
        """Which samples share a pass."""
        if not self.hyper.training.pack:
            return [[index] for index in indices]
        chosen = [samples[index] for index in indices]
        windows = pack(chosen, self.hyper.training.max_seq_tokens, self.engine.pool.block_size)
        return [[indices[i] for i in window] for window in windows]

    def _plan_step(self) -> None:
        """Choose the samples of the step at hand; a function of seed and step alone."""
        if self.progress.step >= self.total_steps:
            return
        epoch, place = divmod(self.progress.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator)
        chosen = order[place * self.examples_per_step : (place + 1) * self.examples_per_step].tolist()
        self._windows_of_step = self._windows(chosen, self.samples)
        self._scale = 1 / sum(sum(self.samples[index].weights) for index in chosen)

    @property
    def complete(self) -> bool:
        """Whether the last step and its evaluation are done."""
        progress = self.progress
        ended = progress.step >= self.total_steps or progress.stopped_early
        return ended and not progress.evaluating

    @property
    def _optimizer_due(self) -> bool:
        progress = self.progress
        return not progress.evaluating and progress.passes_done == len(self._windows_of_step)

    def _window(self) -> list[Sample]:
        """The samples of the next pass."""
        if self.progress.evaluating:
            return [self.valid[i] for i in self.valid_windows[self.progress.valid_windows_done]]
        return [self.samples[i] for i in self._windows_of_step[self.progress.passes_done]]

    def slots_needed(self) -> int | None:
        if self._over:
            return None
        if self._pass is not None or self._optimizer_due:
            return 0
        size, rows = self.engine.pool.block_size, [len(sample.tokens) for sample in self._window()]
        blocks = sum(math.ceil(n / size) for n in rows)
        if not self.progress.evaluating:
            blocks += self._blocks_kept(sum(rows))
        return blocks * size

    @abstractmethod
    def _blocks_kept(self, rows: int) -> int:
        """What a training pass of so many rows claims beyond its tokens."""

    def begin_pass(self) -> None:
        if not self.progress.evaluating:
            self.pass_grads.zero_()
        self._clock = time.monotonic()
        self._pass = self._new_pass()

    @abstractmethod
    def _new_pass(self) -> Pass:
        """Over the samples of `_window`; its gradients go to `pass_grads` unless it evaluates."""

    # -- forward ----------------------------------------------------------------------------------------

    def forward_left(self) -> int:
        return self._pass.forward_left() if self._pass is not None else 0

    def forward_features(self, rows: int) -> Features:
        assert self._pass is not None
        return Features(rows=rows, train_rows=rows, context=self._pass.context(rows))

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        assert self._pass is not None
        self._pass.add_rows(builder, rows)

    def forward_done(self, rows: int) -> None:
        # A reclaim in between has dropped the pass.
        if self._pass is not None:
            self._pass.forward_done(rows)

    # -- pieces -----------------------------------------------------------------------------------------

    def piece_rows(self) -> int:
        return 1 if self._pass is None else self._pass.piece_rows()

    def piece_features(self, rows: int) -> Features:
        return Features(optimizer=1) if self._pass is None else self._pass.piece_features(rows)

    def run_piece(self, rows: int) -> None:
        """Raises TrainingDiverged when a loss or the gradients are not finite."""
        if self._pass is None:
            self._step()
            return
        self._pass.run_piece(rows)
        if self._pass.done:
            self._end_pass(self._pass)

    def _end_pass(self, done: Pass) -> None:
        progress = self.progress
        sums = done.sums()
        loss = sums["loss"]
        done.release()
        self._pass = None
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss} in step {progress.step + 1}")
        now = time.monotonic()
        progress.seconds += now - self._clock
        if progress.evaluating:
            progress.valid = {name: progress.valid.get(name, 0.0) + value for name, value in sums.items()}
            progress.valid_windows_done += 1
            if progress.valid_windows_done == len(self.valid_windows):
                self._end_evaluation()
            return
        self.rows_run += done.num_rows
        progress.trained_tokens += sum(len(sample.tokens) for sample in self._window())
        progress.loss += loss
        progress.weight += sums["weight"]
        progress.correct += int(sums["correct"])
        progress.labels += int(sums["n"])
        progress.passes_done += 1
        self.grads += self.pass_grads
        if now - self._saved_s > SAVE_EVERY_S:
            self._saved_s = now
            self.listener.save(self.snapshot())

    def _step(self) -> None:
        progress = self.progress
        rate = self.optimizer.rate(progress.step)
        norm = self.optimizer.step(self.grads, progress.step)
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient became {norm} in step {progress.step + 1}")
        self.grads.zero_()
        progress.last_metrics = {
            "train_loss": progress.loss / progress.weight,
            "train_mean_token_accuracy": progress.correct / progress.labels,
            "learning_rate": rate,
            "grad_norm": norm,
        }
        progress.step += 1
        progress.passes_done, progress.loss, progress.weight = 0, 0.0, 0.0
        progress.correct = progress.labels = 0
        left = self.tokens_per_epoch * self.hyper.n_epochs - progress.trained_tokens
        speed = progress.trained_tokens / progress.seconds if progress.seconds else 0.0
        eta_s = left / speed if speed else None
        self.listener.step(Progress(**asdict(progress)), dict(progress.last_metrics), eta_s)
        if self._checkpoint_due():
            if self.valid_windows:
                progress.evaluating, progress.valid_windows_done = True, 0
                progress.valid = dict.fromkeys(progress.valid, 0.0)
                return
            self._checkpoint()
        self._plan_step()

    def _checkpoint_due(self) -> bool:
        step, every = self.progress.step, self.hyper.training.checkpoint_every_steps
        last = step == self.total_steps
        return last or step % (every or self.steps_per_epoch) == 0

    def _end_evaluation(self) -> None:
        progress, sums = self.progress, self.progress.valid
        loss = sums["loss"] / sums["weight"]
        progress.last_metrics |= {
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": sums["correct"] / sums["n"],
        }
        if progress.best_valid_loss is None or loss < progress.best_valid_loss:
            progress.best_valid_loss, progress.valid_without_gain = loss, 0
        else:
            progress.valid_without_gain += 1
        patience = self.hyper.training.early_stopping_patience
        progress.stopped_early = patience is not None and progress.valid_without_gain >= patience
        progress.evaluating = False
        self._checkpoint()
        self._plan_step()

    def _checkpoint(self) -> None:
        progress = self.progress
        self._saved_s = time.monotonic()
        snapshot = self.snapshot()
        self.listener.checkpoint(snapshot, dict(progress.last_metrics))
        if self.complete:
            self._over = True
            self.listener.finished(snapshot)

    # -- interruptions ----------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The state without the pass at hand, which would start over."""
        grads = self.grads if self.progress.passes_done else self.grads[:0]
        return Snapshot(asdict(self.progress), self.flat.clone(), self.optimizer.state(), grads.clone())

    def reclaim(self) -> bool:
        if self._pass is None:
            return False
        self._pass.release()
        self._pass = None
        return True

    def stop(self) -> Snapshot:
        """Give up the pass at hand and stop for good; a trainer that resumes from the snapshot goes on."""
        self.reclaim()
        self._over = True
        return self.snapshot()

    def fail(self, error: BaseException) -> None:
        self.reclaim()
        self._over = True
        self.listener.failed(error, self.progress.step)


class Trainer(StepTrainer):
    """Trains an adapter.

    Args:
        adapter: trained in place. objective: what it minimises. The others are those of `StepTrainer`.
    """

    def __init__(
        self,
        engine: Engine,
        adapter: Adapter,
        samples: Sequence[Sample],
        hyper: Hyperparameters,
        objective: Objective,
        listener: Listener,
        *,
        seed: int,
        valid: Sequence[Sample] = (),
        resume: Snapshot | None = None,
    ) -> None:
        self.adapter, self.objective = adapter, objective
        super().__init__(
            engine, adapter.flat, samples, hyper, listener, seed=seed, valid=valid, resume=resume
        )

    def _blocks_kept(self, rows: int) -> int:
        training = self.hyper.training
        return blocks_needed(self.engine.config, rows, training.retain, self.engine.pool.block_size)

    def _new_pass(self) -> Pass:
        evaluating = self.progress.evaluating
        return TrainingPass(
            self.engine,
            self.adapter,
            self._window(),
            self.objective,
            retain=self.hyper.training.retain,
            grads=None if evaluating else self.pass_grads,
            scale=self._scale,
            keep_for=_no_dropout if evaluating else self._dropout(),
        )

    def _dropout(self) -> KeepFor:
        rate = self.hyper.lora.dropout
        if not rate:
            return _no_dropout
        where = (self.seed, self.progress.step, self.progress.passes_done)
        dtype, device = self.flat.dtype, self.flat.device

        def keep_for(begin: int, end: int) -> Keep:
            return lambda layer, site, width: keep_mask(
                (*where, layer, site), begin, end, width, rate, dtype
            ).to(device)

        return keep_for


def _no_dropout(begin: int, end: int) -> None:
    return None
