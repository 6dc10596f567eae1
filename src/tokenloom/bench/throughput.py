"""`tokenloom bench`: prefill, decode and concurrent streams of one engine on this machine."""

from __future__ import annotations

import platform
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokenloom.bench.profile import PhaseProfile
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import describe
from tokenloom.llm import LLM

# Phases of a step that are not arithmetic on weights.
OVERHEAD = ("schedule", "build", "sample", "publish")


def measure(
    llm: LLM, prompt_tokens: int, new_tokens: int, streams: list[int], repeats: int, profile: bool
) -> dict[str, Any]:
    """Run the workload.

    Args:
        prompt_tokens: tokens of each prompt; no two prompts share a prefix.
        new_tokens: tokens that each stream decodes.
        streams: numbers of concurrent streams to try.
        repeats: runs of each measurement; medians are reported.
        profile: also split a decode iteration into its phases.

    Returns:
        Tokens per second and milliseconds, ready for JSON.
    """
    engine = llm.engine
    prompts = Prompts(engine.config.vocab_size)
    run_streams(engine, prompts, 1, prompt_tokens, 2)  # warm up: first touch of memory, lazy initialisation
    prefill = median(run_streams(engine, prompts, 1, prompt_tokens, 1)[0] for _ in range(repeats))
    results: dict[str, Any] = {
        "model": engine.name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "backend": describe(engine.decoder.kernels),
        "weights_mb": engine.decoder.num_bytes / 1e6,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "prefill": {"tokens": prompt_tokens, "ms": prefill * 1e3, "tokens_per_s": prompt_tokens / prefill},
        "decode": [],
    }
    for count in streams:
        runs = [run_streams(engine, prompts, count, prompt_tokens, new_tokens) for _ in range(repeats)]
        decode = median(seconds for _, seconds in runs)
        total = median(a + b for a, b in runs)
        results["decode"].append(
            {
                "streams": count,
                "iteration_ms": decode / (new_tokens - 1) * 1e3,
                "decode_tokens_per_s": count * (new_tokens - 1) / decode,
                "total_tokens_per_s": count * new_tokens / total,
            }
        )
        if profile:
            results["decode"][-1]["phases_ms"] = phases(engine, prompts, count, prompt_tokens)
    return results


class Prompts:
    """Prompts of given lengths, no two of which begin alike."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.count = 0

    def next(self, length: int) -> list[int]:
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        return torch.randint(self.vocab_size, (length,), generator=generator).tolist()


def run_streams(
    engine: Engine, prompts: Prompts, count: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds until every stream has its first token, and from there to the last token of all."""
    _start(engine, prompts, count, prompt_tokens, new_tokens)
    start = time.perf_counter()
    while any(s.num_output == 0 for r in engine.requests.values() for s in r.sequences):
        engine.step()
    middle = time.perf_counter()
    while engine.has_work:
        engine.step()
    return middle - start, time.perf_counter() - middle


def phases(engine: Engine, prompts: Prompts, count: int, prompt_tokens: int) -> dict[str, float]:
    """Median milliseconds of each phase of a decode iteration, and of all phases in OVERHEAD together."""
    _start(engine, prompts, count, prompt_tokens, 34)
    while any(s.num_output == 0 for r in engine.requests.values() for s in r.sequences):
        engine.step()
    profile = PhaseProfile()
    untimed, engine.timer = engine.timer, profile
    for _ in range(30):
        engine.step()
    engine.timer = untimed
    while engine.has_work:
        engine.step()
    together = [sum(parts) for parts in zip(*(profile.times_s[p] for p in OVERHEAD), strict=True)]
    return {**profile.medians_ms(), "overhead": median(together) * 1e3}


def _start(engine: Engine, prompts: Prompts, count: int, prompt_tokens: int, new_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for _ in range(count):
        prompt = prompts.next(prompt_tokens)
        engine.add(Request(f"bench-{prompts.count}", prompt, params))


def report(results: dict[str, Any], console: Console) -> None:
    """Print what `measure` returned as tables."""
    console.print(
        f"{results['model']}  {results['dtype']}  {results['device']}  backend {results['backend']}  "
        f"{results['threads']} threads  {results['machine']}  weights {results['weights_mb']:.0f} MB",
        highlight=False,
    )
    prefill = results["prefill"]
    console.print(
        f"prefill of {prefill['tokens']} tokens: {prefill['ms']:.0f} ms, "
        f"{prefill['tokens_per_s']:.0f} tokens/s"
    )
    table = Table("streams", "iteration ms", "decode tokens/s", "with prefill tokens/s")
    for row in results["decode"]:
        table.add_row(
            str(row["streams"]),
            f"{row['iteration_ms']:.1f}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['total_tokens_per_s']:.1f}",
        )
    console.print(table)
    profiled = [row for row in results["decode"] if "phases_ms" in row]
    if profiled:
        names = list(profiled[0]["phases_ms"])
        table = Table("streams", *[f"{name} ms" for name in names])
        for row in profiled:
            table.add_row(str(row["streams"]), *[f"{row['phases_ms'][name]:.3f}" for name in names])
        console.print(table)
