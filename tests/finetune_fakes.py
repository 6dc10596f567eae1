"""A tiny tokenizer, and a runner that pretends to train: for tests of everything around the trainer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tokenloom.finetune.records import JobRecord
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.service import TrainableModel
from tokenloom.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
DATA = (json.dumps(ROW) + "\n").encode() * 12


def tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), SPECIAL, {"default": template}, "tiny")


def trainable() -> dict[str, TrainableModel]:
    return {"tiny": TrainableModel(tokenizer(), 512)}


class FakeRunner:
    """Takes `steps` steps, each with a checkpoint, while `go` is set; goes on from where it was."""

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.go = threading.Event()
        self.go.set()
        self.started: list[str] = []
        self.running: set[str] = set()
        self.most_running = 0
        self._stop: dict[str, str] = {}
        self._threads: list[threading.Thread] = []

    def start(self, job: JobRecord, reporter: JobReporter) -> None:
        self.started.append(job.id)
        self.running.add(job.id)
        self.most_running = max(self.most_running, len(self.running))
        self._stop.pop(job.id, None)
        thread = threading.Thread(target=self._run, args=(job, reporter), daemon=True)
        self._threads.append(thread)
        thread.start()

    def pause(self, job_id: str) -> None:
        self._stop[job_id] = "paused"

    def cancel(self, job_id: str) -> None:
        self._stop[job_id] = "cancelled"

    def _run(self, job: JobRecord, reporter: JobReporter) -> None:
        done = max((int(path.name) for path in job.checkpoint_dir.iterdir()), default=0)
        for step in range(done + 1, self.steps + 1):
            while not self.go.wait(0.005) and job.id not in self._stop:
                continue
            if job.id in self._stop:
                self.running.discard(job.id)
                getattr(reporter, self._stop[job.id])()
                return
            metrics = {"train_loss": 1 / step, "train_mean_token_accuracy": 0.5}
            reporter.step(step, metrics, 10 * step, 2.0)
            (job.checkpoint_dir / str(step)).mkdir()
            reporter.checkpoint(step, job.checkpoint_dir / str(step), metrics)
        adapter = job.directory / "adapter"
        adapter.mkdir(exist_ok=True)
        self.running.discard(job.id)
        reporter.succeeded(adapter, 10 * self.steps)


def wait_until(done: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first true value of `done()`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = done()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("it did not happen in time")


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
