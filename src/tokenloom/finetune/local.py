"""Training on an engine of this process, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tokenloom.engine.engine import Engine
from tokenloom.finetune.checkpoint import latest_state, save_state
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import Hyperparameters
from tokenloom.finetune.objective import Objective, SupervisedFinetuning
from tokenloom.finetune.trainer import Progress, Snapshot, Trainer
from tokenloom.models.adapters import Adapter, Dims, LoraConfig, save_adapter


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as it is shown to whoever watches."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    trained_tokens: int
    tokens_per_s: float
    eta_s: float | None


@dataclass
class FinetuneResult:
    """A finished adapter (a PEFT folder) and how it came about."""

    adapter: Path
    steps: list[StepReport] = field(default_factory=list)
    trained_tokens: int = 0


def new_adapter(engine: Engine, hyper: Hyperparameters, seed: int) -> Adapter:
    """A fresh LoRA for a job: parameters in float32, or in float64 if the model is."""
    options = hyper.lora
    config = LoraConfig(
        r=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=tuple(options.target_modules),
        rslora=options.use_rslora,
    )
    dtype = torch.float64 if engine.dtype == torch.float64 else torch.float32
    adapter = Adapter(config, Dims.of(engine.config), dtype, engine.device)
    adapter.init(seed)
    return adapter


def train_here(
    engine: Engine,
    samples: Sequence[Sample],
    hyper: Hyperparameters,
    output: Path,
    *,
    seed: int = 0,
    valid: Sequence[Sample] = (),
    objective: Objective | None = None,
    adapter: Adapter | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> FinetuneResult:
    """Train until the last step; the engine does nothing else meanwhile.

    What lies in `output` already is gone on from: an interrupted call can simply be made again.

    Args:
        output: gets `adapter`, the finished PEFT folder, and `checkpoints`.
        adapter: trained in place instead of a new LoRA.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; checkpoints stay.
        OSError: the disk is full, or the like.
    """
    adapter = adapter or new_adapter(engine, hyper, seed)
    states = output / "checkpoints"
    folder = _Folder(engine, adapter, output, on_step)
    trainer = Trainer(
        engine.decoder,
        engine.kv,
        engine.pool,
        adapter,
        samples,
        hyper,
        objective or SupervisedFinetuning(),
        folder,
        seed=seed,
        valid=valid,
        resume=latest_state(states),
    )
    folder.trainer = trainer
    coserver, mode = engine.coserver, engine.coserver.mode
    coserver.mode = "ft_only"
    coserver.add(trainer)
    try:
        while folder.error is None and not trainer.complete:
            engine.step()
    except KeyboardInterrupt:
        save_state(states, trainer.stop())
        raise
    finally:
        coserver.remove(trainer)
        coserver.mode = mode
    if folder.error is not None:
        raise folder.error
    save_adapter(adapter, output / "adapter", engine.name)
    return FinetuneResult(output / "adapter", folder.steps, trainer.progress.trained_tokens)


class _Folder:
    """Listens to a trainer and writes what it hears of into a folder."""

    def __init__(
        self, engine: Engine, adapter: Adapter, output: Path, on_step: Callable[[StepReport], None]
    ) -> None:
        self.engine, self.adapter, self.output, self.on_step = engine, adapter, output, on_step
        self.trainer: Trainer | None = None
        self.steps: list[StepReport] = []
        self.error: BaseException | None = None

    def step(self, progress: Progress, metrics: dict[str, float], eta_s: float | None) -> None:
        assert self.trainer is not None
        speed = progress.trained_tokens / progress.seconds if progress.seconds else 0.0
        total = self.trainer.total_steps
        report = StepReport(progress.step, total, metrics, progress.trained_tokens, speed, eta_s)
        self.steps.append(report)
        self.on_step(report)

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        step = snapshot.progress["step"]
        adapter = self.adapter.copy(snapshot.flat)
        save_adapter(adapter, self.output / f"adapter-step-{step}", self.engine.name)
        self.save(snapshot)

    def save(self, snapshot: Snapshot) -> None:
        save_state(self.output / "checkpoints", snapshot)

    def finished(self, snapshot: Snapshot) -> None:
        """The loop sees it by itself."""

    def failed(self, error: BaseException, step: int) -> None:
        self.error = error
