"""kill -9 under load, again and again: what the server has acknowledged is there when it is back.

python tests/system/kill9.py --times 20 --json kill9.json

While files are uploaded, a job trains, a batch runs (where the server has `/v1/batches`) and chats stream,
the server is killed a random time after a training step, and started again on the same home folder. The run
passes if

- every file whose upload was answered is there, byte for byte,
- every training step that was told of is still told of, with the same loss, and the job goes on,
- no line of a batch that was counted as completed is lost, and each line is answered exactly once,
- the server always comes back.

Exit status 0 if so, else 1. Loopback only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from soak import report

import training_job
from questions import MODEL
from server_process import ServerProcess

SETTINGS = ["cache.kv_bytes=268435456", "coserve.mode=temporal", "coserve.temporal_every=4"]
LOSS_TOLERANCE = 1e-3


@dataclass
class Acknowledged:
    """What the server has said so far."""

    files: dict[str, str] = field(default_factory=dict)
    """Digests by id."""
    steps: dict[int, float] = field(default_factory=dict)
    completed: int = 0
    lost: list[str] = field(default_factory=list)
    chats: int = 0


class Load:
    """What goes on until the server dies."""

    def __init__(self, url: str, job_id: str, batch_id: str | None, known: Acknowledged, seed: int) -> None:
        self.url, self.job_id, self.batch_id, self.known = url, job_id, batch_id, known
        self.draw = random.Random(seed)
        self.dead = threading.Event()
        works = [self._upload, self._watch_job, self._chat, self._chat]
        if batch_id is not None:
            works.append(self._watch_batch)
        self.threads = [threading.Thread(target=self._until_death, args=(work,)) for work in works]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        self.dead.set()
        for thread in self.threads:
            thread.join()

    def _until_death(self, work: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.dead.is_set():
                try:
                    work(client)
                except httpx.TransportError:
                    return

    def _upload(self, client: httpx.Client) -> None:
        content = training_job.rows(self.draw.randrange(1, 800), self.draw.randrange(10**6))
        file = training_job.upload(client, content, "upload.jsonl")
        self.known.files[file] = hashlib.sha256(content).hexdigest()
        self.dead.wait(0.05)

    def _watch_job(self, client: httpx.Client) -> None:
        self.known.steps.update(training_job.steps(client, self.job_id))
        self.dead.wait(0.1)

    def _watch_batch(self, client: httpx.Client) -> None:
        batch = client.get(f"/v1/batches/{self.batch_id}").json()
        self.known.completed = max(self.known.completed, batch["request_counts"]["completed"])
        self.dead.wait(0.1)

    def _chat(self, client: httpx.Client) -> None:
        messages = [{"role": "user", "content": f"Tell me of the sea, {self.draw.random()}."}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 24, "stream": True}
        client.post("/v1/chat/completions", json=body)
        self.known.chats += 1


def has_batches(client: httpx.Client) -> bool:
    return "/v1/batches" in client.get("/openapi.json").json()["paths"]


def create_batch(client: httpx.Client, count: int) -> str:
    lines = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": MODEL, "prompt": f"{i} sailors", "max_tokens": 16, "temperature": 0},
        }
        for i in range(count)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    files = {"file": ("batch.jsonl", content)}
    file = client.post("/v1/files", data={"purpose": "batch"}, files=files)
    file.raise_for_status()
    body = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    response = client.post("/v1/batches", json=body)
    response.raise_for_status()
    return str(response.json()["id"])


def check(
    client: httpx.Client, job_id: str, batch_id: str | None, known: Acknowledged, files: list[str]
) -> None:
    """Note in `known.lost` what is not there any more."""
    for file in files:
        response = client.get(f"/v1/files/{file}/content")
        if response.status_code != 200 or hashlib.sha256(response.content).hexdigest() != known.files[file]:
            known.lost.append(f"file {file}: {response.status_code}")
    steps = training_job.steps(client, job_id)
    for step, loss in known.steps.items():
        if step not in steps:
            known.lost.append(f"step {step}")
        elif abs(steps[step] - loss) > LOSS_TOLERANCE * abs(loss):
            known.lost.append(f"step {step}: its loss was {loss}, and is {steps[step]}")
    status = training_job.job(client, job_id)["status"]
    if status not in ("queued", "running", "succeeded"):
        known.lost.append(f"the job is {status}")
    if batch_id is not None:
        completed = client.get(f"/v1/batches/{batch_id}").json()["request_counts"]["completed"]
        if completed < known.completed:
            known.lost.append(f"batch: {known.completed} lines were completed, and {completed} are")


def finish_batch(client: httpx.Client, batch_id: str, known: Acknowledged, count: int) -> int:
    """Wait for the batch's end; how many lines it answered."""
    deadline = time.monotonic() + 900
    while True:
        batch = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            break
        if time.monotonic() > deadline:
            known.lost.append(f"the batch is still {batch['status']}")
            return 0
        time.sleep(0.5)
    text = ""
    if batch["output_file_id"] is not None:
        text = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    answered = [json.loads(line)["custom_id"] for line in text.splitlines()]
    if sorted(answered) != sorted(f"line-{i}" for i in range(count)):
        known.lost.append(f"the batch is {batch['status']}, with {len(set(answered))} of {count} lines")
    return len(answered)


