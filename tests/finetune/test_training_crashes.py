"""A job whose process is killed at any instant goes on by itself, and ends with the same adapter."""

from __future__ import annotations

import json
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import training_crash_worker

import forks
from tiny_models import build_tiny
from tokenloom.finetune.store import Store

KILLS = 20
ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * 2}]}
    for word in ("tin", "other", "the", "an", "sea", "bed", "on", "fine", "ring", "is", "it", "there")
]
DATA = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_kill_9_at_random_instants_leaves_no_trace(tmp_path: Path) -> None:
    folder, _ = build_tiny(tmp_path, "llama", dtype=torch.float32)
    source = random.Random(time.time_ns())
    processes = forks.context()

    def start(home: Path, wait: bool = True) -> BaseProcess:
        started = tmp_path / "started"
        started.unlink(missing_ok=True)
        process = processes.Process(
            target=training_crash_worker.train, args=(str(folder), str(home), DATA, str(started))
        )
        process.start()
        while wait and not started.exists() and process.is_alive():
            time.sleep(0.005)
        return process

    undisturbed = start(tmp_path / "undisturbed")
    began = time.monotonic()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    whole_s = time.monotonic() - began
    wanted = finished(tmp_path / "undisturbed")
    kills = jobs = 0
    while kills < KILLS:
        home = tmp_path / f"killed-{jobs}"
        jobs += 1
        while True:
            # A few kills fall into the opening of the store and the loading of the job.
            process = start(home, wait=source.random() < 0.8)
            process.join(source.uniform(0, whole_s / 4) if kills < KILLS else None)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0
        assert finished(home) == wanted


def finished(home: Path) -> tuple[bytes, list[int], list[str]]:
    """The adapter's bytes, the steps that were reported, and the checkpoints that were kept."""
    store = Store(home)
    try:
        jobs = store.jobs.list_jobs().data
        assert len(jobs) == 1
        job = jobs[0]
        assert job.status == "succeeded" and job.adapter_path is not None, job.error
        metrics = store.log.metrics(job.id)
        checkpoints = store.log.list_checkpoints(job.id, after=None, limit=100).data
        return (
            (job.adapter_path / "adapter_model.safetensors").read_bytes(),
            [int(row["step"]) for row in metrics],
            [f"{checkpoint.step} {checkpoint.metrics['train_loss']:.6f}" for checkpoint in checkpoints],
        )
    finally:
        store.close()
