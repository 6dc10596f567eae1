"""Co-serving beside its rivals on one seeded, bursty trace (FlexLLM, arXiv 2402.18789, section 8).

    python benchmarks/coserve.py [--seconds 60] [--loads 0.05,0.2,0.4,0.6,0.8] [--repeats 2] [--tpot-ms 50]

Each run is a process of its own on the default model: requests with Gamma inter-arrival times (CV 2) and
lognormal lengths, and a LoRA job (r=16, all linears, sequences of 512 tokens of real text) that never ends. A
load of 1 is the rate at which this machine can just answer such requests when nothing trains; it is measured
first, as are the unloaded time per token and the latency profile. Each load is run with several traces, all
modes by turns on each, because machines have slow spells; the requests of one mode are taken together.

Reported per mode and load: share of requests that attained both targets (TTFT, and TPOT, by default 3 x the
unloaded median), p50 and p99 of TTFT and of the gap between tokens, finetuning tokens/s (each token once,
half of it for its forward and half for its backward work) and output tokens/s. "separate p" emulates two
clusters by the authors' own scaling: a share p of the machines serves at rate / p, the rest trains alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from coserve_report import HEADER, plot, show, verdict

MODEL = "smollm2-135m-instruct"
MODES = ("off", "coserve", "temporal", "dynamic_temporal", "spatial")
LIGHT = 0.1
"""Below this load runs take twice as long, or there would be too few requests."""
CV = 2.0
PROMPT_MEAN, OUTPUT_MEAN, SIGMA = 96, 48, 0.6
WARMUP_S, DRAIN_S = 5.0, 20.0
TRAIN_TOKENS = 512
UNLIMITED_MS = 1e9  # while the target is not known yet
NEVER_MS = 1e9


@dataclass
class Arrival:
    """One request of the trace."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    first_s: float = 0.0
    token_s: list[float] = field(default_factory=list)


def trace(rate: float, seconds: float, vocab: int, seed: int = 1) -> list[Arrival]:
    """The same requests at any rate: only the times are stretched. The first comes at once."""
    source = random.Random(seed)
    shape = 1 / CV**2
    arrivals: list[Arrival] = []
    at = 0.0
    while True:
        if arrivals:
            at += source.gammavariate(shape, 1 / (shape * rate))
        prompt, output = (
            max(4, min(8 * mean, round(source.lognormvariate(0, SIGMA) * mean)))
            for mean in (PROMPT_MEAN, OUTPUT_MEAN)
        )
        tokens = [source.randrange(vocab) for _ in range(prompt)]
        if at > seconds:
            return arrivals
        arrivals.append(Arrival(at, tokens, output))


def new_engine(mode: str, args: argparse.Namespace) -> Any:
    from tokenloom.config import load_settings
    from tokenloom.engine.engine import Engine

    flags = {
        "model.name": MODEL,
        "coserve.mode": mode,
        "coserve.temporal_every": args.temporal_every,
        "slo.tpot_ms": args.tpot_ms or UNLIMITED_MS,
        "slo.ttft_ms": args.ttft_ms,
        "scheduler.max_batch_tokens": args.max_batch_tokens,
        "cache.prefix_caching": False,
    }
    return Engine(load_settings(flags))


def new_trainer(engine: Any) -> Any:
    from finetune_vs_peft import tokens_of

    from tokenloom.finetune.data import Sample
    from tokenloom.finetune.hyperparameters import FinetuneOptions, resolve_hyperparameters
    from tokenloom.finetune.local import new_adapter
    from tokenloom.finetune.objective import SupervisedFinetuning
    from tokenloom.finetune.trainer import Trainer

    samples = [Sample(ids, [0.0] + [1.0] * (TRAIN_TOKENS - 1)) for ids in tokens_of(TRAIN_TOKENS, 64)]
    options = {
        "hyperparameters": {"n_epochs": 50, "batch_size": 1},
        "training": {"max_seq_tokens": TRAIN_TOKENS, "checkpoint_every_steps": 10**6},
    }
    hyper = resolve_hyperparameters(len(samples), FinetuneOptions.model_validate(options))
    adapter = new_adapter(engine, hyper, seed=1)
    return Trainer(
        engine,
        adapter,
        samples,
        hyper,
        SupervisedFinetuning(),
        Ignore(),
        seed=1,
    )


