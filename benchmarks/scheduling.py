"""Mean completion time of a heavy-tailed trace under `fcfs` and `mlfq`, on the default model.

    python benchmarks/scheduling.py [--requests 40] [--running 4] [--load 0.9] [--rounds 3] [--seed 0]
        [--json results.json]

Arrivals are random (exponential gaps), answers too: most are short, few very long (Pareto, capped). One
trace for both; the policies alternate, round by round. The rate is `--load` of what the machine does: a first
run without gaps measures that. Reported are medians over the rounds of the mean, the median and the 95th
percentile of the time from arrival to the last token, and of the mean time to the first token.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import mean, median, quantiles

from rich.console import Console
from rich.table import Table

from tokenloom.bench.throughput import Prompts
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams

POLICIES = ("fcfs", "mlfq")
Trace = list[tuple[float, list[int], int]]
"""Seconds from the start, prompt, tokens of the answer."""


def draw(count: int, vocab: int, seed: int) -> Trace:
    """A trace whose gaps are 1 s in the mean."""
    source, prompts, at, trace = random.Random(seed), Prompts(vocab), 0.0, []
    for _ in range(count):
        at += source.expovariate(1.0)
        answer = min(400, int(6 * source.paretovariate(1.1)))
        trace.append((at, prompts.next(min(600, int(24 * source.paretovariate(1.3)))), answer))
    return trace


def serve(engine: Engine, trace: Trace, gap_s: float) -> dict[str, float]:
    """Serve a trace whose gaps are so long in the mean; seconds."""
    pending = [
        (at * gap_s, Request(f"{i}", prompt, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)))
        for i, (at, prompt, n) in enumerate(trace)
    ]
    requests = [request for _, request in pending]
    done: dict[str, float] = {}
    start = time.monotonic()
    while pending or engine.has_work:
        now = time.monotonic() - start
        while pending and pending[0][0] <= now:
            at, request = pending.pop(0)
            request.arrival_s = start + at
            engine.add(request)
        if not engine.has_work:
            time.sleep(max(0.0, pending[0][0] - now))
            continue
        for output in engine.step():
            if output.finished:
                done[output.request_id] = time.monotonic()
    times = [done[r.request_id] - r.arrival_s for r in requests]
    first = [(r.first_token_s or 0.0) - r.arrival_s for r in requests]
    return {
        "mean_s": mean(times),
        "median_s": median(times),
        "p95_s": quantiles(times, n=20)[-1],
        "ttft_s": mean(first),
        "makespan_s": max(done.values()) - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--running", type=int, default=4, help="scheduler.max_running")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys = {"scheduler.max_running": args.running, "cache.prefix_caching": False, "cache.kv_bytes": 2**29}
    engines = {p: Engine(load_settings({**keys, "scheduler.policy": p})) for p in POLICIES}
    trace = draw(args.requests, engines["fcfs"].config.vocab_size, args.seed)
    for engine in engines.values():
        serve(engine, trace[:2], 0.0)
    busy_s = serve(engines["fcfs"], trace, 0.0)["makespan_s"]
    gap_s = busy_s / args.requests / args.load
    runs: dict[str, list[dict[str, float]]] = {p: [] for p in POLICIES}
    for _ in range(args.rounds):
        for policy, engine in engines.items():
            runs[policy].append(serve(engine, trace, gap_s))
    table = Table(title=f"{args.requests} requests, {args.running} at a time, load {args.load}: seconds")
    columns = ("mean_s", "median_s", "p95_s", "ttft_s")
    for name in ("policy", "mean", "median", "95th percentile", "first token, mean"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    medians = {p: {c: median(r[c] for r in runs[p]) for c in columns} for p in POLICIES}
    for policy in POLICIES:
        table.add_row(policy, *(f"{medians[policy][c]:.2f}" for c in columns))
    console = Console()
    console.print(table)
    console.print(f"mlfq / fcfs: {medians['mlfq']['mean_s'] / medians['fcfs']['mean_s']:.2f} of the mean")
    if args.json is not None:
        options = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "gap_s": gap_s, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
