"""A process that trains the jobs of a home folder until they are done, or until it is killed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from tokenloom.config import load_settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.finetune.job_request import parse_job
from tokenloom.finetune.records import TERMINAL
from tokenloom.finetune.runner import EngineRunner
from tokenloom.finetune.service import JobService, TrainableModel
from tokenloom.finetune.store import Store

OPTIONS = {
    "hyperparameters": {"n_epochs": 6, "batch_size": 2},
    "lora": {"r": 4, "dropout": 0.1},
    "training": {"learning_rate": 0.02, "max_seq_tokens": 64, "checkpoint_every_steps": 3},
}


def train(model: str, home: str, data: bytes, started: str) -> None:
    """Go on with the one job of `home`, which is made if there is none."""
    torch.set_num_threads(1)
    settings = {"model.name": model, "model.dtype": "float32", "cache.kv_bytes": 4 * 2**20}
    engine = AsyncEngine(Engine(load_settings({**settings, "coserve.mode": "ft_only"})))
    store = Store(Path(home))
    models = {engine.model_name: TrainableModel(engine.tokenizer, engine.max_model_len)}
    service = JobService(store, EngineRunner(engine, Path(home)), models)
    if not store.jobs.list_jobs().data:
        file = service.create_file([data], "train.jsonl")
        request = {"model": engine.model_name, "training_file": file.id, "seed": 4, **OPTIONS}
        service.create_job(parse_job(request), idempotency_key="the only one")
    engine.start()
    service.start()
    job = store.jobs.list_jobs().data[0]
    Path(started).write_text("")
    while (job := store.jobs.get(job.id)).status not in TERMINAL:
        time.sleep(0.01)
    service.stop()
    engine.shutdown()
    store.close()