class Ignore:
    """A listener that keeps nothing."""

    def step(self, progress: Any, metrics: Any, eta_s: Any) -> None:
        self.last = metrics

    def checkpoint(self, snapshot: Any, metrics: Any) -> None:
        self.last = metrics

    def save(self, snapshot: Any) -> None:
        self.saved = True

    def finished(self, snapshot: Any) -> None:
        raise RuntimeError("the job should not end within a run")

    def failed(self, error: BaseException, step: int) -> None:
        raise error


def replay(args: argparse.Namespace) -> dict[str, Any]:
    """One mode at one rate."""
    from tokenloom.engine.request import Request
    from tokenloom.engine.sampling_params import SamplingParams
    from tokenloom.finetune.profiler import stored_profile

    engine = new_engine(args.worker, args)
    trainer = None
    if args.worker != "off":
        trainer = new_trainer(engine)
        engine.coserver.latency = stored_profile(engine, Path(args.home))
        engine.coserver.add(trainer)
    arrivals = trace(args.rate, args.seconds, engine.config.vocab_size, args.seed) if args.rate else []
    by_id = {f"r{i}": arrival for i, arrival in enumerate(arrivals)}
    waiting = list(by_id.items())
    start = time.monotonic()
    engine.coserver.arrivals = lambda: bool(waiting) and time.monotonic() - start >= waiting[0][1].at_s
    while True:
        now = time.monotonic() - start
        if now > args.seconds + DRAIN_S or not (now <= args.seconds or waiting or engine.requests):
            break
        while waiting and waiting[0][1].at_s <= now:
            name, arrival = waiting.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
            request = Request(name, arrival.prompt, params)
            request.arrival_s = start + arrival.at_s
            engine.add(request)
        if not engine.has_work:
            time.sleep(0.001)
            continue
        outputs = engine.step()
        now = time.monotonic() - start
        for output in outputs:
            by_id[output.request_id].token_s += [now] * sum(len(d.token_ids) for d in output.deltas)
    return report(args, engine, list(by_id.values()), start)


def trained(engine: Any, begin_s: float, end_s: float) -> float:
    """Tokens trained meanwhile: a pass that is half done counts for half."""
    backward = engine.config.num_layers + 1  # the layers and the loss
    return sum(
        (i.train_rows + i.piece_rows / backward) / 2
        for i in engine.coserver.iterations
        if begin_s <= i.at_s < end_s
    )


def report(args: argparse.Namespace, engine: Any, arrivals: list[Arrival], start: float) -> dict[str, Any]:
    """What one run of a worker found; the first seconds are not counted."""
    counted = [a for a in arrivals if a.at_s >= WARMUP_S]
    mixed = [i for i in engine.coserver.iterations if i.planned_ms and i.measured_ms]
    return {
        "seconds": args.seconds - WARMUP_S,
        "requests": [outcome(args, a) for a in counted],
        "trained": trained(engine, start + WARMUP_S, start + args.seconds),
        "restarts": engine.coserver.num_restarts,
        "over_plan": sum(i.measured_ms > i.planned_ms for i in mixed) / len(mixed) if mixed else None,
        "iterations": len(engine.coserver.iterations),
    }


def outcome(args: argparse.Namespace, arrival: Arrival) -> dict[str, Any]:
    times = arrival.token_s
    ttft = (times[0] - arrival.at_s) * 1e3 if times else NEVER_MS
    tpot = (times[-1] - times[0]) * 1e3 / max(1, len(times) - 1) if times else NEVER_MS
    done = len(times) == arrival.max_tokens
    return {
        "ttft_ms": ttft,
        "tpot_ms": tpot,
        "tokens": len(times),
        "attained": done and ttft <= args.ttft_ms and tpot <= args.tpot_ms,
        "gaps_ms": [(b - a) * 1e3 for a, b in pairwise(times)],
    }


