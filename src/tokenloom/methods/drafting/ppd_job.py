"""PPD's prompt tokens as a finetuning job: trained between the requests of a server, used by it at once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom.engine.draft import GUESSES
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import Hyperparameters
from tokenloom.finetune.product import examples, resolved
from tokenloom.finetune.progress import Listener, Snapshot
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.trainer import StepTrainer
from tokenloom.heap import release_freed_memory
from tokenloom.methods.drafting.ppd import refresh
from tokenloom.methods.drafting.ppd_pass import PromptPass, cuts_of
from tokenloom.methods.drafting.ppd_student import Student
from tokenloom.methods.drafting.ppd_training import TRIM_EVERY, Trained, first_embeddings, keep

HOLD_OUT = 10
"""Without a validation file, each so many-th text is kept for measuring how often guesses are right."""


class PromptTrainer(StepTrainer):
    """Trains prompt tokens on the texts of a job; cuts are drawn anew each time a text is read."""

    def __init__(
        self,
        engine: Engine,
        vectors: Tensor,
        samples: Sequence[Sample],
        hyper: Hyperparameters,
        listener: Listener,
        *,
        seed: int,
        valid: Sequence[Sample],
        resume: Snapshot | None = None,
    ) -> None:
        assert hyper.ppd is not None
        self.options = hyper.ppd
        self.student = Student(engine, engine.dtype if engine.dtype == torch.float64 else torch.bfloat16)
        super().__init__(
            engine, vectors.flatten(), samples, hyper, listener, seed=seed, valid=valid, resume=resume
        )

    def _blocks_kept(self, rows: int) -> int:
        return 0  # the activations of a piece are gone with it

    def _new_pass(self) -> PromptPass:
        progress, options, shape = self.progress, self.options, (self.options.prompts, -1)
        draw = random.Random(f"{self.seed} {progress.step} {progress.passes_done}")
        texts = []
        for sample in self._window():
            cuts = cuts_of(sample.weights, options.prompts)
            if progress.evaluating:
                cuts = cuts[:: -(-len(cuts) // options.cuts)]
            elif len(cuts) > options.cuts:
                cuts = draw.sample(cuts, options.cuts)
            texts.append((sample.tokens, cuts))
        return PromptPass(
            self.engine,
            self.student,
            self.flat.view(shape),
            texts,
            options.decay,
            grads=None if progress.evaluating else self.pass_grads.view(shape),
            scale=1 / sum(map(len, self._windows_of_step)),
        )

    def _step(self) -> None:
        super()._step()
        if self.progress.step % TRIM_EVERY == 0:
            release_freed_memory()


class PromptProduct:
    """Implements `finetune.product.Product`."""

    def __init__(self, engine: Engine, job: JobRecord) -> None:
        self.engine, self.job, self.hyper = engine, job, resolved(job)
        assert self.hyper.ppd is not None
        self.options = self.hyper.ppd

    def trainer(self, listener: Listener, resume: Snapshot | None) -> PromptTrainer:
        given, valid = examples(self.engine, self.job)
        if valid is None:
            learned = self._usable(given, "training_file")
            if len(learned) < 2:
                raise RequestError("training_file: one of at least two texts is kept to measure on")
            held_out = learned[::HOLD_OUT]
            learned = [sample for i, sample in enumerate(learned) if i % HOLD_OUT]
        else:
            learned, held_out = (
                self._usable(given, "training_file"),
                self._usable(valid, "validation_file"),
            )
        return PromptTrainer(
            self.engine,
            first_embeddings(self.engine, self.options.prompts).clone(),
            learned,
            self.hyper,
            listener,
            seed=self.job.seed,
            valid=held_out,
            resume=resume,
        )

    def _usable(self, samples: Sequence[Sample], name: str) -> list[Sample]:
        found = [sample for sample in samples if cuts_of(sample.weights, self.options.prompts)]
        if not found:
            raise RequestError(f"{name}: no answer is longer than {self.options.prompts + 1} tokens")
        return found

    def checkpoint(self, snapshot: Snapshot, folder: Path) -> bool:
        return False

    def finish(self, snapshot: Snapshot, folder: Path) -> bool:
        """Keep the vectors where `draft=ppd` looks for them, and let the running engine use them."""
        progress, prompts = snapshot.progress, self.options.prompts
        log: dict[str, Any] = {
            "model": self.engine.name,
            "job": self.job.id,
            "steps": progress["step"],
            "tokens": progress["trained_tokens"],
            "hyperparameters": self.hyper.model_dump(mode="json", exclude={"lora"}),
            "seed": self.job.seed,
            "seconds": round(progress["seconds"]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        keep(self.engine, Trained(snapshot.flat.view(prompts, -1).cpu()), measured(progress, prompts), log)
        refresh(self.engine)
        return False


def measured(progress: dict[str, Any], prompts: int) -> Tensor:
    """How often the guess of rank r by prompt token i was right at the last evaluation, `[S, GUESSES]`."""
    valid = progress["valid"]
    counts = [[valid[f"right.{i}.{r}"] for r in range(GUESSES)] for i in range(prompts)]
    return torch.tensor(counts, dtype=torch.float64) / valid["weight"]
