"""Decodes with a common prefix, with and without reading it once for all of them.

    python benchmarks/shared_prefix.py [--streams 16] [--prefix 2048] [--own 16] [--new 48] [--repeats 5]
        [--kv-dtype auto|int8] [--json results.json]

One engine on the default model; `cache.shared_prefix_attention` alternates between off and on, so that a
change in the machine's speed hits both. Each run answers all streams at once, after their prefix is in the
cache. Timed are the iterations in which all of them decode: medians over the run, then over the repeats.
Keys read are counted by the kernels' own plan. Answers are greedy, and the same.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from tokenloom.bench.throughput import Prompts
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import KVSpan, describe
from tokenloom.kernels.shared_prefix import shared_prefixes


@dataclass
class Run:
    iteration_ms: float
    reads_saved: int
    answers: list[list[int]]


def run(engine: Engine, prompts: list[list[int]], new: int, *, shared: bool) -> Run:
    """All prompts at once; their common prefix is in the cache."""
    engine.settings.cache.shared_prefix_attention = "auto" if shared else "off"
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    requests = [Request(f"{i}", prompt, params) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    saved, times = engine.stats().prefix_reads_saved, []
    while engine.has_work:
        decoding = all(r.sequences[0].num_output and not r.finished for r in requests)
        start = time.perf_counter()
        engine.step()
        if decoding:
            times.append((time.perf_counter() - start) * 1e3)
    answers = [request.sequences[0].output for request in requests]
    return Run(median(times), engine.stats().prefix_reads_saved - saved, answers)


def count_reads(engine: Engine, streams: int, prefix: int, own: int) -> dict[str, int]:
    """Keys, of one head each, that one layer's attention reads for one token of all streams."""
    from tokenloom.kernels.native_arguments import keys_read

    size, config = engine.pool.block_size, engine.config
    common, own_blocks = prefix // size, -(-(own + 1) // size)
    spans = []
    for i in range(streams):
        first = common + i * own_blocks
        blocks = [*range(common), *range(first, first + own_blocks)]
        spans.append(KVSpan(i, 1, common * size + own + 1, blocks, contiguous=i == 0))
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    return {
        "separate": keys_read(spans, [], size, **heads),
        "shared": keys_read(spans, shared_prefixes(spans, size), size, **heads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=2048, help="tokens that all streams begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens of each prompt behind the prefix")
    parser.add_argument("--new", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = Engine(load_settings({"cache.dtype": args.kv_dtype, "scheduler.max_running": args.streams}))
    source = Prompts(engine.config.vocab_size)
    prefix = source.next(args.prefix)
    prompts = [prefix + source.next(args.own) for _ in range(args.streams)]
    warm = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add(Request("warm", prefix + source.next(1), warm))
    while engine.has_work:
        engine.step()

    modes = {"separate": False, "shared": True}
    runs: dict[str, list[Run]] = {mode: [] for mode in modes}
    for _ in range(args.repeats):
        for mode, shared in modes.items():
            runs[mode].append(run(engine, prompts, args.new, shared=shared))
    reads = count_reads(engine, args.streams, args.prefix, args.own)

    table = Table(
        title=f"{args.streams} streams, {args.prefix} tokens in common; {describe(engine.decoder.kernels)}"
    )
    for column in ("attention", "ms an iteration", "tokens/s", "keys read, a layer", "same answers"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    medians = {mode: median(r.iteration_ms for r in runs[mode]) for mode in modes}
    reference = runs["separate"][0].answers
    for mode in modes:
        equal = sum(a == b for a, b in zip(runs[mode][-1].answers, reference, strict=True))
        speed = args.streams / medians[mode] * 1e3
        table.add_row(
            mode, f"{medians[mode]:.1f}", f"{speed:.0f}", f"{reads[mode]:,}", f"{equal} of {args.streams}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"shared / separate: {medians['shared'] / medians['separate']:.3f} of the time, "
        f"{reads['shared'] / reads['separate']:.3f} of the keys read"
    )
    if args.json is not None:
        result = {
            "options": {k: str(v) for k, v in vars(args).items()},
            "threads": torch.get_num_threads(),
            "iteration_ms": medians,
            "keys_read": reads,
            "runs": {mode: [asdict(r) for r in runs[mode]] for mode in modes},
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
