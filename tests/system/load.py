"""More connections than the server takes: it refuses what it must, as documented, and serves the rest.

python tests/system/load.py --connections 200 --seconds 60 --json load.json

First as many connections as sequences may run ask without a pause: the server is busy, nobody is refused.
Then `--connections` of them do, far more than may run and wait. Each refused one waits as long as
`Retry-After` says. The run passes if

- every answer is 200 and complete, or 429 or 503 with `Retry-After`; no connection is broken,
- some were refused, so that it was an overload, and every connection got an answer in the end,
- tokens of admitted requests came no more than `--slower` times later than without the overload (the 95th
  percentile of the times between two tokens).

Exit status 0 if so, else 1. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from soak import report

from questions import MODEL
from server_process import ServerProcess

RUNNING = 8
SETTINGS = [
    "cache.kv_bytes=268435456",
    f"scheduler.max_running={RUNNING}",
    "scheduler.max_waiting=24",
    "limits.max_concurrent=128",
    "coserve.mode=off",
]
DOCUMENTED = {429, 503}


@dataclass
class Result:
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    unanswered: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def table(self) -> dict[str, Any]:
        return {
            "answers by status": dict(self.statuses),
            "connections without an answer": self.unanswered,
            "TTFT ms p50, p95": [_ms(self.ttft_s, 50), _ms(self.ttft_s, 95)],
            "between tokens ms p50, p95, p99": [_ms(self.gaps_s, p) for p in (50, 95, 99)],
            "faults": self.faults[:20],
        }


async def connection(url: str, number: int, end_s: float, result: Result) -> None:
    """Ask again and again; the last answer is waited for."""
    answered = False
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < end_s or not answered:
            if time.monotonic() > end_s + 120:
                break
            try:
                answered = await one_request(client, number, result) or answered
            except httpx.TransportError as error:
                result.faults.append(repr(error))
                return
    result.unanswered += not answered


async def one_request(client: httpx.AsyncClient, number: int, result: Result) -> bool:
    """Whether it was answered."""
    body = {
        "model": MODEL,
        "prompt": f"Sailor number {number} looks at the sea and says",
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began, last, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        result.statuses[response.status_code] += 1
        if response.status_code != 200:
            text, wait = (
                (await response.aread()).decode(errors="replace"),
                response.headers.get("retry-after"),
            )
            if response.status_code not in DOCUMENTED or wait is None or "error" not in json.loads(text):
                result.faults.append(f"{response.status_code}: {text[:200]}")
            await asyncio.sleep(float(wait or 1))
            return False
        done = False
        async for line in response.aiter_lines():
            if not line:
                continue
            done = line == "data: [DONE]"
            if '"error"' in line:
                result.faults.append(line[:200])
            if done or not json.loads(line.removeprefix("data: "))["choices"][0]["text"]:
                continue
            now = time.monotonic()
            if tokens:
                result.gaps_s.append(now - last)
            else:
                result.ttft_s.append(now - began)
            last, tokens = now, tokens + 1
        if not done:
            result.faults.append(f"a stream ended after {tokens} tokens without [DONE]")
    return True


async def phase(url: str, connections: int, seconds: float) -> Result:
    result, end_s = Result(), time.monotonic() + seconds
    await asyncio.gather(*(connection(url, number, end_s, result) for number in range(connections)))
    return result


def _ms(values: list[float], percent: int) -> float | None:
    if len(values) < 2:
        return None
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1] * 1e3, 1)


def run(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    server.start()
    asyncio.run(phase(server.url, RUNNING, min(5.0, options.seconds)))  # the first passes are slow
    busy = asyncio.run(phase(server.url, RUNNING, options.seconds))
    overload = asyncio.run(phase(server.url, options.connections, options.seconds))
    after = server.metrics()
    exit_status = server.stop()
    calm, pressed = _ms(busy.gaps_s, 95), _ms(overload.gaps_s, 95)
    slower = pressed / calm if calm and pressed else float("inf")
    refused = sum(overload.statuses[status] for status in DOCUMENTED)
    checks = {
        "nothing but 200, 429 and 503 with Retry-After": not busy.faults and not overload.faults,
        "nobody was refused before": set(busy.statuses) == {200},
        "it was an overload": refused > 0 or options.connections <= RUNNING,
        "every connection got an answer": not overload.unanswered,
        "admitted requests kept their latency": slower <= options.slower,
        "no block leaked": after["kv_cache_usage_perc"] == 0,
        "it ended on SIGTERM": exit_status == 0,
        "no error in its log": not server.errors(),
    }
    return {
        "passed": all(checks.values()),
        "checks": checks,
        "connections": options.connections,
        "seconds": options.seconds,
        f"busy, {RUNNING} connections": busy.table(),
        f"overload, {options.connections} connections": overload.table(),
        "between tokens, p95, overload over busy": round(slower, 2),
        "errors in the log": server.errors()[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slower", type=float, default=2.0)
    parser.add_argument("--set", action="append", default=[], help="a setting of the server, key=value")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenloom-load-") as folder:
        server = ServerProcess(Path(folder), SETTINGS + options.set)
        try:
            result = run(server, options)
        finally:
            server.kill()
    report(result, options.json)


if __name__ == "__main__":
    main()
