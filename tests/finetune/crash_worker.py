"""A process that uses the store until it is killed, and writes down what it was told is done."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

from tokenloom.finetune.hyperparameters import FinetuneOptions, resolve_hyperparameters
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.reporter import JobReporter
from tokenloom.finetune.store import Store

OPTIONS = {"training": {"save_total_limit": 1000}}
RESOLVED = resolve_hyperparameters(100, FinetuneOptions.model_validate(OPTIONS))


def work(home: str, notes: str, seed: int) -> None:
    """Upload, delete, create and train without end; each acknowledged act becomes a line of `notes`."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(**what: Any) -> None:
        os.write(descriptor, (json.dumps(what) + "\n").encode())

    source = random.Random(seed)
    store = Store(Path(home))
    while True:
        file_id = upload(store, source, note)
        if source.random() < 0.5:
            store.files.delete(upload(store, source, lambda **_: None))
        if source.random() < 0.3:
            note(act="deleting", id=file_id)
            store.files.delete(file_id)
            note(act="deleted", id=file_id)
            continue
        job = store.jobs.create(
            parse_job({"model": "tiny", "training_file": file_id, "metadata": {"a": "b"}})
        )
        note(act="job", id=job.id, file=file_id)
        job = store.jobs.resolve(job.id, RESOLVED, [])
        store.jobs.move(job.id, "running", "go")
        reporter = JobReporter(store, job, lambda: None)
        for step in range(1, source.randint(2, 6)):
            reporter.step(step, {"train_loss": 1 / step}, step, 1.0)
            note(act="step", id=job.id, step=step)
            name = reporter.checkpoint(step, job.checkpoint_dir / str(step), {})
            note(act="checkpoint", id=job.id, name=name)
        reporter.succeeded(job.directory / "adapter", 9)
        note(act="done", id=job.id)


def upload(store: Store, source: random.Random, note: Any) -> str:
    data = source.randbytes(source.randint(1, 400_000))
    with store.files.begin() as blob:
        for start in range(0, len(data), 50_000):
            blob.write(data[start : start + 50_000])
        record = store.files.add(blob, "train.jsonl", "fine-tune")
    note(act="file", id=record.id, sha256=hashlib.sha256(data).hexdigest())
    return record.id
