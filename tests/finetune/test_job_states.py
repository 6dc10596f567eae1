"""Whatever is done to a job in whatever order, its states stay legal; a re-opened store shows the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from finetune_fakes import DATA
from tokenloom.finetune.errors import IllegalTransitionError
from tokenloom.finetune.hyperparameters import FinetuneOptions, resolve_hyperparameters
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.records import SOURCES, TERMINAL, JobError, Status
from tokenloom.finetune.store import Store

RESOLVED = resolve_hyperparameters(12, FinetuneOptions())


def has_lived(states: JobStates) -> bool:
    """Ends come late, so that there is something to end."""
    return states.events > 7


class JobStates(RuleBasedStateMachine):
    """A model of one job beside the real one."""

    @initialize(
        path=st.sampled_from([[], ["queued"], ["queued", "running"], ["queued", "running", "paused"]])
    )
    def begin(self, path: list[Status]) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.store = Store(self.home)
        with self.store.files.begin() as blob:
            blob.write(DATA)
            file = self.store.files.add(blob, "train.jsonl", "fine-tune")
        request = parse_job({"model": "tiny", "training_file": file.id})
        self.id = self.store.jobs.create(request).id
        self.status: Status = "validating_files"
        self.events = 1
        self.steps: dict[int, float] = {}
        self.checkpoints: set[int] = set()
        for state in path:
            self.move(state)

    @rule(state=st.sampled_from(["queued", "running", "paused"]))
    def move(self, state: Status) -> None:
        self._expect(state, lambda: self.store.jobs.move(self.id, state, "moved"), 1)

    @rule()
    def resolve(self) -> None:
        self._expect("queued", lambda: self.store.jobs.resolve(self.id, RESOLVED, ["beware"]), 2)

    @precondition(has_lived)
    @rule()
    def cancel(self) -> None:
        self.move("cancelled")

    @precondition(has_lived)
    @rule()
    def fail(self) -> None:
        error = JobError("nan_loss", "the loss is NaN", None)
        self._expect("failed", lambda: self.store.jobs.fail(self.id, error), 1)

    @precondition(has_lived)
    @rule()
    def succeed(self) -> None:
        def call() -> None:
            with self.store.files.begin() as results:
                self.store.jobs.succeed(self.id, self.home / "jobs" / self.id / "adapter", 5, results)

        self._expect("succeeded", call, 2)

    @rule(step=st.integers(1, 3), loss=st.floats(0, 9))
    def step(self, step: int, loss: float) -> None:
        self.store.log.add_metrics(self.id, step, "step", {"step": step, "train_loss": loss}, step, None)
        self.events += step not in self.steps
        self.steps[step] = loss

    @rule(step=st.integers(1, 3))
    def checkpoint(self, step: int) -> None:
        path = self.store.jobs.get(self.id).checkpoint_dir / str(step)
        name = self.store.log.add_checkpoint(self.id, step, path, {"step": step})
        assert name == f"{self.store.jobs.get(self.id).name}:ckpt-step-{step}"
        self.events += step not in self.checkpoints
        self.checkpoints.add(step)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.home)
        if self.status == "running":
            self.status = "queued"
            self.events += 1

    def _expect(self, target: Status, call: Callable[[], object], events: int) -> None:
        if self.status in SOURCES[target]:
            call()
            self.status = target
            self.events += events
        else:
            with pytest.raises(IllegalTransitionError, match=f"is {self.status} and cannot become {target}"):
                call()

    @invariant()
    def the_store_agrees(self) -> None:
        job = self.store.jobs.get(self.id)
        assert job.status == self.status
        assert (job.finished_at is not None) == (self.status in TERMINAL)
        assert (job.error is not None) == (self.status == "failed")
        assert (job.fine_tuned_model is not None) == (self.status == "succeeded") == bool(job.result_files)
        assert len(self.store.log.list_events(self.id, after=None, limit=1000).data) == self.events
        assert [data["train_loss"] for data in self.store.log.metrics(self.id)] == [
            self.steps[step] for step in sorted(self.steps)
        ]
        known = self.store.log.list_checkpoints(self.id, after=None, limit=10).data
        assert {checkpoint.step for checkpoint in known} == self.checkpoints
        on_disk = {path.name for path in (self.home / "files").iterdir()}
        assert on_disk == {file.id for file in self.store.files.list_files(after=None, limit=10).data}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.home)


def test_states_stay_legal_whatever_happens() -> None:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=health)
    run_state_machine_as_test(JobStates, settings=limits)


def test_terminal_states_are_ends() -> None:
    assert not any(TERMINAL & sources for sources in SOURCES.values())
