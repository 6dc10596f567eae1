"""Killed at any instant, a batch goes on: no line is lost, none that was kept is asked or answered again."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import batch_crash_worker

import forks
from tokenloom.finetune.principal import Principal
from tokenloom.finetune.store import Store
from tokenloom.serve.batches.protocol import CreateBatch
from tokenloom.serve.batches.store import BatchStore

LINES = 120
LEAST_KILLS = 8
OWNER = Principal("api-2", False)


def test_kill_9_at_random_instants(tmp_path: Path) -> None:
    home, notes = tmp_path / "home", tmp_path / "notes"
    notes.touch()
    batch_id = _create(home)
    source = random.Random(time.time_ns())
    kills = 0
    while not any("over" in note for note in _read(notes)):
        before = notes.stat().st_size
        # The last of the first lives stops once it has kept something, for the next one to find.
        waits = kills == LEAST_KILLS - 1
        args = (str(home), str(notes), kills, waits)
        process = forks.context().Process(target=batch_crash_worker.work, args=args)
        process.start()
        # The first kills fall into full work, at most some lines after it begins.
        deadline = time.monotonic() + (source.uniform(0.0, 0.03) if kills < LEAST_KILLS else 0.3)
        while notes.stat().st_size == before or time.monotonic() < deadline or (waits and not _kept(notes)):
            assert process.is_alive()
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
        kills += 1
        _check_asked_once(notes)
    assert kills >= LEAST_KILLS
    _check_output(home, notes, batch_id)


def _create(home: Path) -> str:
    opened = Store(home)
    with opened.files.begin() as blob:
        for i in range(LINES):
            line = {
                "custom_id": f"r{i}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"name": f"r{i}"},
            }
            blob.write(json.dumps(line).encode() + b"\n")
        file = opened.files.add(blob, "input.jsonl", "batch", who=OWNER)
    request = CreateBatch(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = BatchStore(opened.database, opened.files).create(request, who=OWNER)
    opened.close()
    return batch.id


def _read(notes: Path) -> list[dict[str, str]]:
    # The last line may have been cut off.
    return [json.loads(line) for line in notes.read_text().splitlines() if line.endswith("}")]


def _kept(notes: Path) -> bool:
    return any("kept" in note for note in _read(notes))


def _check_asked_once(notes: Path) -> None:
    kept: set[str] = set()
    for note in _read(notes):
        assert note.get("asked") not in kept
        assert note.get("account", OWNER.account) == OWNER.account
        kept.add(note.get("kept", ""))


def _check_output(home: Path, notes: Path, batch_id: str) -> None:
    opened = Store(home)
    batch = BatchStore(opened.database, opened.files).get(batch_id)
    good, bad = (
        [json.loads(line) for line in opened.files.get(file_id).path.read_text().splitlines()]
        for file_id in (batch.output_file_id or "", batch.error_file_id or "")
    )
    opened.close()
    assert batch.status == "completed"
    assert (batch.counts.total, batch.counts.completed, batch.counts.failed) == (LINES, len(good), len(bad))
    assert [answer["custom_id"] for answer in good] == [f"r{i}" for i in range(LINES) if i % 10 != 7]
    assert [answer["custom_id"] for answer in bad] == [f"r{i}" for i in range(LINES) if i % 10 == 7]
    told = {note["kept"]: json.loads(note["answer"]) for note in _read(notes) if "kept" in note}
    answers = {answer["custom_id"]: answer for answer in good + bad}
    assert Counter(answers[name] == answer for name, answer in told.items()) == Counter({True: len(told)})
    assert len({answer["response"]["body"]["by"] for answer in answers.values()}) > 1
