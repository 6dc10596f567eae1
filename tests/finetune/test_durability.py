"""Killed at any instant, the store loses nothing that it acknowledged, and shows nothing half there."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import time
from collections import defaultdict
from pathlib import Path

import crash_worker
import pytest

import forks
from finetune_fakes import names_below
from tokenloom.finetune.errors import NotFoundError
from tokenloom.finetune.store import Store

KILLS = 20
ACTS = {"file", "deleted", "job", "step", "checkpoint", "done"}


def test_kill_9_at_random_instants(tmp_path: Path) -> None:
    home, notes = tmp_path / "home", tmp_path / "notes"
    source = random.Random(time.time_ns())
    processes = forks.context()
    for seed in range(5 * KILLS):
        # On a busy machine a worker gets less far: more of them then, until every act was seen.
        if seed >= KILLS and _acts(notes) >= ACTS:
            break
        before = notes.stat().st_size if notes.exists() else 0
        process = processes.Process(target=crash_worker.work, args=(str(home), str(notes), seed))
        process.start()
        # Half of the kills fall into the opening of the store and the first writes, half into full work.
        if seed % 2:
            while not notes.exists() or notes.stat().st_size == before:
                assert process.is_alive()
                time.sleep(0.002)
        time.sleep(source.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -9
        store = Store(home)
        try:
            check(store, home, notes)
        finally:
            store.close()
    assert _acts(notes) >= ACTS


def _acts(notes: Path) -> set[str]:
    return {json.loads(line)["act"] for line in notes.read_text().splitlines()}


def check(store: Store, home: Path, notes: Path) -> None:
    lines = notes.read_text().splitlines() if notes.exists() else []
    told = defaultdict(list)
    for line in lines:
        note = json.loads(line)
        told[note["act"]].append(note)
    live = {record.id: record for record in store.files.list_files(after=None, limit=100_000).data}
    assert names_below(home / "files") == set(live)
    for record in live.values():
        data = record.path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.bytes, record.sha256)
    deleting = {note["id"] for note in told["deleting"]}
    for note in told["file"]:
        if note["id"] not in deleting:
            assert live[note["id"]].sha256 == note["sha256"]
    for note in told["deleted"]:
        with pytest.raises(NotFoundError):
            store.files.get(note["id"])
    jobs = {job.id: job for job in store.jobs.list_jobs(limit=100_000).data}
    for note in told["job"]:
        assert jobs[note["id"]].training_file == note["file"]
    for note in told["done"]:
        assert jobs[note["id"]].status == "succeeded"
    for job in jobs.values():
        assert job.training_file in live and job.metadata == {"a": "b"}
        assert job.status in ("validating_files", "queued", "succeeded")
        steps = [data["step"] for data in store.log.metrics(job.id)]
        assert steps == list(range(1, len(steps) + 1))
        assert steps[-1:] >= [note["step"] for note in told["step"] if note["id"] == job.id][-1:]
        names = {mark.name for mark in store.log.list_checkpoints(job.id, after=None, limit=100).data}
        assert names >= {note["name"] for note in told["checkpoint"] if note["id"] == job.id}
        if job.status == "succeeded":
            assert (job.fine_tuned_model, job.trained_tokens) == (job.name, 9)
            assert live[job.result_files[0]].path.read_text().count("\n") == 1 + len(steps)
        else:
            assert job.fine_tuned_model is None and not job.result_files
    with sqlite3.connect(home / "jobs.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
