"""Decoding at a long context under KV methods, by turns in one process, beside reading everything.

python benchmarks/kv_long_context.py [SPEC ...] [--tokens 8000] [--rounds 3] [--steps 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from tokenloom import LLM, SamplingParams
from tokenloom.engine.request import Request
from tokenloom.methods.kv import combine

SPECS = [
    "quest(budget=512)",
    "tokenselect(budget=512, prefill=False)",
    "fasa(budget=512)",
    "snapkv(budget=512)",
    "streaming(budget=512)",
    "kivi(bits=4)",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="measured of each spec in each round")
    args = parser.parse_args()

    llm = LLM(cache__kv_bytes=3 * 10**9)
    engine = llm.engine
    ids: list[int] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        ids += llm.tokenizer.encode(path.read_text("utf-8", errors="replace"))
        if len(ids) >= args.tokens:
            break
    prompt = ids[: args.tokens]
    # The prompt's blocks are computed once, and shared by prefix.
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
    params = SamplingParams(temperature=0, max_tokens=args.steps + 8, ignore_eos=True)
    times: dict[str, list[float]] = {spec: [] for spec in ["off", *args.specs]}
    for turn in range(args.rounds):
        for spec, taken in times.items():
            name = f"{spec} {turn}"
            engine.add(Request(name, prompt, params, kv=combine(spec)))
            for _ in range(3):  # the end of the prompt, and what is made once
                engine.step()
            for _ in range(args.steps):
                start = time.perf_counter()
                engine.step()
                taken.append((time.perf_counter() - start) * 1e3)
            engine.abort(name)
    dense = statistics.median(times["off"])
    print(f"{args.tokens} tokens of context, one stream; ms per token")
    print("| method | median | fastest | against reading everything |\n|---|---|---|---|")
    for spec, taken in times.items():
        median = statistics.median(taken)
        print(f"| `{spec}` | {median:.1f} | {min(taken):.1f} | {dense / median:.2f}x |")


if __name__ == "__main__":
    main()
