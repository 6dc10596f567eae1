"""Trains jobs on a running engine: a thread per job reads its data and writes down what becomes of it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.errors import TokenloomError
from tokenloom.finetune.checkpoint import latest_state, save_state
from tokenloom.finetune.errors import StorageFullError
from tokenloom.finetune.heap import give_back
from tokenloom.finetune.local import new_adapter
from tokenloom.finetune.product import LoraProduct, Product, Products, resolved
from tokenloom.finetune.profiler import EngineProfiler, stored_profile
from tokenloom.finetune.progress import Progress, Snapshot
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.trainer import StepTrainer, TrainingDiverged

logger = logging.getLogger("tokenloom.finetune")

RETRIES = 3
RETRY_S = 1.0
ENGINE_CHECK_S = 1.0


@dataclass
class _Step:
    progress: Progress
    metrics: dict[str, float]
    eta_s: float | None


@dataclass
class _Checkpoint:
    snapshot: Snapshot
    metrics: dict[str, float]


@dataclass
class _Save:
    snapshot: Snapshot


@dataclass
class _Finished:
    snapshot: Snapshot


@dataclass
class _Failed:
    error: BaseException
    step: int


@dataclass
class _Stop:
    how: Literal["paused", "cancelled"]


@dataclass
class _Stopped:
    how: Literal["paused", "cancelled"]
    snapshot: Snapshot


_Event = _Step | _Checkpoint | _Save | _Finished | _Failed | _Stop | _Stopped


class EngineRunner:
    """Implements `service.JobRunner` on an engine.

    Args:
        home: where latency profiles are kept.
        products: what jobs may train.
    """

    def __init__(
        self, engine: AsyncEngine, home: Path, products: Products = MappingProxyType({"lora": LoraProduct})
    ) -> None:
        self.engine, self.home, self.products = engine, home, products
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def start(self, job: JobRecord, reporter: JobReporter) -> None:
        make = self.products[resolved(job).kind]
        run = _Run(self.engine, self.home, make, job, reporter, lambda: self._forget(job.id))
        with self._lock:
            self._runs[job.id] = run
        threading.Thread(target=run.main, name=f"finetune-{job.id[-6:]}", daemon=True).start()

    def pause(self, job_id: str) -> None:
        self._tell(job_id, _Stop("paused"))

    def cancel(self, job_id: str) -> None:
        self._tell(job_id, _Stop("cancelled"))

    def _tell(self, job_id: str, event: _Event) -> None:
        with self._lock:
            run = self._runs.get(job_id)
        if run is not None:
            run.events.put(event)

    def _forget(self, job_id: str) -> None:
        with self._lock:
            self._runs.pop(job_id, None)


class _Run:
    """One run of a job, on a thread of its own. It listens to its trainer through a queue: the engine's
    thread never waits for a disk or a database."""

    def __init__(
        self,
        engine: AsyncEngine,
        home: Path,
        make: Callable[[Engine, JobRecord], Product],
        job: JobRecord,
        reporter: JobReporter,
        forget: Callable[[], None],
    ) -> None:
        self.engine, self.home, self.job, self.reporter = engine, home, job, reporter
        self.make, self.forget = make, forget
        self.events: queue.Queue[_Event] = queue.Queue()
        self.trainer: StepTrainer | None = None
        self.product: Product | None = None
        self.last_checkpoint = ""

    # -- the trainer's listener, on the engine's thread ---------------------------------------------------

    def step(self, progress: Progress, metrics: dict[str, float], eta_s: float | None) -> None:
        self.events.put(_Step(progress, metrics, eta_s))

    def checkpoint(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        self.events.put(_Checkpoint(snapshot, metrics))

    def save(self, snapshot: Snapshot) -> None:
        self.events.put(_Save(snapshot))

    def finished(self, snapshot: Snapshot) -> None:
        self.events.put(_Finished(snapshot))

    def failed(self, error: BaseException, step: int) -> None:
        self.events.put(_Failed(error, step))

    # -- the run's own thread -----------------------------------------------------------------------------

    def main(self) -> None:
        end = self._guarded(self._train)
        self.forget()
        self._guarded(end)

    def _guarded(self, work: Callable[[], Callable[[], None] | None]) -> Callable[[], None]:
        """What `work` returns; or, if it fails, how to say so."""
        try:
            return work() or (lambda: None)
        except (StorageFullError, OSError) as error:
            self._withdraw()
            message = f"the disk is full or cannot be written ({_reason(error)}){self.last_checkpoint}"
            return lambda: self.reporter.failed("storage_full", message)
        except TokenloomError as error:
            self._withdraw()
            message = str(error)
            return lambda: self.reporter.failed("training_failed", message)
        except Exception:
            logger.exception("job %s failed", self.job.id)
            self._withdraw()
            return lambda: self.reporter.failed(
                "server_error", "the trainer failed; the server's log tells why"
            )

    def _withdraw(self) -> None:
        """Take the trainer away from the engine."""
        trainer = self.trainer
        if trainer is not None:
            self.engine.run(lambda: self._remove(trainer))

    def _remove(self, trainer: StepTrainer) -> None:
        self.engine.engine.coserver.settle()
        trainer.stop()
        self.engine.engine.coserver.remove(trainer)

    def _train(self) -> Callable[[], None]:
        """Train to the end; from the newest checkpoint if another engine takes this one's place."""
        end = None
        while end is None:
            end = self._train_on(self.engine.engine)
        return end

    def _train_on(self, engine: Engine) -> Callable[[], None] | None:
        """How the run ends; None: the engine was given up."""
        self.product = self.make(engine, self.job)
        resume = latest_state(self.job.checkpoint_dir)
        if resume is not None:
            self.reporter.message("info", f"Going on after step {resume.progress['step']}")
        trainer = self.trainer = self.product.trainer(self, resume)
        if trainer.complete:
            return self._succeed(trainer.snapshot())
        self.engine.run(lambda: self._begin(trainer))
        while True:
            try:
                event = self.events.get(timeout=ENGINE_CHECK_S)
            except queue.Empty:
                if self.engine.failed:
                    return self.reporter.paused  # for the process that comes after this one
                if self.engine.engine is not engine:
                    return None
                continue
            end = self._handle(event)
            if end is not None:
                return end
            if isinstance(event, _Checkpoint | _Save):
                del event  # a snapshot is several times the size of an adapter
                give_back()

    def _begin(self, trainer: StepTrainer) -> None:
        """On the engine's thread: join the jobs that train, and see to it that latencies can be foretold."""
        engine = self.engine.engine
        if trainer.engine is not engine:
            return  # another engine has taken its place
        coserver = engine.coserver
        if coserver.mode == "coserve" and coserver.latency is None and coserver.profiler is None:
            coserver.latency = stored_profile(engine, self.home)
            if coserver.latency is None:
                adapter = new_adapter(engine, trainer.hyper, self.job.seed)
                coserver.profiler = EngineProfiler(engine, adapter, trainer.hyper, self.home)
        coserver.add(trainer)

    def _handle(self, event: _Event) -> Callable[[], None] | None:
        """Write down what happened; the last event returns how the run ends."""
        if isinstance(event, _Step):
            assert self.trainer is not None
            progress = event.progress
            metrics = {**event.metrics, "total_steps": self.trainer.total_steps}
            self._persist(
                lambda: self.reporter.step(progress.step, metrics, progress.trained_tokens, event.eta_s)
            )
        elif isinstance(event, _Checkpoint):
            self._keep(event.snapshot, event.metrics)
        elif isinstance(event, _Save):
            save_state(self.job.checkpoint_dir, event.snapshot)
        elif isinstance(event, _Finished):
            return self._succeed(event.snapshot)
        elif isinstance(event, _Failed):
            return self._fail(event)
        elif isinstance(event, _Stop):
            trainer, how = self.trainer, event.how
            assert trainer is not None
            self.engine.run(lambda: self._stop(trainer, how))
        else:
            if event.how == "paused":
                save_state(self.job.checkpoint_dir, event.snapshot)
                return self.reporter.paused
            return self.reporter.cancelled
        return None

    def _stop(self, trainer: StepTrainer, how: Literal["paused", "cancelled"]) -> None:
        """On the engine's thread."""
        self.engine.engine.coserver.settle()
        snapshot = trainer.stop()
        self.engine.engine.coserver.remove(trainer)
        self.events.put(_Stopped(how, snapshot))

    def _keep(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        assert self.product is not None
        step = snapshot.progress["step"]
        folder = self.job.directory / "adapters" / f"step-{step}"
        # The adapter first: a state without its checkpoint would never be reported.
        if self.product.checkpoint(snapshot, folder):
            self._persist(lambda: self.reporter.checkpoint(step, folder, metrics))
        save_state(self.job.checkpoint_dir, snapshot)
        self.last_checkpoint = f"; the checkpoint of step {step} is kept"

    def _succeed(self, snapshot: Snapshot) -> Callable[[], None]:
        assert self.product is not None
        folder = self.job.directory / "adapter"
        made = folder if self.product.finish(snapshot, folder) else None
        tokens = snapshot.progress["trained_tokens"]
        self._withdraw()
        return lambda: self.reporter.succeeded(made, tokens)

    def _fail(self, failed: _Failed) -> Callable[[], None]:
        error = failed.error
        if isinstance(error, TrainingDiverged):
            code, message = "training_diverged", f"{error}{self.last_checkpoint}"
        elif isinstance(error, MemoryError):
            code, message = "out_of_memory", str(error)
        else:
            raise error
        return lambda: self.reporter.failed(code, message)

    def _persist(self, write: Callable[[], object]) -> None:
        """Try a few times: the disk may be full for a moment only."""
        for attempt in range(RETRIES):
            try:
                write()
                return
            except StorageFullError:
                if attempt == RETRIES - 1:
                    raise
                threading.Event().wait(RETRY_S)


def _reason(error: BaseException) -> str:
    """The system's words without a path of this machine."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "no space"
