"""Mixed clients, lost connections and a training job for a while; then nothing may be left, grown or wrong.

python tests/system/soak.py --minutes 30 --json soak.json

Two servers, half of the time each. Each question (`questions.py`) is first asked alone, on a server that does
nothing else. Then `--clients` ask them at random, streamed or not; a part of them close their connection in
mid-answer. A job trains beside them all the time. The run passes if

- every answer under load is the one that was given alone, token for token, whether there is room for all of
  them (`roomy`) or they are pressed for it (`pressed`: prefix cache, little memory, small iterations, so that
  prompts are computed in other pieces than alone, and answers are preempted and taken up again),
- nothing but what is documented was refused, and no stream broke off,
- afterwards the pool holds no block but those of the prefix cache, and nothing runs or waits,
- the server's memory grew by at most 2 % after the warm-up (the first third), in phases of ten minutes and
  more,
- it ends by itself on SIGTERM, and its log has no error.

Exit status 0 if so, else 1. Linux, loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import training_job
from questions import Answer, BrokeOff, Question, Refused, ask, questions, same, stream
from server_process import ServerProcess

COMMON = ["scheduler.max_running=16", "slo.tpot_ms=500", "slo.ttft_ms=5000"]
PHASES = {
    "roomy": ["cache.kv_bytes=1073741824", "cache.prefix_caching=false", "scheduler.max_batch_tokens=8192"],
    "pressed": ["cache.kv_bytes=150994944", "scheduler.max_batch_tokens=288"],
}
GROWTH, LEAST_MINUTES = 0.02, 10
SAMPLE_S = 2.0


@dataclass
class Tally:
    asked: Counter[str] = field(default_factory=Counter)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    aborted: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)

    def judge(self, number: int, question: Question, expected: Answer, got: Answer) -> None:
        gap = same(expected, got)
        if gap is None:
            self.right += 1
        else:
            method = question.body.get("kv") or question.body.get("draft") or ""
            self.wrong.append(f"question {number} ({question.kind} {method}): gap {gap:.4f}")


async def one_client(
    client: httpx.AsyncClient,
    seed: int,
    asked: list[Question],
    expected: list[Answer],
    tally: Tally,
    end_s: float,
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < end_s:
        number = draw.randrange(len(asked))
        question = asked[number]
        tally.asked[question.kind] += 1
        streams = question.kind != "embedding" and draw.random() < 0.6
        give_up_after = draw.randrange(1, 20) if streams and draw.random() < 0.35 else None
        try:
            if not streams:
                got = await ask(client, question)
            else:
                async for got in stream(client, question):
                    if give_up_after is not None and len(got.tokens) >= give_up_after:
                        break
            if streams and give_up_after is not None and got.finish_reason is None:
                tally.aborted += 1
            else:
                tally.judge(number, question, expected[number], got)
        except Refused as refused:
            tally.refused[refused.status] += 1
            await asyncio.sleep(float(refused.retry_after or 1))
        except (BrokeOff, httpx.TransportError) as error:
            tally.broken.append(f"question {number} ({question.kind}): {error!r}")
        await asyncio.sleep(draw.expovariate(4.0))


async def watch(server: ServerProcess, tally: Tally, end_s: float) -> None:
    began = time.monotonic()
    while time.monotonic() < end_s:
        tally.rss.append((time.monotonic() - began, server.rss_bytes()))
        await asyncio.sleep(SAMPLE_S)


async def load(
    server: ServerProcess,
    asked: list[Question],
    expected: list[Answer],
    tally: Tally,
    seconds: float,
    options: argparse.Namespace,
) -> None:
    end_s = time.monotonic() + seconds
    # One pool for each client: closing a stream must close a connection.
    clients = [httpx.AsyncClient(base_url=server.url, timeout=300) for _ in range(options.clients)]
    try:
        await asyncio.gather(
            watch(server, tally, end_s),
            *(
                one_client(client, options.seed + i, asked, expected, tally, end_s)
                for i, client in enumerate(clients)
            ),
        )
    finally:
        for client in clients:
            await client.aclose()


def start_training(client: httpx.Client) -> str:
    """A job that outlasts the run, after its first step: the machine's latency profile is done then."""
    job_id = training_job.create_job(client, training_job.upload(client, training_job.rows(400)), epochs=50)
    deadline = time.monotonic() + 900
    while not training_job.steps(client, job_id):
        status = training_job.job(client, job_id)
        if status["status"] == "failed" or time.monotonic() > deadline:
            raise SystemExit(f"the job does not train: {status['status']}, {status['error']}")
        time.sleep(1)
    return job_id


