"""What it costs to be watched: tokens per second of running streams with 0, 1 and 32 listeners of /live.

    python benchmarks/live_feed.py                 # default model, about two minutes
    python benchmarks/live_feed.py --rounds 1 --seconds 2

A server of its own on 127.0.0.1 answers eight streams that never end. The settings take turns, round by
round, so that a slow moment of the machine meets them all; listeners are curl processes that throw away what
they get.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import httpx

STREAMS = 8
LISTENERS = (0, 1, 32)
SETTLE_S = 1.0


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """A server on a free port, with a home folder that is gone afterwards; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tokenloom", "serve", "--port", url.rpartition(":")[2]]
    command += ["--set", f"model.name={model}"] if model else []
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "TOKENLOOM_HOME": home}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_until_ready(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def stream(url: str, stop: threading.Event) -> None:
    """One stream after the other, as long as the context allows."""
    with httpx.Client(base_url=url, timeout=120) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "Once upon a time", "stream": True, "ignore_eos": True}
        while not stop.is_set():
            with http.stream("POST", "/v1/completions", json={**body, "max_tokens": 400}) as response:
                for _ in response.iter_raw():
                    if stop.is_set():
                        break


def generated(url: str) -> tuple[float, int]:
    """When, and how many tokens the server has generated since its start."""
    snapshot = httpx.get(f"{url}/live", params={"once": True}, timeout=60).json()
    return snapshot["at_s"], snapshot["totals"]["generation_tokens"]


def tokens_per_second(url: str, listeners: int, seconds: float) -> float:
    curl = ["curl", "-sN", "-o", os.devnull, f"{url}/live"]
    watching = [subprocess.Popen(curl) for _ in range(listeners)]
    try:
        time.sleep(SETTLE_S)
        began_s, before = generated(url)
        time.sleep(seconds)
        ended_s, after = generated(url)
    finally:
        for process in watching:
            process.terminate()
        for process in watching:
            process.wait(10)
    return (after - before) / (ended_s - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs to be watched.")
    parser.add_argument("--model", default="", help="name or path; empty: the default model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    asked = parser.parse_args()
    if shutil.which("curl") is None:
        raise SystemExit("no curl here: apt-get install curl")
    rates: dict[int, list[float]] = {count: [] for count in LISTENERS}
    stop = threading.Event()
    with serving(asked.model) as url:
        clients = [threading.Thread(target=stream, args=(url, stop)) for _ in range(STREAMS)]
        for client in clients:
            client.start()
        try:
            time.sleep(3 * SETTLE_S)
            for _ in range(asked.rounds):
                for count in LISTENERS:
                    rates[count].append(tokens_per_second(url, count, asked.seconds))
        finally:
            stop.set()
            for client in clients:
                client.join(60)
    alone = statistics.median(rates[0])
    print(f"{STREAMS} streams, median of {asked.rounds} rounds of {asked.seconds:g} s")
    for count, measured in rates.items():
        median = statistics.median(measured)
        print(f"{count:3} listeners: {median:7.1f} tokens/s, {median / alone:6.3f} of unwatched")


if __name__ == "__main__":
    main()
