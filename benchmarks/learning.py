"""Does a co-served job learn what a job alone learns? Held-out loss on real text, at the same token counts.

    python benchmarks/learning.py [--steps 16] [--rate 0.3] [--out results/learning]

The text is this interpreter's standard library, cut into samples of 256 tokens; every eighth file is held
out. The same job runs twice: alone (`ft_only`), and co-served with a seeded trace of requests.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from coserve import new_engine, trace

from tokenloom.config import home
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.finetune.data import Sample
from tokenloom.finetune.hyperparameters import FinetuneOptions, resolve_hyperparameters
from tokenloom.finetune.local import new_adapter
from tokenloom.finetune.objective import SupervisedFinetuning
from tokenloom.finetune.profiler import EngineProfiler, stored_profile
from tokenloom.finetune.trainer import Trainer

TOKENS, BATCH, HELD_OUT = 256, 4, 16


class Curve:
    """Collects the held-out loss at each checkpoint."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.done = False

    def step(self, progress: Any, metrics: Any, eta_s: Any) -> None:
        self.tokens = progress.trained_tokens

    def checkpoint(self, snapshot: Any, metrics: dict[str, float]) -> None:
        self.points.append((self.tokens, metrics["full_valid_loss"]))

    def save(self, snapshot: Any) -> None:
        self.saved = True

    def finished(self, snapshot: Any) -> None:
        self.done = True

    def failed(self, error: BaseException, step: int) -> None:
        raise error


def samples_of(engine: Any, count: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples, from different files."""
    kinds: tuple[list[Sample], list[Sample]] = ([], [])
    wanted = (count, HELD_OUT)
    for i, path in enumerate(sorted(Path(argparse.__file__).parent.glob("*.py"))):
        held = i % 8 == 7
        ids = engine.tokenizer.encode(path.read_text("utf-8", errors="replace"))
        for start in range(0, min(len(ids), 8 * TOKENS) - TOKENS, TOKENS):
            if len(kinds[held]) < wanted[held]:
                kinds[held].append(Sample(ids[start : start + TOKENS], [0.0] + [1.0] * (TOKENS - 1)))
    return kinds


def run(mode: str, args: argparse.Namespace) -> tuple[list[tuple[int, float]], int, float]:
    """The curve, the requests answered meanwhile, and the seconds it took."""
    engine = new_engine(mode, args)
    train, valid = samples_of(engine, args.steps * BATCH)
    options = {
        "hyperparameters": {"n_epochs": 1, "batch_size": BATCH},
        "training": {"max_seq_tokens": TOKENS, "checkpoint_every_steps": 4, "learning_rate": 1e-3},
    }
    hyper = resolve_hyperparameters(len(train), FinetuneOptions.model_validate(options))
    adapter, curve = new_adapter(engine, hyper, 1), Curve()
    trainer = Trainer(
        engine,
        adapter,
        train,
        hyper,
        SupervisedFinetuning(),
        curve,
        seed=1,
        valid=valid,
    )
    if mode == "coserve":
        engine.coserver.latency = stored_profile(engine, args.home)
        if engine.coserver.latency is None:
            profiler = EngineProfiler(engine, adapter, hyper, args.home)
            while (model := profiler.run_cell()) is None:
                continue
            engine.coserver.latency = model
    engine.coserver.add(trainer)
    arrivals = trace(args.rate, 3600.0, engine.config.vocab_size) if mode == "coserve" else []
    start, sent = time.monotonic(), 0
    while not curve.done:
        while arrivals and arrivals[0].at_s <= time.monotonic() - start:
            arrival = arrivals.pop(0)
            params = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
            engine.add(Request(f"r{sent}", arrival.prompt, params))
            sent += 1
        engine.step()
    return curve.points, sent, time.monotonic() - start


def plot(alone: list[tuple[int, float]], shared: list[tuple[int, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 3.4))
    axis.plot(*zip(*alone, strict=True), marker="o", label="alone (ft_only)")
    axis.plot(*zip(*shared, strict=True), marker="x", linestyle="--", label="co-served")
    axis.set(xlabel="trained tokens", ylabel="held-out loss")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--rate", type=float, default=0.3, help="requests per second beside the co-served job"
    )
    parser.add_argument("--home", type=Path, default=home(), help="where latency profiles are stored")
    parser.add_argument("--out", type=Path, default=Path("results/learning"))
    args = parser.parse_args()
    args.max_batch_tokens, args.temporal_every, args.tpot_ms, args.ttft_ms = 512, 64, 120.0, 2000.0
    random.seed(0)
    alone, _, alone_s = run("ft_only", args)
    shared, requests, shared_s = run("coserve", args)
    print(f"ft_only took {alone_s:.0f} s; co-served {shared_s:.0f} s beside {requests} requests")
    print("trained tokens  held-out loss ft_only  co-served  difference")
    for (tokens, a), (_, b) in zip(alone, shared, strict=True):
        print(f"{tokens:14d}  {a:21.5f}  {b:9.5f}  {abs(a - b):10.5f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "learning.json").write_text(json.dumps({"ft_only": alone, "coserve": shared}) + "\n")
    plot(alone, shared, args.out / "learning.png")


if __name__ == "__main__":
    main()