def wait_idle(server: ServerProcess, timeout_s: float = 60) -> dict[str, float]:
    """The metrics, once nothing runs, waits or trains any more (or the time is up)."""
    deadline = time.monotonic() + timeout_s
    while True:
        now = server.metrics()
        busy = now["num_requests_running"] + now["num_requests_waiting"] + now["finetune_jobs_running"]
        if not busy or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


def growth(samples: list[tuple[float, int]]) -> float:
    """Of memory from the end of the warm-up (a third) to the last tenth: medians of a tenth each."""
    values = [size for _, size in samples]
    tenth = max(1, len(values) // 10)
    start = len(values) // 3
    return statistics.median(values[-tenth:]) / statistics.median(values[start : start + tenth]) - 1


def phase(server: ServerProcess, minutes: float, options: argparse.Namespace) -> dict[str, Any]:
    tally, asked = Tally(), questions()[:: options.every]
    server.start()

    async def reference() -> list[Answer]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            return [await ask(client, question) for question in asked]

    print(f"asking {len(asked)} questions alone", file=sys.stderr, flush=True)
    expected = asyncio.run(reference())
    with httpx.Client(base_url=server.url, timeout=120) as client:
        job_id = start_training(client)
        print(f"{minutes:g} minutes with {options.clients} clients", file=sys.stderr, flush=True)
        asyncio.run(load(server, asked, expected, tally, minutes * 60, options))
        steps, status = len(training_job.steps(client, job_id)), training_job.job(client, job_id)["status"]
        client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    idle = wait_idle(server)
    for number, got in enumerate(asyncio.run(reference())):
        tally.judge(number, asked[number], expected[number], got)
    after = wait_idle(server)
    exit_status = server.stop()
    grown = growth(tally.rss)
    checks = {
        "answers as given alone": not tally.wrong and tally.right > 0,
        "no stream broke off": not tally.broken,
        "only documented refusals": set(tally.refused) <= {429, 503},
        "connections were lost": tally.aborted > 0,
        "no block leaked": all(
            found["kv_blocks_free"] == found["kv_blocks"] - found["kv_blocks_cached"]
            for found in (idle, after)
        ),
        "memory is flat": grown <= GROWTH or minutes < LEAST_MINUTES,
        "training went on": steps > 1 and status in ("running", "succeeded"),
        "it ended on SIGTERM": exit_status == 0,
        "no error in its log": not server.errors(),
    }
    return {
        "checks": checks,
        "asked": dict(tally.asked),
        "right": tally.right,
        "wrong": tally.wrong[:50],
        "closed in mid-answer": tally.aborted,
        "refused": dict(tally.refused),
        "broken off": tally.broken[:50],
        "training steps": steps,
        "preemptions": after["num_preemptions_total"],
        "training passes that gave way": after["finetune_restarts_total"],
        "engine restarts": after["engine_restarts_total"],
        "blocks: all, cached, free": [
            after[name] for name in ("kv_blocks", "kv_blocks_cached", "kv_blocks_free")
        ],
        "memory MB": [round(size / 1e6) for _, size in tally.rss[:: max(1, len(tally.rss) // 12)]],
        "memory growth": round(grown, 4),
        "exit status": exit_status,
        "errors in the log": server.errors()[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="of the questions, one in so many")
    parser.add_argument("--phase", choices=list(PHASES), help="this one alone, for all of the time")
    parser.add_argument("--set", action="append", default=[], help="a setting of the servers, key=value")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    names = [options.phase] if options.phase else list(PHASES)
    result: dict[str, Any] = {"passed": True, "minutes": options.minutes, "clients": options.clients}
    with tempfile.TemporaryDirectory(prefix="tokenloom-soak-") as folder:
        training_job.write_adapter(Path(folder))
        for name in names:
            server = ServerProcess(Path(folder), COMMON + PHASES[name] + options.set)
            try:
                result[name] = phase(server, options.minutes / len(names), options)
            except BaseException:
                print(server.log_tail(), file=sys.stderr)
                raise
            finally:
                server.kill()
            result["passed"] = result["passed"] and all(result[name]["checks"].values())
            for key, part in result[name].items():
                print(f"| {name}: {key} | {json.dumps(part)} |", flush=True)
    report({**result, **dict.fromkeys(names, "above")}, options.json, result)


def report(shown: dict[str, Any], path: Path | None, result: dict[str, Any] | None = None) -> None:
    """A table of what is `shown`, the JSON of the `result`, by default the same, and the exit status."""
    result = result or shown
    for name, value in shown.items():
        print(f"| {name} | {json.dumps(value)} |")
    if path is not None:
        path.write_text(json.dumps(result, indent=1))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