def wait_for_step(known: Acknowledged, timeout_s: float = 30) -> None:
    """Until a step is told of that was not before, so that every life has one to lose; a life in which steps
    are only done again waits in vain."""
    before, deadline = len(known.steps), time.monotonic() + timeout_s
    while len(known.steps) == before and time.monotonic() < deadline:
        time.sleep(0.05)


def job_goes_on(client: httpx.Client, job_id: str, known: Acknowledged) -> bool:
    """Wait for a step that nobody has seen yet."""
    newest, deadline = max(known.steps, default=0), time.monotonic() + 300
    while time.monotonic() < deadline:
        known.steps.update(training_job.steps(client, job_id))
        if max(known.steps, default=0) > newest or training_job.job(client, job_id)["status"] == "succeeded":
            return True
        time.sleep(0.5)
    return False


def run(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    known, draw, starts = Acknowledged(), random.Random(options.seed), [server.start()]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        # Few steps between checkpoints: each life is short, and the job is to get on.
        file = training_job.upload(client, training_job.rows(64))
        job_id = training_job.create_job(client, file, epochs=50)
        batch_id = create_batch(client, options.batch_lines) if has_batches(client) else None
        for number in range(options.times):
            before = set(known.files)
            load = Load(server.url, job_id, batch_id, known, options.seed + number)
            wait_for_step(known)
            time.sleep(draw.uniform(0.2, options.longest))
            server.kill()
            load.end()
            starts.append(server.start())
            check(client, job_id, batch_id, known, sorted(set(known.files) - before))
            print(
                f"{number + 1}: {len(known.files)} files, {len(known.steps)} steps, {known.completed} lines",
                file=sys.stderr,
                flush=True,
            )
        goes_on = job_goes_on(client, job_id, known)
        answered: Any = "this server has no /v1/batches"
        if batch_id is not None:
            answered = finish_batch(client, batch_id, known, options.batch_lines)
        check(client, job_id, batch_id, known, sorted(known.files))
    exit_status = server.stop()
    checks = {
        "nothing acknowledged was lost": not known.lost,
        "there was something to lose": bool(known.files and known.steps and known.chats),
        "the job goes on": goes_on,
        "it ended on SIGTERM": exit_status == 0,
    }
    return {
        "passed": all(checks.values()),
        "checks": checks,
        "kills": options.times,
        "files": len(known.files),
        "steps": len(known.steps),
        "batch lines": answered,
        "chats": known.chats,
        "lost": known.lost[:50],
        "seconds to come back, longest": round(max(starts), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--longest", type=float, default=12, help="seconds of load before a kill, at most")
    parser.add_argument("--batch-lines", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="a setting of the server, key=value")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenloom-kill9-") as folder:
        server = ServerProcess(Path(folder), SETTINGS + options.set)
        try:
            result = run(server, options)
        except BaseException:
            print(server.log_tail(), file=sys.stderr)
            raise
        finally:
            server.kill()
    report(result, options.json)


if __name__ == "__main__":
    main()