def summary(mode: str, rate: float, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs of one mode at one rate, their requests taken together."""
    requests = [request for run in runs for request in run["requests"]]
    gaps = [gap for request in requests for gap in request.pop("gaps_ms")]
    seconds = sum(run["seconds"] for run in runs)
    return {
        "mode": mode,
        "rate": rate,
        "runs": runs,
        "requests": len(requests),
        "attainment": sum(r["attained"] for r in requests) / len(requests) if requests else 1.0,
        "ttft_ms": quantiles([r["ttft_ms"] for r in requests]),
        "gap_ms": quantiles(gaps),
        "finetuning_tokens_per_s": sum(run["trained"] for run in runs) / seconds,
        "inference_tokens_per_s": sum(r["tokens"] for r in requests) / seconds,
        "restarts": sum(run["restarts"] for run in runs),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {"p50": 0.0, "p99": 0.0}
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Unloaded time per token, the rate that saturates the machine, and the latency profile."""
    from tokenloom.engine.request import Request
    from tokenloom.engine.sampling_params import SamplingParams
    from tokenloom.finetune.profiler import EngineProfiler, stored_profile

    engine = new_engine("off", args)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    engine.add(Request("alone", list(range(100, 196)), params))
    times = []
    while engine.has_work:
        engine.step()
        times.append(time.monotonic())
    gaps = [b - a for a, b in pairwise(times[1:])]
    arrivals = trace(1.0, 48.0, engine.config.vocab_size)
    start = time.monotonic()
    for i, arrival in enumerate(arrivals):
        limits = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
        engine.add(Request(f"r{i}", arrival.prompt, limits))
    while engine.has_work:
        engine.step()
    rate = len(arrivals) / (time.monotonic() - start)
    began = time.monotonic()
    if stored_profile(engine, Path(args.home)) is None:
        trainer = new_trainer(engine)
        profiler = EngineProfiler(engine, trainer.adapter, trainer.hyper, Path(args.home))
        while profiler.run_cell() is None:
            continue
    profile_s = time.monotonic() - began
    return {"tpot_ms": statistics.median(gaps) * 1e3, "rate": rate, "profile_s": profile_s}


def worker(
    args: argparse.Namespace, mode: str, rate: float = 0.0, seconds: float = 0.0, seed: int = 1
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", mode, "--rate", str(rate), "--seconds", str(seconds)]
    command += ["--tpot-ms", str(args.tpot_ms), "--ttft-ms", str(args.ttft_ms), "--home", args.home]
    command += ["--temporal-every", str(args.temporal_every), "--seed", str(seed)]
    command += ["--max-batch-tokens", str(args.max_batch_tokens)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def measure(args: argparse.Namespace, load: float, full_rate: float) -> list[dict[str, Any]]:
    """All modes at one load, and the job alone, by turns: a slow spell of the machine should meet each.

    "separate p": a share p of the machines serves, each at rate / p, the others train.
    """
    modes = {mode: (mode, 1.0) for mode in args.modes.split(",")}
    modes |= {f"separate {float(p):.0%}": ("off", float(p)) for p in args.shares.split(",") if p}
    modes["ft_only"] = ("ft_only", math.inf)  # rate / inf: no requests
    seconds = args.seconds * (2 if load < LIGHT else 1)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    for seed in range(1, args.repeats + 1):
        for name, (mode, share) in modes.items():
            runs[name].append(worker(args, mode, load * full_rate / share, seconds, seed))
    rows = []
    alone = summary("ft_only", 0.0, runs["ft_only"])["finetuning_tokens_per_s"]
    for name, (_, share) in modes.items():
        row = summary(name, load * full_rate, runs[name]) | {"load": load}
        if name.startswith("separate"):
            row["finetuning_tokens_per_s"] = alone * (1 - share)
            row["inference_tokens_per_s"] *= share
        rows.append(row)
        show(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--loads", default="0.05,0.2,0.4,0.6,0.8")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument(
        "--shares", default="0.25,0.5,0.75", help="of emulated separate clusters; '' for none"
    )
    parser.add_argument("--repeats", type=int, default=2, help="traces per load")
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--temporal-every", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=32, help="rows of requests in a batch")
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--out", type=Path, default=Path("results/coserve"))
    parser.add_argument("--tpot-ms", type=float, default=0.0, help="0: 3 x an unloaded token's time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--home", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(calibrate(args) if args.worker == "calibrate" else replay(args)))
        return
    args.home = args.home or os.environ.get("TOKENLOOM_HOME") or tempfile.mkdtemp(prefix="tokenloom-bench-")
    found = worker(args, "calibrate")
    args.tpot_ms = args.tpot_ms or 3 * found["tpot_ms"]
    print(
        f"unloaded token {found['tpot_ms']:.1f} ms, so TPOT target {args.tpot_ms:.0f} ms, TTFT target "
        f"{args.ttft_ms:.0f} ms; load 1 = {found['rate']:.2f} requests/s; "
        f"profile took {found['profile_s']:.0f} s"
    )
    print(HEADER)
    loads = map(float, args.loads.split(","))
    rows = [row for load in loads for row in measure(args, load, found["rate"])]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"calibration": found, "rows": rows}
    (args.out / "coserve.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(rows, args.out / "coserve.png")
    verdict(rows)


if __name__ == "__main__":
    main()
