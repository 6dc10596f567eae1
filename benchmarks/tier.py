"""What a prompt costs by where its blocks are: nowhere, on a disk, in the host's memory, in the pool.

    python benchmarks/tier.py [--prompt 2048] [--repeats 5] [--folder /var/tmp] [--kv-dtype auto|int8]
        [--json results.json]

Engines on the default model, one for each kind of tier. Each repeat sends a new prompt, takes every block of
the pool so that what is cached must leave it, and sends the prompt again: timed is the second time to the
first token. The kinds alternate. `pool` does not take the blocks away. The disk's file is as a rule still in
the system's page cache, as it would be in use; `disk, waiting` has its blocks read ahead before it is timed,
as a request has that waits for a while.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tokenloom.bench.throughput import Prompts
from tokenloom.config import load_settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams

KINDS = {"none": "none", "disk": "disk", "disk, waiting": "disk", "host": "host", "pool": "none"}


def first_token_ms(engine: Engine, prompt: list[int]) -> float:
    engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - start) * 1e3


def take_every_block(engine: Engine) -> None:
    for block in [engine.pool.allocate() for _ in range(engine.pool.num_available)]:
        engine.pool.release(block)


def read_ahead(engine: Engine, prompt: list[int]) -> None:
    """What waiting for a while does for a request with this prompt."""
    assert engine.pool.tier is not None
    waiting = Request("r", prompt, SamplingParams(max_tokens=1))
    engine.add(waiting)
    digests = list(waiting.sequences[0].cold_digests(engine.pool.tier.read_ahead_blocks))
    engine.abort("r")
    engine.pool.tier.read_ahead(digests)
    for future in engine.pool.tier._ahead.values():
        future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default="/var/tmp", help="cache.tier_path")
    parser.add_argument("--kv-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys = {"cache.dtype": args.kv_dtype, "cache.kv_bytes": 2**28, "cache.tier_path": args.folder}
    engines = {
        kind: Engine(load_settings({**keys, "cache.tier": kind})) for kind in dict.fromkeys(KINDS.values())
    }
    prompts = Prompts(engines["none"].config.vocab_size)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(args.repeats):
        for name, kind in KINDS.items():
            engine, prompt = engines[kind], prompts.next(args.prompt)
            first_token_ms(engine, prompt)
            if name != "pool":
                take_every_block(engine)
            if name == "disk, waiting":
                read_ahead(engine, prompt)
            times[name].append(first_token_ms(engine, prompt))
    table = Table(title=f"first token of a prompt of {args.prompt} tokens that was computed before")
    for column in ("its blocks are in", "ms", "of computing"):
        table.add_column(column, justify="left" if column == "its blocks are in" else "right")
    medians = {name: median(values) for name, values in times.items()}
    for name, value in medians.items():
        table.add_row(name, f"{value:.1f}", f"{value / medians['none']:.3f}")
    Console().print(table)
    stats = engines["disk"].stats()
    assert stats.tier_hits_tokens > 0 and stats.tier_corrupt == 0
    if args.json is not None:
        options = {k: str(v) for k, v in vars(args).items()}
        block_bytes = engines["none"].kv.block_bytes
        args.json.write_text(
            json.dumps({"options": options, "block_bytes": block_bytes, "ms": times}, indent=1)
        )


if __name__ == "__main__":
    main()
