"""A job's training, from its first pass to its last: what runs next, whatever the size of the pieces."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

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
from tokenloom.finetune.retained import blocks_needed
from tokenloom.finetune.training_pass import KeepFor, Phase, TrainingPass
from tokenloom.models.adapters import Adapter

LOSS_ROWS, MOST_LOSS_ROWS = 64, 256
"""Logits of so many rows exist at a time, or of a quarter of a long pass, whose activations take more memory
than they do: the head is read once for all of them."""
SAVE_EVERY_S = 60.0
_VALID_SUMS = ("loss", "weight", "correct", "n")


class TrainingDiverged(TokenloomError):
    """A loss or a gradient is not a number any more."""


@dataclass
class Progress:
    """Where a job is. With the tensors of a `Snapshot` it is all that going on needs: everything random is a
    function of the seed and of these numbers, and a pass that was under way starts over."""

    step: int = 0
    """Optimizer steps done."""
    passes_done: int = 0
    """Passes of the step at hand whose gradients are in the sum."""
    trained_tokens: int = 0
    loss: float = 0.0
    """Weighted sum over the passes done of the step at hand; so are the next two."""
    weight: float = 0.0
    correct: int = 0
    labels: int = 0
    valid_windows_done: int = 0
    valid: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "weight", "correct", "n"), 0.0)
    )
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluating: bool = False
    best_valid_loss: float | None = None
    valid_without_gain: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    """Time spent training so far."""


@dataclass
class Snapshot:
    """A copy of a job's state between two passes."""

    progress: dict[str, Any]
    flat: Tensor
    optimizer: dict[str, Tensor]
    grads: Tensor
    """Of the step at hand; empty when none of its passes is done."""


class Listener(Protocol):
    """Hears of a trainer, on the engine's thread: it must return at once."""

    def step(self, progress: Progress, metrics: dict[str, float], eta_s: float | None) -> None: ...

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        """An adapter to keep, and to go on from."""

    def save(self, snapshot: Snapshot) -> None:
        """A state to go on from."""

    def finished(self, snapshot: Snapshot) -> None:
        """The last step is done (its checkpoint came before)."""

    def failed(self, error: BaseException, step: int) -> None: ...


class Trainer:
    """Implements `engine.training.Training` for one job.

    Args:
        engine: what runs it.
        adapter: trained in place; its tensor may be wider than the model's type.
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
        if engine.kv.quantized:
            raise RequestError("cache.dtype: nothing can be trained on an int8 cache; use cache.dtype=auto")
        self.engine = engine
        self.adapter, self.objective, self.listener = adapter, objective, listener
        self.samples, self.valid, self.seed = samples, valid, seed
        self.hyper = hyper
        training = hyper.training
        self.examples_per_step = hyper.batch_size * training.grad_accum
        self.steps_per_epoch = math.ceil(len(samples) / self.examples_per_step)
        self.total_steps = self.steps_per_epoch * hyper.n_epochs
        self.progress = Progress()
        self.optimizer = Optimizer(adapter.flat, hyper, self.total_steps)
        self.grads = torch.zeros_like(adapter.flat)
        self.pass_grads = torch.zeros_like(adapter.flat)
        if resume is not None:
            self.progress = Progress(**resume.progress)
            adapter.flat.copy_(resume.flat)
            if resume.grads.numel():
                self.grads.copy_(resume.grads)
            self.optimizer.restore(resume.optimizer)
        self.valid_windows = self._windows(list(range(len(valid))), valid) if valid else []
        self.tokens_per_epoch = sum(len(sample.tokens) for sample in samples)
        self.rows_run = 0
        """Forward rows of finished training passes: each token once, restarts not counted."""
        self._pass: TrainingPass | None = None
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
            blocks += blocks_needed(self.engine.config, sum(rows), self.hyper.training.retain, size)
        return blocks * size

    def begin_pass(self) -> None:
        evaluating = self.progress.evaluating
        if not evaluating:
            self.pass_grads.zero_()
        self._clock = time.monotonic()
        self._pass = TrainingPass(
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
        dtype, device = self.adapter.flat.dtype, self.adapter.flat.device

        def keep_for(begin: int, end: int) -> Keep:
            return lambda layer, site, width: keep_mask(
                (*where, layer, site), begin, end, width, rate, dtype
            ).to(device)

        return keep_for

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
        if self._pass is None:
            return 1
        if self._pass.phase is Phase.LOSS:
            at_once = min(MOST_LOSS_ROWS, max(LOSS_ROWS, self._pass.num_rows // 4))
            return min(at_once, self._pass.losses_left())
        return self._pass.backward_left()

    def piece_features(self, rows: int) -> Features:
        if self._pass is None:
            return Features(optimizer=1)
        if self._pass.phase is Phase.LOSS:
            return Features(loss_quanta=1, loss_rows=rows)
        return Features(bwd_quanta=1, bwd_rows=rows, bwd_context=self._pass.backward_context(rows))

    def run_piece(self, rows: int) -> None:
        """Raises TrainingDiverged when a loss or the gradients are not finite."""
        if self._pass is None:
            self._step()
            return
        if self._pass.phase is Phase.LOSS:
            self._pass.run_loss(rows)
        else:
            self._pass.run_backward(rows)
        if self._pass.phase is Phase.DONE:
            self._end_pass(self._pass)

    def _end_pass(self, done: TrainingPass) -> None:
        progress = self.progress
        loss, correct = float(done.loss), int(done.correct)
        done.release()
        self._pass = None
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became {loss} in step {progress.step + 1}")
        now = time.monotonic()
        progress.seconds += now - self._clock
        if progress.evaluating:
            sums = {"loss": loss, "weight": done.weight, "correct": correct, "n": len(done.labelled)}
            progress.valid = {name: value + sums[name] for name, value in progress.valid.items()}
            progress.valid_windows_done += 1
            if progress.valid_windows_done == len(self.valid_windows):
                self._end_evaluation()
            return
        self.rows_run += done.num_rows
        progress.trained_tokens += sum(len(sample.tokens) for sample in self._window())
        progress.loss += loss
        progress.weight += done.weight
        progress.correct += correct
        progress.labels += len(done.labelled)
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
        return Snapshot(
            asdict(self.progress), self.adapter.flat.clone(), self.optimizer.state(), grads.clone()
        )

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


def _no_dropout(begin: int, end: int) -> None:
    return None
