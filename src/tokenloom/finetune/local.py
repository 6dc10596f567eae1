"""Training on an engine of this process, without a server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError, TokenloomError
from tokenloom.finetune.checkpoint import latest_state, save_state
from tokenloom.finetune.data import Sample, load_samples, validate
from tokenloom.finetune.hyperparameters import (
    FinetuneOptions,
    Hyperparameters,
    LoraOptions,
    RequestedHyperparameters,
    resolve_hyperparameters,
)
from tokenloom.finetune.job_request import MAX_SEED
from tokenloom.finetune.objective import Objective, SupervisedFinetuning
from tokenloom.finetune.progress import Progress, Snapshot
from tokenloom.finetune.trainer import Trainer
from tokenloom.models.adapters import Adapter, Dims, LoraConfig, save_adapter


class TrainingStopped(TokenloomError):
    """Training was stopped before its end, and can go on."""


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
    warnings: list[str] = field(default_factory=list)
    """What the owner of the data should know, e.g. how many examples were truncated."""


Rows = str | Path | Sequence[dict[str, Any]]
"""A JSONL file of examples, or its rows."""


def finetune_folder(
    engine: Engine,
    data: Rows,
    output: Path,
    *,
    validation: Rows | None = None,
    seed: int = 0,
    on_step: Callable[[StepReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
    options: dict[str, Any] | None = None,
) -> FinetuneResult:
    """From examples and options by name to an adapter in `output`; see `LLM.finetune`."""
    requested = parse_options(options or {})
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed: must be an integer from 0 to {MAX_SEED}", param="seed")
    limit = min(resolve_hyperparameters(1, requested).training.max_seq_tokens, engine.max_model_len)
    train = _read(engine, "data", data, limit)
    valid = _read(engine, "validation", validation, limit) if validation is not None else _Data()
    hyper = resolve_hyperparameters(len(train.samples), requested)
    hyper = hyper.model_copy(update={"training": hyper.training.model_copy(update={"max_seq_tokens": limit})})
    if hyper.training.early_stopping_patience is not None and not valid.samples:
        raise RequestError("early_stopping_patience: needs validation data", param="early_stopping_patience")
    job = {"base_model": engine.name, "seed": seed, "data_sha256": train.sha256}
    _claim(output, {**job, "validation_sha256": valid.sha256, **hyper.model_dump(mode="json")})
    result = train_here(
        engine, train.samples, hyper, output, seed=seed, valid=valid.samples, on_step=on_step, stop=stop
    )
    result.warnings = train.warnings + valid.warnings
    return result


@dataclass(frozen=True)
class _Data:
    """Examples that were found to be in order."""

    samples: Sequence[Sample] = ()
    sha256: str | None = None
    """Of the file, or of the rows as one."""
    warnings: list[str] = field(default_factory=list)


def _read(engine: Engine, name: str, source: Rows, limit: int) -> _Data:
    """Check and tokenise examples. Raises RequestError with the 1-based lines of faulty ones."""
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise RequestError(f"{name}: {source} is not a file", param=name)
        return _read_file(engine, name, Path(source), str(source), limit)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for number, row in enumerate(source, 1):
                try:
                    file.write(json.dumps(row) + "\n")
                except (TypeError, ValueError, RecursionError) as error:
                    raise RequestError(
                        f"{name}: line {number}: cannot be written as JSON ({error})", param=name
                    ) from None
        return _read_file(engine, name, path, name, limit)


def _read_file(engine: Engine, name: str, path: Path, shown: str, limit: int) -> _Data:
    report = validate(path, engine.tokenizer, limit)
    if not report.ok:
        raise RequestError(f"{shown}: {report.summary()}", param=name, code="invalid_training_file")
    samples = load_samples(path, engine.tokenizer, limit).samples
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return _Data(samples, digest.hexdigest(), [f"{shown}: {warning}" for warning in report.warnings])


def parse_options(options: dict[str, Any]) -> FinetuneOptions:
    """Options by name, sorted into those of the adapter and those of training.

    Raises RequestError naming the option.
    """
    lora = {name: value for name, value in options.items() if name in LoraOptions.model_fields}
    rest = {name: value for name, value in options.items() if name not in lora}
    unknown = next((name for name in rest if name not in RequestedHyperparameters.model_fields), None)
    if unknown is not None:
        raise RequestError(f"{unknown}: unknown option", param=unknown)
    try:
        return FinetuneOptions.model_validate({"lora": lora, "hyperparameters": rest})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in fault["loc"][1:])
        raise RequestError(f"{name}: {fault['msg'].removeprefix('Value error, ')}", param=name) from None


def _claim(output: Path, job: dict[str, Any]) -> None:
    """Note in `output` which job it belongs to. Raises RequestError if it belongs to another."""
    file = output / "job.json"
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        aside = output / ".job.json"
        aside.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, file)
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"output: {file} cannot be read ({error}): choose another folder", param="output"
        ) from None
    differing = ", ".join(sorted(name for name in job if before.get(name) != job[name]))
    if differing:
        raise RequestError(
            f"output: {output} holds another job (it differs in {differing}): choose another folder",
            param="output",
        )


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
    stop: Callable[[], bool] = lambda: False,
) -> FinetuneResult:
    """Train until the last step; the engine does nothing else meanwhile.

    What lies in `output` already is gone on from: an interrupted call can simply be made again.

    Args:
        output: gets `adapter`, the finished PEFT folder, and `checkpoints`.
        adapter: trained in place instead of a new LoRA.
        stop: asked between iterations; when it says so, the state is saved and TrainingStopped raised.

    Raises:
        TrainingStopped: `stop` asked for it.
        TrainingDiverged: a loss or gradient is not finite; checkpoints stay.
        OSError: the disk is full, or the like.
    """
    adapter = adapter or new_adapter(engine, hyper, seed)
    states = output / "checkpoints"
    folder = _Folder(engine, adapter, output, on_step)
    trainer = Trainer(
        engine,
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
            if stop():
                save_state(states, trainer.stop())
                raise TrainingStopped(f"stopped after step {trainer.progress.step}; the state is saved")
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
        assert self.trainer is not None
        kept = sorted(self.output.glob("adapter-step-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
        for older in kept[: -self.trainer.hyper.training.save_total_limit]:
            shutil.rmtree(older, ignore_errors=True)

    def save(self, snapshot: Snapshot) -> None:
        save_state(self.output / "checkpoints", snapshot)

    def finished(self, snapshot: Snapshot) -> None:
        """The loop sees it by itself."""

    def failed(self, error: BaseException, step: int) -> None:
        self.error = error
