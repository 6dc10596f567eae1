"""What a job trains, and what becomes of it when it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from tokenloom.engine.engine import Engine
from tokenloom.finetune.data import Samples, load_samples
from tokenloom.finetune.hyperparameters import Hyperparameters
from tokenloom.finetune.local import new_adapter
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.progress import Listener, Snapshot
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.trainer import StepTrainer, Trainer
from tokenloom.models.adapters import save_adapter


class Product(Protocol):
    """One job's. Methods are called on the job's own thread, never on the engine's."""

    def trainer(self, listener: Listener, resume: Snapshot | None) -> StepTrainer:
        """Read the job's files and begin, or go on. Raises RequestError where they cannot be trained on."""

    def checkpoint(self, snapshot: Snapshot, folder: Path) -> bool:
        """Write what can be served of a state; False where nothing can, so that the state alone is kept."""

    def finish(self, snapshot: Snapshot, folder: Path) -> bool:
        """Write, or put into use, what was trained; False where that is no adapter in `folder`."""


Products = Mapping[str, Callable[[Engine, JobRecord], Product]]
"""Who makes what, by `Hyperparameters.kind`."""


class LoraProduct:
    """A LoRA adapter, in PEFT's format."""

    def __init__(self, engine: Engine, job: JobRecord) -> None:
        self.engine, self.job, self.hyper = engine, job, resolved(job)
        self.adapter = new_adapter(engine, self.hyper, job.seed)

    def trainer(self, listener: Listener, resume: Snapshot | None) -> Trainer:
        train, valid = examples(self.engine, self.job)
        return Trainer(
            self.engine,
            self.adapter,
            train,
            self.hyper,
            SupervisedFinetuning(),
            listener,
            seed=self.job.seed,
            valid=valid or (),
            resume=resume,
        )

    def checkpoint(self, snapshot: Snapshot, folder: Path) -> bool:
        save_adapter(self.adapter.copy(snapshot.flat), folder, self.job.model)
        return True

    finish = checkpoint


def resolved(job: JobRecord) -> Hyperparameters:
    """Of a job whose files have been checked."""
    assert job.hyperparameters is not None
    return job.hyperparameters


def examples(engine: Engine, job: JobRecord) -> tuple[Samples, Samples | None]:
    """The job's examples, and those to evaluate on if it names any."""
    limit = resolved(job).training.max_seq_tokens

    def read(path: Path) -> Samples:
        return load_samples(path, engine.tokenizer, limit).samples

    return read(job.training_path), None if job.validation_path is None else read(job.validation_path)
