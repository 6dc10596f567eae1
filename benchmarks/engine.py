"""tokenloom against Hugging Face transformers on the same weights, in one run.

    python benchmarks/engine.py [--repeats 5] [--json results.json]

Both hold the default model in float32 and use the same threads. Each measurement alternates between the
two, so that a change in the machine's speed hits both; medians and their ratio are printed.

- prefill: one forward over 512 tokens, logits of the last one.
- decode: one sequence, 64 greedy tokens after a prompt of 128, time per token after the first.
- 16 requests: ragged prompts of 32 to 256 tokens, 32 greedy tokens each. transformers answers them one
  after another with `generate`, tokenloom in one continuous batch; total tokens per second.
- memory: resident bytes of a process that has loaded the model and served one request, minus its weights
  and the KV pool's touched part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from tokenloom.bench.throughput import Prompts, run_streams
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.llm import LLM
from tokenloom.models.catalog import DEFAULT_MODEL, resolve

PREFILL, PROMPT, NEW, STREAMS, STREAM_NEW = 512, 128, 64, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM  # not at the top: the idle process must not load it

    llm = LLM(DEFAULT_MODEL, model__dtype="float32", model__quantize="none", cache__prefix_caching=False)
    path = resolve(DEFAULT_MODEL)
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = Prompts(llm.engine.config.vocab_size)
    ragged = [prompts.next(32 + 224 * i // (STREAMS - 1)) for i in range(STREAMS)]

    def ours_prefill() -> float:
        return PREFILL / run_streams(llm.engine, prompts, 1, PREFILL, 1)[0]

    def ours_decode() -> float:
        return (NEW - 1) / run_streams(llm.engine, prompts, 1, PROMPT, NEW)[1]

    def ours_streams() -> float:
        params = SamplingParams(temperature=0, max_tokens=STREAM_NEW, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(ragged, params)
        return STREAMS * STREAM_NEW / (time.perf_counter() - start)

    @torch.inference_mode()
    def peer_prefill() -> float:
        ids = torch.tensor([prompts.next(PREFILL)])
        start = time.perf_counter()
        peer(ids, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    def peer_generate(ids: list[int], new: int) -> None:
        tokens = torch.tensor([ids])
        peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    def peer_decode() -> float:
        ids = prompts.next(PROMPT)
        start = time.perf_counter()
        peer_generate(ids, 1)
        middle = time.perf_counter()
        peer_generate(ids, NEW)
        end = time.perf_counter()
        return (NEW - 1) / ((end - middle) - (middle - start))

    def peer_streams() -> float:
        start = time.perf_counter()
        for ids in ragged:
            peer_generate(ids, STREAM_NEW)
        return STREAMS * STREAM_NEW / (time.perf_counter() - start)

    rows = []
    for name, ours, theirs, target in (
        (f"prefill of {PREFILL}", ours_prefill, peer_prefill, 1.0),
        ("decode, 1 sequence", ours_decode, peer_decode, 1.5),
        (f"{STREAMS} ragged requests", ours_streams, peer_streams, 4.0),
    ):
        a, b = alternate(ours, theirs, args.repeats)
        rows.append({"what": name, "tokenloom": a, "transformers": b, "ratio": a / b, "target": target})

    table = Table("float32, tokens/s", "tokenloom", "transformers", "ratio", "target")
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['tokenloom']:.1f}",
            f"{row['transformers']:.1f}",
            f"{row['ratio']:.2f}x",
            f"{row['target']}x",
        )
    console = Console()
    console.print(table)
    memory = idle_memory()
    console.print(
        f"memory at idle: {memory['resident'] / 1e6:.0f} MB resident, of which weights "
        f"{memory['weights'] / 1e6:.0f} MB; KV pool {memory['kv_pool'] / 1e6:.0f} MB reserved, "
        f"{memory['kv_touched'] / 1e6:.0f} MB of it touched; besides these "
        f"{memory['besides'] / 1e6:.0f} MB (target 400)"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"threads": torch.get_num_threads(), "rows": rows, **memory}, indent=2)
        )


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of two measurements taken in turns, after one unrecorded run of each."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def idle_memory() -> dict[str, float]:
    """Resident bytes of a fresh process that has answered one request, and what they are made of."""
    done = subprocess.run([sys.executable, __file__, "_idle"], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def print_idle_memory() -> None:
    llm = LLM(DEFAULT_MODEL, model__dtype="float32", model__quantize="none")
    engine = llm.engine
    engine.add(Request("warm", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(fields["VmRSS"].split()[0]) * 1024
    touched = engine.kv.num_bytes / engine.pool.num_blocks  # the one block that the request wrote
    weights = engine.decoder.num_bytes
    print(
        json.dumps(
            {
                "resident": resident,
                "weights": weights,
                "kv_pool": engine.kv.num_bytes,
                "kv_touched": touched,
                "besides": resident - weights - touched,
            }
        )
    )


if __name__ == "__main__":
    print_idle_memory() if sys.argv[1:] == ["_idle"] else main()
